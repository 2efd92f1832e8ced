"""Frequencies and factors of YaRN against transformers over the range of its parameters; the pairs of DeepSeek."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hbp_titan.models.layers import apply_rope, attention_factor, halves_from_pairs, inverse_frequencies, rope_cos_sin
from tests.models.deepseek_tiny import tiny_args

ORIGINALS = (
    5,
    64,
    4096,
    32768,
    10**6,
)  # from a ramp that begins before the first pair to one that ends behind the last
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"truncate": False},
    {"beta_fast": 4.0, "beta_slow": 4.0, "truncate": False},  # a ramp of no width
    {"beta_fast": 16.0, "beta_slow": 2.0, "mscale": 0.707, "mscale_all_dim": 1.0},
    {"attention_factor": 0.5, "mscale": 0.7, "mscale_all_dim": 1.0},
    {"factor": 1.0},
    {"mscale": 0.7},
)


@pytest.mark.parametrize("original", ORIGINALS)
@pytest.mark.parametrize("theta", [100.0, 10000.0, 1000000.0])
def test_yarn_is_transformers(original: int, theta: float) -> None:
    for options in OPTIONS:
        scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": original, **options}
        for dim in (8, 64, 128):
            config = transformers.Qwen2Config(
                head_dim=dim, max_position_embeddings=4 * original, rope_parameters={**scaling, "rope_theta": theta}
            )
            expected, factor = ROPE_INIT_FUNCTIONS["yarn"](config)
            torch.testing.assert_close(inverse_frequencies(dim, theta, scaling), expected, rtol=1e-6, atol=0)
            assert attention_factor(scaling) == pytest.approx(factor, rel=1e-12)


def test_a_factor_scales_cosines_and_sines() -> None:
    frequencies = inverse_frequencies(4, 10000.0, None)
    cos, sin = rope_cos_sin(frequencies, torch.tensor([0, 3]), 1.5)
    assert cos[0].tolist() == [1.5] * 4
    torch.testing.assert_close(sin[1], 1.5 * torch.tensor([3.0, 0.03, 3.0, 0.03]).sin())


def test_deepseeks_pairs_turn_as_complex_numbers() -> None:
    x = torch.randn(5, 2, 8, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([0, 1, 7, 100, 4000])
    frequencies = inverse_frequencies(8, 10000.0, None)
    turned = apply_rope(halves_from_pairs(x), *rope_cos_sin(frequencies, positions))
    angles = positions[:, None, None] * frequencies
    expected = torch.view_as_complex(x.unflatten(-1, (4, 2))) * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(turned, torch.cat((expected.real, expected.imag), dim=-1))


def test_softmax_scale_has_the_square_of_mscale() -> None:
    # 1 / sqrt(24), times (0.1 * 0.707 * ln 40 + 1)^2
    assert tiny_args().softmax_scale == pytest.approx(24**-0.5 * 1.26080396**2)
    assert tiny_args(rope_scaling=None).softmax_scale == 24**-0.5
