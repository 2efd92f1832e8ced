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
from hbp_titan.packing.ragged import shuffled
from hbp_titan.preflight import cost_model
from hbp_titan.tuning.hardware import Hardware
from hbp_titan.tuning.profile import cp_styles
from hbp_titan.tuning.search import Workload
from hbp_titan.tuning.simulate import Replay, replay
from hbp_titan.tuning.time_model import TimeModel, estimate_candidates, full_pack_seconds, time_model
from hbp_titan.utils import human_seconds

# Tokens of a rank, as a share of those of the lowest level: a long document leaves time for fewer tokens than a short
# pack has, the less the longer it is for its ranks.
SHARES = (1 / 4, 5 / 16, 3 / 8, 1 / 2, 3 / 4, 1)
# Lengths of the lowest level, as multiples of the given one: a longer one recomputes more, but the ranks then have more
# time for each long document, so that it needs fewer of them.
LOWEST = (1, 1.5, 2)
SAMPLED = 200_000
"""Samples by which levels are chosen; the plan and its time are of all samples."""
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
    """Levels side by side for one mixture and machine, and the estimated epoch.

    max_sample_tokens: the model's positions if a pack is longer than they are, else 0.
    """

    levels: tuple[Level, ...]
    plan: Plan
    replay: Replay
    max_sample_tokens: int = 0

    def describe(self, one_at_a_time: float) -> str:
        """Return the verdict in words. one_at_a_time: seconds of the epoch with the levels of the search."""
        whole, tokens = self.replay, self.plan.step_tokens
        keys = {"level_order": '"parallel"', "curriculum_steps": 0}
        if self.max_sample_tokens:
            keys["max_sample_tokens"] = self.max_sample_tokens
        return (
            f"side by side: {human_seconds(whole.seconds)} per epoch, {whole.seconds / one_at_a_time - 1:+.1%} against "
            f"levels one at a time; idle {whole.share('idle'):.1%}, context parallelism {whole.share('sp'):.1%}, "
            f"recomputation {whole.share('recompute'):.1%}; {self.plan.num_steps:,} steps of {tokens.mean():,.0f} +- "
            f"{tokens.std():,.0f} tokens, each with a share of all levels; set "
            + ", ".join(f"packing.{key} = {value}" for key, value in keys.items())
        )


def propose(config: JobConfig, args: ModelArgs, hardware: Hardware, workload: Workload) -> Proposal:
    """Return levels side by side whose lowest is config.levels[0], or longer by a factor of LOWEST.

    Starts from every degree and share of the lowest level's tokens that a document may need, each with the fastest
    memory plan that fits, and drops the levels that the plan hardly uses. Raises ValueError if no levels hold the
    longest sample, or the lowest does not fit.
    """
    model = time_model(args, config, hardware, workload.world_size)
    lowest, longest = config.levels[0], workload.max_sample_tokens
    some, found = _sampled(workload), []
    for factor in LOWEST:
        first = Level(int(lowest.max_tokens * factor), lowest.cp_degree, lowest.cp_style)
        levels = fastest_that_fit(_ladder(first, model, args, longest), config, args, hardware, workload.world_size)
        if levels and levels[0].max_tokens == first.max_tokens and levels[-1].max_tokens >= longest:
            found.append(_pruned(levels, model, some, longest))
    if not found:
        raise ValueError(
            f"no levels side by side hold samples of {longest} tokens on {workload.world_size} ranks of "
            f"{hardware.name} next to packs of {lowest.max_tokens} tokens; use more ranks or lower the lowest level"
        )
    fastest = min(found, key=lambda proposal: proposal.replay.seconds)
    limit = args.max_position_embeddings
    found_for_all = _planned(fastest.levels, model, workload)
    return dataclasses.replace(found_for_all, max_sample_tokens=limit * (limit < fastest.levels[-1].max_tokens))


def _sampled(workload: Workload) -> Workload:
    """Return the workload with at most SAMPLED samples, the longest among them."""
    total = len(workload.lengths)
    if total <= SAMPLED:
        return workload
    chosen = np.append(shuffled(total, workload.seed)[: SAMPLED - 1], workload.lengths.argmax())
    return dataclasses.replace(
        workload, lengths=workload.lengths[chosen], loss_tokens=workload.loss_tokens[chosen], global_batch_tokens=0
    )


def _pruned(levels: Sequence[Level], model: TimeModel, workload: Workload, longest: int) -> Proposal:
    """Return the levels without those that the plan hardly uses, as long as that costs no time."""
    found = _planned(levels, model, workload)
    limit = found.replay.seconds * (1 + LEAST_SHARE)
    while True:
        ranks = np.bincount(found.plan.pack_levels, found.plan.pack_degrees, len(found.levels)) / model.world_size
        used = ranks > LEAST_SHARE * found.plan.num_iterations
        used[0] = True
        holding = [k for k, level in enumerate(found.levels) if level.max_tokens >= longest]
        if not used[holding].any():
            used[holding[0]] = True
        kept = [level for level, keep in zip(found.levels, used.tolist(), strict=True) if keep]
        fewer = _planned(kept, model, workload)
        if len(kept) == len(found.levels) or fewer.replay.seconds > limit:
            return found
        found = fewer


def _ladder(lowest: Level, model: TimeModel, args: ModelArgs, longest: int) -> list[Level]:
    """Return the lowest level and, for every larger degree, levels of several static lengths above it."""
    found = {(lowest.max_tokens, lowest.cp_degree): lowest}
    per_rank, degree = lowest.max_tokens // lowest.cp_degree, 2 * lowest.cp_degree
    while degree <= model.world_size and model.world_size % degree == 0:
        for share in SHARES:
            tokens = int(per_rank * share) * degree
            # Beyond twice the longest sample more ranks would exchange more and gain nothing.
            if lowest.max_tokens < tokens <= 2 * longest:
                styles = [Level(tokens, degree, style) for style in cp_styles(degree, args)]
                found[tokens, degree] = min(styles, key=model.exchange_seconds_per_token)
        degree *= 2
    return [found[key] for key in sorted(found)]


def fastest_that_fit(
    levels: Sequence[Level], config: JobConfig, args: ModelArgs, hardware: Hardware, world_size: int
) -> list[Level]:
    """Return the levels that fit in memory, each with the fastest policy and as few recomputed layers as it needs."""
    policies = ("full", "keep_attention", "offload_attention", "offload")
    forms = [dataclasses.replace(level, ac_policy=policy) for level in levels for policy in policies]
    candidates = estimate_candidates(args, config, hardware, world_size, forms)
    fastest = []
    for k in range(0, len(forms), len(policies)):
        fitting = [candidate for candidate in candidates[k : k + len(policies)] if candidate.time is not None]
        if fitting:
            level = min(fitting, key=full_pack_seconds).level
            # No policy reads better than one of no layers.
            plain = dataclasses.replace(level, ac_policy="none", ac_layers=None, offload_layers=None)
            fastest.append(level if level.ac_layers else plain)
    return fastest


def _planned(levels: Sequence[Level], model: TimeModel, workload: Workload) -> Proposal:
    costs = [level_cost(model, level, trained_share(workload)) for level in levels]
    plan = build_plan(
        workload.lengths,
        levels,
        model.world_size,
        seed=workload.seed,
        loss_tokens=workload.loss_tokens,
        cost=costs,
        global_batch_tokens=workload.global_batch_tokens,
        level_order="parallel",
    )
    return Proposal(tuple(levels), plan, replay(plan, model))
