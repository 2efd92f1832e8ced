"""YaRN against transformers, rotation of DeepSeek's pairs, and random numbers by position."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hbp_titan.models.layers import (
    _mix,
    attention_factor,
    inverse_frequencies,
    normal,
    uniform,
)

CPU = torch.device("cpu")
SHAPE = (3, 40, 1000)
WHOLE = tuple(slice(0, size) for size in SHAPE)
# From a ramp that begins before the first pair to one that ends after the last.
ORIGINALS = (5, 64, 4096, 32768, 10**6)
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
def test_yarn_equals_transformers(original: int, theta: float) -> None:
    for options in OPTIONS:
        scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": original, **options}
        for dim in (8, 64, 128):
            config = transformers.Qwen2Config(
                head_dim=dim, max_position_embeddings=4 * original, rope_parameters={**scaling, "rope_theta": theta}
            )
            expected, factor = ROPE_INIT_FUNCTIONS["yarn"](config)
            torch.testing.assert_close(inverse_frequencies(dim, theta, scaling), expected, rtol=1e-6, atol=0)
            assert attention_factor(scaling) == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize("draw", [normal, uniform])
@pytest.mark.parametrize(
    "part",
    [
        (slice(1, 2), slice(0, 40), slice(0, 1000)),
        (slice(0, 3), slice(13, 27), slice(0, 1000)),
        (slice(0, 3), slice(0, 40), slice(334, 667)),
        (slice(2, 3), slice(39, 40), slice(999, 1000)),
        (slice(0, 3), slice(40, 40), slice(0, 1000)),
    ],
)
def test_a_part_drawn_alone_equals_that_part_of_the_whole(draw, part: tuple[slice, ...]) -> None:  # type: ignore[no-untyped-def]
    whole = draw(3, "layers.0.weight", SHAPE, WHOLE, 0.5, CPU)
    assert draw(3, "layers.0.weight", SHAPE, part, 0.5, CPU).equal(whole[part])


def test_bits_equal_splitmix64() -> None:
    def reference(counter: int) -> int:
        mask = 2**64 - 1
        z = counter & mask
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
        return (z ^ (z >> 31)) >> 32

    for key in (0, 12345, -(2**63), 2**63 - 1):
        positions = torch.tensor([0, 1, 2, 999, 2**31, 2**40 + 7])
        expected = [reference(key + 0x9E3779B97F4A7C15 * int(p)) for p in positions]
        assert _mix(positions.clone(), key).tolist() == expected


def test_normals_have_the_moments_and_tails_of_the_distribution() -> None:
    x = normal(0, "a", (400, 1000), (slice(0, 400), slice(0, 1000)), 0.02, CPU).double() / 0.02
    error = len(x.flatten()) ** -0.5
    assert abs(x.mean()) < 4 * error
    assert abs(x.var() - 1) < 4 * 2**0.5 * error
    assert abs((x**4).mean() - 3) < 4 * 96**0.5 * error
    for bound, share in ((1, 0.317311), (2, 0.045500), (3, 0.0026998)):
        assert float((x.abs() > bound).double().mean()) == pytest.approx(share, abs=4 * (share / x.numel()) ** 0.5)


def test_neighbors_names_and_seeds_are_independent() -> None:
    part = (slice(0, 400), slice(0, 1000))
    x, other_name, other_seed = (
        normal(*source, (400, 1000), part, 1.0, CPU) for source in ((0, "a"), (0, "b"), (1, "a"))
    )
    for pair in ((x[:, 1:], x[:, :-1]), (x[1:], x[:-1]), (x, other_name), (x, other_seed)):
        assert abs(float((pair[0] * pair[1]).mean())) < 4 / 632


def test_uniforms_fill_their_bounds() -> None:
    x = uniform(0, "a", (400, 1000), (slice(0, 400), slice(0, 1000)), 0.25, CPU)
    assert -0.25 <= x.min() < -0.2499
    assert 0.2499 < x.max() < 0.25
    assert float(x.var()) == pytest.approx(0.25**2 / 3, rel=0.01)
