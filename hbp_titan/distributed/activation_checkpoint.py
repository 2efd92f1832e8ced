"""How a block runs: which parts of it are recomputed in backward, and where its exchanges lie.

Owns the three policies of activation checkpointing (paper section 3.1, "ckpt"), read at each forward so that a level
switch costs nothing:

    none            keep every activation
    full            keep a block's input, recompute the block in backward
    keep_attention  keep a block's input and its attention's inputs and output, recompute the rest: attention is the
                    dominant cost of long documents, and its exchanges between cp ranks are not repeated

Each applies to the first `layers` blocks. Works inside FSDP2's hooks (`BlockForward` replaces `block.forward`).

Attention and the exchanges of context parallelism run eagerly, between regions that may be compiled: `pre_attention`
(with cp ranks in two parts, so that keys and values travel while queries are projected) and `post_attention`. Where a
block is recomputed the last product is left out of its region, too: checkpoint stops a recomputation as soon as all
saved tensors are there again, but a compiled region runs to its end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hbp_titan.distributed.context_parallel import ContextParallelAttention
from hbp_titan.models.decoder import Decoder, DecoderBlock
from hbp_titan.models.feed_forward import FeedForward

_recompute = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


@dataclass
class ActivationCheckpointState:
    """What the blocks read: the policy of the active level and how many of the first blocks it covers."""

    policy: str = "none"
    layers: int = 0


def _keep(function: Callable[..., Any], *inputs: Any) -> Any:
    return function(*inputs)


class BlockForward:
    """Replaces `block.forward`; decides at each call how much of the block is recomputed."""

    def __init__(self, block: DecoderBlock, index: int, state: ActivationCheckpointState) -> None:
        self.block = block
        self.index = index
        self.state = state

    def __call__(self, x_TH: Tensor, *inputs: Any) -> Tensor:
        policy = self.state.policy if self.index < self.state.layers else "none"
        if policy == "none":
            return self._run(_keep, self.block.post_attention, x_TH, *inputs)
        if policy == "full":
            return _recompute(self._run, _keep, self._post_attention, x_TH, *inputs)
        assert policy == "keep_attention", policy
        return self._run(_recompute, self._post_attention, x_TH, *inputs)

    def _run(
        self,
        around: Callable[..., Any],
        post_attention: Callable[..., Tensor],
        x_TH: Tensor,
        cos_TD: Tensor,
        sin_TD: Tensor,
        documents: Any,
    ) -> Tensor:
        """The block with `around` in place of the calls of what lies before and behind attention."""
        block, attention = self.block, self.block.inner_attention
        if isinstance(attention, ContextParallelAttention) and attention.exchanges:
            k_TKD, v_TKD = around(block.pre_keys_values, x_TH, cos_TD, sin_TD)
            keys_values = attention.start(k_TKD, v_TKD, documents)
            o_TND = attention.finish(around(block.pre_queries, x_TH, cos_TD, sin_TD), keys_values)
        else:
            o_TND = attention(*around(block.pre_attention, x_TH, cos_TD, sin_TD), documents)
        return around(post_attention, x_TH, o_TND)

    def _post_attention(self, x_TH: Tensor, o_TND: Tensor) -> Tensor:
        block = self.block
        if not isinstance(block.mlp, FeedForward):
            return block.post_attention(x_TH, o_TND)
        return block.last_product(*block.post_hidden(x_TH, o_TND))


def apply_activation_checkpoint(model: Decoder, state: ActivationCheckpointState) -> None:
    """Let every block of `model.layers` obey `state`. The module tree and its names stay as they are."""
    for index, block in enumerate(model.blocks()):
        block.forward = BlockForward(block, index, state)  # type: ignore[method-assign, assignment]
