"""FSDP2 over the whole world, or over each group of it (HSDP): parameters are sharded once, whatever the level.

Owns the grouping of parameters, the reduction's arithmetic and what is kept of gathered parameters. Gradients are
summed in `reduce_dtype`, never averaged, because the loss is already divided by the tokens of the whole optimizer step
(paper section 3.3).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_common import HSDPMeshInfo
from torch.distributed.tensor import Shard

from hbp_titan.distributed.mesh import near_mesh, reduce_group
from hbp_titan.models.decoder import Decoder
from hbp_titan.models.moe import Experts, MixtureOfExperts


class ReshardState:
    """What blocks keep of their gathered parameters between forward and backward; a level switch changes it.

    values: all that `use` will be called with, beside True: bools, or numbers of adjacent ranks over which parameters
        stay sharded. Such a number gets its process group at the start, one for all blocks.
    """

    def __init__(self, values: set[bool | int]) -> None:
        self.values = {True, *values}
        self.value: bool | int = True
        self._modules: list[FSDPModule] = []
        # None: all shards, which is what True is.
        self._meshes: dict[int, HSDPMeshInfo | None] = {}

    def attach(self, modules: list[FSDPModule], mesh: DeviceMesh) -> None:
        """Control `modules`, made with reshard_after_forward = True; mesh: that of the parameters."""
        self._modules = modules
        shards = mesh.shape[-1]
        for ranks in sorted(value for value in self.values if not isinstance(value, bool)):
            self._meshes[ranks] = None
            if ranks < shards:
                # Given the number, torch would make a mesh, hence communicators, for each block.
                smaller = near_mesh(ranks, mesh.device_type)
                self._meshes[ranks] = HSDPMeshInfo(smaller, shard_mesh_dim=1, replicate_mesh_dim=0)

    def use(self, value: bool | int) -> None:
        """Make `value` hold from the next forward on. Between a forward and its backward it must not change."""
        if value == self.value and isinstance(value, bool) == isinstance(self.value, bool):
            return
        self.value = value
        smaller = None if isinstance(value, bool) else self._meshes[value]
        for module in self._modules:
            module.set_reshard_after_forward(value is not False, recurse=False)
            if smaller is not None:
                _reshard_to(module, smaller)


def _reshard_to(module: FSDPModule, mesh_info: HSDPMeshInfo) -> None:
    """What fully_shard(reshard_after_forward=<int>) sets up, which set_reshard_after_forward does not take.

    Groups that torch cannot keep on a smaller mesh stay as they are: parameters sharded along another dim than the
    first, and those that expert parallelism has spread.
    """
    for group in module._get_fsdp_state()._fsdp_param_groups:
        parameters: list[Any] = group.fsdp_params
        if any(parameter.is_dtensor or parameter.fsdp_placement.dim != 0 for parameter in parameters):
            continue
        group.post_forward_mesh_info = mesh_info
        for parameter in parameters:
            if parameter.post_forward_mesh_info is not mesh_info:
                parameter.post_forward_mesh_info = mesh_info
                whole = torch.empty(parameter._orig_size, device="meta")
                parameter._init_sharded_post_forward_param_metadata(whole)


def apply_fsdp(
    model: Decoder,
    mesh: DeviceMesh,
    expert_mesh: DeviceMesh | None,
    param_dtype: torch.dtype,
    reduce_dtype: torch.dtype,
    reshard: ReshardState,
    separate_reduce_scatter: bool = False,
) -> None:
    """Shard `model` (tok_embeddings, layers, head) over the last axis of `mesh` in place, copied over a first one.

    expert_mesh: where expert parallelism has spread the experts, the mesh with its axis "ep" at the end; their shards
        lie along the axes before.
    reshard: is given control over the blocks. separate_reduce_scatter: reduce gradients on a process group of their
        own where torch has it (2.13): on one NCCL communicator they take turns with the all-gathers.
    Tied embeddings stay in the root's group: the same parameter is used first and last.
    """
    # Inputs are left as they are: a block's cos and sin stay in fp32.
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    if model.tok_embeddings.weight is not model.head.output.weight:
        # An embedding's backward needs no weights: they are gathered once, whatever the level keeps.
        fully_shard(model.tok_embeddings, mesh=mesh, mp_policy=policy).set_unshard_in_backward(False)
        # The head's backward follows its forward at once: freeing it in between would only gather it twice.
        fully_shard(model.head, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    blocks: list[FSDPModule] = []
    shard_block = partial(fully_shard, mp_policy=policy, reshard_after_forward=True)
    placement = partial(even_placement, shards=mesh.shape[-1])
    for block in model.blocks():
        if expert_mesh is None or not isinstance(block.mlp, MixtureOfExperts):
            blocks.append(shard_block(block, mesh=mesh, shard_placement_fn=placement))
            continue
        data_mesh = expert_mesh[("dp_replicate", "fsdp") if expert_mesh.ndim == 3 else ("fsdp",)]
        of_stack = partial(even_placement, shards=data_mesh.shape[-1], first_dim=1)
        experts = shard_block(block.mlp.experts, mesh=data_mesh, shard_placement_fn=of_stack)
        blocks += [shard_block(block, mesh=mesh, shard_placement_fn=placement), experts]
    root = fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    if expert_mesh is not None:
        _prefetch(blocks)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Neither call recurses. gloo has no pre-multiplied sum, so the factor 1 must not be a multiplication.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    if separate_reduce_scatter and hasattr(root, "set_separate_reduce_scatter_group"):
        for module in model.modules():
            for group in module._get_fsdp_state()._fsdp_param_groups if isinstance(module, FSDPModule) else ():
                # torch takes a group that is there; its own would be a new one for each engine, with torch's timeout.
                info: Any = group.mesh_info
                info.reduce_scatter_process_group = reduce_group(info.shard_process_group, mesh.device_type)
        root.set_separate_reduce_scatter_group()
    reshard.attach(blocks, mesh)


def _prefetch(blocks: list[FSDPModule]) -> None:
    """Ask for a block's parameters, those of its experts among them, when the block before it starts.

    blocks: in the order of their forward, experts after their block. Expert parallelism's exchange makes the host wait
    for the device: what is asked for only after it would come when the device has nothing left to do. In backward
    nothing waits, and FSDP2's own prefetch does (after torchtitan's models/llama4/infra/parallelize.py).
    """
    starts = [k for k, module in enumerate(blocks) if not isinstance(module, Experts)]
    for start, end in itertools.pairwise([*starts, len(blocks)]):
        following = next((k for k in starts if k > end), len(blocks))
        wanted = blocks[end:following]
        blocks[start].set_modules_to_forward_prefetch(blocks[1:end] + wanted if start == 0 else wanted)


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
