"""Which samples of which sources an epoch trains, and how often.

Owns repeats, weights, the removal of duplicates and the share that is held out: index arithmetic over finished source
stores, nothing is tokenized again.
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


def held_out(digests: NDArray[np.void], rows: NDArray[np.int64], share: float, seed: int) -> NDArray[np.bool_]:
    """For each sample of a source, whether it is held out: a share of the rows, random by `seed`.

    digests: of 16 bytes, [n]; rows: the row of each sample, equal ones adjacent, [n]. The content of a row's first
    sample decides for all that the row was split into: equal rows, of any source, are on the same side, and a row stays
    there when others come or go.
    """
    first = np.ones(len(rows), dtype=np.bool_)
    first[1:] = rows[1:] != rows[:-1]
    words = np.ascontiguousarray(digests).view("<u8").reshape(-1, 2)[:, 0]
    drawn = _mixed(words ^ _mixed(np.array([seed], dtype=np.uint64)))
    return (drawn < np.uint64(int(share * 2.0**64)))[np.flatnonzero(first)[np.cumsum(first) - 1]]


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's output function: every bit of a value decides over every bit of the result."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
