"""Activation checkpointing whose policy is read at each forward, so that a level swap costs nothing.

Owns the three policies (paper section 3.1, "ckpt"):
none            keep every activation
full            keep a block's input, recompute the block in backward
keep_attention  keep a block's input and its attention's inputs and output, recompute the rest: attention is the
                dominant cost of long documents
Each applies to the first `layers` blocks. Works inside FSDP2's hooks (the wrapper replaces `block.forward`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hbp_titan.models.decoder import Decoder, DecoderBlock

_recompute = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


@dataclass
class ActivationCheckpointState:
    """What the blocks read: the policy of the active level and how many of the first blocks it covers."""

    policy: str = "none"
    layers: int = 0


class CheckpointedForward:
    """Stands in for `block.forward`; decides at each call how much of the block is recomputed."""

    def __init__(self, block: DecoderBlock, index: int, state: ActivationCheckpointState) -> None:
        self.whole = block.forward
        self.block = block
        self.index = index
        self.state = state

    def __call__(self, x_TH: Tensor, *inputs: Any) -> Tensor:
        policy = self.state.policy if self.index < self.state.layers else "none"
        if policy == "none":
            return self.whole(x_TH, *inputs)
        if policy == "full":
            return _recompute(self.whole, x_TH, *inputs)
        assert policy == "keep_attention", policy
        cos_TD, sin_TD, cu_seqlens, max_seqlen = inputs
        q_TND, k_TKD, v_TKD = _recompute(self.block.pre_attention, x_TH, cos_TD, sin_TD)
        o_TND = self.block.inner_attention(q_TND, k_TKD, v_TKD, cu_seqlens, max_seqlen)
        return _recompute(self.block.post_attention, x_TH, o_TND)


def apply_activation_checkpoint(model: Decoder, state: ActivationCheckpointState) -> None:
    """Let every block of `model.layers` obey `state`. The module tree and its names stay as they are."""
    for index, block in enumerate(model.blocks()):
        block.forward = CheckpointedForward(block, index, state)  # type: ignore[method-assign, assignment]
