"""The cost model counts the FLOPs of a real model: transformers' Llama under torch's FlopCounterMode."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hbp_titan.packing import CostModel, Level, build_plan
from hbp_titan.packing.ragged import Ragged

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, MLP, VOCAB = 3, 64, 4, 2, 24, 160, 256


def counted_flops(tokens: int, recompute: bool, backward: bool) -> float:
    """FLOPs of one pass over a document with eager attention, which computes the full square, not its causal half."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=MLP, num_hidden_layers=LAYERS, head_dim=HEAD_DIM,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, attn_implementation="eager",
    )  # fmt: skip
    model = LlamaForCausalLM(config).train()
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with FlopCounterMode(display=False) as counter:
        logits = model(torch.arange(tokens)[None] % VOCAB, use_cache=False).logits
        if backward:
            logits.sum().backward()
    return counter.get_total_flops()


def model_cost(**options) -> CostModel:
    attention = HIDDEN * HEAD_DIM * (2 * HEADS + 2 * KV_HEADS)
    return CostModel.from_dims(
        num_layers=LAYERS, layer_params=attention + 3 * HIDDEN * MLP, head_params=HIDDEN * VOCAB, num_heads=HEADS,
        head_dim=HEAD_DIM, **options,
    )  # fmt: skip


@pytest.mark.parametrize("tokens", [16, 512])
@pytest.mark.parametrize(
    ("recompute", "options"),
    [(False, {}), (False, {"backward": False}), (True, {"ac_policy": "full", "last_params": HIDDEN * MLP})],
    ids=["train", "forward", "recompute"],
)
def test_cost_is_the_flop_count_of_a_llama(tokens, recompute, options):
    cost = model_cost(**options)
    flops = cost.alpha * tokens + 2 * cost.beta * tokens**2  # twice beta: see counted_flops
    assert flops == pytest.approx(counted_flops(tokens, recompute, options.get("backward", True)), rel=0.02)


def test_keep_attention_recomputes_all_but_attention_and_the_head():
    plain, full, keep = (model_cost(ac_policy=policy) for policy in ("none", "full", "keep_attention"))
    assert keep.alpha == full.alpha > plain.alpha
    assert keep.beta == plain.beta
    assert full.beta == pytest.approx(plain.beta * 4 / 3)
    assert model_cost(ac_policy="full", ac_layers=0) == plain


def test_heads_of_unequal_width_count_each_product_once():
    # MLA: scores over 192 per head, values of 128.
    cost = CostModel.from_dims(
        num_layers=1, layer_params=1, head_params=0, num_heads=2, head_dim=192, v_head_dim=128, backward=False
    )
    assert cost == CostModel(alpha=2, beta=2 * (192 + 128))


def test_a_slower_attention_kernel_weighs_attention_more():
    assert model_cost(attention_efficiency=0.5).beta == 2 * model_cost().beta


def test_windows_reduce_the_squares_of_longer_documents():
    cost = CostModel(window=4, window_share=0.5)
    # 10^2 less half of (10 - 4)^2.
    assert cost.squares(np.array([3, 4, 10])).tolist() == [9, 16, 82]
    assert cost.squares(np.array([3, 4, 10]), Ragged(np.array([2, 0, 1]), np.array([0, 2, 2, 3]))).tolist() == [
        91,
        0,
        16,
    ]
    # Pairs of query and key are half of the squares, in each layer.
    pairs = sum(min(i, 128) for i in range(1, 5001)) + 3 * 5000 * 5001 // 2
    squares = CostModel(window=128, window_share=0.25).squares(np.array([5000]))[0]
    assert squares / 2 == pytest.approx(pairs / 4, rel=1e-3)


def test_packs_are_balanced_by_the_work_inside_windows():
    # Squares of 12^2 and 2 * 8^2; with a window of 2 they are 44 and 2 * 28.
    lengths = np.array([12, 8, 8])
    for cost, heaviest in ((CostModel(0.0, 1.0), 144), (CostModel(0.0, 1.0, 2, 1.0), 56)):
        plan = build_plan(lengths, [Level(16)], 1, cost=cost)
        assert sorted(plan.pack_sum_sq.tolist())[-1] == heaviest
        assert plan.pack_costs(plan.costs)[plan.heaviest_iteration(0)] == heaviest
    # A plan that was balanced without the window, measured with it.
    assert build_plan(lengths, [Level(16)], 1).pack_costs([cost]).max() == 56


def test_windows_differ_between_models_not_levels():
    with pytest.raises(ValueError, match="window_share"):
        CostModel(window=8)
    with pytest.raises(ValueError, match="windows"):
        build_plan([3], [Level(8), Level(16)], 1, cost=[CostModel(), CostModel(window=8, window_share=1.0)])


def test_a_negative_coefficient_raises():
    with pytest.raises(ValueError, match="beta"):
        CostModel(1.0, -1)
