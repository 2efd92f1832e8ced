"""Steps of the GPU check on the model's code: compiled blocks, synchronizations, determinism.

Owns the comparison of a compiled block with an fp32 reference, for every installed attention kernel and every
checkpoint policy, and the counts of graphs and synchronizations.

Shape suffixes: T tokens of the pack, H hidden width, D head width.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from hbp_titan.components.optimizer import build_optimizer, clip_grad_norm, step_unless
from hbp_titan.components.resume import set_determinism
from hbp_titan.config import JobConfig
from hbp_titan.data.batch import PackedBatch
from hbp_titan.distributed.activation_checkpoint import ActivationCheckpointState, apply_activation_checkpoint
from hbp_titan.distributed.offload import HostActivations
from hbp_titan.distributed.parallelize import apply_compile
from hbp_titan.distributed.world import World, close_world, init_world
from hbp_titan.engine import Engine
from hbp_titan.experiments.bench_train import Documents as DocumentLengths
from hbp_titan.experiments.bench_train import random_batches
from hbp_titan.models.attention import BACKENDS, choose_backend, set_backend
from hbp_titan.models.configs import ModelArgs
from hbp_titan.models.decoder import Decoder, DecoderBlock
from hbp_titan.models.documents import Documents, pack_documents
from hbp_titan.models.layers import attention_factor, rope_cos_sin
from hbp_titan.models.registry import get_flavor
from hbp_titan.packing import Level
from hbp_titan.packing.level import AC_POLICIES
from hbp_titan.testing.equivalence import BF16_FACTOR, GRAD_TOLERANCE, Outcome, Tolerance, compare
from hbp_titan.testing.gpu_check.runner import ROOT, Found, Settings, Table


@contextmanager
def one_rank(settings: Settings) -> Iterator[World]:
    """Provide a world of one rank on the device of the check."""
    # The runner hides the GPUs from a step that asks for the CPU.
    world = init_world(600)
    try:
        if world.device.type != settings.device_type:
            raise ValueError(f"--device {settings.device_type}: torch finds no usable device")
        yield world
    finally:
        close_world()


def base_config(settings: Settings, *, compiled: bool) -> JobConfig:
    """Return the defaults, with inductor on a GPU; on a CPU with a backend that only traces, which is much faster."""
    config = JobConfig()
    config.compile.enable = compiled
    config.compile.backend = "inductor" if settings.device_type == "cuda" else "aot_eager"
    return config


def usable_backends(device: torch.device, head_dim: int) -> tuple[list[str], list[list[str]]]:
    """Return the attention backends that run here, and [name, reason] of the others; select "auto" at the end."""
    usable, missing = [], []
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for name in BACKENDS:
        try:
            choose_backend(name, device, head_dim, dtype)
            usable.append(name)
        except ValueError as error:
            missing.append([name, str(error)])
    set_backend("auto")
    return usable, missing


# Compiled blocks


@dataclasses.dataclass(frozen=True)
class _Inputs:
    """Inputs of a block, on the device; x_TH is float32."""

    x_TH: Tensor
    cos_TD: Tensor
    sin_TD: Tensor
    documents: Documents


def compiled_blocks(settings: Settings) -> Found:
    """Compare a compiled block with an eager fp32 block, per kernel and policy: forward, backward and no_grad."""
    device = torch.device(settings.device_type)
    flavor, tokens = ("debug", 128) if settings.tiny else ("llama3_2_1b", 4096)
    # One block is compared; a whole vocabulary would only take memory.
    args = dataclasses.replace(get_flavor(flavor).with_layers(1), vocab_size=256)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    # Short documents, because the reference materializes the scores of a whole document.
    inputs = _inputs(args, [tokens // 4, tokens // 8, *[tokens // 16] * 10], device)
    others = _inputs(args, [tokens // 2, tokens // 4, tokens // 4], device)
    exact = Decoder(args)
    exact.init_weights(seed=0)
    exact.to(device)
    rounded = copy.deepcopy(exact).to(dtype)
    set_backend("reference")
    expected = _run_block(next(exact.blocks()), inputs)
    tolerance = Tolerance.of_fp32([*expected.grads])
    if dtype != torch.float32:
        tolerance = Tolerance.of_noise(compare(expected, _run_block(next(rounded.blocks()), inputs)))
    usable, missing = usable_backends(device, args.head_dim)
    state = ActivationCheckpointState(host=HostActivations(device))
    counters.clear()
    torch._dynamo.reset()
    apply_compile(rounded, base_config(settings, compiled=True).compile.backend, num_levels=1)
    apply_activation_checkpoint(rounded, state)
    rows, problems = [], []
    for name in usable:
        # The expected values are its own.
        if name == "reference" and device.type == "cuda":
            continue
        set_backend(name)
        for policy in AC_POLICIES:
            # As a level switch does it: an assignment, without compiling again.
            state.set_level(Level(tokens, ac_policy=policy), 1)
            row, wrong = _compare_block(next(rounded.blocks()), inputs, expected, tolerance)
            rows.append([name, policy, *row, str(_graphs())])
            problems += [f"{name}, {policy}: {text}" for text in wrong]
    graphs = _graphs()
    for policy in AC_POLICIES:
        state.set_level(Level(tokens, ac_policy=policy), 1)
        _run_block(next(rounded.blocks()), others)
    if _graphs() != graphs:
        problems.append(f"other document lengths caused recompilation: {_graphs() - graphs} new graphs")
    set_backend("auto")
    columns = ["kernel", "policy", "output", "worst gradient", "of", "worst / limit", "no_grad - output", "graphs"]
    title = f"{flavor}, one block, {tokens} tokens, {dtype}, limit {_limit(dtype)}"
    tables = [Table(title, columns, rows), Table("kernels that are not available", ["kernel", "why"], missing)]
    kernels = [row[0] for row in rows[:: len(AC_POLICIES)]]
    summary = f"{', '.join(kernels)} under {len(AC_POLICIES)} policies; {graphs} graphs, none for other lengths"
    return Found(summary if not problems else "", tables, {"graphs": graphs}, problems)


def _limit(dtype: torch.dtype) -> str:
    rounding = f"{BF16_FACTOR:g} times an eager block's difference in the same precision"
    return f"{GRAD_TOLERANCE:g}" if dtype == torch.float32 else rounding


def _inputs(args: ModelArgs, lengths: Sequence[int], device: torch.device) -> _Inputs:
    """Return random hidden states of documents with these lengths."""
    generator = torch.Generator().manual_seed(0)
    positions = torch.from_numpy(np.concatenate([np.arange(length) for length in lengths])).to(device)
    # For its rotary frequencies alone.
    model = Decoder(dataclasses.replace(args.with_layers(0), vocab_size=1))
    cos_TD, sin_TD = rope_cos_sin(model.inverse_frequencies, positions, attention_factor(args.rope_scaling))
    x_TH = torch.randn(len(positions), args.hidden_size, generator=generator).to(device)
    return _Inputs(x_TH, cos_TD, sin_TD, pack_documents(lengths, device=device))


def _run_block(block: DecoderBlock, inputs: _Inputs) -> Outcome:
    """Return the output and all gradients as the grads of an Outcome, whose loss has no meaning."""
    block.zero_grad()
    dtype = next(block.parameters()).dtype
    x_TH = inputs.x_TH.to(dtype, copy=True).requires_grad_()
    y_TH = block(x_TH, inputs.cos_TD, inputs.sin_TD, inputs.documents)
    # Weights that differ per token, because with equal weights a mix-up of tokens would not show.
    y_TH.backward(inputs.x_TH.flip(0).to(dtype))
    assert x_TH.grad is not None
    found = {"output": y_TH.detach(), "input": x_TH.grad}
    found |= {name: p.grad for name, p in block.named_parameters() if p.grad is not None}
    return Outcome(1.0, {name: value.float() for name, value in found.items()})


def _compare_block(
    block: DecoderBlock, inputs: _Inputs, expected: Outcome, tolerance: Tolerance
) -> tuple[list[str], list[str]]:
    """Return the cells of one row, and the problems."""
    outcome = _run_block(block, inputs)
    differences = compare(expected, outcome).grads
    worst = max(differences, key=lambda name: differences[name] / tolerance.grads[name])
    share = differences[worst] / tolerance.grads[worst]
    with torch.no_grad():
        x_TH = inputs.x_TH.to(next(block.parameters()).dtype)
        y_TH = block(x_TH, inputs.cos_TD, inputs.sin_TD, inputs.documents).float()
    without = float((y_TH - outcome.grads["output"]).norm() / y_TH.norm())
    wrong = [f"{worst} differs by {differences[worst]:.1e}, {share:.1f} times its limit"] if share > 1 else []
    # Negated comparisons, so that NaN is a problem.
    if not share <= 1 and not wrong:
        wrong.append(f"{worst} is {differences[worst]}")
    if not without <= tolerance.grads["output"]:
        wrong.append(f"no_grad gives another output, by {without:.1e}")
    gradient = max(value for name, value in differences.items() if name != "output")
    return [f"{differences['output']:.1e}", f"{gradient:.1e}", worst, f"{share:.2f}", f"{without:.1e}"], wrong


def _graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


# Optimizer steps


def _small_run(settings: Settings) -> tuple[ModelArgs, JobConfig]:
    """Return a model of two layers and two levels, compiled only on a GPU: `compiled_blocks` covers the CPU."""
    args = dataclasses.replace(get_flavor("debug" if settings.tiny else "llama3_2_1b"), num_layers=2, vocab_size=4096)
    config = base_config(settings, compiled=settings.device_type == "cuda")
    low, high = (64, 128) if settings.tiny else (4096, 16384)
    config.levels = [Level(low), Level(high, ac_policy="keep_attention")]
    config.optimizer.lr = 1e-3
    return args, config


def batches_of(args: ModelArgs, config: JobConfig, device: torch.device) -> list[PackedBatch]:
    """Return one batch per level."""
    batches = []
    for index, level in enumerate(config.levels):
        lengths = DocumentLengths(level.max_tokens // 10).lengths(level.max_tokens, seed=index)
        batches += random_batches([lengths], args, level, index, 0)
    # A copy from pageable memory would be a synchronization of its own.
    return [batch.pin_memory() for batch in batches] if device.type == "cuda" else batches


def optimizer_step(engine: Engine, optimizer: torch.optim.Optimizer, batches: Sequence[PackedBatch]) -> list[Tensor]:
    """Run an optimizer step over `batches`; return the losses and the norm, still on the device."""
    losses = [engine.forward_backward(batch) for batch in batches]
    norm = clip_grad_norm(engine.model, 1.0)
    # As in training: whether the update is skipped is decided on the device.
    step_unless(optimizer, torch.zeros((), device=norm.device))
    optimizer.zero_grad()
    return [*losses, norm]


def synchronizations(settings: Settings) -> Found:
    """Find where the host waits for the device during an optimizer step of a dense model over two levels."""
    args, config = _small_run(settings)
    with one_rank(settings) as world:
        engine = Engine(config, args, world)
        optimizer = build_optimizer(engine.model, config.optimizer)
        batches = batches_of(args, config, world.device)
        # Compilation, first allocations and the creation of AdamW's state synchronize, once.
        for _ in range(2):
            optimizer_step(engine, optimizer, batches)
        if settings.device_type != "cuda":
            return Found(skipped="synchronizations exist only with a GPU; the step itself ran")
        with _recorded_synchronizations() as places:
            optimizer_step(engine, optimizer, batches)
    counts = collections.Counter(places).most_common()
    rows = [[place, str(count)] for place, count in counts]
    problems = [f"{len(places)} synchronizations in a step, at {', '.join(place for place, _ in counts)}"] * bool(
        places
    )
    summary = "" if places else "none in forward, backward, clipping and update"
    return Found(summary, [Table("places", ["place", "count"], rows)], {"count": len(places)}, problems)


@contextmanager
def _recorded_synchronizations() -> Iterator[list[str]]:
    """Collect the place of every synchronization in the body: our innermost line and the innermost of all."""
    places: list[str] = []

    def record(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
        if "synchroniz" not in str(message):
            return
        # Without this function.
        frames = traceback.extract_stack()[:-1]
        own = [f for f in frames if Path(f.filename).is_relative_to(ROOT) and f.filename != __file__]
        ours = f"{Path(own[-1].filename).relative_to(ROOT)}:{own[-1].lineno} > " if own else ""
        places.append(f"{ours}{'/'.join(Path(filename).parts[-3:])}:{lineno}")

    # Nothing of earlier steps is left for the body to wait for.
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = record
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode("default")


def deterministic(settings: Settings) -> Found:
    """Check that two runs of three steps in deterministic mode are bit-identical: parameters, losses and norms."""
    args, config = _small_run(settings)
    config.training.deterministic = True
    # Before the first matrix product of the process, when cuBLAS reads its workspace setting.
    set_determinism(0, deterministic=True)
    with one_rank(settings) as world:
        first, second = (_train(args, config, world) for _ in range(2))
    different = [name for name, value in first.items() if not value.equal(second[name])]
    problems = [f"{len(different)} of {len(first)} tensors differ, the first is {different[0]}"] if different else []
    return Found(f"{len(first)} tensors equal bit for bit after three steps" * (not problems), problems=problems)


def _train(args: ModelArgs, config: JobConfig, world: World) -> dict[str, Tensor]:
    """Return every parameter, and the losses and norm of each step, of a run from new weights."""
    torch._dynamo.reset()
    engine = Engine(config, args, world)
    optimizer = build_optimizer(engine.model, config.optimizer)
    batches = batches_of(args, config, world.device)
    values: dict[str, Tensor] = {}
    for step in range(3):
        values |= {
            f"step {step}, {i}": value.cpu() for i, value in enumerate(optimizer_step(engine, optimizer, batches))
        }
    # On one rank the shard is the whole parameter.
    local = {name: getattr(p, "_local_tensor", p).detach().cpu() for name, p in engine.model.named_parameters()}
    return {**values, **local}
