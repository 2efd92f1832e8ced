"""Plan files: one safetensors file with the plan's arrays and, in its header, everything they came from.

Owns the bytes on disk and the comparison of a file with what is expected of it. The format is written here, in
thirty lines, rather than by the safetensors library, so that equal plans are equal bytes and a load maps the file
into memory: ranks of one node share its pages, and nothing is copied.

Layout (https://huggingface.co/docs/safetensors): u64 size of the header, the header as JSON, the arrays. The
header's __metadata__ holds one string, `plan`: a JSON object with the plan's settings, its fingerprint and the
fingerprints of its inputs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hbp_titan.packing.arrays import IntArray, Ragged
from hbp_titan.packing.cost import CostModel
from hbp_titan.packing.level import level_from_dict
from hbp_titan.packing.plan import Plan

MAX_HEADER_BYTES = 1 << 20


def save_plan(plan: Plan, path: str | Path, inputs: Mapping[str, str] | None = None) -> None:
    """Write `plan` to `path`, atomically. inputs: fingerprints of what it was made from, such as data, tokenizer."""
    described = {"settings": plan.settings(), "fingerprint": plan.fingerprint, "inputs": dict(inputs or {})}
    header: dict[str, Any] = {"__metadata__": {"plan": json.dumps(described, sort_keys=True)}}
    arrays = {name: np.ascontiguousarray(array, "<i8") for name, array in plan.arrays().items()}
    end = 0
    for name, array in arrays.items():
        header[name] = {"dtype": "I64", "shape": [len(array)], "data_offsets": [end, end + array.nbytes]}
        end += array.nbytes
    text = json.dumps(header, sort_keys=True).encode()
    text += b" " * (-len(text) % 8)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for array in arrays.values():
            file.write(array.data)
        # A checkpoint names the plan that it is a position in: it must not outlive it.
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def load_plan(path: str | Path, expect: Mapping[str, Any] | None = None) -> Plan:
    """The plan in `path`, its arrays mapped into memory, read-only.

    expect: values that the file must have been made from, by the names of Plan.settings() and of save_plan's
    `inputs`; what it does not name is not compared. Raises ValueError for a file that is no plan, is damaged, or
    was made from other values; the message lists every difference.
    """
    path = Path(path)
    described, entries, start = _read_header(path)
    try:
        arrays = {name: _mapped(path, start, entry["data_offsets"]) for name, entry in entries.items()}
        plan = _plan(described["settings"], arrays)
        _compare(path, {**described["settings"], **described["inputs"]}, expect or {})
        intact = plan.fingerprint == described["fingerprint"]
    except (KeyError, TypeError):
        raise ValueError(f"{path}: not a plan file of this version: delete it to plan anew") from None
    if not intact:
        raise ValueError(f"{path}: the plan file is damaged (its fingerprint does not match): delete it to plan anew")
    return plan


def _plan(settings: dict[str, Any], arrays: dict[str, IntArray]) -> Plan:
    """The plan of Plan.settings() and Plan.arrays(); KeyError or TypeError where one is missing or foreign."""
    ragged = Ragged(arrays.pop("ids"), arrays.pop("offsets"))
    levels = tuple(level_from_dict(values) for values in settings["levels"])
    costs = tuple(CostModel(**values) for values in settings["costs"])
    return Plan(**{**settings, **arrays, "levels": levels, "costs": costs, "packs": ragged})


def _read_header(path: Path) -> tuple[dict[str, Any], dict[str, Any], int]:
    """What the header says of the plan, its entry for each array, and where in the file the arrays start."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        text = file.read(size) if size <= MAX_HEADER_BYTES else b""
    try:
        entries = json.loads(text)
        described = json.loads(entries.pop("__metadata__")["plan"])
        end = max(entry["data_offsets"][1] for entry in entries.values())
    except (ValueError, KeyError, TypeError, AttributeError, UnicodeDecodeError):
        raise ValueError(f"{path}: not a plan file: delete it to plan anew") from None
    if path.stat().st_size != 8 + size + end:
        raise ValueError(
            f"{path}: the plan file is damaged: {path.stat().st_size} bytes where its header says {8 + size + end}: "
            "delete it to plan anew"
        )
    return described, entries, 8 + size


def _mapped(path: Path, start: int, data_offsets: list[int]) -> IntArray:
    begin, end = data_offsets
    if begin == end:  # an empty range cannot be mapped
        return np.zeros(0, np.int64)
    return np.memmap(path, "<i8", "r", offset=start + begin, shape=((end - begin) // 8,))


def _compare(path: Path, found: Mapping[str, Any], expect: Mapping[str, Any]) -> None:
    """Raise ValueError naming every value of `expect` that `found` lacks or has otherwise."""
    differences = []
    for name, value in expect.items():
        wanted = json.loads(json.dumps(value))
        if found.get(name) != wanted:
            differences.append(f"{name} is {json.dumps(found.get(name))} in the file but {json.dumps(wanted)} here")
    if differences:
        raise ValueError(
            f"{path}: the plan was made from other inputs: {'; '.join(differences)}: delete it to plan anew"
        )
