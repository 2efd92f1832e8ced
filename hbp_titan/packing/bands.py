"""Length bands: powers of two, in which losses and counts are told apart by the length of their sample.

Owns the borders and their names. Every band reaches from above half its border to its border; the lowest from 1.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hbp_titan.packing.level import tokens_name

LOWEST_BAND = 256


def band_of(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """The least power of two, LOWEST_BAND or more, that is at least each count."""
    exponents = np.ceil(np.log2(np.maximum(counts, LOWEST_BAND))).astype(np.int64)
    return np.left_shift(1, exponents)


def band_name(border: int) -> str:
    """A band in words: 513 to 1K."""
    low = 1 if border == LOWEST_BAND else border // 2 + 1
    return f"{low:,} to {tokens_name(border)}"
