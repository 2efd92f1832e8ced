"""One self-contained HTML page about a plan: the data, the packs, and the metrics of all methods.

Owns the choice of charts. The page has no script and loads nothing, so it can be archived or sent.
"""

from __future__ import annotations

import html
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from hbp_titan.packing.build import METHODS
from hbp_titan.packing.metrics import Metrics
from hbp_titan.packing.plan import Plan
from hbp_titan.packing.ragged import IntArray, shuffled
from hbp_titan.report.charts import Chart
from hbp_titan.report.html import PALETTE
from hbp_titan.utils import human_count

MAX_MICRO_BATCHES = 60
EPOCH_BINS = 120
FILL_BINS = 50

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 1120px; margin: 32px auto; padding: 0 20px; }
h1 { font-size: 24px; margin: 0 0 4px; } h2 { font-size: 18px; margin: 34px 0 6px; }
p { max-width: 76ch; color: var(--soft); margin: 4px 0 12px; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr)); gap: 14px;
  margin: 0 0 14px; }
svg { background: var(--panel); border-radius: 8px; width: 100%; font-size: 11px; fill: var(--ink); }
svg .title { font-weight: 600; font-size: 13px; }
.scroll { overflow-x: auto; }
dl { max-width: 76ch; } dt { font-weight: 600; } dd { margin: 0 0 6px; color: var(--soft); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 14px 4px 0; text-align: right; border-bottom: 1px solid var(--grid); }
th:first-child, td:first-child { text-align: left; } tr.chosen td { font-weight: 600; }
"""


def html_report(plan: Plan, compared: Mapping[str, Metrics]) -> str:
    """Return the page of `plan`. compared: metrics by method, on the same data."""
    levels = ", ".join(f"{level.max_tokens} tokens at cp {level.cp_degree}" for level in plan.levels)
    facts = (
        f"{len(plan.packs.ids):,} samples, {int(plan.pack_tokens.sum()):,} tokens; world size {plan.world_size}; "
        f"levels: {levels}; seed {plan.seed}, epoch {plan.epoch}; {plan.num_iterations:,} micro-batches in "
        f"{plan.num_steps:,} optimizer steps. Plan {plan.fingerprint[:16]}."
    )
    # A level without packs has no charts.
    used = np.unique(plan.pack_levels).tolist()
    if plan.level_order == "parallel":
        balance, charts = "Ranks of all levels work side by side. The chart shows", _row([_side_by_side(plan)])
    else:
        balance = "Left: the same packs in random order. Right: this plan. Both show"
        charts = "".join(_row(_balance(plan, k)) for k in used)
    sections = [
        f"<h1>Packing plan: {html.escape(plan.method)}</h1><p>{html.escape(facts)}</p>",
        "<h2>Methods compared</h2><p>Of DBR, PR, ABR, CR and idle 0 is best.</p>"
        + f'<div class="scroll">{_table(plan.method, compared)}</div>'
        + _terms({**_METRICS, **{name: METHODS[name].summary for name in compared if name in METHODS}}),
        "<h2>The data</h2><p>Most samples are short, but most tokens may be in long ones.</p>"
        + _row([_lengths(plan, by_tokens=False), _lengths(plan, by_tokens=True)]),
        "<h2>Cost of the packs of a micro-batch</h2><p>Each bar spans the cheapest to the costliest pack of one "
        f"micro-batch; the line is the mean. The step waits for the top of the bar. {balance} evenly spaced "
        f"micro-batches, from the costliest to the cheapest.</p>{charts}",
        "<h2>Packs and the epoch</h2>" + _row([*(_fill(plan, k) for k in used), _epoch(plan, used), _steps(plan)]),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>Packing plan</title>'
        f"<style>{PALETTE}{_STYLE}</style></head><body>{''.join(sections)}</body></html>\n"
    )


# The paper's metrics, then those of this project.
_METRICS = {
    "DBR": "Data balance: how far the mean tokens of the groups of a micro-batch are below the largest group's.",
    "ABR": "Attention balance: the same for sum(len^2), to which the work of attention is proportional.",
    "PR": "Padding: share of positions without a token.",
    "CR": "Communication: share of tokens in packs that several ranks share (context parallelism).",
    "Ave-T": "Mean real tokens of a pack.",
    "idle": "Share of the modeled step time that ranks wait for the slowest one.",
}


def _terms(meanings: Mapping[str, str]) -> str:
    """Return a list of terms that opens on a click."""
    parts = (f"<dt>{html.escape(term)}</dt><dd>{html.escape(meaning)}</dd>" for term, meaning in meanings.items())
    return f"<details><summary>What the columns and methods mean</summary><dl>{''.join(parts)}</dl></details>"


def _row(charts: list[str]) -> str:
    return f'<div class="charts">{"".join(charts)}</div>'


def _table(chosen: str, compared: Mapping[str, Metrics]) -> str:
    heads = ("method", "DBR", "PR", "ABR", "CR", "Ave-T", "idle", "micro-batches", "samples per pack")
    rows = []
    for name, m in compared.items():
        cells = [f"{m.dbr:.4f}", f"{m.pr:.4f}", f"{m.abr:.4f}", f"{m.cr:.4f}", f"{m.ave_tokens:,.0f}"]
        cells += [f"{m.time_imbalance:.4%}", f"{m.iterations:,}", f"{m.samples_per_pack:.1f}"]
        mark = ' class="chosen"' if name == chosen else ""
        rows.append(f"<tr{mark}><td>{html.escape(name)}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    return f"<table><tr>{''.join(f'<th>{head}</th>' for head in heads)}</tr>{''.join(rows)}</table>"


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
    chart = Chart(f"Share of {unit} by length", "tokens of a sample", f"share of {unit}", *_axes(edges, share), True)
    for low, high, value in zip(edges[:-1].tolist(), edges[1:].tolist(), share.tolist(), strict=True):
        chart.bar(
            low, high * 0.98, 0, value, 0, f"{human_count(low, 1024)} to {human_count(high, 1024)} tokens: {value:.2%}"
        )
    for level in plan.levels:
        chart.boundary(level.max_tokens, f"{human_count(level.max_tokens, 1024)} cp {level.cp_degree}")
    return chart.svg()


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
    for name, costs in (("before", random.reshape(-1, dp)), ("after", planned.reshape(-1, dp))):
        # Weighted by the time of each micro-batch, like time_imbalance.
        idle = 1 - costs.mean(axis=1).sum() / costs.max(axis=1).sum()
        size = human_count(plan.levels[level].max_tokens, 1024)
        title = f"{size} level, {dp} group{'s' * (dp > 1)}, {name}: {idle:.2%} idle"
        charts.append(_spans(title, costs.min(axis=1), costs.mean(axis=1), costs.max(axis=1), top, level % 6))
    return charts


def _side_by_side(plan: Plan) -> str:
    """Return a chart of min, mean and max cost over the ranks of a micro-batch, whose packs are of several levels."""
    costs = plan.pack_costs(plan.costs) / plan.pack_degrees
    mean, high = plan.over_ranks(costs)
    low = np.minimum.reduceat(costs, plan.pack_offsets[:-1])
    title = f"All levels side by side: {1 - mean.sum() / high.sum():.2%} idle"
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
    chart = Chart(title, "micro-batches, costliest first", "modeled cost", (0, len(shown)), (0, top))
    for index, k in enumerate(shown.tolist()):
        text = f"{low[k]:.4g} to {high[k]:.4g}"
        chart.bar(index + 0.15, index + 0.85, low[k] - top * 0.004, high[k] + top * 0.004, color, text)
        chart.line([(index + 0.1, mean[k]), (index + 0.9, mean[k])], 5)
    return chart.svg()


def _fill(plan: Plan, level: int) -> str:
    """Return a histogram of tokens / max_tokens over the packs of a level."""
    capacity = plan.levels[level].max_tokens
    fill = plan.pack_tokens[plan.pack_levels == level] / capacity
    counts, edges = np.histogram(fill, FILL_BINS, (0, 1))
    share = counts / counts.sum()
    title = f"Fill of the {human_count(capacity, 1024)} packs: {fill.mean():.2%} on average"
    chart = Chart(title, "tokens / max_tokens", "share of packs", *_axes(edges, share))
    for low, high, value in zip(edges[:-1].tolist(), edges[1:].tolist(), share.tolist(), strict=True):
        chart.bar(low, high, 0, value, level % 6, f"{low:.0%} to {high:.0%} full: {value:.2%}")
    return chart.svg()


def _epoch(plan: Plan, used: list[int]) -> str:
    """Return the share of each level in the ranks' micro-batches along the epoch."""
    bins = min(EPOCH_BINS, plan.num_iterations)
    # Bins of nearly equal size; the last ones are not shorter.
    bin_of = np.arange(plan.num_iterations) * bins // plan.num_iterations
    size = np.bincount(bin_of, minlength=bins)
    chart = Chart("Levels over the epoch", "micro-batch", "share of micro-batches", (0, plan.num_iterations), (0, 1))
    base = np.zeros(bins)
    starts: IntArray = np.searchsorted(bin_of, np.arange(bins + 1))
    for level in used:
        own = plan.pack_levels == level
        ranks = np.bincount(bin_of[plan.iteration_of_pack[own]], plan.pack_degrees[own], bins)
        share = ranks / size / plan.world_size
        for b in np.flatnonzero(share):
            chart.bar(int(starts[b]), int(starts[b + 1]), base[b], base[b] + share[b], level % 6)
        base += share
        chart.name(human_count(plan.levels[level].max_tokens, 1024), level % 6)
    return chart.svg()


def _steps(plan: Plan) -> str:
    """Return the real tokens of each optimizer step, or the range of neighboring steps if there are many."""
    tokens = plan.step_tokens
    bins = min(4 * EPOCH_BINS, len(tokens))
    starts = np.arange(bins) * len(tokens) // bins
    low, high = np.minimum.reduceat(tokens, starts), np.maximum.reduceat(tokens, starts)
    title = f"Tokens of the optimizer steps: {tokens.mean():,.0f} +- {tokens.std():,.0f}"
    chart = Chart(title, "optimizer step", "real tokens", (0, len(tokens)), (0, float(tokens.max()) * 1.1))
    ends = np.append(starts[1:], len(tokens))
    # A bar of equal lowest and highest value would have no height.
    thickness = float(tokens.max()) * 0.004
    for start, end, lowest, highest in zip(starts.tolist(), ends.tolist(), low.tolist(), high.tolist(), strict=True):
        chart.bar(start, end, lowest - thickness, highest + thickness, 2)
    return chart.svg()
