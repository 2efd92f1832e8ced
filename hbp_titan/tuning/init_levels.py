"""Levels and memory plan of a first configuration, by the estimates: what fits on the GPUs, and the fastest of it.

Owns the settings that are tried in turn until the longest sample fits (STAGES), what is proposed if none does, and
which candidates the search of levels gets.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hbp_titan.config import JobConfig
from hbp_titan.distributed.expert_parallel import check_experts
from hbp_titan.errors import UserError
from hbp_titan.models.configs import ModelArgs
from hbp_titan.models.registry import num_params
from hbp_titan.packing import Level
from hbp_titan.packing.ragged import IntArray
from hbp_titan.preflight import cost_model
from hbp_titan.tuning.auto import candidate_forms
from hbp_titan.tuning.hardware import Hardware
from hbp_titan.tuning.memory import MemoryEstimate, estimate_memory
from hbp_titan.tuning.memory_plans import MEMORY_MARGIN, memory_plans, needed_plans, usable_bytes, usable_host_bytes
from hbp_titan.tuning.oom_advice import LORA_RANK, with_value
from hbp_titan.tuning.search import Candidate, Selection, Workload, select_search, selected
from hbp_titan.tuning.time_model import estimate_candidates, time_model
from hbp_titan.utils import human_count

STAGES: tuple[dict[str, Any], ...] = (
    {},
    {"optimizer.name": "adamw8bit"},
    {"parallelism.cpu_offload": True},
)
"""Settings of the whole run, in the order in which they are tried: moments in 8 bits cost no time, the host does."""
EXPERT_DEGREE = 8
"""Experts are on one rank, or on so many: the GPUs of a node."""
LEAST_SHARD = 1024
"""Tokens of a rank below which a level is not split further: its products would be too small for a GPU."""
DISTINCT = 0.98
"""A level that is shorter than the longest sample is shorter than this share of it, or it would hardly be used."""
SLACK = 1.1
"""--goal memory takes the fastest levels that need at most so much more than the least that is possible."""
SEARCH_SAMPLES, BEAM_SAMPLES = 5_000, 40_000
"""Effort of the search, some seconds."""
MAX_GPUS = 4096
GOALS = ("fast", "memory")
LORA_TARGETS = ["all-linear"]


@dataclass(frozen=True)
class Machine:
    """`gpus` GPUs of one kind. limit: bytes that tensors may take on each."""

    hardware: Hardware
    gpus: int
    limit: int

    @classmethod
    def of(cls, hardware: Hardware, gpus: int) -> Machine:
        """Return the machine with all memory that tensors may take."""
        return cls(hardware, gpus, usable_bytes(hardware))

    def estimate(self, args: ModelArgs, level: Level, config: JobConfig) -> MemoryEstimate:
        """Return the memory of a micro-batch."""
        return estimate_memory(args, level, config, self.gpus, device_type="cuda")

    def fits(self, estimate: MemoryEstimate) -> bool:
        """Return whether it fits on a GPU and in its share of the node's memory."""
        return estimate.peak_bytes <= self.limit and self.fits_host(estimate)

    def fits_host(self, estimate: MemoryEstimate) -> bool:
        """Return whether it fits in a rank's share of the node's memory."""
        return estimate.host_bytes <= usable_host_bytes(self.hardware, self.gpus)


@dataclass(frozen=True)
class Choice:
    """Levels of a run. config: with the settings that they need, and with them. selection: None for given levels."""

    config: JobConfig
    selection: Selection


def choose_levels(
    config: JobConfig,
    args: ModelArgs,
    machine: Machine,
    lengths: IntArray,
    loss_tokens: IntArray,
    *,
    given: frozenset[str] = frozenset(),
    goal: str = "fast",
    max_micro_batch: float = float("inf"),
) -> Choice | None:
    """Return the fastest levels for these samples; None if the longest sample does not fit with any setting.

    given: keys of `config` that must not change. goal: one of GOALS. max_micro_batch: tokens of a micro-batch of all
    ranks; only the longest level may have more.
    """
    longest = int(lengths.max())
    forms = level_forms(config, args, machine, lengths)
    top = [form for form in forms if form.max_tokens >= longest]
    variants = list(_variants(config, args, machine, given))
    least = [_least_peak(variant, args, machine, top) for variant in variants]
    fitting = [peak for peak in least if peak <= machine.limit]
    if not fitting:
        return None
    if goal == "memory":
        machine = replace(machine, limit=min(machine.limit, int(SLACK * min(fitting))))
    stage = next(_stage(config, k) for k, peak in zip(variants, least, strict=True) if peak <= machine.limit)
    smallest = min(_micro_batch(form, machine) for form in top)
    most = {form: smallest if form in top else 0 for form in forms}
    forms = [form for form in forms if _micro_batch(form, machine) <= max(max_micro_batch, most[form])]
    found = [
        _fastest(variant, args, machine, forms, lengths, loss_tokens, max_micro_batch)
        for variant, peak in zip(variants, least, strict=True)
        if peak <= machine.limit and _stage(config, variant) == stage
    ]
    choices = [choice for choice in found if choice]
    return min(choices, key=lambda choice: choice.selection.predicted.seconds, default=None)


def level_forms(config: JobConfig, args: ModelArgs, machine: Machine, lengths: IntArray) -> list[Level]:
    """Return the lengths and cp degrees of the automatic search, each with the fastest style."""
    model, longest = time_model(args, config, machine.hardware, machine.gpus), int(lengths.max())
    forms: dict[tuple[int, int], list[Level]] = {}
    for form in candidate_forms(lengths, longest, machine.gpus, args):
        # At the limit of the model's positions, cp degrees that do not divide it give lengths just below it.
        distinct = form.max_tokens >= longest or form.max_tokens < DISTINCT * longest
        if distinct and (form.cp_degree == 1 or form.max_tokens // form.cp_degree >= LEAST_SHARD):
            forms.setdefault((form.max_tokens, form.cp_degree), []).append(form)
    return [min(styles, key=model.exchange_seconds_per_token) for styles in forms.values()]


def least_gpus(config: JobConfig, args: ModelArgs, hardware: Hardware, longest: IntArray) -> int | None:
    """Return the fewest GPUs, whole nodes beyond one, that hold the longest sample; None up to MAX_GPUS.

    longest: its tokens, int64 [1].
    """
    node, before = hardware.gpus_per_node, 0
    sizes = [2**k for k in range(13) if 2**k < node] + [node * 2**k for k in range(13) if node * 2**k <= MAX_GPUS]
    for size in sizes:
        if holds(config, args, Machine.of(hardware, size), longest):
            step = 1 if size <= node else node
            # The state per rank falls with the ranks, so the smallest number lies between two powers of two.
            between = range(before + step, size, step)
            return next((n for n in between if holds(config, args, Machine.of(hardware, n), longest)), size)
        before = size
    return None


def does_not_fit(config: JobConfig, args: ModelArgs, machine: Machine, longest: int) -> UserError:
    """Return the error of a model and samples that no setting makes fit, with what would help."""
    hardware, tokens, ways = machine.hardware, np.array([longest]), []
    if least := least_gpus(config, args, hardware, tokens):
        ways.append(f"--gpus {least} is the smallest number that can")
    adapters = replace(config, lora=replace(config.lora, rank=LORA_RANK, target_modules=LORA_TARGETS))
    if not config.lora.rank and (least := least_gpus(adapters, args, hardware, tokens)):
        ways.append(f"--lora needs {least} of them")
    shorter = longest // 2
    while shorter >= 1024 and not holds(config, args, machine, np.array([shorter])):
        shorter //= 2
    if shorter >= 1024:
        shorter = 1 << (shorter.bit_length() - 1)
        ways.append(
            f"samples of at most {shorter:,} tokens fit: add --packing.max_sample_tokens {shorter} "
            "--data.max_length_policy truncate (or skip, split)"
        )
    return UserError(
        [
            f"--gpus {machine.gpus}: {machine.gpus} x {hardware.name} cannot hold {args.name} "
            f"({human_count(num_params(args))} parameters) with samples of {longest:,} tokens; "
            f"{'; '.join(ways) or 'use GPUs with more memory'}; --goal does not help: recomputation, host memory and "
            "8-bit moments are counted"
        ]
    )


def holds(config: JobConfig, args: ModelArgs, machine: Machine, longest: IntArray) -> bool:
    """Return whether a sample of `longest` tokens, int64 [1], fits with any of the settings."""
    top = [form for form in level_forms(config, args, machine, longest) if form.max_tokens >= longest[0]]
    variants = _variants(config, args, machine, frozenset())
    return any(_least_peak(variant, args, machine, top) <= machine.limit for variant in variants)


def _micro_batch(form: Level, machine: Machine) -> int:
    return form.max_tokens * form.dp_degree(machine.gpus)


def _variants(config: JobConfig, args: ModelArgs, machine: Machine, given: frozenset[str]) -> Iterator[JobConfig]:
    """Yield the configuration with the settings of each of STAGES and each degree of expert parallelism."""
    for stage in STAGES:
        if stage.keys() & given or (config.lora.rank and "optimizer.name" in stage):
            continue
        if stage and config.parallelism.cpu_offload:
            continue
        for degree in _expert_degrees(config, args, machine, given):
            found = with_value(config, "parallelism.expert_parallel_degree", degree)
            for key, value in stage.items():
                found = with_value(found, key, value)
            yield found


def _stage(config: JobConfig, variant: JobConfig) -> tuple[Any, ...]:
    return variant.optimizer.name, variant.parallelism.cpu_offload


def _expert_degrees(config: JobConfig, args: ModelArgs, machine: Machine, given: frozenset[str]) -> list[int]:
    if args.moe is None or "parallelism.expert_parallel_degree" in given:
        return [config.parallelism.expert_parallel_degree]
    degree = min(EXPERT_DEGREE, machine.gpus, machine.hardware.gpus_per_node)
    try:
        check_experts(args, degree, machine.gpus // config.parallelism.dp_replicate)
    except ValueError:
        return [1]
    return sorted({1, degree})


def _least_peak(config: JobConfig, args: ModelArgs, machine: Machine, forms: Sequence[Level]) -> float:
    """Return the least peak of any memory plan of `forms` that fits on the host; infinite if none does."""
    least = float("inf")
    for form in forms:
        stages = memory_plans(form, args)
        # The last stage needs the least on the GPU, and the first nothing on the host.
        plans = [level for level in [*stages[-1], *stages[0]] if level.ac_policy != "none"]
        for plan in plans:
            estimate = machine.estimate(args, plan, config)
            if machine.fits_host(estimate):
                least = min(least, estimate.peak_bytes)
                # Others of this form need more.
                break
    return least


def _fastest(
    config: JobConfig,
    args: ModelArgs,
    machine: Machine,
    forms: Sequence[Level],
    lengths: IntArray,
    loss_tokens: IntArray,
    max_micro_batch: float,
) -> Choice | None:
    """Return the selection by search; None if nothing that fits holds the longest sample."""
    plans = [plan for form in forms for plan in _plans(form, args, config, machine)]
    memory_bytes = int(machine.limit / (1 - MEMORY_MARGIN))
    limited = replace(machine.hardware, memory_bytes=memory_bytes)
    candidates = [
        plain_if_unused(candidate) for candidate in estimate_candidates(args, config, limited, machine.gpus, plans)
    ]
    workload = Workload(
        lengths,
        loss_tokens,
        machine.gpus,
        cost_model(args, frozen=config.lora.rank > 0),
        config.packing.method,
        config.seed_of("packing"),
        config.training.global_batch_tokens,
        config.packing.level_order,
        config.packing.curriculum_steps,
        time_model(args, config, machine.hardware, machine.gpus).step_seconds(),
        int(lengths.max()),
    )
    if not any(candidate.fits and candidate.level.max_tokens >= workload.longest for candidate in candidates):
        return None
    few = workload.sampled(SEARCH_SAMPLES) if len(lengths) > SEARCH_SAMPLES else workload
    selection = select_search(candidates, few, BEAM_SAMPLES)
    if len(selection.levels) == 1 and _micro_batch(selection.levels[0], machine) > max_micro_batch:
        selection = _with_shorter_level(selection, candidates, few)
    return Choice(dataclasses.replace(config, levels=list(selection.levels)), selection)


def _with_shorter_level(selection: Selection, candidates: Sequence[Candidate], workload: Workload) -> Selection:
    """Return the selection with the shorter level that costs the least time: with the long one alone, a step would have
    too many tokens."""
    longest = next(candidate for candidate in candidates if candidate.level == selection.levels[0])
    pairs = [[c, longest] for c in candidates if c.fits and c.level.max_tokens < longest.level.max_tokens]
    found = [selected(pair, workload.plan([c.level for c in pair]), workload) for pair in pairs]
    return min(found, key=lambda pair: pair.predicted.seconds, default=selection)


def _plans(form: Level, args: ModelArgs, config: JobConfig, machine: Machine) -> list[Level]:
    """Return the memory plans of `form` that are worth an estimate of their time."""
    stages = memory_plans(form, args)
    plain = stages[0][0]
    if machine.fits(machine.estimate(args, plain, config)):
        return [plain]
    smallest = next(plan for plan in stages[-1] if plan.ac_policy == "offload")
    if machine.estimate(args, smallest, config).peak_bytes > machine.limit:
        return []
    return needed_plans([form], args, lambda level: machine.fits(machine.estimate(args, level, config)))


def plain_if_unused(candidate: Candidate) -> Candidate:
    """Return the candidate with ac_policy "none" where its policy covers no layer, which reads better."""
    level = candidate.level
    if level.ac_policy == "none" or level.ac_layers != 0:
        return candidate
    return replace(candidate, level=replace(level, ac_policy="none", ac_layers=None, offload_layers=None))
