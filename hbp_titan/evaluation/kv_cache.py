"""Keys and values of past tokens, so that a decoder's next token costs one token's work.

Owns the cache and its attention. It acts through the seam `inner_attention`: a block projects and rotates as in
training, and what stands in place of its attention stores keys and values beside computing with them. The prompts pass
as one packed sequence through the model's own attention; after that every pass is one token of each prompt.
Latent attention (DeepSeek-V2) is cached expanded, a key and a value for each head.

Shape suffixes: T tokens of the pack, B prompts, C cells of the cache for each, S cells in use, N query heads,
K key/value heads, G = N / K, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hbp_titan.models.decoder import Decoder
from hbp_titan.models.documents import Documents


class CacheState:
    """What all layers' caches share: how far each prompt has come.

    lengths: tokens of each prompt. capacity: cells for each, at least the longest prompt with its answer.
    decoding: whether the next pass brings one token of each prompt; the first brings the whole prompts.
    """

    def __init__(self, lengths: Sequence[int], capacity: int, device: torch.device) -> None:
        assert max(lengths) <= capacity
        self.lengths, self.capacity = list(lengths), capacity
        self.rows_B = torch.arange(len(self.lengths), device=device)
        self.positions_B = torch.tensor(self.lengths, device=device) - 1
        self.in_use = max(self.lengths)
        self.decoding = False

    def advance(self) -> None:
        """Make room for one more token of each prompt; its position is then `positions_B`, int64."""
        self.decoding = True
        self.positions_B = self.positions_B + 1
        self.in_use += 1
        assert self.in_use <= self.capacity


class CachedAttention(nn.Module):
    """In place of a block's `inner_attention`, which it calls for the prompts.

    scale: factor of the logits, as in attention.varlen_attention.
    """

    def __init__(self, inner: nn.Module, state: CacheState, scale: float) -> None:
        super().__init__()
        self.inner, self.state, self.scale = inner, state, scale
        self.keys_BKCD = self.values_BKCD = torch.empty(0)

    def forward(self, q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, documents: Documents) -> Tensor:
        """What `inner_attention` returns, o_TND; while decoding T is B, and `documents` is not read."""
        if self.state.decoding:
            return self._next_token(q_TND, k_TKD, v_TKD)
        self.keys_BKCD, self.values_BKCD = self._stored(k_TKD), self._stored(v_TKD)
        return self.inner(q_TND, k_TKD, v_TKD, documents)

    def _stored(self, x_TKD: Tensor) -> Tensor:
        state = self.state
        # Zeros: cells beyond a prompt are multiplied with a weight of 0, which NaN would survive.
        num_heads, width = x_TKD.shape[1:]
        cache_BKCD = x_TKD.new_zeros(len(state.lengths), num_heads, state.capacity, width)
        for row, x_LKD in enumerate(x_TKD.split(state.lengths)):
            cache_BKCD[row, :, : len(x_LKD)] = x_LKD.transpose(0, 1)
        return cache_BKCD

    def _next_token(self, q_BND: Tensor, k_BKD: Tensor, v_BKD: Tensor) -> Tensor:
        state = self.state
        self.keys_BKCD[state.rows_B, :, state.positions_B] = k_BKD
        self.values_BKCD[state.rows_B, :, state.positions_B] = v_BKD
        keys_BKSD, values_BKSD = self.keys_BKCD[:, :, : state.in_use], self.values_BKCD[:, :, : state.in_use]
        q_BKGD = q_BND.unflatten(1, (keys_BKSD.shape[1], -1))
        scores_BKGS = (q_BKGD @ keys_BKSD.transpose(-1, -2)).float() * self.scale
        unused_BS = torch.arange(state.in_use, device=q_BND.device) > state.positions_B[:, None]
        weights_BKGS = scores_BKGS.masked_fill(unused_BS[:, None, None], -torch.inf).softmax(dim=-1)
        return (weights_BKGS.to(values_BKSD.dtype) @ values_BKSD).flatten(1, 2)


@contextmanager
def cached(model: Decoder, state: CacheState) -> Iterator[None]:
    """Inside, `model` caches keys and values as `state` says; afterwards it is as before and the cache is gone."""
    originals = [block.inner_attention for block in model.blocks()]
    for block, inner in zip(model.blocks(), originals, strict=True):
        block.inner_attention = CachedAttention(inner, state, model.args.softmax_scale)
    try:
        yield
    finally:
        for block, inner in zip(model.blocks(), originals, strict=True):
            block.inner_attention = inner
