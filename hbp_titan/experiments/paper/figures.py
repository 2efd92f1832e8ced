"""The numbers of the paper (arXiv 2503.07680v3), a fit to one part of them, and its predictions of the others.

The fit for Llama-3.1-8B on 32 H100 uses only the trade-off of SP degree and checkpointing: three coefficients
(computation, SP collectives, a fixed cost per micro-batch) and one scale, because three of the numbers are from another
series of measurements. From it follow the GPU days of whole methods, and the speed-ups of HBP over ISF on larger
models. The paper does not state levels, SP degrees and recomputation of those runs, nor, except for DeepSeek-V2, the
number of GPUs; so a residual there is also one of our assumptions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from hbp_titan.components.timing import FloatArray
from hbp_titan.experiments.paper.calibrate import relative_fit
from hbp_titan.experiments.paper.flexsp import plan_flexsp, replay_concurrent
from hbp_titan.experiments.paper.methods import replay_methods, without_balance
from hbp_titan.packing import Level, Plan, build_plan, measure
from hbp_titan.packing.ragged import IntArray
from hbp_titan.tuning.hardware import get_hardware
from hbp_titan.tuning.simulate import Replay, replay
from hbp_titan.tuning.time_model import Sharding, TimeModel, get_dims

WORLD_SIZE = 32
# Assumptions on the trade-off: "equal tokens" is 16K per GPU, and packs contain the short data (at most 32K a sample).
TOKENS_PER_GPU = 16384
SHORT_MAX_TOKENS = 32768


def paper_level(max_tokens: int, cp_degree: int, ac_layers: int | None = 28) -> Level:
    """Return a level with full recomputation of `ac_layers` layers [all]."""
    return Level(max_tokens, cp_degree, ac_policy="full", ac_layers=ac_layers)


@dataclass(frozen=True)
class TradeOff:
    """A measured micro-batch of the paper. series: 0 the best of each length, 1 the three at 32K."""

    level: Level
    seconds: float
    series: int


TRADE_OFFS = (
    TradeOff(paper_level(16384, 1, 28), 2.65, 0),
    TradeOff(paper_level(8192, 2, 8), 2.69, 0),
    TradeOff(paper_level(32768, 8, 8), 2.83, 0),
    TradeOff(paper_level(65536, 4, 28), 3.01, 0),
    TradeOff(paper_level(131072, 8, 28), 3.05, 0),
    TradeOff(paper_level(32768, 2, 28), 4.45, 1),
    TradeOff(paper_level(32768, 4, 23), 4.35, 1),
    TradeOff(paper_level(32768, 8, 8), 4.12, 1),
)


@dataclass(frozen=True)
class PaperMethod:
    """A row of the paper's comparison; None where it has no number."""

    name: str
    abr: float | None
    cr: float | None
    gpu_days: float


FLAT = (paper_level(131072, 8),)
HBP = (paper_level(16384, 1), *FLAT)
BY_HAND = (paper_level(32768, 2), *FLAT)
FLEXSP = tuple(paper_level(16384 * degree, degree) for degree in (1, 2, 4, 8))

METHODS = (
    PaperMethod("no packing", 0.72, None, 38.3),
    PaperMethod("random", 0.53, 1.0, 5.57),
    PaperMethod("isf", 0.506, 1.0, 5.22),
    PaperMethod("ffs", 0.508, 1.0, 5.24),
    PaperMethod("ffd", 0.515, 1.0, 5.48),
    PaperMethod("bfs", 0.508, 1.0, 5.24),
    PaperMethod("spfhp", 0.512, 1.0, 5.40),
    PaperMethod("flexsp", 0.36, 0.171, 4.35),
    PaperMethod("hbp, unbalanced", 0.288, 0.173, 4.51),
    PaperMethod("hbp, 32K+128K", 0.002, 1.0, 4.25),
    PaperMethod("hbp", 0.002, 0.173, 3.73),
)


@dataclass(frozen=True)
class PaperFit:
    """model: time model with the fitted coefficients. predicted: seconds of each of TRADE_OFFS.

    factors: seconds of computation and of SP relative to the hardware table, fixed seconds of a micro-batch, scale of
    series 1.
    """

    model: TimeModel
    factors: tuple[float, float, float, float]
    predicted: FloatArray


def fit_trade_offs(lengths: IntArray) -> PaperFit:
    """Fit the three coefficients and the scale of series 1. lengths: of the samples, int64 [n]."""
    # The paper mentions neither overlapped exchanges nor a kernel other than FlashAttention-2.
    machine = get_hardware("h100-80gb").with_attention("fa2")
    assumed = TimeModel(get_dims("llama3_1_8b"), machine, WORLD_SIZE, overlaps=False)
    columns = np.array([_columns(assumed, row.level, lengths) for row in TRADE_OFFS])
    seconds = np.array([row.seconds for row in TRADE_OFFS])
    series = np.array([row.series for row in TRADE_OFFS])
    best: tuple[float, FloatArray, float] = (np.inf, np.zeros(3), 1.0)
    # The scale enters the fit nonlinearly: search it, solve the rest exactly.
    for scale in np.arange(0.5, 3.0, 0.005).tolist():
        target = np.where(series == 1, seconds / scale, seconds)
        x = relative_fit(columns, target)
        error = float(np.sum((columns @ x / target - 1) ** 2))
        if error < best[0]:
            best = (error, x, scale)
    _, x, scale = best
    hardware = assumed.hardware
    fitted = dataclasses.replace(
        hardware,
        name="h100-80gb, fitted",
        linear_efficiency=hardware.linear_efficiency / x[0],
        attention_efficiency=hardware.attention_efficiency / x[0],
        # A fitted cost of 0 is an infinitely fast exchange.
        exchange_efficiency=hardware.exchange_efficiency / x[1] if x[1] else np.inf,
    )
    model = dataclasses.replace(assumed, hardware=fitted, fixed_seconds=float(x[2]))
    factors = (float(x[0]), float(x[1]), float(x[2]), scale)
    return PaperFit(model, factors, columns @ x * np.where(series == 1, scale, 1.0))


def _columns(model: TimeModel, level: Level, lengths: IntArray) -> list[float]:
    """Return seconds of computation and of SP, and the number of micro-batches, for TOKENS_PER_GPU per GPU."""
    short = lengths[lengths <= min(level.max_tokens, SHORT_MAX_TOKENS)].astype(float)
    # The mean over tokens, because a pack holds tokens of the mixture, not samples.
    squares = float((short**2).sum() / short.sum()) * level.max_tokens
    parts = model.parts(level, np.array([[1.0, level.max_tokens, squares, 1]]))
    micro_batches = TOKENS_PER_GPU * level.cp_degree / level.max_tokens
    computation = float((parts["linear"] + parts["attention"] + parts["recompute"])[0])
    return [computation * micro_batches, float(parts["sp"][0]) * micro_batches, micro_batches]


@dataclass(frozen=True)
class Prediction:
    """Simulated values of a row of METHODS."""

    abr: float
    cr: float
    replay: Replay


def predict_methods(lengths: IntArray, model: TimeModel, seed: int = 0) -> Iterator[tuple[PaperMethod, Prediction]]:
    """Plan and simulate each of METHODS on `lengths`."""

    def packed(levels: tuple[Level, ...], method: str) -> Callable[[], Prediction]:
        return lambda: _predicted(build_plan(lengths, levels, WORLD_SIZE, method, seed), model)

    def unbalanced() -> Prediction:
        return _predicted(without_balance(build_plan(lengths, HBP, WORLD_SIZE, "hbp_paper", seed)), model)

    def flexsp() -> Prediction:
        plan = plan_flexsp(lengths, FLEXSP, model, seed)
        concurrent = replay_concurrent(plan, model)
        # ABR compares groups of one degree: those of the same micro-batch in the converted plan.
        return Prediction(measure(plan.as_plan()).abr, concurrent.cr, concurrent)

    predictions = {
        "no packing": packed(FLAT, "nopack"),
        "flexsp": flexsp,
        "hbp, unbalanced": unbalanced,
        "hbp, 32K+128K": packed(BY_HAND, "hbp_paper"),
        "hbp": packed(HBP, "hbp_paper"),
    }
    for row in METHODS:
        yield row, predictions.get(row.name, packed(FLAT, row.name))()


def _predicted(plan: Plan, model: TimeModel) -> Prediction:
    metrics = measure(plan)
    return Prediction(metrics.abr, metrics.cr, replay(plan, model))


def fit_table(fit: PaperFit) -> str:
    """Return the coefficients and every residual of the fit in Markdown."""
    computation, sp, fixed, scale = fit.factors
    hardware = fit.model.hardware
    lines = [
        f"Fitted: {hardware.linear_efficiency:.1%} of the peak in matrix products ({computation:.2f} times the assumed "
        f"seconds), SP collectives {sp:.2f} times, {fixed * 1000:.0f} ms fixed per micro-batch, second series scaled "
        f"by {scale:.3f}.",
        "",
        "| level | SP | layers recomputed | paper, s | fit, s | residual |",
        "|---|---|---|---|---|---|",
    ]
    for row, seconds in zip(TRADE_OFFS, fit.predicted.tolist(), strict=True):
        level = row.level
        lines.append(
            f"| {level.max_tokens // 1024}K{', second series' if row.series else ''} | {level.cp_degree} | "
            f"{level.ac_layers} | {row.seconds:.2f} | {seconds:.2f} | {seconds / row.seconds - 1:+.1%} |"
        )
    return "\n".join(lines)


def prediction_table(predictions: Mapping[PaperMethod, Prediction]) -> str:
    """Return every row of METHODS, paper and simulated, in Markdown."""
    isf = next(row for row in predictions if row.name == "isf")
    lines = [
        "| method | GPU days: paper | simulated | residual | over ISF: paper | simulated | residual | ABR: paper | "
        "simulated | CR: paper | simulated |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row, p in predictions.items():
        days, up = p.replay.gpu_days, isf.gpu_days / row.gpu_days
        simulated = predictions[isf].replay.gpu_days / days
        abr, cr = ("-" if value is None else str(value) for value in (row.abr, row.cr))
        lines.append(
            f"| {row.name} | {row.gpu_days} | {days:.2f} | {days / row.gpu_days - 1:+.0%} | {up:.2f}x | "
            f"{simulated:.2f}x | {simulated / up - 1:+.0%} | {abr} | {p.abr:.3f} | {cr} | {p.cr:.3f} |"
        )
    return "\n".join(lines)


ASSUMED_LEVELS = (paper_level(16384, 1, None), paper_level(131072, 8, None))
DEEPSEEK_LEVELS = (paper_level(8192, 1, None), paper_level(32768, 8, None))


@dataclass(frozen=True)
class PaperModel:
    """speed_up: of the paper. levels, world_size: assumed, except DeepSeek-V2's longest length and GPUs."""

    flavor: str
    speed_up: float
    world_size: int
    levels: tuple[Level, ...]
    expert_parallel: int = 1


PAPER_MODELS = (
    PaperModel("qwen2_5_32b", 1.33, 32, ASSUMED_LEVELS),
    PaperModel("llama3_1_70b", 1.42, 32, ASSUMED_LEVELS),
    PaperModel("qwen2_5_72b", 1.40, 32, ASSUMED_LEVELS),
    PaperModel("deepseek_v2_236b", 2.4, 256, DEEPSEEK_LEVELS, expert_parallel=8),
)


def predict_models(lengths: IntArray, fitted: TimeModel, seed: int = 0) -> Iterator[tuple[PaperModel, float]]:
    """Yield the simulated speed-up of hbp_paper over ISF for PAPER_MODELS, on the samples that fit their levels."""
    for row in PAPER_MODELS:
        fitting = lengths[lengths <= row.levels[-1].max_tokens]
        sharding = Sharding(expert_parallel=row.expert_parallel)
        model = TimeModel(
            get_dims(row.flavor), fitted.hardware, row.world_size, sharding, fixed_seconds=fitted.fixed_seconds
        )
        replays = replay_methods(fitting, row.levels, model, ("isf", "hbp_paper"), seed)
        yield row, replays["isf"].seconds / replays["hbp_paper"].seconds


def models_table(predictions: Iterator[tuple[PaperModel, float]]) -> str:
    """Return every row of PAPER_MODELS, paper and simulated, in Markdown."""
    lines = ["| model | assumed | speed-up: paper | simulated | residual |", "|---|---|---|---|---|"]
    for row, simulated in predictions:
        levels = ", ".join(f"{level.max_tokens // 1024}K SP{level.cp_degree}" for level in row.levels)
        lines.append(
            f"| {row.flavor} | {levels}; {row.world_size} GPUs | {row.speed_up:.2f}x | {simulated:.2f}x | "
            f"{simulated / row.speed_up - 1:+.0%} |"
        )
    return "\n".join(lines)
