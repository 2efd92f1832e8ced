"""Every parallel form and training technique, in the order in which it is applied to the model.

Owns that order and nothing else (after torchtitan v0.2.2 models/llama3/infra/parallelize.py).
"""

from __future__ import annotations

import torch

from hbp_titan.config import JobConfig
from hbp_titan.distributed.activation_checkpoint import ActivationCheckpointState, apply_activation_checkpoint
from hbp_titan.distributed.compile import apply_compile
from hbp_titan.distributed.context_parallel import ContextParallelAttention, ContextParallelState
from hbp_titan.distributed.context_parallel_dtensor import DTensorContextParallelAttention
from hbp_titan.distributed.expert_parallel import apply_expert_parallel
from hbp_titan.distributed.fsdp import ReshardState, apply_fsdp
from hbp_titan.distributed.mesh import LevelMeshes
from hbp_titan.models.decoder import Decoder
from hbp_titan.models.lora import let_gradients_start

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CP_ATTENTION = {"fused": ContextParallelAttention, "dtensor": DTensorContextParallelAttention}
"""Which exchanges run between cp ranks, by parallelism.cp_collectives."""


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
        block.inner_attention = CP_ATTENTION[config.parallelism.cp_collectives](block.inner_attention, cp_state)
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
        let_gradients_start(model)
