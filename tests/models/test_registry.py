"""Flavors against the published models, and the counts derived from an architecture."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from hbp_titan.models.flavors import FLAVORS
from hbp_titan.models.registry import (
    expert_params,
    get_flavor,
    last_params,
    linear_params,
    num_params,
    training_flops,
)

# The parameter counts that the model hubs show for the published weights.
QWEN2_5 = {"qwen2_5_7b": 7_615_616_512, "qwen2_5_32b": 32_763_876_352, "qwen2_5_72b": 72_706_203_648}
PUBLISHED = {
    "llama3_1_8b": 8_030_261_248,
    "llama3_1_8b_1m": 8_030_261_248,
    "llama3_1_70b": 70_553_706_496,
    "llama3_3_70b": 70_553_706_496,
    "llama3_2_1b": 1_235_814_400,
    "llama3_2_3b": 3_212_749_824,
    "qwen2_5_0_5b": 494_032_768,
    **QWEN2_5,
    **{f"{name}_128k": count for name, count in QWEN2_5.items()},
    "qwen3_4b": 4_022_468_096,
    "qwen3_8b": 8_190_735_360,
    "qwen3_32b": 32_762_123_264,
    "qwen3_30b_a3b": 30_532_122_624,
    "qwen3_235b_a22b": 235_093_634_560,
    "mistral_7b": 7_248_023_552,
    "mistral_small_24b": 23_572_403_200,
    "mixtral_8x7b": 46_702_792_704,
    "olmo2_7b": 7_298_617_344,
    "olmo2_32b": 32_234_279_936,
    "smollm2_135m": 134_515_008,
    "smollm3_3b": 3_075_098_624,
    "phi4_14b": 14_659_507_200,
    "gemma3_1b": 999_885_952,
    "deepseek_v2_236b": 235_741_434_880,
    "deepseek_v2_lite_16b": 15_706_484_224,
    "deepseek_v3_671b": 671_026_419_200,
}


def test_every_flavor_has_the_published_parameter_count() -> None:
    # 4096*128 + 4 * (128*128*2 + 128*64*2 + 3*128*352 + 2*128) + 128
    counts = PUBLISHED | {"debug": 1_262_720, "debug_moe": num_params(FLAVORS["debug_moe"])}
    assert {name: num_params(args) for name, args in FLAVORS.items()} == counts


def test_linear_params_count_the_head_but_not_the_lookup() -> None:
    tied = get_flavor("debug")
    # all but the nine norms of 128, the tied matrix counted once as the head
    assert linear_params(tied) == 1_262_720 - 9 * 128
    untied = dataclasses.replace(tied, tie_embeddings=False)
    assert num_params(untied) == 1_262_720 + 4096 * 128
    assert linear_params(untied) == linear_params(tied)
    # biases and norms of q and k are not matrices
    assert linear_params(dataclasses.replace(tied, qkv_bias=True, qk_norm=True)) == linear_params(tied)


def test_training_flops_of_the_8b_model() -> None:
    args = get_flavor("llama3_1_8b")
    assert linear_params(args) == 8_030_261_248 - 128256 * 4096 - 65 * 4096
    # one document of 8192 tokens: 6 * 7.5e9 * 8192 for the matrices, 6 * 32 * 4096 * 8192^2 for attention
    assert training_flops(args, 8192, 8192**2) == 6 * 7_504_658_432 * 8192 + 6 * 32 * 4096 * 8192**2
    # with adapters of 1000 parameters: no gradients of the matrices
    frozen = training_flops(args, 8192, 8192**2, adapter_params=1000)
    assert frozen == (4 * 7_504_658_432 + 6000) * 8192 + 6 * 32 * 4096 * 8192**2


# name: hidden, layers, heads, query rank, dense width, experts, their width, active billions: as published.
DEEPSEEK_V2: dict[str, tuple[Any, ...]] = {
    "deepseek_v2_236b": (5120, 60, 128, 1536, 12288, 160, 1536, 21.4),
    "deepseek_v2_lite_16b": (2048, 27, 16, None, 10944, 64, 1408, 2.4),
}


@pytest.mark.parametrize("name", DEEPSEEK_V2)
def test_counts_of_deepseek_include_only_the_chosen_experts(name: str) -> None:
    args = get_flavor(name)
    hidden, layers, heads, q_rank, ffn, experts, expert_ffn, billions = DEEPSEEK_V2[name]
    queries = hidden * heads * 192 if q_rank is None else q_rank * (hidden + heads * 192)
    attention = queries + hidden * (512 + 64) + 512 * heads * 256 + heads * 128 * hidden
    expert = 3 * hidden * expert_ffn
    # The first layer is dense; the others have a router, 2 shared experts and 6 chosen ones.
    active = layers * attention + 3 * hidden * ffn + (layers - 1) * (hidden * experts + 8 * expert) + 102400 * hidden
    assert linear_params(args) == active
    assert active / 1e9 == pytest.approx(billions, rel=0.03)
    assert expert_params(args) == (layers - 1) * experts * expert
    assert last_params(args) == hidden * (ffn + (layers - 1) * 8 * expert_ffn)
    # Keys of 192, values of 128.
    assert training_flops(args, 100, 5000) == 600 * active + 6 * layers * heads * 160 * 5000


@pytest.mark.parametrize(
    ("name", "billions"),
    [("qwen3_30b_a3b", 3.3), ("qwen3_235b_a22b", 22), ("mixtral_8x7b", 12.9), ("deepseek_v3_671b", 37)],
)
def test_active_parameters_are_the_published_ones(name: str, billions: float) -> None:
    args = get_flavor(name)
    lookup = args.vocab_size * args.hidden_size
    assert (linear_params(args) + lookup) / 1e9 == pytest.approx(billions, rel=0.02)


def test_qwen_with_yarn_extends_the_original_context() -> None:
    args = get_flavor("qwen2_5_72b_128k")
    assert args.rope_scaling is not None
    assert args.rope_scaling["factor"] * args.rope_scaling["original_max_position_embeddings"] == 131072
    assert args.max_position_embeddings == 131072


def test_an_unknown_flavor_raises_with_the_closest_name() -> None:
    with pytest.raises(ValueError, match="did you mean llama3_1_8b"):
        get_flavor("llama3_8b")
