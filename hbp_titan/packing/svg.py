"""A small chart: axes, bars, lines and marks as inline SVG text.

Owns the drawing of the planner's page, so that the page needs no plotting library and no network. Colours are CSS
variables (--ink, --grid, --c0 ...) that the page defines for light and dark.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

WIDTH, HEIGHT = 520, 300
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 34, 46


class Chart:
    """One chart of fixed size; draw on it, then take `svg()`.

    x, y: (lowest, highest) value of each axis; x_log: powers of two along x. Values outside are cut at the border.
    """

    def __init__(
        self,
        title: str,
        x_label: str,
        y_label: str,
        x: tuple[float, float],
        y: tuple[float, float],
        x_log: bool = False,
    ) -> None:
        self.title, self.x_label, self.y_label = title, x_label, y_label
        self.x, self.y, self.x_log = x, y, x_log
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

    def border(self, x: float, label: str) -> None:
        """A dashed vertical line with a label at its top."""
        at = self._px(x)
        self.marks.append(
            f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="var(--ink)" '
            f'stroke-dasharray="4 3"/>'
            f'<text x="{at - 4:.1f}" y="{TOP + 11}" text-anchor="end">{html.escape(label)}</text>'
        )

    def name(self, text: str, color: int) -> None:
        """An entry of the legend."""
        self.names.append((text, color))

    def svg(self) -> str:
        """The chart as an <svg> element."""
        middle = (TOP + HEIGHT - BOTTOM) / 2
        parts = [
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(self.title)}">',
            f'<text x="{LEFT}" y="16" class="title">{html.escape(self.title)}</text>',
            *self._grid(),
            *self.marks,
            f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">'
            f"{html.escape(self.x_label)}</text>",
            f'<text x="13" y="{middle}" text-anchor="middle" transform="rotate(-90 13 {middle})">'
            f"{html.escape(self.y_label)}</text>",
            *self._legend(),
            "</svg>",
        ]
        return "".join(parts)

    def _grid(self) -> list[str]:
        parts = []
        for value in _ticks(*self.y):
            at = self._py(value)
            parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}" stroke="var(--grid)"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{short(value)}</text>')
        for value in _powers(*self.x) if self.x_log else _ticks(*self.x):
            text = short(value, 1024 if self.x_log else 1000)
            parts.append(
                f'<text x="{self._px(value):.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{text}</text>'
            )
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
        return LEFT + (WIDTH - RIGHT - LEFT) * min(1.0, max(0.0, (value - low) / (high - low)))

    def _py(self, value: float) -> float:
        low, high = self.y
        return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * min(1.0, max(0.0, (value - low) / (high - low)))


def short(value: float, thousand: int = 1000) -> str:
    """A number in a few characters: 1.5M, 16K (thousand = 1024 for lengths), 0.25."""
    for size, unit in ((thousand**3, "G"), (thousand**2, "M"), (thousand, "K")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from low to high, four to eight of them."""
    step = 10 ** math.floor(math.log10((high - low) / 4))
    while (high - low) / step > 8:
        step *= 2 if round(step / 10 ** math.floor(math.log10(step) + 1e-9)) != 2 else 2.5
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _powers(low: float, high: float) -> list[float]:
    return [2.0**i for i in range(math.ceil(math.log2(low) - 1e-9), math.floor(math.log2(high) + 1e-9) + 1)]
