"""The comparison of several runs: their end figures with ratios, and their curves over each other.

Owns what is compared. Runs are compared over tokens and time: their steps need not be of one size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from hbp_titan.report.parts import DASH, duration, note, number, percent, row, section, table, text
from hbp_titan.report.plots import Curve, Plot
from hbp_titan.report.run_folder import Run
from hbp_titan.report.series import applied, end_figures, loss_at, seconds_so_far, tokens_so_far
from hbp_titan.report.step_log import Floats, StepLog
from hbp_titan.report.timeline import levels_side_by_side

_SHOWN: dict[str, Callable[[float], str]] = {
    "steps": number,
    "tokens": number,
    "seconds": duration,
    "loss": lambda value: number(value, 4),
    "validation loss": lambda value: number(value, 4),
    "tokens per second": number,
    "MFU": lambda value: percent(value, 1),
    "padding": percent,
    "idle": lambda value: percent(value, 1),
    "data wait": percent,
    "time imbalance": percent,
    "memory": lambda value: f"{value:.2f} GiB",
    "skipped": number,
}


def comparison(runs: Sequence[Run]) -> str:
    """The section; the first run is what the others are compared with."""
    figures = [end_figures(run.log) for run in runs]
    size, unit = _time_unit(runs)
    rows = []
    for name, shown in _SHOWN.items():
        values = [of[name] for of in figures]
        if any(values):
            rows.append([text("time in steps" if name == "seconds" else name), *_cells(values, shown)])
    trained = {of["tokens"] for of in figures if of["tokens"]}
    if len(trained) > 1:
        least = min(filter(None, trained))
        losses = [loss_at(run.log, least) for run in runs]
        rows.append([f"loss at {number(least)} tokens", *_cells(losses, _SHOWN["loss"])])
    return section(
        "Comparison",
        f"In brackets: the ratio to {runs[0].name}. Curves are smoothed over a 20th of each run.",
        table(["", *(text(run.name) for run in runs)], rows),
        levels_side_by_side(runs),
        row(
            _plot(runs, "Loss over tokens", "nats per trained token", "tokens", _loss),
            _plot(runs, "Loss over time", "nats per trained token", unit, _loss, _time(size)),
            _validation(runs),
            _plot(runs, "Throughput", "real tokens per second", "tokens", _column("tokens_per_second"), zero=True),
            _plot(runs, "Gradient norm", "before clipping", "tokens", _column("grad_norm"), log=True),
            _plot(runs, "MFU", "% of the peak", "tokens", _column("mfu"), zero=True),
            _plot(runs, "Idle share", "% of the ranks' time", "tokens", _idle, zero=True),
        ),
        note("Losses of runs compare where they trained the same samples; validation losses where these are the same."),
    )  # fmt: skip


def _cells(values: Sequence[float | None], shown: Callable[[float], str]) -> list[str]:
    first = values[0]
    cells = []
    for at, value in enumerate(values):
        if value is None:
            cells.append(DASH)
            continue
        ratio = f" <small>({value / first:.3f}x)</small>" if at and first else ""
        cells.append(f"{shown(value)}{ratio}")
    return cells


def _time_unit(runs: Sequence[Run]) -> tuple[float, str]:
    """Seconds of the unit that the longest run is shown in, and its name."""
    longest = max((float(np.nansum(run.log.column("step_seconds"))) for run in runs), default=0.0)
    sizes = ((3600.0, "hours in steps"), (60.0, "minutes in steps"), (1.0, "seconds in steps"))
    return next(unit for unit in sizes if longest >= 2 * unit[0] or unit[0] == 1)


def _time(size: float) -> Callable[[StepLog], Floats]:
    return lambda log: seconds_so_far(log) / size


def _loss(log: StepLog) -> Floats:
    return np.where(applied(log), log.column("loss"), np.nan)


def _idle(log: StepLog) -> Floats:
    return 100 * log.column("idle_share")


def _column(name: str) -> Callable[[StepLog], Floats]:
    return lambda log: log.column(name)


def _color(run: Run, number: int) -> int:
    """A run's color, none of the levels'."""
    return len(run.log.palette) + number


def _plot(
    runs: Sequence[Run],
    title: str,
    unit: str,
    x_label: str,
    values: Callable[[StepLog], Floats],
    over: Callable[[StepLog], Floats] = tokens_so_far,
    zero: bool = False,
    log: bool = False,
) -> str:
    """The runs' curves over tokens or `over`. zero: of what is a rate or share of time, which its smoothing weighs."""
    weight = "step_seconds" if zero else "trained_tokens"
    curves = [
        Curve(run.name, values(run.log), _color(run, at), run.log.column(weight), over(run.log))
        for at, run in enumerate(runs)
        if len(run.log)
    ]
    return Plot(title, unit, x_label, np.zeros(0), curves, zero=zero, log=log).figure()


def _validation(runs: Sequence[Run]) -> str:
    curves = [
        Curve(run.name, run.log.column("validation", "loss"), _color(run, at), None, tokens_so_far(run.log))
        for at, run in enumerate(runs)
        if len(run.log)
    ]
    return Plot("Validation loss", "nats per token", "tokens", np.zeros(0), [], extra=curves).figure()
