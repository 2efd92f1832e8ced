"""flash-attn 2 without a GPU: the package's public function, its autograd function and its two operators.

Names, parameters, defaults and the structure that torch.compile sees are those of flash-attn 2.8.3
(https://github.com/Dao-AILab/flash-attention, flash_attn/flash_attn_interface.py): an autograd.Function with positional
arguments around the operators `flash_attn::_flash_attn_varlen_forward` and `_flash_attn_varlen_backward`. In place of
the CUDA kernels lies the reference attention, so that calls on the CPU have right results.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.gpu_trace import kernels

__version__ = "2.8.3"


@torch.library.custom_op(
    "flash_attn::_flash_attn_varlen_forward",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, "
    "SymInt max_seqlen_k, float dropout_p, float softmax_scale, bool causal, SymInt window_size_left = -1, "
    "SymInt window_size_right = -1, float softcap = 0.0, Tensor? alibi_slopes = None, bool return_softmax = False, "
    "Tensor? block_table = None, Tensor? leftpad_k = None, Tensor? seqused_k = None, bool zero_tensors = False) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, _, scale, causal, *rest = args
    # The dispatcher leaves out defaults at the end.
    left, right = [*rest, -1, -1][:2]
    kernels.CALLS.append({"max_seqlen": (max_q, max_k)})
    left = kernels.causal_left(causal, left, right)
    out, lse = kernels.forward(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, left)
    return out, lse, q.new_empty(0), torch.empty(2, dtype=torch.int64, device=q.device)


@_forward.register_fake
def _(q: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    lse = torch.empty((q.shape[1], q.shape[0]), dtype=torch.float32, device=q.device)
    return torch.empty_like(q), lse, q.new_empty(0), torch.empty(2, dtype=torch.int64, device=q.device)


@torch.library.custom_op(
    "flash_attn::_flash_attn_varlen_backward",
    mutates_args=("dq", "dk", "dv"),
    schema="(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor(a6!)? dq, "
    "Tensor(a7!)? dk, Tensor(a8!)? dv, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, "
    "SymInt max_seqlen_k, float dropout_p, float softmax_scale, bool causal, SymInt window_size_left, "
    "SymInt window_size_right, float softcap, Tensor? alibi_slopes, bool deterministic, Tensor? rng_state = None, "
    "bool zero_tensors = False) -> Tensor",
)
def _backward(*args: Any) -> Tensor:
    dout, q, k, v, _, lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_q, max_k, _, scale, causal, *rest = args
    left, right, _, _, deterministic = rest[:5]
    kernels.CALLS.append({"max_seqlen": (max_q, max_k), "deterministic": deterministic})
    left = kernels.causal_left(causal, left, right)
    grads = kernels.backward(dout, q, k, v, cu_seqlens_q, cu_seqlens_k, scale, left)
    for place, grad in zip((dq, dk, dv), grads, strict=True):
        place.copy_(grad)
    return torch.empty_like(lse)


@_backward.register_fake
def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(lse)


class FlashAttnVarlenFunc(torch.autograd.Function):
    """As in the package, its arguments are positional: the inputs, then the options of the function."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, dropout_p, softmax_scale, causal, window_size, *rest = args
        softcap, alibi_slopes, deterministic, return_softmax, block_table, is_grad_enabled = rest
        scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        inputs = (q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, dropout_p, scale)
        options = {"causal": causal, "softcap": softcap, "alibi_slopes": alibi_slopes, "block_table": block_table}
        out, lse, _, rng_state = torch.ops.flash_attn._flash_attn_varlen_forward(
            *inputs, window_size_left=window_size[0], window_size_right=window_size[1],
            return_softmax=return_softmax and dropout_p > 0, **options,
        )  # fmt: skip
        if is_grad_enabled and any(x.requires_grad for x in (q, k, v)):
            ctx.save_for_backward(q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, rng_state)
            ctx.options = (max_q, max_k, dropout_p, scale, causal, *window_size, softcap, alibi_slopes, deterministic)
        return out[..., : q.shape[2]]

    @staticmethod
    def backward(ctx: Any, dout: Tensor, *args: Any) -> tuple[Any, ...]:
        q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, rng_state = ctx.saved_tensors
        grads = [torch.empty_like(x) for x in (q, k, v)]
        inputs = (dout, q, k, v, out, lse, *grads, cu_seqlens_q, cu_seqlens_k)
        torch.ops.flash_attn._flash_attn_varlen_backward(*inputs, *ctx.options, rng_state=rng_state)
        return *grads, *(None for _ in range(14))


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor:
    inputs = (q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    return FlashAttnVarlenFunc.apply(*inputs, *options, block_table, torch.is_grad_enabled())
