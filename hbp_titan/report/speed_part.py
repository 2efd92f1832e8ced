"""Sections on what it cost: throughput and MFU, time and figures by level, memory, checkpoints.

Owns the choice of these plots and tables.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from hbp_titan.packing.svg import COLORS, Chart
from hbp_titan.report.parts import (
    DASH,
    duration,
    framed,
    missing,
    number,
    percent,
    row,
    section,
    table,
    text,
)
from hbp_titan.report.plots import Curve, Plot, level_curves
from hbp_titan.report.run_folder import Run
from hbp_titan.report.series import LevelSteps, Totals, level_steps, totals, whole_steps
from hbp_titan.report.step_log import StepLog


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
    heads = ("level", "steps", "iterations", "tokens", "time", "share of time", "tokens/s", "MFU", "padding", "waiting",
             "memory")  # fmt: skip
    whole = totals(whole_steps(log))
    rows = [_cells(text(name), totals(of), whole) for name, of in levels.items()]
    if len(rows) > 1:
        rows.append(_cells("all", whole, whole))
    return table(heads, rows, marked=[len(rows) - 1] if len(rows) > 1 else [])


def _cells(name: str, of: Totals, whole: Totals) -> list[str]:
    share = of.seconds / whole.seconds if whole.seconds else None
    memory = DASH if of.memory_gib is None else f"{of.memory_gib:.2f} GiB"
    return [
        name, number(of.steps), number(of.iterations), number(of.tokens), duration(of.seconds), percent(share, 1),
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
