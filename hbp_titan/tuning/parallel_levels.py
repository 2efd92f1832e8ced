"""Levels that run side by side (packing.level_order "parallel"): their costs, and a proposal for a machine.

Ranks of different levels wait for each other in every micro-batch, so the planner needs costs that can be compared
between levels: seconds by the time model of a known GPU, else FLOPs, in which communication costs nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hbp_titan.config import JobConfig
from hbp_titan.data.epoch import SampleLengths
from hbp_titan.models.configs import ModelArgs
from hbp_titan.packing import CostModel, Level, Plan, build_plan
from hbp_titan.preflight import cost_model
from hbp_titan.tuning.hardware import Hardware
from hbp_titan.tuning.profile import cp_styles
from hbp_titan.tuning.simulate import Replay, replay
from hbp_titan.tuning.time_model import TimeModel, estimate_candidates, time_model

# Tokens of a rank, as a share of those of the lowest level: a long document leaves time for fewer tokens than a short
# pack has, the less the longer it is for its ranks.
SHARES = (1 / 4, 5 / 16, 3 / 8, 1 / 2, 3 / 4, 1)
# A level whose packs take less of the ranks' time than this is not worth its graphs and its warm-up.
LEAST_SHARE = 0.004


def costs_on(
    hardware: Hardware | None, config: JobConfig, args: ModelArgs, world_size: int, samples: SampleLengths
) -> tuple[CostModel, ...]:
    """Return the cost of each of config.levels: seconds if the hardware is known, else FLOPs."""
    if hardware is None:
        return tuple(cost_model(args, config.lora.rank > 0, level) for level in config.levels)
    model = time_model(args, config, hardware, world_size)
    share = trained_share(samples)
    return tuple(level_cost(model, level, share) for level in config.levels)


def trained_share(samples: SampleLengths) -> float:
    """Return trained tokens over all tokens; the vocabulary's projection is computed for trained ones only."""
    return float(samples.loss_tokens.sum() / samples.lengths.sum())


def level_cost(model: TimeModel, level: Level, loss_share: float) -> CostModel:
    """Return the seconds of a level's static length and of squares, added over the ranks of a pack.

    Everything but attention and the vocabulary's projection takes the same time for every pack of the level.
    """
    time = model.level_time(level)
    alpha = (time.base / level.max_tokens + time.per_loss_token * loss_share) * level.cp_degree
    windows = (model.dims.window, model.dims.window_share)
    return CostModel(alpha, time.per_square * level.cp_degree, *windows)


@dataclass(frozen=True)
class Proposal:
    """Levels side by side for one mixture and machine, and the estimated epoch."""

    levels: tuple[Level, ...]
    plan: Plan
    replay: Replay


def propose(
    config: JobConfig, args: ModelArgs, hardware: Hardware, world_size: int, samples: SampleLengths
) -> Proposal:
    """Return levels side by side whose lowest is config.levels[0]; the memory plan of each is the fastest that fits.

    Starts from every degree and share of the lowest level's tokens that a document may need, and drops the levels that
    the plan hardly uses. Raises ValueError if no level holds the longest sample, or the lowest level does not fit.
    """
    model = time_model(args, config, hardware, world_size)
    lengths = samples.lengths
    ladder = _ladder(config.levels[0], args, world_size, int(lengths.max()))
    levels = _that_fit(ladder, config, args, hardware, world_size)
    if levels[0].cp_degree != config.levels[0].cp_degree or levels[-1].max_tokens < lengths.max():
        raise ValueError(
            f"no levels side by side hold samples of {lengths.max()} tokens on {world_size} ranks of {hardware.name} "
            f"next to packs of {config.levels[0].max_tokens} tokens; lower levels.max_tokens of the lowest level"
        )
    found = _planned(levels, model, samples)
    while True:
        seconds = np.bincount(found.plan.pack_levels, found.plan.pack_degrees, len(found.levels)) / world_size
        # The last holds the longest sample.
        kept = [
            level
            for k, level in enumerate(found.levels)
            if k in (0, len(found.levels) - 1) or seconds[k] > LEAST_SHARE * found.plan.num_iterations
        ]
        fewer = _planned(kept, model, samples)
        if len(kept) == len(found.levels) or fewer.replay.seconds > found.replay.seconds * (1 + LEAST_SHARE):
            return found
        found = fewer


def _ladder(lowest: Level, args: ModelArgs, world_size: int, longest: int) -> list[Level]:
    """Return the lowest level and, for every larger degree, levels of several static lengths above it."""
    found = {(lowest.max_tokens, lowest.cp_degree): lowest}
    per_rank, degree = lowest.max_tokens // lowest.cp_degree, 2 * lowest.cp_degree
    while degree <= world_size and world_size % degree == 0:
        styles = cp_styles(degree, args)
        for share in SHARES if styles else ():
            tokens = int(per_rank * share) * degree
            # More ranks than four times the fewest would exchange more and gain nothing.
            if lowest.max_tokens < tokens and tokens // 4 <= 2 * longest:
                found[tokens, degree] = Level(tokens, degree, styles[0])
        degree *= 2
    return [found[key] for key in sorted(found)]


def _that_fit(
    levels: Sequence[Level], config: JobConfig, args: ModelArgs, hardware: Hardware, world_size: int
) -> list[Level]:
    """Return the levels that fit in memory, each with as few recomputed layers as it needs."""
    open_depth = [dataclasses.replace(level, ac_policy="full", ac_layers=None) for level in levels]
    candidates = estimate_candidates(args, config, hardware, world_size, open_depth)
    return [candidate.level for candidate in candidates if candidate.fits]


def _planned(levels: Sequence[Level], model: TimeModel, samples: SampleLengths) -> Proposal:
    costs = [level_cost(model, level, trained_share(samples)) for level in levels]
    loss_tokens = samples.loss_tokens
    plan = build_plan(
        samples.lengths, levels, model.world_size, loss_tokens=loss_tokens, cost=costs, level_order="parallel"
    )
    return Proposal(tuple(levels), plan, replay(plan, model))
