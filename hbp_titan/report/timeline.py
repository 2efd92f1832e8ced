"""The timeline of a run: which level each step trained, and below it what happened at which step.

Owns its drawing. Lanes are stretched to the page's width, so their words stand beside them as text of the page.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hbp_titan.packing.svg import COLORS, ticks
from hbp_titan.report.parts import folded, legend, missing, note, section, table, text
from hbp_titan.report.run_folder import Run
from hbp_titan.report.step_log import Floats, StepLog

BUCKETS = 480
"""Columns of a lane: steps of a longer run share a column, and marks of one column share a mark."""
WIDTH = 1000
LISTED_STEPS = 10


def timeline_section(run: Run) -> str:
    """The section; what a column of a lane stands for is said below it."""
    log = run.log
    if not log.levels:
        return section("Curriculum", "", missing("metrics.jsonl does not say which level its steps trained."))
    first, last = int(log.steps[0]), int(log.steps[-1])
    shares = _shares(run)
    lanes = [_lane("levels", _bands(shares, log), "tall")]
    for name, steps, tips, color in _events(run):
        if steps:
            lanes.append(_lane(f"{name} ({len(steps):,})", _marks(steps, tips, first, last, color), ""))
    columns = shares.shape[1]
    grain = "a column is a step" if columns == len(log) else f"a column is {len(log) / columns:,.1f} steps"
    remark = f"{len(log):,} steps, {grain}; where levels share a column its height is parted by their iterations."
    body = f'{_level_legend(log)}<div class="lanes">{"".join(lanes)}{_axis(first, last)}</div>'
    return section("Curriculum", _story(run), f'<figure class="wide">{body}{note(remark)}</figure>', _skipped(log))


def _skipped(log: StepLog) -> str:
    """The steps that were not applied, and why."""
    if not log.skipped:
        return ""
    rows = [[f"{step:,}", text(reason)] for step, reason in log.skipped.items()]
    listed = table(("skipped step", "why"), rows[:LISTED_STEPS])
    if len(rows) > LISTED_STEPS:
        rest = table(("skipped step", "why"), rows[LISTED_STEPS:])
        listed += folded(f"{len(rows) - LISTED_STEPS:,} more skipped steps", rest)
    return listed


def levels_side_by_side(runs: Sequence[Run]) -> str:
    """The lane of levels of each run, from its first step to its last."""
    known = [run for run in runs if run.log.levels]
    if not known:
        return ""
    lanes = [
        f'<span class="name">{text(run.name)}</span>{_level_legend(run.log)}'
        + _lane(f"{len(run.log):,} steps", _bands(_shares(run), run.log), "tall")
        for run in known
    ]
    caption = "<figcaption><b>Levels</b> <small>from the first step to the last</small></figcaption>"
    return f'<figure class="wide">{caption}<div class="lanes">{"".join(lanes)}</div></figure>'


def _story(run: Run) -> str:
    """What the order of levels is, in words."""
    mix, share = run.setting("packing", "mix"), run.setting("packing", "curriculum_steps")
    if not mix:
        return "Which level each optimizer step trained."
    order = {
        "alternate": "Each optimizer step trains one level, in random order",
        "interleave": "Each optimizer step holds its share of every level",
    }.get(str(mix), f"Mix: {mix}")
    if not isinstance(share, (int, float)) or share <= 0:
        return f"{order}; no curriculum."
    steps = f"{share:.0%} of the first epoch's steps" if share < 1 else f"{share:.0f} steps"
    return f"{order}; the curriculum puts {steps} of the lowest level first."


def _shares(run: Run) -> Floats:
    """Share of each level in the iterations of each column, float64 [levels, columns].

    Where a run does not record them by level, a step's iterations are parted evenly between its levels.
    """
    log = run.log
    member = np.stack([log.present("loss_by_level", name) for name in log.levels]).astype(float)
    weights = member / np.maximum(member.sum(0), 1) * np.nan_to_num(log.column("iterations"), nan=1.0)
    for at, name in enumerate(log.levels):
        recorded = log.column("per_level", name, "iterations")
        weights[at] = np.where(np.isfinite(recorded), recorded, weights[at])
    columns = min(BUCKETS, len(log))
    starts = np.arange(columns) * len(log) // columns
    sums = np.add.reduceat(weights, starts, axis=1)
    return sums / np.maximum(sums.sum(0), 1e-9)


def _level_legend(log: StepLog) -> str:
    return legend([(name, log.color(name)) for name in log.levels])


def _bands(shares: Floats, log: StepLog) -> str:
    """Columns as stacked rectangles; equal neighbours are one."""
    marks = []
    columns = shares.shape[1]
    borders = np.flatnonzero(np.append(True, np.any(np.diff(shares, axis=1) != 0, axis=0)))
    for start, end in zip(borders.tolist(), [*borders[1:].tolist(), columns], strict=True):
        below = 0.0
        for at, level in enumerate(log.levels):
            share = float(shares[at, start])
            if share > 0:
                x, width, height = start * WIDTH / columns, (end - start) * WIDTH / columns, 100 * share
                # Wider by a hair: no gap shines through between neighbours.
                place = f'x="{x:.2f}" width="{width + 0.4:.2f}" y="{100 - below - height:.1f}" height="{height:.1f}"'
                marks.append(f'<rect {place} fill="var(--c{log.color(level) % COLORS})"/>')
                below += height
    return "".join(marks)


def _events(run: Run) -> list[tuple[str, list[int], list[str], int]]:
    """(name, steps, a tip each, color) of what a lane of marks shows."""
    log = run.log
    steps = log.steps
    epoch = log.column("epoch")
    begun = (np.flatnonzero(np.diff(epoch) > 0) + 1).tolist()
    saved = steps[np.isfinite(log.column("checkpoint_blocked_seconds"))].tolist()
    saved = sorted({*saved, *(step for step in run.checkpoints if steps[0] <= step <= steps[-1])})
    validated = steps[np.isfinite(log.column("validation", "loss"))].tolist()
    losses = log.column("validation", "loss")[np.isfinite(log.column("validation", "loss"))].tolist()
    starts = [start for start in run.starts[1:] if isinstance(start.get("first_step"), int)]
    starts = [start for start in starts if steps[0] <= start["first_step"] <= steps[-1] + 1]
    resumed = [f"resumed with step {s['first_step']} on {s.get('world_size', '?')} ranks" for s in starts]
    skipped = [step for step in log.skipped if steps[0] <= step <= steps[-1]]
    return [
        ("epochs", [int(steps[at]) for at in begun], [f"epoch {epoch[at]:.0f} begins" for at in begun], 4),
        ("validations", validated, [f"step {s}: {loss:.4f}" for s, loss in zip(validated, losses, strict=True)], 2),
        ("checkpoints", saved, [f"step {step}" for step in saved], 0),
        ("resumes", [start["first_step"] for start in starts], resumed, 3),
        ("skipped steps", skipped, [f"step {step}: {log.skipped[step]}" for step in skipped], 7),
    ]  # fmt: skip


def _marks(steps: Sequence[int], tips: Sequence[str], first: int, last: int, color: int) -> str:
    """A tick for each column that has an event, with the tips of the first of them."""
    columns: dict[int, list[str]] = {}
    for step, tip in zip(steps, tips, strict=True):
        place = (step - first + 0.5) / (last - first + 1)
        columns.setdefault(min(int(place * BUCKETS), BUCKETS - 1), []).append(tip)
    marks = []
    for column, told in columns.items():
        x = (column + 0.5) * WIDTH / BUCKETS
        more = f" and {len(told) - 3} more" if len(told) > 3 else ""
        marks.append(
            f'<g><title>{text("; ".join(told[:3]) + more)}</title><rect x="{x - 5:.1f}" y="0" width="10" height="100" '
            f'fill="transparent"/><line x1="{x:.1f}" x2="{x:.1f}" y1="8" y2="92" stroke="var(--c{color})"/></g>'
        )
    return "".join(marks)


def _lane(name: str, marks: str, kind: str) -> str:
    return (
        f'<span class="name">{text(name)}</span><svg class="lane {kind}" viewBox="0 0 {WIDTH} 100" role="img" '
        f'aria-label="{text(name)}" preserveAspectRatio="none">{marks}</svg>'
    )


def _axis(first: int, last: int) -> str:
    """Steps below the lanes."""
    steps = [step for step in ticks(first, max(last, first + 4)) if step <= last and step == int(step)]
    shown = []
    for step in steps:
        place = 100 * (step - first + 0.5) / (last - first + 1)
        where = f'style="left:{place:.2f}%"' if place < 95 else 'class="end"'
        shown.append(f"<span {where}>{step:,.0f}</span>")
    return f'<span class="name">step</span><div class="axis">{"".join(shown)}</div>'
