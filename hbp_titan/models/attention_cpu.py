"""The CPU backend of varlen attention: torch's CPU flash kernel, once per document, as custom ops.

The forward keeps the output and the logsumexp, from which the flash backward recomputes the probabilities, as on a GPU.
Shape suffixes as in attention.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_flash_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def document_lengths(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, num_queries: int, num_keys: int
) -> list[tuple[int, int]]:
    """Return (queries, keys) of each document that has keys.

    Raises ValueError unless each tensor ascends from 0 to its number of tokens and every document has at least as many
    keys as queries.
    """
    for name, cu_seqlens, total in (("", cu_seqlens_q, num_queries), ("_k", cu_seqlens_k, num_keys)):
        if cu_seqlens[0] != 0 or cu_seqlens[-1] != total or cu_seqlens.diff().min() < 0:
            raise ValueError(
                f"cu_seqlens{name} must ascend from 0 to the {total} tokens of the pack, not {cu_seqlens.tolist()}"
            )
    lengths = list(zip(cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist(), strict=True))
    for queries, keys in lengths:
        if queries > keys:
            raise ValueError(f"a document has {queries} queries but {keys} keys; each query needs its own key")
    # The flash kernel crashes on empty documents (SIGFPE).
    return [pair for pair in lengths if pair[1]]


# Custom ops, because the loop over documents depends on data: torch.compile and fake tensors handle one opaque op.
@torch.library.custom_op("hbp_titan::varlen_attention_cpu", mutates_args=())
def varlen_attention_cpu(
    q_TND: Tensor, k_SKD: Tensor, v_SKD: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Return o_TND and the logsumexp [T, N] (float64 for float64, else float32) of causal attention per document."""
    o_TND, lse_TN = _empty_outputs(q_TND)
    lengths = document_lengths(cu_seqlens_q, cu_seqlens_k, q_TND.shape[0], k_SKD.shape[0])
    num_kv_heads, group = k_SKD.shape[1], q_TND.shape[1] // k_SKD.shape[1]
    parts = (*_split(lengths, 0, q_TND, o_TND, lse_TN), *_split(lengths, 1, k_SKD, v_SKD))
    for q_LND, o_LND, lse_LN, k_MKD, v_MKD in zip(*parts, strict=True):
        if not len(q_LND):
            continue
        q_KGLD, k_KGMD, v_KGMD = _grouped(q_LND, num_kv_heads), _shared(k_MKD, group), _shared(v_MKD, group)
        past = len(k_MKD) - len(q_LND)
        own_k, own_v = k_KGMD[:, :, past:], v_KGMD[:, :, past:]
        out_KGLD, lse_KGL = _flash_forward(q_KGLD, own_k, own_v, 0.0, True, scale=scale)
        if past:
            # The kernel aligns its causal mask at the top left, so keys before the first query are a second call; the
            # two results are combined by their logsumexp.
            past_k, past_v = k_KGMD[:, :, :past], v_KGMD[:, :, :past]
            past_KGLD, past_KGL = _flash_forward(q_KGLD, past_k, past_v, 0.0, False, scale=scale)
            both_KGL = torch.logaddexp(lse_KGL, past_KGL)
            own_share, past_share = ((part - both_KGL).exp().unsqueeze(-1) for part in (lse_KGL, past_KGL))
            out_KGLD, lse_KGL = out_KGLD * own_share + past_KGLD * past_share, both_KGL
        o_LND.copy_(_ungrouped(out_KGLD))
        lse_LN.copy_(lse_KGL.flatten(0, 1).T)
    return o_TND, lse_TN


@torch.library.custom_op("hbp_titan::varlen_attention_cpu_backward", mutates_args=())
def varlen_attention_cpu_backward(
    grad_TND: Tensor,
    q_TND: Tensor,
    k_SKD: Tensor,
    v_SKD: Tensor,
    o_TND: Tensor,
    lse_TN: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v in their dtypes; a key/value head's is the sum over its G query heads."""
    # Zeros, because keys without queries are not visited below.
    dq_TND, dk_SKD, dv_SKD = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (q_TND, k_SKD, v_SKD))
    lengths = document_lengths(cu_seqlens_q, cu_seqlens_k, q_TND.shape[0], k_SKD.shape[0])
    num_kv_heads, group = k_SKD.shape[1], q_TND.shape[1] // k_SKD.shape[1]
    parts = (
        *_split(lengths, 0, grad_TND, q_TND, o_TND, lse_TN, dq_TND),
        *_split(lengths, 1, k_SKD, v_SKD, dk_SKD, dv_SKD),
    )
    for grad_LND, q_LND, o_LND, lse_LN, dq_LND, k_MKD, v_MKD, dk_MKD, dv_MKD in zip(*parts, strict=True):
        if not len(q_LND):
            continue
        grad_KGLD, q_KGLD, o_KGLD = (_grouped(x, num_kv_heads) for x in (grad_LND, q_LND, o_LND))
        lse_KGL = lse_LN.T.contiguous().unflatten(0, (num_kv_heads, group))
        past = len(k_MKD) - len(q_LND)
        for keys, causal in ((slice(past), False), (slice(past, None), True)):
            k_KGMD, v_KGMD = _shared(k_MKD[keys], group), _shared(v_MKD[keys], group)
            if not k_KGMD.shape[2]:
                continue
            dq_KGLD, dk_KGMD, dv_KGMD = _flash_backward(
                grad_KGLD, q_KGLD, k_KGMD, v_KGMD, o_KGLD, lse_KGL, 0.0, causal, scale=scale
            )
            dq_LND.add_(_ungrouped(dq_KGLD))
            dk_MKD[keys].copy_(dk_KGMD.sum(dim=1).transpose(0, 1))
            dv_MKD[keys].copy_(dv_KGMD.sum(dim=1).transpose(0, 1))
    return dq_TND, dk_SKD, dv_SKD


def _split(lengths: list[tuple[int, int]], side: int, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Return each tensor's views per document, split by queries (side 0) or by keys (side 1)."""
    return [t.split([pair[side] for pair in lengths]) for t in tensors]


# The kernel takes [batch, heads, L, D] and equal head counts (it reads past the end otherwise, without an error).
# With the key/value heads as the batch, G query heads share one key/value head through a stride of 0: no copy.


def _grouped(x_LND: Tensor, num_kv_heads: int) -> Tensor:
    # [L, N, D] -> [L, K, G, D] -> [K, G, L, D]
    return x_LND.unflatten(1, (num_kv_heads, -1)).permute(1, 2, 0, 3)


def _ungrouped(x_KGLD: Tensor) -> Tensor:
    # [K, G, L, D] -> [L, K, G, D] -> [L, N, D]
    return x_KGLD.permute(2, 0, 1, 3).flatten(1, 2)


def _shared(x_MKD: Tensor, group: int) -> Tensor:
    # [M, K, D] -> [K, M, D] -> [K, G, M, D]
    return x_MKD.transpose(0, 1).unsqueeze(1).expand(-1, group, -1, -1)


def _empty_outputs(q_TND: Tensor) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.float64 if q_TND.dtype == torch.float64 else torch.float32
    return q_TND.new_empty(q_TND.shape), q_TND.new_empty(q_TND.shape[:2], dtype=lse_dtype)


@varlen_attention_cpu.register_fake
def _forward_fake(
    q_TND: Tensor, k_SKD: Tensor, v_SKD: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    return _empty_outputs(q_TND)


@varlen_attention_cpu_backward.register_fake
def _backward_fake(
    grad_TND: Tensor,
    q_TND: Tensor,
    k_SKD: Tensor,
    v_SKD: Tensor,
    o_TND: Tensor,
    lse_TN: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dq_TND, dk_SKD, dv_SKD = (t.new_empty(t.shape) for t in (q_TND, k_SKD, v_SKD))
    return dq_TND, dk_SKD, dv_SKD


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q_TND, k_SKD, v_SKD, cu_seqlens_q, cu_seqlens_k, scale = inputs
    o_TND, lse_TN = output
    ctx.save_for_backward(q_TND, k_SKD, v_SKD, o_TND, lse_TN, cu_seqlens_q, cu_seqlens_k)
    ctx.mark_non_differentiable(lse_TN)
    ctx.scale = scale


def _backward(ctx: Any, grad_TND: Tensor, _grad_lse: Tensor | None) -> tuple:
    grads = varlen_attention_cpu_backward(grad_TND, *ctx.saved_tensors, ctx.scale)
    return *grads, None, None, None


varlen_attention_cpu.register_autograd(_backward, setup_context=_setup_context)
