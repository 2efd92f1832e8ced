"""A step whose loss or gradient is NaN or infinite: who is at fault, and whether the run stops or goes on without it.

Owns `training.on_nonfinite` and nonfinite.jsonl of the run folder, which has a line with every sample id for each such
step. The decision needs nothing but sums that all ranks have, so all of them take it alike; only then do they ask one
another which packs it was. Skipped steps are counted over the whole run, resumptions included.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from hbp_titan.data.batch import PackedBatch
from hbp_titan.distributed.world import World, gather_values
from hbp_titan.job_config import Training
from hbp_titan.packing import Plan
from hbp_titan.packing.level import level_name

FILE = "nonfinite.jsonl"
SHOWN = 10
"""Packs, and samples of a pack, that a message names; the file has all."""


@dataclass
class _Seen:
    """What this rank trained in one iteration. losses: of its samples, still on the device."""

    iteration: int
    level: int
    sample_ids: NDArray[np.int64]
    losses: Tensor


class NonFiniteGuard:
    """`see` every iteration, `clear` after a sound step, `meet` one that is not.

    steps, samples: skipped so far. where: the row of a sample, as file:line.
    """

    def __init__(self, config: Training, run_folder: Path, world: World, where: Callable[[int], str]) -> None:
        self.config = config
        self.path = run_folder / FILE
        self.world = world
        self.where = where
        self.steps = 0
        self.samples = 0
        self._seen: list[_Seen] = []

    def see(self, iteration: int, batch: PackedBatch, losses: Tensor) -> None:
        """Keep what would have to be told; waits for nothing."""
        self._seen.append(_Seen(iteration, batch.level, batch.sample_ids, losses))

    def clear(self) -> None:
        """Forget the iterations of the step."""
        self._seen = []

    def state(self) -> dict[str, int]:
        """What a checkpoint keeps."""
        return {"steps": self.steps, "samples": self.samples}

    def restore(self, state: dict[str, int]) -> None:
        """Go on counting from `state`."""
        self.steps, self.samples = state["steps"], state["samples"]

    def meet(self, plan: Plan, step: int, step_in_plan: int, losses: Sequence[float], grad_norm: float) -> str:
        """Tell of optimizer step `step`, which must not be applied. A collective: every rank calls it.

        losses: sums of token losses by level over all ranks. Returns the message where the step is to be skipped;
        raises RuntimeError with it where the run has to stop.
        """
        packs = self._packs_at_fault(plan)
        first, last = plan.step_offsets[step_in_plan : step_in_plan + 2].tolist()
        samples = plan.samples_of(first, last).tolist()
        at_fault = [pack["level"] for pack in packs] or plan.level_of_iteration[first:last].tolist()
        levels = dict.fromkeys(level_name(plan.levels[k]) for k in at_fault)
        skips = self.config.on_nonfinite == "skip" and self.steps < self.config.max_nonfinite_steps
        if self.world.rank == 0:
            event = {"step": step, "epoch": plan.epoch, "levels": [*levels], "action": "skip" if skips else "stop"}
            event |= {"losses": [*map(_plain, losses)], "grad_norm": _plain(grad_norm)}
            self._write({**event, "packs_at_fault": packs, "samples": samples})
        fault = self._named(packs, len(samples))
        told = f"step {step}, level {', '.join(levels)}: {fault}; gradient norm {grad_norm}; the parameters were not "
        if not skips:
            raise RuntimeError(f"{told}updated{self._limit()} ({self.path} has every sample id)")
        self.steps += 1
        self.samples += len(samples)
        self.clear()
        return (
            f"{told}updated: the step is skipped, its {len(samples):,} samples are not trained; skipped step "
            f"{self.steps} of at most {self.config.max_nonfinite_steps}"
        )

    def describe(self) -> str:
        """A line for the end of a run."""
        return (
            f"skipped      {self.steps} steps without finite loss and gradient, {self.samples:,} samples ({self.path})"
        )

    def _limit(self) -> str:
        if self.config.on_nonfinite == "stop":
            return ""
        return f"; {self.steps} steps were skipped before, training.max_nonfinite_steps allows no more"

    def _packs_at_fault(self, plan: Plan) -> list[dict[str, Any]]:
        """The packs of the step on which some rank has no finite loss, with all such ranks."""
        mine = []
        for seen in self._seen:
            if not math.isfinite(seen.losses.sum().item()):
                dp_rank = self.world.rank // plan.levels[seen.level].cp_degree
                mine.append((seen.iteration, seen.level, dp_rank, seen.sample_ids.tolist()))
        packs: dict[tuple[int, int], dict[str, Any]] = {}
        for rank, found in enumerate(gather_values(mine)):
            for iteration, level, dp_rank, samples in found:
                pack = {"iteration": iteration, "level": level, "dp_rank": dp_rank, "ranks": [], "samples": samples}
                packs.setdefault((iteration, dp_rank), pack)["ranks"].append(rank)
        return [packs[key] for key in sorted(packs)]

    def _named(self, packs: Sequence[dict[str, Any]], num_samples: int) -> str:
        if not packs:
            return f"every loss is finite, but the gradient of its {num_samples:,} samples is not"
        parts = []
        for pack in packs[:SHOWN]:
            ids = pack["samples"]
            shown = ", ".join(f"{index} ({self.where(index)})" for index in ids[:SHOWN])
            more = f" and {len(ids) - SHOWN} more" if len(ids) > SHOWN else ""
            ranks = ", ".join(map(str, pack["ranks"]))
            parts.append(f"on rank {ranks} in iteration {pack['iteration']}, samples {shown}{more}")
        more = f"; and in {len(packs) - SHOWN} more packs" if len(packs) > SHOWN else ""
        return f"the loss is not finite {'; '.join(parts)}{more}"

    def _write(self, event: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")


def _plain(value: float) -> float | str:
    """JSON knows no NaN."""
    return value if math.isfinite(value) else str(value)
