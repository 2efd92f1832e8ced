"""Which samples of which sources an epoch trains, and how often.

Owns repeats, weights and the removal of duplicates: index arithmetic over finished source stores, nothing is
tokenized again.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def share_out(total: int, counts: Sequence[int]) -> list[int]:
    """At most `total` items of groups of `counts` items, in proportion, by largest remainder."""
    everything = sum(counts)
    if total >= everything:
        return list(counts)
    exact = [total * count / everything for count in counts]
    shares = [int(value) for value in exact]
    by_remainder = sorted(range(len(counts)), key=lambda k: (shares[k] - exact[k], k))
    for k in by_remainder[: total - sum(shares)]:
        shares[k] += 1
    return shares


def epoch_counts(counts: Sequence[int], repeats: Sequence[float], weights: Sequence[float]) -> list[int]:
    """Samples that an epoch takes of each source, copies counted.

    A source without weight (0) gives repeat * count. Those with weights give samples in proportion to them, as many as
    can be had while none gives more than repeat * count.
    """
    most = [repeat * count for count, repeat in zip(counts, repeats, strict=True)]
    weighted = [k for k, weight in enumerate(weights) if weight]
    # Samples for each unit of weight; the source that runs out first decides.
    unit = min((most[k] / weights[k] for k in weighted), default=0.0)
    return [round(unit * weights[k]) if weights[k] else round(most[k]) for k in range(len(counts))]


def draw(samples: NDArray[np.int64], count: int, seed: Sequence[int]) -> NDArray[np.int64]:
    """`count` of `samples` [n], each as often as any other but for one; which those are is random by `seed`.

    Whole copies one after the other, each in the order of `samples`, then the share.
    """
    if not len(samples):
        return samples
    copies, rest = divmod(count, len(samples))
    share = np.sort(np.random.default_rng(list(seed)).choice(len(samples), size=rest, replace=False))
    return np.concatenate([np.tile(samples, copies), samples[share]])


def first_of_each(digests: Sequence[NDArray[np.void]]) -> list[NDArray[np.bool_]]:
    """For each sample of each source, whether no earlier sample, of this or an earlier source, has its digest."""
    everything = np.concatenate(list(digests))
    _, first = np.unique(everything.view("S16") if everything.dtype != "S16" else everything, return_index=True)
    is_first = np.zeros(len(everything), dtype=np.bool_)
    is_first[first] = True
    return np.split(is_first, np.cumsum([len(values) for values in digests])[:-1])
