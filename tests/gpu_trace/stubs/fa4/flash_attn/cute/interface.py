"""FlashAttention-4 without a GPU: the two functions that torch's registry calls.

Parameters are those of flash-attn-4 4.0.0b19 (flash_attn/cute/interface.py), the last that returns two tensors, as
torch 2.12 and 2.13 expect. What they compute is the reference attention. `flash_attn` is a namespace package, as there.
"""

from typing import Any

from torch import Tensor

from tests.gpu_trace import kernels


def _flash_attn_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    page_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    softcap: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    learnable_sink: Tensor | None = None,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    return_lse: bool = False,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    assert cu_seqlens_q is not None
    assert cu_seqlens_k is not None
    assert softmax_scale is not None
    kernels.CALLS.append({"max_seqlen": (max_seqlen_q, max_seqlen_k)})
    left = kernels.causal_left(causal, window_size_left, window_size_right)
    return kernels.forward(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, left)


def _flash_attn_bwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    dout: Tensor,
    lse: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    softcap: float = 0.0,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    deterministic: bool = False,
) -> tuple[Any, ...]:
    assert cu_seqlens_q is not None
    assert cu_seqlens_k is not None
    assert softmax_scale is not None
    kernels.CALLS.append({"deterministic": deterministic})
    left = kernels.causal_left(causal, window_size_left, window_size_right)
    return kernels.backward(dout, q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, left)
