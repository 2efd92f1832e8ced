"""The chunked linear cross entropy against torch's own on the whole logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hbp_titan.components.loss import (
    _chunk,
    _compiled_chunk,
    linear_cross_entropy,
    linear_cross_entropy_losses,
    select_rows,
)
from hbp_titan.models.registry import get_flavor
from hbp_titan.tuning.memory import head_memory


def _inputs(num_tokens: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    hidden = torch.randn(num_tokens, 16, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(50, 16, generator=generator).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, 50, (num_tokens,), generator=generator)


@pytest.mark.parametrize("chunk_tokens", [1, 7, 20, 64])
def test_sum_and_gradients_equal_the_whole_logits(chunk_tokens: int) -> None:
    hidden, weight, labels = _inputs(20)
    token_weights = torch.linspace(0.0, 2.0, 20)
    losses = F.cross_entropy(hidden @ weight.T, labels, reduction="none")
    expected = losses @ token_weights
    expected_grads = torch.autograd.grad(expected * 0.25, (hidden, weight), retain_graph=True)
    objective, token_losses = linear_cross_entropy(hidden, weight, labels, token_weights, chunk_tokens)
    grads = torch.autograd.grad(objective * 0.25, (hidden, weight))
    torch.testing.assert_close(objective, expected)
    torch.testing.assert_close(token_losses, losses.detach())
    torch.testing.assert_close(grads, expected_grads)
    assert not token_losses.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy_losses(hidden, weight, labels, chunk_tokens), losses)


def test_frozen_output_matrix_gets_no_gradient_and_changes_none() -> None:
    hidden, weight, labels = _inputs(20)
    expected = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels, torch.ones(20), 7)[0], hidden)
    objective, _ = linear_cross_entropy(hidden, weight.detach(), labels, torch.ones(20), 7)
    (saved,) = [t for t in objective.grad_fn.saved_tensors if t is not None]  # type: ignore[union-attr]
    assert saved.shape == hidden.shape
    assert torch.autograd.grad(objective, hidden)[0].equal(expected[0])


def test_no_loss_token_gives_zero_and_zero_gradients() -> None:
    hidden, weight, labels = _inputs(0)
    loss, token_losses = linear_cross_entropy(hidden, weight, labels, torch.zeros(0), 8)
    loss.backward()
    assert loss.item() == 0.0
    assert token_losses.shape == (0,)
    assert linear_cross_entropy_losses(hidden, weight, labels, 8).shape == (0,)
    assert weight.grad is not None
    assert not weight.grad.any()


def _errors(losses: torch.Tensor, grads: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> list[float]:
    pairs = zip((losses, *grads), exact, strict=True)
    return [float((found.detach().double() - right).norm() / right.norm()) for found, right in pairs]


@pytest.mark.parametrize(
    ("dtype", "loss_bound", "grad_bound"), [(torch.float32, 1e-6, 2e-6), (torch.bfloat16, 1e-6, 3e-3)]
)
def test_errors_against_float64(dtype: torch.dtype, loss_bound: float, grad_bound: float) -> None:
    # Rounding the logits, or each chunk's gradient of the matrix, to bf16 gives losses with an error of 3e-3 and
    # gradients with one of 6e-3: what is left is the rounding of the logits' gradient and of the results.
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(512, 128, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(2048, 128, generator=generator) * 0.35).to(dtype).requires_grad_()
    labels = torch.randint(0, 2048, (512,), generator=generator)
    token_weights = torch.rand(512, generator=generator) / 512
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    exact_losses = F.cross_entropy(wide[0] @ wide[1].T, labels, reduction="none")
    exact = [
        exact_losses.detach(),
        *torch.autograd.grad(exact_losses @ token_weights.double(), wide, retain_graph=True),
    ]
    objective, losses = linear_cross_entropy(hidden, weight, labels, token_weights, 64)
    found = _errors(losses, torch.autograd.grad(objective, (hidden, weight)), exact)
    assert objective.dtype == losses.dtype == torch.float32
    assert found[0] < loss_bound
    assert max(found[1:]) < grad_bound
    with torch.no_grad():
        assert _errors(linear_cross_entropy_losses(hidden, weight, labels, 64), [], exact[:1])[0] < loss_bound
    whole = F.cross_entropy((hidden @ weight.T).float(), labels, reduction="none")
    rounded = _errors(whole, torch.autograd.grad(whole @ token_weights, (hidden, weight)), exact)
    if dtype == torch.bfloat16:
        # The usual way, bf16 logits, exceeds the bounds.
        assert rounded[0] > 100 * loss_bound
        assert min(rounded[1:]) > grad_bound


def test_a_tied_matrix_gets_the_gradients_of_both_of_its_uses() -> None:
    _, weight, labels = _inputs(20)
    tokens = labels.flip(0)
    grads = []
    for chunked in (True, False):
        hidden = F.embedding(tokens, weight)
        whole = F.cross_entropy(hidden @ weight.T, labels, reduction="sum")
        loss = linear_cross_entropy(hidden, weight, labels, torch.ones(20), 7)[0] if chunked else whole
        grads.append(torch.autograd.grad(loss, weight)[0])
    torch.testing.assert_close(*grads)


def test_certain_and_hopeless_tokens_have_exact_gradients() -> None:
    hidden = torch.tensor([[1.0], [1.0]], requires_grad=True)
    weight = torch.tensor([[0.0], [200.0]], requires_grad=True)
    objective, losses = linear_cross_entropy(hidden, weight, torch.tensor([1, 0]), torch.ones(2), 8)
    assert losses.tolist() == [0.0, 200.0]
    assert torch.autograd.grad(objective, weight)[0].tolist() == [[-1.0], [1.0]]


class _LargeTensors(TorchDispatchMode):
    """Bytes read and written of tensors with as many elements as a chunk's logits, products, copies of the matrix."""

    def __init__(self, logits: int, matrix: int) -> None:
        super().__init__()
        self.logits, self.matrix = logits, matrix
        self.moved_bytes = self.products = 0
        self.matrix_writes: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = str(func)
        product = "mm" in name or "matmul" in name
        # Views and what touches one element of each row move nothing.
        if not product and any(
            part in name for part in ("view", "permute", "slice", "empty", "scatter", "gather", "detach", "prim.")
        ):
            return result
        self.products += product
        read, written = ([x for x in tree_leaves(of) if isinstance(x, torch.Tensor)] for of in (args, result))
        # What returns nothing adds to its first argument.
        written = written or read[:1]
        self.moved_bytes += sum(x.nbytes for x in read + written if x.numel() == self.logits)
        self.matrix_writes += [x.dtype for x in written if x.numel() == self.matrix]
        return result


@pytest.mark.parametrize(("dtype", "passes"), [(torch.bfloat16, 9.5), (torch.float32, 11)])
def test_a_chunk_takes_three_products_and_few_passes_over_its_logits(dtype: torch.dtype, passes: float) -> None:
    tokens, vocab, hidden_size, chunks = 32, 999, 16, 3
    with FakeTensorMode():
        hidden = torch.empty(chunks * tokens, hidden_size, dtype=dtype, requires_grad=True)
        weight = torch.empty(vocab, hidden_size, dtype=dtype, requires_grad=True)
        labels = torch.empty(chunks * tokens, dtype=torch.int64)
        with _LargeTensors(tokens * vocab, vocab * hidden_size) as counted:
            objective, _ = linear_cross_entropy(hidden, weight, labels, torch.empty(chunks * tokens), tokens)
            assert counted.products == 3 * chunks
            # A pass reads or writes the logits in fp32 once. Compiled, all but the products' own are one kernel.
            assert counted.moved_bytes == passes * chunks * 4 * tokens * vocab
            # Cleared, and added to by each chunk, in fp32; rounded once, in backward.
            assert counted.matrix_writes == [torch.float32] * (1 + chunks)
            objective.backward()
        assert counted.matrix_writes == [torch.float32] * (1 + chunks) + [dtype]


def test_the_head_holds_one_chunk_of_logits_and_one_fp32_gradient() -> None:
    args, tokens, chunk = get_flavor("llama3_1_8b"), 16384, 2048
    found = head_memory(args, tokens, tokens, chunk, torch.bfloat16, "cuda")
    matrix, states = args.vocab_size * args.hidden_size, 2 * tokens * args.hidden_size
    # Logits in fp32 with their gradient in bf16; normed states, those of loss tokens, and the gradient of these.
    assert found.forward == pytest.approx(4 * matrix + 6 * chunk * args.vocab_size + 3 * states, rel=0.01)
    # The matrix's gradient is rounded next to the fp32 sum, where no logits are left.
    assert found.saved + found.backward < found.forward


def test_one_graph_for_every_number_of_loss_tokens() -> None:
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def counting(module: torch.fx.GraphModule, _: list[torch.Tensor]) -> Any:
        graphs.append(module)
        return module.forward

    compiled = _compiled_chunk.__wrapped__(counting)
    for size in (8, 8, 3, 1, 7, 2):
        hidden, weight, labels = _inputs(size)
        with torch.no_grad():
            for found, right in zip(
                *(run(hidden, weight, labels, torch.ones(size)) for run in (compiled, _chunk)), strict=True
            ):
                torch.testing.assert_close(found, right)
    assert len(graphs) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_selected_rows_send_their_gradients_back_alone(dtype: torch.dtype) -> None:
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    index = torch.tensor([7, 0, 3])
    rows = select_rows(x, index)
    assert rows.equal(x[index])
    factors = torch.arange(12.0).view(3, 4).to(dtype)
    (grad,) = torch.autograd.grad(rows, x, factors)
    assert grad.equal(torch.autograd.grad(x[index], x, factors)[0])
    assert not torch.autograd.grad(select_rows(x, index[:0]), x, factors[:0])[0].any()
