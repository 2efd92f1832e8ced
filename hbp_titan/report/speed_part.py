"""Sections on what it cost: throughput and MFU, time and figures by level, memory, checkpoints.

Owns the choice of these plots and tables.
"""

from __future__ import annotations

import numpy as np

from hbp_titan.packing.svg import COLORS, Chart
from hbp_titan.report.parts import (
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
from hbp_titan.report.series import Totals, combinations, totals
from hbp_titan.report.step_log import StepLog


def speed_section(run: Run) -> str:
    """Throughput, MFU and where the time went."""
    log = run.log
    if not log.has("step_seconds"):
        return section("Throughput", "", missing("metrics.jsonl has no step times."))
    steps = log.steps.astype(float)
    seconds = log.column("step_seconds")
    curves = level_curves(log, log.column("tokens_per_second"), seconds)
    speed = Plot("Throughput", "real tokens per second, all ranks", "step", steps, curves, zero=True)
    rates = level_curves(log, log.column("mfu"), seconds)
    mfu = Plot("MFU", "% of the peak", "step", steps, rates, zero=True).figure()
    lengths = Plot("Time of a step", "seconds", "step", steps, level_curves(log, seconds), log=True)
    share = 100 * log.column("data_wait_seconds") / seconds
    wait = Plot("Waiting for data", "% of a step", "step", steps, [Curve("wait", share, 5, seconds)], zero=True)
    peak = "" if mfu else missing("MFU is left out: the peak of this device is not known, or the run does not say.")
    return section(
        "Throughput",
        "Real tokens only, padding does not count; a step's time has no validation and no checkpoint in it.",
        row(speed.figure(), mfu, lengths.figure(), wait.figure()) + peak,
        _level_table(log),
        _checkpoints(log),
    )


def _level_table(log: StepLog) -> str:
    """A row for each level; steps that mix levels have a row of their own, since their time cannot be parted."""
    heads = ("level", "steps", "iterations", "tokens", "trained", "time", "share of time", "tokens/s", "MFU", "padding",
             "data wait", "idle")  # fmt: skip
    whole = totals(log)
    rows = [_cells(text(name), totals(log, steps), whole) for name, steps in combinations(log).items()]
    if len(rows) > 1:
        rows.append(_cells("all", whole, whole))
    return table(heads, rows, marked=[len(rows) - 1] if len(rows) > 1 else [])


def _cells(name: str, of: Totals, whole: Totals) -> list[str]:
    share = of.seconds / whole.seconds if whole.seconds else None
    return [
        name, number(of.steps), number(of.iterations), number(of.tokens), number(of.trained_tokens),
        duration(of.seconds), percent(share, 1), number(of.tokens_per_second), percent(of.mfu, 1), percent(of.padding),
        percent(of.data_wait), percent(of.idle, 1),
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
    levels = log.levels
    steps = log.steps.astype(float)
    series = {index: log.column("memory_by_level", index) for index in levels}
    series = {index: values for index, values in series.items() if np.isfinite(values).any()}
    peak = Curve("peak since the start", log.column("peak_memory_gib"), 5)
    colors = {index: at for at, index in enumerate(levels)}
    curves = [Curve(levels[index], values, colors[index]) for index, values in series.items()]
    plot = Plot("Memory", "GiB, most of any rank", "step", steps, [*curves, peak], smoothed=False, zero=True)
    if not series:
        told = missing("Memory by level is not in metrics.jsonl: it was written by an older version.")
        return section("Memory", "", row(plot.figure(), told))
    most = {index: float(np.nanmax(values)) for index, values in series.items()}
    chart = Chart("Memory by level", "", "GiB, most of any rank", (0.0, float(len(most))),
                  (0.0, max(*most.values(), 1e-6) * 1.1), bare=True)  # fmt: skip
    chart.x_ticks = [(at + 0.5, levels[index]) for at, index in enumerate(most)]
    for at, (index, value) in enumerate(most.items()):
        chart.bar(at + 0.2, at + 0.8, 0, value, colors[index] % COLORS, f"{levels[index]}: {value:.2f} GiB")
    rows = [
        [text(levels[index]), f"{np.nanmean(values):.2f}", f"{most[index]:.2f}"] for index, values in series.items()
    ]
    listed = table(("level", "mean GiB", "most GiB"), rows)
    return section("Memory", "", row(framed(chart), plot.figure(), listed))
