"""Scores as one SVG picture: tasks by length, and for each task with a depth its depths by length.

Owns the drawing. Each cell shows its figure, so the picture can be read without its colours.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from hbp_titan.evaluation.needle_suite import Scored, mean_scores
from hbp_titan.utils import human_count

CELL_WIDTH, CELL_HEIGHT, LEFT, TITLE, GAP = 58, 24, 150, 30, 34


def heat_maps(scored: Sequence[Scored]) -> str:
    """The SVG document. Rows are tasks, then depths from the start of the text downwards; columns are lengths."""
    lengths = sorted({item.length for item in scored})
    panels = [_panel("score by task", mean_scores(scored, "task", "length"), lengths)]
    for task in dict.fromkeys(item.task for item in scored if item.depth is not None):
        means = mean_scores([item for item in scored if item.task == task], "depth", "length")
        panels.append(_panel(f"{task}: score by depth", means, lengths))
    width, height, parts = LEFT + CELL_WIDTH * len(lengths) + 20, 10, []
    for panel, panel_height in panels:
        parts.append(f'<g transform="translate(0 {height})">{panel}</g>')
        height += panel_height
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="11">'
        f'<rect width="100%" height="100%" fill="white"/>{"".join(parts)}</svg>\n'
    )


def _panel(title: str, means: Mapping[tuple[Any, ...], float], lengths: Sequence[int]) -> tuple[str, int]:
    """The panel and its height. means: by (row, length)."""
    rows = list(dict.fromkeys(row for row, _ in means))
    parts = [f'<text x="10" y="14" font-weight="bold" font-size="13">{html.escape(title)}</text>']
    for y, row in enumerate(rows):
        top = TITLE + y * CELL_HEIGHT
        name = row if isinstance(row, str) else f"depth {row:.0%}"
        parts.append(f'<text x="{LEFT - 8}" y="{top + 16}" text-anchor="end">{html.escape(name)}</text>')
        for x, length in enumerate(lengths):
            if (row, length) in means:
                parts.append(_cell(LEFT + x * CELL_WIDTH, top, means[row, length], f"{name}, {length} tokens"))
    bottom = TITLE + len(rows) * CELL_HEIGHT
    for x, length in enumerate(lengths):
        middle = LEFT + (x + 0.5) * CELL_WIDTH
        parts.append(f'<text x="{middle}" y="{bottom + 14}" text-anchor="middle">{human_count(length, 1024)}</text>')
    return "".join(parts), bottom + GAP


def _cell(left: float, top: float, score: float, tip: str) -> str:
    # From red (0) over yellow to green (1), all light enough for black figures.
    return (
        f'<rect x="{left}" y="{top}" width="{CELL_WIDTH - 2}" height="{CELL_HEIGHT - 2}" '
        f'fill="hsl({120 * score:.0f} 70% 65%)"><title>{html.escape(tip)}: {score:.1%}</title></rect>'
        f'<text x="{left + CELL_WIDTH / 2 - 1}" y="{top + 15}" text-anchor="middle">{100 * score:.0f}</text>'
    )
