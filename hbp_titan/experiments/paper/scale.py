"""Simulated comparison of methods from 8 to 4096 GPUs, 128K to 1M context, 8B to 236B.

Owns the grid of scenarios with their data, and its table and chart. Each method has at each level the fastest memory
plan that fits (methods.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from hbp_titan.experiments.paper.methods import cp_style, memory_choice, replay_methods
from hbp_titan.models.registry import get_flavor
from hbp_titan.packing import Level
from hbp_titan.packing.ragged import IntArray
from hbp_titan.report.charts import Chart, side_by_side
from hbp_titan.tuning.hardware import Hardware
from hbp_titan.tuning.simulate import Replay, tulu3_longcite_like
from hbp_titan.tuning.time_model import ModelDims, get_dims
from hbp_titan.utils import human_count

MODELS = ("llama3_1_8b", "llama3_1_70b", "deepseek_v2_236b")
CONTEXTS = (131_072, 262_144, 524_288, 1_048_576)
WORLD_SIZES = (8, 64, 512, 4096)
METHODS = ("isf", "flat_sorted", "flexsp", "dynamic_cp", "hbp_paper", "hbp")
# Of each level, as in the paper's two levels.
TOKENS_PER_RANK = 16_384
BASE_CONTEXT = 131_072
# Enough for many micro-batches of every level; 27 on 4096 ranks.
MICRO_BATCHES, MAX_SAMPLES = 100, 2_000_000


@dataclass(frozen=True)
class Scenario:
    """One point of the grid. replays: by method, in the order of METHODS; None if it does not fit in memory."""

    dims: ModelDims
    context: int
    world_size: int
    replays: dict[str, Replay] | None

    def speed_up(self, method: str) -> float:
        """Return the speed-up over ISF, in GPU days per token: slow planners see a part of samples and ranks."""
        assert self.replays is not None
        isf, other = self.replays["isf"], self.replays[method]
        return isf.gpu_days / isf.tokens / (other.gpu_days / other.tokens)


def scale_levels(dims: ModelDims, context: int, world_size: int) -> list[Level]:
    """Return the levels 16K on one rank, 128K on 8, and the context with 16K tokens per rank, or on all ranks.

    If the degree does not divide the kv heads, the style is hybrid.
    """
    levels = []
    for max_tokens in sorted({TOKENS_PER_RANK, BASE_CONTEXT, context}):
        # With fewer ranks each holds more tokens.
        cp = min(max_tokens // TOKENS_PER_RANK, world_size)
        levels.append(Level(max_tokens, cp, cp_style(dims, cp)))
    return levels


def scale_lengths(context: int, world_size: int) -> IntArray:
    """Return lengths like the paper's mixture, with long samples scaled to the context and more for larger worlds."""
    per_micro_batch = max(world_size * TOKENS_PER_RANK, context)
    # The mixture has about 900 tokens a sample.
    num = int(np.clip(MICRO_BATCHES * per_micro_batch / 900, 200_000, MAX_SAMPLES))
    lengths = tulu3_longcite_like(num)
    # No sample of the short part is longer.
    long = lengths > 32_768
    # Minus a constant, so that no sample exceeds the context.
    lengths[long] = lengths[long] * (context // BASE_CONTEXT) - (context // BASE_CONTEXT - 1)
    return lengths


def simulate_scale(
    hardware: Hardware,
    models: Sequence[str] = MODELS,
    contexts: Sequence[int] = CONTEXTS,
    world_sizes: Sequence[int] = WORLD_SIZES,
    float8: str = "",
) -> Iterator[Scenario]:
    """Yield every scenario, by context and world size (models share their data), then by model.

    float8: recipe of FP8 products, of all methods, as float8.recipe.
    """
    for context in contexts:
        for world_size in world_sizes:
            lengths = scale_lengths(context, world_size)
            for name in models:
                yield _scenario(get_dims(name), context, world_size, lengths, hardware, float8)


def _scenario(
    dims: ModelDims, context: int, world_size: int, lengths: IntArray, hardware: Hardware, float8: str
) -> Scenario:
    levels = scale_levels(dims, context, world_size)
    choice = memory_choice(get_flavor(dims.name), hardware, world_size, levels, float8)
    if choice is None:
        return Scenario(dims, context, world_size, None)
    return Scenario(dims, context, world_size, replay_methods(lengths, levels, choice.model, METHODS, choice=choice))


def scale_table(scenarios: Sequence[Scenario]) -> str:
    """Return one Markdown row per scenario."""
    lines = [
        "| model | context | GPUs | ISF, GPU days per 1B tokens | idle | flat + sort | FlexSP-like | dynamic CP | "
        "HBP as printed | ours | idle | SP | recomp. | host | FSDP |",
        "|" + "---|" * 15,
    ]
    order = {name: i for i, name in enumerate(MODELS)}
    for s in sorted(scenarios, key=lambda s: (order.get(s.dims.name, 0), s.context, s.world_size)):
        head = f"| {s.dims.name} | {human_count(s.context, 1024)} | {s.world_size} |"
        if s.replays is None:
            lines.append(f"{head} does not fit |" + " |" * 11)
            continue
        isf, ours = s.replays["isf"], s.replays["hbp"]
        ups = [f"{s.speed_up(name):.2f}x" if name in s.replays else "-" for name in METHODS[1:]]
        shares = [f"{ours.share(part):.1%}" for part in ("idle", "sp", "recompute", "host", "fsdp")]
        days = [f"{isf.gpu_days / isf.tokens * 1e9:.2f}", f"{isf.share('idle'):.1%}"]
        lines.append(f"{head} {' | '.join([*days, *ups, *shares])} |")
    return "\n".join(lines)


def scale_svg(scenarios: Sequence[Scenario]) -> str:
    """Return one chart per model: speed-up of our plans over ISF by GPUs, one line per context."""
    names = list(dict.fromkeys(s.dims.name for s in scenarios))
    run = [s for s in scenarios if s.replays is not None]
    worlds = [s.world_size for s in scenarios]
    top = math.ceil(max((s.speed_up("hbp") for s in run), default=1.0))
    charts = []
    for name in names:
        x = (min(worlds), max(max(worlds), 2 * min(worlds)))
        chart = Chart(f"{name} (simulated)", "GPUs", "speed-up over ISF", x, (1.0, max(2.0, top)), x_log=True)
        for color, context in enumerate(sorted({s.context for s in scenarios})):
            own = sorted((s for s in run if s.dims.name == name and s.context == context), key=lambda s: s.world_size)
            chart.line([(s.world_size, s.speed_up("hbp")) for s in own], color % 4)
            chart.name(human_count(context, 1024), color % 4)
        charts.append(chart)
    return side_by_side(charts)
