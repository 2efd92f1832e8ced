"""Building blocks of the page: escaped text, tables, figures, cards, and numbers as people read them.

Owns the HTML of these blocks. Text from a run (names of sources, levels, folders) reaches the page through `text` or a
chart alone, both of which escape it.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence

from hbp_titan.packing.bands import band_name
from hbp_titan.packing.svg import COLORS, Chart

DASH = "&ndash;"


def text(value: object) -> str:
    """Text for the page, escaped."""
    return html.escape(str(value))


def number(value: float | None, digits: int = 0) -> str:
    """1,234 or 1,234.56; a dash for None and NaN."""
    return DASH if value is None or math.isnan(value) else f"{value:,.{digits}f}"


def percent(value: float | None, digits: int = 2) -> str:
    """A share as percent; a dash for None and NaN."""
    return DASH if value is None or math.isnan(value) else f"{value:.{digits}%}"


def duration(seconds: float) -> str:
    """48.2s, 12m 5s, 3h 20m, 2d 4h."""
    for unit, size, below, name in ((86400, 3600, "h", "d"), (3600, 60, "m", "h"), (60, 1, "s", "m")):
        if seconds >= unit:
            return f"{int(seconds // unit)}{name} {int(seconds % unit // size)}{below}"
    return f"{seconds:.1f}s"


def length_name(band: str) -> str:
    """A length band of metrics.jsonl, "2048", as text: 1,025 to 2K."""
    return band_name(int(band))


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "", marked: Sequence[int] = ()) -> str:
    """A table; heads and cells are HTML. marked: rows that stand out. Wide ones scroll on their own."""
    head = "".join(f'<th scope="col">{cell}</th>' for cell in heads)
    body = []
    for at, row in enumerate(rows):
        mark = ' class="marked"' if at in marked else ""
        cells = "".join(f"<td>{cell}</td>" for cell in row[1:])
        body.append(f'<tr{mark}><th scope="row">{row[0]}</th>{cells}</tr>')
    named = f"<caption>{text(caption)}</caption>" if caption else ""
    return (
        f'<div class="scroll"><table>{named}<thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'
    )


def missing(sentence: str) -> str:
    """What stands where something is left out; the sentence is plain text."""
    return f'<p class="missing">{text(sentence)}</p>'


def note(sentence: str) -> str:
    """A sentence of plain text below a figure or table."""
    return f'<p class="note">{text(sentence)}</p>'


def folded(summary: str, body: str) -> str:
    """Something long that opens on a click; the summary is plain text."""
    return f"<details><summary>{text(summary)}</summary>{body}</details>"


def row(*figures: str) -> str:
    """Figures and tables side by side, below each other where there is no room; empty ones are left out."""
    return f'<div class="row">{"".join(filter(None, figures))}</div>' if any(figures) else ""


def section(name: str, intro: str, *bodies: str) -> str:
    """A section of the page; name and intro are plain text."""
    lead = f"<p>{text(intro)}</p>" if intro else ""
    return f"<section><h3>{text(name)}</h3>{lead}{''.join(bodies)}</section>"


def cards(figures: Sequence[tuple[str, str, str]]) -> str:
    """Key figures: (name, value, what it means), values are HTML."""
    boxes = [
        f'<div class="card"><span>{text(name)}</span><b>{value}</b><small>{text(meaning)}</small></div>'
        for name, value, meaning in figures
    ]
    return f'<div class="cards">{"".join(boxes)}</div>'


def framed(chart: Chart, remark: str = "") -> str:
    """A bare chart with its title, unit and legend as text around it."""
    unit = f"<small>{text(chart.y_label)}</small>" if chart.y_label else ""
    return (
        f"<figure><figcaption><b>{text(chart.title)}</b> {unit}</figcaption>{legend(chart.names)}"
        f"{chart.svg()}{note(remark) if remark else ''}</figure>"
    )


def legend(names: Iterable[tuple[str, int]]) -> str:
    """What colors stand for: (name, color)."""
    keys = "".join(f'<i><s style="background:var(--c{color % COLORS})"></s>{text(name)}</i>' for name, color in names)
    return f'<div class="legend">{keys}</div>'
