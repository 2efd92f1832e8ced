"""[[levels]] blocks as TOML text, and their exchange in a file that a person wrote.

Owns the rule of what stays: everything outside the blocks, comments and order included. The result is read back and
compared before it is returned, so that a file written in a way that is not understood is refused, never spoilt.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import sys
from collections.abc import Sequence
from typing import Any

from hbp_titan.packing import Level

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_HEADER = re.compile(r"\s*\[")
_LEVELS_HEADER = re.compile(r"\s*\[\[\s*levels\s*\]\]")
_PACKING_HEADER = re.compile(r"\s*\[\s*packing\s*\]")
_AUTO = re.compile(r"""(\s*levels\s*=\s*)["']auto["']""")


def levels_block(levels: Sequence[Level]) -> str:
    """The [[levels]] blocks of `levels`, a blank line between them."""
    blocks = []
    for level in levels:
        values = {key: value for key, value in dataclasses.asdict(level).items() if value is not None}
        blocks.append("".join(["[[levels]]\n", *(f"{key} = {json.dumps(value)}\n" for key, value in values.items())]))
    return "\n".join(blocks)


def replace_levels(text: str, levels: Sequence[Level], name: str) -> str:
    """The TOML `text` with its [[levels]] blocks, if any, replaced by those of `levels`, where the first of them was.

    packing.levels = "auto" becomes "". name: of the file, for messages. Comments and blank lines between the last key
    of a block and the next header belong to what follows and stay.
    Raises ValueError where levels are written in another way, such as an inline array.
    """
    kept: list[str] = []
    place: int | None = None
    in_packing = in_levels = False
    pending: list[str] = []
    for line in text.splitlines(keepends=True):
        if _HEADER.match(line):
            kept += pending if in_levels else []
            in_levels, in_packing = bool(_LEVELS_HEADER.match(line)), bool(_PACKING_HEADER.match(line))
            pending = []
            if in_levels:
                place = len(kept) if place is None else place
                continue
        if not in_levels:
            kept.append(_AUTO.sub(r'\1""', line) if in_packing else line)
        elif not line.strip() or line.lstrip().startswith("#"):
            pending.append(line)
        else:
            pending = []
    kept += pending
    if place is None:
        place = len(kept)
    before, after = "".join(kept[:place]), "".join(kept[place:])
    if place == len(kept) and before:
        before = before.rstrip("\n") + "\n\n"
    result = before + levels_block(levels) + after
    _check(text, result, levels, name)
    return result


def _check(text: str, result: str, levels: Sequence[Level], name: str) -> None:
    """Raise ValueError unless `result` says what `text` says but for the levels."""
    expected: dict[str, Any] = copy.deepcopy(tomllib.loads(text))
    expected.pop("levels", None)
    if expected.get("packing", {}).get("levels") == "auto":
        expected["packing"]["levels"] = ""
    try:
        found = tomllib.loads(result)
        blocks = [Level(**block) for block in found.pop("levels")]
    except (tomllib.TOMLDecodeError, TypeError):
        found, blocks = {}, []
    if found != expected or blocks != list(levels):
        raise ValueError(f"{name}: levels are not written as [[levels]] blocks: write them so, or leave --output out")
