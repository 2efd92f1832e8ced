"""Sections on balance: the work of each rank, and the plan's metrics beside what the run lived.

Owns the choice of these plots and tables.

Sections on what it cost: throughput and MFU, time and figures by level, memory, checkpoints.

Owns the choice of these plots and tables.

The timeline of a run: which level each step trained, and below it what happened at which step.

Owns its drawing. Lanes are stretched to the page's width, so their words stand beside them as text of the page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from hbp_titan.packing.metrics import Metrics
from hbp_titan.report.charts import COLORS, Chart, ticks
from hbp_titan.report.html import (
    DASH,
    Curve,
    Plot,
    duration,
    folded,
    framed,
    legend,
    level_curves,
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
    combinations,
    level_steps,
    mean,
    total_seconds_by_rank,
    totals,
    whole_steps,
)

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
    named = log.column("timing_check", "slowest_rank")
    ratios = log.column("timing_check", "slowest_ratio")
    known = np.isfinite(named)
    if not known.any():
        return missing("No live check was recorded: [metrics] timing_check_interval sets how often they run.")
    rows = []
    for rank in np.unique(named[known]).tolist():
        of = named == rank
        rows.append([f"{rank:.0f}", f"{int(of.sum()):,}", f"{np.nanmax(ratios[of]):.3f}x"])
    told = missing("The work of each rank is not in metrics.jsonl: it was written by an older version.")
    return told + table(("slowest rank", "live checks", "most, of the median rank's pace"), rows)


def _live_checks(log: StepLog) -> str:
    """Measured / modelled time and waiting of each level over the live checks."""
    names = log.names("timing_check", "levels")
    if not names:
        return ""
    steps = log.steps.astype(float)
    ratio = [Curve(name, log.column("timing_check", "levels", name, "ratio"), log.color(name)) for name in names]
    waits = [
        Curve(name, 100 * log.column("timing_check", "levels", name, "waiting"), log.color(name)) for name in names
    ]
    rows = []
    for name in names:
        iterations, ratios, waiting, planned = (
            log.column("timing_check", "levels", name, key) for key in ("micro_batches", "ratio", "waiting", "planned")
        )
        cells = [percent(mean(values, iterations)) for values in (waiting, planned)]
        rows.append([text(name), number(float(np.nansum(iterations))), number(mean(ratios, iterations), 3), *cells])
    heads = ("level", "micro-batches", "measured / modelled", "waiting", "waiting by the plan")
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
    seconds, iterations = log.column("step_seconds"), log.column("micro_batches")
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
        rows.append([text(name), number(of.micro_batches), *cells, percent(of.idle, 1), percent(waited)])
    told = [("abr", "ABR"), ("time_imbalance", "time imbalance"), ("idle_share", "idle share")]
    absent = [name for key, name in told if not log.has(key)]
    remark = note(f"Not in metrics.jsonl, which an older version wrote: {', '.join(absent)}.") if absent else ""
    heads = ("level", "micro-batches", "ABR", "time imbalance", "padding", "idle share", "data wait")
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
    abr = [Curve("ABR", 100 * log.column("abr"), 0, log.column("micro_batches"))]
    padding = [Curve("padding", log.column("padding"), 5, log.column("tokens"))]
    unit = "% of computed positions"
    return row(
        Plot("Waiting as lived", "% of the time", "step", steps, shares, zero=True, planned=planned[1]).figure(),
        Plot("Attention balance as lived", "%", "step", steps, abr, zero=True, planned=planned[0]).figure(),
        Plot("Padding as lived", unit, "step", steps, padding, zero=True, planned=planned[2]).figure(),
    )


def speed_section(run: Run) -> str:
    """Throughput, MFU and where the time went."""
    log = run.log
    if not log.has("step_seconds"):
        return section("Throughput", "", missing("metrics.jsonl has no step times."))
    steps, seconds = log.steps.astype(float), log.column("step_seconds")
    levels = level_steps(log)
    speeds = [Curve(name, of.tokens / of.seconds, log.color(name), of.seconds) for name, of in levels.items()]
    rates = [Curve(name, of.mfu, log.color(name), of.seconds) for name, of in levels.items()]
    waits = [Curve("wait", 100 * log.column("data_wait_seconds") / seconds, 5, seconds)]
    mfu = Plot("MFU", "% of the peak", "step", steps, rates, zero=True).figure()
    if not mfu:
        mfu = missing("MFU is left out: the peak of this device is not known, or the run does not say.")
    return section(
        "Throughput",
        "Real tokens only, padding does not count; a step's time has no validation and no checkpoint in it.",
        row(
            Plot("Throughput", "real tokens per second, all ranks", "step", steps, speeds, zero=True).figure(),
            Plot("Time of a step", "seconds", "step", steps, level_curves(log, seconds), log=True).figure(),
            Plot("Waiting for data", "% of a step", "step", steps, waits, zero=True).figure(),
            mfu,
        ),
        _level_table(log, levels),
        _checkpoints(log),
    )


def _level_table(log: StepLog, levels: Mapping[str, LevelSteps]) -> str:
    """A row for each level; where an older run mixed levels in a step its time cannot be parted: its own row."""
    heads = ("level", "steps", "micro-batches", "tokens", "time", "share of time", "tokens/s", "MFU", "padding",
             "waiting", "memory")  # fmt: skip
    whole = totals(whole_steps(log))
    rows = [_cells(text(name), totals(of), whole) for name, of in levels.items()]
    if len(rows) > 1:
        rows.append(_cells("all", whole, whole))
    return table(heads, rows, marked=[len(rows) - 1] if len(rows) > 1 else [])


def _cells(name: str, of: Totals, whole: Totals) -> list[str]:
    share = of.seconds / whole.seconds if whole.seconds else None
    memory = DASH if of.memory_gib is None else f"{of.memory_gib:.2f} GiB"
    return [
        name, number(of.steps), number(of.micro_batches), number(of.tokens), duration(of.seconds), percent(share, 1),
        number(of.tokens_per_second), percent(of.mfu, 1), percent(of.padding), percent(of.idle, 1), memory,
    ]  # fmt: skip


def _checkpoints(log: StepLog) -> str:
    """What saving cost."""
    blocked, written = log.column("checkpoint_blocked_seconds"), log.column("checkpoint_write_seconds")
    if not np.isfinite(blocked).any():
        return missing("No checkpoint was saved in these steps.")
    rows = []
    for name, values in (("training stood still", blocked), ("written beside training", written)):
        known = values[np.isfinite(values)]
        if len(known):
            rows.append(
                [name, f"{len(known):,}", f"{known.mean():.2f} s", f"{known.max():.2f} s", duration(known.sum())]
            )
    return table(("checkpoints", "times", "mean", "most", "in all"), rows)


def memory_section(run: Run) -> str:
    """Memory of each level, and over the steps."""
    log = run.log
    steps = log.steps.astype(float)
    series = [Curve(name, log.column("memory_by_level", name), log.color(name)) for name in log.levels]
    series = [curve for curve in series if np.isfinite(curve.y).any()]
    peak = Curve("peak", log.column("peak_memory_gib"), 5)
    unit = "GiB, most of any rank"
    plot = Plot("Memory", unit, "step", steps, [*series, peak], smoothed=False, zero=True)
    if not series:
        told = missing("Memory by level is not in metrics.jsonl: it was written by an older version.")
        return section("Memory", "", row(plot.figure(), told))
    most = [float(np.nanmax(curve.y)) for curve in series]
    chart = Chart("Memory by level", "", unit, (0.0, float(len(most))), (0.0, max(*most, 1e-6) * 1.1), bare=True)
    chart.x_ticks = [(at + 0.5, curve.name) for at, curve in enumerate(series)]
    for at, (curve, value) in enumerate(zip(series, most, strict=True)):
        chart.bar(at + 0.2, at + 0.8, 0, value, curve.color % COLORS, f"{curve.name}: {value:.2f} GiB")
        chart.name(curve.name, curve.color % COLORS)
    rows = [
        [text(curve.name), f"{np.nanmean(curve.y):.2f}", f"{value:.2f}"]
        for curve, value in zip(series, most, strict=True)
    ]
    return section("Memory", "", row(framed(chart), plot.figure()), table(("level", "mean GiB", "most GiB"), rows))


BUCKETS = 480
"""Columns of a lane: steps of a longer run share a column, and marks of one column share a mark."""
WIDTH = 1000
LISTED_STEPS = 10


def timeline_section(run: Run) -> str:
    """The section; what a column of a lane stands for is said below it."""
    log = run.log
    if not log.levels:
        return section("Curriculum", "", missing("metrics.jsonl does not say which level its steps trained."))
    first, last = int(log.steps[0]), int(log.steps[-1])
    shares = _shares(run)
    lanes = [_lane("levels", _bands(shares, log), "tall")]
    for name, steps, tips, color in _events(run):
        if steps:
            lanes.append(_lane(f"{name} ({len(steps):,})", _marks(steps, tips, first, last, color), ""))
    columns = shares.shape[1]
    grain = "a column is a step" if columns == len(log) else f"a column is {len(log) / columns:,.1f} steps"
    remark = f"{len(log):,} steps, {grain}; where levels share a column its height is parted by their iterations."
    body = f'{_level_legend(log)}<div class="lanes">{"".join(lanes)}{_axis(first, last)}</div>'
    return section("Curriculum", _story(run), f'<figure class="wide">{body}{note(remark)}</figure>', _skipped(log))


def _skipped(log: StepLog) -> str:
    """The steps that were not applied, and why."""
    if not log.skipped:
        return ""
    rows = [[f"{step:,}", text(reason)] for step, reason in log.skipped.items()]
    listed = table(("skipped step", "why"), rows[:LISTED_STEPS])
    if len(rows) > LISTED_STEPS:
        rest = table(("skipped step", "why"), rows[LISTED_STEPS:])
        listed += folded(f"{len(rows) - LISTED_STEPS:,} more skipped steps", rest)
    return listed


def levels_side_by_side(runs: Sequence[Run]) -> str:
    """The lane of levels of each run, from its first step to its last."""
    known = [run for run in runs if run.log.levels]
    if not known:
        return ""
    lanes = [
        f'<span class="name">{text(run.name)}</span>{_level_legend(run.log)}'
        + _lane(f"{len(run.log):,} steps", _bands(_shares(run), run.log), "tall")
        for run in known
    ]
    caption = "<figcaption><b>Levels</b> <small>from the first step to the last</small></figcaption>"
    return f'<figure class="wide">{caption}<div class="lanes">{"".join(lanes)}</div></figure>'


def _story(run: Run) -> str:
    """What the order of levels is, in words."""
    level_order, share = run.setting("packing", "level_order"), run.setting("packing", "curriculum_steps")
    if not level_order:
        return "Which level each optimizer step trained."
    order = {
        "alternate": "Each optimizer step trains one level, in random order",
        "interleave": "Each optimizer step holds its share of every level",
    }.get(str(level_order), f"Mix: {level_order}")
    if not isinstance(share, (int, float)) or share <= 0:
        return f"{order}; no curriculum."
    steps = f"{share:.0%} of the first epoch's steps" if share < 1 else f"{share:.0f} steps"
    return f"{order}; the curriculum puts {steps} of the lowest level first."


def _shares(run: Run) -> Floats:
    """Share of each level in the iterations of each column, float64 [levels, columns].

    Where a run does not record them by level, a step's iterations are parted evenly between its levels.
    """
    log = run.log
    member = np.stack([log.present("loss_by_level", name) for name in log.levels]).astype(float)
    weights = member / np.maximum(member.sum(0), 1) * np.nan_to_num(log.column("micro_batches"), nan=1.0)
    for at, name in enumerate(log.levels):
        recorded = log.column("per_level", name, "micro_batches")
        weights[at] = np.where(np.isfinite(recorded), recorded, weights[at])
    columns = min(BUCKETS, len(log))
    starts = np.arange(columns) * len(log) // columns
    sums = np.add.reduceat(weights, starts, axis=1)
    return sums / np.maximum(sums.sum(0), 1e-9)


def _level_legend(log: StepLog) -> str:
    return legend([(name, log.color(name)) for name in log.levels])


def _bands(shares: Floats, log: StepLog) -> str:
    """Columns as stacked rectangles; equal neighbours are one."""
    marks = []
    columns = shares.shape[1]
    borders = np.flatnonzero(np.append(True, np.any(np.diff(shares, axis=1) != 0, axis=0)))
    for start, end in zip(borders.tolist(), [*borders[1:].tolist(), columns], strict=True):
        below = 0.0
        for at, level in enumerate(log.levels):
            share = float(shares[at, start])
            if share > 0:
                x, width, height = start * WIDTH / columns, (end - start) * WIDTH / columns, 100 * share
                # Wider by a hair: no gap shines through between neighbours.
                place = f'x="{x:.2f}" width="{width + 0.4:.2f}" y="{100 - below - height:.1f}" height="{height:.1f}"'
                marks.append(f'<rect {place} fill="var(--c{log.color(level) % COLORS})"/>')
                below += height
    return "".join(marks)


def _events(run: Run) -> list[tuple[str, list[int], list[str], int]]:
    """(name, steps, a tip each, color) of what a lane of marks shows."""
    log = run.log
    steps = log.steps
    epoch = log.column("epoch")
    begun = (np.flatnonzero(np.diff(epoch) > 0) + 1).tolist()
    saved = steps[np.isfinite(log.column("checkpoint_blocked_seconds"))].tolist()
    saved = sorted({*saved, *(step for step in run.checkpoints if steps[0] <= step <= steps[-1])})
    validated = steps[np.isfinite(log.column("validation", "loss"))].tolist()
    losses = log.column("validation", "loss")[np.isfinite(log.column("validation", "loss"))].tolist()
    starts = [start for start in run.starts[1:] if isinstance(start.get("first_step"), int)]
    starts = [start for start in starts if steps[0] <= start["first_step"] <= steps[-1] + 1]
    resumed = [f"resumed with step {s['first_step']} on {s.get('world_size', '?')} ranks" for s in starts]
    skipped = [step for step in log.skipped if steps[0] <= step <= steps[-1]]
    return [
        ("epochs", [int(steps[at]) for at in begun], [f"epoch {epoch[at]:.0f} begins" for at in begun], 4),
        ("validations", validated, [f"step {s}: {loss:.4f}" for s, loss in zip(validated, losses, strict=True)], 2),
        ("checkpoints", saved, [f"step {step}" for step in saved], 0),
        ("resumes", [start["first_step"] for start in starts], resumed, 3),
        ("skipped steps", skipped, [f"step {step}: {log.skipped[step]}" for step in skipped], 7),
    ]  # fmt: skip


def _marks(steps: Sequence[int], tips: Sequence[str], first: int, last: int, color: int) -> str:
    """A tick for each column that has an event, with the tips of the first of them."""
    columns: dict[int, list[str]] = {}
    for step, tip in zip(steps, tips, strict=True):
        place = (step - first + 0.5) / (last - first + 1)
        columns.setdefault(min(int(place * BUCKETS), BUCKETS - 1), []).append(tip)
    marks = []
    for column, told in columns.items():
        x = (column + 0.5) * WIDTH / BUCKETS
        more = f" and {len(told) - 3} more" if len(told) > 3 else ""
        marks.append(
            f'<g><title>{text("; ".join(told[:3]) + more)}</title><rect x="{x - 5:.1f}" y="0" width="10" height="100" '
            f'fill="transparent"/><line x1="{x:.1f}" x2="{x:.1f}" y1="8" y2="92" stroke="var(--c{color})"/></g>'
        )
    return "".join(marks)


def _lane(name: str, marks: str, kind: str) -> str:
    return (
        f'<span class="name">{text(name)}</span><svg class="lane {kind}" viewBox="0 0 {WIDTH} 100" role="img" '
        f'aria-label="{text(name)}" preserveAspectRatio="none">{marks}</svg>'
    )


def _axis(first: int, last: int) -> str:
    """Steps below the lanes."""
    steps = [step for step in ticks(first, max(last, first + 4)) if step <= last and step == int(step)]
    shown = []
    for step in steps:
        place = 100 * (step - first + 0.5) / (last - first + 1)
        where = f'style="left:{place:.2f}%"' if place < 95 else 'class="end"'
        shown.append(f"<span {where}>{step:,.0f}</span>")
    return f'<span class="name">step</span><div class="axis">{"".join(shown)}</div>'
