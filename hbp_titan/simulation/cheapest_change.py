"""The cheapest change of a configuration by which a level fits: for a dry run, and for a run that ran out of memory.

Owns the changes that are tried and their order. Of those that keep the level's length and the ranks, all together, the
one with the least predicted time wins: checkpointing (policy and depth), a higher cp degree, parameters freed after
forward, one copy of them instead of several, experts over more ranks, fewer logits at a time. Only where none of them
fits a shorter level is tried, and more ranks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from hbp_titan.config import JobConfig
from hbp_titan.distributed.context_parallel import check_heads
from hbp_titan.distributed.expert_parallel import check_experts
from hbp_titan.distributed.hardware import Hardware
from hbp_titan.levels.level_time import FloatArray
from hbp_titan.models.decoder import ModelArgs
from hbp_titan.packing import Level
from hbp_titan.packing.level import AC_POLICIES
from hbp_titan.selection.memory_estimate import estimate_evaluation, estimate_memory
from hbp_titan.simulation.estimate import least_recomputation, sharding, time_model
from hbp_titan.simulation.time_parts import TimeModel

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
