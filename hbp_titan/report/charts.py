"""Charts as inline SVG: `Chart` with bars, lines, curves and marks, and `Plot`, several curves over one x axis.

Owns the drawing of all pages of the project, so they need no plotting library and no network. Colors are the CSS
variables of html.PALETTE.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from hbp_titan.report.html import NUM_COLORS, PALETTE, figure
from hbp_titan.report.run import Floats, StepLog
from hbp_titan.report.series import combinations, smooth, window_of
from hbp_titan.utils import human_count

WIDTH, HEIGHT = 520, 300
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 34, 46
BUCKET = 1.5
"""Pixels along x for which a curve shows its lowest and its highest value; more would be drawn over each other."""
DOCUMENT_STYLE = (
    f"<style>{PALETTE.replace(':root', 'svg')}svg{{font:11px system-ui,sans-serif;fill:var(--ink)}}"
    ".title{font-weight:600;font-size:13px}</style>"
)
LEGEND_GAP = 14
"""Pixels between entries of a legend."""
_CHARACTER_WIDTHS = {**dict.fromkeys("ijltfr .,:'|", 4.0), **dict.fromkeys("MWmw", 10.0)}
"""Pixels of characters in a sans-serif font of 11 px; the others take 6.5 at most."""
DEFAULT_STROKE = 'stroke-width="1.8"'
MAX_DOTS = 60
RAW = 'stroke-width="1" stroke-opacity="0.32"'
DASHED = 'stroke-width="1.6" stroke-dasharray="5 4"'


class Chart:
    """One chart of fixed size.

    Args:
        x, y: (lowest, highest) value of each axis; values outside are clipped.
        x_log: whether x is logarithmic with ticks at powers of two; y_log: whether y is logarithmic.
        bare: draw no title, legend and y label, because the page has them as text; gives the class "chart".
    """

    def __init__(
        self,
        title: str,
        x_label: str,
        y_label: str,
        x: tuple[float, float],
        y: tuple[float, float],
        x_log: bool = False,
        *,
        y_log: bool = False,
        bare: bool = False,
    ) -> None:
        self.title, self.x_label, self.y_label = title, x_label, y_label
        self.x, self.y, self.x_log, self.y_log = x, y, x_log, y_log
        self.bare = bare
        self.message = ""
        """What the chart shows, as a sentence with its figures; the page's caption in place of the title."""
        self.left, self.top = (48, 12) if bare else (LEFT, TOP)
        self.x_ticks: list[tuple[float, str]] = []
        """(value, text) instead of round numbers along x."""
        self.y_ticks: list[tuple[float, str]] = []
        """(value, text) instead of round numbers along y."""
        self.marks: list[str] = []
        self.names: list[tuple[str, int]] = []

    def bar(self, x0: float, x1: float, y0: float, y1: float, color: int, tip: str = "", opacity: float = 1.0) -> None:
        """Draw a rectangle over [x0, x1] from y0 to y1 with a tooltip."""
        left, right, top, bottom = self._px(x0), self._px(x1), self._py(y1), self._py(y0)
        title = f"<title>{html.escape(tip)}</title>" if tip else ""
        faint = f' fill-opacity="{opacity:.2f}"' if opacity < 1 else ""
        self.marks.append(
            f'<rect x="{left:.1f}" y="{top:.1f}" width="{max(0.4, right - left):.1f}" '
            f'height="{max(0.0, bottom - top):.1f}" fill="var(--c{color})"{faint}>{title}</rect>'
        )

    def line(self, points: Sequence[tuple[float, float]], color: int) -> None:
        """Draw a line through a few points."""
        path = " ".join(f"{self._px(x):.1f},{self._py(y):.1f}" for x, y in points)
        self.marks.append(f'<polyline points="{path}" fill="none" stroke="var(--c{color})" stroke-width="1.8"/>')

    def curve(self, x: Floats, y: Floats, color: int, name: str = "", stroke: str = "") -> None:
        """Draw a line through many points, x ascending, thinned to what is visible; NaN in y is skipped.

        name: with it the page's script shows the values below the pointer (data-x, data-y).
        stroke: SVG attributes of the line.
        """
        # More points than pixels make the page large and draw the same picture.
        points = thinned(x, y, self.x, math.ceil((WIDTH - RIGHT - self.left) / BUCKET))
        # A polyline of one point is invisible.
        if len(points) == 1:
            self.dot(*points[0], color, f"{name}: {points[0][1]:.5g}")
            return
        path = " ".join(f"{self._px(px):.1f},{self._py(py):.1f}" for px, py in points)
        tips = ""
        if name:
            data_x, data_y = (" ".join(f"{point[axis]:.6g}" for point in points) for axis in (0, 1))
            tips = f' data-name="{html.escape(name)}" data-x="{data_x}" data-y="{data_y}"'
        self.marks.append(
            f'<polyline points="{path}" fill="none" stroke="var(--c{color})" {stroke or DEFAULT_STROKE}{tips}/>'
        )

    def dot(self, x: float, y: float, color: int, tip: str = "", radius: float = 3, hollow: bool = False) -> None:
        """Draw a round mark with a tooltip."""
        title = f"<title>{html.escape(tip)}</title>" if tip else ""
        paint = (
            f'fill="var(--panel)" stroke="var(--c{color})" stroke-width="2"' if hollow else f'fill="var(--c{color})"'
        )
        center = f'cx="{self._px(x):.1f}" cy="{self._py(y):.1f}"'
        self.marks.append(f'<circle {center} r="{radius:g}" {paint}>{title}</circle>')

    def boundary(self, x: float, label: str) -> None:
        """Draw a dashed vertical line with a label at its top."""
        x = self._px(x)
        self.marks.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{self.top}" y2="{HEIGHT - BOTTOM}" stroke="var(--ink)" '
            f'stroke-dasharray="4 3"/>'
            f'<text x="{x - 4:.1f}" y="{self.top + 11}" text-anchor="end">{html.escape(label)}</text>'
        )

    def name(self, text: str, color: int) -> None:
        """Add an entry to the legend."""
        self.names.append((text, color))

    def svg(self) -> str:
        """Return the chart as an <svg> element."""
        kind = 'class="chart" ' if self.bare else ""
        parts = [
            f'<svg {kind}viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(self.title)}">',
            *self._grid(),
            *self.marks,
            f'<text x="{(self.left + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" class="x" text-anchor="middle">'
            f"{html.escape(self.x_label)}</text>",
            *([] if self.bare else self._labels()),
            "</svg>",
        ]
        return "".join(parts)

    def _labels(self) -> list[str]:
        """Return title, y label and legend."""
        middle = (self.top + HEIGHT - BOTTOM) / 2
        return [
            f'<text x="{self.left}" y="16" class="title">{html.escape(self.title)}</text>',
            f'<text x="13" y="{middle}" text-anchor="middle" transform="rotate(-90 13 {middle})">'
            f"{html.escape(self.y_label)}</text>",
            *self._legend(),
        ]

    def _grid(self) -> list[str]:
        parts = []
        left, right = self.left, WIDTH - RIGHT
        values = _log_ticks(*self.y) if self.y_log else ticks(*self.y)
        for value, text in self.y_ticks or zip(values, _tick_texts(values), strict=True):
            at = self._py(value)
            parts.append(f'<line x1="{left}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}" stroke="var(--grid)"/>')
            parts.append(f'<text x="{left - 6}" y="{at + 4:.1f}" text-anchor="end">{html.escape(text)}</text>')
        values = _powers_of_two(*self.x) if self.x_log else ticks(*self.x)
        # More labels would touch on a phone, where the text is larger.
        values = values[:: -(-len(values) // 9)]
        texts = [human_count(value, 1024) for value in values] if self.x_log else _tick_texts(values)
        for value, text in self.x_ticks or zip(values, texts, strict=True):
            at, foot = self._px(value), HEIGHT - BOTTOM + 15
            parts.append(f'<text x="{at:.1f}" y="{foot}" text-anchor="middle">{html.escape(text)}</text>')
        return parts

    def _legend(self) -> list[str]:
        parts = []
        right = WIDTH - RIGHT
        # From the right edge to the left.
        for text, color in reversed(self.names):
            # An estimate of the width, because SVG text cannot be measured here. The text begins next to its swatch, so
            # an error only changes the distance to the neighbor.
            right -= math.ceil(sum(_CHARACTER_WIDTHS.get(character, 6.5) for character in text))
            parts.append(f'<rect x="{right - 14}" y="7" width="10" height="10" fill="var(--c{color})"/>')
            parts.append(f'<text x="{right}" y="16">{html.escape(text)}</text>')
            right -= 14 + LEGEND_GAP
        return parts

    def _px(self, value: float) -> float:
        low, high = self.x
        if self.x_log:
            low, high, value = math.log2(low), math.log2(high), math.log2(max(value, low))
        return self.left + (WIDTH - RIGHT - self.left) * min(1.0, max(0.0, (value - low) / (high - low)))

    def _py(self, value: float) -> float:
        low, high = self.y
        if self.y_log:
            low, high, value = math.log2(low), math.log2(high), math.log2(max(value, low))
        return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - self.top) * min(1.0, max(0.0, (value - low) / (high - low)))


def side_by_side(charts: Sequence[Chart]) -> str:
    """Return one SVG document with these charts, which needs no page around it."""
    parts = []
    for index, chart in enumerate(charts):
        # A nested <svg> has a coordinate system of its own.
        position = f'<svg x="{index * WIDTH}" y="0" width="{WIDTH}" height="{HEIGHT}" '
        parts.append(chart.svg().replace("<svg ", position, 1))
    width = WIDTH * len(charts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT}" width="{width}" height="{HEIGHT}">'
        f'{DOCUMENT_STYLE}<rect width="{width}" height="{HEIGHT}" fill="var(--paper)"/>{"".join(parts)}</svg>\n'
    )


def thinned(x: Floats, y: Floats, span: tuple[float, float], buckets: int) -> list[tuple[float, float]]:
    """Return the finite points, and of more than 2 * buckets only the lowest and the highest of each bucket.

    x (ascending), y: float64 [n]. span: interval of x that is divided into buckets of equal width.
    """
    finite = np.isfinite(x) & np.isfinite(y)
    x, y = x[finite], y[finite]
    kept = np.arange(len(x))
    if len(x) > 2 * buckets:
        bucket = np.clip((x - span[0]) / (span[1] - span[0]) * buckets, 0, buckets - 1).astype(np.int64)
        starts = np.flatnonzero(np.diff(bucket, prepend=-1))
        stretches = zip(starts.tolist(), [*starts[1:].tolist(), len(x)], strict=True)
        # Extremes, not means: a spike of one step must stay visible. Every kept point is one of the data.
        extremes = {0, len(x) - 1}
        for start, end in stretches:
            extremes |= {start + int(y[start:end].argmin()), start + int(y[start:end].argmax())}
        kept = np.array(sorted(extremes))
    return list(zip(x[kept].tolist(), y[kept].tolist(), strict=True))


def ticks(low: float, high: float) -> list[float]:
    """Return four to eight round numbers from low to high."""
    # Steps of 1, 2 and 5 times a power of ten: the smallest that gives no more than eight ticks.
    step = 10 ** math.floor(math.log10((high - low) / 4))
    while (high - low) / step > 8:
        step *= 2 if round(step / 10 ** math.floor(math.log10(step) + 1e-9)) != 2 else 2.5
    # The tolerance keeps ticks that rounding puts just outside.
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _powers_of_two(low: float, high: float) -> list[float]:
    return [2.0**i for i in range(math.ceil(math.log2(low) - 1e-9), math.floor(math.log2(high) + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Return 1, 2 and 5 times powers of ten, or only the powers if there are more than eight."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    several = [digit * 10.0**e for e in exponents for digit in (1, 2, 5) if low <= digit * 10.0**e <= high]
    # A range within one digit has no such ticks.
    if len(several) < 2:
        return ticks(low, high)
    return several if len(several) <= 8 else [10.0**e for e in exponents if low <= 10.0**e <= high]


def _tick_texts(values: Sequence[float]) -> list[str]:
    """Return the ticks as short texts, with enough digits that no two are equal."""
    texts = [human_count(value) for value in values]
    return texts if len(set(texts)) == len(texts) else [f"{value:,.6g}" for value in values]


@dataclass
class Curve:
    """One curve of a plot: y float64 [n], NaN where there is no value; weights for its smoothing; its own x, if any."""

    name: str
    y: Floats
    color: int
    weights: Floats | None = None
    x: Floats | None = None


@dataclass
class Plot:
    """A chart of curves over one x axis.

    Args:
        x: float64 [n], ascending.
        smoothed: whether curves are drawn twice, raw (thin) and smoothed (thick).
        zero: whether y starts at 0; log: whether y is logarithmic.
        planned: (name, value, color) of dashed horizontal lines.
        extra: curves of few points, drawn with their points and not smoothed.
        message: as in Chart.
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
    message: str = ""

    def figure(self) -> str:
        """Return the plot as a <figure>, "" if no curve has a value."""
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
        chart.message = self.message
        # All raw curves first, so that they are behind the smoothed ones.
        if smoothed:
            for curve in curves:
                chart.curve(self._x_of(curve), curve.y, curve.color % NUM_COLORS, stroke=RAW)
        for curve in curves:
            y = smoothed.get(curve.name, curve.y)
            chart.curve(self._x_of(curve), y, curve.color % NUM_COLORS, curve.name)
            chart.name(curve.name, curve.color % NUM_COLORS)
        for curve in extra:
            self._draw_extra(chart, curve)
        for name, value, color in filter(lambda line: np.isfinite(line[1]), self.planned):
            chart.curve(np.array(chart.x), np.array([value, value]), color % NUM_COLORS, name, DASHED)
            chart.name(name, color % NUM_COLORS)
        return figure(chart, self.remark)

    def _draw_extra(self, chart: Chart, curve: Curve) -> None:
        x = self._x_of(curve)
        chart.curve(x, curve.y, curve.color % NUM_COLORS, curve.name)
        known = np.flatnonzero(np.isfinite(curve.y))
        # Dots of many values would hide the line.
        if len(known) <= MAX_DOTS:
            for index in known.tolist():
                chart.dot(float(x[index]), float(curve.y[index]), curve.color % NUM_COLORS)
        chart.name(curve.name, curve.color % NUM_COLORS)

    def _x_of(self, curve: Curve) -> Floats:
        return self.x if curve.x is None else curve.x

    def _smooth(self, curve: Curve) -> Floats:
        weights = np.ones(len(curve.y)) if curve.weights is None else curve.weights
        return smooth(curve.y, weights, window_of(int(np.isfinite(curve.y).sum())))

    def _x_span(self, curves: Sequence[Curve]) -> tuple[float, float]:
        ends = [end for curve in curves for end in (float(self._x_of(curve)[0]), float(self._x_of(curve)[-1]))]
        low, high = min(ends), max(ends)
        # A single step has no span.
        margin = max(1.0, abs(high) / 1000)
        return (low, high) if high > low else (low - margin, high + margin)

    def _y_span(self, full: Sequence[Floats], raw: Sequence[Floats]) -> tuple[float, float]:
        """Return the range of the values; single spikes of raw curves are clipped."""
        low, high = np.inf, -np.inf
        planned = [np.array([value]) for _, value, _ in self.planned]
        # One spike of a raw curve would flatten all others, so raw curves are clipped to percentiles.
        for values, cut in [*((y, (0, 100)) for y in [*full, *planned]), *((y, (0.5, 99.5)) for y in raw)]:
            known = values[np.isfinite(values) & ((values > 0) | (not self.log))]
            if len(known):
                bounds = np.percentile(known, cut if len(known) >= 100 else (0, 100))
                low, high = min(low, float(bounds[0])), max(high, float(bounds[1]))
        # Nothing to draw on a logarithmic axis, such as only zeros: any range.
        if not np.isfinite(low):
            return (0.1, 1.0)
        if self.log:
            return (low / 1.15, high * 1.15)
        if self.zero:
            low = min(low, 0.0)
        margin = (high - low) * 0.05 or max(abs(high), 1e-6) * 0.05
        return (low if self.zero and low == 0 else low - margin, high + margin)


def level_curves(log: StepLog, values: Floats, weights: Floats | None = None) -> list[Curve]:
    """Return one curve per combination of levels, in the color of its level. values: float64 [n]."""
    return [
        Curve(name, np.where(steps, values, np.nan), log.color(name), weights)
        for name, steps in combinations(log).items()
    ]
