"""The chart of a study: for each variant the difference of its loss to the default's, a dot a seed, and the interval.

Owns the drawing, as SVG text that needs nothing else; rows are variants, so it is not packing/svg.py's chart.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hbp_titan.packing.bands import band_name
from hbp_titan.study.statistics import Difference
from hbp_titan.study.tables import band_loss, bands_of, difference, final_loss, values_of
from hbp_titan.study.variants import DEFAULT

_LEFT, _RIGHT, _TOP, _BOTTOM, _ROW, _WIDTH = 96, 16, 30, 40, 22, 420
_STYLE = (
    "<style>svg{font:11px system-ui,sans-serif;fill:#1c2430}.title{font-weight:600;font-size:13px}"
    ".axis{stroke:#e3e7ed}.zero{stroke:#1c2430;stroke-dasharray:4 3}.interval{stroke:#2f6fb7;stroke-width:2}"
    ".mean{fill:#2f6fb7}.seed{fill:#e08a2e;fill-opacity:.8}</style>"
)


@dataclass(frozen=True)
class Row:
    """One variant: its difference, and that of each seed."""

    name: str
    difference: Difference
    seeds: tuple[float, ...]


def draw(study: dict[str, Any]) -> str:
    """The whole picture: all lengths, and the longest band. study: two seeds of a variant beside the default's."""
    panels: list[tuple[str, Callable[[dict[str, Any]], float]]] = [("all lengths", final_loss)]
    if bands := bands_of(study):
        panels.append((f"{band_name(int(bands[-1]))} tokens", band_loss(bands[-1])))
    parts = []
    height = 0
    for number, (title, figure) in enumerate(panels):
        base = values_of(study, DEFAULT, figure)
        rows = []
        for name in study["variants"]:
            own = values_of(study, name, figure)
            found = None if name == DEFAULT else difference(study, name, figure)
            if found:
                rows.append(Row(name, found, tuple(own[seed] - base[seed] for seed in own if seed in base)))
        assert rows, "nothing to draw"
        height = _TOP + _ROW * len(rows) + _BOTTOM
        panel = "".join(_panel(f"{title}: loss - {DEFAULT}'s", rows, height))
        parts.append(f'<svg x="{number * _WIDTH}" y="0" width="{_WIDTH}" height="{height}">{panel}</svg>')
    width = _WIDTH * len(panels)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
        f'{_STYLE}<rect width="{width}" height="{height}" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


def _panel(title: str, rows: Sequence[Row], height: int) -> list[str]:
    ends = [value for row in rows for value in (*row.seeds, row.difference.low, row.difference.high, 0.0)]
    low, high = min(ends), max(ends)
    low, high = low - 0.05 * (high - low), high + 0.05 * (high - low)

    def x(value: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * (value - low) / (high - low)

    bottom = height - _BOTTOM
    parts = [f'<text class="title" x="{_LEFT}" y="16">{html.escape(title)}</text>']
    for tick in _ticks(low, high):
        parts.append(f'<line class="axis" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{_TOP}" y2="{bottom}"/>')
        parts.append(f'<text x="{x(tick):.1f}" y="{bottom + 15}" text-anchor="middle">{_signed(tick)}</text>')
    parts.append(f'<line class="zero" x1="{x(0):.1f}" x2="{x(0):.1f}" y1="{_TOP}" y2="{bottom}"/>')
    for number, row in enumerate(rows):
        y = _TOP + _ROW * (number + 0.5)
        found = row.difference
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{html.escape(row.name)}</text>')
        ends_of = f'x1="{x(found.low):.1f}" x2="{x(found.high):.1f}" y1="{y:.1f}" y2="{y:.1f}"'
        tip = f"{found.mean:+.4f} ({found.low:+.4f} to {found.high:+.4f}), p {found.p:.3f}"
        parts.append(f'<line class="interval" {ends_of}><title>{tip}</title></line>')
        parts += [f'<circle class="seed" cx="{x(value):.1f}" cy="{y:.1f}" r="2.5"/>' for value in row.seeds]
        parts.append(f'<rect class="mean" x="{x(found.mean) - 1.5:.1f}" y="{y - 6:.1f}" width="3" height="12"/>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    says = "worse to the right; bar: mean, line: 95% interval, dots: seeds"
    return [*parts, f'<text x="{middle:.1f}" y="{height - 8}" text-anchor="middle">{says}</text>']


def _signed(value: float) -> str:
    return f"{value:+.3g}" if value else "0"


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers between low and high, three to seven of them."""
    step = 10.0 ** math.floor(math.log10((high - low) / 3))
    while (high - low) / step > 7:
        step *= 2 if (high - low) / step <= 14 else 5
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
