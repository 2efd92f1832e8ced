"""[[levels]] blocks exchanged in a file that a person wrote."""

from __future__ import annotations

from pathlib import Path

import pytest

from hbp_titan.config import load_config
from hbp_titan.packing import Level
from hbp_titan.tuning.auto import replace_levels

LEVELS = [Level(64), Level(512, 2, "hybrid", "full", 3)]
BLOCKS = """\
[[levels]]
max_tokens = 64
cp_degree = 1
cp_style = "ulysses"
ac_policy = "none"

[[levels]]
max_tokens = 512
cp_degree = 2
cp_style = "hybrid"
ac_policy = "full"
ac_layers = 3
"""


def test_blocks_are_replaced_where_they_were_and_the_rest_is_kept() -> None:
    before = """\
# A run.
[packing]
level_order = "alternate"  # short, long

# Short samples.
[[levels]]
max_tokens = 1024  # tokens
cp_degree = 1

# Long samples.
[[levels]]
max_tokens = 8192

# Training.
[training]
epochs = 2
"""
    after = f"""\
# A run.
[packing]
level_order = "alternate"  # short, long

# Short samples.
{BLOCKS}
# Long samples.

# Training.
[training]
epochs = 2
"""
    assert replace_levels(before, LEVELS, "a.toml") == after


def test_blocks_are_added_at_the_end_and_auto_is_taken_back(tmp_path: Path) -> None:
    before = '[packing]\nlevels = "auto"  # measured\n[job]\ndescription = "levels = \\"auto\\""\n'
    after = replace_levels(before, LEVELS, "a.toml")
    assert after == '[packing]\nlevels = ""  # measured\n[job]\ndescription = "levels = \\"auto\\""\n\n' + BLOCKS
    (tmp_path / "a.toml").write_text(after)
    assert load_config(["--job.config_file", str(tmp_path / "a.toml")]).levels == LEVELS
    assert replace_levels("", LEVELS, "") == BLOCKS


@pytest.mark.parametrize(
    "text",
    [
        "levels = [{max_tokens = 64}]\n",
        "packing.auto_levels = true\n",
        '[job]\ndescription = """\n[[levels]]\nmax_tokens = 3\n"""\n',
    ],
)
def test_a_file_that_is_written_otherwise_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"a\.toml: levels are not written as \[\[levels\]\] blocks"):
        replace_levels(text, LEVELS, "a.toml")
