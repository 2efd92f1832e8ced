"""The levels that a profile tries unless told otherwise.

Owns the choice of lengths, cp degrees, styles and policies, and its bound: a profile has to end in minutes.
"""

from __future__ import annotations

from hbp_titan.models.decoder import ModelArgs
from hbp_titan.packing import Level

MAX_LENGTHS = 6
POLICIES = ("none", "full", "keep_attention")


def default_candidates(longest: int, world_size: int, args: ModelArgs, *, median: int = 1) -> list[Level]:
    """Every length with every form of context parallelism and every policy; ac_layers is the profile's to find.

    longest, median: tokens of samples. Lengths are powers of two, from the one that holds the longest sample down to
    about the median, at most MAX_LENGTHS. cp degrees are powers of two that divide world_size: without (1), by heads
    where the heads allow it ("ulysses"), else "hybrid", and by gathered keys ("allgather") beside both.
    """
    largest = 1 << max(longest - 1, 0).bit_length()
    lengths = [largest >> k for k in range(MAX_LENGTHS) if largest >> k >= median] or [largest]
    candidates = []
    for max_tokens in reversed(lengths):
        for cp_degree, style in _forms(world_size, args):
            if max_tokens % cp_degree == 0:
                candidates += [Level(max_tokens, cp_degree, style, policy) for policy in POLICIES]
    return candidates


def _forms(world_size: int, args: ModelArgs) -> list[tuple[int, str]]:
    forms = [(1, "ulysses")]
    cp_degree = 2
    while world_size % cp_degree == 0 and cp_degree <= world_size:
        kv = args.num_kv_heads
        by_heads = args.num_heads % cp_degree == 0 and (kv % cp_degree == 0 or cp_degree % kv == 0)
        forms.append((cp_degree, "ulysses" if by_heads else "hybrid"))
        # With one kv head hybrid is allgather.
        if by_heads or kv > 1:
            forms.append((cp_degree, "allgather"))
        cp_degree *= 2
    return forms
