"""How many units of text have just the wanted number of tokens, whatever the tokenizer.

Owns the search. Tokens are counted, never assumed, but grow nearly in proportion to the units, so a few counts suffice;
at 128K tokens each takes a few tenths of a second.
"""

from __future__ import annotations

import math
from collections.abc import Callable

FIRST_STEP = 32


def fit_units(tokens_of: Callable[[int], int], target: int, fewest: int, what: str) -> int:
    """The most units, at least `fewest`, whose text has at most `target` tokens.

    tokens_of: tokens of the text of n units, growing with n. Raises ValueError, naming `what`, where those of `fewest`
    units are already too many.
    """
    low, tokens_low = fewest, tokens_of(fewest)
    if tokens_low > target:
        raise ValueError(f"{what} needs {tokens_low} tokens at least, but has room for {target}: give a greater length")
    high: float = math.inf
    tokens_high, units, counted = 0, fewest + FIRST_STEP, 0
    while high - low > 1:
        tokens = tokens_of(units)
        counted += 1
        below = tokens <= target
        if high == math.inf:
            per_unit = (tokens - tokens_low) / (units - low)
        if below:
            low, tokens_low = units, tokens
        else:
            high, tokens_high = units, tokens
        if high < math.inf:
            per_unit = (tokens_high - tokens_low) / (high - low)
        # Aimed at the last unit that fits; once below it, at the one after, so that both ends close in.
        units = low + int((target - tokens_low) / max(per_unit, 0.01)) + below
        if counted % 8 == 0 and high < math.inf:
            units = int(low + high) // 2
        units = int(min(max(units, low + 1), high - 1))
    return low
