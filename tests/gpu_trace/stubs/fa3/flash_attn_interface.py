"""FlashAttention-3 without a GPU: the operators `flash_attn_3::fwd` and `bwd` that torch's registry calls.

The schemas are those of flash-attention's hopper/flash_api.cpp; what they compute is the reference attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.gpu_trace import kernels

_LIBRARY = torch.library.Library("flash_attn_3", "DEF")
_LIBRARY.define(
    "fwd(Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new = None, Tensor(v_new!)? v_new = None, Tensor? q_v = None, "
    "Tensor(out!)? out = None, Tensor? cu_seqlens_q = None, Tensor? cu_seqlens_k = None, "
    "Tensor? cu_seqlens_k_new = None, Tensor? seqused_q = None, Tensor? seqused_k = None, int? max_seqlen_q = None, "
    "int? max_seqlen_k = None, Tensor? page_table = None, Tensor? kv_batch_idx = None, Tensor? leftpad_k = None, "
    "Tensor? rotary_cos = None, Tensor? rotary_sin = None, Tensor? seqlens_rotary = None, Tensor? q_descale = None, "
    "Tensor? k_descale = None, Tensor? v_descale = None, float? softmax_scale = None, bool is_causal = False, "
    "int window_size_left = -1, int window_size_right = -1, int attention_chunk = 0, float softcap = 0.0, "
    "bool is_rotary_interleaved = False, Tensor? scheduler_metadata = None, int num_splits = 0, "
    "bool? pack_gqa = None, int sm_margin = 0) -> (Tensor(out!), Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor(dq!)? dq = None, "
    "Tensor(dk!)? dk = None, Tensor(dv!)? dv = None, Tensor? cu_seqlens_q = None, Tensor? cu_seqlens_k = None, "
    "Tensor? seqused_q = None, Tensor? seqused_k = None, int? max_seqlen_q = None, int? max_seqlen_k = None, "
    "float? softmax_scale = None, bool is_causal = False, int window_size_left = -1, int window_size_right = -1, "
    "float softcap = 0.0, bool deterministic = False, int sm_margin = 0) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _fwd(*positional: Any, **named: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    get = _arguments("fwd", positional, named)
    kernels.CALLS.append({"max_seqlen": (get["max_seqlen_q"], get["max_seqlen_k"])})
    left = kernels.causal_left(get["is_causal"], get["window_size_left"], get["window_size_right"])
    out, lse = kernels.forward(*(get[name] for name in ("q", "k", "v", *_LENGTHS)), left)
    return out, lse, out.new_empty(0), out.new_empty(0)


def _bwd(*positional: Any, **named: Any) -> tuple[Tensor, ...]:
    get = _arguments("bwd", positional, named)
    longest = (get["max_seqlen_q"], get["max_seqlen_k"])
    kernels.CALLS.append({"max_seqlen": longest, "deterministic": get["deterministic"]})
    left = kernels.causal_left(get["is_causal"], get["window_size_left"], get["window_size_right"])
    grads = kernels.backward(*(get[name] for name in ("dout", "q", "k", "v", *_LENGTHS)), left)
    for name, grad in zip(("dq", "dk", "dv"), grads, strict=True):
        get[name].copy_(grad)
    return tuple(get["q"].new_empty(0) for _ in range(5))


_LENGTHS = ("cu_seqlens_q", "cu_seqlens_k", "softmax_scale")


def _arguments(operator: str, positional: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    """By name: the dispatcher hands over positions, and leaves out defaults at their end."""
    declared = getattr(torch.ops.flash_attn_3, operator).default._schema.arguments
    defaults = {argument.name: argument.default_value for argument in declared}
    return defaults | dict(zip(defaults, positional, strict=False)) | named


_LIBRARY.impl("fwd", _fwd, "CPU")
_LIBRARY.impl("bwd", _bwd, "CPU")
