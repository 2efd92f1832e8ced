"""The chunked linear cross entropy against torch's own on whole logits, and the normalizers against definitions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hbp_titan.components.loss import (
    NORMALIZERS,
    _chunk,
    _compiled_chunk,
    linear_cross_entropy,
    linear_cross_entropy_losses,
    select_rows,
    weight_range,
)
from hbp_titan.models.registry import get_flavor
from hbp_titan.packing import Level, Plan, build_plan
from hbp_titan.tuning.pieces import HeadRun, head_memory


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


def test_frozen_output_matrix_gets_no_gradient_and_leaves_the_others_unchanged() -> None:
    hidden, weight, labels = _inputs(20)
    expected = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels, torch.ones(20), 7)[0], hidden)
    objective, _ = linear_cross_entropy(hidden, weight.detach(), labels, torch.ones(20), 7)
    (saved,) = [t for t in objective.grad_fn.saved_tensors if t is not None]  # type: ignore[union-attr]
    assert saved.shape == hidden.shape
    assert torch.autograd.grad(objective, hidden)[0].equal(expected[0])


def test_batch_without_loss_tokens_gives_zero_and_zero_gradients() -> None:
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
        # Negative control: the usual bf16 logits exceed the bounds.
        assert rounded[0] > 100 * loss_bound
        assert min(rounded[1:]) > grad_bound


def test_tied_matrix_gets_the_gradients_of_both_uses() -> None:
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
    """Counts matrix products, bytes moved in tensors of the size of a chunk's logits, and writes of the matrix."""

    def __init__(self, logits: int, matrix: int) -> None:
        super().__init__()
        self.logits, self.matrix = logits, matrix
        self.moved_bytes = self.products = 0
        self.matrix_writes: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = str(func)
        product = "mm" in name or "matmul" in name
        # Views, and operations on one element per row, move next to nothing.
        if not product and any(
            part in name for part in ("view", "permute", "slice", "empty", "scatter", "gather", "detach", "prim.")
        ):
            return result
        self.products += product
        read, written = ([x for x in tree_leaves(of) if isinstance(x, torch.Tensor)] for of in (args, result))
        # An operation without a result adds to its first argument.
        written = written or read[:1]
        self.moved_bytes += sum(x.nbytes for x in read + written if x.numel() == self.logits)
        self.matrix_writes += [x.dtype for x in written if x.numel() == self.matrix]
        return result


@pytest.mark.parametrize(("dtype", "passes"), [(torch.bfloat16, 9.5), (torch.float32, 11)])
def test_chunk_takes_three_products_and_few_passes_over_its_logits(dtype: torch.dtype, passes: float) -> None:
    tokens, vocab, hidden_size, chunks = 32, 999, 16, 3
    with FakeTensorMode():
        hidden = torch.empty(chunks * tokens, hidden_size, dtype=dtype, requires_grad=True)
        weight = torch.empty(vocab, hidden_size, dtype=dtype, requires_grad=True)
        labels = torch.empty(chunks * tokens, dtype=torch.int64)
        with _LargeTensors(tokens * vocab, vocab * hidden_size) as counted:
            objective, _ = linear_cross_entropy(hidden, weight, labels, torch.empty(chunks * tokens), tokens)
            assert counted.products == 3 * chunks
            # One pass reads or writes the fp32 logits. Compiled, all passes outside the products are one kernel.
            assert counted.moved_bytes == passes * chunks * 4 * tokens * vocab
            # Zeroed, then added to by each chunk, in fp32; rounded once, in backward.
            assert counted.matrix_writes == [torch.float32] * (1 + chunks)
            objective.backward()
        assert counted.matrix_writes == [torch.float32] * (1 + chunks) + [dtype]


def test_head_memory_is_one_chunk_of_logits_and_one_fp32_gradient() -> None:
    args, tokens, chunk = get_flavor("llama3_1_8b"), 16384, 2048
    found = head_memory(args, HeadRun(tokens, tokens, chunk, torch.bfloat16, "cuda"))
    matrix, states = args.vocab_size * args.hidden_size, 2 * tokens * args.hidden_size
    # fp32 logits with their bf16 gradient; normed states, those of the loss tokens, and the gradient of these.
    assert found.forward == pytest.approx(4 * matrix + 6 * chunk * args.vocab_size + 3 * states, rel=0.01)
    # The matrix's gradient is rounded when no logits exist any more.
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
def test_select_rows_has_the_gradient_of_indexing(dtype: torch.dtype) -> None:
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    index = torch.tensor([7, 0, 3])
    rows = select_rows(x, index)
    assert rows.equal(x[index])
    factors = torch.arange(12.0).view(3, 4).to(dtype)
    (grad,) = torch.autograd.grad(rows, x, factors)
    assert grad.equal(torch.autograd.grad(x[index], x, factors)[0])
    assert not torch.autograd.grad(select_rows(x, index[:0]), x, factors[:0])[0].any()


LENGTHS = np.array([3, 60, 7, 16, 9, 33, 2, 5, 11, 40, 8, 4, 6, 12])
LOSS_TOKENS = np.array([1, 20, 0, 15, 4, 32, 1, 2, 10, 0, 7, 3, 5, 6])


@pytest.fixture(scope="module")
def plan() -> Plan:
    return build_plan(
        LENGTHS,
        [Level(16), Level(64, 2)],
        2,
        loss_tokens=LOSS_TOKENS,
        global_batch_tokens=100,
        level_order="interleave",
    )


def _packs(plan: Plan, step: int) -> list[tuple[int, np.ndarray]]:
    """Return (iteration, sample ids) of each pack of a step."""
    iterations = range(plan.step_offsets[step], plan.step_offsets[step + 1])
    return [(i, pack) for i in iterations for pack in plan.iteration(i).packs]


def _objective(plan: Plan, name: str, step: int, losses: list[np.ndarray]) -> float:
    """Return the weighted sum of given token losses, one array per sample."""
    total = 0.0
    for iteration, pack in _packs(plan, step):
        weights = NORMALIZERS[name](plan, iteration, pack)
        total += sum(weight * losses[i].sum() for weight, i in zip(weights, pack, strict=True))
    return total


@pytest.mark.parametrize("name", NORMALIZERS)
def test_a_step_without_a_trained_token_has_weights_of_zero(name: str) -> None:
    plan = build_plan([4, 6], [Level(8)], 2, loss_tokens=np.array([0, 0]))
    assert plan.num_steps == 1
    assert NORMALIZERS[name](plan, 0, np.array([0, 1])).tolist() == [0, 0]
    assert weight_range(NORMALIZERS[name], plan, 0) == (0, 0)


def test_objectives_equal_the_means_of_their_definitions(plan: Plan) -> None:
    rng = np.random.default_rng(0)
    losses = [rng.random(count) for count in LOSS_TOKENS]
    assert plan.num_steps >= 2
    assert max(np.diff(plan.step_offsets)) >= 2
    for step in range(plan.num_steps):
        packs = [np.concatenate([np.zeros(0), *(losses[i] for i in pack)]) for _, pack in _packs(plan, step)]
        samples = [losses[i] for _, pack in _packs(plan, step) for i in pack if len(losses[i])]
        tokens = np.concatenate(packs)
        expected = {
            "ave_token": tokens.mean(),
            "token_mean": np.mean([pack.mean() for pack in packs if len(pack)]),
            "sample_mean": np.mean([sample.mean() for sample in samples]),
            "sum": tokens.sum(),
        }
        for name, value in expected.items():
            assert _objective(plan, name, step, losses) == pytest.approx(value), name


def test_only_ave_token_is_independent_of_the_packing() -> None:
    rng = np.random.default_rng(1)
    losses = [rng.random(count) for count in LOSS_TOKENS]
    plans = [
        build_plan(
            LENGTHS, levels, world_size, loss_tokens=LOSS_TOKENS, global_batch_tokens=10_000, level_order="interleave"
        )
        for levels, world_size in (((Level(64),), 1), ((Level(16), Level(64, 2)), 2), ((Level(64, 4),), 4))
    ]
    assert [plan.num_steps for plan in plans] == [1, 1, 1]
    values = {name: [_objective(plan, name, 0, losses) for plan in plans] for name in NORMALIZERS}
    assert values["ave_token"] == pytest.approx([values["ave_token"][0]] * 3, rel=1e-12)
    assert values["token_mean"] != pytest.approx([values["token_mean"][0]] * 3, rel=1e-3)


def test_weight_range_is_the_smallest_and_largest_token_weight() -> None:
    # One step of two packs: samples with 8 and with 1 + 1 trained tokens; T = 10.
    plan = build_plan([16, 9, 2], [Level(16)], 2, loss_tokens=[8, 1, 1])
    assert plan.num_steps == 1
    expected = {
        "ave_token": (1, 1),
        # Packs of 8 and of 2 trained tokens: 10 / (8 * 2) and 10 / (2 * 2).
        "token_mean": (0.625, 2.5),
        # Samples of 8, 1 and 1: 10 / (8 * 3) and 10 / (1 * 3).
        "sample_mean": (10 / 24, 10 / 3),
        "sum": (10, 10),
    }
    for name, bounds in expected.items():
        assert weight_range(NORMALIZERS[name], plan, 0) == pytest.approx(bounds), name
