"""Packs to iterations: the packs that run side by side cost nearly the same (paper section 3.2, balance batching).

Owns the order of packs within a level, whose consecutive groups of dp packs are the iterations, and the empty packs
that complete the last one. Sorting by modelled time rather than by sum(len^2), as the paper does, also balances
packs that differ in tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from hbp_titan.packing.arrays import IntArray, Ragged, Stream, round_up, shuffled
from hbp_titan.packing.cost import CostModel

# (tokens, sum_sq, cost, stream) -> order of the packs; tokens, sum_sq: int64 [num_packs].
Balancer = Callable[[IntArray, IntArray, CostModel, Stream], IntArray]


def _by_cost(tokens: IntArray, sum_sq: IntArray, cost: CostModel, stream: Stream) -> IntArray:
    return np.argsort(-cost.cost(tokens, sum_sq), kind="stable")


def _by_attention(tokens: IntArray, sum_sq: IntArray, cost: CostModel, stream: Stream) -> IntArray:
    return np.argsort(-sum_sq, kind="stable")


def _shuffled(tokens: IntArray, sum_sq: IntArray, cost: CostModel, stream: Stream) -> IntArray:
    return shuffled(len(tokens), *stream)


def _kept(tokens: IntArray, sum_sq: IntArray, cost: CostModel, stream: Stream) -> IntArray:
    return np.arange(len(tokens))


BALANCERS: dict[str, Balancer] = {
    "cost": _by_cost,
    "attention": _by_attention,
    "shuffled": _shuffled,
    "kept": _kept,
}


def whole_iterations(packs: Ragged, dp_degree: int) -> Ragged:
    """The packs and as many empty ones as complete the last iteration."""
    missing = round_up(packs.num_rows, dp_degree) - packs.num_rows
    return Ragged(packs.ids, np.append(packs.offsets, np.full(missing, packs.offsets[-1])))
