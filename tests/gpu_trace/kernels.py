"""Reference attention on the CPU in place of CUDA kernels, behind the real interfaces of torch and the packages.

`installed(name)` makes a backend of models/attention.py callable without a GPU: its package is one of stubs/, while
torch's registry and glue code are torch's own. Wrong arguments (a lost causal mask, swapped lengths, a document without
a query) then show in the results.

Shape suffixes: T queries, S keys, N query heads, K key/value heads, D head width, L and M queries and keys of one
document.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from hbp_titan.models import attention

STUBS = Path(__file__).parent / "stubs"
CALLS: list[dict[str, Any]] = []
"""Arguments of the kernels' calls: max_seqlen of queries and keys if they take it, left; in backward deterministic."""
_PACKAGES = ("flash_attn", "flash_attn_interface")
_LOADED: dict[str, dict[str, Any]] = {}


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, scale: float, left: int
) -> tuple[Tensor, Tensor]:
    """Return o_TND and the float32 logsumexp_NT of causal attention per document, aligned at the bottom right.

    left: keys before its own that a query attends to, -1 for all.
    """
    outputs, sums = [], []
    for q_NLD, k_NMD, v_NMD in _documents(q, k, v, cu_seqlens_q, cu_seqlens_k):
        scores_NLM = _scores(q_NLD, k_NMD, scale, left)
        outputs.append((scores_NLM.softmax(-1) @ v_NMD).transpose(0, 1).to(q.dtype))
        sums.append(scores_NLM.logsumexp(-1))
    return torch.cat(outputs), torch.cat(sums, dim=1)


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, scale: float, left: int
) -> tuple[Tensor, ...]:
    """Return dq, dk and dv of `forward`, written out because operators run below autograd."""
    parts: tuple[list[Tensor], ...] = ([], [], [])
    lengths = cu_seqlens_q.diff().tolist()
    documents = _documents(q, k, v, cu_seqlens_q, cu_seqlens_k)
    for (q_NLD, k_NMD, v_NMD), dout_LND in zip(documents, dout.float().split(lengths), strict=True):
        dout_NLD = dout_LND.transpose(0, 1)
        weights_NLM = _scores(q_NLD, k_NMD, scale, left).softmax(-1)
        dweights_NLM = dout_NLD @ v_NMD.transpose(1, 2)
        center_NL1 = (dweights_NLM * weights_NLM).sum(-1, keepdim=True)
        dscores_NLM = weights_NLM * (dweights_NLM - center_NL1) * scale
        parts[0].append(dscores_NLM @ k_NMD)
        parts[1].append(dscores_NLM.transpose(1, 2) @ q_NLD)
        parts[2].append(weights_NLM.transpose(1, 2) @ dout_NLD)
    dq_NTD, dk_NSD, dv_NSD = (torch.cat(part, dim=1) for part in parts)
    # A key/value head is read by several query heads.
    dk_KSD, dv_KSD = (x.unflatten(0, (k.shape[1], -1)).sum(1) for x in (dk_NSD, dv_NSD))
    return tuple(x.transpose(0, 1).to(q.dtype) for x in (dq_NTD, dk_KSD, dv_KSD))


def _documents(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor
) -> Iterator[tuple[Tensor, ...]]:
    """Yield q_NLD, k_NMD and v_NMD of each document in float32, after a check of the kernels' preconditions."""
    for cu_seqlens, rows in ((cu_seqlens_q, q), (cu_seqlens_k, k)):
        assert cu_seqlens.dtype == torch.int32
        assert cu_seqlens.is_contiguous()
        assert (int(cu_seqlens[0]), int(cu_seqlens[-1])) == (0, len(rows)), "a kernel would read out of bounds"
    assert all(x.dtype == torch.bfloat16 and x.stride(-1) == 1 for x in (q, k, v))
    queries, keys = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    # Kernels differ on documents without a query or with more queries than keys, so none may arrive.
    assert all(0 < length <= width for length, width in zip(queries, keys, strict=True)), (queries, keys)
    repeats = q.shape[1] // k.shape[1]
    for q_LND, k_MKD, v_MKD in zip(q.split(queries), k.split(keys), v.split(keys), strict=True):
        k_NMD, v_NMD = (x.float().repeat_interleave(repeats, 1).transpose(0, 1) for x in (k_MKD, v_MKD))
        yield q_LND.float().transpose(0, 1), k_NMD, v_NMD


def _scores(q_NLD: Tensor, k_NMD: Tensor, scale: float, left: int) -> Tensor:
    scores_NLM = q_NLD @ k_NMD.transpose(1, 2) * scale
    length, width = scores_NLM.shape[1:]
    future_LM = torch.ones(length, width, dtype=torch.bool).triu(1 + width - length)
    if left >= 0:
        future_LM |= torch.ones(length, width, dtype=torch.bool).tril(width - length - left - 1)
    return scores_NLM.masked_fill(future_LM, -torch.inf)


def causal_left(causal: bool, left: int | None, right: int | None) -> int:
    """Assert a causal mask, as a flag or a right bound of 0, and return the left bound, -1 without one."""
    assert causal or right == 0, "the causal mask is lost"
    assert right in (None, -1, 0)
    left = -1 if left is None else left
    CALLS[-1]["left"] = left
    return left


@contextmanager
def installed(name: str) -> Iterator[None]:
    """Let `import` find only the stub of backend `name`, and run torch's kernels on the CPU. "none": no package."""
    before = _take_packages()
    # `missing` is cached per process.
    clear_cache = getattr(attention.missing, "cache_clear", lambda: None)
    clear_cache()
    # Loaded once per process, because operators cannot be defined twice.
    sys.modules.update(_LOADED.get(name, {}))
    with ExitStack() as stack:
        others = [folder for folder in sys.path if not folder.startswith(str(STUBS))]
        stack.enter_context(mock.patch.object(sys, "path", [str(STUBS / name), *others]))
        if name in ("fa3", "fa4"):
            for patch in _on_cpu(name):
                stack.enter_context(patch)
        elif name == "torch":
            stack.callback(_torch_kernels()._destroy)
        try:
            yield
        finally:
            _LOADED[name] = _take_packages()
            sys.modules.update(before)
            clear_cache()


def _take_packages() -> dict[str, Any]:
    """Remove the kernels' packages from the imported modules, and return them."""
    found = [module for module in sys.modules if module.split(".")[0] in _PACKAGES]
    return {module: sys.modules.pop(module) for module in found}


class _CpuLibrary(torch.library.Library):
    """Replacement of the library in which torch registers an implementation: CPU tensors, varlen operators only."""

    def __init__(self, namespace: str, kind: str, _: str = "") -> None:
        super().__init__(namespace, kind, "CPU")

    def impl(self, op_name: Any, fn: Any, dispatch_key: str = "", **options: Any) -> None:
        if "scaled_dot_product" not in op_name:
            super().impl(op_name, fn, "CPU", **options)


def _on_cpu(name: str) -> list[Any]:
    """Return patches of torch's glue module that allow CPU tensors and skip the check of the capability."""
    module = importlib.import_module(f"torch.nn.attention._{name}")
    major = {"fa3": 9, "fa4": 10}[name]
    return [
        mock.patch.object(module, "Library", _CpuLibrary),
        mock.patch.object(module, f"_{name}_common_support_error", return_value=None),
        mock.patch.object(module, "_get_device_major", return_value=major),
    ]


def _torch_kernels() -> torch.library.Library:
    """Register torch's own varlen kernels on the CPU."""
    library = torch.library.Library("aten", "IMPL", "CPU")
    library.impl("_flash_attention_forward", _torch_forward)
    library.impl("_flash_attention_backward", _torch_backward)
    return library


def _torch_forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, ...]:
    cu_seqlens_q, cu_seqlens_k, max_q, max_k, _, causal, _ = rest
    CALLS.append({"max_seqlen": (max_q, max_k)})
    left = causal_left(causal, options["window_size_left"], options["window_size_right"])
    out, lse = forward(q, k, v, cu_seqlens_q, cu_seqlens_k, options["scale"], left)
    return out, lse, torch.zeros(2, dtype=torch.uint64), torch.zeros((), dtype=torch.uint64), q.new_empty(0)


def _torch_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, ...]:
    _, _, cu_seqlens_q, cu_seqlens_k, max_q, max_k, _, causal, *_ = rest
    CALLS.append({"max_seqlen": (max_q, max_k), "deterministic": torch.are_deterministic_algorithms_enabled()})
    left = causal_left(causal, options["window_size_left"], options["window_size_right"])
    return backward(dout, q, k, v, cu_seqlens_q, cu_seqlens_k, options["scale"], left)
