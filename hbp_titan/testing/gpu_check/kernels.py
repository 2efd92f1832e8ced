"""Step of the GPU check that times Liger's kernels next to what torch.compile makes of ours, if liger_kernel is there.

Owns the four operations that both have, on the shapes of a Llama 3 8B layer and its head. Liger is no dependency: by
bytes and launches its kernels save nothing over compiled regions (docs/log.md), and this step would show otherwise.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hbp_titan.components.loss import linear_cross_entropy
from hbp_titan.models.layers import apply_rope
from hbp_titan.testing.gpu_check.runner import Found, Settings, Table
from hbp_titan.testing.gpu_check.speed import timed

EPS = 1e-5


@dataclass(frozen=True)
class Operation:
    """An operation that both have.

    inputs: the first `differentiable` of them get gradients. ours, liger: functions of the inputs that return one
        tensor. passes: tensors of `bytes_each` bytes that forward and backward have to read or write.
    """

    name: str
    inputs: tuple[Tensor, ...]
    differentiable: int
    ours: Callable[..., Tensor]
    liger: Callable[..., Tensor]
    passes: int
    bytes_each: int

    def gradients(self, run: Callable[..., Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
        """Run forward and backward; return the output and the gradients."""
        output = run(*inputs)
        grad = torch.ones_like(output) if output.ndim else None
        return [output, *torch.autograd.grad(output, inputs[: self.differentiable], grad)]

    def copies(self) -> list[Tensor]:
        """Return inputs of their own for one implementation: Liger's overwrite theirs."""
        needed = range(self.differentiable)
        return [x.detach().clone().requires_grad_(i in needed) for i, x in enumerate(self.inputs)]


def operations(settings: Settings, compiled: Callable[..., Any], backend: str) -> list[Operation]:
    """Return the operations. compiled: decorator for ours; backend: of torch.compile for the loss."""
    device = torch.device(settings.device_type)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tokens, hidden, inner, heads, kv_heads, width, vocab = (
        (64, 32, 48, 4, 2, 8, 100) if settings.tiny else (16384, 4096, 14336, 32, 8, 128, 128256)
    )
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, device=device, generator=generator)

    def rope(q_TND: Tensor, k_TKD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
        return torch.cat([apply_rope(x, cos_TD, sin_TD) for x in (q_TND, k_TKD)], dim=1)

    angles_TD = torch.arange(tokens, device=device)[:, None] / torch.arange(1, width // 2 + 1, device=device).repeat(2)
    labels_T = torch.randint(vocab, (tokens // 2,), device=device, generator=generator)
    weights_T = torch.ones(tokens // 2, device=device)
    head = (draw(tokens // 2, hidden), draw(vocab, hidden) / hidden**0.5, labels_T, weights_T)
    size = dtype.itemsize * tokens

    def loss(hidden_LH: Tensor, weight_VH: Tensor, labels_L: Tensor, weights_L: Tensor) -> Tensor:
        return linear_cross_entropy(hidden_LH, weight_VH, labels_L, weights_L, 2048, backend)[0]

    norm = partial(F.rms_norm, normalized_shape=(hidden,), eps=EPS)
    norm_inputs, mlp_inputs = (draw(tokens, hidden), draw(hidden)), (draw(tokens, inner), draw(tokens, inner))
    rotated = (draw(tokens, heads, width), draw(tokens, kv_heads, width), angles_TD.cos(), angles_TD.sin())
    return [
        Operation("RMSNorm", norm_inputs, 2, compiled(lambda x, w: norm(x, weight=w)), _liger_norm, 5, size * hidden),
        Operation("RoPE of q and k", rotated, 2, compiled(rope), _liger_rope, 4, size * (heads + kv_heads) * width),
        Operation("SwiGLU", mlp_inputs, 2, compiled(lambda a, b: F.silu(a) * b), _liger_swiglu, 8, size * inner),
        # Bound by products, not by bytes.
        Operation("linear cross entropy", head, 2, loss, _liger_loss, 0, 0),
    ]


def _liger_norm(x_TH: Tensor, weight_H: Tensor) -> Tensor:
    import liger_kernel.ops as liger

    return liger.LigerRMSNormFunction.apply(x_TH, weight_H, EPS, 0.0, "llama", False)


def _liger_rope(q_TND: Tensor, k_TKD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    import liger_kernel.ops as liger

    q, k = (x[None].transpose(1, 2) for x in (q_TND, k_TKD))
    rotated = liger.LigerRopeFunction.apply(q, k, cos_TD[None], sin_TD[None])
    return torch.cat([x.transpose(1, 2)[0] for x in rotated], dim=1)


def _liger_swiglu(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    import liger_kernel.ops as liger

    return liger.LigerSiLUMulFunction.apply(gate_TF, up_TF)


def _liger_loss(hidden_LH: Tensor, weight_VH: Tensor, labels_L: Tensor, weights_L: Tensor) -> Tensor:
    import liger_kernel.ops as liger

    return liger.LigerFusedLinearCrossEntropyFunction.apply(
        hidden_LH, weight_VH, labels_L, None, None, -100, 0.0, 0.0, "sum"
    )[0]


def fused_kernels(settings: Settings) -> Found:
    """Time forward and backward of each operation, compiled and by Liger, and compare their gradients."""
    device = torch.device(settings.device_type)
    on_gpu = device.type == "cuda"
    # Compiled for a CPU, ours would take a minute and say nothing.
    backend = "inductor" if on_gpu else ""
    compiled = partial(torch.compile, backend=backend, fullgraph=True, dynamic=False) if on_gpu else _plain
    installed = importlib.util.find_spec("liger_kernel") is not None
    rows, problems, details = [], [], {}
    for operation in operations(settings, compiled, backend):
        ours = operation.copies()
        expected = operation.gradients(operation.ours, ours)
        seconds = _seconds(operation, operation.ours, ours, device)
        rate = operation.passes * operation.bytes_each / seconds / 1e9
        row = [operation.name, f"{1e3 * seconds:.3f}", f"{rate:.0f}" if rate else "-", "-", "-", "-"]
        if installed:
            found = operation.gradients(operation.liger, operation.copies())
            difference = max(_difference(*pair) for pair in zip(found, expected, strict=True))
            theirs = _seconds(operation, operation.liger, operation.copies(), device)
            row[3:] = [f"{1e3 * theirs:.3f}", f"{theirs / seconds:.2f}", f"{difference:.1e}"]
            details[operation.name] = {"ours": seconds, "liger": theirs}
            if difference > (2e-2 if on_gpu else 1e-4):
                problems.append(f"{operation.name}: Liger's differs by {difference:.1e}")
        rows.append(row)
    columns = ["operation", "ms, compiled", "GB/s", "ms, Liger", "Liger / compiled", "difference"]
    ratios = ", ".join(f"{row[0]} {row[4]}" for row in rows)
    summary = f"time of Liger's over compiled: {ratios}" if installed else "liger_kernel is not installed: ours alone"
    return Found(summary, [Table("Forward and backward of one layer's operations", columns, rows)], details, problems)


def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def _seconds(operation: Operation, run: Callable[..., Tensor], inputs: Sequence[Tensor], device: torch.device) -> float:
    repeats = 2 if device.type == "cpu" else 10
    return median(timed(partial(operation.gradients, run, inputs), device) for _ in range(repeats))


def _difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference as a share of the largest value."""
    found, expected = found.detach().float(), expected.detach().float()
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
