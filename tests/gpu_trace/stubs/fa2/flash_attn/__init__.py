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


@torch.library.custom_op("flash_attn::_flash_attn_varlen_forward", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kernels.CALLS.append({"max_seqlen": (max_seqlen_q, max_seqlen_k)})
    kernels.check_causal(causal, window_size_left, window_size_right)
    out, lse = kernels.forward(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale)
    return out, lse, q.new_empty(0), torch.empty(2, dtype=torch.int64, device=q.device)


@_forward.register_fake
def _(q: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    lse = torch.empty((q.shape[1], q.shape[0]), dtype=torch.float32, device=q.device)
    return torch.empty_like(q), lse, q.new_empty(0), torch.empty(2, dtype=torch.int64, device=q.device)


@torch.library.custom_op("flash_attn::_flash_attn_varlen_backward", mutates_args=("dq", "dk", "dv"))
def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
    zero_tensors: bool = False,
) -> Tensor:
    assert dq is not None
    assert dk is not None
    assert dv is not None
    kernels.CALLS.append({"max_seqlen": (max_seqlen_q, max_seqlen_k), "deterministic": deterministic})
    kernels.check_causal(causal, window_size_left, window_size_right)
    grads = kernels.backward(dout, q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale)
    for place, grad in zip((dq, dk, dv), grads, strict=True):
        place.copy_(grad)
    return torch.empty_like(softmax_lse)


@_backward.register_fake
def _(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    return torch.empty_like(softmax_lse)


class FlashAttnVarlenFunc(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float,
        softmax_scale: float | None,
        causal: bool,
        window_size: tuple[int, int],
        softcap: float,
        alibi_slopes: Tensor | None,
        deterministic: bool,
        return_softmax: bool,
        block_table: Tensor | None,
        is_grad_enabled: bool,
    ) -> Tensor:
        scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        out, lse, _, rng_state = torch.ops.flash_attn._flash_attn_varlen_forward(
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            dropout_p,
            scale,
            causal=causal,
            window_size_left=window_size[0],
            window_size_right=window_size[1],
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            return_softmax=return_softmax and dropout_p > 0,
            block_table=block_table,
        )
        if is_grad_enabled and any(x.requires_grad for x in (q, k, v)):
            ctx.save_for_backward(q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, rng_state)
            ctx.options = (max_seqlen_q, max_seqlen_k, dropout_p, scale, causal, *window_size, softcap, alibi_slopes)
            ctx.deterministic = deterministic
        return out[..., : q.shape[2]]

    @staticmethod
    def backward(ctx: Any, dout: Tensor, *args: Any) -> tuple[Any, ...]:
        q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, rng_state = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        torch.ops.flash_attn._flash_attn_varlen_backward(
            dout,
            q,
            k,
            v,
            out,
            lse,
            dq,
            dk,
            dv,
            cu_seqlens_q,
            cu_seqlens_k,
            *ctx.options,
            ctx.deterministic,
            rng_state=rng_state,
        )
        return dq, dk, dv, *(None for _ in range(14))


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
    return FlashAttnVarlenFunc.apply(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
        block_table,
        torch.is_grad_enabled(),
    )
