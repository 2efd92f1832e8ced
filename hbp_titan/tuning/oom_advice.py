"""Advice when memory runs out: what ran out, why, and the cheapest change that fits. Used by runs and by dry runs.

Owns the changes that are tried, their order, and the text. Of the changes that keep the level's length and the ranks,
alone and combined, the one with the least predicted time wins: checkpointing (policy and depth), activations in host
memory, chunks and groups of heads (memory_plans.py), a higher cp degree, parameters freed after forward, one copy of
them instead of several, experts over more ranks, fewer logits at a time. If none fits, parameters and optimizer move
to host memory as well. Only then a shorter level and more ranks are tried. The memory estimate may be off: a change is
proposed only if it saves, by the estimate, more than was missing.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from hbp_titan.components.oom import VALIDATION, OutOfMemory, device_memory
from hbp_titan.components.timing import FloatArray, pack_loads
from hbp_titan.config import JobConfig
from hbp_titan.distributed.context_parallel import check_heads
from hbp_titan.distributed.expert_parallel import check_experts
from hbp_titan.distributed.world import World, ranks_per_node
from hbp_titan.models.configs import ModelArgs
from hbp_titan.packing import Level, Plan
from hbp_titan.packing.level import format_level, level_name
from hbp_titan.tuning.hardware import Hardware, hardware_like, total_memory
from hbp_titan.tuning.memory import MemoryEstimate, estimate_evaluation, estimate_memory, with_policy
from hbp_titan.tuning.memory_plans import depth_choices, memory_plans, usable_bytes, usable_host_bytes
from hbp_titan.tuning.time_model import TimeModel, sharding, time_model
from hbp_titan.utils import human_bytes

MAX_RANKS_FACTOR = 64
"""Up to this many times the ranks are tried if no other change helps."""
MAX_CP_FACTOR = MAX_EXPERT_FACTOR = 8
"""Up to this many times the cp degree, and the ranks that share experts."""
MIN_LOSS_TOKENS = 256
"""Least tokens whose logits are computed at a time. Fewer make matrix products too small for a GPU."""
ROUNDING = 1e-6
"""Times that differ by less are equal."""
LORA_RANK = 16
"""Rank of the adapters that are suggested when the model's state is too large."""
OTHERS_SHARE = 0.08
"""Memory of other processes is reported from this share of the device's memory."""
ALLOCATOR_SETTINGS = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}
"""Two names of the same variable of torch; run_train.sh sets the first."""

_CONFIG_KEYS = (
    "parallelism.reshard_after_forward",
    "parallelism.dp_replicate",
    "parallelism.expert_parallel_degree",
    "parallelism.cpu_offload",
    "training.loss_chunk_tokens",
)

Variant = tuple[JobConfig, int, Level]
"""A configuration, a number of ranks and a level."""


def advice(
    error: OutOfMemory, config: JobConfig, args: ModelArgs, world: World, plan: Plan | None, measures_levels: bool
) -> list[str]:
    """Return what ran out on this rank and what to change, one line per statement."""
    device = world.device
    local_ranks = ranks_per_node(world.size)
    usable = device_memory(device, local_ranks)
    total = total_memory(device, local_ranks)
    hardware = hardware_like(device, total, local_ranks)
    # Other processes may hold a part of the device.
    limit = min(usable_bytes(hardware), usable)
    if args.hf_config is not None:
        level = error.level
        where = "" if level is None else f" at level {level_name(level)}"
        return [
            f"rank {world.rank}: out of memory in {error.work}{where}; memory is not estimated for model.backend = "
            '"transformers"; set levels.ac_policy = "full", raise levels.cp_degree, lower levels.max_tokens, or use '
            "more ranks"
        ]
    context = OOMContext(config, args, world.size, hardware, device.type, limit, plan)
    lines = context.lines(error, measures_levels)
    lines[0] = f"rank {world.rank}: {lines[0]}"
    if total - usable > OTHERS_SHARE * total:
        lines.append(
            f"{human_bytes(total - usable)} of the device's {human_bytes(total)} belong to other processes; end them "
            "(nvidia-smi lists them)"
        )
    if error.figures.unallocated > error.figures.tried > 0 and not ALLOCATOR_SETTINGS & os.environ.keys():
        lines.append(
            f"{human_bytes(error.figures.unallocated)} are free but fragmented; PYTORCH_ALLOC_CONF="
            "expandable_segments:True in the environment may be enough"
        )
    return lines


@dataclass(frozen=True)
class OOMContext:
    """A run at the moment when memory ran out. limit: bytes that a rank's tensors may take."""

    config: JobConfig
    args: ModelArgs
    world_size: int
    hardware: Hardware
    device_type: str
    limit: int
    plan: Plan | None = None

    def lines(self, error: OutOfMemory, measures_levels: bool = False) -> list[str]:
        """Return what ran out and what to do. measures_levels: whether the run selects its levels itself."""
        figures, level = error.figures, error.level
        tried = f": {human_bytes(figures.tried)} more did not fit" if figures.tried else ""
        if figures.allocated:
            tried += f" in addition to {human_bytes(figures.allocated)}"
        if level is None:
            # No level was active, so the state is the cause.
            level = max(self.config.levels, key=lambda level: self.estimate(level).peak_bytes)
            state = self.estimate(level).resident_bytes
            head = f"out of memory in {error.work}{tried}; {_state(state)} of {human_bytes(self.limit)}"
            return [head, self._smaller_state(level)]
        evaluating = error.work == VALIDATION
        estimate = self.estimate(level, evaluating)
        described = format_settings((f.name, getattr(level, f.name)) for f in dataclasses.fields(level))
        head = (
            f"out of memory in {error.work} at level {level_name(level)} ({described}){tried}, limit "
            f"{human_bytes(self.limit)}; estimated peak {human_bytes(estimate.peak_bytes)}: "
            f"{_state(estimate.resident_bytes)}, activations {human_bytes(estimate.saved_bytes)}, "
            f"buffers {human_bytes(estimate.transient_bytes)}"
        )
        if estimate.resident_bytes >= self.limit:
            return [head, self._smaller_state(level)]
        search, bias = self.search(error)
        lines = [head, *self._advice(search, bias, measures_levels)]
        if evaluating:
            lines.append("or set validation.enable = false: only validation runs out of memory")
        return lines

    def estimate(self, level: Level, evaluating: bool = False) -> MemoryEstimate:
        """Return the estimate of `level` as configured."""
        estimate = estimate_evaluation if evaluating else estimate_memory
        return estimate(self.args, level, self.config, self.world_size, device_type=self.device_type)

    def search(self, error: OutOfMemory) -> tuple[ChangeSearch, int]:
        """Return the search for a change that saves more than was missing, and how much too low the estimate is.

        Missing is what the estimate, or what torch held and requested, is above the limit. It is at least the tensor
        that did not fit: if neither is above the limit, the rest is lost to fragmentation.
        """
        level, figures = error.level, error.figures
        assert level is not None
        evaluating = error.work == VALIDATION
        estimated = self.estimate(level, evaluating).peak_bytes
        requested = figures.allocated + figures.tried if figures.allocated else 0
        # What torch held and requested is a lower bound of the true peak.
        bias = max(0, requested - estimated)
        missing = max(estimated + bias - self.limit, figures.tried, 1)
        below = [other.max_tokens for other in self.config.levels if other.max_tokens < level.max_tokens]
        search = self._search(level, estimated - missing)
        return replace(search, evaluating=evaluating, min_tokens=max(below, default=0) + 1), bias

    def _search(self, level: Level, limit: int) -> ChangeSearch:
        load, hardware = self._typical_load(level), self.hardware
        search = ChangeSearch(self.config, self.args, self.world_size, hardware, level, load, limit)
        return replace(search, device_type=self.device_type)

    def _typical_load(self, level: Level) -> FloatArray:
        """Return the mean of the level's packs, [4] as from pack_loads; without any, a pack of one document."""
        if self.plan is not None and level in self.plan.levels:
            own = self.plan.pack_levels == self.plan.levels.index(level)
            if own.any():
                return pack_loads(self.plan)[own].mean(axis=0)
        return np.array([1.0, level.max_tokens, float(level.max_tokens) ** 2, 1.0])

    def _advice(self, search: ChangeSearch, bias: int, measures_levels: bool) -> list[str]:
        level, lines = search.level, []
        change = search.cheapest()
        if change is not None:
            return [f"cheapest change that fits: {self._instructions(change, level, bias, measures_levels)}"]
        shorter, more = search.shorter(), search.more_ranks()
        if shorter is not None:
            last = level is self.config.levels[-1]
            moved = "data.max_length_policy applies to longer samples" if last else "longer samples move up a level"
            text = self._instructions(shorter, level, bias, measures_levels)
            lines.append(f"only a shorter level fits: {text}; {moved}")
        if more is not None:
            intro = "or" if lines else "no other change fits:"
            lines.append(f"{intro} {more.use_ranks(self.config, level)}")
        return lines or ["no change fits this level; lower its max_tokens, or use devices with more memory"]

    def _instructions(self, change: Change, level: Level, bias: int, measures_levels: bool) -> str:
        """Return the change as TOML and as overrides that can be copied, its predicted peak and slowdown."""
        overrides = [f"--{key}={str(value).lower()}" for key, value in change.config_settings(self.config)]
        if change.level != level:
            levels = [change.level if other is level else other for other in self.config.levels]
            overrides.insert(0, f"--levels={','.join(format_level(level) for level in levels)}")
            # Levels cannot be given together with their automatic selection.
            overrides[:0] = ["--packing.auto_levels=false"] if measures_levels else []
        predicted = f"predicted peak {human_bytes(change.peak_bytes + bias)}"
        if change.level.max_tokens == level.max_tokens:
            percent = round(100 * (change.slowdown - 1))
            speed = f"{abs(percent)}% {'slower' if percent > 0 else 'faster'}" if percent else "as fast"
            predicted += f", predicted {speed}"
            if change.config.parallelism.cpu_offload and not self.config.parallelism.cpu_offload:
                predicted += f", {self._step_seconds(change.config)}"
        return f"{change.instructions(self.config, level)}; as overrides: {' '.join(overrides)} ({predicted})"

    def _smaller_state(self, level: Level) -> str:
        """Return what reduces parameters, gradients and moments."""
        more = self._search(level, self.limit).more_ranks()
        ways = ["set parallelism.dp_replicate = 1"] if self.config.parallelism.dp_replicate > 1 else []
        if more is not None:
            ways.append(more.use_ranks(self.config, level))
        offloaded = with_value(self.config, "parallelism.cpu_offload", True)
        host = replace(self, config=offloaded).estimate(level).host_bytes
        if host <= usable_host_bytes(self.hardware, self.world_size) and self.device_type == "cuda":
            search = self._search(level, self.limit)
            now, then = (search.rank_seconds(k, self.world_size, level) for k in (self.config, offloaded))
            cost = f"micro-batches of {level_name(level)} {then / now - 1:.0%} slower, {self._step_seconds(offloaded)}"
            ways.append(f"set parallelism.cpu_offload = true ({human_bytes(host)} of host memory per rank, {cost})")
        if not self.config.lora.rank:
            lora = replace(self.config, lora=replace(self.config.lora, rank=LORA_RANK))
            state = replace(self, config=lora).estimate(level).resident_bytes
            ways.append(f"train adapters (lora.rank = {LORA_RANK}: {human_bytes(state)} instead)")
        return (
            "parameters and optimizer state alone exceed the memory, so changing levels will not help; "
            f"{', or '.join(ways) or 'use devices with more memory'}"
        )

    def _step_seconds(self, config: JobConfig) -> str:
        """Return the predicted time of the optimizer's update with `config`, and now."""
        models = (time_model(self.args, k, self.hardware, self.world_size) for k in (config, self.config))
        then, now = (model.step_seconds() for model in models)
        return f"each optimizer step {then:.2g} s instead of {now:.2g}"


def _state(num_bytes: int) -> str:
    return f"parameters, gradients and optimizer state {human_bytes(num_bytes)}"


@dataclass(frozen=True)
class Change:
    """A level that fits: the level, the configuration and the ranks after the change, and the estimated peak.

    slowdown: predicted time of the level's tokens on these ranks, relative to the level before the change.
    """

    level: Level
    config: JobConfig
    world_size: int
    peak_bytes: int
    slowdown: float

    def config_settings(self, before: JobConfig) -> list[tuple[str, object]]:
        """Return the keys outside of [[levels]] that change, as section.key, with their new values."""
        pairs = [(key, value_of(self.config, key)) for key in _CONFIG_KEYS]
        return [(key, value) for key, value in pairs if value != value_of(before, key)]

    def instructions(self, before: JobConfig, level: Level) -> str:
        """Return what to set in the TOML file, "" for nothing. before, level: the configuration and the level now."""
        pairs = [(field.name, getattr(self.level, field.name)) for field in dataclasses.fields(level)]
        changed = [(key, value) for key, value in pairs if value != getattr(level, key)]
        block = f"in the [[levels]] block of max_tokens = {level.max_tokens} set {format_settings(changed)}"
        others = self.config_settings(before)
        parts = ([block] if changed else []) + ([f"set {format_settings(others)}"] if others else [])
        return " and ".join(parts)

    def use_ranks(self, before: JobConfig, level: Level) -> str:
        """Return the instruction to use this many ranks, with the settings that change."""
        text = self.instructions(before, level)
        return f"use {self.world_size} ranks{f' and {text}' if text else ''}"


@dataclass(frozen=True)
class ChangeSearch:
    """Search for a change by which `level` needs at most `limit` bytes per rank.

    load: a typical pack of the level, as from pack_loads, [4]. evaluating: only its forward without gradients has to
    fit. min_tokens: the level is not made shorter than this.
    """

    config: JobConfig
    args: ModelArgs
    world_size: int
    hardware: Hardware
    level: Level
    load: FloatArray
    limit: int
    evaluating: bool = False
    min_tokens: int = 1
    device_type: str = "cuda"

    def cheapest(self) -> Change | None:
        """Return the fastest change that keeps the length and the ranks; None if none fits."""
        configs = [self.config]
        if not self.config.parallelism.cpu_offload and not self.evaluating and self.device_type == "cuda":
            # Tried last, because the compared times do not include the optimizer's step on the CPU.
            configs.append(with_value(self.config, "parallelism.cpu_offload", True))
        for config in configs:
            # The same variants again with the fewest logits at a time.
            for chunk in self._loss_chunks():
                tried = replace(self, config=with_value(config, "training.loss_chunk_tokens", chunk))
                found = tried._fastest(tried._variants(), self)
                if found is not None:
                    return found
        return None

    def shorter(self) -> Change | None:
        """Return the longest of the level's halves, quarters and so on that fits; None if none does."""
        max_tokens = self.level.max_tokens // 2
        while max_tokens >= self.min_tokens and max_tokens % self.level.cp_degree == 0:
            found = replace(self, level=replace(self.level, max_tokens=max_tokens)).cheapest()
            if found is not None:
                return found
            max_tokens //= 2
        return None

    def more_ranks(self) -> Change | None:
        """Return the smallest power-of-two multiple of the ranks that fits; None up to MAX_RANKS_FACTOR."""
        # A single copy of the parameters has the smallest state per rank.
        config = with_value(self.config, "parallelism.dp_replicate", 1)
        factor = 2
        while factor <= MAX_RANKS_FACTOR:
            levels = self._policies(self.level)
            found = self._fastest((config, factor * self.world_size, level) for level in levels)
            if found is not None:
                return found
            factor *= 2
        return None

    def peak_bytes(self, level: Level, config: JobConfig, world_size: int) -> int:
        """Return the estimated peak of `level`."""
        estimate = estimate_evaluation if self.evaluating else estimate_memory
        return estimate(self.args, level, config, world_size, device_type=self.device_type).peak_bytes

    def _least_peak(self, config: JobConfig, ranks: int, level: Level) -> int:
        """Return the peak of the plan that needs least on the device, with parameters freed after forward."""
        plans = [plan for plan in memory_plans(level, self.args)[-1] if plan.ac_policy == "offload"]
        return self.peak_bytes(replace(plans[0], reshard_after_forward=True), config, ranks)

    def _fits_host(self, level: Level, config: JobConfig, ranks: int) -> bool:
        estimate = estimate_memory(self.args, level, config, ranks, device_type=self.device_type)
        if self.device_type == "cpu":
            # The device's memory is the host's.
            return estimate.peak_bytes + estimate.host_bytes <= self.limit
        return estimate.host_bytes <= usable_host_bytes(self.hardware, ranks)

    def _fastest(self, variants: Iterable[Variant], before: ChangeSearch | None = None) -> Change | None:
        """Return the fastest of `variants` that fits. before: the search of the run as it is, if not this one."""
        best: tuple[float, Change] | None = None
        now = self.rank_seconds((before or self).config, self.world_size, self.level)

        def least_seconds(variant: Variant) -> float:
            config, ranks, level = variant
            return self.rank_seconds(config, ranks, with_policy(level, "none"))

        hopeless: dict[object, bool] = {}
        # In the order of their time without checkpointing, a lower bound: times are cheaper to compute than memory.
        for config, ranks, level in sorted(variants, key=least_seconds):
            if best is not None and least_seconds((config, ranks, level)) >= best[0] * (1 - ROUNDING):
                break
            form = (id(config), ranks, level.cp_degree, level.cp_style)
            if hopeless.get(form):
                continue

            def peak(at: Level, config: JobConfig = config, ranks: int = ranks) -> int:
                return self.peak_bytes(at, config, ranks)

            fits = False
            for found, peak_bytes in depth_choices(peak, level, self.args.num_layers, self.limit):
                if peak_bytes > self.limit or not self._fits_host(found, config, ranks):
                    continue
                fits, seconds = True, self.rank_seconds(config, ranks, found)
                # Among equal times the first wins, which changes the least.
                if best is None or seconds < best[0] * (1 - ROUNDING):
                    best = seconds, Change(found, config, ranks, peak_bytes, seconds / now)
            if not fits and form not in hopeless:
                # If this does not fit, no plan does.
                hopeless[form] = self._least_peak(config, ranks, level) > self.limit
        return best[1] if best else None

    @cached_property
    def _time(self) -> TimeModel:
        return time_model(self.args, self.config, self.hardware, self.world_size)

    def rank_seconds(self, config: JobConfig, ranks: int, level: Level) -> float:
        """Return the seconds per pack times the number of ranks that work on it."""
        model = replace(self._time, sharding=sharding(config), world_size=ranks)
        return float(model.level_time(level).seconds(self.load)) * level.cp_degree

    def _variants(self) -> Iterator[Variant]:
        """Yield variants, those with fewer changes first; the depth of checkpointing is left open."""
        for config in self._configs():
            for level in self._cp_degrees():
                for variant in self._policies(level):
                    yield config, self.world_size, variant
        for config in self._expert_degrees():
            for variant in self._policies(self.level):
                yield config, self.world_size, variant
        # If only the logits are too large, no other setting has to change.
        for chunk in self._loss_chunks()[1:]:
            yield with_value(self.config, "training.loss_chunk_tokens", chunk), self.world_size, self.level

    def _configs(self) -> Iterator[JobConfig]:
        """Yield the configuration, also with parameters freed after forward and with a single copy of them."""
        for reshard in dict.fromkeys((self.config.parallelism.reshard_after_forward, True)):
            for copies in dict.fromkeys((self.config.parallelism.dp_replicate, 1)):
                config = with_value(self.config, "parallelism.reshard_after_forward", reshard)
                yield with_value(config, "parallelism.dp_replicate", copies)

    def _cp_degrees(self) -> Iterator[Level]:
        lowest = self.level.cp_degree
        for cp_degree in range(lowest, min(MAX_CP_FACTOR * lowest, self.world_size) + 1):
            if self.world_size % cp_degree or self.level.max_tokens % cp_degree:
                continue
            level = replace(self.level, cp_degree=cp_degree)
            try:
                check_heads([level], self.args.num_heads, self.args.num_kv_heads)
            except ValueError:
                # "hybrid" works with any number of heads.
                level = replace(level, cp_style="hybrid")
            yield level

    def _policies(self, level: Level) -> list[Level]:
        if self.evaluating:
            return [level]
        # If the level has no value of its own, `_configs` changes the run's.
        own = level.reshard_after_forward
        reshards = (None,) if own is None else (own, True)
        return [
            replace(plan, reshard_after_forward=reshard)
            for reshard in dict.fromkeys(reshards)
            for stage in memory_plans(level, self.args)
            for plan in stage
        ]

    def _expert_degrees(self) -> Iterator[JobConfig]:
        """Yield the configuration with experts over more ranks."""
        degree = self.config.parallelism.expert_parallel_degree
        shards = self.world_size // self.config.parallelism.dp_replicate
        experts = 0 if self.args.moe is None else self.args.moe.n_routed_experts
        largest = min(shards, experts, MAX_EXPERT_FACTOR * degree)
        while 2 * degree <= largest:
            degree *= 2
            try:
                check_experts(self.args, degree, shards)
            except ValueError:
                continue
            yield with_value(self.config, "parallelism.expert_parallel_degree", degree)

    def _loss_chunks(self) -> Sequence[int]:
        chunk = self.config.training.loss_chunk_tokens
        return [chunk, MIN_LOSS_TOKENS] if chunk > MIN_LOSS_TOKENS else [chunk]


def format_settings(settings: Iterable[tuple[str, object]]) -> str:
    """Return settings that are not None as TOML on one line."""

    def toml(value: object) -> str:
        if isinstance(value, bool):
            return str(value).lower()
        return f'"{value}"' if isinstance(value, str) else str(value)

    return ", ".join(f"{key} = {toml(value)}" for key, value in settings if value is not None)


def value_of(config: JobConfig, key: str) -> object:
    """Return the value of section.key."""
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


def with_value(config: JobConfig, key: str, value: object) -> JobConfig:
    """Return the configuration with another value of section.key."""
    if value_of(config, key) == value:
        return config
    section, _, name = key.partition(".")
    return replace(config, **{section: replace(getattr(config, section), **{name: value})})
