"""Property tests draw the same examples at every run of the test command."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parent


def test_no_test_has_settings_of_its_own() -> None:
    own = [
        str(path.relative_to(TESTS))
        for path in sorted(TESTS.rglob("*.py"))
        if path.name != "properties.py" and re.search(r"^@(hypothesis\.)?settings\(", path.read_text(), re.M)
    ]
    assert not own, "write @examples(number) of tests/properties.py, which follows the profile"
