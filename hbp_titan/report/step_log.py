"""StepLog: metrics.jsonl as columns, whatever keys its lines have.

Owns the reading of that file. Runs of other versions lack keys or have others, killed ones end in half a line: nothing
here assumes that a key is there, and a value of the wrong type is as one that is missing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Key = tuple[str, ...]


@dataclass
class StepLog:
    """The steps of a run in ascending order; a step that is there twice counts as its last line has it.

    steps: int64 [n]. level_names: what each step trained, "1K/cp1+8K/cp2" where it mixes levels. skipped: reason by
    step. work_by_rank: (step, seconds of each rank) of the live checks. experts: (step, tokens of each expert by layer)
    as last recorded. unreadable: lines that are no JSON objects with a step; cut: the last line is half.
    """

    steps: NDArray[np.int64]
    level_names: list[str] = field(default_factory=list)
    skipped: dict[int, str] = field(default_factory=dict)
    work_by_rank: list[tuple[int, list[float]]] = field(default_factory=list)
    experts: tuple[int, dict[str, list[float]]] | None = None
    unreadable: int = 0
    cut: bool = False
    _columns: dict[Key, tuple[list[int], list[float]]] = field(default_factory=dict, repr=False)
    _rows: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64), repr=False)
    """Row of each line of the file, -1 for one that does not count."""

    def __len__(self) -> int:
        return len(self.steps)

    def column(self, *key: str) -> Floats:
        """The values under a key, or a key within an object and so on, float64 [n]; NaN where a step has none."""
        values = np.full(len(self), np.nan)
        if key in self._columns:
            lines, found = self._columns[key]
            rows = self._rows[np.array(lines, np.int64)]
            values[rows[rows >= 0]] = np.array(found)[rows >= 0]
        return values

    def present(self, *key: str) -> NDArray[np.bool_]:
        """The steps that have the key or any key within it, bool [n]; its value may be null."""
        found = np.zeros(len(self), bool)
        for name, (lines, _) in self._columns.items():
            if name[: len(key)] == key:
                rows = self._rows[np.array(lines, np.int64)]
                found[rows[rows >= 0]] = True
        return found

    def names(self, *key: str) -> list[str]:
        """The names within an object, in the order in which they first appear: names("sources")."""
        depth = len(key)
        return list(dict.fromkeys(name[depth] for name in self._columns if len(name) > depth and name[:depth] == key))

    def has(self, *key: str) -> bool:
        """Whether any step has a number under the key."""
        return bool(np.isfinite(self.column(*key)).any())

    def levels(self) -> dict[str, str]:
        """Each level's name by its index as in loss_by_level; "8K/cp2, 8K/cp1" where it changed on the way."""
        found: dict[str, dict[str, None]] = {}
        indices = sorted(self.names("loss_by_level"), key=lambda index: (len(index), index))
        member = np.stack([self.present("loss_by_level", index) for index in indices]) if indices else np.zeros((0, 0))
        seen: set[tuple[str, bytes]] = set()
        for row, name in enumerate(self.level_names if indices else []):
            combination = (name, member[:, row].tobytes())
            if combination not in seen:
                seen.add(combination)
                mine = [index for index, is_in in zip(indices, member[:, row], strict=True) if is_in]
                for index, part in zip(mine, name.split("+"), strict=False):
                    found.setdefault(index, {})[part] = None
        return {index: ", ".join(found.get(index, {f"level {index}": None})) for index in indices}


def read_steps(path: Path) -> StepLog:
    """The log in metrics.jsonl at `path`; one without steps where there is no such file."""
    log = StepLog(np.zeros(0, np.int64))
    steps: list[int] = []
    names: list[str] = []
    if not path.exists():
        return log
    with path.open("rb") as file:
        for raw in file:
            values = _parse(raw)
            if values is None:
                log.cut = not raw.endswith(b"\n")
                log.unreadable += not log.cut
                continue
            _add(log, len(steps), values)
            steps.append(values["step"])
            names.append(str(values.get("level_name") or ""))
    last_line = {step: line for line, step in enumerate(steps)}
    log.steps = np.array(sorted(last_line), np.int64)
    log._rows = np.full(len(steps), -1, np.int64)
    for row, step in enumerate(log.steps.tolist()):
        log._rows[last_line[step]] = row
    log.level_names = [names[last_line[step]] for step in log.steps.tolist()]
    return log


def _parse(raw: bytes) -> dict[str, Any] | None:
    try:
        values = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    is_step = isinstance(values, dict) and type(values.get("step")) is int and 0 <= values["step"] < 1 << 62
    return values if is_step else None


def _add(log: StepLog, line: int, values: dict[str, Any]) -> None:
    """Take one line of the file into the columns."""
    step = values["step"]
    log.skipped.pop(step, None)
    if values.get("skipped"):
        log.skipped[step] = str(values["skipped"])
    check = values.get("live_check")
    work = check.get("work_by_rank") if isinstance(check, dict) else None
    if isinstance(work, list) and work and all(_is_number(value) for value in work):
        log.work_by_rank = [(at, seconds) for at, seconds in log.work_by_rank if at < step]
        log.work_by_rank.append((step, [float(value) for value in work]))
    experts = values.pop("tokens_per_expert", None)
    if isinstance(experts, dict) and experts:
        layers = {
            str(name): row for name, row in experts.items() if isinstance(row, list) and all(map(_is_number, row))
        }
        log.experts = (step, layers)
    for key, value in _numbers(values):
        lines, found = log._columns.setdefault(key, ([], []))
        lines.append(line)
        found.append(value)


def _numbers(values: Mapping[str, Any], above: Key = ()) -> Iterator[tuple[Key, float]]:
    """Every number of an object and of the objects in it; null is NaN."""
    for name, value in values.items():
        key = (*above, name)
        if isinstance(value, dict) and len(key) < 5:
            yield from _numbers(value, key)
        elif value is None:
            yield key, float("nan")
        elif _is_number(value):
            yield key, float(value)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300
