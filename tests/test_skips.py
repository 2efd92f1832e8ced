"""What a test run does not run is listed at its end with the command that would run it."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from types import SimpleNamespace

from tests.conftest import RUN, SETS, pytest_terminal_summary

TESTS = Path(__file__).resolve().parent
SKIPS = ("pytest.skip", "pytest.mark.skip", "pytest.mark.skipif", "pytest.importorskip")

COMMAND = re.compile(re.escape(RUN) + r"([A-Z_]+=\S+ )?(scripts/|\.venv/bin/|sudo |apt-get )")
"""A reason's end: a program, after variables of its environment, not advice."""


def _skips(path: Path) -> list[tuple[int, str]]:
    """Return (line, reason as source) of every call that skips; names of constants are replaced by their value."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    constants = {
        target.id: ast.unparse(node.value)
        for node in tree.body if isinstance(node, ast.Assign)
        for target in node.targets if isinstance(target, ast.Name)
    }  # fmt: skip
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in SKIPS:
            named = [word.value for word in node.keywords if word.arg == "reason"]
            positional = node.args[:1] if ast.unparse(node.func) == "pytest.skip" else []
            reason = "".join(ast.unparse(value) for value in [*named, *positional])
            found.append((node.lineno, constants.get(reason, reason)))
    return found


def test_every_reason_to_skip_has_the_command_that_runs_the_test() -> None:
    skips = {path: _skips(path) for path in TESTS.rglob("*.py")}
    assert sum(map(len, skips.values())) > 15  # the search finds them
    for path, found in skips.items():
        for line, reason in found:
            assert COMMAND.search(reason), f"{path.relative_to(TESTS)}:{line}: reason {reason} lacks '{RUN}COMMAND'"


def test_summary_groups_skipped_tests_by_reason_and_names_the_sets_that_are_deselected() -> None:
    lines: list[str] = []
    reports = [SimpleNamespace(longrepr=("file", 1, f"Skipped: needs {name}; run: get {name}")) for name in "bab"]
    reporter = SimpleNamespace(stats={"skipped": reports}, section=lines.append, write_line=lines.append)
    config = SimpleNamespace(option=SimpleNamespace(markexpr="not slow"))
    pytest_terminal_summary(reporter, config)  # type: ignore[arg-type]
    assert lines == [
        "not run here",
        "tests  why      to run them",
        "    2  needs b  get b",
        "    1  needs a  get a",
        f"  all  slow     {SETS['slow']}",
    ]
