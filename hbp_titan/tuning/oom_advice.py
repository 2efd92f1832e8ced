"""What a run says when memory does not suffice: what ran out, what is to blame, and the cheapest change that would fit.

Owns the calibration of the estimate by what torch says, and the words. The estimate need not be right in the whole: a
change is proposed only where it saves, by the estimate, more than was missing.

The cheapest change of a configuration by which a level fits: for a dry run, and for a run that ran out of memory.

Owns the changes that are tried and their order. Of those that keep the level's length and the ranks, all together, the
one with the least predicted time wins: checkpointing (policy and depth), a higher cp degree, parameters freed after
forward, one copy of them instead of several, experts over more ranks, fewer logits at a time. Only where none of them
fits a shorter level is tried, and more ranks.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from hbp_titan.components.oom import VALIDATION, OutOfMemory, device_memory
from hbp_titan.components.timing import FloatArray, pack_loads
from hbp_titan.config import JobConfig
from hbp_titan.distributed.context_parallel import check_heads
from hbp_titan.distributed.expert_parallel import check_experts
from hbp_titan.distributed.world import World, ranks_per_node
from hbp_titan.models.decoder import ModelArgs
from hbp_titan.packing import Level, Plan
from hbp_titan.packing.level import AC_POLICIES, format_level, level_name
from hbp_titan.tuning.hardware import Hardware, hardware_like
from hbp_titan.tuning.memory import MemoryEstimate, estimate_evaluation, estimate_memory
from hbp_titan.tuning.time_model import TimeModel, least_recomputation, sharding, time_model, usable_bytes

# Up to so many times the ranks are tried where no other change helps.
MOST_RANKS = 64
# Up to so many times the cp degree, and the ranks that share experts.
MOST_CP_FACTOR = MOST_EXPERT_FACTOR = 8
# Of a time; less is no difference.
ROUNDING = 1e-6
# Logits of fewer tokens at a time make matrix products that do not fill a GPU; down to here it hardly costs time.
FEWEST_LOSS_TOKENS = 256

_LEVEL_KEYS = ("max_tokens", "cp_degree", "cp_style", "ac_policy", "ac_layers", "reshard_after_forward")
_CONFIG_KEYS = (
    ("parallelism", "reshard_after_forward"),
    ("parallelism", "dp_replicate"),
    ("parallelism", "expert_parallel_degree"),
    ("training", "loss_chunk_tokens"),
)


@dataclass(frozen=True)
class Change:
    """A level that fits: how it and the configuration would be, on how many ranks, and the estimate of its peak.

    slowdown: predicted time of its tokens on these ranks, of the level as it is 1.
    """

    level: Level
    config: JobConfig
    world_size: int
    peak_bytes: int
    slowdown: float

    def level_settings(self, before: Level) -> list[tuple[str, object]]:
        """The keys of the [[levels]] block that change, with their new values."""
        pairs = [(key, getattr(self.level, key)) for key in _LEVEL_KEYS]
        return [(key, value) for key, value in pairs if value != getattr(before, key)]

    def config_settings(self, before: JobConfig) -> list[tuple[str, object]]:
        """The other keys that change, as section.key, with their new values."""
        pairs = [(f"{s}.{k}", getattr(getattr(self.config, s), k)) for s, k in _CONFIG_KEYS]
        return [(key, value) for key, value in pairs if value != _value(before, key)]


@dataclass(frozen=True)
class Search:
    """What is looked for: `level` below `limit` bytes a rank.

    load: a typical pack of the level, as from pack_loads, [4]. evaluating: only its forward without gradients has to
    fit. shortest: tokens below which the level would be no level any more.
    """

    config: JobConfig
    args: ModelArgs
    world_size: int
    hardware: Hardware
    level: Level
    load: FloatArray
    limit: int
    evaluating: bool = False
    shortest: int = 1
    device_type: str = "cuda"

    def peak_bytes(self, level: Level, config: JobConfig | None = None, world_size: int = 0) -> int:
        """The estimated peak of `level`."""
        estimate = estimate_evaluation if self.evaluating else estimate_memory
        config, ranks = config or self.config, world_size or self.world_size
        return estimate(self.args, level, config, ranks, device_type=self.device_type).peak_bytes

    @cached_property
    def _time(self) -> TimeModel:
        return time_model(self.args, self.config, self.hardware, self.world_size)

    def cheapest(self) -> Change | None:
        """The fastest change that keeps the length and the ranks; None where none fits."""
        found = self._fastest(self.variants())
        if found is None and len(self._chunks()) > 1:
            few = _changed(self.config, "training.loss_chunk_tokens", self._chunks()[-1])
            found = dataclasses.replace(self, config=few).cheapest()
        return found

    def shorter(self) -> Change | None:
        """The longest of the halves, quarters and so on of the level that fits; None where none does."""
        max_tokens = self.level.max_tokens // 2
        while max_tokens >= self.shortest and max_tokens % self.level.cp_degree == 0:
            found = dataclasses.replace(self, level=dataclasses.replace(self.level, max_tokens=max_tokens)).cheapest()
            if found is not None:
                return found
            max_tokens //= 2
        return None

    def more_ranks(self) -> Change | None:
        """The least multiple of the ranks that holds the level; None where MOST_RANKS times as many do not."""
        config = _changed(self.config, "parallelism.dp_replicate", 1)
        factor = 2
        while factor <= MOST_RANKS:
            levels = self._policies(self.level)
            found = self._fastest((config, factor * self.world_size, level) for level in levels)
            if found is not None:
                return found
            factor *= 2
        return None

    def variants(self) -> Iterator[tuple[JobConfig, int, Level]]:
        """Configurations, ranks and levels, those with fewer changes first; depths of checkpointing are left open."""
        for config in self._configs():
            for level in self._forms():
                for variant in self._policies(level):
                    yield config, self.world_size, variant
        for config in self._spread_experts():
            for variant in self._policies(self.level):
                yield config, self.world_size, variant
        # Where the logits alone are to blame: everything else stays.
        for chunk in self._chunks()[1:]:
            yield _changed(self.config, "training.loss_chunk_tokens", chunk), self.world_size, self.level

    def _fastest(self, variants: Iterator[tuple[JobConfig, int, Level]]) -> Change | None:
        best: tuple[float, Change] | None = None
        now = self._rank_seconds(self.config, self.world_size, self.level)

        def least_seconds(variant: tuple[JobConfig, int, Level]) -> float:
            config, ranks, level = variant
            return self._rank_seconds(config, ranks, dataclasses.replace(level, ac_policy="none", ac_layers=None))

        # Nothing is faster than without recomputation, and times are found sooner than memory.
        for config, ranks, level in sorted(variants, key=least_seconds):
            if best is not None and least_seconds((config, ranks, level)) >= best[0] * (1 - ROUNDING):
                break

            def peak(at: Level, config: JobConfig = config, ranks: int = ranks) -> int:
                return self.peak_bytes(at, config, ranks)

            level, peak_bytes = least_recomputation(peak, level, self.args.num_layers, self.limit)
            if peak_bytes > self.limit:
                continue
            seconds = self._rank_seconds(config, ranks, level)
            # Of equal times the first, which changes least.
            if best is None or seconds < best[0] * (1 - ROUNDING):
                best = seconds, Change(level, config, ranks, peak_bytes, seconds / now)
        return best[1] if best else None

    def _rank_seconds(self, config: JobConfig, ranks: int, level: Level) -> float:
        """Seconds of all ranks that work on a pack: the fewer ranks do, the more packs run side by side."""
        model = dataclasses.replace(self._time, sharding=sharding(config), world_size=ranks)
        return float(model.level_time(level).seconds(self.load)) * level.cp_degree

    def _policies(self, level: Level) -> list[Level]:
        if self.evaluating:
            return [level]
        # Of a level that has none of its own the run's is changed (_configs).
        own = level.reshard_after_forward
        reshards = (None,) if own is None else (own, True)
        return [
            dataclasses.replace(level, ac_policy=policy, ac_layers=None, reshard_after_forward=reshard)
            for reshard in dict.fromkeys(reshards)
            for policy in AC_POLICIES
        ]

    def _forms(self) -> Iterator[Level]:
        most = MOST_CP_FACTOR * self.level.cp_degree
        cp_degree = self.level.cp_degree
        while cp_degree <= most and self.world_size % cp_degree == 0 and self.level.max_tokens % cp_degree == 0:
            yield _with_cp(self.level, cp_degree, self.args)
            cp_degree *= 2

    def _configs(self) -> Iterator[JobConfig]:
        """The configuration, and with parameters freed after forward or copied nowhere."""
        for reshard in dict.fromkeys((self.config.parallelism.reshard_after_forward, True)):
            for copies in dict.fromkeys((self.config.parallelism.dp_replicate, 1)):
                config = _changed(self.config, "parallelism.reshard_after_forward", reshard)
                yield _changed(config, "parallelism.dp_replicate", copies)

    def _chunks(self) -> Sequence[int]:
        chunk = self.config.training.loss_chunk_tokens
        return [chunk, FEWEST_LOSS_TOKENS] if chunk > FEWEST_LOSS_TOKENS else [chunk]

    def _spread_experts(self) -> Iterator[JobConfig]:
        """The configuration with experts over more ranks."""
        degree, shards = self.config.parallelism.expert_parallel_degree, self.world_size
        shards //= self.config.parallelism.dp_replicate
        most = 0 if self.args.moe is None else min(shards, self.args.moe.n_routed_experts, MOST_EXPERT_FACTOR * degree)
        while 2 * degree <= most:
            degree *= 2
            try:
                check_experts(self.args, degree, shards)
            except ValueError:
                continue
            yield _changed(self.config, "parallelism.expert_parallel_degree", degree)


def shown(settings: Sequence[tuple[str, object]]) -> str:
    """Settings as TOML has them, on one line."""
    return ", ".join(f"{key} = {_toml(value)}" for key, value in settings)


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)


def _value(config: JobConfig, key: str) -> object:
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


def _changed(config: JobConfig, key: str, value: object) -> JobConfig:
    if _value(config, key) == value:
        return config
    section, _, name = key.partition(".")
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **{name: value})})


def _with_cp(level: Level, cp_degree: int, args: ModelArgs) -> Level:
    """The level at another cp degree, as "hybrid" where the heads do not allow its style."""
    changed = dataclasses.replace(level, cp_degree=cp_degree)
    try:
        check_heads([changed], args.num_heads, args.num_kv_heads)
    except ValueError:
        return dataclasses.replace(changed, cp_style="hybrid")
    return changed


# Of LoRA as an alternative: what its state would be.
LORA_RANK = 16
# Memory that others hold is told from this share of the device's on.
OTHERS_SHARE = 0.08
# Two names of one variable of torch's; run_train.sh sets the first.
ALLOCATOR_SETTINGS = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}


def advice(
    error: OutOfMemory, config: JobConfig, args: ModelArgs, world: World, plan: Plan | None, measures_levels: bool
) -> list[str]:
    """Return what ran out on this rank and what to change, one line per statement."""
    device = world.device
    local_ranks = ranks_per_node(world.size)
    usable = device_memory(device, local_ranks)
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else usable
    hardware = hardware_like(device, total, local_ranks)
    limit = min(usable_bytes(hardware), usable)
    context = OOMContext(config, args, world.size, hardware, device.type, limit, plan)
    lines = context.lines(error, measures_levels)
    lines[0] = f"rank {world.rank}: {lines[0]}"
    if total - usable > OTHERS_SHARE * total:
        lines.append(
            f"{size(total - usable)} of the device's {size(total)} belong to other processes; end them (nvidia-smi "
            "lists them)"
        )
    if error.figures.unallocated > error.figures.tried > 0 and not ALLOCATOR_SETTINGS & os.environ.keys():
        lines.append(
            f"{size(error.figures.unallocated)} are free but fragmented; PYTORCH_ALLOC_CONF="
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

    def lines(self, error: OutOfMemory, chose_levels: bool = False) -> list[str]:
        """What ran out and what to do. chose_levels: whether packing.auto_levels stands in the configuration."""
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
            moved = (
                "a longer sample falls under data.max_length_policy"
                if last
                else "longer samples move to the next level"
            )
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
            words += ["--packing.auto_levels=false"] if chose_levels else []
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
