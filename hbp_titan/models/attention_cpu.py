"""The CPU backend of varlen attention: torch's CPU flash kernel, once per document, as custom ops.

The forward keeps the output and the logsumexp, from which the flash backward recomputes the probabilities, as on a GPU.
With a sliding window the queries of a document are computed in blocks, each with the band of keys that it attends to:
the time is linear in the document's length.
Shape suffixes as in attention.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_flash_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_MIN_BAND_QUERIES = 64


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
    q_TND: Tensor,
    k_SKD: Tensor,
    v_SKD: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    scale: float,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return o_TND and the logsumexp [T, N] (float64 for float64, else float32) of causal attention per document.

    window: keys that a query attends to, its own included; None means all keys up to its own.
    """
    o_TND, lse_TN = _empty_outputs(q_TND)
    lengths = document_lengths(cu_seqlens_q, cu_seqlens_k, q_TND.shape[0], k_SKD.shape[0])
    num_kv_heads, group = k_SKD.shape[1], q_TND.shape[1] // k_SKD.shape[1]
    parts = (*_split(lengths, 0, q_TND, o_TND, lse_TN), *_split(lengths, 1, k_SKD, v_SKD))
    for q_LND, o_LND, lse_LN, k_MKD, v_MKD in zip(*parts, strict=True):
        if not len(q_LND):
            continue
        q_KGLD, k_KGMD, v_KGMD = _grouped(q_LND, num_kv_heads), _shared(k_MKD, group), _shared(v_MKD, group)
        for rows, keys, causal, mask_LM in _calls(len(q_LND), len(k_MKD), window, q_TND):
            inputs = q_KGLD[:, :, rows], k_KGMD[:, :, keys], v_KGMD[:, :, keys]
            out_KGLD, lse_KGL = _flash_forward(*inputs, 0.0, causal, attn_mask=mask_LM, scale=scale)
            if not causal and mask_LM is None:
                # Earlier keys of the queries of the call before: combined with its results by their logsumexp.
                own_KGLD, own_KGL = _grouped(o_LND, num_kv_heads), lse_LN.T.unflatten(0, (num_kv_heads, group))
                both_KGL = torch.logaddexp(own_KGL, lse_KGL)
                own_share, past_share = ((part - both_KGL).exp().unsqueeze(-1) for part in (own_KGL, lse_KGL))
                out_KGLD, lse_KGL = own_KGLD * own_share + out_KGLD * past_share, both_KGL
            o_LND[rows].copy_(_ungrouped(out_KGLD))
            lse_LN[rows].copy_(lse_KGL.flatten(0, 1).T)
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
    window: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v in their dtypes; a key/value head's is the sum over its G query heads."""
    # torch's bf16 kernel takes 2 to 5 times as long below 1K tokens, and a key of several bands would be rounded.
    dtype, wide = q_TND.dtype, torch.promote_types(q_TND.dtype, torch.float32)
    grad_TND, q_TND, k_SKD, v_SKD, o_TND = (t.to(wide) for t in (grad_TND, q_TND, k_SKD, v_SKD, o_TND))
    # Zeros, because keys without queries are not visited below.
    dq_TND, dk_SKD, dv_SKD = (torch.zeros(t.shape, dtype=wide) for t in (q_TND, k_SKD, v_SKD))
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
        lse_KGL = lse_LN.T.unflatten(0, (num_kv_heads, group))
        for rows, keys, causal, mask_LM in _calls(len(q_LND), len(k_MKD), window, q_TND):
            k_KGMD, v_KGMD = _shared(k_MKD[keys], group), _shared(v_MKD[keys], group)
            grad, q, o, lse = (x[:, :, rows] for x in (grad_KGLD, q_KGLD, o_KGLD, lse_KGL))
            dq_KGLD, dk_KGMD, dv_KGMD = _flash_backward(
                grad, q, k_KGMD, v_KGMD, o, lse.contiguous(), 0.0, causal, attn_mask=mask_LM, scale=scale
            )
            dq_LND[rows].add_(_ungrouped(dq_KGLD))
            dk_MKD[keys].add_(dk_KGMD.sum(dim=1).transpose(0, 1))
            dv_MKD[keys].add_(dv_KGMD.sum(dim=1).transpose(0, 1))
    return dq_TND.to(dtype), dk_SKD.to(dtype), dv_SKD.to(dtype)


def _calls(
    queries: int, keys: int, window: int | None, like: Tensor
) -> Iterator[tuple[slice, slice, bool, Tensor | None]]:
    """Yield the kernel calls of a document: rows of queries, rows of keys, is_causal, and an additive mask [L, M].

    like: has the mask's dtype and device.
    """
    past = keys - queries
    if window is None or window >= keys:
        # The kernel aligns its causal mask at the top left, so keys before the first query are a second call.
        yield slice(queries), slice(past, keys), True, None
        if past:
            yield slice(queries), slice(past), False, None
        return
    size = min(max(_MIN_BAND_QUERIES, window // 4), queries)
    # Query i of a block attends to keys i to i + window - 1 of its band, which starts at the window of query 0.
    visible_LM = torch.ones(size, size + window - 1, dtype=torch.bool).triu_().tril_(window - 1)
    mask_LM = like.new_zeros(visible_LM.shape).masked_fill_(visible_LM.logical_not_(), -torch.inf)
    for start in range(0, queries, size):
        rows = min(size, queries - start)
        first = past + start + 1 - window
        # The first bands begin before the document, the last one is shorter.
        keys_seen = slice(max(0, first), past + start + rows)
        yield slice(start, start + rows), keys_seen, False, mask_LM[:rows, keys_seen.start - first : rows + window - 1]


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
def _forward_fake(q_TND: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _empty_outputs(q_TND)


@varlen_attention_cpu_backward.register_fake
def _backward_fake(grad_TND: Tensor, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    dq_TND, dk_SKD, dv_SKD = (t.new_empty(t.shape) for t in inputs[:3])
    return dq_TND, dk_SKD, dv_SKD


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q_TND, k_SKD, v_SKD, cu_seqlens_q, cu_seqlens_k, ctx.scale, ctx.window = inputs
    o_TND, lse_TN = output
    ctx.save_for_backward(q_TND, k_SKD, v_SKD, o_TND, lse_TN, cu_seqlens_q, cu_seqlens_k)
    ctx.mark_non_differentiable(lse_TN)


def _backward(ctx: Any, grad_TND: Tensor, _grad_lse: Tensor | None) -> tuple:
    grads = varlen_attention_cpu_backward(grad_TND, *ctx.saved_tensors, ctx.scale, ctx.window)
    return *grads, None, None, None, None


varlen_attention_cpu.register_autograd(_backward, setup_context=_setup_context)
