"""Synthetic lengths for benchmarks, tests and dry runs: a mixture like Tulu3 with LongCite.

Owns no claim about the real data beyond its published counts: the medians and spreads are chosen so that the mean
and the share of long samples are like those that the paper's figures imply.
"""

from __future__ import annotations

import numpy as np

from hbp_titan.packing.arrays import IntArray

# Published samples per source of the Tulu3 SFT mixture; median tokens and lognormal sigma of this imitation.
TULU3_SOURCES: dict[str, tuple[int, int, float]] = {
    "persona_math": (149_960, 800, 0.45),
    "evol_codealpaca": (107_276, 560, 0.60),
    "aya": (100_000, 330, 1.10),
    "wildchat": (100_000, 1050, 1.00),
    "flan_v2": (89_982, 300, 1.00),
    "numinamath_tir": (64_312, 900, 0.50),
    "wildguardmix": (50_000, 370, 0.70),
    "wildjailbreak": (50_000, 520, 0.60),
    "open_math_2_gsm8k": (50_000, 300, 0.40),
    "persona_gsm": (49_980, 400, 0.40),
    "persona_python": (34_999, 600, 0.45),
    "persona_if": (29_980, 470, 0.50),
    "persona_algebra": (20_000, 1000, 0.45),
    "coconot": (10_983, 250, 0.60),
    "sciriff": (10_000, 2200, 0.70),
    "no_robots": (9_500, 350, 0.80),
    "oasst1_guanaco": (7_132, 700, 0.70),
    "table_gpt": (5_000, 900, 0.60),
    "hardcoded": (240, 190, 0.30),
}
SHORT_MAX_TOKENS = 32_768
LONG_PER_SHORT = 2000 / 939_344


def tulu3_longcite_like(num_samples: int, seed: int = 0) -> IntArray:
    """Lengths of `num_samples` samples, shuffled, int64 [num_samples].

    19 lognormal sources cut at 32,768 tokens, and 0.2% long samples of 2K + 129K * Beta(1, 1.4) tokens.
    """
    rng = np.random.default_rng(seed)
    num_long = round(num_samples * LONG_PER_SHORT / (1 + LONG_PER_SHORT))
    counts = np.array([count for count, _, _ in TULU3_SOURCES.values()], float)
    shares = rng.multinomial(num_samples - num_long, counts / counts.sum())
    parts = [
        np.exp(np.log(median) + sigma * rng.standard_normal(share))
        for share, (_, median, sigma) in zip(shares, TULU3_SOURCES.values(), strict=True)
    ]
    short = np.clip(np.concatenate(parts), 10, SHORT_MAX_TOKENS)
    long = 2048 + 129_024 * rng.beta(1.0, 1.4, num_long)
    return rng.permutation(np.concatenate([short, long]).astype(np.int64))
