"""Causal attention inside the documents of a packed sequence: one interface, one backend per kind of kernel.

Owns `varlen_attention`, the module that wraps it, and the choice of backend:

    fa3        FlashAttention-3 through torch's registry (Hopper), where flash_attn_interface is installed
    fa4        FlashAttention-4 through torch's registry (Blackwell, Hopper), where flash_attn.cute is installed
    fa2        flash-attn's varlen kernel (CUDA, compute capability 8.0 or newer), where the package is installed
    torch      torch.nn.attention.varlen, the FlashAttention-2 kernel that ships with torch
    cpu        one CPU flash kernel per document (models/attention_cpu.py)
    reference  plain softmax(QK^T)V per document: slow, any device and dtype, for tests

The first four compute in float16 or bfloat16. Every backend aligns the causal mask at the bottom right.

Shape suffixes: T query tokens, S key/value tokens, N query heads, K key/value heads (K divides N), G = N / K,
D head width, L and M queries and keys of one document.
"""

# Attention runs eagerly, between compiled regions: torch.compile never traces a kernel's package, and neither document
# lengths nor process groups can cause a recompilation.
# Bottom-right alignment: the last query of a document attends to its last key (flash-attn since 2.1,
# https://github.com/Dao-AILab/flash-attention#21-change-behavior-of-causal-flag).

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn import attention as torch_attention
from torch.nn.attention.varlen import varlen_attn

from hbp_titan.models.attention_cpu import document_lengths, varlen_attention_cpu
from hbp_titan.models.documents import DocumentGroup, Documents

Backend = Callable[[Tensor, Tensor, Tensor, DocumentGroup, float, int | None], Tensor]
"""(q_TND, k_SKD, v_SKD, group, scale, window) -> o_TND."""

_REGISTERED = {"fa3": "FA3", "fa4": "FA4"}
"""Backends that torch's registry substitutes for its own kernel, for the whole process."""
_CAPABILITIES = {"fa3": (9,), "fa4": (9, 10)}
"""Major compute capabilities on which torch allows them (torch/nn/attention/_fa3.py, _fa4.py)."""
# Kernels for wider heads are missing in flash-attn-4's backward; FlashAttention-2 and 3 go up to 256.
_FA4_MAX_HEAD_DIM = 128
# torch 2.11 lacks the argument and accepts fewer key/value heads than query heads without it.
_TORCH_HAS_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters


def varlen_attention(
    q_TND: Tensor,
    k_SKD: Tensor,
    v_SKD: Tensor,
    documents: Documents,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Return causal softmax attention in which a token attends to its own document only.

    q_TND, k_SKD, v_SKD: one dtype and one device; query head n reads key/value head n // (N / K).
    documents: of the T queries and S keys. The queries of a document are the last tokens of its keys.
    scale: factor of the logits, default 1 / sqrt(D).
    window: the last keys that a query attends to, its own included; None means all.
    Returns o_TND in the dtype of q. Raises ValueError if K does not divide N, the documents do not sum to T and S, or
    the backend does not support the dtype.
    """
    num_heads, num_kv_heads = q_TND.shape[1], k_SKD.shape[1]
    if num_heads % num_kv_heads:
        raise ValueError(f"num_heads ({num_heads}) must be divisible by num_kv_heads ({num_kv_heads})")
    if (documents.whole.num_queries, documents.whole.num_keys) != (len(q_TND), len(k_SKD)):
        raise ValueError(
            f"documents have {documents.whole.num_queries} queries and {documents.whole.num_keys} keys in total; the "
            f"pack has {len(q_TND)} and {len(k_SKD)}"
        )
    name = selected_backend(q_TND.device)
    backend = BACKENDS[name]
    scale = q_TND.shape[-1] ** -0.5 if scale is None else scale
    # FlashAttention-3's forward schedules blocks by the lengths it reads, so groups save it nothing; its backward
    # launches a grid like the others.
    groups = (documents.whole,) if name == "fa3" and not torch.is_grad_enabled() else documents.groups
    if len(groups) == 1:
        return backend(q_TND, k_SKD, v_SKD, groups[0], scale, window)
    queries, keys = [group.num_queries for group in groups], [group.num_keys for group in groups]
    # split, whose backward is one concatenation; each slice would allocate a zero-filled gradient of the whole.
    parts = zip(q_TND.split(queries), k_SKD.split(keys), v_SKD.split(keys), groups, strict=True)
    outputs = [backend(q, k, v, group, scale, window) for q, k, v, group in parts]
    return torch.cat(outputs) if outputs else torch.empty_like(q_TND)


class VarlenAttention(nn.Module):
    """`varlen_attention` as a block's submodule `inner_attention`, which context parallelism may wrap."""

    def __init__(self, scale: float | None = None, window: int | None = None) -> None:
        super().__init__()
        self.scale, self.window = scale, window

    def forward(self, q_TND: Tensor, k_SKD: Tensor, v_SKD: Tensor, documents: Documents) -> Tensor:
        return varlen_attention(q_TND, k_SKD, v_SKD, documents, self.scale, self.window)


def set_backend(name: str) -> None:
    """Use the backend `name` on every device; "auto" chooses by device at each call, never FA3 or FA4.

    Raises ValueError for an unknown name, and with the reason if the backend cannot be used here.
    """
    global _selected
    if name not in (*BACKENDS, "auto"):
        raise ValueError(f"attention backend {name!r} must be one of {', '.join(BACKENDS)}, auto")
    reason = missing(name)
    if reason:
        raise ValueError(f"attention backend {name!r} cannot be used here: {reason}")
    if name in _REGISTERED:
        torch_attention.activate_flash_attention_impl(_REGISTERED[name])
    elif _selected in _REGISTERED:
        torch_attention.restore_flash_attention_impl()
    _selected = name


def choose_backend(requested: str, device: torch.device, head_dim: int, dtype: torch.dtype = torch.bfloat16) -> str:
    """Select the backend of a run and return its name.

    requested: `model.attention_backend`; "auto" means the fastest installed one for the device and the head width.
    dtype: of queries, keys and values. Raises ValueError if the device, the head width, the dtype or the installation
    does not allow the backend.
    """
    name = _fastest(device, head_dim) if requested == "auto" else requested
    reason = _unfit(name, device, head_dim)
    if reason:
        raise ValueError(f"model.attention_backend = {requested!r}: {reason}; use auto")
    if name not in ("cpu", "reference"):
        _check_half_precision(name, dtype)
    try:
        set_backend(name)
    except ValueError as error:
        raise ValueError(f"model.attention_backend: {error}; use auto") from None
    return name


def _fastest(device: torch.device, head_dim: int) -> str:
    if device.type != "cuda":
        return "cpu"
    major, _ = torch.cuda.get_device_capability(device)
    by_capability = {9: ("fa3", "fa2"), 10: ("fa4", "fa2")}.get(major, ("fa2",))
    return next((name for name in by_capability if not (_unfit(name, device, head_dim) or missing(name))), "torch")


def _unfit(name: str, device: torch.device, head_dim: int) -> str:
    """Return why the device or the head width rules a backend out, "" if they do not."""
    if name in ("cpu", "reference"):
        return "" if device.type == "cpu" or name == "reference" else "the cpu backend does not run on a GPU"
    if device.type != "cuda":
        return f"needs a CUDA device, not {device.type}"
    if name in _CAPABILITIES:
        major, minor = torch.cuda.get_device_capability(device)
        if major not in _CAPABILITIES[name]:
            return f"does not run on compute capability {major}.{minor}"
    if name == "fa4" and head_dim > _FA4_MAX_HEAD_DIM:
        return f"supports heads of at most {_FA4_MAX_HEAD_DIM}, not {head_dim}"
    return ""


def selected_backend(device: torch.device | str) -> str:
    """Return the name of the backend used for tensors on `device`."""
    if _selected != "auto":
        return _selected
    if torch.device(device).type != "cuda":
        return "cpu"
    return "torch" if missing("fa2") else "fa2"


@cache
def missing(name: str) -> str:
    """Return why the package behind a backend cannot be used, "" if it can; cached per process."""
    # The function itself is accessed: flash-attn-4 alone makes `import flash_attn` succeed without FlashAttention-2.
    try:
        if name == "fa2":
            importlib.import_module("flash_attn").flash_attn_varlen_func  # noqa: B018
        elif name == "fa3":
            importlib.import_module("flash_attn_interface")
            torch.ops.flash_attn_3.fwd, torch.ops.flash_attn_3.bwd  # noqa: B018
        elif name == "fa4":
            module = importlib.import_module("flash_attn.cute.interface")
            module._flash_attn_bwd  # noqa: B018
            return _unfit_fa4(module._flash_attn_fwd)
        if name in _REGISTERED and _REGISTERED[name] not in torch_attention.list_flash_attention_impls():
            return f"torch {torch.__version__} has no {_REGISTERED[name]}"
    # An extension built for another torch or CUDA can raise anything while it loads.
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _unfit_fa4(forward: Callable[..., Any]) -> str:
    """Return why torch and the installed flash-attn-4 are incompatible, "" if they are compatible."""
    # torch 2.11 rejects any window in backward, which varlen_attn always passes, and passes -1 in forward as a width.
    if not hasattr(importlib.import_module("torch.nn.attention._fa4"), "_aten_to_fa4_window_size"):
        return f"torch {torch.__version__} cannot train with FlashAttention-4: install torch 2.12 or newer"
    # torch 2.12 and 2.13 unpack two tensors; flash-attn-4 returns four since 4.0.0b20.
    if len(get_args(inspect.signature(forward).return_annotation)) != 2:
        return f"torch {torch.__version__} expects an older flash-attn-4: install flash-attn-4==4.0.0b19"
    return ""


def _cpu(q_TND: Tensor, k_SKD: Tensor, v_SKD: Tensor, group: DocumentGroup, scale: float, window: int | None) -> Tensor:
    return varlen_attention_cpu(q_TND, k_SKD, v_SKD, group.cu_seqlens_q, group.cu_seqlens_k, scale, window)[0]


def _fa2(q_TND: Tensor, k_SKD: Tensor, v_SKD: Tensor, group: DocumentGroup, scale: float, window: int | None) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    _check_half_precision("fa2", q_TND.dtype)
    return flash_attn_varlen_func(
        *(q_TND, k_SKD, v_SKD, *_lengths(group)),
        softmax_scale=scale,
        causal=True,
        window_size=_window_size(window, group),
        # Its backward sums in a varying order by default; torch's own kernel follows the global switch.
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )


def _torch(
    q_TND: Tensor, k_SKD: Tensor, v_SKD: Tensor, group: DocumentGroup, scale: float, window: int | None
) -> Tensor:
    _check_half_precision("torch", q_TND.dtype)
    # A tuple: torch compares window_size with (-1, 0) to enable the causal mask, and a list is silently unequal.
    options: dict[str, Any] = {"scale": scale, "window_size": _window_size(window, group)}
    if _TORCH_HAS_GQA:
        options["enable_gqa"] = True
    o_TND = varlen_attn(q_TND, k_SKD, v_SKD, *_lengths(group), **options)
    assert isinstance(o_TND, Tensor)
    return o_TND


def _window_size(window: int | None, group: DocumentGroup) -> tuple[int, int]:
    """Return how many keys before and after its own a query attends to, as kernels take it; -1 means all."""
    # None where no document exceeds the window: kernels have faster code for the plain causal mask.
    return (-1 if window is None or window >= group.max_seqlen_k else window - 1, 0)


def _reference(
    q_TND: Tensor, k_SKD: Tensor, v_SKD: Tensor, group: DocumentGroup, scale: float, window: int | None
) -> Tensor:
    lengths = document_lengths(group.cu_seqlens_q, group.cu_seqlens_k, q_TND.shape[0], k_SKD.shape[0])
    repeats = q_TND.shape[1] // k_SKD.shape[1]
    queries, keys = [pair[0] for pair in lengths], [pair[1] for pair in lengths]
    outputs = []
    for q_LND, k_MKD, v_MKD in zip(q_TND.split(queries), k_SKD.split(keys), v_SKD.split(keys), strict=True):
        length, width = len(q_LND), len(k_MKD)
        scores_NLM = torch.einsum("qnd,knd->nqk", q_LND, k_MKD.repeat_interleave(repeats, dim=1)) * scale
        ones_LM = torch.ones(length, width, dtype=torch.bool, device=q_TND.device)
        hidden_LM = ones_LM.triu(1 + width - length)
        if window is not None:
            hidden_LM |= ones_LM.tril(width - length - window)
        weights_NLM = scores_NLM.masked_fill(hidden_LM, -torch.inf).softmax(dim=-1)
        outputs.append(torch.einsum("nqk,knd->qnd", weights_NLM, v_MKD.repeat_interleave(repeats, dim=1)))
    return torch.cat(outputs)


def _lengths(group: DocumentGroup) -> tuple[Tensor, Tensor, int, int]:
    return group.cu_seqlens_q, group.cu_seqlens_k, group.max_seqlen_q, group.max_seqlen_k


def _check_half_precision(backend: str, dtype: torch.dtype) -> None:
    if dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"attention backend {backend!r} computes in float16 or bfloat16, not {dtype}; "
            "set training.mixed_precision_param to bfloat16"
        )


BACKENDS: dict[str, Backend] = {
    "fa3": _torch,
    "fa4": _torch,
    "fa2": _fa2,
    "torch": _torch,
    "cpu": _cpu,
    "reference": _reference,
}
_selected = "auto"
