"""The order of iterations and their grouping into optimizer steps (paper section 3.3: curriculum, alternation).

Owns three decisions: which iterations form one optimizer step, so that real tokens per step are steady; the order
of steps; and the curriculum. The world trains one level at a time, so the unit is an iteration.
"""

from __future__ import annotations

import numpy as np

from hbp_titan.packing.ragged import EMPTY, IntArray, Ragged, Stream, concatenated, grouped, shuffled

LEVEL_ORDERS = ("alternate", "interleave", "parallel")


def schedule(
    level_of: IntArray,
    tokens: IntArray,
    *,
    global_batch_tokens: int,
    level_order: str,
    curriculum_steps: float,
    stream: Stream,
) -> Ragged:
    """Return the optimizer steps in training order, each a row of iterations; every iteration is in one step.

    level_of, tokens: level and real tokens of each iteration, int64 [num_iterations].
    global_batch_tokens: target tokens of a step; 0 makes each iteration a step.
    level_order: "alternate" gives each step one level and shuffles the steps; "interleave" gives each step its share of
        every level.
    curriculum_steps: number of steps of the lowest level that come first; below 1, a share of all steps.
    """
    pools = []
    for level in np.unique(level_of):
        members = np.flatnonzero(level_of == level)
        pools.append(members[shuffled(len(members), *stream, int(level))])
    one_level_steps = [_steps_of_level(pool, tokens, global_batch_tokens) for pool in pools]
    lowest = one_level_steps[0]

    def after_curriculum(lowest_rest: Ragged) -> Ragged:
        if level_order == "interleave":
            return _interleaved([lowest_rest.ids, *pools[1:]], tokens, global_batch_tokens)
        later = concatenated([lowest_rest, *one_level_steps[1:]])
        # len(level_of) is above every level index, so this stream differs from those of the pools.
        return later.take(shuffled(later.num_rows, *stream, len(level_of)))

    num_first = curriculum_steps
    if 0 < curriculum_steps < 1:
        num_first *= after_curriculum(lowest).num_rows
    rows = np.arange(lowest.num_rows)
    first, rest = np.split(rows, [min(round(num_first), lowest.num_rows)])
    return concatenated([lowest.take(first), after_curriculum(lowest.take(rest))])


def _steps_of_level(pool: IntArray, tokens: IntArray, global_batch_tokens: int) -> Ragged:
    """Return steps of n iterations of one level, a few with n - 1 or n + 1 if n does not divide the pool."""
    per_step = 1
    if global_batch_tokens:
        per_step = max(1, round(global_batch_tokens / tokens[pool].mean()))
    num_steps = max(1, round(len(pool) / per_step))
    return Ragged(pool, np.arange(num_steps + 1) * len(pool) // num_steps)


def _interleaved(pools: list[IntArray], tokens: IntArray, global_batch_tokens: int) -> Ragged:
    """Return steps that draw from every pool in proportion; the finest pool evens out the tokens of each step.

    Every other pool gives step s its share, rounded to whole iterations. The pool whose iterations hold the fewest
    tokens then brings the running total as close to s + 1 mean steps as one of its iterations allows.
    """
    pools = [pool for pool in pools if len(pool)]
    if not pools:
        return EMPTY
    everything = np.concatenate(pools)
    if not global_batch_tokens:
        position = np.concatenate([_centers(len(pool)) for pool in pools])
        return Ragged(everything[np.argsort(position, kind="stable")], np.arange(len(everything) + 1))
    finest = min(range(len(pools)), key=lambda k: float(tokens[pools[k]].mean()))
    # A whole number of iterations of the finest pool; otherwise no two steps could hold equal tokens.
    unit = float(tokens[pools[finest]].mean())
    step_target = unit * max(1, round(global_batch_tokens / unit))
    total = int(tokens[everything].sum())
    num_steps = int(np.clip(round(total / step_target), 1, len(everything)))
    target = np.arange(1, num_steps + 1) / num_steps * total
    step_of = [np.zeros(0, np.int64)] * len(pools)
    for k, pool in enumerate(pools):
        if k != finest:
            step_of[k] = (_centers(len(pool)) * num_steps).astype(np.int64)
            target -= np.cumsum(np.bincount(step_of[k], weights=tokens[pool], minlength=num_steps))
    # The center of an iteration decides on which side of a step's end it falls.
    center = np.cumsum(tokens[pools[finest]]) - tokens[pools[finest]] / 2
    # The other pools may exceed a step's total, which would make the remaining target fall.
    step_of[finest] = np.minimum(np.searchsorted(np.maximum.accumulate(target), center), num_steps - 1)
    steps = grouped(np.concatenate(step_of), num_steps, everything)
    return steps.take(np.flatnonzero(steps.counts))


def _centers(num: int) -> np.ndarray:
    """Return the centers of `num` equal parts of the unit interval, float64 [num]."""
    return (np.arange(num) + 0.5) / num
