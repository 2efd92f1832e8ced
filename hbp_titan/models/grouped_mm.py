"""Grouped matrix product: consecutive rows of one matrix, each group with a matrix of its own.

Owns `grouped_mm` and its CPU kernel. On CUDA in bfloat16 it is torch's grouped GEMM, one kernel for all groups and
no synchronization; elsewhere a product per group, as a custom op because the loop depends on data: torch.compile and
dry runs see one op whose shapes are known (torch's own operator refuses float32 without data).

Shape suffixes: S rows, E groups, I and O widths of input and output.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def grouped_mm(x_SI: Tensor, weight_EOI: Tensor, offsets_E: Tensor) -> Tensor:
    """y_SO: rows offsets[e - 1] to offsets[e] of x times weight[e].T. offsets_E: int32, ascending, S last."""
    # Of spread experts a rank may get no row at all, which the kernel does not promise to take.
    if x_SI.is_cuda and x_SI.dtype == torch.bfloat16 and x_SI.shape[0] > 0:
        return F.grouped_mm(x_SI, weight_EOI.transpose(-2, -1), offs=offsets_E)
    return grouped_mm_cpu(x_SI, weight_EOI, offsets_E)


@torch.library.custom_op("hbp_titan::grouped_mm_cpu", mutates_args=())
def grouped_mm_cpu(x_SI: Tensor, weight_EOI: Tensor, offsets_E: Tensor) -> Tensor:
    """grouped_mm by a product per group; any device and dtype."""
    y_SO = x_SI.new_empty(x_SI.shape[0], weight_EOI.shape[1])
    sizes = _sizes(offsets_E)
    for x_GI, weight_OI, y_GO in zip(x_SI.split(sizes), weight_EOI, y_SO.split(sizes), strict=True):
        torch.mm(x_GI, weight_OI.T, out=y_GO)
    return y_SO


@torch.library.custom_op("hbp_titan::grouped_mm_cpu_backward", mutates_args=())
def grouped_mm_cpu_backward(
    grad_SO: Tensor, x_SI: Tensor, weight_EOI: Tensor, offsets_E: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weights; a group without rows has a gradient of 0."""
    dx_SI, dweight_EOI = torch.empty_like(x_SI), torch.empty_like(weight_EOI)
    sizes = _sizes(offsets_E)
    parts = (grad_SO.split(sizes), x_SI.split(sizes), weight_EOI, dx_SI.split(sizes), dweight_EOI)
    for grad_GO, x_GI, weight_OI, dx_GI, dweight_OI in zip(*parts, strict=True):
        torch.mm(grad_GO, weight_OI, out=dx_GI)
        torch.mm(grad_GO.T, x_GI, out=dweight_OI)
    return dx_SI, dweight_EOI


def _sizes(offsets_E: Tensor) -> list[int]:
    return offsets_E.diff(prepend=offsets_E.new_zeros(1)).tolist()


@grouped_mm_cpu.register_fake
def _forward_fake(x_SI: Tensor, weight_EOI: Tensor, offsets_E: Tensor) -> Tensor:
    return x_SI.new_empty(x_SI.shape[0], weight_EOI.shape[1])


@grouped_mm_cpu_backward.register_fake
def _backward_fake(grad_SO: Tensor, x_SI: Tensor, weight_EOI: Tensor, offsets_E: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_SI), torch.empty_like(weight_EOI)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_SO: Tensor) -> tuple:
    return *grouped_mm_cpu_backward(grad_SO.contiguous(), *ctx.saved_tensors), None


grouped_mm_cpu.register_autograd(_backward, setup_context=_setup_context)
