"""Simulated comparison of methods: on one configuration, and from 8 to 4096 GPUs, 128K to 1M context, 8B to 236B.

Owns the list of methods (all of packing.METHODS, FlexSP, and HBP without balance), the grid of scenarios with their
data, and its table and chart.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from hbp_titan.experiments.paper.flexsp import FlexSPPlan, plan_flexsp, replay_concurrent
from hbp_titan.job_config import JobConfig, Parallelism
from hbp_titan.models.registry import get_flavor
from hbp_titan.packing import METHODS as PLAN_METHODS
from hbp_titan.packing import CostModel, Level, Plan, build_plan
from hbp_titan.packing.ragged import IntArray, shuffled
from hbp_titan.report.charts import Chart, side_by_side
from hbp_titan.tuning.hardware import Hardware
from hbp_titan.tuning.simulate import Replay, replay, tulu3_longcite_like
from hbp_titan.tuning.time_model import ModelDims, Sharding, TimeModel, estimate_candidates, get_dims
from hbp_titan.utils import did_you_mean, human_count

EXTRA_METHODS = {
    "flexsp": "FlexSP-style: groups of different degrees in parallel, not padded",
    "flexsp_iterations": "the same groups as micro-batches of one level each, as our runtime trains",
    "hbp_unbalanced": "hbp_paper, with packs grouped at random",
}
DEFAULT_METHODS = (
    *("isf", "nopack", "random", "sorted", "flat_sorted"),
    *("flexsp", "flexsp_iterations", "hbp_unbalanced", "hbp_paper", "hbp"),
)


def check_methods(names: Sequence[str]) -> None:
    """Raise ValueError, with the closest name, for an unknown method."""
    known = [*PLAN_METHODS, *EXTRA_METHODS]
    for name in names:
        if name not in known:
            raise ValueError(f"method {name!r} must be one of {', '.join(known)}{did_you_mean(name, known)}")


def replay_methods(
    lengths: IntArray, levels: Sequence[Level], model: TimeModel, names: Sequence[str], seed: int = 0
) -> dict[str, Replay]:
    """Return the simulated epoch of each method over the same samples, by name in the given order."""
    check_methods(names)
    costs = [level_cost(model, level) for level in levels]
    replays: dict[str, Replay] = {}
    flexsp: FlexSPPlan | None = None
    for name in names:
        if name.startswith("flexsp"):
            # Planned once for both of its forms: it is the slowest planner.
            flexsp = flexsp or plan_flexsp(lengths, flexsp_levels(levels[-1]), model, seed)
            replays[name] = replay_concurrent(flexsp, model) if name == "flexsp" else replay(flexsp.as_plan(), model)
            continue
        method = "hbp_paper" if name == "hbp_unbalanced" else name
        plan = build_plan(lengths, levels, model.world_size, method, seed, cost=costs)
        replays[name] = replay(without_balance(plan) if name == "hbp_unbalanced" else plan, model)
    return replays


def level_cost(model: TimeModel, level: Level) -> CostModel:
    """Return the cost that balances the packs of a level: their seconds without what all packs have in common.

    A pack is padded to the level's length, so its tokens count only through the loss head. Partially filled attention
    tiles are ignored: packs of a level hardly differ in them.
    """
    time = model.level_time(level)
    return CostModel(time.per_loss_token, time.per_square, model.dims.window, model.dims.window_share)


def flexsp_levels(largest: Level) -> list[Level]:
    """Return a level per degree 1, 2, 4 up to that of `largest`, with the same tokens per rank and checkpointing."""
    per_rank = largest.max_tokens // largest.cp_degree
    degrees = {2**i for i in range(largest.cp_degree.bit_length())} | {largest.cp_degree}
    return [
        dataclasses.replace(largest, max_tokens=per_rank * degree, cp_degree=degree)
        for degree in sorted(degrees)
        if largest.cp_degree % degree == 0
    ]


def without_balance(plan: Plan) -> Plan:
    """Return the same packs in random groups within each level (the paper's row without balance batching)."""
    order = np.arange(plan.packs.num_rows)
    for level in range(len(plan.levels)):
        own = np.flatnonzero(plan.pack_levels == level)
        order[own] = own[shuffled(len(own), plan.seed, level)]
    return dataclasses.replace(plan, packs=plan.packs.take(order))


MODELS = ("llama3_1_8b", "llama3_1_70b", "deepseek_v2_236b")
CONTEXTS = (131_072, 262_144, 524_288, 1_048_576)
WORLD_SIZES = (8, 64, 512, 4096)
METHODS = ("isf", "flat_sorted", "hbp_paper", "hbp")
# Of each level, as in the paper's two levels.
TOKENS_PER_RANK = 16_384
BASE_CONTEXT = 131_072
# Enough for many micro-batches of every level.
MICRO_BATCHES, MAX_SAMPLES = 100, 8_000_000


@dataclass(frozen=True)
class Scenario:
    """One point of the grid. replays: by method, in the order of METHODS; None if it does not fit in memory."""

    dims: ModelDims
    context: int
    world_size: int
    replays: dict[str, Replay] | None

    def speed_up(self, method: str) -> float:
        """Return the speed-up over ISF."""
        assert self.replays is not None
        return self.replays["isf"].seconds / self.replays[method].seconds


def scale_levels(dims: ModelDims, context: int, world_size: int) -> list[Level]:
    """Return the levels 16K on one rank, 128K on 8, and the context with 16K tokens per rank, or on all ranks.

    If the degree does not divide the kv heads, the style is hybrid.
    """
    levels = []
    for max_tokens in sorted({TOKENS_PER_RANK, BASE_CONTEXT, context}):
        # With fewer ranks each holds more tokens.
        cp = min(max_tokens // TOKENS_PER_RANK, world_size)
        style = "ulysses" if dims.num_kv_heads % cp == 0 and dims.num_heads % cp == 0 else "hybrid"
        levels.append(Level(max_tokens, cp, style, ac_policy="full"))
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
) -> Iterator[Scenario]:
    """Yield every scenario, by context and world size (models share their data), then by model."""
    for context in contexts:
        for world_size in world_sizes:
            lengths = scale_lengths(context, world_size)
            for name in models:
                yield _scenario(get_dims(name), context, world_size, lengths, hardware)


def _scenario(dims: ModelDims, context: int, world_size: int, lengths: IntArray, hardware: Hardware) -> Scenario:
    levels = fitting_levels(dims, scale_levels(dims, context, world_size), world_size, hardware)
    if levels is None:
        return Scenario(dims, context, world_size, None)
    model = TimeModel(dims, hardware, world_size, Sharding(expert_parallel=expert_parallel(dims, world_size)))
    return Scenario(dims, context, world_size, replay_methods(lengths, levels, model, METHODS))


def expert_parallel(dims: ModelDims, world_size: int) -> int:
    """Return the expert-parallel degree: experts are sharded over the GPUs of a node."""
    return min(8, world_size) if dims.expert_params else 1


def fitting_levels(dims: ModelDims, levels: Sequence[Level], world_size: int, hardware: Hardware) -> list[Level] | None:
    """Return the levels with the fewest recomputed layers that fit, None if one does not fit with all layers."""
    config = JobConfig(parallelism=Parallelism(expert_parallel_degree=expert_parallel(dims, world_size)))
    candidates = estimate_candidates(get_flavor(dims.name), config, hardware, world_size, levels)
    return [c.level for c in candidates] if all(c.fits for c in candidates) else None


def scale_table(scenarios: Sequence[Scenario]) -> str:
    """Return one Markdown row per scenario."""
    lines = [
        "| model | context | GPUs | ISF, GPU days per 1B tokens | idle | flat + cost sort | HBP as printed | ours | "
        "idle | SP | FSDP |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    order = {name: i for i, name in enumerate(MODELS)}
    for s in sorted(scenarios, key=lambda s: (order.get(s.dims.name, 0), s.context, s.world_size)):
        head = f"| {s.dims.name} | {human_count(s.context, 1024)} | {s.world_size} |"
        if s.replays is None:
            lines.append(f"{head} does not fit | | | | | | | |")
            continue
        isf, ours = s.replays["isf"], s.replays["hbp"]
        ups = " | ".join(f"{s.speed_up(method):.2f}x" for method in METHODS[1:])
        lines.append(
            f"{head} {isf.gpu_days / isf.tokens * 1e9:.2f} | {isf.share('idle'):.1%} | {ups} | "
            f"{ours.share('idle'):.1%} | {ours.share('sp'):.1%} | {ours.share('fsdp'):.1%} |"
        )
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
