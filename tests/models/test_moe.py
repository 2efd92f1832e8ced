"""Routing, dispatch and experts against a loop over tokens, and the balance losses against the paper's formulas."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hbp_titan.models.configs import MoEArgs
from hbp_titan.models.decoder import Decoder
from hbp_titan.models.documents import BalanceState, pack_documents
from hbp_titan.models.moe import (
    MixtureOfExperts,
    balance_loss,
    combine,
    dispatch,
    grouped_mm,
    grouped_mm_cpu,
    route,
    sort_by_expert,
)
from tests.models.deepseek_tiny import MOE, make_pack, random_model, tiny_args

GREEDY = dataclasses.replace(MOE, topk_method="greedy")


@pytest.mark.parametrize(
    ("scores", "moe", "expected"),
    [
        # The best, times routed_scaling_factor = 2.5.
        ([0.05, 0.3, 0.1, 0.05, 0.2, 0.15, 0.1, 0.05], GREEDY, {1: 0.75, 4: 0.5, 5: 0.375}),
        # Groups (0 1) (2 3) (4 5) (6 7) with maxima 0.3, 0.25, 0.2, 0.05: the third group's 0.2 loses to 0.03.
        ([0.3, 0.02, 0.25, 0.03, 0.2, 0.12, 0.05, 0.03], MOE, {0: 0.75, 2: 0.625, 3: 0.075}),
        # Normalized weights sum to one and are not scaled.
        (
            [0.4, 0.1, 0.1, 0.05, 0.2, 0.05, 0.05, 0.05],
            dataclasses.replace(GREEDY, num_experts_per_tok=2, norm_topk_prob=True),
            {0: 2 / 3, 4: 1 / 3},
        ),
    ],
    ids=["greedy", "group limited", "normalized"],
)
def test_route_equals_hand_made_choices(scores: list[float], moe: MoEArgs, expected: dict[int, float]) -> None:
    weights, experts = route(torch.tensor([scores]), moe)
    assert dict(zip(experts[0].tolist(), weights[0].tolist(), strict=True)) == pytest.approx(expected)


def test_dispatch_orders_copies_by_expert_and_combine_sums_them() -> None:
    experts = torch.tensor([[2, 0], [0, 3], [2, 3]])
    order, counts = sort_by_expert(experts, 5)
    # Copies 0 1 | 2 3 | 4 5 go to experts 2 0 | 0 3 | 2 3.
    assert order.tolist() == [1, 2, 0, 4, 3, 5]
    assert counts.tolist() == [2, 0, 2, 2, 0]
    x, weights = torch.tensor([[10.0], [20.0], [30.0]]), torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    rows, of_rows = dispatch(x, weights, order)
    assert rows.flatten().tolist() == [10, 20, 10, 30, 20, 30]
    assert of_rows.tolist() == [2, 3, 1, 5, 4, 6]
    assert combine(rows * of_rows[:, None], order, 2).flatten().tolist() == [30, 140, 330]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_grouped_mm_equals_a_product_per_group(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(10, 3, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(4, 5, 3, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    found = grouped_mm(x, weight, torch.tensor([0, 4, 4, 10], dtype=torch.int32))
    expected = torch.cat([x[:4] @ weight[1].T, x[4:] @ weight[3].T])
    grads = [torch.autograd.grad(y.square().sum(), (x, weight)) for y in (found, expected)]
    for ours, theirs in zip((found, *grads[0]), (expected, *grads[1]), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert not grads[0][1][0].any()  # an expert without rows


def test_grouped_mm_passes_opcheck_and_gradcheck() -> None:
    x, weight = torch.randn(6, 3, requires_grad=True), torch.randn(2, 4, 3, requires_grad=True)
    inputs = (x, weight, torch.tensor([2, 6], dtype=torch.int32))
    torch.library.opcheck(torch.ops.hbp_titan.grouped_mm_cpu.default, inputs)
    assert torch.autograd.gradcheck(grouped_mm_cpu, tuple(t.double() if t.is_floating_point() else t for t in inputs))


@pytest.mark.gpu
def test_grouped_mm_on_a_gpu_equals_a_product_per_group_in_bfloat16() -> None:
    x = torch.randn(300, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(4, 128, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    # Groups of odd sizes, one empty.
    found = grouped_mm(x, weight, torch.tensor([7, 7, 138, 300], device="cuda", dtype=torch.int32))
    expected = torch.cat([x[:7] @ weight[0].T, x[7:138] @ weight[2].T, x[138:] @ weight[3].T])
    grads = [torch.autograd.grad(y.float().square().sum(), (x, weight)) for y in (found, expected)]
    for ours, theirs in zip((found, *grads[0]), (expected, *grads[1]), strict=True):
        assert (ours - theirs).float().norm() <= 1e-2 * theirs.float().norm()


@pytest.mark.parametrize("changes", [{}, {"norm_topk_prob": True}, {"topk_method": "greedy"}])
def test_mixture_equals_a_loop_over_tokens(changes: dict[str, Any]) -> None:
    moe = dataclasses.replace(MOE, **changes)
    layer = MixtureOfExperts(12, moe, BalanceState()).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
    x = torch.randn(9, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    scores = F.softmax(x.float() @ layer.gate.weight.float().T, dim=-1)
    weights, experts = route(scores, moe)
    expected = layer.shared_experts(x)
    for t in range(9):
        for w, e in zip(weights[t], experts[t], strict=True):
            gate, up, down = (p[e] for p in (layer.experts.gate_proj, layer.experts.up_proj, layer.experts.down_proj))
            expected[t] = expected[t] + w.double() * (down @ (F.silu(gate @ x[t]) * (up @ x[t])))
    torch.testing.assert_close(layer(x), expected, rtol=1e-9, atol=1e-9)
    assert layer.tokens_per_expert is not None
    assert layer.tokens_per_expert.tolist() == experts.flatten().bincount(minlength=8).tolist()


def paper_losses(scores: Tensor, experts: Tensor, moe: MoEArgs) -> Tensor:
    """Return the losses of arXiv 2405.04434, section 2.2.3, of one document, token by token."""
    tokens, size = len(scores), moe.n_routed_experts // moe.n_group
    sent = [sum(int(i in row) for row in experts.tolist()) for i in range(moe.n_routed_experts)]
    f = [moe.n_routed_experts / (moe.num_experts_per_tok * tokens) * count for count in sent]
    p = scores.mean(dim=0)
    loss = moe.aux_loss_alpha * sum(f[i] * p[i] for i in range(moe.n_routed_experts))
    for g in range(moe.n_group):
        members = range(g * size, (g + 1) * size)
        reached = sum(int(any(i in row for i in members)) for row in experts.tolist())
        f_device = sum(f[i] for i in members) / size
        f_comm = moe.n_group / (moe.topk_group * tokens) * reached
        p_group = sum(p[i] for i in members)
        loss = loss + (moe.device_aux_loss_alpha * f_device + moe.comm_aux_loss_alpha * f_comm) * p_group
    assert isinstance(loss, Tensor)
    return loss


ALPHAS = {"aux_loss_alpha": 0.3, "device_aux_loss_alpha": 0.5, "comm_aux_loss_alpha": 0.2}


@pytest.mark.parametrize("alphas", [{key: value} for key, value in ALPHAS.items()] + [ALPHAS])
def test_balance_losses_equal_the_papers_per_document_by_share(alphas: dict[str, float]) -> None:
    moe = dataclasses.replace(MOE, **alphas)
    lengths, shares = (5, 1, 12, 3), torch.tensor([0.25, 0.5, 0.25, 0.0])  # the last one has no loss
    logits = torch.randn(21, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    scores = logits.softmax(dim=-1)
    experts = route(scores, moe)[1]
    state = BalanceState(torch.arange(4).repeat_interleave(torch.tensor(lengths)), shares)
    found = balance_loss(scores, experts, state, moe)
    parts = zip(shares, scores.split(lengths), experts.split(lengths), strict=True)
    expected = torch.stack([share * paper_losses(s, e, moe) for share, s, e in parts]).sum()
    torch.testing.assert_close(found, expected)
    grads = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (found, expected)]
    torch.testing.assert_close(*grads)
    assert not grads[0][18:].any()


def test_the_expert_loss_of_one_document_equals_deepseeks_seq_aux() -> None:
    moe = dataclasses.replace(MOE, aux_loss_alpha=0.1)
    scores = torch.randn(30, 8, generator=torch.Generator().manual_seed(2)).softmax(dim=-1)
    experts = route(scores, moe)[1]
    found = balance_loss(scores, experts, BalanceState(torch.zeros(30, dtype=torch.int64), torch.ones(1)), moe)
    # modeling_deepseek.py: counts over seq_len * top_k / experts, times the mean scores.
    ce = torch.zeros(8).scatter_add_(0, experts.flatten(), torch.ones(90)) / (30 * 3 / 8)
    torch.testing.assert_close(found, (ce * scores.mean(dim=0)).sum() * 0.1)


def _gradients(model: Decoder, packs: list[tuple[tuple[int, ...], Tensor]], documents: list[Tensor]) -> list[Tensor]:
    """Return the gradients of losses and balance losses over packs of `documents`, each with a padding document."""
    model.zero_grad()
    for which, shares in packs:
        ids = torch.cat([*(documents[i] for i in which), torch.zeros(4, dtype=torch.int64)])
        lengths = [*(len(documents[i]) for i in which), 4]
        number = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        model.balance.set_documents(number, torch.cat([shares, torch.zeros(2)]))
        logits = model(ids, torch.cat([torch.arange(n) for n in lengths]), pack_documents(lengths))
        losses = [part.square().mean() for part in logits.split(lengths)]
        sum(share * loss for share, loss in zip(shares, losses, strict=False)).backward()  # type: ignore[union-attr]
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_gradients_do_not_depend_on_how_documents_are_packed() -> None:
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(97, (n,), generator=generator) for n in (17, 3, 30, 8)]
    shares = torch.tensor([0.4, 0.1, 0.3, 0.2])
    args = tiny_args(moe=ALPHAS)
    model = random_model(args, 0)
    alone = _gradients(model, [((i,), shares[i : i + 1]) for i in range(4)], documents)
    for packing in ([(0, 1, 2, 3)], [(2, 0), (3, 1)]):
        packed = _gradients(model, [(which, shares[list(which)]) for which in packing], documents)
        for found, wanted in zip(packed, alone, strict=True):
            assert (found - wanted).norm() <= 1e-5 * wanted.norm()
    plain = _gradients(random_model(tiny_args(), 0), [((0, 1, 2, 3), shares)], documents)
    gates = [i for i, (name, _) in enumerate(model.named_parameters()) if name.endswith("gate.weight")]
    # Control: the losses have an effect.
    assert all((plain[i] - alone[i]).norm() > 1e-3 * alone[i].norm() for i in gates)


def test_without_gradients_or_documents_there_is_no_balance_loss() -> None:
    args = tiny_args(moe=ALPHAS)
    pack = make_pack(args, (5, 7), 0)
    model, plain = random_model(args, 0), random_model(tiny_args(), 0)
    assert torch.equal(model(**pack), plain(**pack))
    for each in (model, plain):
        each(**pack).sum().backward()
    for found, wanted in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(found.grad, wanted.grad)  # type: ignore[arg-type]


def test_tokens_per_expert_are_those_of_the_last_forward_by_layer() -> None:
    args = tiny_args()
    model = random_model(args, 0)
    assert model.tokens_per_expert() == {}
    for lengths in ((5, 7), (20,)):
        model(**make_pack(args, lengths, 0))
        load = model.tokens_per_expert()
        assert list(load) == [1, 2]
        assert all(int(counts.sum()) == 3 * sum(lengths) for counts in load.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moe": {"topk_method": "best"}}, "best"),
        ({"moe": {"topk_method": "noaux_tc", "aux_loss_alpha": 0.1}}, "noaux_tc"),
        ({"moe": {"topk_method": "noaux_tc", "n_group": 8, "topk_group": 8}}, "noaux_tc"),
        ({"moe": {"n_group": 3}}, "n_group=3"),
        ({"moe": {"topk_group": 5}}, "topk_group=5"),
        ({"moe": {"num_experts_per_tok": 5}}, "num_experts_per_tok=5"),
        ({"moe": {"aux_loss_alpha": 0.1, "seq_aux": False}}, "seq_aux"),
        ({"num_kv_heads": 1}, "num_kv_heads=1"),
        ({"head_dim": 16}, "head_dim=16"),
        ({"mla": {"v_head_dim": 32}}, "v_head_dim=32"),
        ({"mla": {"qk_rope_head_dim": 7}}, "qk_rope_head_dim=7"),
    ],
)
def test_unsupported_mixtures_and_latent_attention_raise(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_args(**changes)


def test_a_group_whose_biased_scores_are_negative_is_still_chosen() -> None:
    # Group 0 has the larger sum, -0.5 - 0.5 against -0.6 - 0.6; a mask of 0 would beat both.
    sizes = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "n_shared_experts": 0}
    moe = MoEArgs(**sizes, topk_method="noaux_tc", n_group=2, topk_group=1, routed_scaling_factor=2.0)
    weights, experts = route(torch.tensor([[0.5, 0.5, 0.4, 0.4]]), moe, torch.full((4,), -1.0))
    assert sorted(experts[0].tolist()) == [0, 1]
    assert weights.tolist() == [[1.0, 1.0]]


def test_moe_layer_freq_gives_experts_to_every_second_layer() -> None:
    # transformers has no such key; in DeepSeek's own code layer i has experts where i >= first and i % freq == 0.
    model = Decoder(tiny_args(num_layers=6, moe={"first_k_dense_replace": 1, "moe_layer_freq": 2}))
    assert [i for i, block in enumerate(model.blocks()) if isinstance(block.mlp, MixtureOfExperts)] == [2, 4]
    with torch.no_grad():
        model.init_weights(0)
        logits = model(**make_pack(model.args, (5, 3), seed=0))
    assert torch.isfinite(logits).all()
    assert list(model.tokens_per_expert()) == [2, 4]
    assert [int(counts.sum()) for counts in model.tokens_per_expert().values()] == [24, 24]


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_of_dispatch_are_deterministic_sums_in_float32(compiled: bool) -> None:
    tokens, chosen, width = 64, 6, 32
    generator = torch.Generator().manual_seed(0)
    experts = torch.stack([torch.randperm(8, generator=generator)[:chosen] for _ in range(tokens)])
    order, _ = sort_by_expert(experts, 8)
    weights = torch.rand(tokens, chosen, generator=generator)
    grad = torch.randn(tokens * chosen, width, generator=generator).bfloat16()
    exact = torch.zeros(tokens, width, dtype=torch.float64).index_add(0, order // chosen, grad.double())

    def gradient(run: Any) -> Tensor:
        x = torch.zeros(tokens, width, dtype=torch.bfloat16, requires_grad=True)
        run(x).backward(grad)
        assert x.grad is not None
        return x.grad

    run = torch.compile(dispatch, backend="aot_eager", fullgraph=True) if compiled else dispatch
    found, again = (gradient(lambda x: run(x, weights, order)[0]) for _ in range(2))
    # As a GPU's bfloat16 atomics add, in one of many orders.
    in_place = torch.zeros(tokens, width, dtype=torch.bfloat16)
    for row, token in enumerate((order // chosen).tolist()):
        in_place[token] += grad[row]
    assert torch.equal(found, again)
    # One rounding, not one for each copy.
    assert torch.equal(found, exact.float().bfloat16())
    assert (found - exact).norm() < 0.7 * (in_place - exact).norm()


def test_gradients_of_combine_and_of_weights_are_exact() -> None:
    order, _ = sort_by_expert(torch.tensor([[2, 0], [0, 3], [2, 3]]), 5)
    y = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y: combine(y, order, 2), (y,))
    assert torch.autograd.gradcheck(lambda x, w: dispatch(x, w, order), (x, weights))
