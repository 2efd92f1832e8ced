"""Activation memory of a decoder block: what each level keeps from forward to backward, and where.

Owns how a block runs under a level's settings (packing/level.py): which parts are recomputed, in how many chunks and
groups of heads, and which kept activations are copied to host memory (distributed/offload.py).

    none               all activations are kept
    full               the block's input; the block runs again in backward (paper section 3.1, "ckpt")
    keep_attention     the input, and the inputs and the output of attention, which dominates the cost of long
                       documents: neither attention nor its exchanges between cp ranks run again
    offload            as full, kept in host memory
    offload_attention  as keep_attention, kept in host memory

Shape suffixes: T tokens of this rank's shard, H hidden size, N query heads, K key/value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hbp_titan.distributed.context_parallel import ContextParallelAttention
from hbp_titan.models.decoder import Decoder, DecoderBlock
from hbp_titan.models.layers import FeedForward
from hbp_titan.packing.level import Level

if TYPE_CHECKING:
    from hbp_titan.distributed.offload import HostActivations


@dataclass
class ActivationCheckpointState:
    """The active level's settings, which blocks read at each forward.

    layers, offload_layers: numbers of first blocks that `policy` covers, and that keep activations in `host`, which is
        made by the first of them.
    chunk_tokens: Level.mlp_chunk_tokens. head_groups: Level.attention_head_groups.
    """

    policy: str = "none"
    layers: int = 0
    offload_layers: int = 0
    chunk_tokens: int = 0
    head_groups: int = 1
    host: HostActivations | None = None

    def set_level(self, level: Level, num_layers: int) -> None:
        """Apply the settings of `level` to a model of `num_layers` blocks."""
        self.policy = level.ac_policy
        self.layers = num_layers if level.ac_layers is None else level.ac_layers
        self.offload_layers = 0
        if level.offloads:
            self.offload_layers = self.layers if level.offload_layers is None else level.offload_layers
        self.chunk_tokens = level.mlp_chunk_tokens
        self.head_groups = level.attention_head_groups


def apply_activation_checkpoint(model: Decoder, state: ActivationCheckpointState) -> None:
    """Make every block follow `state`; the module tree and its names do not change."""
    if model.args.hf_config is not None:
        cast(Any, model).recompute_blocks(lambda index: state.policy == "full" and index < state.layers)
        return
    for index, block in enumerate(model.blocks()):
        # Replacing forward instead of the module keeps FSDP2's hooks outside.
        block.forward = BlockForward(block, index, state)  # type: ignore[method-assign]


class BlockForward:
    """Replacement of `block.forward`; decides at each call how the block runs."""

    def __init__(self, block: DecoderBlock, index: int, state: ActivationCheckpointState) -> None:
        self.block = block
        self.index = index
        self.state = state

    def __call__(self, x_TH: Tensor, cos_TD: Tensor, sin_TD: Tensor, documents: Any) -> Tensor:
        policy = self.state.policy if self.index < self.state.layers else "none"
        run = _Run(self.block, policy, self.state.chunk_tokens, self.state.head_groups)
        with self._host_memory(x_TH.device, cos_TD, sin_TD):
            if run.whole:
                return _recompute(run, x_TH, cos_TD, sin_TD, documents)
            return run(x_TH, cos_TD, sin_TD, documents)

    def _host_memory(self, device: torch.device, *shared: Tensor) -> AbstractContextManager[Any]:
        """Return the context in which what the block keeps, but not `shared`, goes to host memory, if it does."""
        state = self.state
        if self.index >= min(state.layers, state.offload_layers) or not torch.is_grad_enabled():
            return nullcontext()
        if state.host is None:
            from hbp_titan.distributed.offload import HostActivations

            state.host = HostActivations(device)
        return state.host.block(self.index, shared)


class _Run:
    """One run of a block. With `whole` it is a checkpoint, and its second call is the recomputation."""

    def __init__(self, block: DecoderBlock, policy: str, chunk_tokens: int, head_groups: int) -> None:
        self.block = block
        self.whole = policy in ("full", "offload")
        self.recomputes_regions = policy in ("keep_attention", "offload_attention")
        self.chunk_tokens = chunk_tokens
        self.head_groups = head_groups
        self.calls = 0
        # Of the chunks of a block with experts; kept, because counting makes the host wait for the device.
        self.splits: list[tuple[Any, ...]] | None = None

    def __call__(self, x_TH: Tensor, cos_TD: Tensor, sin_TD: Tensor, documents: Any) -> Tensor:
        self.calls += 1
        block, attention = self.block, self.block.inner_attention
        if self.head_groups > 1:
            assert isinstance(attention, ContextParallelAttention)
            q_TND, k_TKD, v_TKD = self._before(block.pre_attention, x_TH, cos_TD, sin_TD)
            o_TND = attention.in_head_groups(self.head_groups, q_TND, k_TKD, v_TKD, documents)
        elif isinstance(attention, ContextParallelAttention) and attention.exchanges:
            k_TKD, v_TKD = self._before(block.pre_keys_values, x_TH, cos_TD, sin_TD)
            keys_values = attention.start(k_TKD, v_TKD, documents)
            o_TND = attention.finish(self._before(block.pre_queries, x_TH, cos_TD, sin_TD), keys_values)
        else:
            o_TND = attention(*self._before(block.pre_attention, x_TH, cos_TD, sin_TD), documents)
        return self._after(x_TH, o_TND)

    def _before(self, region: Callable[..., Any], *inputs: Tensor) -> Any:
        """Run a region before attention."""
        if self.chunk_tokens:
            return self._chunks(region, (self.block.input_layernorm, self.block.self_attn), inputs)
        return _recompute(region, *inputs) if self.recomputes_regions else region(*inputs)

    def _after(self, x_TH: Tensor, o_TND: Tensor) -> Tensor:
        """Run the region after attention."""
        block = self.block
        if self.chunk_tokens:
            return self._after_in_chunks(x_TH, o_TND)
        if self.recomputes_regions:
            return _recompute(self._post_attention, x_TH, o_TND)
        return self._post_attention(x_TH, o_TND) if self.whole else block.post_attention(x_TH, o_TND)

    def _after_in_chunks(self, x_TH: Tensor, o_TND: Tensor) -> Tensor:
        block, mlp = self.block, self.block.mlp
        # The recomputation of a whole block does not need the block's output.
        only_saved = self.whole and self.calls > 1
        before = (block.self_attn, block.attention_output_norm, block.post_attention_layernorm)
        if not block.has_experts:
            return self._chunks(block.post_attention, (*before, mlp, block.mlp_output_norm), (x_TH, o_TND), only_saved)
        from hbp_titan.distributed.chunks import chunk_slices

        mlp = block.experts_mlp
        # The balance losses count the choices of whole documents.
        x_TH, scores_TE = self._chunks(block.post_scores, (*before, mlp.gate), (x_TH, o_TND))
        weights_TK, experts_TK = mlp.choose(scores_TE)
        counts_CE = mlp.count_chunks(experts_TK, chunk_slices(len(experts_TK), self.chunk_tokens))
        self.splits = self.splits or mlp.split_chunks(counts_CE)
        modules = (before[-1], mlp, block.mlp_output_norm)

        def region(*inputs: Tensor) -> Tensor:
            return self._chunks(block.post_experts, modules, inputs, only_saved, self.splits)

        # With expert parallelism FSDP2 gathers the experts separately: once for all chunks.
        return mlp.experts(x_TH, weights_TK, experts_TK, region=region)

    def _chunks(
        self,
        region: Callable[..., Any],
        modules: Sequence[nn.Module],
        inputs: Sequence[Tensor],
        only_saved: bool = False,
        extras: Sequence[tuple[Any, ...]] | None = None,
    ) -> Any:
        # Imported where a level uses it. Chunks recompute by themselves, so no other checkpoint surrounds them.
        from hbp_titan.distributed.chunks import in_chunks

        return in_chunks(region, modules, self.chunk_tokens, inputs, only_saved=only_saved, extras=extras)

    def _post_attention(self, x_TH: Tensor, o_TND: Tensor) -> Tensor:
        # The last product stays out of the compiled region: checkpoint stops a recomputation once all saved tensors are
        # there again, but a compiled region runs to its end.
        block = self.block
        if not isinstance(block.mlp, FeedForward):
            return block.post_attention(x_TH, o_TND)
        return block.last_product(*block.post_hidden(x_TH, o_TND))


_recompute = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
