"""A small chart: axes, bars, lines, curves and marks as inline SVG text.

Owns the drawing of the project's pages, so that they need no plotting library and no network. Colours are CSS
variables (--ink, --grid, --c0 ...) that a page defines for light and dark; PALETTE is such a definition.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hbp_titan.utils import human_count

WIDTH, HEIGHT = 520, 300
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 34, 46
BUCKET = 1.5
"""Units along x that a curve shows a lowest and a highest value of: more would be drawn over each other."""
COLORS = 8
PALETTE = """:root { color-scheme: light dark; --ink: #1c2430; --soft: #5c6675; --grid: #e3e7ed; --paper: #ffffff;
  --panel: #f7f9fb; --c0: #2f6fb7; --c1: #e08a2e; --c2: #3a9a6b; --c3: #b0508e; --c4: #7a6fc0; --c5: #8c7a5a;
  --c6: #2b9aa8; --c7: #c4504a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaf0; --soft: #9aa5b4; --grid: #2c3440; --paper: #12161c;
  --panel: #1a2029; --c0: #6aa6e8; --c1: #f0a85a; --c2: #64c496; --c3: #d98abd; --c4: #a79df0; --c5: #c0ad88;
  --c6: #5cc3d0; --c7: #ee8a84; } }
"""
"""The colours of a page, light and dark."""

Floats = NDArray[np.float64]


class Chart:
    """One chart of fixed size; draw on it, then take `svg()`.

    x, y: (lowest, highest) value of each axis; x_log: powers of two along x, y_log: a logarithmic y. Values outside are
    cut at the border. bare: without title, legend and y label, which the page around it says; class "chart".
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
        self.left, self.top = (48, 12) if bare else (LEFT, TOP)
        self.x_ticks: list[tuple[float, str]] = []
        """(value, text) in place of round numbers along x."""
        self.marks: list[str] = []
        self.names: list[tuple[str, int]] = []

    def bar(self, x0: float, x1: float, y0: float, y1: float, color: int, tip: str = "") -> None:
        """A rectangle over [x0, x1] from y0 to y1; `tip` shows under the pointer."""
        left, right, top, bottom = self._px(x0), self._px(x1), self._py(y1), self._py(y0)
        title = f"<title>{html.escape(tip)}</title>" if tip else ""
        self.marks.append(
            f'<rect x="{left:.1f}" y="{top:.1f}" width="{max(0.4, right - left):.1f}" '
            f'height="{max(0.0, bottom - top):.1f}" fill="var(--c{color})">{title}</rect>'
        )

    def line(self, points: Sequence[tuple[float, float]], color: int) -> None:
        path = " ".join(f"{self._px(x):.1f},{self._py(y):.1f}" for x, y in points)
        self.marks.append(f'<polyline points="{path}" fill="none" stroke="var(--c{color})" stroke-width="1.8"/>')

    def curve(self, x: Floats, y: Floats, color: int, name: str = "", look: str = "") -> None:
        """A line through many points, x ascending, thinned out to what can be seen; NaN in y is left out.

        name: under it a page's script finds the values below the pointer (data-x, data-y). look: further attributes.
        """
        points = thinned(x, y, self.x, math.ceil((WIDTH - RIGHT - self.left) / BUCKET))
        if len(points) == 1:
            self.dot(*points[0], color, f"{name}: {points[0][1]:.5g}")
            return
        path = " ".join(f"{self._px(at):.1f},{self._py(value):.1f}" for at, value in points)
        tips = ""
        if name:
            places, values = (" ".join(f"{point[axis]:.6g}" for point in points) for axis in (0, 1))
            tips = f' data-name="{html.escape(name)}" data-x="{places}" data-y="{values}"'
        look = look or 'stroke-width="1.8"'
        self.marks.append(f'<polyline points="{path}" fill="none" stroke="var(--c{color})" {look}{tips}/>')

    def dot(self, x: float, y: float, color: int, tip: str = "") -> None:
        """A round mark; `tip` shows under the pointer."""
        title = f"<title>{html.escape(tip)}</title>" if tip else ""
        place = f'cx="{self._px(x):.1f}" cy="{self._py(y):.1f}"'
        self.marks.append(f'<circle {place} r="3" fill="var(--c{color})">{title}</circle>')

    def border(self, x: float, label: str) -> None:
        """A dashed vertical line with a label at its top."""
        at = self._px(x)
        self.marks.append(
            f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{self.top}" y2="{HEIGHT - BOTTOM}" stroke="var(--ink)" '
            f'stroke-dasharray="4 3"/>'
            f'<text x="{at - 4:.1f}" y="{self.top + 11}" text-anchor="end">{html.escape(label)}</text>'
        )

    def name(self, text: str, color: int) -> None:
        """An entry of the legend."""
        self.names.append((text, color))

    def svg(self) -> str:
        """The chart as an <svg> element."""
        kind = 'class="chart" ' if self.bare else ""
        parts = [
            f'<svg {kind}viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(self.title)}">',
            *self._grid(),
            *self.marks,
            f'<text x="{(self.left + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" class="x" text-anchor="middle">'
            f"{html.escape(self.x_label)}</text>",
            *([] if self.bare else self._words()),
            "</svg>",
        ]
        return "".join(parts)

    def _words(self) -> list[str]:
        """Title, y label and legend."""
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
        values = _decades(*self.y) if self.y_log else ticks(*self.y)
        for value, text in zip(values, _labels(values), strict=True):
            at = self._py(value)
            parts.append(f'<line x1="{left}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}" stroke="var(--grid)"/>')
            parts.append(f'<text x="{left - 6}" y="{at + 4:.1f}" text-anchor="end">{text}</text>')
        values = _powers(*self.x) if self.x_log else ticks(*self.x)
        texts = [human_count(value, 1024) for value in values] if self.x_log else _labels(values)
        for value, text in self.x_ticks or zip(values, texts, strict=True):
            at, foot = self._px(value), HEIGHT - BOTTOM + 15
            parts.append(f'<text x="{at:.1f}" y="{foot}" text-anchor="middle">{html.escape(text)}</text>')
        return parts

    def _legend(self) -> list[str]:
        parts = []
        right = WIDTH - RIGHT
        for text, color in reversed(self.names):
            parts.append(f'<text x="{right}" y="16" text-anchor="end">{html.escape(text)}</text>')
            right -= 7 * len(text) + 8
            parts.append(f'<rect x="{right - 6}" y="7" width="10" height="10" fill="var(--c{color})"/>')
            right -= 16
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


def thinned(x: Floats, y: Floats, span: tuple[float, float], buckets: int) -> list[tuple[float, float]]:
    """The points that are finite; where they are more than 2 * buckets, the lowest and highest of each bucket.

    x (ascending), y: float64 [n]. span: what the buckets part evenly. Every point that is kept is one of the data.
    """
    finite = np.isfinite(x) & np.isfinite(y)
    x, y = x[finite], y[finite]
    kept = np.arange(len(x))
    if len(x) > 2 * buckets:
        bucket = np.clip((x - span[0]) / (span[1] - span[0]) * buckets, 0, buckets - 1).astype(np.int64)
        starts = np.flatnonzero(np.diff(bucket, prepend=-1))
        stretches = zip(starts.tolist(), [*starts[1:].tolist(), len(x)], strict=True)
        extremes = {0, len(x) - 1}
        for start, end in stretches:
            extremes |= {start + int(y[start:end].argmin()), start + int(y[start:end].argmax())}
        kept = np.array(sorted(extremes))
    return list(zip(x[kept].tolist(), y[kept].tolist(), strict=True))


def ticks(low: float, high: float) -> list[float]:
    """Round numbers from low to high, four to eight of them."""
    step = 10 ** math.floor(math.log10((high - low) / 4))
    while (high - low) / step > 8:
        step *= 2 if round(step / 10 ** math.floor(math.log10(step) + 1e-9)) != 2 else 2.5
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _powers(low: float, high: float) -> list[float]:
    return [2.0**i for i in range(math.ceil(math.log2(low) - 1e-9), math.floor(math.log2(high) + 1e-9) + 1)]


def _decades(low: float, high: float) -> list[float]:
    """Ticks of a logarithmic axis: 1, 2 and 5 times powers of ten, or where they are many the powers alone."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    several = [digit * 10.0**e for e in exponents for digit in (1, 2, 5) if low <= digit * 10.0**e <= high]
    if len(several) < 2:
        return ticks(low, high)
    return several if len(several) <= 8 else [10.0**e for e in exponents if low <= 10.0**e <= high]


def _labels(values: Sequence[float]) -> list[str]:
    """The ticks in a few characters, with the digits that tell each from the next."""
    texts = [human_count(value) for value in values]
    return texts if len(set(texts)) == len(texts) else [f"{value:,.6g}" for value in values]
