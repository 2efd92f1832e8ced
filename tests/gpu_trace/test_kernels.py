"""Each CUDA backend down to its kernel: the arguments that reach a kernel give the reference's results."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import attention as torch_attention

from hbp_titan.models import attention
from hbp_titan.models.attention import varlen_attention
from hbp_titan.models.documents import Documents, head_tail_shard, pack_documents
from tests.gpu_trace import kernels

TORCH = tuple(map(int, torch.__version__.split(".")[:2]))
LENGTHS = (70, 33, 20, 5, 1, 1)
backends = pytest.mark.parametrize("backend", ["torch", "fa2", "fa3", "fa4"])


def inputs(queries: int, keys: int) -> list[Tensor]:
    """Return q, k and v of 6 query and 2 key/value heads, k and v strided as after a fused exchange."""
    generator = torch.Generator().manual_seed(queries)
    q_T6D = torch.randn(queries, 6, 16, generator=generator).bfloat16()
    kv_S4D = torch.randn(keys, 4, 16, generator=generator).bfloat16()
    return [q_T6D, *kv_S4D.chunk(2, dim=1)]


def attend(documents: Documents, dtype: torch.dtype, window: int | None) -> list[Tensor]:
    """Return the output and the gradients of q, k and v."""
    leaves = [x.to(dtype).requires_grad_() for x in inputs(documents.whole.num_queries, documents.whole.num_keys)]
    o_TND = varlen_attention(*leaves, documents, scale=0.3, window=window)
    o_TND.backward(torch.linspace(-1, 1, o_TND.numel()).view(o_TND.shape).to(dtype))
    return [o_TND.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def expected(documents: Documents, window: int | None = None) -> list[Tensor]:
    attention.set_backend("reference")
    try:
        return attend(documents, torch.float32, window)
    finally:
        attention.set_backend("auto")


def assert_close(found: list[Tensor], right: list[Tensor]) -> None:
    assert len(found) == len(right) == 4
    for one, other in zip(found, right, strict=True):
        assert one.dtype == torch.bfloat16
        # bfloat16 has 8 bits of mantissa; each element sums a few dozen terms.
        assert (one.float() - other).norm() < 0.01 * other.norm() + 1e-6


def run(backend: str, documents: Documents, window: int | None = None) -> list[Tensor]:
    kernels.CALLS.clear()
    with kernels.installed(backend):
        if TORCH < (2, 12) and backend == "fa4":
            pytest.skip("needs torch 2.12; run: TORCH_VERSIONS=2.12.1 scripts/trace_all_torch.sh")
        attention.set_backend(backend)
        try:
            return attend(documents, torch.bfloat16, window)
        finally:
            attention.set_backend("auto")


@backends
def test_each_kernel_equals_the_reference(backend: str) -> None:
    documents = pack_documents(LENGTHS)
    assert len(documents.groups) == 1
    assert_close(run(backend, documents), expected(documents))
    assert len(kernels.CALLS) == 2
    # FlashAttention-4's backward takes no max_seqlen.
    assert [call.get("max_seqlen", (70, 70)) for call in kernels.CALLS] == [(70, 70), (70, 70)]


@backends
def test_windows_reach_each_kernel_in_forward_and_backward(backend: str) -> None:
    for documents in (pack_documents(LENGTHS), pack_documents(LENGTHS, [n + 20 for n in LENGTHS])):
        for window, left in ((1, 0), (9, 8), (90, -1)):
            assert_close(run(backend, documents, window), expected(documents, window))
            assert [call["left"] for call in kernels.CALLS] == [left, left]


@backends
def test_each_group_of_documents_is_one_kernel_call(backend: str) -> None:
    lengths = [300, *[20] * 8]
    documents = pack_documents(lengths)
    assert [group.max_seqlen_q for group in documents.groups] == [300, 20]
    assert_close(run(backend, documents), expected(documents))
    assert [call["max_seqlen"] for call in kernels.CALLS if "deterministic" not in call] == [(300, 300), (20, 20)]


@backends
def test_no_document_without_queries_reaches_a_kernel(backend: str) -> None:
    # Documents shorter than the number of chunks have no query in most passes; kernels.py asserts that none arrives.
    for lengths in ([3, 1, 2, 1, 1], [70, 33, 20, 5, 1, 1, 2], [132]):
        for rank in (0, 3):
            _, shard = head_tail_shard(np.array(lengths), rank, 4)
            for part in (shard.heads, shard.tails):
                assert_close(run(backend, part.documents), expected(part.documents))


@backends
def test_deterministic_mode_reaches_each_kernels_backward(backend: str) -> None:
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        try:
            run(backend, pack_documents(LENGTHS))
        finally:
            torch.use_deterministic_algorithms(False)
        assert [call["deterministic"] for call in kernels.CALLS if "deterministic" in call] == [deterministic]


def test_registered_kernels_replace_each_other_and_are_restored() -> None:
    for backend, active in (("fa3", "FA3"), ("fa4", "FA4"))[: 1 if TORCH < (2, 12) else 2]:
        with kernels.installed(backend):
            attention.set_backend(backend)
            assert torch_attention.current_flash_attention_impl() == active
    attention.set_backend("torch")
    assert torch_attention.current_flash_attention_impl() is None
    attention.set_backend("auto")


def test_an_incompatible_flash_attention_4_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def newer(q: Tensor) -> Any:
        raise NotImplementedError

    # As in a module without postponed annotations.
    newer.__annotations__["return"] = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
    with kernels.installed("fa4"):
        monkeypatch.setattr(importlib.import_module("flash_attn.cute.interface"), "_flash_attn_fwd", newer)
        with pytest.raises(ValueError, match="torch 2.12" if TORCH < (2, 12) else "flash-attn-4==4.0.0b19"):
            attention.set_backend("fa4")


@pytest.mark.parametrize("backend", ["fa2", "fa3", "fa4"])
def test_a_missing_package_raises(backend: str) -> None:
    with kernels.installed("none"), pytest.raises(ValueError, match="flash_attn"):
        attention.set_backend(backend)
