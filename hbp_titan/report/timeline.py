"""Timeline of a plan: what each rank does in a window of micro-batches, and how long it waits for the slowest one.

Panels of one figure share their time axis: one pack length, levels without balancing, and the plan itself. Owns the
choice of the window and the drawing, as a figure of a page and as an SVG document of its own.

Shape suffixes: P packs, I micro-batches of the window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from hbp_titan.packing.level import level_name
from hbp_titan.packing.plan import Plan
from hbp_titan.packing.ragged import shuffled
from hbp_titan.report.charts import ticks
from hbp_titan.report.html import NUM_COLORS, PALETTE, legend, note, text
from hbp_titan.report.methods import label_of, planned_by
from hbp_titan.report.run import Floats

MICRO_BATCHES = 18
"""Micro-batches of the plan in the window, in the mean."""
MAX_RANKS = 64
"""Rows of a panel; a larger world shows its first ranks."""
WIDTH = 1000
WAITING = "waiting for the slowest rank"


@dataclass(frozen=True)
class Panel:
    """Rows of ranks over time.

    title: what it shows. plan: whose packs. cost_P: time of each pack on its ranks, float64 [P]. colors: color of each
    level of the plan.
    """

    title: str
    plan: Plan
    cost_P: Floats
    colors: tuple[int, ...]

    @property
    def idle(self) -> float:
        """Share of the ranks' time spent waiting, over the whole plan."""
        return idle_of(self.plan, self.cost_P)


def idle_of(plan: Plan, cost_P: Floats) -> float:
    """Return the share of time that ranks wait for the slowest one. cost_P: of each pack on its ranks."""
    mean, slowest = plan.over_ranks(cost_P)
    return max(0.0, 1 - float(mean.sum() / slowest.sum()))


def modeled(plan: Plan) -> Floats:
    """Return the modeled time of each pack on each of its ranks, float64 [P], in the unit of the plan's costs."""
    return plan.pack_costs(plan.costs) / plan.pack_degrees


def unbalanced(plan: Plan, cost_P: Floats) -> Floats:
    """Return the costs with the packs of each level in random order: what the plan is without balancing."""
    mixed = cost_P.copy()
    for k in np.unique(plan.pack_levels).tolist():
        own = np.flatnonzero(plan.pack_levels == k)
        mixed[own] = cost_P[own][shuffled(len(own), plan.seed, plan.epoch, k)]
    return mixed


def panels_of(plan: Plan, isf: Plan | None = None, cost_of: Callable[[Plan], Floats] = modeled) -> list[Panel]:
    """Return the panels of a plan: one pack length in random order, its packs in random order, and itself.

    isf: the same samples at one pack length [planned here]. cost_of: time of each pack on its ranks.
    """
    colors = tuple(range(len(plan.levels)))
    own = cost_of(plan)
    panels = []
    if plan.method != "isf":
        isf = isf or planned_by(plan, "isf")
        forms = [(level.max_tokens, level.cp_degree) for level in plan.levels]
        of_levels = tuple(forms.index((level.max_tokens, level.cp_degree)) for level in isf.levels)
        panels.append(Panel(f"One pack length ({label_of('isf')})", isf, cost_of(isf), of_levels))
    # Levels side by side have packs of several levels in a micro-batch, which an order per level does not describe.
    if plan.method != "isf" and plan.level_order != "parallel":
        panels.append(Panel("The plan's packs in random order", plan, unbalanced(plan, own), colors))
    panels.append(Panel(f"The plan ({label_of(plan.method)})", plan, own, colors))
    return panels


def _window(plan: Plan, slowest_I: Floats, span: float) -> tuple[int, int]:
    """Return the first and the end micro-batch of the window of `span` whose levels share its time as in the epoch."""
    ends = np.cumsum(slowest_I)
    firsts = plan.step_offsets[:-1]
    # A window that the end of the epoch cuts off is short.
    whole = firsts[ends[firsts] - slowest_I[firsts] <= ends[-1] - 0.999 * span]
    firsts = whole if len(whole) else firsts[:1]
    lasts = np.minimum(np.searchsorted(ends, ends[firsts] - slowest_I[firsts] + 0.999 * span), len(ends) - 1)
    differs = np.zeros(len(firsts))
    for k in np.unique(plan.pack_levels).tolist():
        ranks = np.add.reduceat((plan.pack_levels == k) * plan.pack_degrees, plan.pack_offsets[:-1])
        time = np.append(0.0, np.cumsum(ranks / plan.world_size * slowest_I))
        differs += np.abs((time[lasts + 1] - time[firsts]) / span - time[-1] / ends[-1])
    best = int(differs.argmin())
    return int(firsts[best]), int(lasts[best]) + 1


def window_span(panels: Sequence[Panel]) -> float:
    """Return the time that the panels show: MICRO_BATCHES of the last one."""
    slowest_I = panels[-1].plan.over_ranks(panels[-1].cost_P)[1]
    return float(slowest_I.mean()) * min(MICRO_BATCHES, len(slowest_I))


def _shapes(panel: Panel, span: float, width: float, height: float) -> str:
    """Return the panel's micro-batches as paths, one for the waiting and one per level, in a box of this size."""
    plan, ranks = panel.plan, min(panel.plan.world_size, MAX_RANKS)
    slowest_I = plan.over_ranks(panel.cost_P)[1]
    first, end = _window(plan, slowest_I, span)
    across, row = width / span, height / ranks
    # A gap between neighbors, unless it would be most of a row.
    gap = min(1.0, row / 6)
    paths: dict[str, list[str]] = {"wait": []}
    time = 0.0
    for index in range(first, end):
        left = across * time
        right = min(across * (time + slowest_I[index]), width)
        if right - left < 1.5:
            break
        whole = right - left - 1
        for at in range(plan.pack_offsets[index], plan.pack_offsets[index + 1]):
            rank = int(plan.rank_slots[at]) % plan.world_size
            if rank >= ranks:
                continue
            color = f"c{panel.colors[plan.pack_levels[at]] % NUM_COLORS}"
            busy = min(across * panel.cost_P[at], whole) if plan.packs.counts[at] else 0.0
            y, rows = rank * row, min(int(plan.pack_degrees[at]), ranks - rank) * row - gap
            for name, x, wide in ((color, left, busy), ("wait", left + busy, whole - busy)):
                if wide >= 0.1:
                    paths.setdefault(name, []).append(_box(x, y, wide, rows))
        time += slowest_I[index]
    return "".join(f'<path d="{"".join(boxes)}" fill="var(--{name})"/>' for name, boxes in paths.items() if boxes)


def _box(x: float, y: float, width: float, height: float) -> str:
    return f"M{x:.1f} {y:.1f}h{width:.1f}v{height:.1f}h{-width:.1f}z"


def _legend_of(panels: Sequence[Panel]) -> list[tuple[str, str]]:
    """Return (name, CSS color variable) of the levels and of the waiting."""
    plan = panels[-1].plan
    names = []
    for k in np.unique(plan.pack_levels).tolist():
        degree = plan.levels[k].cp_degree
        shared = "one rank per pack" if degree == 1 else f"{degree} ranks share a pack"
        names.append((f"{level_name(plan.levels[k])}: {shared}", f"c{k % NUM_COLORS}"))
    return [*names, (WAITING, "wait")]


def timeline_figure(plan: Plan) -> str:
    """Return the figure of a page: the panels of the plan by its modeled costs."""
    panels = panels_of(plan)
    span = window_span(panels)
    ranks = min(plan.world_size, MAX_RANKS)
    height = max(40, min(180, 18 * ranks))
    lanes = []
    for panel in panels:
        lanes.append(
            f'<p class="panel"><b>{text(panel.title)}</b>: ranks wait {panel.idle:.2%} of the time</p>'
            f'<svg class="lane" style="height:{height}px" viewBox="0 0 {WIDTH} {height}" role="img" '
            f'aria-label="{text(panel.title)}" preserveAspectRatio="none">{_shapes(panel, span, WIDTH, height)}</svg>'
        )
    most = max(panels, key=lambda panel: panel.idle)
    title = f"Ranks wait {panels[-1].idle:.2%} of the time"
    if most is not panels[-1]:
        title += f"; {most.title[0].lower()}{most.title[1:]}: {most.idle:.2%}"
    shown = f"The first {ranks} of {plan.world_size:,} ranks" if ranks < plan.world_size else f"{ranks} ranks"
    remark = (
        f"A row is a rank, a box its pack; the same time from left to right in all panels, by the plan's cost model. "
        f"{shown}, in a stretch with all levels; the percentages are of the whole plan."
    )
    return (
        f'<figure class="wide"><figcaption><b>{text(title)}</b> <small>ranks over modeled time</small></figcaption>'
        f"{legend(_legend_of(panels))}{''.join(lanes)}{note(remark)}</figure>"
    )


LEFT, TOP, PANEL, HEAD = 54, 40, 108, 30
DOCUMENT_WIDTH = 920


def timeline_document(panels: Sequence[Panel], description: str) -> str:
    """Return the panels as an SVG document, readable on a light and on a dark page. Costs are in seconds.

    description: below the axis, where the times come from.
    """
    span = window_span(panels)
    width = DOCUMENT_WIDTH - LEFT - 20
    parts, y = [], TOP
    for panel in panels:
        ranks = min(panel.plan.world_size, MAX_RANKS)
        parts += [
            f'<text x="{LEFT}" y="{y + 18}"><tspan class="head">{text(panel.title)}: ranks wait {panel.idle:.1%} of '
            f"the time</tspan></text>",
            f'<g transform="translate({LEFT} {y + HEAD})">{_shapes(panel, span, width, PANEL)}</g>',
            f'<text x="{LEFT - 8}" y="{y + HEAD + 10}" class="soft end">rank 0</text>',
            f'<text x="{LEFT - 8}" y="{y + HEAD + PANEL}" class="soft end">{ranks - 1}</text>',
        ]
        y += HEAD + PANEL + 8
    for second in ticks(0, span):
        parts.append(f'<text x="{LEFT + width * second / span:.1f}" y="{y + 12}" class="soft mid">{second:g}</text>')
    parts.append(f'<text x="{LEFT}" y="{y + 32}" class="soft">{text(description)}</text>')
    at = LEFT
    for name, color in _legend_of(panels):
        parts.append(f'<rect x="{at}" y="15" width="12" height="12" rx="2" fill="var(--{color})"/>')
        parts.append(f'<text x="{at + 18}" y="26" class="soft">{text(name)}</text>')
        at += 40 + round(6.6 * len(name))
    height = y + 44
    titles = "; ".join(f"{panel.title}: ranks wait {panel.idle:.1%}" for panel in panels)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {DOCUMENT_WIDTH} {height}" width="{DOCUMENT_WIDTH}" '
        f'height="{height}" role="img" aria-label="{text(titles)}"><style>{PALETTE.replace(":root", "svg")}'
        'text{font:13px -apple-system,"Segoe UI","DejaVu Sans",sans-serif;fill:var(--ink)}.head{font-weight:600}'
        ".soft{fill:var(--soft);font-size:12px}.mid{text-anchor:middle}.end{text-anchor:end}</style>"
        f'<rect width="{DOCUMENT_WIDTH}" height="{height}" rx="8" fill="var(--paper)"/>{"".join(parts)}</svg>\n'
    )
