"""First configuration of a run: every value that a user's model, data and GPUs decide, each with its reason.

Owns the rules: lengths and levels by the data and the estimates, batch and epochs by the number of tokens, intervals by
the predicted time of a step. init_levels.py chooses the levels, init_toml.py writes the file.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hbp_titan.components.oom import device_memory
from hbp_titan.config import JobConfig, check_values, load_config, parse_overrides
from hbp_titan.data.chat_tokenizer import ChatTokenizer
from hbp_titan.data.files import chat_template_file
from hbp_titan.models.configs import ModelArgs
from hbp_titan.models.hf_config import args_from_hf
from hbp_titan.models.registry import num_params
from hbp_titan.packing.level import level_name
from hbp_titan.preflight import check, check_vocabulary
from hbp_titan.tuning.dry_run import DryRun, Samples, dry_run
from hbp_titan.tuning.hardware import HARDWARE, Hardware, get_hardware
from hbp_titan.tuning.init_levels import LORA_TARGETS, Choice, Machine, choose_levels, does_not_fit
from hbp_titan.tuning.memory import estimate_memory
from hbp_titan.tuning.oom_advice import LORA_RANK, value_of, with_value
from hbp_titan.tuning.sample_lengths import SAMPLE_ROWS, DataLengths, read_lengths
from hbp_titan.utils import did_you_mean, human_bytes, human_seconds

CPU = "cpu"
"""Value of --gpu for a trial without GPUs: the memory of this machine, and no times."""
# FLOP/s and byte/s of a rank. Only their ratios decide, and no time of them is shown.
CPU_RANK: dict[str, Any] = {
    "peak_flops": 5e10,
    "memory_bandwidth": 1e10,
    "intra_node_bandwidth": 2e9,
    "inter_node_bandwidth": 1e9,
    "gpus_per_node": 1024,
    "launch_seconds": 1e-7,
}
FULL_LR, LORA_LR = 1e-5, 2e-4
EPOCH_TOKENS = ((50_000_000, 3), (500_000_000, 2))
"""(tokens, epochs): with fewer tokens than this, so many epochs; else one."""
STEPS, LEAST_STEPS = 500, 100
"""Optimizer steps that the batch is chosen for, and that the micro-batches of the shorter levels leave at least."""
LEAST_BATCH, LARGEST_BATCH = 1 << 14, 1 << 20
CHECKPOINT_SECONDS = 1800
LEAST_CHECKPOINTS, EVALUATIONS = 2, 5
HELD_OUT_ROWS, LEAST_HELD_OUT, LARGEST_SHARE = 500, 20, 0.05
"""Held-out rows: so many, but at least 20 rows, and at most this share where that is more."""
LEAST_ROWS = 200
"""With fewer rows nothing is held out."""
TRUNCATE_SHARE = 0.01
"""Samples beyond the model's positions are skipped up to this share, else truncated."""
ATTEMPTS = 4
"""Selections with less memory each, until the dry run, which counts exactly, accepts the levels."""


@dataclass(frozen=True)
class Request:
    """What `hbp-titan init` was asked for. overrides: --section.key value pairs, which no rule changes."""

    model: Path
    data: list[str]
    gpus: int
    gpu: str
    output: Path
    lora: bool = False
    goal: str = "fast"
    gpus_per_node: int = 8
    sample_rows: int = SAMPLE_ROWS
    force: bool = False
    overrides: Sequence[str] = ()

    def check(self) -> None:
        """Raise ValueError for what is wrong before any file is read."""
        if self.output.exists() and not self.force:
            raise ValueError(f"--output {self.output}: the file exists; name another one, or add --force to replace it")
        if self.output.suffix != ".toml":
            raise ValueError(f"--output {self.output}: must end in .toml")
        for name in ("gpus", "gpus_per_node", "sample_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: must be at least 1")
        if self.gpus > self.gpus_per_node and self.gpus % self.gpus_per_node:
            raise ValueError(
                f"--gpus {self.gpus} is not a multiple of --gpus_per_node {self.gpus_per_node}; use whole nodes"
            )

    def hardware(self) -> Hardware:
        """Return the table's entry with this node, whose memory is in proportion to its GPUs."""
        if self.gpu.strip().lower() == CPU:
            return Hardware(CPU, memory_bytes=device_memory(torch.device(CPU), self.gpus), **CPU_RANK)
        known = [*HARDWARE, CPU]
        if self.gpu.strip().lower() not in HARDWARE:
            raise ValueError(f"--gpu {self.gpu}: must be one of {', '.join(known)}{did_you_mean(self.gpu, known)}")
        found = get_hardware(self.gpu)
        memory = found.host_memory_bytes * self.gpus_per_node // found.gpus_per_node
        return replace(found, gpus_per_node=self.gpus_per_node, host_memory_bytes=memory)


@dataclass
class Draft:
    """A configuration and why its values are what they are.

    given: keys of the command line, which `choose` leaves as they are. reasons: by section.key, in order.
    """

    config: JobConfig
    given: frozenset[str]
    reasons: dict[str, str] = field(default_factory=dict)

    @classmethod
    def start(cls, request: Request) -> Draft:
        """Return the draft with the model and the data. Paths are absolute: run_train.sh changes the directory."""
        given = frozenset(parse_overrides(request.overrides))
        options = {"model.hf_path": "--model", "data.train_files": "--data", "lora.rank": "--lora"}
        for key, option in {**options, "job.config_file": "", "data.sources": "--data"}.items():
            if key in given:
                fix = f"use {option} in its place" if option else "init writes a new file; remove it"
                raise ValueError(f"--{key}: {fix}")
        draft = cls(load_config(request.overrides), given)
        if draft.config.model.backend != "native":
            raise ValueError(
                'model.backend = "transformers": the memory of such models is not estimated, so init cannot choose '
                "levels; write the file by hand (docs/quickstart.md)"
            )
        draft.choose("model.hf_path", os.path.abspath(request.model.expanduser()), "")
        paths = [os.path.abspath(os.path.expanduser(path)) for path in request.data]
        draft.choose("data.train_files", paths, "")
        for key in sorted(given - {"levels"}):
            draft.reasons[key] = "Given on the command line."
        return draft

    def choose(self, key: str, value: object, reason: str) -> None:
        """Set a key that was not given, and record why."""
        if key not in self.given:
            self.config = with_value(self.config, key, value)
            self.reasons[key] = reason

    def adopt(self, config: JobConfig, reasons: dict[str, str]) -> None:
        """Take over a configuration in which the keys of `reasons` may have changed; unchanged ones need no reason."""
        for key, reason in reasons.items():
            if value_of(config, key) != value_of(self.config, key):
                self.reasons[key] = reason
        self.config = config


@dataclass(frozen=True)
class FirstConfig:
    """Result of init: the draft, what it is for, and the dry run of it. samples: that the run trains per epoch."""

    request: Request
    draft: Draft
    args: ModelArgs
    data: DataLengths
    samples: Samples
    found: DryRun

    @property
    def on_cpu(self) -> bool:
        return self.found.hardware.name == CPU

    @property
    def seconds(self) -> float:
        """Estimated seconds of all steps, without validation and checkpoints."""
        return self.step_seconds * self.found.total_steps

    @property
    def step_seconds(self) -> float:
        return self.found.replay.seconds / self.found.plan.num_steps

    @property
    def peak_bytes(self) -> int:
        """The largest estimated peak of any level."""
        return max(self.found.peak_bytes(memory.configured) for memory in self.found.levels)


def first_config(request: Request, log: Callable[[str], None]) -> FirstConfig:
    """Return the configuration of `request`. Raises ValueError or UserError for what a start would refuse."""
    request.check()
    hardware, draft = request.hardware(), Draft.start(request)
    args = args_from_hf(request.model, "--model")
    data = read_lengths(draft.config, request.sample_rows, log)
    template = chat_template_file(draft.config.data.chat_template)
    check_vocabulary(draft.config, args, ChatTokenizer(draft.config.tokenizer_path, chat_template=template).vocab_size)
    return configure(request, draft, args, data, hardware, log)


def configure(
    request: Request,
    draft: Draft,
    args: ModelArgs,
    data: DataLengths,
    hardware: Hardware,
    log: Callable[[str], None] = lambda line: None,
) -> FirstConfig:
    """Return the configuration for data of these lengths."""
    if request.lora:
        _choose_lora(draft, args)
    _choose_held_out(draft, data)
    samples = _samples(draft, args, data)
    _choose_amount(draft, samples)
    _choose_seeds(draft)
    log(f"estimating levels for {request.gpus} x {hardware.name}")
    found = _choose_levels(request, draft, args, hardware, samples)
    result = FirstConfig(request, draft, args, data, samples, found)
    _explain_batch(draft, result)
    _choose_rates(draft, result)
    _choose_intervals(draft, result)
    check_values(draft.config)
    return result


def _choose_lora(draft: Draft, args: ModelArgs) -> None:
    draft.choose("lora.rank", LORA_RANK, f"Adapters of rank {LORA_RANK}; the {num_params(args):,} weights are frozen.")
    draft.choose("lora.alpha", 2 * LORA_RANK, "Adapters count alpha / rank = 2.")
    targets = "attention's matrices" if args.moe else "every matrix of the blocks"
    draft.choose("lora.target_modules", LORA_TARGETS, f"An adapter for {targets}.")


def _choose_held_out(draft: Draft, data: DataLengths) -> None:
    own = draft.config.data
    if own.validation_files or own.validation_sources:
        draft.choose("validation.enable", True, "The loss on your held-out files.")
        return
    if data.rows < LEAST_ROWS:
        reason = f"Nothing is held out: {data.rows} rows are too few (init holds rows out from {LEAST_ROWS} on)."
        draft.choose("validation.enable", False, reason)
        return
    share = max(min(HELD_OUT_ROWS / data.rows, LARGEST_SHARE), LEAST_HELD_OUT / data.rows)
    # Two digits, rounded up so that the least number stays.
    unit = 10.0 ** (math.floor(math.log10(share)) - 1)
    share = round(math.ceil(share / unit - 1e-9) * unit, 10)
    rows = round(share * data.rows)
    draft.choose("validation.enable", True, "The loss on rows that are never trained shows overfitting.")
    draft.choose("validation.share", share, f"About {rows:,} of {data.rows:,} rows: enough for a loss to two digits.")


def _samples(draft: Draft, args: ModelArgs, data: DataLengths) -> Samples:
    """Return the samples that the run trains; sets what happens to those beyond the model's positions."""
    config = draft.config
    lengths, loss_tokens = data.epoch(config.seed_of("data"), 1.0 - config.validation.share)
    limit = min(config.packing.max_sample_tokens or args.max_position_embeddings, args.max_position_embeddings)
    if config.levels:
        limit = min(limit, config.levels[-1].max_tokens)
    over = lengths > limit
    if not over.any():
        reason = f"A sample that no level holds stops the preparation; the longest found has {lengths.max():,} tokens."
        draft.choose("data.max_length_policy", config.data.max_length_policy, reason)
    else:
        policy = "skip" if over.mean() <= TRUNCATE_SHARE else "truncate"
        what = {"skip": "they are skipped", "truncate": "they are cut, which keeps the last answer"}[policy]
        reason = (
            f"{over.sum():,} of {len(over):,} samples ({over.mean():.2%}) have more than {limit:,} tokens, the most "
            f"that the run takes; {what} and listed. Other choices: skip, truncate, split (at turns), error."
        )
        draft.choose("data.max_length_policy", policy, reason)
    if draft.config.data.max_length_policy in ("skip", "error"):
        lengths, loss_tokens = lengths[~over], loss_tokens[~over]
    lengths, loss_tokens = np.minimum(lengths, limit), np.minimum(loss_tokens, limit - 1)
    if not len(lengths):
        raise ValueError(
            f"--data: all samples have more than {limit:,} tokens, the most of this model or of "
            "packing.max_sample_tokens; add --data.max_length_policy truncate"
        )
    origin = "a sample of your data" if not data.complete else "your data"
    return Samples(lengths, loss_tokens, f"{origin}: {len(lengths):,} samples")


def _choose_amount(draft: Draft, samples: Samples) -> None:
    """Set epochs and batch."""
    tokens = int(samples.lengths.sum())
    epochs = next((epochs for most, epochs in EPOCH_TOKENS if tokens < most), 1)
    if not draft.config.training.steps:
        reason = f"An epoch has {tokens:,} tokens; init takes 3 epochs below 50M tokens, 2 below 500M, else 1."
        draft.choose("training.epochs", epochs, reason)
    batch = 1 << max(0, math.floor(math.log2(_total_tokens(draft, samples) / STEPS)))
    draft.choose("training.global_batch_tokens", min(max(batch, LEAST_BATCH), LARGEST_BATCH), "")


def _total_tokens(draft: Draft, samples: Samples) -> int:
    return max(int(samples.lengths.sum()) * draft.config.training.epochs, 1)


def _choose_seeds(draft: Draft) -> None:
    reason = "Order of samples, held-out rows and new adapters depend on it: another value is another run."
    draft.choose("training.seed", draft.config.training.seed, reason)


def _choose_levels(request: Request, draft: Draft, args: ModelArgs, hardware: Hardware, samples: Samples) -> DryRun:
    """Set levels, batch and what they need; return the dry run that accepts them."""
    on_cpu = hardware.name == CPU
    compiled = (
        "Fuses what lies between products; the first step takes minutes." if not on_cpu else "A CPU gains little."
    )
    draft.choose("compile.enable", not on_cpu, compiled)
    machine, before = Machine.of(hardware, request.gpus), draft.config
    for _ in range(ATTEMPTS):
        if before.levels:
            config = before
        else:
            most = max(before.training.global_batch_tokens, _total_tokens(draft, samples) / LEAST_STEPS)
            choice = choose_levels(
                before,
                args,
                machine,
                samples.lengths,
                samples.loss_tokens,
                given=draft.given,
                goal=request.goal,
                max_micro_batch=most,
            )
            if choice is None:
                raise does_not_fit(before, args, Machine.of(hardware, request.gpus), int(samples.lengths.max()))
            config = _with_batch(draft, choice, request.gpus, most)
        found = dry_run(config, request.gpus, hardware, samples)
        missing = (
            max(found.peak_bytes(memory.configured) for memory in found.levels)
            - Machine.of(hardware, request.gpus).limit
        )
        if missing <= 0 or before.levels:
            break
        # The state of uneven shards is larger than the estimate's.
        machine = replace(machine, limit=machine.limit - missing)
    if on_cpu:
        _check_cpu(config, args, request.gpus, hardware)
    else:
        found.check_memory()
    draft.adopt(config, _memory_reasons(args, found))
    return found


def _with_batch(draft: Draft, choice: Choice, gpus: int, most: float) -> JobConfig:
    """Return the chosen configuration with a batch of at least one micro-batch of each level, up to `most` tokens."""
    config, key = choice.config, "training.global_batch_tokens"
    largest = max(level.max_tokens * level.dp_degree(gpus) for level in config.levels)
    batch = max(config.training.global_batch_tokens, min(largest, int(most)))
    return config if key in draft.given else with_value(config, key, batch)


def _check_cpu(config: JobConfig, args: ModelArgs, ranks: int, hardware: Hardware) -> None:
    """Raise what a start on CPU ranks raises, and ValueError if memory is not enough."""
    check_config = replace(config, checkpoint=replace(config.checkpoint, initial_load_path="none"))
    check(check_config, ranks, torch.device(CPU), args)
    for level in config.levels:
        estimate = estimate_memory(args, level, config, ranks, device_type=CPU)
        needed = estimate.peak_bytes + estimate.host_bytes
        if needed > hardware.memory_bytes:
            raise ValueError(
                f"--gpu cpu: level {level_name(level)} needs {human_bytes(needed)} per rank, but this machine has "
                f"{human_bytes(hardware.memory_bytes)} for each of {ranks}; use --lora, fewer ranks or a smaller model"
            )


def _memory_reasons(args: ModelArgs, found: DryRun) -> dict[str, str]:
    """Return why the settings of the whole run are as they are, if they are not the defaults."""
    state, usable = found.rank_state, Machine.of(found.hardware, found.world_size).limit
    degree = found.config.parallelism.expert_parallel_degree
    return {
        "optimizer.name": (
            "Moments in 8 bits (2 bytes per parameter in place of 8): with AdamW in fp32 the longest sample does not "
            f"fit. Parameters, gradients and moments now take {human_bytes(state.total_bytes)} per GPU."
        ),
        "parallelism.cpu_offload": (
            f"Parameters, gradients and optimizer state, {human_bytes(state.total_bytes)} per GPU, are in host memory, "
            f"which leaves the {human_bytes(usable)} of a GPU to activations. Each micro-batch copies them over PCIe."
        ),
        "parallelism.expert_parallel_degree": (
            f"The experts of a layer are spread over {degree} GPUs of a node: faster by the estimate, or the only way "
            "that fits, than gathering all of them."
        ),
    }


def _explain_batch(draft: Draft, result: FirstConfig) -> None:
    plan, key = result.found.plan, "training.global_batch_tokens"
    if key not in draft.given:
        draft.reasons[key] = (
            f"About {round(len(plan.lengths) / plan.num_steps):,} samples per optimizer step, "
            f"{result.found.total_steps:,} steps in all. Chosen for about {STEPS} steps, with {LEAST_BATCH:,} to "
            f"{LARGEST_BATCH:,} tokens each, and a micro-batch of each level on all GPUs if that leaves {LEAST_STEPS} "
            "steps."
        )


def _choose_rates(draft: Draft, result: FirstConfig) -> None:
    if draft.config.lora.rank:
        draft.choose("optimizer.lr", LORA_LR, "Adapters learn with ten to twenty times the rate of full fine-tuning.")
    else:
        draft.choose("optimizer.lr", FULL_LR, "Full fine-tuning of a trained model; try 5e-6 and 2e-5 next.")
    steps = result.found.total_steps
    share = 0.03 if steps >= 300 else 0.1
    draft.choose("lr_scheduler.warmup_steps", share, f"About {max(1, round(share * steps))} of {steps:,} steps.")
    draft.choose("lr_scheduler.decay", draft.config.lr_scheduler.decay, "To min_lr_factor = 0.1 of the peak.")


def _choose_intervals(draft: Draft, result: FirstConfig) -> None:
    steps = result.found.total_steps
    often = max(1, steps // LEAST_CHECKPOINTS)
    by_time = often if result.on_cpu else max(1, round(CHECKPOINT_SECONDS / result.step_seconds))
    interval = rounded_down(min(by_time, often))
    each = "" if result.on_cpu else f", one about every {human_seconds(interval * result.step_seconds)}"
    reason = (
        f"{steps // interval} checkpoints of {steps:,} steps{each}: what a failure costs at most. Each takes about "
        f"{human_bytes(_checkpoint_bytes(result))} on disk; two are kept."
    )
    draft.choose("checkpoint.interval", interval, reason)
    if draft.config.validation.enable:
        every = rounded_down(max(1, steps // EVALUATIONS))
        draft.choose("validation.interval", every, f"{steps // every} evaluations, and one at the end.")


def _checkpoint_bytes(result: FirstConfig) -> int:
    """Return the bytes of the trained parameters and the optimizer's state of all ranks."""
    state, config = result.found.rank_state, result.draft.config
    trained = state.gradient_bytes if config.lora.rank else state.parameter_bytes
    return (trained + state.optimizer_bytes) * result.request.gpus // config.parallelism.dp_replicate


def rounded_down(number: int) -> int:
    """Return the largest number with two digits, of which the last is 0 or 5, and zeros that is not above `number`."""
    if number < 10:
        return number
    unit = 10 ** (len(str(number)) - 2)
    return number // (5 * unit) * 5 * unit
