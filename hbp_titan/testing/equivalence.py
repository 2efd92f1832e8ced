"""Equivalence check: packing and parallelism leave loss and gradients unchanged, on the user's own model and data.

Owns the reference, the runs and the verdicts; equivalence_cases.py has the cases. The reference is one process, one
sample at a time, fp32, without packing or recomputation, with plain cross entropy over all logits. Each case runs the
same samples through the engine that trains; gradients of several optimizer steps are weighted by the tokens of each.
Negative controls break one thing on purpose: a comparison that does not detect them proves nothing.

In bfloat16 a case cannot equal an fp32 reference, so the effect of rounding is measured: the reference is repeated in
bfloat16, unpacked, and a case may differ by BF16_FACTOR times the difference of the two, parameter by parameter. A
control must exceed its tolerance by BF16_CAUGHT_FACTOR; otherwise it is reported as below the noise.

With float8.recipe the reference has the same products, emulated. Scales per row make a token's product independent of
other tokens; those of a whole tensor do not, so "tensorwise" is not comparable with an unpacked run.

Shape suffixes: T tokens of one sample, N query heads, K key/value heads, D head width, S samples.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import itertools
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hbp_titan.components.loss import NORMALIZERS
from hbp_titan.config import JobConfig
from hbp_titan.data.loader import BatchShapes, PlanDataset
from hbp_titan.distributed.float8 import apply_float8
from hbp_titan.distributed.fsdp import whole_tensor
from hbp_titan.distributed.parallelize import DTYPES
from hbp_titan.distributed.world import World, all_reduce_values
from hbp_titan.engine import Engine
from hbp_titan.job_config import NEW_WEIGHTS, Float8
from hbp_titan.models.configs import ModelArgs
from hbp_titan.models.decoder import Decoder
from hbp_titan.models.documents import pack_documents
from hbp_titan.packing import build_plan
from hbp_titan.testing.equivalence_cases import BREAKAGES, PLAIN_PRODUCTS, Case, Samples
from hbp_titan.testing.local_ranks import run_distributed

LOSS_TOLERANCE = 1e-5
GRAD_TOLERANCE = 1e-4
FLOAT8_GRAD_TOLERANCE = 2e-3
"""Of FP8 products in float32 with scales per row: a sum in another order may change which float8 value is nearest."""
CAUGHT_FACTOR = 10.0
"""A control must differ by this multiple of a sound case's tolerance."""
BF16_FACTOR = 3.0
"""Tolerance of a sound case in bfloat16, as a multiple of the effect of rounding on an unpacked run."""
BF16_CAUGHT_FACTOR = 2.0
"""CAUGHT_FACTOR in bfloat16: the noise is measured, so a smaller factor separates."""


@dataclass(frozen=True)
class Outcome:
    """Mean loss per trained token over all samples, and its gradients: fp32, unsharded, on the CPU."""

    loss: float
    grads: dict[str, Tensor]


@dataclass(frozen=True)
class Difference:
    """Relative differences from the reference: of the mean loss, and of the norm of each parameter's gradient."""

    loss: float
    grads: dict[str, float]


@dataclass(frozen=True)
class Tolerance:
    """Allowed differences of a sound case. caught_factor: multiple of them by which a control must differ."""

    loss: float
    grads: dict[str, float]
    caught_factor: float

    @classmethod
    def of_fp32(cls, names: Sequence[str], gradient: float = GRAD_TOLERANCE) -> Tolerance:
        """Return a fixed tolerance in float32."""
        return cls(LOSS_TOLERANCE, dict.fromkeys(names, gradient), CAUGHT_FACTOR)

    @classmethod
    def of_noise(cls, noise: Difference) -> Tolerance:
        """Return the tolerance in bfloat16. noise: the effect of rounding on the unpacked run."""
        grads = {name: max(BF16_FACTOR * value, GRAD_TOLERANCE) for name, value in noise.grads.items()}
        return cls(max(BF16_FACTOR * noise.loss, LOSS_TOLERANCE), grads, BF16_CAUGHT_FACTOR)


@dataclass(frozen=True)
class Result:
    """Result of one case.

    worst: the parameter whose gradient differs most relative to its tolerance. grad_difference, grad_allowed: of it.
    loss_allowed, grad_allowed: the tolerance of a sound case, or what a control must exceed.
    """

    case: Case
    loss_difference: float
    grad_difference: float
    worst: str
    loss_allowed: float = LOSS_TOLERANCE
    grad_allowed: float = GRAD_TOLERANCE

    @property
    def control(self) -> bool:
        """Whether the case is broken on purpose, or normalizes the loss differently, so that it must differ."""
        return bool(self.case.broken) or self.case.loss_normalization != "ave_token" or self.case.name == PLAIN_PRODUCTS

    @property
    def passed(self) -> bool:
        """Whether a sound case agrees, or a control is detected."""
        if self.control:
            return self.grad_difference > self.grad_allowed
        return self.loss_difference <= self.loss_allowed and self.grad_difference <= self.grad_allowed


class _OneDocumentAttention(nn.Module):
    """Causal attention of a single document, which shares no code with the attention that is checked."""

    def __init__(self, scale: float | None, window: int | None) -> None:
        super().__init__()
        self.scale, self.window = scale, window

    def forward(self, q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, *_: Any) -> Tensor:
        group = q_TND.shape[1] // k_TKD.shape[1]
        k_TND, v_TND = k_TKD.repeat_interleave(group, dim=1), v_TKD.repeat_interleave(group, dim=1)
        q_NTD, k_NTD, v_NTD = (x.transpose(0, 1).unsqueeze(0) for x in (q_TND, k_TND, v_TND))
        visible_TT = torch.ones(len(q_TND), len(q_TND), dtype=torch.bool, device=q_TND.device).tril()
        if self.window is not None:
            visible_TT = visible_TT.triu(1 - self.window)
        o_NTD = F.scaled_dot_product_attention(q_NTD, k_NTD, v_NTD, attn_mask=visible_TT, scale=self.scale)
        return o_NTD.squeeze(0).transpose(0, 1)


def _reference_model(args: ModelArgs, seed: int, weights: str) -> nn.Module:
    """Return a model with plain attention; for model.backend = "transformers" its own model with these weights."""
    if args.hf_config is not None:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(weights, attn_implementation="eager", dtype=torch.float32).eval()
    model = Decoder(args)
    model.init_weights(seed)
    for layer, block in enumerate(model.blocks()):
        block.inner_attention = _OneDocumentAttention(args.softmax_scale, args.window(layer))
    return model


def reference(
    args: ModelArgs,
    seed: int,
    samples: Samples,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    weights: str = "",
    float8: Float8 | None = None,
) -> tuple[Tensor, Outcome]:
    """Run one sample at a time in one process, entirely in `dtype`; sum gradients over samples in float32.

    weights: HF folder of a model that transformers builds; others get new weights from `seed`. float8: of FP8 products.
    Returns the sum of the token losses of each sample, float64 [S], and the outcome.
    """
    model = _reference_model(args, seed, weights).to(device, dtype)
    if float8 and float8.recipe:
        assert isinstance(model, Decoder)
        apply_float8(model, dataclasses.replace(float8, fsdp_all_gather=False))
    total = int(samples.loss_tokens.sum())
    grads = {name: torch.zeros(p.shape, device=device) for name, p in _trained(model)}
    losses = []
    for tokens, mask in samples.rows:
        ids = torch.from_numpy(tokens.astype(np.int64)).to(device)
        share = torch.tensor([int(mask[1:].sum()) / total], device=device)
        if isinstance(model, Decoder):
            # The balance losses of experts are means per document, weighted like its tokens.
            model.balance.set_documents(torch.zeros_like(ids), share)
            logits = model(ids, torch.arange(len(ids), device=device), pack_documents([len(ids)]))
        else:
            logits = model(input_ids=ids[None], use_cache=False).logits[0]
        kept = torch.from_numpy(mask[1:].astype(bool)).to(device)
        loss = F.cross_entropy(logits[:-1][kept].float(), ids[1:][kept], reduction="sum")
        (loss / total).backward()
        losses.append(loss.item())
        for name, parameter in _trained(model):
            # In float32: sums in bfloat16 would lose the gradients of short samples.
            grads[name] += _grad(parameter)
        model.zero_grad()
    losses_S = torch.tensor(losses, dtype=torch.float64)
    return losses_S, Outcome(float(losses_S.sum()) / total, {name: grad.cpu() for name, grad in grads.items()})


def reference_and_tolerance(
    args: ModelArgs,
    seed: int,
    samples: Samples,
    device: torch.device,
    dtype: torch.dtype,
    weights: str = "",
    float8: Float8 | None = None,
) -> tuple[Outcome, Tolerance]:
    """Return the fp32 reference, and the tolerance of a case that computes in `dtype`; the rest as of `reference`."""
    losses_S, expected = reference(args, seed, samples, device, weights=weights, float8=float8)
    if dtype == torch.float32:
        gradient = FLOAT8_GRAD_TOLERANCE if float8 and float8.recipe else GRAD_TOLERANCE
        return expected, Tolerance.of_fp32([*expected.grads], gradient)
    rounded_S, rounded = reference(args, seed, samples, device, dtype, weights, float8)
    # In the mean loss the errors of samples cancel by chance; the sum of their absolute values bounds it.
    noise = float((rounded_S - losses_S).abs().sum() / losses_S.sum())
    return expected, Tolerance.of_noise(Difference(noise, compare(expected, rounded).grads))


def run_case(
    world: World, config: JobConfig, args: ModelArgs, case: Case, samples: Samples, dtype: str = "float32"
) -> Outcome:
    """Return mean loss and gradients of one case; all its ranks call it. dtype: training.mixed_precision_param."""
    # The next case starts from the user's configuration again.
    config = copy.deepcopy(config)
    config.levels = list(case.levels)
    config.compile.enable = case.compile
    if args.hf_config is None:
        config.checkpoint.initial_load_path = NEW_WEIGHTS
    config.parallelism.expert_parallel_degree = case.expert_parallel
    config.parallelism.dp_replicate = case.dp_replicate
    config.parallelism.cpu_offload = case.cpu_offload
    # Every gradient is compared, including those that LoRA does not compute.
    config.lora.rank = 0
    # Parameters and gradients are compared in float32, also where the computation is in bfloat16.
    config.training.dtype = "float32"
    config.training.mixed_precision_param = dtype
    engine = Engine(config, args, world)
    plan = build_plan(
        samples.lengths,
        case.levels,
        world.size,
        loss_tokens=samples.loss_tokens,
        global_batch_tokens=case.global_batch_tokens,
        level_order=case.level_order,
    )
    shapes = BatchShapes.from_plan(plan, args.num_kv_heads, args.sliding_window)
    batches = PlanDataset(plan, samples, world.rank, shapes, NORMALIZERS[case.loss_normalization])
    breakage = BREAKAGES.get(case.broken, lambda batch: batch)
    joined = {name: torch.zeros(p.shape, device=world.device) for name, p in _trained(engine.model)}
    loss_sum = 0.0
    for step in range(plan.num_steps):
        end = int(plan.step_offsets[step + 1])
        for micro_batch in range(int(plan.step_offsets[step]), end):
            losses_S = engine.forward_backward(breakage(batches[micro_batch]), last=micro_batch + 1 == end)
            loss_sum += losses_S.sum().item()
        # A step's gradient is that of its own mean; the reference's is that of the mean over all samples.
        share = int(plan.step_loss_tokens[step]) / int(samples.loss_tokens.sum())
        for name, parameter in _trained(engine.model):
            joined[name] += share * _grad(parameter)
        engine.model.zero_grad()
    (loss_sum,) = all_reduce_values([loss_sum], "sum", world.device)
    return Outcome(loss_sum / int(samples.loss_tokens.sum()), {name: grad.cpu() for name, grad in joined.items()})


def run_cases(
    world: World,
    config: JobConfig,
    args: ModelArgs,
    cases: Sequence[Case],
    samples: Samples,
    dtype: str,
    expected_path: Path,
) -> list[tuple[float, dict[str, float]]]:
    """Return the differences (loss, gradients) of cases of one world size; only rank 0's are complete.

    expected_path: file with the reference's (loss, gradients), which are too large to send to the ranks.
    """
    # As large as the model, so one rank compares, and reads the file as needed.
    loss, grads = torch.load(expected_path, mmap=True) if world.rank == 0 else (1.0, {})
    found = []
    for case in cases:
        # Graphs of an earlier case would count towards the compiler's limit.
        torch._dynamo.reset()
        found.append(compare(Outcome(loss, grads), run_case(world, config, args, case, samples, dtype)))
        # An engine is part of reference cycles, and the next case needs its memory.
        gc.collect()
    return [(difference.loss, difference.grads) for difference in found]


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters with gradients: all but the biases of DeepSeek-V3's routers."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def _grad(parameter: Tensor) -> Tensor:
    grad = parameter.grad
    assert grad is not None
    return whole_tensor(grad)


def compare(expected: Outcome, found: Outcome) -> Difference:
    """Return the relative differences of `found` for each expected gradient."""
    grads = {
        # An expert without tokens has a gradient of zero.
        name: float((found.grads[name] - grad).norm() / grad.norm().clamp(min=1e-30))
        for name, grad in expected.grads.items()
    }
    return Difference(abs(found.loss - expected.loss) / abs(expected.loss), grads)


def judge(case: Case, difference: Difference, tolerance: Tolerance) -> Result:
    """Return the result of one case."""
    worst = max(difference.grads, key=lambda name: difference.grads[name] / tolerance.grads[name])
    result = Result(case, difference.loss, difference.grads[worst], worst, tolerance.loss, tolerance.grads[worst])
    if not result.control:
        return result
    return dataclasses.replace(result, grad_allowed=tolerance.caught_factor * result.grad_allowed)


def verify(
    config: JobConfig,
    args: ModelArgs,
    cases: Sequence[Case],
    samples: Samples,
    device_type: str = "cpu",
    dtype: str = "float32",
) -> Iterator[Result]:
    """Run every case on ranks of this machine, one start per world size, and compare with the reference.

    device_type: "cpu", or "cuda" with one GPU per rank. dtype: of the cases' computation.
    """
    expected, tolerance = reference_and_tolerance(
        args,
        config.training.seed,
        samples,
        torch.device(device_type),
        DTYPES[dtype],
        config.weights_path,
        config.float8,
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "expected")
        torch.save((expected.loss, expected.grads), path)
        # Starting the ranks takes longer than a small case.
        for world_size, group in itertools.groupby(cases, key=lambda case: case.world_size):
            same_size = list(group)
            inputs = (config, args, same_size, samples, dtype, path)
            timeout = 240.0 * len(same_size)
            found = run_distributed(run_cases, world_size, *inputs, timeout=timeout, device_type=device_type)[0]
            for case, (loss, grads) in zip(same_size, found, strict=True):
                yield judge(case, Difference(loss, grads), tolerance)


HEADER = f"{'case':<50}{'loss':>9}{'gradient':>10}{'limit':>9}  verdict"


def row(result: Result) -> str:
    """Return one line of the table under HEADER; the limit is the gradient's, which a control must exceed."""
    if result.control:
        verdict = "caught" if result.passed else "NOT CAUGHT (below the noise of this precision)"
    else:
        verdict = "equal" if result.passed else "DIFFERS"
    where = "" if result.passed else f" ({result.worst})"
    figures = f"{result.loss_difference:>9.1e}{result.grad_difference:>10.1e}{result.grad_allowed:>9.1e}"
    return f"{result.case.name:<50}{figures}  {verdict}{where}"
