"""Every parallelism and training technique, in the order in which it is applied to the model.

Owns that order (after torchtitan v0.2.2 models/llama3/infra/parallelize.py) and what torch.compile sees. Attention and
the exchanges of context parallelism run eagerly between two regions of each block that may be compiled: `pre_attention`
(with cp ranks in two parts, so that keys and values travel while queries are projected) and `post_attention`. A graph
then never contains a kernel's package, a process group or the lengths of documents.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch

from hbp_titan.config import JobConfig
from hbp_titan.distributed.activation_checkpoint import ActivationCheckpointState, apply_activation_checkpoint
from hbp_titan.distributed.context_parallel import ContextParallelAttention, ContextParallelState
from hbp_titan.distributed.fsdp import ReshardState, apply_fsdp, has_separate_reductions
from hbp_titan.distributed.mesh import LevelMeshes
from hbp_titan.models.decoder import Decoder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BEFORE_ATTENTION = ("pre_attention", "pre_keys_values", "pre_queries")
"""Regions of DecoderBlock: the whole, and its two parts for levels with cp ranks."""
AFTER_ATTENTION = ("post_attention", "post_hidden")
"""The whole, and without the last product for blocks that are recomputed."""
EXPERTS_IN_CHUNKS = ("post_scores", "post_experts")
"""The parts of post_attention in a block with experts that runs in chunks."""


def parallelize(
    model: Decoder,
    config: JobConfig,
    device: torch.device,
    meshes: LevelMeshes,
    cp_state: ContextParallelState,
    ac_state: ActivationCheckpointState,
    reshard: ReshardState,
) -> None:
    """Apply everything to `model` (preferably on the meta device) in place."""
    # Innermost, so that everything around it gets the attention of the whole pack.
    apply_context_parallel(model, config.parallelism.cp_backend, cp_state)
    if meshes.experts is not None:
        from hbp_titan.distributed.expert_parallel import apply_expert_parallel

        # Before FSDP, which then shards each rank's share of a layer's experts.
        apply_expert_parallel(model, meshes.experts["ep"])
    if config.compile.enable:
        # Inside checkpointing, so that a change of policy needs no new graph.
        apply_compile(model, config.compile.backend, len(config.levels), meshes.experts is not None)
    # Inside FSDP: recomputation runs while the block's parameters are gathered for its backward.
    apply_activation_checkpoint(model, ac_state)
    apply_fsdp(
        model,
        meshes.fsdp,
        meshes.experts,
        param_dtype=compute_dtype(config, device),
        reduce_dtype=DTYPES[config.training.mixed_precision_reduce],
        reshard=reshard,
        separate_reduce_scatter=has_separate_reductions(config.parallelism, device),
        cpu_offload=config.parallelism.cpu_offload,
    )
    if config.lora.rank:
        from hbp_titan.models.lora import enable_input_require_grads

        # After FSDP2, which would otherwise gather the embeddings for a backward that they do not have.
        enable_input_require_grads(model)


def compute_dtype(config: JobConfig, device: torch.device) -> torch.dtype:
    """Return the dtype of parameters in forward and backward; "auto" is bfloat16 on CUDA, float32 on the CPU."""
    name = config.training.mixed_precision_param
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    return DTYPES[name]


def stored_dtype(config: JobConfig, device: torch.device) -> torch.dtype:
    """Return the dtype of the model's own weights between steps; LoRA adapters have training.dtype instead."""
    if not config.lora.rank:
        return DTYPES[config.training.dtype]
    # With LoRA these weights are frozen, so a dtype wider than that of forward would store bits that nothing reads.
    name = config.lora.base_dtype
    return compute_dtype(config, device) if name == "auto" else DTYPES[name]


def apply_context_parallel(model: Decoder, backend: str, state: ContextParallelState) -> None:
    """Wrap every block's attention with the exchanges of parallelism.cp_backend ("fused" or "dtensor")."""
    wrapper = cp_attention(backend)
    for block in model.blocks():
        block.inner_attention = wrapper(block.inner_attention, state)
    # A document's balance loss counts all of its tokens, which lie on several cp ranks.
    model.balance.sum_counts = state.sum


def cp_attention(backend: str) -> type[ContextParallelAttention]:
    """Return the attention wrapper of parallelism.cp_backend."""
    if backend == "dtensor":
        from hbp_titan.distributed.context_parallel_dtensor import DTensorContextParallelAttention

        return DTensorContextParallelAttention
    return ContextParallelAttention


def apply_compile(model: Decoder, backend: str, num_levels: int, expert_parallel: bool = False) -> None:
    """Compile the regions of every block in place, with static shapes: levels of equal shard length share a graph."""
    # Each region needs one graph per level's shape (two if its last chunk is shorter), with gradients and without.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 8 * num_levels)
    if model.args.hf_config is not None:
        cast(Any, model).compile_blocks(backend)
        return
    compiled = partial(torch.compile, backend=backend, fullgraph=True, dynamic=False)
    for block in model.blocks():
        regions: tuple[str, ...] = BEFORE_ATTENTION + AFTER_ATTENTION
        if expert_parallel and block.has_experts:
            # The sizes of the experts' exchange depend on the data, so only the pieces around it are compiled.
            regions = (*BEFORE_ATTENTION, EXPERTS_IN_CHUNKS[0])
            mlp, experts = block.experts_mlp, block.experts_mlp.experts
            mlp.send = compiled(mlp.send)  # type: ignore[method-assign]
            mlp.receive = compiled(mlp.receive)  # type: ignore[method-assign]
            # Part of `send`, but chunks run it by itself.
            mlp.shared = compiled(mlp.shared)  # type: ignore[method-assign]
            experts.activation = compiled(experts.activation, dynamic=True)  # type: ignore[method-assign]
        elif block.has_experts:
            regions += EXPERTS_IN_CHUNKS
        for name in regions:
            setattr(block, name, compiled(getattr(block, name)))
