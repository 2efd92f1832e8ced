"""CostModel: the time of a pack, up to a unit, from its tokens and its squared document lengths.

Owns the coefficients alpha and beta and their derivation from a model's dimensions. The form is that of the paper
(section 2.1, after Megatron-LM's FLOP count): linear layers cost per token, causal attention per squared length. A
sliding window of W tokens leaves len^2 - (len - W)^2 of the squares of a document longer than W.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hbp_titan.packing.level import AC_POLICIES
from hbp_titan.packing.ragged import IntArray, Ragged


@dataclass(frozen=True)
class CostModel:
    """cost = alpha * tokens + beta * sum(squares of the documents), where a document's squares are len^2.

    Only the ratio of the two matters to a plan. The default is that of an 8B Llama on one device: a document
    of 50,000 tokens spends as much in attention as in linear layers.

    window, window_share: sliding window of a model in tokens, and the share of its layers that have it; None without.
    """

    alpha: float = 1.0
    beta: float = 2e-5
    window: int | None = None
    window_share: float | None = None

    def __post_init__(self) -> None:
        if (self.window is None) != (self.window_share is None):
            raise ValueError(f"cost model: window={self.window} needs window_share, not {self.window_share}")
        if self.alpha < 0 or self.beta < 0 or self.alpha + self.beta <= 0:
            raise ValueError(f"cost model: alpha={self.alpha}, beta={self.beta} must not be negative, nor both 0")

    def squares(self, lengths: IntArray, packs: Ragged | None = None) -> IntArray:
        """Return the squares of documents of these lengths, int64 [n]; with `packs`, their sum over each pack."""

        def sums(values: IntArray) -> IntArray:
            return values * values if packs is None else packs.sums_of_squares(values)

        if self.window is None or self.window_share is None:
            return sums(lengths)
        beyond = sums(np.maximum(lengths - self.window, 0))
        return sums(lengths) - (self.window_share * beyond).astype(np.int64)

    def cost(self, tokens: IntArray, sum_sq: IntArray) -> NDArray[np.float64]:
        """Return the cost of packs, float64 [n], from their tokens [n] and squares [n]."""
        return self.alpha * np.asarray(tokens, np.float64) + self.beta * np.asarray(sum_sq, np.float64)

    @classmethod
    def from_dims(
        cls,
        *,
        num_layers: int,
        layer_params: int,
        head_params: int,
        num_heads: int,
        head_dim: int,
        v_head_dim: int | None = None,
        ac_policy: str = "none",
        ac_layers: int | None = None,
        last_params: int = 0,
        chunked: bool = False,
        backward: bool = True,
        linear_efficiency: float = 1.0,
        attention_efficiency: float = 1.0,
        window: int | None = None,
        window_share: float = 0.0,
    ) -> CostModel:
        """Return the FLOPs of one forward and backward over a pack, for a decoder with causal attention.

        layer_params: parameters of one layer that multiply each token (mixture of experts: the active ones).
        head_params: parameters of the output projection; the embedding lookup multiplies nothing.
        num_heads: query heads (attention work does not depend on the number of key and value heads).
        head_dim: width of queries and keys; v_head_dim: width of values if it differs (DeepSeek's MLA).
        ac_policy, ac_layers: recomputation, as in Level.
        last_params: parameters of the last product of a layer (the MLP's down projection).
        chunked: whether each layer runs in chunks that are recomputed in backward (Level.mlp_chunk_tokens).
        backward: False counts the forward pass alone.
        linear_efficiency, attention_efficiency: achieved share of peak FLOP/s; FLOPs are divided by it.
        window, window_share: sliding window, and the share of the layers that have it.
        """
        if ac_policy not in AC_POLICIES:
            raise ValueError(f"ac_policy={ac_policy!r} must be one of {', '.join(AC_POLICIES)}")
        layers = num_layers if ac_layers is None else min(ac_layers, num_layers)
        recomputed = layers if backward and ac_policy != "none" else 0
        attention_recomputed = recomputed if ac_policy in ("full", "offload") else 0
        # The backward pass costs twice the forward pass.
        passes = 3 if backward else 1
        # 2 FLOPs per parameter and token. torch's checkpoint stops before the last product: no backward needs its
        # output. Chunks are recomputed in every layer, to their end.
        again = num_layers * layer_params if backward and chunked else recomputed * (layer_params - last_params)
        linear = 2 * passes * (num_layers * layer_params + head_params) + 2 * again
        # QK^T and PV take 2 * len^2 * width each, of which a causal kernel does half.
        width = num_heads * (head_dim + (head_dim if v_head_dim is None else v_head_dim))
        attention = width * (passes * num_layers + attention_recomputed)
        windows = (window, window_share) if window_share else (None, None)
        return cls(linear / linear_efficiency, attention / attention_efficiency, *windows)


def costs_per_level(cost: CostModel | Sequence[CostModel] | None, num_levels: int) -> tuple[CostModel, ...]:
    """Return one cost model per level, given one for all levels, one per level, or None (the default model)."""
    if cost is None:
        cost = CostModel()
    costs = (cost,) * num_levels if isinstance(cost, CostModel) else tuple(cost)
    if len(costs) != num_levels:
        raise ValueError(f"{len(costs)} cost models for {num_levels} levels; give one, or one per level")
    if len({(cost.window, cost.window_share) for cost in costs}) > 1:
        raise ValueError("cost models of one plan have different windows; give all of them that of the model")
    return costs
