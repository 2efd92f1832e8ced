"""Causal attention inside the documents of a packed sequence: one interface, one backend per kind of device.

Owns `varlen_attention`, the module that models call it through, and the choice of backend:

    flash      flash-attn's varlen kernel (CUDA, float16 or bfloat16), where the package is installed
    torch      torch.nn.attention.varlen, the flash kernel that ships with torch (CUDA, float16 or bfloat16)
    cpu        one CPU flash kernel per document (models/attention_cpu.py)
    reference  plain softmax(QK^T)V per document: slow, any device and dtype, for tests

Every backend aligns the causal mask at the bottom right: the last query of a document sees its last key
(flash-attn since 2.1, https://github.com/Dao-AILab/flash-attention#21-change-behavior-of-causal-flag; torch's varlen
is the same kernel).

Shape suffixes: T query tokens, S key/value tokens, N query heads, K key/value heads (K divides N), G = N / K,
D head width, L and M queries and keys of one document.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

from hbp_titan.models.attention_cpu import document_lengths, varlen_attention_cpu

Backend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int, float], Tensor]
"""(q_TND, k_SKD, v_SKD, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale) -> o_TND."""

# The argument is newer than the kernel's support; without it the key/value heads are repeated by hand.
_TORCH_HAS_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters


def varlen_attention(
    q_TND: Tensor,
    k_SKD: Tensor,
    v_SKD: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_k: int | None = None,
) -> Tensor:
    """Causal softmax attention where a token sees its own document only.

    q_TND, k_SKD, v_SKD: one dtype and one device; query head n reads key/value head n // (N / K).
    cu_seqlens: int32 [documents + 1], 0 first and T last, ascending; repeats (empty documents) are skipped, so it
        may be padded at its end with T.
    max_seqlen: at least the longest document; a fixed upper bound (the level's capacity) keeps graphs static.
    scale: factor of the logits, 1 / sqrt(D) unless given.
    cu_seqlens_k, max_seqlen_k: where the keys of a document are not those of its queries: int32 [documents + 1], 0
        first and S last, and the bound of its lengths. The queries are the last tokens of a document's keys, so it
        has at least as many keys as queries; it may have no query.
    Returns o_TND in the dtype of q. Raises ValueError where N is no multiple of K or the backend lacks the dtype.
    """
    num_heads, num_kv_heads = q_TND.shape[1], k_SKD.shape[1]
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads are no multiple of {num_kv_heads} key/value heads")
    backend = BACKENDS[selected_backend(q_TND.device)]
    if cu_seqlens_k is None or max_seqlen_k is None:
        cu_seqlens_k, max_seqlen_k = cu_seqlens, max_seqlen
    scale = q_TND.shape[-1] ** -0.5 if scale is None else scale
    return backend(q_TND, k_SKD, v_SKD, cu_seqlens, cu_seqlens_k, max_seqlen, max_seqlen_k, scale)


class VarlenAttention(nn.Module):
    """`varlen_attention` as the submodule `inner_attention` of a block, which context parallelism may wrap.

    It has no parameters. scale: as in `varlen_attention`.
    """

    def __init__(self, scale: float | None = None) -> None:
        super().__init__()
        self.scale = scale

    def forward(
        self,
        q_TND: Tensor,
        k_SKD: Tensor,
        v_SKD: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_k: int | None = None,
    ) -> Tensor:
        return varlen_attention(q_TND, k_SKD, v_SKD, cu_seqlens, max_seqlen, self.scale, cu_seqlens_k, max_seqlen_k)


def set_backend(name: str) -> None:
    """Force the backend `name` on every device; "auto" chooses by device again. ValueError for another name."""
    global _forced
    if name not in (*BACKENDS, "auto"):
        raise ValueError(f"attention backend {name!r} is none of {', '.join(BACKENDS)}, auto")
    _forced = name


def selected_backend(device: torch.device | str) -> str:
    """The name of the backend that serves tensors on `device`."""
    if _forced != "auto":
        return _forced
    if torch.device(device).type != "cuda":
        return "cpu"
    return "flash" if flash_attn_installed() else "torch"


@cache
def flash_attn_installed() -> bool:
    """Whether flash-attn can be imported here."""
    try:
        import flash_attn  # noqa: F401
    except ImportError:
        return False
    return True


def _cpu(
    q_TND: Tensor,
    k_SKD: Tensor,
    v_SKD: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
) -> Tensor:
    return varlen_attention_cpu(q_TND, k_SKD, v_SKD, cu_seqlens_q, cu_seqlens_k, scale)[0]


def _flash(
    q_TND: Tensor,
    k_SKD: Tensor,
    v_SKD: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    _check_half_precision("flash", q_TND)
    return flash_attn_varlen_func(
        q_TND,
        k_SKD,
        v_SKD,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        softmax_scale=scale,
        causal=True,
        # Its backward adds up in a varying order unless told otherwise; torch's own kernel obeys the global switch.
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )


def _torch(
    q_TND: Tensor,
    k_SKD: Tensor,
    v_SKD: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
) -> Tensor:
    _check_half_precision("torch", q_TND)
    # A tuple: with a list the comparison that turns causality on is false and the mask is lost without a word.
    options: dict = {"scale": scale, "window_size": (-1, 0)}
    if _TORCH_HAS_GQA:
        options["enable_gqa"] = True
    else:
        group = q_TND.shape[1] // k_SKD.shape[1]
        k_SKD, v_SKD = k_SKD.repeat_interleave(group, dim=1), v_SKD.repeat_interleave(group, dim=1)
    o_TND = varlen_attn(q_TND, k_SKD, v_SKD, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options)
    assert isinstance(o_TND, Tensor)
    return o_TND


def _reference(
    q_TND: Tensor,
    k_SKD: Tensor,
    v_SKD: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
) -> Tensor:
    lengths = document_lengths(cu_seqlens_q, cu_seqlens_k, q_TND.shape[0], k_SKD.shape[0])
    group = q_TND.shape[1] // k_SKD.shape[1]
    queries, keys = [pair[0] for pair in lengths], [pair[1] for pair in lengths]
    outputs = []
    for q_LND, k_MKD, v_MKD in zip(q_TND.split(queries), k_SKD.split(keys), v_SKD.split(keys), strict=True):
        length, width = len(q_LND), len(k_MKD)
        scores_NLM = torch.einsum("qnd,knd->nqk", q_LND, k_MKD.repeat_interleave(group, dim=1)) * scale
        future_LM = torch.ones(length, width, dtype=torch.bool, device=q_TND.device).triu(1 + width - length)
        weights_NLM = scores_NLM.masked_fill(future_LM, -torch.inf).softmax(dim=-1)
        outputs.append(torch.einsum("nqk,knd->qnd", weights_NLM, v_MKD.repeat_interleave(group, dim=1)))
    return torch.cat(outputs)


def _check_half_precision(backend: str, q_TND: Tensor) -> None:
    if q_TND.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"attention backend {backend!r} computes in float16 or bfloat16, not {q_TND.dtype}: "
            "set training.mixed_precision_param to bfloat16"
        )


BACKENDS: dict[str, Backend] = {"flash": _flash, "torch": _torch, "cpu": _cpu, "reference": _reference}
_forced = "auto"
