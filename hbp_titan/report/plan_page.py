"""One self-contained HTML page about a plan: the data, the packs, and the metrics of all methods.

Owns the choice of charts. The page has no script and loads nothing, so it can be archived or sent.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from hbp_titan.packing.level import level_name
from hbp_titan.packing.metrics import Metrics
from hbp_titan.packing.plan import Plan
from hbp_titan.packing.ragged import IntArray, shuffled
from hbp_titan.report.charts import Chart
from hbp_titan.report.html import NUM_COLORS, cards, document, figure, note, percent, row, section, table, terms, text
from hbp_titan.report.methods import label_of, meaning_of
from hbp_titan.report.timeline import timeline_figure
from hbp_titan.utils import human_count

MAX_MICRO_BATCHES = 60
EPOCH_BINS = 120
FILL_BINS = 50
# The paper's metrics, then those of this project.
_METRICS = {
    "DBR": "Data balance ratio: how far the mean tokens of the groups of a micro-batch are below the largest group's.",
    "PR": "Padding ratio: share of positions without a token.",
    "ABR": "Attention balance ratio: as DBR, for sum(len^2), to which the work of attention is proportional.",
    "CR": "Communication ratio: share of tokens in packs that several ranks share (context parallelism, cp).",
    "Ave-T": "Average tokens: mean real tokens of a pack.",
    "idle share": "Share of the modeled time that ranks wait for the slowest one of their micro-batch.",
}


def html_report(plan: Plan, compared: Mapping[str, Metrics]) -> str:
    """Return the page of `plan`. compared: metrics by method, on the same data."""
    levels = ", ".join(f"{level.max_tokens} tokens at cp {level.cp_degree}" for level in plan.levels)
    facts = (
        f"{len(plan.packs.ids):,} samples, {int(plan.pack_tokens.sum()):,} tokens; world size {plan.world_size}; "
        f"levels: {levels}; seed {plan.seed}, epoch {plan.epoch}. Plan {plan.fingerprint[:16]}."
    )
    # A level without packs has no charts.
    used = np.unique(plan.pack_levels).tolist()
    if plan.level_order == "parallel":
        balance, charts = "Ranks of all levels work side by side. The chart shows", row(_side_by_side(plan))
    else:
        balance = "Left: the same packs in random order. Right: this plan. Both show"
        charts = "".join(row(*_balance(plan, k)) for k in used)
    sections = [
        f"<header><h1>Packing plan: {text(label_of(plan.method))}</h1><p>{text(facts)}</p>{_cards(plan, compared)}"
        f"</header>",
        section("Ranks over time", "", timeline_figure(plan)),
        section("Methods compared", "The same samples and levels, packed by each method.", _methods(plan, compared)),
        section("The data", "", row(_lengths(plan, by_tokens=False), _lengths(plan, by_tokens=True))),
        section(
            "Cost of the packs of a micro-batch",
            "Each bar spans the cheapest to the costliest pack of one micro-batch; the line is the mean. The step "
            f"waits for the top of the bar. {balance} evenly spaced micro-batches, from the costliest to the cheapest.",
            charts,
        ),
        section("Packs and the epoch", "", row(*(_fill(plan, k) for k in used), _epoch(plan, used), _steps(plan))),
    ]
    return document("Packing plan", "".join(sections))


def _cards(plan: Plan, compared: Mapping[str, Metrics]) -> str:
    m = compared[plan.method]
    return cards([
        ("idle share", percent(m.time_imbalance), "ranks waiting, of the modeled time"),
        ("padding", percent(m.pr), "of computed positions"),
        ("shared by ranks", percent(m.cr, 1), "of the tokens (context parallelism)"),
        ("micro-batches", f"{plan.num_iterations:,}", f"in {plan.num_steps:,} optimizer steps"),
        ("samples per pack", f"{m.samples_per_pack:.1f}", f"{m.ave_tokens:,.0f} tokens"),
    ])  # fmt: skip


def _methods(plan: Plan, compared: Mapping[str, Metrics]) -> str:
    heads = ("method", *_METRICS, "micro-batches", "samples per pack")
    rows = []
    for name, m in compared.items():
        cells = [f"{m.dbr:.4f}", f"{m.pr:.4f}", f"{m.abr:.4f}", f"{m.cr:.4f}", f"{m.ave_tokens:,.0f}"]
        cells += [f"{m.time_imbalance:.2%}", f"{m.iterations:,}", f"{m.samples_per_pack:.1f}"]
        rows.append([text(label_of(name)), *cells])
    meanings = {**_METRICS, **{label_of(name): meaning_of(name) for name in compared}}
    marked = [*compared].index(plan.method)
    return (
        table(heads, rows, marked=[marked])
        + note("Of DBR, PR, ABR, CR and idle share 0 is best.")
        + terms("What the columns and methods mean", meanings)
    )


def _lengths(plan: Plan, by_tokens: bool) -> str:
    """Return a histogram of lengths over powers of the square root of two, with the boundaries of the levels."""
    lengths = plan.lengths[plan.packs.ids]
    largest = plan.levels[-1].max_tokens
    first, last = np.floor(np.log2(lengths.min())), np.ceil(np.log2(largest + 1))
    # Half powers of two: even bars on the logarithmic axis, with edges at the usual capacities.
    edges = 2 ** np.arange(first, last + 0.5, 0.5)
    counts, _ = np.histogram(lengths, edges, weights=lengths if by_tokens else None)
    share = counts / counts.sum()
    unit = "tokens" if by_tokens else "samples"
    chart = Chart(f"Share of {unit} by length", "tokens of a sample", "", *_axes(edges, share), True, bare=True)
    short = lengths <= plan.levels[0].max_tokens
    fits = lengths[short].sum() / lengths.sum() if by_tokens else short.mean()
    chart.message = f"{fits:.1%} of the {unit} are in samples that fit the {level_name(plan.levels[0])} level"
    for low, high, value in zip(edges[:-1].tolist(), edges[1:].tolist(), share.tolist(), strict=True):
        chart.bar(
            low, high * 0.98, 0, value, 0, f"{human_count(low, 1024)} to {human_count(high, 1024)} tokens: {value:.2%}"
        )
    for level in plan.levels:
        chart.boundary(level.max_tokens, f"{human_count(level.max_tokens, 1024)} cp {level.cp_degree}")
    return figure(chart)


def _axes(edges: NDArray[np.float64], values: NDArray[np.float64]) -> tuple[tuple[float, float], tuple[float, float]]:
    return (float(edges[0]), float(edges[-1])), (0.0, float(values.max()) * 1.1)


def _balance(plan: Plan, level: int) -> list[str]:
    """Return two charts of min, mean and max cost over the packs of a micro-batch: shuffled, and as planned."""
    planned = plan.pack_costs(plan.costs)[plan.pack_levels == level]
    dp = plan.levels[level].dp_degree(plan.world_size)
    # The same packs shuffled: what balancing gains, without a second plan.
    random = planned[shuffled(len(planned), plan.seed, plan.epoch, level)]
    top = float(planned.max()) * 1.08
    charts = []
    for name, costs in (("random order", random.reshape(-1, dp)), ("balanced", planned.reshape(-1, dp))):
        # Weighted by the time of each micro-batch, like time_imbalance.
        idle = 1 - costs.mean(axis=1).sum() / costs.max(axis=1).sum()
        title = f"{level_name(plan.levels[level])}, {dp} group{'s' * (dp > 1)}, {name}: ranks wait {idle:.2%}"
        charts.append(_spans(title, costs.min(axis=1), costs.mean(axis=1), costs.max(axis=1), top, level % NUM_COLORS))
    return charts


def _side_by_side(plan: Plan) -> str:
    """Return a chart of min, mean and max cost over the ranks of a micro-batch, whose packs are of several levels."""
    costs = plan.pack_costs(plan.costs) / plan.pack_degrees
    mean, high = plan.over_ranks(costs)
    low = np.minimum.reduceat(costs, plan.pack_offsets[:-1])
    title = f"All levels side by side: ranks wait {1 - mean.sum() / high.sum():.2%}"
    return _spans(title, low, mean, high, float(high.max()) * 1.08, 0)


def _spans(
    title: str,
    low: NDArray[np.float64],
    mean: NDArray[np.float64],
    high: NDArray[np.float64],
    top: float,
    color: int,
) -> str:
    """Return a chart with a bar from `low` to `high` and a line at `mean` for evenly spaced micro-batches."""
    by_cost = np.argsort(-high, kind="stable")
    shown = by_cost[np.linspace(0, len(by_cost) - 1, min(MAX_MICRO_BATCHES, len(by_cost))).astype(int)]
    unit = "modeled cost, relative to a token"
    chart = Chart(title, "micro-batches, costliest first", unit, (0, len(shown)), (0, top), bare=True)
    for index, k in enumerate(shown.tolist()):
        text = f"{low[k]:.4g} to {high[k]:.4g}"
        chart.bar(index + 0.15, index + 0.85, low[k] - top * 0.004, high[k] + top * 0.004, color, text)
        chart.line([(index + 0.1, mean[k]), (index + 0.9, mean[k])], 5)
    return figure(chart)


def _fill(plan: Plan, level: int) -> str:
    """Return a histogram of tokens / max_tokens over the packs of a level."""
    capacity = plan.levels[level].max_tokens
    fill = plan.pack_tokens[plan.pack_levels == level] / capacity
    counts, edges = np.histogram(fill, FILL_BINS, (0, 1))
    share = counts / counts.sum()
    title = f"{level_name(plan.levels[level])} packs are {fill.mean():.2%} full on average"
    chart = Chart(title, "tokens / max_tokens", "share of packs", *_axes(edges, share), bare=True)
    for low, high, value in zip(edges[:-1].tolist(), edges[1:].tolist(), share.tolist(), strict=True):
        chart.bar(low, high, 0, value, level % NUM_COLORS, f"{low:.0%} to {high:.0%} full: {value:.2%}")
    return figure(chart)


def _epoch(plan: Plan, used: list[int]) -> str:
    """Return the share of each level in the ranks' micro-batches along the epoch."""
    bins = min(EPOCH_BINS, plan.num_iterations)
    # Bins of nearly equal size; the last ones are not shorter.
    bin_of = np.arange(plan.num_iterations) * bins // plan.num_iterations
    size = np.bincount(bin_of, minlength=bins)
    unit = "share of the ranks' micro-batches"
    chart = Chart("Levels over the epoch", "micro-batch", unit, (0, plan.num_iterations), (0, 1), bare=True)
    base = np.zeros(bins)
    starts: IntArray = np.searchsorted(bin_of, np.arange(bins + 1))
    for level in used:
        own = plan.pack_levels == level
        ranks = np.bincount(bin_of[plan.iteration_of_pack[own]], plan.pack_degrees[own], bins)
        share = ranks / size / plan.world_size
        for b in np.flatnonzero(share):
            chart.bar(int(starts[b]), int(starts[b + 1]), base[b], base[b] + share[b], level % NUM_COLORS)
        base += share
        whole = ranks.sum() / size.sum() / plan.world_size
        chart.name(f"{level_name(plan.levels[level])} {whole:.0%}", level % NUM_COLORS)
    return figure(chart)


def _steps(plan: Plan) -> str:
    """Return the real tokens of each optimizer step, or the range of neighboring steps if there are many."""
    tokens = plan.step_tokens
    bins = min(4 * EPOCH_BINS, len(tokens))
    starts = np.arange(bins) * len(tokens) // bins
    low, high = np.minimum.reduceat(tokens, starts), np.maximum.reduceat(tokens, starts)
    title = f"Optimizer steps have {tokens.mean():,.0f} +- {tokens.std():,.0f} tokens"
    chart = Chart(title, "optimizer step", "real tokens", (0, len(tokens)), (0, float(tokens.max()) * 1.1), bare=True)
    ends = np.append(starts[1:], len(tokens))
    # A bar of equal lowest and highest value would have no height.
    thickness = float(tokens.max()) * 0.004
    for start, end, lowest, highest in zip(starts.tolist(), ends.tolist(), low.tolist(), high.tolist(), strict=True):
        chart.bar(start, end, lowest - thickness, highest + thickness, 2)
    return figure(chart)
