"""Replay of a plan without a GPU: the time of each micro-batch, and where the time of the whole epoch goes.

Owns the accounting and the synthetic lengths that stand in for the paper's data. The ranks of a micro-batch wait for
the slowest (paper section 2.1), so an epoch's seconds are the mean work of the ranks, part by part (time_model.PARTS),
plus the idle time, plus the optimizer steps. All times here are simulated, none is measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hbp_titan.components.timing import FloatArray, pack_loads
from hbp_titan.packing import Plan
from hbp_titan.packing.ragged import IntArray
from hbp_titan.tuning.time_model import PARTS, TimeModel

SECONDS_PER_DAY = 86400


@dataclass(frozen=True)
class Replay:
    """Simulated seconds of an epoch, or of one of its levels without the optimizer steps.

    parts: mean over the ranks, by name of PARTS. idle: mean wait for the slowest rank of a micro-batch. Levels that run
    side by side share a micro-batch's seconds in proportion to their ranks.
    steps: clipping and optimizer. Their sum is `seconds`. tokens: without padding. cr: share of the tokens that take
    part in context-parallel communication (paper section 2.2).
    """

    world_size: int
    micro_batches: int
    tokens: int
    cr: float
    parts: Mapping[str, float]
    idle: float
    steps: float
    per_level: tuple[Replay | None, ...] = ()

    @property
    def seconds(self) -> float:
        """The wall-clock time."""
        return sum(self.parts.values()) + self.idle + self.steps

    @property
    def gpu_days(self) -> float:
        return self.seconds * self.world_size / SECONDS_PER_DAY

    def share(self, part: str) -> float:
        """Return the share of `part` in the whole: a name of PARTS, "idle" or "steps"."""
        named = {**self.parts, "idle": self.idle, "steps": self.steps}
        return named[part] / self.seconds


def replay(plan: Plan, model: TimeModel, *, static_shapes: bool | None = None) -> Replay:
    """Replay `plan` on the machine of `model`, which must have the same world size.

    static_shapes: whether every pack is padded to its level's max_tokens, as in a run; otherwise its matrix products
    and collectives take the time of its own tokens, rounded up to its cp degree. By default static except for "nopack".
    """
    assert model.world_size == plan.world_size
    if static_shapes is None:
        # Without packing, a single sample of 100 tokens in a batch of 128K would only measure the padding.
        static_shapes = plan.method != "nopack"
    seconds = pack_seconds(plan, model, static_shapes)
    whole = np.sum(list(seconds.values()), axis=0)
    # Of all ranks, what the ranks of a pack take part in.
    share = plan.pack_degrees / plan.world_size
    slowest = np.repeat(plan.over_ranks(whole)[1], np.diff(plan.pack_offsets))

    def account(chosen: NDArray[np.bool_], steps: float, per_level: tuple[Replay | None, ...] = ()) -> Replay:
        parts = {name: float((part * share)[chosen].sum()) for name, part in seconds.items()}
        tokens = plan.pack_tokens[chosen]
        num_tokens = int(tokens.sum())
        return Replay(
            world_size=plan.world_size,
            micro_batches=len(np.unique(plan.iteration_of_pack[chosen])),
            tokens=num_tokens,
            cr=int(tokens[plan.pack_degrees[chosen] > 1].sum()) / max(1, num_tokens),
            parts=parts,
            # Rounding errors can turn a perfect balance into -1e-16.
            idle=max(0.0, float((slowest * share)[chosen].sum()) - sum(parts.values())),
            steps=steps,
            per_level=per_level,
        )

    of_level = [plan.pack_levels == k for k in range(len(plan.levels))]
    per_level = tuple(account(chosen, 0.0) if chosen.any() else None for chosen in of_level)
    everything = np.ones(plan.packs.num_rows, bool)
    return account(everything, model.step_seconds() * plan.num_steps, per_level)


def pack_seconds(plan: Plan, model: TimeModel, static_shapes: bool) -> dict[str, FloatArray]:
    """Return the seconds of each part for each pack of the plan, float64 [num_packs]."""
    loads, level_of = pack_loads(plan), plan.pack_levels
    seconds = {name: np.zeros(len(loads)) for name in PARTS}
    for k, level in enumerate(plan.levels):
        mine = np.flatnonzero(level_of == k)
        tokens: FloatArray | None = None
        if not static_shapes:
            tokens = (-(-plan.pack_tokens[mine] // level.cp_degree) * level.cp_degree).astype(np.float64)
        for name, part in model.parts(level, loads[mine], tokens).items():
            seconds[name][mine] = part
    return seconds


def replay_table(replays: Mapping[str, Replay], baseline: str | None = None) -> str:
    """Return one line per method and per level of it; speed-up over `baseline`, by default the first method.

    Of a method that saw a part of the samples, GPU days are those of all.
    """
    first = replays[baseline or next(iter(replays))]
    lines = [
        f"{'method':<18}{'GPU days':>10}{'speed-up':>10}{'idle':>8}{'SP':>8}{'recomp.':>9}{'FSDP':>8}{'experts':>9}"
        f"{'fixed':>8}{'CR':>7}{'micro-batches':>15}"
    ]
    for name, whole in replays.items():
        share = whole.tokens / first.tokens
        lines.append(_line(name, whole, f"{first.gpu_days / whole.gpu_days * share:>9.2f}x", 1 / share))
        used: Sequence[tuple[int, Replay]] = [(k, r) for k, r in enumerate(whole.per_level) if r is not None]
        if len(used) > 1:
            lines += [_line(f"  level {k}", r, " " * 10) for k, r in used]
    return "\n".join(lines)


def _line(name: str, r: Replay, speed_up: str, scale: float = 1.0) -> str:
    return (
        f"{name:<18}{r.gpu_days * scale:>10.3f}{speed_up}{r.share('idle'):>8.1%}{r.share('sp'):>8.1%}"
        f"{r.share('recompute'):>9.1%}{r.share('fsdp'):>8.1%}{r.share('experts'):>9.1%}{r.share('fixed'):>8.1%}"
        f"{r.cr:>7.3f}{round(r.micro_batches * scale):>15,}"
    )


# (published samples, median tokens, lognormal sigma) of each source of the Tulu3 SFT mixture. Medians and sigmas are
# chosen so that the mean and the share of long samples are like those that the paper's figures imply.
TULU3_SOURCES: dict[str, tuple[int, int, float]] = {
    "persona_math": (149_960, 800, 0.45),
    "evol_codealpaca": (107_276, 560, 0.60),
    "aya": (100_000, 330, 1.10),
    "wildchat": (100_000, 1050, 1.00),
    "flan_v2": (89_982, 300, 1.00),
    "numinamath_tir": (64_312, 900, 0.50),
    "wildguardmix": (50_000, 370, 0.70),
    "wildjailbreak": (50_000, 520, 0.60),
    "open_math_2_gsm8k": (50_000, 300, 0.40),
    "persona_gsm": (49_980, 400, 0.40),
    "persona_python": (34_999, 600, 0.45),
    "persona_if": (29_980, 470, 0.50),
    "persona_algebra": (20_000, 1000, 0.45),
    "coconot": (10_983, 250, 0.60),
    "sciriff": (10_000, 2200, 0.70),
    "no_robots": (9_500, 350, 0.80),
    "oasst1_guanaco": (7_132, 700, 0.70),
    "table_gpt": (5_000, 900, 0.60),
    "hardcoded": (240, 190, 0.30),
}
SHORT_MAX_TOKENS = 32_768
LONG_PER_SHORT = 2000 / 939_344


def tulu3_longcite_like(num_samples: int, seed: int = 0) -> IntArray:
    """Return shuffled lengths of a mixture like Tulu3 with LongCite, int64 [num_samples].

    19 lognormal sources cut at 32,768 tokens, and 0.2% long samples of 2K + 129K * Beta(1, 1.4) tokens.
    """
    rng = np.random.default_rng(seed)
    num_long = round(num_samples * LONG_PER_SHORT / (1 + LONG_PER_SHORT))
    counts = np.array([count for count, _, _ in TULU3_SOURCES.values()], float)
    shares = rng.multinomial(num_samples - num_long, counts / counts.sum())
    parts = [
        np.exp(np.log(median) + sigma * rng.standard_normal(share))
        for share, (_, median, sigma) in zip(shares, TULU3_SOURCES.values(), strict=True)
    ]
    short = np.clip(np.concatenate(parts), 10, SHORT_MAX_TOKENS)
    long = 2048 + 129_024 * rng.beta(1.0, 1.4, num_long)
    return rng.permutation(np.concatenate([short, long]).astype(np.int64))
