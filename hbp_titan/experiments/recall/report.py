"""Accuracy of recall runs, as Markdown tables and a heat map: by distance and level, and what each fault breaks."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hbp_titan.experiments.recall.documents import VALUES
from hbp_titan.experiments.recall.runs import Scores
from hbp_titan.packing.level import format_tokens
from hbp_titan.report.charts import DOCUMENT_STYLE

BANDS = (64, 128, 256, 512, 1024, 2048, 4096)
"""Longest distance of each band, in tokens."""
MIN_ANSWERS = 10
"""A cell with fewer answers is not shown: one answer would move it by 10%."""
TITLES = {
    "sound": "sound",
    "mask": "documents see each other",
    "positions": "positions count per shard",
    "cp": "shards see only themselves",
}


def columns_of(scores: Scores) -> dict[str, NDArray[Any]]:
    """Return the lists of `scores` as arrays."""
    return {name: np.asarray(values) for name, values in scores.items()}


def accuracy(columns: Mapping[str, NDArray[Any]], chosen: NDArray[np.bool_]) -> tuple[float, int]:
    """Return the share of correct answers among the chosen ones, nan without any, and their number."""
    correct = columns["correct"][chosen]
    return float(correct.mean()) if len(correct) else float("nan"), len(correct)


def by_distance(scores: Scores, levels: int) -> list[list[tuple[float, int]]]:
    """Return accuracy and number of answers of each band (row) and level (column), of keys written once."""
    columns = columns_of(scores)
    band, once = np.searchsorted(BANDS, columns["distance"]), ~columns["rewritten"]
    return [
        [accuracy(columns, once & (band == row) & (columns["level"] == level)) for level in range(levels)]
        for row in range(len(BANDS))
    ]


def _band_name(row: int) -> str:
    return f"{(BANDS[row - 1] if row else 0) + 1:,} to {format_tokens(BANDS[row])}"


def _percent(found: tuple[float, int]) -> str:
    return f"{100 * found[0]:.0f}%" if found[1] >= MIN_ANSWERS else ""


def distance_table(outcome: Mapping[str, Any]) -> str:
    """Return one row per distance with the accuracy of each level, packed, and of all levels alone; keys written once.

    An asterisk marks distances above the level's shard: question and value are then on different ranks.
    """
    names, shards = outcome["levels"], outcome["shards"]
    heads = [f"{name} (shard {format_tokens(shard)})" for name, shard in zip(names, shards, strict=True)]
    lines = [f"| tokens between value and question | {' | '.join(heads)} | alone, all levels |"]
    lines.append("|---" * (len(names) + 2) + "|")
    alone = columns_of(outcome["alone"])
    bands = np.where(alone["rewritten"], -1, np.searchsorted(BANDS, alone["distance"]))
    for row, cells in enumerate(by_distance(outcome["packed"], len(names))):
        beyond = ["*" if row and BANDS[row - 1] >= shard else "" for shard in shards]
        texts = [f"{_percent(cell)}{mark}" if _percent(cell) else "" for cell, mark in zip(cells, beyond, strict=True)]
        lines.append(f"| {_band_name(row)} | {' | '.join(texts)} | {_percent(accuracy(alone, bands == row))} |")
    return "\n".join(lines)


def fault_table(outcomes: Mapping[str, Mapping[str, Any]]) -> str:
    """Return one row per run: accuracy of all answers and of those that a fault should break.

    The columns are of keys written once but for all answers and those named twice.
    """
    heads = (
        "run", "all answers", "on the question's rank", "1 rank away", "2 or 3 ranks away", "first in its pack",
        "after other documents", "twice, on another rank", "all answers, alone",
    )  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for fault, outcome in outcomes.items():
        columns = columns_of(outcome["packed"])
        away, before, once = columns["ranks_away"], columns["documents_before"], ~columns["rewritten"]
        chosen = (
            away >= 0, once & (away == 0), once & (away == 1), once & (away > 1), once & (before == 0),
            once & (before > 0), rewritten_elsewhere(columns),
        )  # fmt: skip
        alone = columns_of(outcome["alone"])
        cells = [*(accuracy(columns, part) for part in chosen), accuracy(alone, alone["distance"] > 0)]
        lines.append(f"| {TITLES[fault]} | {' | '.join(map(_percent, cells))} |")
    return "\n".join(lines)


def rewritten_elsewhere(columns: Mapping[str, NDArray[Any]]) -> NDArray[np.bool_]:
    """Return which answers are of keys written twice, whose later value is on another rank than the question."""
    return columns["rewritten"] & (columns["ranks_away"] > 0)


_CELL, _ROW, _LEFT, _TOP, _BOTTOM, _GAP, _MIN_WIDTH = 62, 26, 96, 74, 48, 18, 800


def draw(outcomes: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the heat maps of all runs as an SVG document: rows are distances, columns levels.

    The last row is of keys written twice, whose later value is on another rank.
    """
    first = next(iter(outcomes.values()))
    panel_width = _CELL * len(first["levels"]) + _GAP
    width = max(_LEFT + panel_width * len(outcomes), _MIN_WIDTH)
    height = _y(len(BANDS) + 1) + _BOTTOM
    title = "Recall by distance and level: sound training reads other ranks' shards, each fault breaks what it should"
    parts = [f'<text class="title" x="10" y="18">{html.escape(title)}</text>']
    names = ["distance", *map(_band_name, range(len(BANDS))), "written twice"]
    for row, name in enumerate(names):
        parts.append(f'<text x="{_LEFT - 8}" y="{_y(row - 1) + 15}" text-anchor="end">{name}</text>')
    for number, (fault, outcome) in enumerate(outcomes.items()):
        x = _LEFT + number * panel_width
        parts.append(f'<g transform="translate({x} 0)">{"".join(_panel(fault, outcome))}</g>')
    notes = (
        "Distance: tokens from value to question, of keys written once. Framed: longer than a rank's shard, so the "
        f"value is on another rank. Chance: {100 / VALUES:.0f}%.",
        "Written twice: of keys with an earlier value, whose later value is on another rank. Taking either: 50%.",
    )
    for line, note in enumerate(notes):
        parts.append(f'<text x="10" y="{height - 26 + 16 * line}">{html.escape(note)}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
        f'{DOCUMENT_STYLE}<rect width="{width}" height="{height}" fill="var(--paper)"/>{"".join(parts)}</svg>\n'
    )


def _y(row: int) -> int:
    # A gap before the row of keys written twice.
    return _TOP + _ROW * row + (8 if row >= len(BANDS) else 0)


def _panel(fault: str, outcome: Mapping[str, Any]) -> list[str]:
    names: Sequence[str] = outcome["levels"]
    parts = [f'<text x="0" y="40" font-weight="600">{html.escape(TITLES[fault])}</text>']
    for column, name in enumerate(names):
        middle = _CELL * (column + 0.5) - 2
        parts.append(f'<text x="{middle}" y="{_y(-1) + 15}" text-anchor="middle">{html.escape(name)}</text>')
    columns = columns_of(outcome["packed"])
    twice = rewritten_elsewhere(columns)
    last = [accuracy(columns, twice & (columns["level"] == level)) for level in range(len(names))]
    for row, cells in enumerate([*by_distance(outcome["packed"], len(names)), last]):
        for column, cell in enumerate(cells):
            beyond = row == len(BANDS) or (row > 0 and BANDS[row - 1] >= outcome["shards"][column])
            if cell[1] >= MIN_ANSWERS:
                parts.append(_cell(_CELL * column, _y(row), *cell, beyond))
    return parts


def _cell(x: int, y: int, share: float, count: int, framed: bool) -> str:
    # White at chance and below, the first color of the charts at 1.
    depth = max(0.0, (share - 1 / VALUES) / (1 - 1 / VALUES))
    stroke = 'stroke="var(--ink)" stroke-width="1.5"' if framed else 'stroke="var(--grid)"'
    ink = ' fill="#fff"' if depth > 0.6 else ""
    return (
        f'<rect x="{x}" y="{y}" width="{_CELL - 4}" height="{_ROW - 4}" fill="var(--c0)" '
        f'fill-opacity="{0.85 * depth:.2f}" {stroke}><title>{count} answers</title></rect>'
        f'<text x="{x + _CELL / 2 - 2}" y="{y + 15}" text-anchor="middle"{ink}>{100 * share:.0f}%</text>'
    )
