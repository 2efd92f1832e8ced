"""Varlen attention: every backend and its gradients against plain mathematics, the choice of backend, and errors."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from hbp_titan.config import load_config
from hbp_titan.models import attention, attention_cpu
from hbp_titan.models.attention import choose_backend, missing, selected_backend, set_backend, varlen_attention
from hbp_titan.models.documents import Documents, pack_documents


@pytest.fixture(autouse=True)
def _automatic_backend() -> Iterator[None]:
    missing.cache_clear()
    yield
    set_backend("auto")
    missing.cache_clear()


def documents_of(boundaries: list[int], boundaries_k: list[int] | None = None, device: str = "cpu") -> Documents:
    lengths_k = None if boundaries_k is None else np.diff(boundaries_k)
    return pack_documents(np.diff(boundaries), lengths_k, device=device)


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, boundaries: list[int], scale: float, window: int | None = None
) -> Tensor:
    """Return attention from the whole T x T score matrix with an explicit mask: same document, not later, in window."""
    group = q.shape[1] // k.shape[1]
    document = torch.zeros(q.shape[0], dtype=torch.long, device=q.device)
    for boundary in boundaries[1:-1]:
        document[boundary:] += 1
    token = torch.arange(q.shape[0], device=q.device)
    visible = (document[:, None] == document[None]) & (token[:, None] >= token[None])
    if window is not None:
        visible &= token[:, None] < token[None] + window
    heads = []
    for n in range(q.shape[1]):
        scores = q[:, n] @ k[:, n // group].T * scale
        heads.append(scores.masked_fill(~visible, -1e30).softmax(-1) @ v[:, n // group])
    return torch.stack(heads, dim=1)


def make_inputs(
    num_tokens: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(num_tokens, n, head_dim) for n in (heads, kv_heads, kv_heads)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [t.to(device, dtype).requires_grad_() for t in tensors]


def output_and_grads(function: object, inputs: list[Tensor], *args: object) -> list[Tensor]:
    o = function(*inputs, *args)  # type: ignore[operator]
    weights = torch.linspace(-1, 1, o.numel(), dtype=torch.float64, device=o.device).view_as(o)
    return [o, *torch.autograd.grad((o.double() * weights).sum(), inputs)]


# One document; short ones among longer ones; three groups of similar length, each a kernel call.
BOUNDARIES = ([0, 300], [0, 1, 2, 19, 299, 300], [0, 270, 285, 290, 300], [0, 140, 280, 290, 300])
HEADS = ((4, 4), (4, 2), (4, 1), (6, 3))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("boundaries", BOUNDARIES)
@pytest.mark.parametrize("window", [None, 7, 280])
def test_outputs_and_gradients_equal_plain_attention(
    backend: str, heads: int, kv_heads: int, boundaries: list[int], window: int | None
) -> None:
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        inputs = make_inputs(300, heads, kv_heads, 16, dtype)
        doubles = [t.detach().double().requires_grad_() for t in inputs]
        expected = output_and_grads(plain_attention, doubles, boundaries, 0.25, window)
        set_backend(backend)
        actual = output_and_grads(varlen_attention, inputs, documents_of(boundaries), None, window)
        for found, wanted in zip(actual, expected, strict=True):
            assert found.dtype == dtype
            # At least 1: with a window of one token the gradient of q is exactly 0.
            assert (found.double() - wanted).norm() <= tolerance * wanted.norm().clamp(min=1)


def test_windows_of_several_kernel_blocks_equal_plain_attention() -> None:
    # Keys of a band in several of the kernel's blocks of 512: some queries see nothing of the first block.
    boundaries = [0, 1700, 2000]
    for window, dtype, tolerance in ((1100, torch.float64, 1e-12), (1100, torch.bfloat16, 3e-2)):
        inputs = make_inputs(2000, 2, 1, 8, dtype)
        doubles = [t.detach().double().requires_grad_() for t in inputs]
        expected = output_and_grads(plain_attention, doubles, boundaries, 0.25, window)
        actual = output_and_grads(varlen_attention, inputs, documents_of(boundaries), 0.25, window)
        for found, wanted in zip(actual, expected, strict=True):
            assert (found.double() - wanted).norm() <= tolerance * wanted.norm().clamp(min=1)


def test_the_cpu_backend_computes_bands_of_long_documents() -> None:
    calls = attention_cpu._calls(100_000, 100_000, 1000, torch.empty(0))
    scores = sum((rows.stop - rows.start) * (keys.stop - keys.start) for rows, keys, _, _ in calls)
    assert scores <= 1.25 * 100_000 * 1000


# Documents of 12, 1 and 27 tokens. Queries: tokens 5 to 8 of the first, none of the second, 13 to 29 of the third;
# each document's keys up to its last query.
CHUNK_Q = [0, 4, 21]
CHUNK_K = [0, 9, 26]
CHUNK_TOKENS = [*range(5, 9), *range(13, 30)]
KEY_TOKENS = [*range(9), *range(13, 30)]


def _chunks_and_whole(
    device: str, dtype: torch.dtype, heads: int, kv_heads: int, window: int | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Return output and gradients of the chunks by varlen_attention and of the same tokens by plain attention."""
    q, k, v = make_inputs(40, heads, kv_heads, 16, dtype, device)

    def chunks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        documents = documents_of(CHUNK_Q, CHUNK_K, device)
        return varlen_attention(q[CHUNK_TOKENS], k[KEY_TOKENS], v[KEY_TOKENS], documents, 0.25, window)

    def whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return plain_attention(q, k, v, [0, 12, 13, 40], 0.25, window)[CHUNK_TOKENS]

    doubles = [t.detach().double().requires_grad_() for t in (q, k, v)]
    return output_and_grads(chunks, [q, k, v]), output_and_grads(whole, doubles)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("window", [None, 1, 10])
def test_queries_at_the_end_of_longer_keys_equal_whole_documents(
    backend: str, heads: int, kv_heads: int, window: int | None
) -> None:
    set_backend(backend)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        for found, wanted in zip(*_chunks_and_whole("cpu", dtype, heads, kv_heads, window), strict=True):
            assert found.dtype == dtype
            assert (found.double() - wanted).norm() <= tolerance * wanted.norm().clamp(min=1)


@pytest.mark.parametrize(
    ("boundaries", "boundaries_k", "window"),
    [([0, 1, 5, 8], [0, 1, 5, 8], None), ([0, 2, 5], [0, 5, 10], None), ([0, 2, 5], [0, 5, 10], 3)],
    ids=["equal", "longer keys", "window"],
)
def test_cpu_kernel_passes_gradcheck_in_float64(
    boundaries: list[int], boundaries_k: list[int], window: int | None
) -> None:
    documents = documents_of(boundaries, boundaries_k)
    generator = torch.Generator().manual_seed(0)
    shapes = ((boundaries[-1], 4, 4), (boundaries_k[-1], 2, 4), (boundaries_k[-1], 2, 4))
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]
    assert torch.autograd.gradcheck(lambda q, k, v: varlen_attention(q, k, v, documents, None, window), inputs)


@pytest.mark.parametrize(("boundaries", "boundaries_k"), [([0, 5, 8], [0, 4, 8]), ([0, 5, 5, 8], None)])
def test_empty_documents_and_fewer_keys_than_queries_raise(
    boundaries: list[int], boundaries_k: list[int] | None
) -> None:
    with pytest.raises(ValueError, match="at least one query"):
        documents_of(boundaries, boundaries_k)


@pytest.mark.parametrize(
    ("tokens", "kv_heads", "word"), [(4, 2, "documents"), (9, 2, "documents"), (8, 3, "num_kv_heads")]
)
def test_documents_that_do_not_cover_the_pack_and_heads_that_do_not_divide_raise(
    tokens: int, kv_heads: int, word: str
) -> None:
    with pytest.raises(ValueError, match=word):
        varlen_attention(*make_inputs(8, 4, kv_heads, 4, torch.float32), documents_of([0, tokens]))


def test_cpu_kernel_passes_opcheck() -> None:
    cu_seqlens = torch.tensor([0, 3, 8, 8], dtype=torch.int32)
    inputs = make_inputs(8, 4, 2, 4, torch.float32)
    torch.library.opcheck(torch.ops.hbp_titan.varlen_attention_cpu.default, (*inputs, cu_seqlens, cu_seqlens, 0.5, 3))


def test_strided_views_of_one_projection_are_read_correctly() -> None:
    generator = torch.Generator().manual_seed(3)
    qkv = torch.randn(10, 8, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(10, 4, 8, generator=generator, dtype=torch.float64)
    grads = []
    for function, extra in ((varlen_attention, (documents_of([0, 6, 10]), 0.5)), (plain_attention, ([0, 6, 10], 0.5))):
        o = function(*qkv.split([4, 2, 2], dim=1), *extra)  # type: ignore[operator]
        grads.append(torch.autograd.grad((o * weights).sum(), qkv)[0])
    torch.testing.assert_close(*grads)


def test_each_group_of_similar_lengths_is_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def record(q: Tensor, k: Tensor, v: Tensor, *args: object, **kwargs: object) -> Tensor:
        calls.append((len(q), len(k), args[2], args[3]))
        return q

    monkeypatch.setattr(attention, "varlen_attn", record)
    set_backend("torch")
    inputs = make_inputs(1000, 2, 2, 4, torch.bfloat16)
    varlen_attention(*inputs, documents_of([0, 600, 750, 900, 950, 1000]))
    # Blocks of 128: 5 of the longest, 2 of each of the next two, one of the others.
    assert calls == [(600, 600, 600, 600), (300, 300, 150, 150), (100, 100, 50, 50)]


def test_backward_keeps_no_score_matrix() -> None:
    saved = []
    inputs = make_inputs(64, 4, 2, 8, torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        varlen_attention(*inputs, documents_of([0, 64]))
    # q, k, v, output, logsumexp and the two boundaries of queries and of keys
    assert sum(saved) <= 64 * 8 * (4 + 2 + 2 + 4) + 64 * 4 + 4


@pytest.mark.parametrize("backend", ["torch", "fa2"])
def test_gpu_kernels_reject_float32(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "flash_attn", type("M", (), {"flash_attn_varlen_func": None}))
    set_backend(backend)
    inputs = make_inputs(8, 2, 2, 4, torch.float32)
    with pytest.raises(ValueError, match="float16"):
        varlen_attention(*inputs, documents_of([0, 8]))
    _fake_packages(monkeypatch, {"fa2"}, (8, 0))
    with pytest.raises(ValueError, match="float16"):
        choose_backend(backend, torch.device("cuda", 0), 64, torch.float32)


@pytest.mark.parametrize("has_gqa", [True, False])
def test_torch_kernel_is_called_with_a_causal_window_and_few_kv_heads(
    has_gqa: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def record(q: Tensor, k: Tensor, v: Tensor, *args: object, **kwargs: object) -> Tensor:
        calls.append((k.shape[1], v.shape[1], args[2:], kwargs))
        return q

    monkeypatch.setattr(attention, "varlen_attn", record)
    monkeypatch.setattr(attention, "_TORCH_HAS_GQA", has_gqa)
    set_backend("torch")
    varlen_attention(*make_inputs(8, 4, 2, 4, torch.bfloat16), documents_of([0, 8]))
    options = {"scale": 0.5, "window_size": (-1, 0)}
    # Its kernel reads fewer key/value heads, whether there is an argument for it or not.
    assert calls == [(2, 2, (8, 8), options | ({"enable_gqa": True} if has_gqa else {}))]


def _fake_packages(monkeypatch: pytest.MonkeyPatch, installed: set[str], capability: tuple[int, int]) -> None:
    monkeypatch.setattr(attention, "missing", lambda name: "" if name in {*installed, "torch"} else "not installed")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(attention.torch_attention, "activate_flash_attention_impl", lambda name: None)
    monkeypatch.setattr(attention.torch_attention, "restore_flash_attention_impl", lambda: None)


@pytest.mark.parametrize(
    ("capability", "installed", "head_dim", "expected"),
    [
        ((8, 0), {"fa2", "fa3", "fa4"}, 128, "fa2"),
        ((8, 0), set(), 128, "torch"),
        ((9, 0), {"fa2", "fa3", "fa4"}, 128, "fa3"),
        ((9, 0), {"fa2", "fa4"}, 128, "fa2"),
        ((9, 0), {"fa3"}, 192, "fa3"),
        ((10, 0), {"fa2", "fa3", "fa4"}, 128, "fa4"),
        ((10, 0), {"fa2", "fa4"}, 192, "fa2"),
        ((12, 0), {"fa3", "fa4"}, 128, "torch"),
    ],
)
def test_auto_chooses_the_fastest_installed_kernel_by_capability_and_head_width(
    capability: tuple[int, int],
    installed: set[str],
    head_dim: int,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _fake_packages(monkeypatch, installed, capability)
    assert choose_backend("auto", torch.device("cuda", 0), head_dim) == expected
    assert selected_backend("cuda") == expected


def test_a_requested_kernel_that_cannot_run_raises_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    _fake_packages(monkeypatch, {"fa3", "fa4"}, (9, 0))
    cuda = torch.device("cuda", 0)
    assert choose_backend("fa4", cuda, 128) == "fa4"
    with pytest.raises(ValueError, match="at most 128"):
        choose_backend("fa4", cuda, 192)
    with pytest.raises(ValueError, match="not installed"):
        choose_backend("fa2", cuda, 128)
    with pytest.raises(ValueError, match="CUDA device"):
        choose_backend("fa3", torch.device("cpu"), 128)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(ValueError, match="compute capability"):
        choose_backend("fa3", cuda, 128)


def test_the_backend_depends_on_the_device_unless_it_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    assert selected_backend("cpu") == "cpu"
    monkeypatch.setattr(attention, "missing", lambda name: "not installed")
    assert selected_backend(torch.device("cuda", 0)) == "torch"
    monkeypatch.setattr(attention, "missing", lambda name: "")
    assert selected_backend(torch.device("cuda", 0)) == "fa2"
    set_backend("reference")
    assert selected_backend("cuda") == "reference"
    with pytest.raises(ValueError, match="'fast'"):
        set_backend("fast")


def test_the_configuration_accepts_every_backend() -> None:
    for backend in ("auto", *attention.BACKENDS):
        assert load_config([f"--model.attention_backend={backend}"]).model.attention_backend == backend


def test_a_package_without_the_function_counts_as_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    # As flash-attn-4 alone leaves it: a namespace package `flash_attn` without FlashAttention-2.
    monkeypatch.setitem(__import__("sys").modules, "flash_attn", type("Namespace", (), {}))
    assert "flash_attn_varlen_func" in missing("fa2")
    assert selected_backend("cuda") == "torch"
    assert "ModuleNotFoundError" in missing("fa3")
    assert missing("fa4")


GPU_BACKENDS = ["torch", "fa2", "fa3", "fa4"]


def _use_on_gpu(backend: str) -> None:
    try:
        choose_backend(backend, torch.device("cuda", 0), 64)
    except ValueError as error:
        pytest.skip(f"{error} (docs/models.md); run: scripts/run_tests.sh -n 0 -m gpu tests/models/test_attention.py")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GPU_BACKENDS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2), (4, 1)])
@pytest.mark.parametrize("window", [None, 1, 100])
def test_gpu_kernels_equal_plain_attention_in_bfloat16(
    backend: str, heads: int, kv_heads: int, window: int | None
) -> None:
    _use_on_gpu(backend)
    boundaries = [0, 1, 130, 131, 512]
    inputs = make_inputs(512, heads, kv_heads, 64, torch.bfloat16, "cuda")
    doubles = [t.detach().double().requires_grad_() for t in inputs]
    expected = output_and_grads(plain_attention, doubles, boundaries, 0.125, window)
    actual = output_and_grads(varlen_attention, inputs, documents_of(boundaries, device="cuda"), None, window)
    for found, wanted in zip(actual, expected, strict=True):
        # Without the document or the causal mask the difference is of the order of the norm itself.
        assert (found.double() - wanted).norm() <= 2e-2 * wanted.norm().clamp(min=1)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GPU_BACKENDS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 1)])
@pytest.mark.parametrize("window", [None, 6])
def test_gpu_kernels_align_queries_with_the_end_of_longer_keys(
    backend: str, heads: int, kv_heads: int, window: int | None
) -> None:
    _use_on_gpu(backend)
    for found, wanted in zip(*_chunks_and_whole("cuda", torch.bfloat16, heads, kv_heads, window), strict=True):
        assert (found.double() - wanted).norm() <= 2e-2 * wanted.norm().clamp(min=1)
