"""Report section on experts: how evenly tokens are spread over the experts of each layer, and over their ranks.

Owns the choice of its plots and tables. Loads are multiples of a layer's mean: 1 is even.

Shape suffixes: N tables (steps), L layers, E experts, P ranks that share a layer's experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hbp_titan.report.charts import Chart, Curve, Plot
from hbp_titan.report.html import NUM_COLORS, figure, note, row, section, table
from hbp_titan.report.run import ExpertTables, Floats, Run
from hbp_titan.report.series import edge_means

MAX_TABLE_ROWS = 40


def expert_section(run: Run) -> str:
    """Return the section on how evenly tokens are spread over experts, "" for a model without experts."""
    log = run.log
    if not log.has("expert_load", "worst"):
        return ""
    steps = log.steps.astype(float)
    loads = {name: log.column("expert_load", name) for name in ("worst", "mean", "ranks", "idle")}
    names = {"worst": "worst layer", "mean": "mean of layers", "ranks": "ranks"}
    curves = [Curve(title, loads[name], color) for color, (name, title) in enumerate(names.items())]
    plot = Plot("Most loaded expert", "multiple of the mean; 1 is even", "step", steps, curves)
    worst = edge_means(loads["worst"], np.ones(len(steps)))
    plot.message = f"The most loaded expert has {worst[1]:.2f}x its layer's mean at the end" if worst else ""
    rows = []
    for name, title in {**names, "idle": "experts without a token"}.items():
        ends = edge_means(loads[name], np.ones(len(steps)))
        if ends:
            rows.append([title, f"{np.nanmax(loads[name]):.2f}", f"{ends[0]:.2f}", f"{ends[1]:.2f}"])
    load_table = table(("load", "max", "first tenth", "last tenth"), rows)
    intro = "The most loaded expert as a multiple of its layer's mean."
    ranks = run.setting("parallelism", "expert_parallel_degree")
    return section(
        "Experts",
        intro,
        row(plot.figure(), _experts_by_layer(log.experts), load_table),
        _over_steps(log.experts, ranks if isinstance(ranks, int) else 1),
    )


def _experts_by_layer(experts: ExpertTables) -> str:
    """Return the newest loads of the experts of each layer, most loaded first."""
    if experts.newest is None:
        return ""
    step, table_LE = experts.newest
    # Sorted, because which expert is loaded most differs by layer; how uneven they are can be compared.
    loads_LE = -np.sort(-_over_mean(table_LE))
    size = loads_LE.shape[1]
    # The y axis is shared by all layers.
    chart = Chart(
        f"Experts of each layer at step {step:,}", "experts, most loaded first", "multiple of the layer's mean",
        (0.0, float(max(size, 2))), (0.0, float(loads_LE.max()) * 1.05), bare=True,
    )  # fmt: skip
    chart.message = f"At step {step:,} the most loaded expert has {loads_LE.max():.2f}x its layer's mean"
    for index, (name, y_E) in enumerate(zip(experts.layers, loads_LE, strict=True)):
        chart.curve(np.arange(size, dtype=np.float64) + 0.5, y_E, index % NUM_COLORS, f"layer {name}")
        if index < NUM_COLORS:
            chart.name(f"layer {name}", index)
    return figure(chart)


def _over_steps(experts: ExpertTables, ranks: int) -> str:
    """Return maps of the loads by layer over the steps and over the ranks, and a table by layer."""
    if experts.newest is None:
        return ""
    steps = [step for step, _ in experts.all]
    table_NLE = np.stack([kept for _, kept in experts.all]).astype(np.float64)
    load_NLE = _over_mean(table_NLE)
    idle_NL = (table_NLE == 0).sum(2)
    size = table_NLE.shape[2]
    divides = ranks > 1 and size % ranks == 0
    load_NLP = _over_mean(table_NLE.reshape(*table_NLE.shape[:2], ranks, -1).sum(3)) if divides else load_NLE[..., :1]
    maps = [
        _step_map("Most loaded expert by layer", steps, experts.layers, load_NLE.max(2)),
        _step_map("Experts without a token by layer", steps, experts.layers, idle_NL) if idle_NL.any() else "",
    ]
    if divides:
        maps += [
            _step_map("Most loaded rank by layer", steps, experts.layers, load_NLP.max(2)),
            _rank_map(experts.layers, load_NLP.mean(0)),
        ]
    deviation_L = load_NLE.std(2).mean(0)
    heads = ["layer", "most loaded expert", "mean load", "max", "last", "deviation", "without a token: mean", "last"]
    rows = []
    for index, name in enumerate(experts.layers):
        load_NE, idle_N = load_NLE[:, index], idle_NL[:, index]
        largest_N = load_NE.max(1)
        # Averaged over the steps: an expert that is always loaded most, not one that once was.
        mean_E = load_NE.mean(0)
        values = [f"{value:.2f}" for value in (mean_E.max(), largest_N.max(), largest_N[-1])]
        values.append(f"{deviation_L[index]:.2f}")
        rows.append([name, str(mean_E.argmax()), *values, f"{idle_N.mean():.1f}", str(idle_N[-1])])
        if divides:
            load_NP = load_NLP[:, index]
            rows[-1] += [f"{value:.2f}" for value in (load_NP.max(1).mean(), load_NP.max())]
    heads += ["most loaded rank: mean", "max"] if divides else []
    shown = table(heads, rows, "Over the steps of the maps", limit=MAX_TABLE_ROWS)
    of_ranks = f" A rank holds {size // ranks} adjacent experts of a layer." if divides else ""
    remark = (
        f"{len(steps):,} tables of tokens per expert, from step {steps[0]:,} to {steps[-1]:,} "
        f"(metrics.expert_load_interval); padding counts.{of_ranks} Standard deviation of the loads, mean of layers "
        f"and steps: {deviation_L.mean():.2f} (parallelism.expert_load_deviation for time estimates)."
    )
    return row(*maps) + shown + note(remark)


def _over_mean(counts: np.ndarray) -> Floats:
    """Return counts as multiples of their mean along the last dim, float64."""
    counts = np.asarray(counts, np.float64)
    return counts / counts.mean(-1, keepdims=True)


def _step_map(title: str, steps: Sequence[int], layers: Sequence[str], value_NL: np.ndarray) -> str:
    """Return a map of a value by layer (upwards) over the steps; each table fills the space up to the next one."""
    width = steps[-1] - steps[-2] if len(steps) > 1 else 1
    edges = [*steps, steps[-1] + width]
    chart = _map_chart(title, "step", (float(edges[0]), float(edges[-1])), layers)
    shade = _Shade(value_NL)
    chart.message = f"{title}: {shade.high:.4g} at most"
    for at, step in enumerate(steps):
        for index, name in enumerate(layers):
            value = value_NL[at, index]
            tip = f"step {step:,}, layer {name}: {value:.4g}"
            chart.bar(step, edges[at + 1], index, index + 1, 0, tip, shade.opacity(value))
    return figure(chart, shade.legend)


def _rank_map(layers: Sequence[str], load_LP: Floats) -> str:
    """Return a map of the load by layer (upwards) and rank of the group, averaged over the steps."""
    ranks = load_LP.shape[1]
    chart = _map_chart("Load of each rank, mean of the steps", "rank of the expert group", (0.0, float(ranks)), layers)
    chart.x_ticks = [(rank + 0.5, str(rank)) for rank in range(0, ranks, max(1, ranks // 16))]
    shade = _Shade(load_LP)
    chart.message = f"The most loaded rank has {shade.high:.2f}x its layer's mean"
    for index, name in enumerate(layers):
        for rank in range(ranks):
            value = load_LP[index, rank]
            chart.bar(
                rank, rank + 1, index, index + 1, 0, f"rank {rank}, layer {name}: {value:.3f}", shade.opacity(value)
            )
    return figure(chart, shade.legend)


def _map_chart(title: str, x_label: str, x: tuple[float, float], layers: Sequence[str]) -> Chart:
    chart = Chart(title, x_label, "by layer", x, (0.0, float(len(layers))), bare=True)
    every = max(1, len(layers) // 12)
    chart.y_ticks = [(index + 0.5, layers[index]) for index in range(0, len(layers), every)]
    return chart


class _Shade:
    """Opacity of the fields of a map, from the smallest of its values to the largest."""

    def __init__(self, values: np.ndarray) -> None:
        self.low, self.high = float(values.min()), float(values.max())
        self.legend = f"Light: {self.low:.4g}; dark: {self.high:.4g}."

    def opacity(self, value: float) -> float:
        """Return the opacity of a field, 0.05 to 1."""
        return 0.05 + 0.95 * (value - self.low) / max(self.high - self.low, 1e-12)
