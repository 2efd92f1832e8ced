"""FSDP2 over the whole world, or over each group of it (HSDP): parameters are sharded once, whatever the level.

Owns the grouping of parameters and the reduction's arithmetic: gradients are summed in `reduce_dtype`, never
averaged, because the loss is already divided by the tokens of the whole optimizer step (paper section 3.3).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from hbp_titan.models.decoder import Decoder
from hbp_titan.models.moe import MixtureOfExperts


def apply_fsdp(
    model: Decoder,
    mesh: DeviceMesh,
    expert_mesh: DeviceMesh | None,
    param_dtype: torch.dtype,
    reduce_dtype: torch.dtype,
    reshard_after_forward: bool,
) -> None:
    """Shard `model` (tok_embeddings, layers, head) over the last axis of `mesh` in place, copied over a first one.

    expert_mesh: where expert parallelism has spread the experts, the mesh with its axis "ep" at the end; their shards
        lie along the axes before.
    Tied embeddings stay in the root's group: the same parameter is used first and last.
    """
    # Inputs are left as they are: a block's cos and sin stay in fp32.
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    if model.tok_embeddings.weight is not model.head.output.weight:
        fully_shard(model.tok_embeddings, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)
        # The head's backward follows its forward at once: freeing it in between would only gather it twice.
        fully_shard(model.head, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    shard_block = partial(fully_shard, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    placement = partial(even_placement, shards=mesh.shape[-1])
    for block in model.blocks():
        if expert_mesh is None or not isinstance(block.mlp, MixtureOfExperts):
            shard_block(block, mesh=mesh, shard_placement_fn=placement)
            continue
        data_mesh = expert_mesh[("dp_replicate", "fsdp") if expert_mesh.ndim == 3 else ("fsdp",)]
        of_stack = partial(even_placement, shards=data_mesh.shape[-1], first_dim=1)
        experts = shard_block(block.mlp.experts, mesh=data_mesh, shard_placement_fn=of_stack)
        # The exchange waits for the device: asked for only there, the experts would come when it has nothing to do.
        shard_block(block, mesh=mesh, shard_placement_fn=placement).set_modules_to_forward_prefetch([experts])
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Neither call recurses. gloo has no pre-multiplied sum, so the factor 1 must not be a multiplication.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def sharded_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The (name, parameter) pairs of `model`, sharded: the trained values in the dtype in which they are stored.

    After a forward without a backward, groups with reshard_after_forward=False still hold their gathered copy, in the
    compute dtype, and model.named_parameters() would give that.
    """
    reshard(model)
    return model.named_parameters()


def reshard(model: nn.Module) -> None:
    """Free every gathered parameter of `model`; no collective."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def even_placement(parameter: nn.Parameter, shards: int, first_dim: int = 0) -> Shard | None:
    """Where a stack of experts is sharded: along the first dim that `shards` divides; None (the first dim) otherwise.

    FSDP2 deals out whole rows. Of 160 experts over 256 ranks 96 would hold none, and what is gathered would be padded
    to 256 (after torchtitan's distributed/fsdp.py, which does the same for experts). first_dim: 1 where the first one
    is expert parallelism's.
    """
    if parameter.ndim == 3:
        for dim in range(first_dim, parameter.ndim):
            if parameter.shape[dim] % shards == 0:
                return Shard(dim)
    return None
