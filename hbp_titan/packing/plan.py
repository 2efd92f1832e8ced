"""Plan: which samples each data-parallel rank trains in each iteration of one epoch, as arrays.

Owns the Plan type: its arrays, what can be asked of it and its fingerprint. Building one is build.py's task.

Plan files: one safetensors file with the plan's arrays and, in its header, everything they came from.

Owns the bytes on disk and the comparison of a file with what is expected of it. The format is written here, in
thirty lines, rather than by the safetensors library, so that equal plans are equal bytes and a load maps the file
into memory: ranks of one node share its pages, and nothing is copied.

Layout (https://huggingface.co/docs/safetensors): u64 size of the header, the header as JSON, the arrays. The
header's __metadata__ holds one string, `plan`: a JSON object with the plan's settings, its fingerprint and the
fingerprints of its inputs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hbp_titan.packing.cost import CostModel
from hbp_titan.packing.level import Level, level_from_dict
from hbp_titan.packing.ragged import IntArray, Ragged, offsets_of

# Raised whenever the same settings would give another plan.
PLANNER_VERSION = 1


class Iteration(NamedTuple):
    """One level trained by the whole world: packs[dp_rank] is an int64 array of sample ids, which may be empty."""

    level: int
    packs: tuple[IntArray, ...]


@dataclass(frozen=True)
class Plan:
    """The iterations of one epoch; every sample lies in exactly one pack (of a remainder, each sample that is left).

    levels, world_size, method, seed, epoch, global_batch_tokens, level_order, curriculum_steps: its settings.
    costs: the cost model of each level that balanced it.
    lengths, loss_tokens: int64 [num_samples], per sample.
    packs: all packs in training order; iteration i holds the next dp_degree of its level, one per dp rank.
    level_of_iteration: int64 [num_iterations].
    step_offsets: int64 [num_steps + 1]; optimizer step s trains iterations step_offsets[s] to step_offsets[s + 1].
    """

    levels: tuple[Level, ...]
    world_size: int
    method: str
    seed: int
    epoch: int
    global_batch_tokens: int
    level_order: str
    curriculum_steps: float
    costs: tuple[CostModel, ...]
    lengths: IntArray
    loss_tokens: IntArray
    packs: Ragged
    level_of_iteration: IntArray
    step_offsets: IntArray
    planner_version: int = PLANNER_VERSION

    @property
    def num_samples(self) -> int:
        """Samples of the data set; a remainder plans only the ids in packs.ids."""
        return len(self.lengths)

    @property
    def num_iterations(self) -> int:
        return len(self.level_of_iteration)

    @property
    def num_steps(self) -> int:
        return len(self.step_offsets) - 1

    @property
    def skipped(self) -> IntArray:
        """Ids of the samples that no level can hold and overlong="skip" left out, int64 [n]."""
        return np.flatnonzero(self.lengths > self.levels[-1].max_tokens)

    @cached_property
    def dp_degrees(self) -> IntArray:
        """Ragged of one iteration, per level, int64 [num_levels]."""
        return np.array([level.dp_degree(self.world_size) for level in self.levels], np.int64)

    @cached_property
    def pack_offsets(self) -> IntArray:
        """First pack of each iteration, int64 [num_iterations + 1]."""
        return offsets_of(self.dp_degrees[self.level_of_iteration])

    @cached_property
    def pack_tokens(self) -> IntArray:
        """Real tokens of each pack, int64 [num_packs]."""
        return self.packs.sums(self.lengths)

    @cached_property
    def pack_sum_sq(self) -> IntArray:
        """Sum of squared document lengths of each pack, int64 [num_packs]."""
        return self.packs.sums_of_squares(self.lengths)

    @cached_property
    def pack_levels(self) -> IntArray:
        """Level of each pack, int64 [num_packs]."""
        return np.repeat(self.level_of_iteration, self.dp_degrees[self.level_of_iteration])

    @cached_property
    def step_tokens(self) -> IntArray:
        """Real tokens of each optimizer step, int64 [num_steps]."""
        return self._per_step(self.lengths)

    @cached_property
    def step_loss_tokens(self) -> IntArray:
        """Tokens that bear loss in each optimizer step, int64 [num_steps]."""
        return self._per_step(self.loss_tokens)

    @cached_property
    def step_of_iteration(self) -> IntArray:
        """Optimizer step of each iteration, int64 [num_iterations]."""
        return np.repeat(np.arange(self.num_steps), np.diff(self.step_offsets))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the settings and arrays, hex."""
        digest = hashlib.sha256(json.dumps(self.settings(), sort_keys=True).encode())
        for name, array in self.arrays().items():
            digest.update(f"{name} {len(array)};".encode())
            digest.update(np.ascontiguousarray(array, "<i8").data)
        return digest.hexdigest()

    def iteration(self, index: int) -> Iteration:
        """Iteration `index`, 0 <= index < num_iterations."""
        level = int(self.level_of_iteration[index])
        return Iteration(level, tuple(self.pack(index, rank) for rank in range(self.dp_degrees[level])))

    def pack(self, index: int, dp_rank: int) -> IntArray:
        """Sample ids that data-parallel rank `dp_rank` trains in iteration `index`, int64 [n], n may be 0."""
        if not 0 <= index < self.num_iterations:
            raise IndexError(f"iteration {index} of a plan with {self.num_iterations}")
        at = self.pack_offsets[index] + dp_rank
        if not self.pack_offsets[index] <= at < self.pack_offsets[index + 1]:
            raise IndexError(f"dp rank {dp_rank} of iteration {index}, which has {self._dp_degree(index)}")
        start, end = self.packs.offsets[at : at + 2]
        return np.asarray(self.packs.ids[start:end], np.int64)

    def samples_of(self, first: int, last: int) -> IntArray:
        """All sample ids of iterations first to last - 1, int64 [n]."""
        start, end = self.packs.offsets[self.pack_offsets[[first, last]]]
        return np.asarray(self.packs.ids[start:end], np.int64)

    def max_documents(self, level: int) -> int:
        """Most samples in any pack of `level`; 0 where it has no iteration."""
        return int(self.packs.counts[self.pack_levels == level].max(initial=0))

    def heaviest_iteration(self, level: int) -> int | None:
        """The iteration of `level` with the costliest pack; None where the level has no iteration."""
        mine = np.flatnonzero(self.level_of_iteration == level)
        if not len(mine):
            return None
        largest = np.maximum.reduceat(self.costs_of_packs(self.costs), self.pack_offsets[:-1])
        return int(mine[np.argmax(largest[mine])])

    def costs_of_packs(self, costs: Sequence[CostModel]) -> NDArray[np.float64]:
        """Cost of each pack by the model of its level, float64 [num_packs]; costs: one per level."""
        result = np.zeros(self.packs.num_rows)
        for k, cost in enumerate(costs):
            mine = self.pack_levels == k
            result[mine] = cost.cost(self.pack_tokens[mine], self.pack_sum_sq[mine])
        return result

    def settings(self) -> dict[str, Any]:
        """Everything but the arrays that determines the plan, as plain JSON values."""
        return {
            "planner_version": self.planner_version,
            "levels": [dataclasses.asdict(level) for level in self.levels],
            "world_size": self.world_size,
            "method": self.method,
            "seed": self.seed,
            "epoch": self.epoch,
            "global_batch_tokens": self.global_batch_tokens,
            "level_order": self.level_order,
            "curriculum_steps": self.curriculum_steps,
            "costs": [dataclasses.asdict(cost) for cost in self.costs],
        }

    def arrays(self) -> dict[str, IntArray]:
        """The arrays that make up the plan, by name."""
        return {
            "lengths": self.lengths,
            "loss_tokens": self.loss_tokens,
            "ids": self.packs.ids,
            "offsets": self.packs.offsets,
            "level_of_iteration": self.level_of_iteration,
            "step_offsets": self.step_offsets,
        }

    def _dp_degree(self, index: int) -> int:
        return int(self.dp_degrees[self.level_of_iteration[index]])

    def _per_step(self, values: IntArray) -> IntArray:
        return np.add.reduceat(self.packs.sums(values), self.pack_offsets[self.step_offsets[:-1]])


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
