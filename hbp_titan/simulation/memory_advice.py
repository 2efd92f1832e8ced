"""What a run says when memory does not suffice: what ran out, what is to blame, and the cheapest change that would fit.

Owns the calibration of the estimate by what torch says, and the words. The estimate need not be right in the whole: a
change is proposed only where it saves, by the estimate, more than was missing.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import torch

from hbp_titan.cli import Mistakes
from hbp_titan.config import JobConfig
from hbp_titan.distributed.hardware import Hardware, hardware_like
from hbp_titan.distributed.world import World, ranks_per_node
from hbp_titan.levels.level_time import FloatArray, pack_loads
from hbp_titan.levels.memory import device_memory
from hbp_titan.levels.out_of_memory import VALIDATION, OutOfMemory
from hbp_titan.models.decoder import ModelArgs
from hbp_titan.packing import Level, Plan
from hbp_titan.packing.level import format_level, level_name
from hbp_titan.selection.memory_estimate import MemoryEstimate, estimate_evaluation, estimate_memory
from hbp_titan.simulation.cheapest_change import Change, Search, shown
from hbp_titan.simulation.estimate import usable_bytes

# Of LoRA as an alternative: what its state would be.
LORA_RANK = 16
# Memory that others hold is told from this share of the device's on.
OTHERS_SHARE = 0.08
# Two names of one variable of torch's; run_train.sh sets the first.
ALLOCATOR_SETTINGS = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}


class MemoryAdvisor:
    """Turns OutOfMemory, raised inside its `with`, into Mistakes with the advice; any other error goes through.

    plan: the epoch's, once there is one.
    """

    def __init__(self, config: JobConfig, args: ModelArgs, world: World) -> None:
        self.config, self.args, self.world = config, args, world
        self.chose_levels = config.selects_levels
        self.plan: Plan | None = None

    def __enter__(self) -> MemoryAdvisor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, OutOfMemory):
            raise Mistakes(self.lines(error)) from error

    def lines(self, error: OutOfMemory) -> list[str]:
        """What to tell of `error`, a line each."""
        device = self.world.device
        local_ranks = ranks_per_node(self.world.size)
        found = device_memory(device, local_ranks)
        total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else found
        hardware = hardware_like(device, total, local_ranks)
        limit = min(usable_bytes(hardware), found)
        situation = Situation(self.config, self.args, self.world.size, hardware, device.type, limit, self.plan)
        lines = situation.lines(error, self.chose_levels)
        lines[0] = f"rank {self.world.rank}: {lines[0]}"
        if total - found > OTHERS_SHARE * total:
            lines.append(
                f"{size(total - found)} of the device's {size(total)} are not this rank's: end other processes "
                "(nvidia-smi lists them)"
            )
        if error.figures.unallocated > error.figures.tried > 0 and not ALLOCATOR_SETTINGS & os.environ.keys():
            lines.append(
                f"{size(error.figures.unallocated)} are free, but in pieces: PYTORCH_ALLOC_CONF="
                "expandable_segments:True in the environment may be enough"
            )
        return lines


@dataclass(frozen=True)
class Situation:
    """A run at the moment when memory ran out. limit: bytes that a rank's tensors may take."""

    config: JobConfig
    args: ModelArgs
    world_size: int
    hardware: Hardware
    device_type: str
    limit: int
    plan: Plan | None = None

    def lines(self, error: OutOfMemory, chose_levels: bool = False) -> list[str]:
        """What ran out and what to do. chose_levels: whether packing.levels = "auto" stands in the configuration."""
        figures, level = error.figures, error.level
        tried = f": {size(figures.tried)} more did not fit" if figures.tried else ""
        beside = f" beside {size(figures.allocated)}" if figures.allocated else ""
        if level is None:
            level = max(self.config.levels, key=lambda level: self.estimate(level).peak_bytes)
            state = self.estimate(level).resident_bytes
            head = f"out of memory in {error.work}{tried}{beside}; {_state(state)}, of {size(self.limit)}"
            return [head, self._smaller_state(level)]
        evaluating = error.work == VALIDATION
        estimate = self.estimate(level, evaluating)
        search, bias = self.search(error)
        head = (
            f"out of memory in {error.work} at level {level_name(level)} ({_described(level)}){tried}{beside}, "
            f"of {size(self.limit)}; estimated peak {size(estimate.peak_bytes)}: {_state(estimate.resident_bytes)}, "
            f"activations {size(estimate.saved_bytes)}, buffers {size(estimate.transient_bytes)}"
        )
        if estimate.resident_bytes >= self.limit:
            return [head, self._smaller_state(level)]
        lines = [head, *self._change(search, bias, chose_levels)]
        if evaluating:
            lines.append("or set validation.enable = false: only validation runs out")
        return lines

    def estimate(self, level: Level, evaluating: bool = False) -> MemoryEstimate:
        """Of `level` as it is configured."""
        estimate = estimate_evaluation if evaluating else estimate_memory
        return estimate(self.args, level, self.config, self.world_size, device_type=self.device_type)

    def search(self, error: OutOfMemory) -> tuple[Search, int]:
        """The search for a change that saves more than was missing, and by how much the estimate is known to be low.

        Missing is what the estimate, or what torch held and wanted, is above the limit; at least the tensor that did
        not fit, because where neither is above it the rest is lost in pieces.
        """
        level, figures = error.level, error.figures
        assert level is not None
        evaluating = error.work == VALIDATION
        estimate = self.estimate(level, evaluating)
        estimated = estimate.peak_bytes
        seen = figures.allocated + figures.tried if figures.allocated else 0
        bias = max(0, seen - estimated)
        missing = max(estimated + bias - self.limit, figures.tried, 1)
        below = [other.max_tokens for other in self.config.levels if other.max_tokens < level.max_tokens]
        search = self._search(level, estimated - missing, evaluating=evaluating, shortest=max(below, default=0) + 1)
        return search, bias

    def _search(self, level: Level, limit: int, evaluating: bool = False, shortest: int = 1) -> Search:
        load = self._load(level)
        return Search(
            self.config,
            self.args,
            self.world_size,
            self.hardware,
            level,
            load,
            limit,
            evaluating,
            shortest,
            self.device_type,
        )

    def _change(self, search: Search, bias: int, chose_levels: bool) -> list[str]:
        found = search.cheapest()
        if found is not None:
            return [self._told("cheapest change that fits", found, search.level, bias, chose_levels)]
        shorter, more = search.shorter(), search.more_ranks()
        lines = []
        if shorter is not None:
            last = search.level is self.config.levels[-1]
            moved = "a longer sample falls under data.overlong" if last else "longer samples move to the next level"
            told = self._told("only a shorter level fits", shorter, search.level, bias, chose_levels)
            lines.append(f"{told}; {moved}")
        if more is not None:
            settings = self._settings(more, search.level)
            lines.append(
                f"or use {more.world_size} ranks{settings}"
                if lines
                else f"no other change fits: use {more.world_size} ranks{settings}"
            )
        return lines or ["no change holds this level: lower its max_tokens, or use devices with more memory"]

    def _told(self, what: str, change: Change, level: Level, bias: int, chose_levels: bool) -> str:
        peak = f"predicted peak {size(change.peak_bytes + bias)}"
        speed = "" if change.level.max_tokens < level.max_tokens else f", {_speed(change.slowdown)}"
        overrides = self._overrides(change, level, chose_levels)
        return f"{what}: {self._toml(change, level)}; as overrides: {overrides} ({peak}{speed})"

    def _toml(self, change: Change, level: Level) -> str:
        parts = []
        settings = change.level_settings(level)
        if settings:
            parts.append(f"in the [[levels]] block of max_tokens = {level.max_tokens} set {shown(settings)}")
        others = change.config_settings(self.config)
        if others:
            parts.append(f"set {shown(others)}")
        return " and ".join(parts)

    def _settings(self, change: Change, level: Level) -> str:
        text = self._toml(change, level)
        return f" and {text}" if text else ""

    def _overrides(self, change: Change, level: Level, chose_levels: bool) -> str:
        words = []
        if change.level != level:
            levels = [change.level if other is level else other for other in self.config.levels]
            words += ["--packing.levels="] if chose_levels else []
            words.append(f"--levels={','.join(format_level(level) for level in levels)}")
        words += [f"--{key}={str(value).lower()}" for key, value in change.config_settings(self.config)]
        return " ".join(words)

    def _smaller_state(self, level: Level) -> str:
        """What makes parameters, gradients and moments smaller; no level does."""
        search = self._search(level, self.limit)
        ways = []
        if self.config.parallelism.dp_replicate > 1:
            ways.append("set parallelism.dp_replicate = 1")
        more = search.more_ranks()
        if more is not None:
            ways.append(f"use {more.world_size} ranks{self._settings(more, level)}")
        if not self.config.lora.rank:
            lora = dataclasses.replace(self.config, lora=dataclasses.replace(self.config.lora, rank=LORA_RANK))
            state = dataclasses.replace(self, config=lora).estimate(level).resident_bytes
            ways.append(f"train adapters (lora.rank = {LORA_RANK}: {size(state)} instead)")
        return f"the model's state is to blame, not a level: {', or '.join(ways) or 'use devices with more memory'}"

    def _load(self, level: Level) -> FloatArray:
        """The mean of the level's packs as pack_loads has them; a pack of one document where there is none."""
        if self.plan is not None and level in self.plan.levels:
            own = self.plan.pack_levels == self.plan.levels.index(level)
            if own.any():
                return pack_loads(self.plan)[own].mean(axis=0)
        return np.array([1.0, level.max_tokens, float(level.max_tokens) ** 2, 1.0])


def size(num_bytes: float) -> str:
    """Bytes in the largest unit that leaves at least one of it."""
    for unit, bytes_of in (("GiB", 2**30), ("MiB", 2**20)):
        if num_bytes >= bytes_of:
            return f"{num_bytes / bytes_of:.2f} {unit}"
    return f"{num_bytes / 2**10:.1f} KiB"


def _state(num_bytes: int) -> str:
    return f"parameters, gradients and AdamW's moments {size(num_bytes)}"


def _described(level: Level) -> str:
    keys: Sequence[str] = ("max_tokens", "cp_degree", "ac_policy", "ac_layers", "reshard_after_forward")
    return shown([(key, getattr(level, key)) for key in keys if getattr(level, key) is not None])


def _speed(slowdown: float) -> str:
    percent = round(100 * (slowdown - 1))
    if percent == 0:
        return "predicted as fast"
    return f"predicted {abs(percent)}% {'slower' if percent > 0 else 'faster'}"
