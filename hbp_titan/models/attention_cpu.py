"""The CPU backend of varlen attention: torch's CPU flash kernel, once per document, as custom ops.

Custom ops because the loop over documents depends on data: torch.compile sees one opaque op (fullgraph, no
recompilation when lengths change). The forward keeps the output and the logsumexp, from which the flash backward
recomputes the probabilities, as on a GPU. Empty documents are skipped: the kernel dies on them (SIGFPE).

Shape suffixes: T tokens of the pack, L tokens of one document, N query heads, K key/value heads, G = N / K,
D head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_flash_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def document_lengths(cu_seqlens: Tensor, num_tokens: int) -> list[int]:
    """Lengths of the non-empty documents. Raises ValueError unless cu_seqlens ascends from 0 to num_tokens."""
    lengths = cu_seqlens.diff().tolist()
    if cu_seqlens[0] != 0 or sum(lengths) != num_tokens or min(lengths) < 0:
        raise ValueError(
            f"cu_seqlens must ascend from 0 to the {num_tokens} tokens of the pack, not {cu_seqlens.tolist()}"
        )
    return [length for length in lengths if length]


@torch.library.custom_op("hbp_titan::varlen_attention_cpu", mutates_args=())
def varlen_attention_cpu(
    q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, cu_seqlens: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """o_TND and the logsumexp [T, N] (float64 for float64, else float32) of causal attention per document."""
    o_TND, lse_TN = _empty_outputs(q_TND)
    lengths = document_lengths(cu_seqlens, q_TND.shape[0])
    num_kv_heads, group = _groups(q_TND, k_TKD)
    parts = (t.split(lengths) for t in (q_TND, k_TKD, v_TKD, o_TND, lse_TN))
    for q_LND, k_LKD, v_LKD, o_LND, lse_LN in zip(*parts, strict=True):
        k_KGLD, v_KGLD = _shared(k_LKD, group), _shared(v_LKD, group)
        out_KGLD, lse_KGL = _flash_forward(_grouped(q_LND, num_kv_heads), k_KGLD, v_KGLD, 0.0, True, scale=scale)
        o_LND.copy_(_ungrouped(out_KGLD))
        lse_LN.copy_(lse_KGL.flatten(0, 1).T)
    return o_TND, lse_TN


@torch.library.custom_op("hbp_titan::varlen_attention_cpu_backward", mutates_args=())
def varlen_attention_cpu_backward(
    grad_TND: Tensor,
    q_TND: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    o_TND: Tensor,
    lse_TN: Tensor,
    cu_seqlens: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; those of a key/value head sum over its G query heads, in the dtype of the inputs."""
    grads = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q_TND, k_TKD, v_TKD)]
    lengths = document_lengths(cu_seqlens, q_TND.shape[0])
    num_kv_heads, group = _groups(q_TND, k_TKD)
    parts = (t.split(lengths) for t in (grad_TND, q_TND, k_TKD, v_TKD, o_TND, lse_TN, *grads))
    for grad_LND, q_LND, k_LKD, v_LKD, o_LND, lse_LN, dq_LND, dk_LKD, dv_LKD in zip(*parts, strict=True):
        dq_KGLD, dk_KGLD, dv_KGLD = _flash_backward(
            _grouped(grad_LND, num_kv_heads),
            _grouped(q_LND, num_kv_heads),
            _shared(k_LKD, group),
            _shared(v_LKD, group),
            _grouped(o_LND, num_kv_heads),
            lse_LN.T.contiguous().unflatten(0, (num_kv_heads, group)),
            0.0,
            True,
            scale=scale,
        )
        dq_LND.copy_(_ungrouped(dq_KGLD))
        dk_LKD.copy_(dk_KGLD.sum(dim=1).transpose(0, 1))
        dv_LKD.copy_(dv_KGLD.sum(dim=1).transpose(0, 1))
    return grads[0], grads[1], grads[2]


# The kernel takes [batch, heads, L, D] and equal head counts (it reads past the end otherwise, without an error).
# With the key/value heads as its batch, their G readers share one key/value head through a stride of 0: no copy.


def _groups(q_TND: Tensor, k_TKD: Tensor) -> tuple[int, int]:
    return k_TKD.shape[1], q_TND.shape[1] // k_TKD.shape[1]


def _grouped(x_LND: Tensor, num_kv_heads: int) -> Tensor:
    # [L, N, D] -> [L, K, G, D] -> [K, G, L, D]
    return x_LND.unflatten(1, (num_kv_heads, -1)).permute(1, 2, 0, 3)


def _ungrouped(x_KGLD: Tensor) -> Tensor:
    # [K, G, L, D] -> [L, K, G, D] -> [L, N, D]
    return x_KGLD.permute(2, 0, 1, 3).flatten(1, 2)


def _shared(x_LKD: Tensor, group: int) -> Tensor:
    # [L, K, D] -> [K, L, D] -> [K, G, L, D]
    return x_LKD.transpose(0, 1).unsqueeze(1).expand(-1, group, -1, -1)


def _empty_outputs(q_TND: Tensor) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.float64 if q_TND.dtype == torch.float64 else torch.float32
    return q_TND.new_empty(q_TND.shape), q_TND.new_empty(q_TND.shape[:2], dtype=lse_dtype)


@varlen_attention_cpu.register_fake
def _forward_fake(
    q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, cu_seqlens: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    return _empty_outputs(q_TND)


@varlen_attention_cpu_backward.register_fake
def _backward_fake(
    grad_TND: Tensor,
    q_TND: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    o_TND: Tensor,
    lse_TN: Tensor,
    cu_seqlens: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dq_TND, dk_TKD, dv_TKD = (t.new_empty(t.shape) for t in (q_TND, k_TKD, v_TKD))
    return dq_TND, dk_TKD, dv_TKD


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q_TND, k_TKD, v_TKD, cu_seqlens, scale = inputs
    o_TND, lse_TN = output
    ctx.save_for_backward(q_TND, k_TKD, v_TKD, o_TND, lse_TN, cu_seqlens)
    ctx.mark_non_differentiable(lse_TN)
    ctx.scale = scale


def _backward(ctx: Any, grad_TND: Tensor, _grad_lse: Tensor | None) -> tuple:
    q_TND, k_TKD, v_TKD, o_TND, lse_TN, cu_seqlens = ctx.saved_tensors
    grads = varlen_attention_cpu_backward(grad_TND, q_TND, k_TKD, v_TKD, o_TND, lse_TN, cu_seqlens, ctx.scale)
    return *grads, None, None


varlen_attention_cpu.register_autograd(_backward, setup_context=_setup_context)
