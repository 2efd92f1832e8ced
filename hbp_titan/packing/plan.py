"""Plan: which samples each data-parallel rank trains in each iteration of one epoch, and its file format.

Owns the Plan type (arrays, derived figures, fingerprint) and plan files; build.py builds plans. A plan file is a
safetensors file (https://huggingface.co/docs/safetensors): u64 size of the header, the header as JSON, the arrays.
The header's __metadata__ holds one string, `plan`: a JSON object with the plan's settings, its fingerprint and the
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
from hbp_titan.packing.level import Level
from hbp_titan.packing.ragged import IntArray, Ragged, offsets_of

# Increase it with every change that gives the same settings another plan: it makes stored plans stale.
PLANNER_VERSION = 2
MAX_HEADER_BYTES = 1 << 20


class Iteration(NamedTuple):
    """One micro-batch of the whole world: packs[k] is an int64 array of sample ids, perhaps empty, of level levels[k].

    Packs lie on the ranks in this order, each on as many as its level's cp_degree.
    """

    levels: tuple[int, ...]
    packs: tuple[IntArray, ...]

    @property
    def level(self) -> int:
        """The level of all packs, each of which is one dp rank's; only level_order="parallel" mixes levels."""
        (level,) = set(self.levels)
        return level


@dataclass(frozen=True)
class Plan:
    """The iterations of one epoch; every sample is in exactly one pack (after replan, every remaining sample).

    levels, world_size, method, seed, epoch, global_batch_tokens, level_order, curriculum_steps: as in build_plan.
    costs: the cost model of each level that balanced the packs.
    lengths, loss_tokens: int64 [num_samples], per sample.
    packs: all packs in training order. Each takes its level's cp_degree of ranks, one pack after the other, so that
        iteration i holds the next packs that fill all ranks, each on ranks that its cp group shares.
    pack_levels: int64 [num_packs]; one level per iteration unless level_order is "parallel".
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
    pack_levels: IntArray
    step_offsets: IntArray
    planner_version: int = PLANNER_VERSION

    @property
    def num_samples(self) -> int:
        """Samples of the whole data set, also after replan, which plans only the ids in packs.ids."""
        return len(self.lengths)

    @property
    def num_iterations(self) -> int:
        return int(self.rank_slots[-1]) // self.world_size

    @property
    def num_steps(self) -> int:
        return len(self.step_offsets) - 1

    @property
    def skipped(self) -> IntArray:
        """Ids of the samples longer than every level, which overlong="skip" skipped, int64 [n]."""
        return np.flatnonzero(self.lengths > self.levels[-1].max_tokens)

    @cached_property
    def pack_degrees(self) -> IntArray:
        """Ranks that share each pack, int64 [num_packs]."""
        return np.array([level.cp_degree for level in self.levels], np.int64)[self.pack_levels]

    @cached_property
    def rank_slots(self) -> IntArray:
        """First slot of each pack on the line of (iteration * world_size + rank), then its end, [num_packs + 1]."""
        return offsets_of(self.pack_degrees)

    @cached_property
    def pack_offsets(self) -> IntArray:
        """Index of the first pack of each iteration, int64 [num_iterations + 1]."""
        return np.searchsorted(self.rank_slots, np.arange(self.num_iterations + 1) * self.world_size)

    @cached_property
    def level_of_iteration(self) -> IntArray:
        """Level of the first pack of each iteration, and of the others unless level_order is "parallel"; int64 [n]."""
        return self.pack_levels[self.pack_offsets[:-1]]

    @cached_property
    def iteration_of_pack(self) -> IntArray:
        """Iteration of each pack, int64 [num_packs]."""
        return self.rank_slots[:-1] // self.world_size

    @cached_property
    def pack_tokens(self) -> IntArray:
        """Real tokens of each pack, int64 [num_packs]."""
        return self.packs.sums(self.lengths)

    @cached_property
    def pack_sum_sq(self) -> IntArray:
        """Squares of each pack's documents, in which attention's work is counted (CostModel.squares), int64."""
        # The costs of all levels have the same window.
        return self.costs[0].squares(self.lengths, self.packs)

    @cached_property
    def step_tokens(self) -> IntArray:
        """Real tokens of each optimizer step, int64 [num_steps]."""
        return self._per_step(self.lengths)

    @cached_property
    def step_loss_tokens(self) -> IntArray:
        """Tokens with a loss in each optimizer step, int64 [num_steps]."""
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
        """Return iteration `index`, 0 <= index < num_iterations."""
        of = slice(*self.pack_offsets[index : index + 2])
        levels = tuple(self.pack_levels[of].tolist())
        return Iteration(levels, tuple(self.samples_of_pack(at) for at in range(of.start, of.stop)))

    def pack_at(self, index: int, rank: int) -> int:
        """Return the index in `packs` of the pack that `rank` shares in iteration `index`."""
        # NumPy would take a negative or too large rank as a pack of another iteration.
        if not (0 <= index < self.num_iterations and 0 <= rank < self.world_size):
            raise IndexError(
                f"iteration {index}, rank {rank}: out of range, the plan has {self.num_iterations} iterations of "
                f"{self.world_size} ranks"
            )
        slot = index * self.world_size + rank
        return int(np.searchsorted(self.rank_slots, slot, side="right")) - 1

    def pack(self, index: int, rank: int) -> IntArray:
        """Return the sample ids of the pack that `rank` shares in iteration `index`, int64 [n], n may be 0."""
        return self.samples_of_pack(self.pack_at(index, rank))

    def samples_of_pack(self, at: int) -> IntArray:
        """Return the sample ids of pack `at`, int64 [n], n may be 0."""
        start, end = self.packs.offsets[at : at + 2]
        return np.asarray(self.packs.ids[start:end], np.int64)

    def samples_of(self, first: int, last: int) -> IntArray:
        """Return all sample ids of iterations first to last - 1, int64 [n]."""
        start, end = self.packs.offsets[self.pack_offsets[[first, last]]]
        return np.asarray(self.packs.ids[start:end], np.int64)

    def max_documents(self, level: int) -> int:
        """Return the largest number of samples in a pack of `level`, 0 if it has no iterations."""
        return int(self.packs.counts[self.pack_levels == level].max(initial=0))

    def heaviest_iteration(self, level: int) -> int | None:
        """Return the iteration of `level` with the most expensive pack of it, None if the level has no iterations."""
        own = np.flatnonzero(self.pack_levels == level)
        if not len(own):
            return None
        return int(self.iteration_of_pack[own[np.argmax(self.pack_costs(self.costs)[own])]])

    def over_ranks(self, values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return mean and maximum over the ranks of each iteration, [num_iterations] each.

        values: of each rank that shares a pack, [num_packs].
        """
        starts = self.pack_offsets[:-1]
        mean = np.add.reduceat(values * self.pack_degrees, starts) / self.world_size
        return mean, np.maximum.reduceat(values, starts)

    def pack_costs(self, costs: Sequence[CostModel]) -> NDArray[np.float64]:
        """Return the cost of each pack by the model of its level, float64 [num_packs]; costs: one per level."""
        # Not pack_sum_sq: these costs may have another window than those that balanced the plan.
        squares, result = costs[0].squares(self.lengths, self.packs), np.zeros(self.packs.num_rows)
        for k, cost in enumerate(costs):
            own = self.pack_levels == k
            result[own] = cost.cost(self.pack_tokens[own], squares[own])
        return result

    def settings(self) -> dict[str, Any]:
        """Return everything but the arrays that determines the plan, as plain JSON values."""
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
            # Without None, so that models without windows keep their plan files.
            "costs": [{k: v for k, v in dataclasses.asdict(cost).items() if v is not None} for cost in self.costs],
        }

    def arrays(self) -> dict[str, IntArray]:
        """Return the plan's arrays by name."""
        return {
            "lengths": self.lengths,
            "loss_tokens": self.loss_tokens,
            "ids": self.packs.ids,
            "offsets": self.packs.offsets,
            "pack_levels": self.pack_levels,
            "step_offsets": self.step_offsets,
        }

    def _per_step(self, values: IntArray) -> IntArray:
        return np.add.reduceat(self.packs.sums(values), self.pack_offsets[self.step_offsets[:-1]])


def save_plan(plan: Plan, path: str | Path, inputs: Mapping[str, str] | None = None) -> None:
    """Write `plan` to `path`, atomically. inputs: fingerprints of its sources, such as data and tokenizer."""
    # Written here rather than by the safetensors library: equal plans are equal bytes, and packing/ needs NumPy alone.
    metadata = {"settings": plan.settings(), "fingerprint": plan.fingerprint, "inputs": dict(inputs or {})}
    header: dict[str, Any] = {"__metadata__": {"plan": json.dumps(metadata, sort_keys=True)}}
    arrays = {name: np.ascontiguousarray(array, "<i8") for name, array in plan.arrays().items()}
    end = 0
    for name, array in arrays.items():
        header[name] = {"dtype": "I64", "shape": [len(array)], "data_offsets": [end, end + array.nbytes]}
        end += array.nbytes
    text = json.dumps(header, sort_keys=True).encode()
    # The arrays start at a multiple of 8 bytes, which memory-mapped int64 needs to be aligned.
    text += b" " * (-len(text) % 8)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for array in arrays.values():
            file.write(array.data)
        # A checkpoint stores a position in this plan, so the plan must be on disk before any checkpoint.
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def load_plan(path: str | Path, expect: Mapping[str, Any] | None = None) -> Plan:
    """Return the plan in `path`, its arrays memory-mapped and read-only: ranks of one node share the pages.

    expect: values that the file must have been built from, by the names of Plan.settings() and of save_plan's
    `inputs`; other names are not compared. Raises ValueError if the file is not a plan, is corrupt, or was built from
    other values; the message lists every difference.
    """
    path = Path(path)
    metadata, entries, start = _read_header(path)
    try:
        arrays = {name: _mapped(path, start, entry["data_offsets"]) for name, entry in entries.items()}
        plan = _plan_from_parts(metadata["settings"], arrays)
        # Before the fingerprint: a plan from other inputs is a clearer message than a mismatch of hashes.
        _check_expected(path, {**metadata["settings"], **metadata["inputs"]}, expect or {})
        intact = plan.fingerprint == metadata["fingerprint"]
    except (KeyError, TypeError):
        raise ValueError(f"{path}: not a plan file of this version; delete it to rebuild the plan") from None
    if not intact:
        raise ValueError(f"{path}: the plan file is corrupt (fingerprint mismatch); delete it to rebuild the plan")
    return plan


def _plan_from_parts(settings: dict[str, Any], arrays: dict[str, IntArray]) -> Plan:
    """Return the plan of Plan.settings() and Plan.arrays(); KeyError or TypeError for a missing or unknown key."""
    packs = Ragged(arrays.pop("ids"), arrays.pop("offsets"))
    levels = tuple(Level(**values) for values in settings["levels"])
    costs = tuple(CostModel(**values) for values in settings["costs"])
    return Plan(**{**settings, **arrays, "levels": levels, "costs": costs, "packs": packs})


def _read_header(path: Path) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Return the header's plan metadata, its entry for each array, and the byte at which the arrays start."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        text = file.read(size) if size <= MAX_HEADER_BYTES else b""
    try:
        entries = json.loads(text)
        metadata = json.loads(entries.pop("__metadata__")["plan"])
        end = max(entry["data_offsets"][1] for entry in entries.values())
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path}: not a plan file; delete it to rebuild the plan") from None
    # A file that lost its end would otherwise map pages that raise SIGBUS when read.
    if path.stat().st_size != 8 + size + end:
        raise ValueError(
            f"{path}: the plan file is corrupt ({path.stat().st_size} bytes, its header describes {8 + size + end}); "
            "delete it to rebuild the plan"
        )
    return metadata, entries, 8 + size


def _mapped(path: Path, start: int, data_offsets: list[int]) -> IntArray:
    begin, end = data_offsets
    if begin == end:  # an empty range cannot be mapped
        return np.zeros(0, np.int64)
    return np.memmap(path, "<i8", "r", offset=start + begin, shape=((end - begin) // 8,))


def _check_expected(path: Path, found: Mapping[str, Any], expect: Mapping[str, Any]) -> None:
    """Raise ValueError listing every value of `expect` that is missing from `found` or differs there."""
    differences = []
    for name, value in expect.items():
        # Through JSON, as `found` was: tuples become lists.
        wanted = json.loads(json.dumps(value))
        if found.get(name) != wanted:
            differences.append(f"{name} is {json.dumps(found.get(name))} in the file but {json.dumps(wanted)} here")
    if differences:
        raise ValueError(
            f"{path}: the plan was built from other inputs: {'; '.join(differences)}; delete it to rebuild the plan"
        )
