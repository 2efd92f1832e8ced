"""Every parallel form and training technique, in the order in which it is applied to the model.

Owns that order and nothing else (after torchtitan v0.2.2 models/llama3/infra/parallelize.py).

torch.compile of the regions of each block before and behind attention, inside checkpointing and FSDP2.

Owns the compiler's settings: static shapes (levels of equal shard length share a graph), whole graphs only, and room
for the graphs of each level before the compiler gives up. Attention and the exchanges between ranks run eagerly
between the regions: a graph never sees a kernel's package, a process group or the lengths of documents. A block whose
experts are spread over ranks is compiled in pieces around their exchange, whose sizes only the data decide.

How a block runs: which parts of it are recomputed in backward, and where its exchanges lie.

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

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hbp_titan.config import JobConfig
from hbp_titan.distributed.context_parallel import ContextParallelAttention, ContextParallelState
from hbp_titan.distributed.context_parallel_dtensor import DTensorContextParallelAttention
from hbp_titan.distributed.expert_parallel import ExpertExchange, apply_expert_parallel
from hbp_titan.distributed.fsdp import ReshardState, apply_fsdp
from hbp_titan.distributed.mesh import LevelMeshes
from hbp_titan.models.decoder import Decoder, DecoderBlock
from hbp_titan.models.layers import FeedForward
from hbp_titan.models.lora import enable_input_require_grads
from hbp_titan.models.moe import MixtureOfExperts

BEFORE_ATTENTION = ("pre_attention", "pre_keys_values", "pre_queries")
"""Regions of DecoderBlock: whole, and in two parts where keys and values are exchanged while queries are projected."""
BEHIND_ATTENTION = ("post_attention", "post_hidden")
"""Whole, and without the last product where the block is recomputed."""


def apply_compile(model: Decoder, backend: str, num_levels: int) -> None:
    """Compile the regions of every block in place; the module tree and its names stay as they are."""
    # Of one region: a graph for each level's shape, with gradients and without.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * num_levels)
    compiled = partial(torch.compile, backend=backend, fullgraph=True, dynamic=False)
    for block in model.blocks():
        regions: tuple[str, ...] = BEFORE_ATTENTION + BEHIND_ATTENTION
        if isinstance(block.mlp, MixtureOfExperts) and isinstance(block.mlp.run_experts, ExpertExchange):
            regions = BEFORE_ATTENTION
            block.mlp.send = compiled(block.mlp.send)  # type: ignore[method-assign]
            block.mlp.receive = compiled(block.mlp.receive)  # type: ignore[method-assign]
            experts = block.mlp.experts
            experts.activation = compiled(experts.activation, dynamic=True)  # type: ignore[method-assign]
        for name in regions:
            setattr(block, name, compiled(getattr(block, name)))


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


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CP_ATTENTION = {"fused": ContextParallelAttention, "dtensor": DTensorContextParallelAttention}
"""Which exchanges run between cp ranks, by parallelism.cp_backend."""


def compute_dtype(config: JobConfig, device: torch.device) -> torch.dtype:
    """The dtype of parameters in forward and backward; "auto" is bfloat16 on CUDA, float32 on the CPU."""
    name = config.training.mixed_precision_param
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    return DTYPES[name]


def stored_dtype(config: JobConfig, device: torch.device) -> torch.dtype:
    """The dtype of the model's own weights between steps; with LoRA these are frozen, and adapters have training.dtype.

    Frozen weights are never updated, so a dtype wider than that of forward and backward would hold bits that nothing
    reads.
    """
    if not config.lora.rank:
        return DTYPES[config.training.dtype]
    name = config.lora.base_dtype
    return compute_dtype(config, device) if name == "auto" else DTYPES[name]


def parallelize(
    model: Decoder,
    config: JobConfig,
    device: torch.device,
    meshes: LevelMeshes,
    cp_state: ContextParallelState,
    ac_state: ActivationCheckpointState,
    reshard: ReshardState,
) -> None:
    """Apply everything to `model` (best on the meta device) in place."""
    # Innermost: attention exchanges heads between cp ranks, whatever runs around it.
    for block in model.blocks():
        block.inner_attention = CP_ATTENTION[config.parallelism.cp_backend](block.inner_attention, cp_state)
    # A document's balance loss is counted over all of its tokens.
    model.balance.sum_counts = cp_state.sum
    if meshes.experts is not None:
        # Before FSDP, which then shards what a rank has left of each layer's experts.
        apply_expert_parallel(model, meshes.experts["ep"])
    if config.compile.enable:
        # Inside checkpointing: a change of policy then needs no new graph.
        apply_compile(model, config.compile.backend, len(config.levels))
    # Inside FSDP: recomputation happens while the block's parameters are gathered for its backward.
    apply_activation_checkpoint(model, ac_state)
    apply_fsdp(
        model,
        meshes.fsdp,
        meshes.experts,
        param_dtype=compute_dtype(config, device),
        reduce_dtype=DTYPES[config.training.mixed_precision_reduce],
        reshard=reshard,
        # gloo has no communicator that collectives would take turns on.
        separate_reduce_scatter=config.parallelism.separate_reduce_scatter and device.type == "cuda",
    )
    if config.lora.rank:
        enable_input_require_grads(model)
