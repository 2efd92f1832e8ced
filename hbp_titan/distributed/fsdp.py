"""FSDP2 over the whole world, or over each group of it (HSDP): parameters are sharded once, whatever the level.

Owns the grouping of parameters and the reduction's arithmetic: gradients are summed in `reduce_dtype`, never
averaged, because the loss is already divided by the tokens of the whole optimizer step (paper section 3.3).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from hbp_titan.models.decoder import Decoder


def apply_fsdp(
    model: Decoder,
    mesh: DeviceMesh,
    param_dtype: torch.dtype,
    reduce_dtype: torch.dtype,
    reshard_after_forward: bool,
) -> None:
    """Shard `model` (tok_embeddings, layers, head) over the last axis of `mesh` in place, copied over a first one.

    Tied embeddings stay in the root's group: the same parameter is used first and last.
    """
    # Inputs are left as they are: a block's cos and sin stay in fp32.
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    if model.tok_embeddings.weight is not model.head.output.weight:
        fully_shard(model.tok_embeddings, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)
        # The head's backward follows its forward at once: freeing it in between would only gather it twice.
        fully_shard(model.head, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for block in model.blocks():
        fully_shard(
            block,
            mesh=mesh,
            mp_policy=policy,
            reshard_after_forward=reshard_after_forward,
            shard_placement_fn=partial(even_placement, shards=mesh.shape[-1]),
        )
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Neither call recurses. gloo has no pre-multiplied sum, so the factor 1 must not be a multiplication.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def even_placement(parameter: nn.Parameter, shards: int) -> Shard | None:
    """Where a stack of experts is sharded: along the first dim that `shards` divides; None (the first dim) otherwise.

    FSDP2 deals out whole rows. Of 160 experts over 256 ranks 96 would hold none, and what is gathered would be padded
    to 256 (after torchtitan's distributed/fsdp.py, which does the same for experts).
    """
    if parameter.ndim == 3:
        for dim in range(parameter.ndim):
            if parameter.shape[dim] % shards == 0:
                return Shard(dim)
    return None
