"""Report section on the curriculum: the level of each step, and the steps at which something happened.

Owns the drawing of lanes: they are stretched to the width of the page, so their labels are text of the page next to
them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hbp_titan.report.charts import ticks
from hbp_titan.report.html import NUM_COLORS, caption, legend, missing, note, section, table, text
from hbp_titan.report.run import Floats, Run, StepLog
from hbp_titan.report.series import level_steps, totals
from hbp_titan.utils import first_n

LANE_COLUMNS = 480
"""Columns of a lane: steps of a longer run share a column, and marks of one column share a mark."""
LANE_WIDTH = 1000
MAX_SKIPPED = 10
MAX_TIPS = 3


def curriculum_section(run: Run) -> str:
    """Return the section with the level of each step, and the steps at which something happened."""
    log = run.log
    if not log.levels:
        return section("Curriculum", "", missing("metrics.jsonl does not contain the level that each step trained."))
    first, last = int(log.steps[0]), int(log.steps[-1])
    shares = _level_shares(run)
    lanes = [_lane("levels", _stacked(shares, log), "tall")]
    for name, steps, tips, color in _events(run):
        if steps:
            lanes.append(_lane(f"{name} ({len(steps):,})", _marks(steps, tips, first, last, color), ""))
    columns = shares.shape[1]
    scale = "a column is a step" if columns == len(log) else f"a column is {len(log) / columns:,.1f} steps"
    remark = f"{len(log):,} steps, {scale}; levels of the same column share its height by their micro-batches."
    body = f'{_level_legend(log)}<div class="lanes">{"".join(lanes)}{_axis(first, last)}</div>'
    rows = [[f"{step:,}", text(reason)] for step, reason in log.skipped.items()]
    skipped = table(("skipped step", "why"), rows, limit=MAX_SKIPPED) if rows else ""
    head = caption(_level_message(log), "level of each step, and events")
    return section(
        "Curriculum", _level_order(run), f'<figure class="wide">{head}{body}{note(remark)}</figure>', skipped
    )


def _level_message(log: StepLog) -> str:
    """Return each level's share of the time as a sentence."""
    seconds = {name: totals(of).seconds for name, of in level_steps(log).items()}
    whole = sum(seconds.values())
    if not whole:
        return "Levels over the steps"
    return "Share of the time: " + ", ".join(f"{name} {of / whole:.0%}" for name, of in seconds.items())


def levels_side_by_side(runs: Sequence[Run]) -> str:
    """Return the lane of levels of each run, from its first step to its last."""
    known = [run for run in runs if run.log.levels]
    if not known:
        return ""
    lanes = [
        f'<span class="name">{text(run.name)}</span>{_level_legend(run.log)}'
        + _lane(f"{len(run.log):,} steps", _stacked(_level_shares(run), run.log), "tall")
        for run in known
    ]
    head = caption("Levels", "from the first step to the last")
    return f'<figure class="wide">{head}<div class="lanes">{"".join(lanes)}</div></figure>'


def _level_order(run: Run) -> str:
    """Return the configured order of levels in words."""
    level_order, curriculum = run.setting("packing", "level_order"), run.setting("packing", "curriculum_steps")
    if not level_order:
        return "Which level each optimizer step trained."
    order = {
        "alternate": "Each optimizer step trains one level, in random order",
        "interleave": "Each optimizer step trains its share of every level",
    }.get(str(level_order), f"Level order: {level_order}")
    if not isinstance(curriculum, (int, float)) or curriculum <= 0:
        return f"{order}; no curriculum."
    steps = f"{curriculum:.0%} of the first epoch's steps" if curriculum < 1 else f"{curriculum:.0f} steps"
    return f"{order}; the curriculum puts {steps} of the lowest level first."


def _level_shares(run: Run) -> Floats:
    """Return the share of each level in the micro-batches of each column, float64 [levels, columns]."""
    log = run.log
    # `present`, because a level without trained tokens has null as its loss.
    member = np.stack([log.present("loss_by_level", name) for name in log.levels]).astype(float)
    # A step without counts per level is divided evenly between its levels.
    weights = member / np.maximum(member.sum(0), 1) * np.nan_to_num(log.column("micro_batches"), nan=1.0)
    for index, name in enumerate(log.levels):
        # Runs of older versions have no counts per level.
        recorded = log.column("per_level", name, "micro_batches")
        weights[index] = np.where(np.isfinite(recorded), recorded, weights[index])
    columns = min(LANE_COLUMNS, len(log))
    starts = np.arange(columns) * len(log) // columns
    # Sums, not samples: a column of many steps shows the share of each level in all of them.
    sums = np.add.reduceat(weights, starts, axis=1)
    return sums / np.maximum(sums.sum(0), 1e-9)


def _level_legend(log: StepLog) -> str:
    return legend([(name, log.color(name)) for name in log.levels])


def _stacked(shares: Floats, log: StepLog) -> str:
    """Return the columns as stacked rectangles; equal neighbors are one rectangle."""
    marks = []
    columns = shares.shape[1]
    starts = np.flatnonzero(np.append(True, np.any(np.diff(shares, axis=1) != 0, axis=0))).tolist()
    for start, end in zip(starts, [*starts[1:], columns], strict=True):
        below = 0.0
        for index, level in enumerate(log.levels):
            height = 100 * float(shares[index, start])
            if height > 0:
                x, width = start * LANE_WIDTH / columns, (end - start) * LANE_WIDTH / columns
                # Slightly wider, so that the background does not show between neighbors.
                box = f'x="{x:.2f}" width="{width + 0.4:.2f}" y="{100 - below - height:.1f}" height="{height:.1f}"'
                marks.append(f'<rect {box} fill="var(--c{log.color(level) % NUM_COLORS})"/>')
                below += height
    return "".join(marks)


def _events(run: Run) -> list[tuple[str, list[int], list[str], int]]:
    """Return (name, steps, a tooltip per step, color) of each lane of marks."""
    log, steps, epoch = run.log, run.log.steps, run.log.column("epoch")
    # The first recorded step begins no new epoch.
    epoch_starts = (np.flatnonzero(np.diff(epoch) > 0) + 1).tolist()
    saved = steps[np.isfinite(log.column("checkpoint_blocked_seconds"))].tolist()
    # Also checkpoints on disk whose time was not recorded, such as the one of a preempted run.
    saved = sorted({*saved, *(step for step in run.checkpoints if steps[0] <= step <= steps[-1])})
    losses = log.column("validation", "loss")
    validated = np.flatnonzero(np.isfinite(losses)).tolist()
    starts = [start for start in run.starts[1:] if isinstance(start.get("first_step"), int)]
    starts = [start for start in starts if steps[0] <= start["first_step"] <= steps[-1] + 1]
    resumed = [f"resumed with step {s['first_step']} on {s.get('world_size', '?')} ranks" for s in starts]
    skipped = [step for step in log.skipped if steps[0] <= step <= steps[-1]]
    return [
        ("epochs", [int(steps[i]) for i in epoch_starts], [f"epoch {epoch[i]:.0f} begins" for i in epoch_starts], 4),
        (
            "validations",
            [int(steps[i]) for i in validated],
            [f"step {steps[i]}: {losses[i]:.4f}" for i in validated],
            2,
        ),
        ("checkpoints", saved, [f"step {step}" for step in saved], 0),
        ("resumes", [start["first_step"] for start in starts], resumed, 3),
        ("skipped steps", skipped, [f"step {step}: {log.skipped[step]}" for step in skipped], 7),
    ]


def _marks(steps: Sequence[int], tips: Sequence[str], first: int, last: int, color: int) -> str:
    """Return one mark per column that has an event, with the tooltips of its first events."""
    columns: dict[int, list[str]] = {}
    for step, tip in zip(steps, tips, strict=True):
        # In the middle of the step's share of the width.
        position = (step - first + 0.5) / (last - first + 1)
        columns.setdefault(min(int(position * LANE_COLUMNS), LANE_COLUMNS - 1), []).append(tip)
    marks = []
    for column, own in columns.items():
        x = (column + 0.5) * LANE_WIDTH / LANE_COLUMNS
        marks.append(
            f'<g><title>{text(first_n(own, MAX_TIPS, "; "))}</title><rect x="{x - 5:.1f}" y="0" width="10" '
            f'height="100" fill="transparent"/><line x1="{x:.1f}" x2="{x:.1f}" y1="8" y2="92" '
            f'stroke="var(--c{color})"/></g>'
        )
    return "".join(marks)


def _lane(name: str, marks: str, kind: str) -> str:
    return (
        f'<span class="name">{text(name)}</span><svg class="lane {kind}" viewBox="0 0 {LANE_WIDTH} 100" role="img" '
        f'aria-label="{text(name)}" preserveAspectRatio="none">{marks}</svg>'
    )


def _axis(first: int, last: int) -> str:
    """Return the step numbers below the lanes."""
    labels = []
    # At least 4 apart: ticks would be fractions of a step.
    for step in ticks(first, max(last, first + 4)):
        if step <= last and step == int(step):
            left = 100 * (step - first + 0.5) / (last - first + 1)
            style = f'style="left:{left:.2f}%"' if left < 95 else 'class="end"'
            labels.append(f"<span {style}>{step:,.0f}</span>")
    return f'<span class="name">step</span><div class="axis">{"".join(labels)}</div>'
