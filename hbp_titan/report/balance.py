"""Report sections on performance: throughput, work of each rank, plan metrics, memory.

Owns the choice of these plots and tables.
"""

from __future__ import annotations

import html
from collections.abc import Mapping

import numpy as np

from hbp_titan.packing.metrics import Metrics
from hbp_titan.report.charts import Chart, Curve, Plot, level_curves
from hbp_titan.report.html import (
    DASH,
    NUM_COLORS,
    figure,
    missing,
    note,
    number,
    percent,
    row,
    section,
    table,
    text,
)
from hbp_titan.report.run import Floats, Run, StepLog
from hbp_titan.report.series import (
    LevelSteps,
    Totals,
    any_finite,
    combinations,
    level_steps,
    mean,
    total_seconds_by_rank,
    totals,
    whole_steps,
)
from hbp_titan.utils import human_seconds

MAX_TABLE_RANKS = 16
MAX_CHART_RANKS = 512


def speed_section(run: Run) -> str:
    """Return the section on throughput, MFU, and where the time went."""
    log = run.log
    if not log.has("step_seconds"):
        return section("Throughput", "", missing("metrics.jsonl has no step times."))
    steps, seconds = log.steps.astype(float), log.column("step_seconds")
    levels = level_steps(log)
    # Weighted by time when smoothed: the mean of rates is otherwise that of the short steps.
    speeds = [Curve(name, of.tokens / of.seconds, log.color(name), of.seconds) for name, of in levels.items()]
    rates = [Curve(name, of.mfu, log.color(name), of.seconds) for name, of in levels.items()]
    waits = [Curve("wait", 100 * log.column("data_wait_seconds") / seconds, 5, seconds)]
    whole, waited = totals(whole_steps(log)), mean(waits[0].y, seconds)
    medians = {name: seconds[of] for name, of in combinations(log).items() if any_finite(seconds[of])}
    mfu = Plot("MFU, model FLOPs utilization", "% of the peak", "step", steps, rates, zero=True)
    mfu.message = f"The ranks reach {whole.mfu:.1%} of their peak" if whole.mfu is not None else ""
    blocked = Plot("Waiting for data", "% of a step", "step", steps, waits, zero=True)
    blocked.message = f"Steps wait for data {waited:.2f}% of the time" if waited is not None else ""
    times = Plot("Time of a step", "seconds", "step", steps, level_curves(log, seconds), log=True)
    times.message = "Median step: " + ", ".join(f"{name} {np.nanmedian(of):.3g} s" for name, of in medians.items())
    tokens = Plot("Throughput", "real tokens per second, all ranks", "step", steps, speeds, zero=True)
    tokens.message = f"{whole.tokens_per_second:,.0f} tokens per second" if whole.tokens_per_second else ""
    return section(
        "Throughput",
        "Real tokens, without padding; the time of a step contains no validation and no checkpoint.",
        row(
            tokens.figure(),
            times.figure(),
            blocked.figure(),
            mfu.figure() or missing("No MFU: the peak of this device is not known, or the run did not record it."),
        ),
        _level_table(log, levels),
        _checkpoints(log),
    )


def _level_table(log: StepLog, levels: Mapping[str, LevelSteps]) -> str:
    """Return one row per level and, for several levels, one for all."""
    heads = ("level", "steps", "micro-batches", "tokens", "time", "share of time", "tokens/s", "MFU", "padding",
             "idle", "memory")  # fmt: skip
    whole = totals(whole_steps(log))
    rows = [_level_cells(text(name), totals(of), whole) for name, of in levels.items()]
    if len(rows) > 1:
        rows.append(_level_cells("all", whole, whole))
    return table(heads, rows, marked=[len(rows) - 1] if len(rows) > 1 else [])


def _level_cells(name: str, of: Totals, whole: Totals) -> list[str]:
    share = of.seconds / whole.seconds if whole.seconds else None
    memory = DASH if of.memory_gib is None else f"{of.memory_gib:.2f} GiB"
    counts = [number(value) for value in (of.steps, of.micro_batches, of.tokens)]
    rates = [number(of.tokens_per_second), percent(of.mfu, 1), percent(of.padding), percent(of.idle, 1)]
    return [name, *counts, human_seconds(of.seconds), percent(share, 1), *rates, memory]


def _checkpoints(log: StepLog) -> str:
    blocked, written = log.column("checkpoint_blocked_seconds"), log.column("checkpoint_write_seconds")
    if not np.isfinite(blocked).any():
        return missing("No checkpoint was saved in these steps.")
    rows = []
    for name, values in (("training blocked", blocked), ("written in the background", written)):
        known = values[np.isfinite(values)]
        if len(known):
            sizes = (known.mean(), known.max(), known.sum())
            rows.append([name, f"{len(known):,}", *(human_seconds(float(seconds)) for seconds in sizes)])
    return table(("checkpoints", "times", "mean", "max", "total"), rows)


def ranks_section(run: Run) -> str:
    """Return the section on the work of each rank, and on measured time and waiting against the model."""
    log = run.log
    work = total_seconds_by_rank(log)
    no_check = "No timing check was recorded: [metrics] timing_check_interval sets how often they run."
    return section(
        "Cost per rank",
        "Seconds of each rank's own work between timing checks, without waiting for others: a step takes as long as "
        "its slowest rank.",
        _work(np.array(work), len(log.work_by_rank)) if work else missing(no_check),
        _timing_checks(log),
    )


def _work(seconds: Floats, checks: int) -> str:
    """Return bars and a table of the ranks' work, slowest first."""
    average, slowest = float(seconds.mean()), int(seconds.argmax())
    ratios = seconds / average if average else np.ones(len(seconds))
    top = float(seconds.max()) * 1.1 or 1.0
    chart = Chart("Work of each rank", "rank", "seconds", (0.0, float(len(seconds))), (0.0, top), bare=True)
    chart.message = f"Rank {slowest} has most work: {ratios[slowest]:.3f}x the mean of {len(seconds)} ranks"
    # With more ranks than pixels, each bar is the slowest rank of a group.
    groups = np.array_split(np.arange(len(seconds)), min(len(seconds), MAX_CHART_RANKS))
    for group in groups:
        rank = int(group[seconds[group].argmax()])
        # Gaps between bars of a few pixels would be most of the picture.
        gap = 0.1 if len(groups) <= 64 else 0.0
        tip = f"rank {rank}: {seconds[rank]:.2f} s, {ratios[rank]:.3f}x the mean"
        chart.bar(group[0] + gap, group[-1] + 1 - gap, 0, float(seconds[rank]), 7 if rank == slowest else 4, tip)
    if len(seconds) <= 16:
        # Every bar has its rank below; with more ranks round numbers are enough.
        chart.x_ticks = [(rank + 0.5, str(rank)) for rank in range(len(seconds))]
    chart.curve(np.array(chart.x), np.array([average] * 2), 5, "mean", 'stroke-width="1.4" stroke-dasharray="5 4"')
    for name, color in (("rank", 4), (f"slowest: rank {slowest}", 7), ("mean", 5)):
        chart.name(name, color)
    remark = (
        f"Sums over {checks} timing check{'s' * (checks > 1)}: who is slowest changes between micro-batches, which "
        "cancels out here and shows as waiting."
    )
    # Stable: equal ranks keep their order.
    order = np.argsort(-seconds, kind="stable").tolist()
    rows = [[str(rank), f"{seconds[rank]:.2f}", f"{ratios[rank]:.4f}"] for rank in order]
    heads = ("rank", "seconds of work", "of the mean")
    return row(figure(chart, remark), table(heads, rows, marked=[0], limit=MAX_TABLE_RANKS))


def _timing_checks(log: StepLog) -> str:
    """Return measured / modeled time and waiting of each level over the timing checks."""
    names = log.names("timing_check", "levels")
    if not names:
        return ""
    steps = log.steps.astype(float)
    ratio_curves, wait_curves, rows = [], [], []
    for name in names:
        counts, ratios, waiting, planned = (
            log.column("timing_check", "levels", name, key) for key in ("micro_batches", "ratio", "waiting", "planned")
        )
        ratio_curves.append(Curve(name, ratios, log.color(name)))
        wait_curves.append(Curve(name, 100 * waiting, log.color(name)))
        cells = [number(mean(ratios, counts), 3), *(percent(mean(values, counts)) for values in (waiting, planned))]
        rows.append([text(name), number(float(np.nansum(counts))), *cells])
    # A caption is plain text, in which a dash stays a dash.
    plain = [[html.unescape(cell) for cell in cells] for cells in rows]
    unit = "% of the ranks' time in the checked steps"
    waits = Plot("Waiting in timing checks", unit, "step", steps, [], zero=True, extra=wait_curves)
    waits.message = "Waiting in the checks: " + ", ".join(f"{cells[0]} {cells[3]} (plan {cells[4]})" for cells in plain)
    paces = Plot("Measured / modeled time", "1: as modeled", "step", steps, [], extra=ratio_curves)
    paces.message = "Measured / modeled time: " + ", ".join(f"{cells[0]} {cells[2]}" for cells in plain)
    return row(
        paces.figure(),
        waits.figure(),
        table(
            ("level", "micro-batches", "measured / modeled", "waiting", "planned waiting"), rows, "Timing checks only"
        ),
    )


def plan_section(run: Run) -> str:
    """Return the section with the plan's metrics, and those measured next to them."""
    rows: list[list[str]] = []
    marked: list[int] = []
    for part in run.plans:
        # The row of the whole plan stands out above those of its levels.
        marked.append(len(rows))
        rows.append(_plan_cells(text(f"{part.name}: {part.plan.method}"), part.metrics))
        levels = zip(part.level_names, part.metrics.per_level, strict=True)
        rows += [_plan_cells(f"&emsp;{text(name)}", metrics) for name, metrics in levels if metrics]
    heads = ("plan", "micro-batches", "ABR", "DBR", "PR", "CR", "idle", "Ave-T", "samples per pack")
    return section(
        "Planned and measured",
        "ABR, attention balance ratio: gap between the mean and the largest sum(len^2) of the groups; DBR, data "
        "balance ratio: the same for tokens; PR, padding ratio: share of positions without a token; CR, communication "
        "ratio: share of tokens that need context parallelism; Ave-T: mean tokens of a pack; idle: share of the "
        "modeled time that ranks wait for the slowest.",
        table(heads, rows, "Planned; of ABR, DBR, PR, CR and idle 0 is best", marked)
        if rows
        else missing("plan/ contains no readable plan, so there are no planned metrics."),
        _measured_table(run),
        _measured_plots(run),
    )


def _plan_cells(name: str, m: Metrics) -> list[str]:
    shares = [percent(value) for value in (m.abr, m.dbr, m.pr, m.cr, m.time_imbalance)]
    return [name, number(m.iterations), *shares, number(m.ave_tokens), number(m.samples_per_pack, 1)]


def _measured_table(run: Run) -> str:
    """Return one row per combination of levels and one for all steps, with the plan's values in brackets."""
    log = run.log
    if not len(log):
        return ""
    seconds, counts = log.column("step_seconds"), log.column("micro_batches")
    plans = _planned_by_name(run)
    rows = []
    # By combination and not by level: these metrics are recorded for whole steps only.
    for name, steps in {**combinations(log), "all": np.ones(len(log), bool)}.items():
        of, planned = totals(whole_steps(log, steps)), plans.get(name, (None, None, None))
        # Weighted by time: a long step with little waiting counts more than a short one.
        waited = mean((log.column("data_wait_seconds") / seconds)[steps], seconds[steps])
        abr = mean(log.column("abr")[steps], counts[steps])
        imbalance = mean(log.column("time_imbalance")[steps], seconds[steps])
        cells = [_pair(*pair) for pair in zip((abr, imbalance, of.padding), planned, strict=True)]
        rows.append([text(name), number(of.micro_batches), *cells, percent(of.idle, 1), percent(waited)])
    columns = [("abr", "ABR"), ("time_imbalance", "time imbalance"), ("idle_share", "idle share")]
    absent = [name for key, name in columns if not log.has(key)]
    remark = note(f"Not in metrics.jsonl: {', '.join(absent)}.") if absent else ""
    heads = ("level", "micro-batches", "ABR", "time imbalance", "padding", "idle share", "data wait")
    caption = "Measured (planned" + (", mean of the plans)" if len(run.plans) > 1 else ")")
    return table(heads, rows, caption, [len(rows) - 1]) + remark


def _pair(measured: float | None, planned: float | None) -> str:
    if measured is None and planned is None:
        return DASH
    return percent(measured) + ("" if planned is None else f" <small>({percent(planned)})</small>")


def _planned_by_name(run: Run) -> dict[str, tuple[float, float, float]]:
    """Return (ABR, time imbalance, PR) by level name and "all", averaged over the plans by their micro-batches."""
    found: dict[str, list[Metrics]] = {}
    for part in run.plans:
        for name, metrics in [*zip(part.level_names, part.metrics.per_level, strict=True), ("all", part.metrics)]:
            if metrics:
                found.setdefault(name, []).append(metrics)
    means = {}
    for name, several in found.items():
        values = np.array([(of.abr, of.time_imbalance, of.pr) for of in several])
        abr, imbalance, pr = np.average(values, axis=0, weights=[of.iterations for of in several]).tolist()
        means[name] = (abr, imbalance, pr)
    return means


def _measured_plots(run: Run) -> str:
    """Return ABR, imbalance and idle share over the steps, with the plan's mean as a dashed line."""
    log = run.log
    steps, seconds = log.steps.astype(float), log.column("step_seconds")
    means = _planned_by_name(run).get("all", ())
    planned = [[("planned", 100 * value, 7)] for value in means] or [[], [], []]
    shares = [
        Curve("time imbalance", 100 * log.column("time_imbalance"), 6, seconds),
        Curve("idle share", 100 * log.column("idle_share"), 3, seconds),
    ]
    abr = [Curve("ABR", 100 * log.column("abr"), 4, log.column("micro_batches"))]
    padding = [Curve("padding", log.column("padding"), 5, log.column("tokens"))]
    unit = "% of computed positions"
    waiting = Plot("Measured waiting", "% of the time", "step", steps, shares, zero=True, planned=planned[1])
    gap = "% that the mean group is below the largest"
    balance = Plot("Attention balance ratio", gap, "step", steps, abr, zero=True, planned=planned[0])
    empty = Plot("Measured padding", unit, "step", steps, padding, zero=True, planned=planned[2])
    for plot, sentence, value, at in (
        (waiting, "Ranks wait {:.2f}% of the time", mean(shares[1].y, seconds), 1),
        (balance, "Attention work differs by {:.2f}% between ranks", mean(abr[0].y, log.column("micro_batches")), 0),
        (empty, "{:.2f}% of the positions are padding", mean(padding[0].y, log.column("tokens")), 2),
    ):
        plan = f"; the plan has {planned[at][0][1]:.2f}%" if planned[at] else ""
        plot.message = sentence.format(value) + plan if value is not None else ""
    return row(waiting.figure(), balance.figure(), empty.figure())


def memory_section(run: Run) -> str:
    """Return the section on peak memory, by level and over the steps."""
    log = run.log
    curves = [Curve(name, log.column("memory_by_level", name), log.color(name)) for name in log.levels]
    curves = [curve for curve in curves if np.isfinite(curve.y).any()]
    peak = Curve("peak", log.column("peak_memory_gib"), 5)
    unit = "GiB, max over ranks"
    plot = Plot("Memory", unit, "step", log.steps.astype(float), [*curves, peak], smoothed=False, zero=True)
    plot.message = f"The peak is {np.nanmax(peak.y):.2f} GiB" if any_finite(peak.y) else ""
    if not curves:
        return section("Memory", "", row(plot.figure(), missing("Memory by level is not in metrics.jsonl.")))
    peaks = [float(np.nanmax(curve.y)) for curve in curves]
    chart = Chart("Memory by level", "level", unit, (0.0, float(len(peaks))), (0.0, max(*peaks, 1e-6) * 1.1), bare=True)
    chart.message = f"{curves[int(np.argmax(peaks))].name} needs most memory: {max(peaks):.2f} GiB"
    chart.x_ticks = [(index + 0.5, curve.name) for index, curve in enumerate(curves)]
    rows = []
    for index, (curve, value) in enumerate(zip(curves, peaks, strict=True)):
        color = curve.color % NUM_COLORS
        chart.bar(index + 0.2, index + 0.8, 0, value, color, f"{curve.name}: {value:.2f} GiB")
        chart.name(curve.name, color)
        rows.append([text(curve.name), f"{np.nanmean(curve.y):.2f}", f"{value:.2f}"])
    return section("Memory", "", row(figure(chart), plot.figure()), table(("level", "mean GiB", "max GiB"), rows))
