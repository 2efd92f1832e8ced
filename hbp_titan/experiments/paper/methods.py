"""Simulated methods over the same samples, each with the memory plan that makes it fastest.

Owns the list of methods (all of packing.METHODS, FlexSP, Megatron's dynamic context parallelism, and HBP without
balance), the choice of memory plans (activation checkpointing, host memory, chunks) for the packs of each method, and
the replay of a method by name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from hbp_titan.experiments.paper.dynamic_cp import TENSOR_EXPOSED, Megatron, plan_dynamic_cp, replay_dynamic_cp
from hbp_titan.experiments.paper.flexsp import FlexSPPlan, plan_flexsp, replay_concurrent
from hbp_titan.job_config import Float8, JobConfig, Parallelism
from hbp_titan.models.configs import ModelArgs
from hbp_titan.models.registry import get_flavor
from hbp_titan.packing import METHODS as PLAN_METHODS
from hbp_titan.packing import CostModel, Level, Plan, build_plan
from hbp_titan.packing.ragged import IntArray, shuffled
from hbp_titan.tuning.float8_time import Float8Products
from hbp_titan.tuning.hardware import Hardware
from hbp_titan.tuning.memory import MemoryEstimate, estimate_memory, with_policy
from hbp_titan.tuning.memory_plans import depth_choices, needed_plans, usable_bytes, usable_host_bytes
from hbp_titan.tuning.search import Candidate, level_seconds
from hbp_titan.tuning.simulate import Replay, replay
from hbp_titan.tuning.time_model import ModelDims, TimeModel, sharding
from hbp_titan.utils import did_you_mean

EXTRA_METHODS = {
    "flexsp": "FlexSP-style: groups of different degrees in parallel, not padded",
    "flexsp_iterations": "the same groups as micro-batches of one level each, as our runtime trains",
    "dynamic_cp": "Megatron's dynamic context parallelism: a cp degree per pack, ZeRO-1, not padded",
    "hbp_unbalanced": "hbp_paper, with packs grouped at random",
}
DEFAULT_METHODS = (
    *("isf", "nopack", "random", "sorted", "flat_sorted"),
    *("flexsp", "flexsp_iterations", "dynamic_cp", "hbp_unbalanced", "hbp_paper", "hbp"),
)
TENSOR_PARALLEL = (1, 2, 4, 8)
"""Degrees that Megatron may use, inside a node."""
MEAN_DOCUMENT = 1000
"""Tokens of the documents of a pack on which levels of methods without a Plan choose their memory plans."""
# FlexSP's planner and Megatron's scheduler are slow: enough samples for a mean within a percent, and no more ranks,
# because idle time hardly grows beyond (it would be worse for both).
MAX_SCHEDULED_SAMPLES, MAX_SCHEDULED_RANKS = 100_000, 512


def check_methods(names: Sequence[str]) -> None:
    """Raise ValueError, with the closest name, for an unknown method."""
    known = [*PLAN_METHODS, *EXTRA_METHODS]
    for name in names:
        if name not in known:
            raise ValueError(f"method {name!r} must be one of {', '.join(known)}{did_you_mean(name, known)}")


@dataclass
class MemoryChoice:
    """Memory plans of levels that fit, and the fastest of them on given packs.

    model: of the ranks. peak: bytes of a rank at this level, to compare with `limit`; host: bytes in host memory.
    """

    args: ModelArgs
    model: TimeModel
    estimate: Callable[[Level], MemoryEstimate]
    state_bytes: int | None = None
    found: dict[Level, list[Candidate]] = field(default_factory=dict)

    @classmethod
    def of_run(cls, args: ModelArgs, config: JobConfig, hardware: Hardware, world_size: int) -> MemoryChoice:
        """Return the plans of our runtime with this configuration."""

        def estimate(level: Level) -> MemoryEstimate:
            return estimate_memory(args, level, config, world_size, device_type="cuda")

        # Not time_model: the machine's attention kernel is already chosen.
        float8 = Float8Products.of(args, config, hardware)
        model = TimeModel(ModelDims.from_args(args), hardware, world_size, sharding(config), float8=float8)
        return cls(args, model, estimate)

    def peak_bytes(self, level: Level) -> int:
        """Return the most bytes that a rank holds on its GPUs."""
        found = self.estimate(level)
        if self.state_bytes is None:
            return found.peak_bytes
        return self.state_bytes + found.saved_bytes + found.transient_bytes

    def candidates(self, form: Level) -> list[Candidate]:
        """Return the memory plans of a level that fit, each with the depths that may be the fastest."""
        if form not in self.found:
            limit = usable_bytes(self.model.hardware)
            host_limit = usable_host_bytes(self.model.hardware, self.model.world_size)

            def fits(level: Level) -> bool:
                return self.peak_bytes(level) <= limit and self.estimate(level).host_bytes <= host_limit

            plans = needed_plans([form], self.args, fits)
            depths = [depth_choices(self.peak_bytes, plan, self.args.num_layers, limit) for plan in plans]
            levels = dict.fromkeys(level for found in depths for level, _ in found if fits(level))
            self.found[form] = [Candidate(level, self.model.level_time(level)) for level in levels]
        return self.found[form]

    def fastest(self, form: Level) -> Level | None:
        """Return the level with the fastest plan on a pack of documents of MEAN_DOCUMENT tokens, None if none fits."""
        tokens = float(form.max_tokens)
        loads = np.array([1.0, tokens, tokens * MEAN_DOCUMENT, tokens / MEAN_DOCUMENT])

        def seconds(candidate: Candidate) -> float:
            assert candidate.time is not None
            return float(candidate.time.seconds(loads))

        return min(self.candidates(form), key=seconds).level if self.candidates(form) else None

    def fastest_for(self, plan: Plan) -> tuple[Level, ...]:
        """Return the plan's levels, each with the memory plan that is fastest on its packs."""
        levels = []
        for k, form in enumerate(plan.levels):
            found = self.candidates(_plain(form))
            levels.append(found[int(level_seconds(plan, k, found).argmin())].level)
        return tuple(levels)

    def hold(self, forms: Sequence[Level]) -> bool:
        """Return whether each of these levels fits."""
        return all(self.candidates(form) for form in forms)


def memory_choice(
    args: ModelArgs, hardware: Hardware, world_size: int, forms: Sequence[Level], float8: str = ""
) -> MemoryChoice | None:
    """Return the memory plans of our runtime, with parameters on the host only if nothing else fits; None if even so.

    Experts are sharded over the GPUs of a node. float8: as float8.recipe.
    """
    expert_parallel = min(8, world_size) if args.moe else 1
    for cpu_offload in (False, True):
        parallelism = Parallelism(expert_parallel_degree=expert_parallel, cpu_offload=cpu_offload)
        config = JobConfig(parallelism=parallelism, float8=Float8(recipe=float8))
        choice = MemoryChoice.of_run(args, config, hardware, world_size)
        if choice.hold(forms):
            return choice
    return None


def replay_methods(
    lengths: IntArray,
    levels: Sequence[Level],
    model: TimeModel,
    names: Sequence[str],
    seed: int = 0,
    choice: MemoryChoice | None = None,
    tensor_exposed: float = TENSOR_EXPOSED,
) -> dict[str, Replay]:
    """Return the simulated epoch of each method over the same samples, by name in the given order.

    choice: chooses the memory plan of each level for each method; without it all methods use those of `levels`. A
    method that does not support the model, or does not fit, is left out. FlexSP and dynamic_cp are planned for at most
    MAX_SCHEDULED_RANKS ranks, and dynamic_cp for a part of the samples. tensor_exposed: as in Megatron.
    """
    check_methods(names)
    replays: dict[str, Replay | None] = {}
    flexsp: FlexSPPlan | None = None
    for name in names:
        if name.startswith("flexsp"):
            # Planned once for both of its forms: it is the slowest planner.
            ranks = dataclasses.replace(model, world_size=_scheduled_ranks(model, levels[-1]))
            flexsp = flexsp or plan_flexsp(lengths, _flexsp_levels(levels[-1], choice), ranks, seed)
            replays[name] = replay_concurrent(flexsp, ranks) if name == "flexsp" else replay(flexsp.as_plan(), ranks)
        elif name == "dynamic_cp":
            replays[name] = replay_megatron(lengths, levels[-1], model, seed, choice, tensor_exposed)
        else:
            plan = method_plan(lengths, levels, model, name, seed, choice)
            replays[name] = replay(without_balance(plan) if name == "hbp_unbalanced" else plan, model)
    return {name: found for name, found in replays.items() if found is not None}


def method_plan(
    lengths: IntArray, levels: Sequence[Level], model: TimeModel, name: str, seed: int, choice: MemoryChoice | None
) -> Plan:
    """Return the plan of a method of METHODS. choice: chooses the memory plans of the levels [their own]."""
    method = "hbp_paper" if name == "hbp_unbalanced" else name

    # Steps of equal tokens: those of a micro-batch of the largest level. On the host an optimizer step is slow.
    step_tokens = levels[-1].max_tokens * levels[-1].dp_degree(model.world_size)

    def planned(levels: Sequence[Level]) -> Plan:
        costs = [level_cost(model, k) for k in levels]
        return build_plan(lengths, levels, model.world_size, method, seed, cost=costs, global_batch_tokens=step_tokens)

    if choice is None:
        return planned(levels)
    first = tuple(choice.fastest(_plain(form)) or form for form in levels)
    plan = planned(first)
    chosen = choice.fastest_for(plan)
    # Packs are balanced by the time that they take with the chosen plans.
    return plan if chosen == first else planned(chosen)


def _flexsp_levels(largest: Level, choice: MemoryChoice | None) -> list[Level]:
    levels = flexsp_levels(largest)
    if choice is None:
        return levels
    return [level for form in levels if (level := choice.fastest(_plain(form)))]


def _scheduled_ranks(model: TimeModel, largest: Level) -> int:
    return min(model.world_size, max(MAX_SCHEDULED_RANKS, largest.cp_degree))


def _plain(form: Level) -> Level:
    """Return the level without memory plan."""
    return dataclasses.replace(with_policy(form, "none"), mlp_chunk_tokens=0, attention_head_groups=1)


def replay_megatron(
    lengths: IntArray,
    largest: Level,
    model: TimeModel,
    seed: int = 0,
    choice: MemoryChoice | None = None,
    tensor_exposed: float = TENSOR_EXPOSED,
) -> Replay | None:
    """Return the replay of dynamic context parallelism; None if Megatron's scheduler cannot train this model here.

    It does not support experts and DeepSeek's attention (Megatron-LM pull request #5679). GPUs hold as many tokens as
    those of `largest`. Of the tensor-parallel degrees that fit, the one with the fastest packs on one rank is used.
    """
    args = choice.args if choice else get_flavor(model.dims.name)
    if model.dims.expert_params or args.mla is not None:
        return None
    per_gpu = largest.max_tokens // largest.cp_degree
    model = dataclasses.replace(model, world_size=_scheduled_ranks(model, largest))
    fitting = []
    for tensor_parallel in TENSOR_PARALLEL:
        if model.world_size % tensor_parallel or tensor_parallel > model.hardware.gpus_per_node:
            continue
        megatron = Megatron.of(model, tensor_parallel, tensor_exposed)
        found = MegatronLevels(args, megatron, per_gpu * tensor_parallel)
        if found.fits(int(lengths.max())):
            fitting.append(found)
    if not fitting:
        return None
    best = min(fitting, key=MegatronLevels.seconds_per_token)
    ranks = best.megatron.model.world_size
    steps = int(MAX_SCHEDULED_SAMPLES * lengths.mean() // (ranks * best.tokens * 8)) + 1
    plan = plan_dynamic_cp(lengths, ranks, best.tokens, seed, max_steps=steps)
    return replay_dynamic_cp(plan, best.megatron, best.level)


class MegatronLevels:
    """Levels of Megatron's ranks, which hold `tokens` tokens each, with the fastest memory plan that fits."""

    def __init__(self, args: ModelArgs, megatron: Megatron, tokens: int) -> None:
        self.megatron, self.tokens = megatron, tokens
        ranks, float8 = megatron.model.world_size, megatron.model.float8
        config = JobConfig(float8=Float8(recipe=float8.recipe if float8 else ""))

        def estimate(level: Level) -> MemoryEstimate:
            return estimate_memory(args, level, config, ranks, device_type="cuda")

        self.plans = MemoryChoice(args, megatron.model, estimate, megatron.state_bytes())

    def form(self, degree: int) -> Level:
        """Return the level of `degree` ranks without memory plan."""
        return Level(self.tokens * degree, degree, cp_style(self.megatron.model.dims, degree))

    def fits(self, longest: int) -> bool:
        """Return whether packs of any degree fit, and all ranks together hold the longest sample."""
        ranks = self.megatron.model.world_size
        degrees = [1 << k for k in range(ranks.bit_length())]
        return ranks * self.tokens >= longest and self.plans.hold([self.form(degree) for degree in degrees])

    def level(self, degree: int) -> Level:
        """Return the level of `degree` ranks; it must fit."""
        level = self.plans.fastest(self.form(degree))
        assert level is not None
        return level

    def seconds_per_token(self) -> float:
        """Return the GPU seconds per token of a full pack of short documents on one rank."""
        level, t = self.level(1), self.megatron.tensor_parallel
        tokens = float(self.tokens)
        loads = np.array([1.0, tokens, tokens * MEAN_DOCUMENT, tokens / MEAN_DOCUMENT])
        own = float(self.megatron.model.level_time(level).seconds(loads))
        return t / tokens * (own + float(self.megatron.tensor_seconds(level, np.array([tokens]))[0]))


def cp_style(dims: ModelDims, degree: int) -> str:
    """Return Ulysses where heads allow it, else hybrid."""
    return "ulysses" if dims.num_kv_heads % degree == 0 and dims.num_heads % degree == 0 else "hybrid"


def level_cost(model: TimeModel, level: Level) -> CostModel:
    """Return the cost that balances the packs of a level: their seconds without what all packs have in common.

    A pack is padded to the level's length, so its tokens count only through the loss head. Partially filled attention
    tiles are ignored: packs of a level hardly differ in them.
    """
    time = model.level_time(level)
    return CostModel(time.per_loss_token, time.per_square, model.dims.window, model.dims.window_share)


def flexsp_levels(largest: Level) -> list[Level]:
    """Return a level per degree 1, 2, 4 up to that of `largest`, with the same tokens per rank and checkpointing."""
    per_rank = largest.max_tokens // largest.cp_degree
    degrees = {2**i for i in range(largest.cp_degree.bit_length())} | {largest.cp_degree}
    return [
        dataclasses.replace(largest, max_tokens=per_rank * degree, cp_degree=degree)
        for degree in sorted(degrees)
        if largest.cp_degree % degree == 0
    ]


def without_balance(plan: Plan) -> Plan:
    """Return the same packs in random groups within each level (the paper's row without balance batching)."""
    order = np.arange(plan.packs.num_rows)
    for level in range(len(plan.levels)):
        own = np.flatnonzero(plan.pack_levels == level)
        order[own] = own[shuffled(len(own), plan.seed, level)]
    return dataclasses.replace(plan, packs=plan.packs.take(order))
