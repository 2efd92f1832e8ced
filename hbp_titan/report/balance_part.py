"""Sections on balance: the work of each rank, and the plan's metrics beside what the run lived.

Owns the choice of these plots and tables.
"""

from __future__ import annotations

import numpy as np

from hbp_titan.packing.metrics import Metrics
from hbp_titan.packing.svg import Chart
from hbp_titan.report.parts import (
    DASH,
    folded,
    framed,
    missing,
    note,
    number,
    percent,
    row,
    section,
    table,
    text,
)
from hbp_titan.report.plots import Curve, Plot
from hbp_titan.report.run_folder import Run
from hbp_titan.report.series import combinations, mean, total_seconds_by_rank, totals, whole_steps
from hbp_titan.report.step_log import StepLog

LISTED_RANKS = 16
SHOWN_RANKS = 512


def ranks_section(run: Run) -> str:
    """Work of each rank, and how far measured time and waiting are from the model."""
    log = run.log
    work = total_seconds_by_rank(log)
    bodies = [_work(work, len(log.work_by_rank))] if work else [_slowest(log)]
    return section(
        "Cost per rank",
        "Seconds of own work of each rank between live checks, waiting for others left out: a step goes at the pace of "
        "its slowest rank.",
        *bodies,
        _live_checks(log),
    )


def _work(work: list[float], checks: int) -> str:
    """Bars and a table of the ranks' work, the slowest named."""
    seconds = np.array(work)
    slowest, middle = int(seconds.argmax()), float(seconds.mean())
    ratio = seconds[slowest] / middle if middle else 1.0
    top = float(seconds.max()) * 1.1 or 1.0
    chart = Chart("Work of each rank", "rank", "seconds", (0.0, float(len(work))), (0.0, top), bare=True)
    # More bars than pixels: each stands for the costliest rank of its stretch.
    groups = np.array_split(np.arange(len(work)), min(len(work), SHOWN_RANKS))
    for group in groups:
        rank = int(group[seconds[group].argmax()])
        tip = f"rank {rank}: {seconds[rank]:.2f} s, {seconds[rank] / middle if middle else 1:.3f}x the mean"
        room = 0.1 if len(groups) <= 64 else 0.0
        chart.bar(group[0] + room, group[-1] + 1 - room, 0, float(seconds[rank]), 1 if rank == slowest else 0, tip)
    if len(work) <= 16:
        chart.x_ticks = [(rank + 0.5, str(rank)) for rank in range(len(work))]
    chart.curve(np.array(chart.x), np.array([middle, middle]), 5, "mean", 'stroke-width="1.4" stroke-dasharray="5 4"')
    chart.name("rank", 0)
    chart.name(f"slowest: rank {slowest}", 1)
    chart.name("mean", 5)
    remark = (
        f"Slowest: rank {slowest}, {ratio:.3f}x the mean of {len(work)} ranks, over {checks} live check"
        f"{'s' * (checks > 1)}. These are sums: what ranks wait within an iteration evens out in them, see idle share."
    )
    order = np.argsort(-seconds, kind="stable").tolist()
    rows = [[str(rank), f"{seconds[rank]:.2f}", f"{seconds[rank] / middle if middle else 1:.4f}"] for rank in order]
    heads = ("rank", "seconds of work", "of the mean")
    listed = table(heads, rows[:LISTED_RANKS], marked=[0])
    if len(rows) > LISTED_RANKS:
        listed += folded(f"{len(rows) - LISTED_RANKS:,} more ranks", table(heads, rows[LISTED_RANKS:]))
    return row(framed(chart, remark), listed)


def _slowest(log: StepLog) -> str:
    """How often each rank was the slowest, where the run does not have the work of all."""
    named = log.column("live_check", "slowest_rank")
    ratios = log.column("live_check", "slowest_ratio")
    known = np.isfinite(named)
    if not known.any():
        return missing("No live check was recorded: [metrics] live_check_interval sets how often they run.")
    rows = []
    for rank in np.unique(named[known]).tolist():
        of = named == rank
        rows.append([f"{rank:.0f}", f"{int(of.sum()):,}", f"{np.nanmax(ratios[of]):.3f}x"])
    told = missing("The work of each rank is not in metrics.jsonl: it was written by an older version.")
    return told + table(("slowest rank", "live checks", "most, of the median rank's pace"), rows)


def _live_checks(log: StepLog) -> str:
    """Measured / modelled time and waiting of each level over the live checks."""
    names = log.names("live_check", "levels")
    if not names:
        return ""
    steps = log.steps.astype(float)
    ratio = [Curve(name, log.column("live_check", "levels", name, "ratio"), log.color(name)) for name in names]
    waits = [Curve(name, 100 * log.column("live_check", "levels", name, "waiting"), log.color(name)) for name in names]
    rows = []
    for name in names:
        iterations, ratios, waiting, planned = (
            log.column("live_check", "levels", name, key) for key in ("iterations", "ratio", "waiting", "planned")
        )
        cells = [percent(mean(values, iterations)) for values in (waiting, planned)]
        rows.append([text(name), number(float(np.nansum(iterations))), number(mean(ratios, iterations), 3), *cells])
    heads = ("level", "iterations", "measured / modelled", "waiting", "waiting by the plan")
    return row(
        Plot("Measured / modelled time", "1 is as modelled", "step", steps, [], extra=ratio).figure(),
        Plot("Waiting for slower ranks", "% of the ranks' time", "step", steps, [], zero=True, extra=waits).figure(),
        table(heads, rows, "Live checks"),
    )


def plan_section(run: Run) -> str:
    """The plan's metrics, and beside them those of the steps as lived."""
    rows: list[list[str]] = []
    marked: list[int] = []
    for part in run.plans:
        marked.append(len(rows))
        rows.append(_planned(text(f"{part.name}: {part.plan.method}"), part.metrics))
        levels = zip(part.level_names, part.metrics.per_level, strict=True)
        rows += [_planned(f"&emsp;{text(name)}", metrics) for name, metrics in levels if metrics]
    heads = ("plan", "iterations", "ABR", "DBR", "PR", "CR", "idle time", "Ave-T", "samples a pack")
    planned = table(heads, rows, "As planned; 0 is best", marked) if rows else ""
    if not rows:
        planned = missing("plan/ holds no plan that can be read: the planned metrics are left out.")
    return section(
        "Planned and lived",
        "ABR: how far the mean of sum(len^2) lies below the largest group's; DBR the same of tokens; PR and padding: "
        "share of positions without a token; CR: share of tokens that need context parallelism; idle time: share "
        "of the modelled time that ranks wait for the slowest.",
        planned,
        _lived(run),
        _lived_plots(run),
    )


def _planned(name: str, m: Metrics) -> list[str]:
    shares = [percent(value) for value in (m.abr, m.dbr, m.pr, m.cr, m.time_imbalance)]
    return [name, number(m.iterations), *shares, number(m.ave_tokens), number(m.samples_per_pack, 1)]


def _lived(run: Run) -> str:
    """The lived figures of each combination of levels and of all, the plan's beside them."""
    log = run.log
    if not len(log):
        return ""
    everything = {**combinations(log), "all": np.ones(len(log), bool)}
    seconds, iterations = log.column("step_seconds"), log.column("iterations")
    plans = _planned_by_name(run)
    rows = []
    for name, steps in everything.items():
        of, planned = totals(whole_steps(log, steps)), plans.get(name, (None, None, None))
        waited = mean((log.column("data_wait_seconds") / seconds)[steps], seconds[steps])
        abr, imbalance = (
            mean(log.column(key)[steps], weights[steps])
            for key, weights in (("abr", iterations), ("time_imbalance", seconds))
        )
        cells = [_pair(*pair) for pair in zip((abr, imbalance, of.padding), planned, strict=True)]
        rows.append([text(name), number(of.iterations), *cells, percent(of.idle, 1), percent(waited)])
    told = [("abr", "ABR"), ("time_imbalance", "time imbalance"), ("idle_share", "idle share")]
    absent = [name for key, name in told if not log.has(key)]
    remark = note(f"Not in metrics.jsonl, which an older version wrote: {', '.join(absent)}.") if absent else ""
    heads = ("level", "iterations", "ABR", "time imbalance", "padding", "idle share", "data wait")
    caption = "As lived, and in brackets as planned" + (": the mean of the plans" if len(run.plans) > 1 else "")
    return table(heads, rows, caption, [len(rows) - 1]) + remark


def _pair(lived: float | None, planned: float | None) -> str:
    if lived is None and planned is None:
        return DASH
    return percent(lived) + ("" if planned is None else f" <small>({percent(planned)})</small>")


def _planned_by_name(run: Run) -> dict[str, tuple[float, float, float]]:
    """(ABR, time imbalance, PR) by level name, and of "all": means over the run's plans, weighted by iterations."""
    found: dict[str, list[Metrics]] = {}
    for part in run.plans:
        for name, metrics in [*zip(part.level_names, part.metrics.per_level, strict=True), ("all", part.metrics)]:
            if metrics:
                found.setdefault(name, []).append(metrics)
    means = {}
    for name, several in found.items():
        figures = np.array([(of.abr, of.time_imbalance, of.pr) for of in several])
        abr, imbalance, pr = np.average(figures, axis=0, weights=[of.iterations for of in several]).tolist()
        means[name] = (abr, imbalance, pr)
    return means


def _lived_plots(run: Run) -> str:
    """ABR, imbalance and idle share over the steps, the plan's mean as a dashed line."""
    log = run.log
    steps, seconds = log.steps.astype(float), log.column("step_seconds")
    means = _planned_by_name(run).get("all", ())
    planned = [[("planned", 100 * value, 7)] for value in means] or [[], [], []]
    shares = [
        Curve("time imbalance", 100 * log.column("time_imbalance"), 1, seconds),
        Curve("idle share", 100 * log.column("idle_share"), 3, seconds),
    ]
    abr = [Curve("ABR", 100 * log.column("abr"), 0, log.column("iterations"))]
    padding = [Curve("padding", log.column("padding"), 5, log.column("tokens"))]
    unit = "% of computed positions"
    return row(
        Plot("Waiting as lived", "% of the time", "step", steps, shares, zero=True, planned=planned[1]).figure(),
        Plot("Attention balance as lived", "%", "step", steps, abr, zero=True, planned=planned[0]).figure(),
        Plot("Padding as lived", unit, "step", steps, padding, zero=True, planned=planned[2]).figure(),
    )
