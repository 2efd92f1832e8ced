"""Varlen attention: every backend against plain mathematics, its gradients, compilation and its errors."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from hbp_titan.models import attention
from hbp_titan.models.attention import selected_backend, set_backend, varlen_attention


@pytest.fixture(autouse=True)
def _automatic_backend() -> Iterator[None]:
    yield
    set_backend("auto")


def plain_attention(q: Tensor, k: Tensor, v: Tensor, boundaries: list[int], scale: float) -> Tensor:
    """The whole T x T score matrix with the block-diagonal causal mask written out: another way than any backend."""
    group = q.shape[1] // k.shape[1]
    document = torch.zeros(q.shape[0], dtype=torch.long, device=q.device)
    for boundary in boundaries[1:-1]:
        document[boundary:] += 1
    token = torch.arange(q.shape[0], device=q.device)
    visible = (document[:, None] == document[None]) & (token[:, None] >= token[None])
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


# One document; single-token documents; padding repeats; empty documents between others and in front.
BOUNDARIES = ([0, 40], [0, 1, 2, 19, 39, 40], [0, 7, 40, 40, 40, 40], [0, 0, 12, 12, 12, 13, 40])
HEADS = ((4, 4), (4, 2), (4, 1), (6, 3))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("boundaries", BOUNDARIES)
def test_outputs_and_gradients_equal_plain_attention(
    backend: str, heads: int, kv_heads: int, boundaries: list[int]
) -> None:
    cu_seqlens = torch.tensor(boundaries, dtype=torch.int32)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        inputs = make_inputs(40, heads, kv_heads, 16, dtype)
        doubles = [t.detach().double().requires_grad_() for t in inputs]
        expected = output_and_grads(plain_attention, doubles, boundaries, 0.25)
        set_backend(backend)
        actual = output_and_grads(varlen_attention, inputs, cu_seqlens, 40)
        for found, wanted in zip(actual, expected, strict=True):
            assert found.dtype == dtype
            assert (found.double() - wanted).norm() <= tolerance * wanted.norm()


# Documents of 12, 1 and 27 tokens. Queries: tokens 5 to 8 of the first, none of the second, 13 to 29 of the third.
# A document's keys after its last query are a document without queries.
CHUNK_Q = [0, 4, 4, 4, 21, 21, 21]
CHUNK_K = [0, 9, 12, 13, 30, 40, 40]
CHUNK_TOKENS = [*range(5, 9), *range(13, 30)]


def _chunks_and_whole(device: str, dtype: torch.dtype, heads: int, kv_heads: int) -> tuple[list[Tensor], list[Tensor]]:
    """Output and gradients of the chunks by varlen_attention, and of the same tokens in the plain whole."""
    q, k, v = make_inputs(40, heads, kv_heads, 16, dtype, device)

    def chunks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cu_q, cu_k = (torch.tensor(x, dtype=torch.int32, device=device) for x in (CHUNK_Q, CHUNK_K))
        return varlen_attention(q[CHUNK_TOKENS], k, v, cu_q, 17, 0.25, cu_k, 40)

    def whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return plain_attention(q, k, v, [0, 12, 13, 40], 0.25)[CHUNK_TOKENS]

    doubles = [t.detach().double().requires_grad_() for t in (q, k, v)]
    return output_and_grads(chunks, [q, k, v]), output_and_grads(whole, doubles)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_queries_at_the_end_of_longer_keys_equal_the_same_tokens_of_the_whole(
    backend: str, heads: int, kv_heads: int
) -> None:
    set_backend(backend)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        for found, wanted in zip(*_chunks_and_whole("cpu", dtype, heads, kv_heads), strict=True):
            assert found.dtype == dtype
            assert (found.double() - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_last_query_sees_the_last_key(backend: str) -> None:
    set_backend(backend)
    # Queries of zero weigh every visible value alike: two queries over values 1, 3, 5, 7 see three and four of them.
    v = torch.tensor([1.0, 3.0, 5.0, 7.0])[:, None, None]
    cu_q, cu_k = torch.tensor([0, 2], dtype=torch.int32), torch.tensor([0, 4], dtype=torch.int32)
    o = varlen_attention(torch.zeros(2, 1, 1), torch.ones(4, 1, 1), v, cu_q, 2, None, cu_k, 4)
    torch.testing.assert_close(o.flatten(), torch.tensor([3.0, 4.0]))


def test_cpu_kernel_with_longer_keys_passes_gradcheck_in_float64() -> None:
    cu_q, cu_k = torch.tensor([0, 2, 2, 5], dtype=torch.int32), torch.tensor([0, 5, 7, 10], dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)
    shapes = ((5, 4, 4), (10, 2, 4), (10, 2, 4))
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]
    assert torch.autograd.gradcheck(lambda q, k, v: varlen_attention(q, k, v, cu_q, 3, None, cu_k, 5), inputs)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_fewer_keys_than_queries_are_refused(backend: str) -> None:
    set_backend(backend)
    cu_q, cu_k = torch.tensor([0, 5, 8], dtype=torch.int32), torch.tensor([0, 4, 8], dtype=torch.int32)
    with pytest.raises(ValueError, match="a document has 5 queries but 4 keys"):
        varlen_attention(*make_inputs(8, 2, 2, 4, torch.float32), cu_q, 8, None, cu_k, 8)


def test_scale_multiplies_the_logits() -> None:
    inputs = make_inputs(9, 2, 1, 8, torch.float64)
    cu_seqlens = torch.tensor([0, 4, 9], dtype=torch.int32)
    expected = plain_attention(*inputs, [0, 4, 9], 0.7)
    torch.testing.assert_close(varlen_attention(*inputs, cu_seqlens, 9, scale=0.7), expected)


def test_cpu_kernel_passes_gradcheck_in_float64() -> None:
    cu_seqlens = torch.tensor([0, 1, 5, 5, 8], dtype=torch.int32)
    inputs = make_inputs(8, 4, 2, 4, torch.float64)
    assert torch.autograd.gradcheck(lambda q, k, v: varlen_attention(q, k, v, cu_seqlens, 8), inputs)


def test_cpu_kernel_obeys_the_custom_op_rules() -> None:
    cu_seqlens = torch.tensor([0, 3, 8, 8], dtype=torch.int32)
    inputs = make_inputs(8, 4, 2, 4, torch.float32)
    torch.library.opcheck(torch.ops.hbp_titan.varlen_attention_cpu.default, (*inputs, cu_seqlens, cu_seqlens, 0.5))


def test_strided_views_of_one_projection_are_read_rightly() -> None:
    generator = torch.Generator().manual_seed(3)
    qkv = torch.randn(10, 8, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    cu_seqlens = torch.tensor([0, 6, 10], dtype=torch.int32)
    weights = torch.randn(10, 4, 8, generator=generator, dtype=torch.float64)
    grads = []
    for function, extra in ((varlen_attention, (cu_seqlens, 10, 0.5)), (plain_attention, ([0, 6, 10], 0.5))):
        o = function(*qkv.split([4, 2, 2], dim=1), *extra)  # type: ignore[operator]
        grads.append(torch.autograd.grad((o * weights).sum(), qkv)[0])
    torch.testing.assert_close(*grads)


def test_compiles_without_graph_breaks_and_new_lengths_do_not_recompile() -> None:
    graphs = []

    def counting_backend(module: torch.fx.GraphModule, _: list[Tensor]) -> object:
        graphs.append(module)
        return module.forward

    torch._dynamo.reset()
    # Through AOT autograd as well, which calls the fake implementations of forward and backward.
    eager = torch.compile(varlen_attention, fullgraph=True, backend="aot_eager", dynamic=False)
    counted = torch.compile(varlen_attention, fullgraph=True, backend=counting_backend, dynamic=False)
    for boundaries in ([0, 5, 16, 16], [0, 2, 9, 16]):
        inputs = make_inputs(16, 4, 2, 8, torch.float64)
        cu_seqlens = torch.tensor(boundaries, dtype=torch.int32)
        expected = output_and_grads(plain_attention, inputs, boundaries, 8**-0.5)
        for compiled in (eager, counted):
            for found, wanted in zip(output_and_grads(compiled, inputs, cu_seqlens, 16), expected, strict=True):
                torch.testing.assert_close(found, wanted)
    assert len(graphs) == 1


def test_backward_keeps_no_score_matrix() -> None:
    saved = []
    inputs = make_inputs(64, 4, 2, 8, torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        varlen_attention(*inputs, torch.tensor([0, 64], dtype=torch.int32), 64)
    # q, k, v, output, logsumexp and the two boundaries of queries and of keys
    assert sum(saved) <= 64 * 8 * (4 + 2 + 2 + 4) + 64 * 4 + 4


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("boundaries", [[0, 4], [1, 8], [0, 9], [0, 6, 4, 8]])
def test_boundaries_that_do_not_cover_the_pack_are_refused(backend: str, boundaries: list[int]) -> None:
    set_backend(backend)
    inputs = make_inputs(8, 2, 2, 4, torch.float32)
    with pytest.raises(ValueError, match="cu_seqlens must ascend from 0 to the 8 tokens"):
        varlen_attention(*inputs, torch.tensor(boundaries, dtype=torch.int32), 8)


def test_head_counts_that_do_not_divide_are_refused() -> None:
    inputs = make_inputs(8, 4, 3, 4, torch.float32)
    with pytest.raises(ValueError, match="4 query heads are no multiple of 3 key/value heads"):
        varlen_attention(*inputs, torch.tensor([0, 8], dtype=torch.int32), 8)


@pytest.mark.parametrize("backend", ["torch", "flash"])
def test_gpu_kernels_refuse_float32_by_name(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "flash_attn", type("M", (), {"flash_attn_varlen_func": None}))
    set_backend(backend)
    inputs = make_inputs(8, 2, 2, 4, torch.float32)
    with pytest.raises(ValueError, match=rf"attention backend '{backend}' computes in float16 or bfloat16"):
        varlen_attention(*inputs, torch.tensor([0, 8], dtype=torch.int32), 8)


@pytest.mark.parametrize("has_gqa", [True, False])
def test_torch_kernel_is_called_causally_with_the_heads_it_can_serve(
    has_gqa: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def record(q: Tensor, k: Tensor, v: Tensor, *args: object, **kwargs: object) -> Tensor:
        calls.append((k.shape[1], v.shape[1], args[2:], kwargs))
        return q

    monkeypatch.setattr(attention, "varlen_attn", record)
    monkeypatch.setattr(attention, "_TORCH_HAS_GQA", has_gqa)
    set_backend("torch")
    boundaries = torch.tensor([0, 8], dtype=torch.int32)
    varlen_attention(*make_inputs(8, 4, 2, 4, torch.bfloat16), boundaries, 8, None, boundaries, 16)
    options = {"scale": 0.5, "window_size": (-1, 0)}
    assert calls == [(2, 2, (8, 16), options | {"enable_gqa": True}) if has_gqa else (4, 4, (8, 16), options)]


def test_backend_follows_the_device_unless_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    assert selected_backend("cpu") == "cpu"
    monkeypatch.setattr(attention, "flash_attn_installed", lambda: False)
    assert selected_backend(torch.device("cuda", 0)) == "torch"
    monkeypatch.setattr(attention, "flash_attn_installed", lambda: True)
    assert selected_backend(torch.device("cuda", 0)) == "flash"
    set_backend("reference")
    assert selected_backend("cuda") == "reference"
    with pytest.raises(ValueError, match="attention backend 'fast' is none of flash, torch, cpu, reference, auto"):
        set_backend("fast")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["torch", "flash"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2), (4, 1)])
def test_gpu_kernels_equal_plain_attention_in_bfloat16(backend: str, heads: int, kv_heads: int) -> None:
    if backend == "flash":
        pytest.importorskip("flash_attn")
    boundaries = [0, 1, 130, 131, 512, 512, 512]
    cu_seqlens = torch.tensor(boundaries, dtype=torch.int32, device="cuda")
    inputs = make_inputs(512, heads, kv_heads, 64, torch.bfloat16, "cuda")
    doubles = [t.detach().double().requires_grad_() for t in inputs]
    expected = output_and_grads(plain_attention, doubles, boundaries, 0.125)
    set_backend(backend)
    actual = output_and_grads(varlen_attention, inputs, cu_seqlens, 512)
    for found, wanted in zip(actual, expected, strict=True):
        # Without the document or the causal mask the difference is of the order of the norm itself.
        assert (found.double() - wanted).norm() <= 2e-2 * wanted.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["torch", "flash"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 1)])
def test_gpu_kernels_align_queries_with_the_end_of_longer_keys(backend: str, heads: int, kv_heads: int) -> None:
    if backend == "flash":
        pytest.importorskip("flash_attn")
    set_backend(backend)
    for found, wanted in zip(*_chunks_and_whole("cuda", torch.bfloat16, heads, kv_heads), strict=True):
        assert (found.double() - wanted).norm() <= 2e-2 * wanted.norm()
