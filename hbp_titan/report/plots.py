"""Plot: curves over one x axis, as they are and smoothed, as a figure of the page.

Owns how curves are drawn together: their span, their legend, what is thin and what is thick.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from hbp_titan.packing.svg import COLORS, Chart
from hbp_titan.report.parts import framed
from hbp_titan.report.series import combinations, smooth, window_of
from hbp_titan.report.step_log import Floats, StepLog

RAW = 'stroke-width="1" stroke-opacity="0.32"'
DASHED = 'stroke-width="1.6" stroke-dasharray="5 4"'


@dataclass
class Curve:
    """One curve of a plot: name, values float64 [n] (NaN where there is none), color, and weights for its smoothing."""

    name: str
    y: Floats
    color: int
    weights: Floats | None = None
    x: Floats | None = None


@dataclass
class Plot:
    """A chart of curves over one x axis, raw and smoothed or as they are.

    x: float64 [n] ascending. smoothed: whether the curves are drawn thin as they are and thick as smoothed. zero: y
    starts at 0. log: a logarithmic y. scatter: points of their own instead of the raw line. planned: (name, value,
    color), dashed lines.
    """

    title: str
    unit: str
    x_label: str
    x: Floats
    curves: list[Curve]
    smoothed: bool = True
    zero: bool = False
    log: bool = False
    remark: str = ""
    planned: Sequence[tuple[str, float, int]] = ()
    extra: list[Curve] = field(default_factory=list)
    """Curves of few points, drawn with their points and not smoothed."""

    def figure(self) -> str:
        """The plot as a <figure>, nothing where no curve has a value."""
        curves = [curve for curve in self.curves if np.isfinite(curve.y).any()]
        extra = [curve for curve in self.extra if np.isfinite(curve.y).any()]
        if not curves and not extra:
            return ""
        smoothed = {curve.name: self._smooth(curve) for curve in curves} if self.smoothed else {}
        full = [curve.y for curve in extra] + list(smoothed.values() if smoothed else (curve.y for curve in curves))
        raw = [curve.y for curve in curves] if smoothed else []
        chart = Chart(
            self.title, self.x_label, self.unit, self._x_span([*curves, *extra]), self._y_span(full, raw),
            y_log=self.log, bare=True,
        )  # fmt: skip
        if smoothed:
            for curve in curves:
                chart.curve(self._x_of(curve), curve.y, curve.color % COLORS, look=RAW)
        for curve in curves:
            y = smoothed.get(curve.name, curve.y)
            chart.curve(self._x_of(curve), y, curve.color % COLORS, curve.name)
            chart.name(curve.name, curve.color % COLORS)
        for curve in extra:
            self._draw_extra(chart, curve)
        for name, value, color in filter(lambda line: np.isfinite(line[1]), self.planned):
            chart.curve(np.array(chart.x), np.array([value, value]), color % COLORS, name, DASHED)
            chart.name(name, color % COLORS)
        return framed(chart, self.remark)

    def _draw_extra(self, chart: Chart, curve: Curve) -> None:
        x = self._x_of(curve)
        chart.curve(x, curve.y, curve.color % COLORS, curve.name)
        known = np.flatnonzero(np.isfinite(curve.y))
        if len(known) <= 60:
            for at in known.tolist():
                chart.dot(float(x[at]), float(curve.y[at]), curve.color % COLORS)
        chart.name(curve.name, curve.color % COLORS)

    def _x_of(self, curve: Curve) -> Floats:
        return self.x if curve.x is None else curve.x

    def _smooth(self, curve: Curve) -> Floats:
        weights = np.ones(len(curve.y)) if curve.weights is None else curve.weights
        return smooth(curve.y, weights, window_of(int(np.isfinite(curve.y).sum())))

    def _x_span(self, curves: Sequence[Curve]) -> tuple[float, float]:
        ends = [end for curve in curves for end in (float(self._x_of(curve)[0]), float(self._x_of(curve)[-1]))]
        low, high = min(ends), max(ends)
        room = max(1.0, abs(high) / 1000)
        return (low, high) if high > low else (low - room, high + room)

    def _y_span(self, full: Sequence[Floats], raw: Sequence[Floats]) -> tuple[float, float]:
        """From the lowest to the highest value; single spikes of raw curves are cut at the border."""
        low, high = np.inf, -np.inf
        planned = [np.array([value]) for _, value, _ in self.planned]
        for values, cut in [*((y, (0, 100)) for y in [*full, *planned]), *((y, (0.5, 99.5)) for y in raw)]:
            known = values[np.isfinite(values) & ((values > 0) | (not self.log))]
            if len(known):
                bounds = np.percentile(known, cut if len(known) >= 100 else (0, 100))
                low, high = min(low, float(bounds[0])), max(high, float(bounds[1]))
        if not np.isfinite(low):
            return (0.1, 1.0)
        if self.log:
            return (low / 1.15, high * 1.15)
        if self.zero:
            low = min(low, 0.0)
        room = (high - low) * 0.05 or max(abs(high), 1e-6) * 0.05
        return (low if self.zero and low == 0 else low - room, high + room)


def level_curves(log: StepLog, values: Floats, weights: Floats | None = None) -> list[Curve]:
    """A curve for each combination of levels that steps train, in the color of its level; values: float64 [n]."""
    return [
        Curve(name, np.where(steps, values, np.nan), log.color(name), weights)
        for name, steps in combinations(log).items()
    ]
