"""Report sections on learning: loss, gradient norm, loss by length and source, validation.

Owns the choice of these plots and tables.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

import numpy as np

from hbp_titan.packing.metrics import bucket_name
from hbp_titan.report.charts import Curve, Plot, level_curves
from hbp_titan.report.gains import fell
from hbp_titan.report.html import (
    DASH,
    NUM_COLORS,
    missing,
    number,
    percent,
    row,
    section,
    table,
    text,
)
from hbp_titan.report.run import Floats, Run, StepLog
from hbp_titan.report.series import (
    applied,
    bands_in_order,
    edge_means,
    held_out_loss,
    last,
    validation_series,
    window_of,
)

MAX_TABLE_ROWS = 40


def loss_section(run: Run) -> str:
    """Return the section on loss and gradient norm, overall and by level."""
    log = run.log
    if not log.has("loss"):
        return section("Loss", "", missing("metrics.jsonl has no loss yet."))
    trained = log.column("trained_tokens")
    steps = log.steps.astype(float)
    loss = np.where(applied(log), log.column("loss"), np.nan)
    # In the same plot as the training loss, to show overfitting.
    held_out = [Curve("held-out", held_out_loss(log), 2, x=with_start(steps))]
    whole = Plot("Loss", "nats per trained token", "step", steps, [Curve("training", loss, 3, trained)], extra=held_out)
    ends = edge_means(loss, np.nan_to_num(trained))
    whole.message = fell("Training loss", *ends) if ends else ""
    by_level = [
        Curve(name, np.where(applied(log), log.column("loss_by_level", name), np.nan), log.color(name), trained)
        for name in log.levels
    ]
    # Tenths, because the loss of a single step is mostly noise.
    rows = [_edges(curve.name, curve.y, trained) for curve in [Curve("all", loss, 0), *by_level]]
    return section(
        "Loss",
        f"Thin: each step. Thick: mean per trained token of the last {window_of(len(log))} steps of the curve.",
        row(
            whole.figure(),
            _loss_by_level(by_level, steps, trained),
            _gradient_norm(run, steps),
            _learning_rate(log, steps),
        ),
        table(("loss", "steps", "first tenth", "last tenth", "change"), rows),
    )


def with_start(steps: Floats) -> Floats:
    """Return the steps with 0 before them, as the x of `held_out_loss`."""
    return np.append(0.0, steps)


def _loss_by_level(curves: list[Curve], steps: Floats, trained: Floats) -> str:
    plot = Plot("Loss by level", "nats per trained token", "step", steps, curves)
    ends = {curve.name: edge_means(curve.y, np.nan_to_num(trained)) for curve in curves}
    known = [f"{name} {of[1]:.2f}" for name, of in ends.items() if of]
    plot.message = f"Loss at the end: {', '.join(known)}" if known else ""
    return plot.figure()


def _learning_rate(log: StepLog, steps: Floats) -> str:
    rate = log.column("lr")
    plot = Plot("Learning rate", "", "step", steps, [Curve("lr", rate, 4)], False, zero=True)
    known = rate[np.isfinite(rate)]
    plot.message = f"The learning rate peaks at {known.max():.3g}" if len(known) else ""
    return plot.figure()


def _gradient_norm(run: Run, steps: Floats) -> str:
    """Return the norm by level, with the norm that gradients are clipped to."""
    norm = run.log.column("grad_norm")
    curves = level_curves(run.log, norm)
    plot = Plot("Gradient norm", "L2 over all parameters, before clipping", "step", steps, curves, log=True)
    max_norm, known = run.setting("training", "max_norm"), norm[np.isfinite(norm)]
    if isinstance(max_norm, (int, float)) and max_norm > 0 and len(known):
        plot.message = f"Gradients of {(known > max_norm).mean():.0%} of the steps were clipped to norm {max_norm:g}"
        plot.planned = [("clipped above", float(max_norm), 7)]
    return plot.figure()


def _edges(name: str, values: Floats, weights: Floats) -> list[str]:
    """Return cells: name, number of values, mean of the first and of the last tenth, change."""
    ends = edge_means(values, np.nan_to_num(weights))
    count = f"{int(np.isfinite(values).sum()):,}"
    if ends is None:
        return [text(name), count, DASH, DASH, DASH]
    return [text(name), count, f"{ends[0]:.4f}", f"{ends[1]:.4f}", f"{ends[1] - ends[0]:+.4f}"]


def _changes(edges: Sequence[Sequence[str]], unit: str) -> str:
    """Return the largest and the smallest change of loss as a sentence, "" for one group. edges: as of `_edges`."""
    changes = {html.unescape(row[0]): float(row[4]) for row in edges if row[4] != DASH}
    if len(changes) < 2:
        return ""
    order = sorted(changes, key=lambda name: changes[name])
    parts = [f"{changes[name]:+.2f} for {name} {unit}".strip() for name in (order[0], order[-1])]
    return f"Loss changed by {parts[0]}, by {parts[1]}"


def groups_section(run: Run) -> str:
    """Return the section on the loss by length band and by source."""
    log = run.log
    steps = log.steps.astype(float)
    bands, (colors, remark) = bands_in_order(log.names("loss_by_length")), _band_colors(log)
    counts = [log.column("loss_by_length", band, "trained_tokens") for band in bands]
    by_length = [
        Curve(bucket_name(int(band)), log.column("loss_by_length", band, "loss"), colors.get(band, -1), trained)
        for band, trained in zip(bands, counts, strict=True)
    ]
    bodies = [missing("Loss by length is not in metrics.jsonl.")]
    if by_length:
        rows = [
            [*_edges(curve.name, curve.y, trained), number(float(np.nansum(trained)))]
            for curve, trained in zip(by_length, counts, strict=True)
        ]
        heads = ("tokens of the sample", "steps", "first tenth", "last tenth", "change", "trained tokens")
        shown = [curve for curve in by_length if curve.color >= 0]
        plot = Plot("Loss by length of the sample", "nats per trained token", "step", steps, shown, remark=remark)
        plot.message = _changes(rows, "tokens")
        bodies = [plot.figure(), table(heads, rows)]
    return section(
        "Loss by length and by source",
        "The loss of a step, split by the length and by the source of each token's sample.",
        row(*bodies),
        _sources(log, steps),
    )


def _colors(names: Sequence[str], trained: Mapping[str, float], kind: str) -> tuple[dict[str, int], str]:
    """Return a color for each of `names`, at most NUM_COLORS of them, and a remark about those without a curve.

    names: in the order of the legend. trained: trained tokens; the names with most get a color.
    """
    kept = sorted(names, key=lambda name: -trained.get(name, 0.0))[:NUM_COLORS]
    colors = {name: color for color, name in enumerate(name for name in names if name in kept)}
    more = len(names) - len(colors)
    return colors, f"The {NUM_COLORS} {kind} with most trained tokens; the table has {more} more." if more else ""


def _band_colors(log: StepLog) -> tuple[dict[str, int], str]:
    """Return the color of each length band, the same in training and in validation, and a remark."""
    # Validation may have bands that training has not seen, and vice versa.
    bands = bands_in_order(list({*log.names("loss_by_length"), *log.names("validation", "by_length")}))
    trained = {band: float(np.nansum(log.column("loss_by_length", band, "trained_tokens"))) for band in bands}
    return _colors(bands, trained, "lengths")


def _source_colors(log: StepLog) -> tuple[dict[str, int], str]:
    """Return the color of each source, the same in training and in validation, and a remark."""
    names = _sources_in_order(log)
    # Only validation has the others.
    names += [name for name in log.names("validation", "by_source") if name not in names]
    trained = {name: float(np.nansum(log.column("sources", name, "trained_tokens"))) for name in names}
    return _colors(names, trained, "sources")


def _sources_in_order(log: StepLog) -> list[str]:
    """Return the sources, those with most trained tokens first."""
    trained = {name: float(np.nansum(log.column("sources", name, "trained_tokens"))) for name in log.names("sources")}
    return sorted(trained, key=lambda name: -trained[name])


def _sources(log: StepLog, steps: Floats) -> str:
    names = _sources_in_order(log)
    if not names:
        return missing("metrics.jsonl has no sources.")
    columns = {
        name: [log.column("sources", name, kind) for kind in ("samples", "tokens", "trained_tokens", "loss")]
        for name in names
    }
    total = sum(float(np.nansum(columns[name][1])) for name in names)
    colors, remark = _source_colors(log)
    curves = [
        Curve(name, columns[name][3], colors[name], columns[name][2])
        for name in names
        # The loss by source can be absent while its counts are there.
        if name in colors and np.isfinite(columns[name][3]).any()
    ]
    plot = Plot("Loss by source", "nats per trained token", "step", steps, curves, remark=remark)
    heads = ("source", "samples", "tokens", "share", "trained", "first tenth", "last tenth")
    rows, edges = [], []
    for name in names:
        samples, tokens, trained, loss = columns[name]
        sums = [float(np.nansum(values)) for values in (samples, tokens, trained)]
        share = sums[1] / total if total else None
        edges.append(_edges(name, loss, trained))
        ends = edges[-1][2:4]
        rows.append([text(name), number(sums[0]), number(sums[1]), percent(share, 1), number(sums[2]), *ends])
    plot.message = _changes(edges, "")
    absent = missing("Loss by source is not in metrics.jsonl.")
    return row(plot.figure() or absent, table(heads, rows, limit=MAX_TABLE_ROWS))


def validation_section(run: Run) -> str:
    """Return the section on the loss of held-out samples, overall and by level, length and source."""
    log = run.log
    if not log.has("validation", "loss"):
        state = "Validation is off" if run.setting("validation", "enable") is False else "No validation has run"
        return section("Validation", "", missing(f"{state}: [validation] enable and interval control it."))
    steps = log.steps.astype(float)
    overall = {"all": held_out_loss(log)}
    kinds: list[tuple[str, Mapping[str, Floats]]] = [("level", validation_series(log, "by_level"))]
    by_length = validation_series(log, "by_length")
    kinds.append(("length", {bucket_name(int(band)): by_length[band] for band in bands_in_order(list(by_length))}))
    kinds.append(("source", validation_series(log, "by_source")))
    # As in the plots of training above.
    bands, more_bands = _band_colors(log)
    of_bands = {bucket_name(int(band)): color for band, color in bands.items()}
    of_levels = {name: log.color(name) for name in kinds[0][1]}
    colors = {"level": (of_levels, ""), "length": (of_bands, more_bands), "source": _source_colors(log)}
    figures = []
    for kind, series in kinds:
        color_of, remark = colors[kind]
        curves = [Curve(name, y, color_of[name]) for name, y in series.items() if name in color_of]
        title, first = f"Validation loss by {kind}", [Curve("all", overall["all"], 5)] if kind == "level" else []
        plot = Plot(title, "nats per token", "step", with_start(steps), [], remark=remark, extra=[*first, *curves])
        plot.message = _extremes(kind, {curve.name: curve.y for curve in curves})
        figures.append(plot.figure() if curves else missing(f"Validation by {kind} is not in metrics.jsonl."))
    rows = []
    for kind, series in [("", overall), *kinds]:
        for name, values in series.items():
            rows.append([text(name), kind or "all samples", *_validation_cells(log, values)])
    heads = ("held-out samples", "by", "validations", "first", "lowest", "at step", "last")
    intro = "Mean loss per token of samples that are not trained; step 0 is before training."
    return section("Validation", intro, row(*figures, table(heads, rows, limit=MAX_TABLE_ROWS)))


def _validation_cells(log: StepLog, values: Floats) -> Sequence[str]:
    known = np.flatnonzero(np.isfinite(values))
    lowest = known[int(values[known].argmin())]
    losses = [f"{values[index]:.4f}" for index in (known[0], lowest, known[-1])]
    return (f"{len(known):,}", *losses[:2], f"{with_start(log.steps.astype(float))[lowest]:,.0f}", losses[2])


def _extremes(kind: str, series: Mapping[str, Floats]) -> str:
    """Return the groups with the highest and the lowest last loss as a sentence, "" for fewer than two."""
    ends = {name: value for name, values in series.items() if (value := last(values)) is not None}
    if len(ends) < 2:
        return ""
    high, low = max(ends, key=lambda name: ends[name]), min(ends, key=lambda name: ends[name])
    return f"Held-out loss by {kind}: {low} is lowest ({ends[low]:.2f}), {high} highest ({ends[high]:.2f})"
