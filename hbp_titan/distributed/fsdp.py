"""FSDP2 over the whole world, or over each part of it (HSDP): parameters are sharded once for all levels.

Owns the grouping of parameters, the arithmetic of the reduction, and how long gathered parameters are kept. Gradients
are summed in `reduce_dtype`, never averaged, because the loss is already divided by the tokens of the whole optimizer
step (paper section 3.3).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_common import HSDPMeshInfo
from torch.distributed.tensor import DTensor, Shard

from hbp_titan.distributed.mesh import partial_shard_mesh, reduce_group
from hbp_titan.job_config import Parallelism
from hbp_titan.models.decoder import Decoder, DecoderBlock


class ReshardState:
    """Whether blocks keep their gathered parameters between forward and backward; a level switch sets it.

    values: all arguments of future `set_value` calls in addition to True: bools, or numbers of adjacent ranks over
        which parameters stay sharded. Each number gets one process group at the start, shared by all blocks.
    """

    def __init__(self, values: set[bool | int]) -> None:
        self.values = {True, *values}
        self.value: bool | int = True
        self._modules: list[FSDPModule] = []
        # None: over all shards, which is the same as True.
        self._meshes: dict[int, HSDPMeshInfo | None] = {}

    def attach(self, modules: list[FSDPModule], mesh: DeviceMesh) -> None:
        """Control `modules`, made with reshard_after_forward=True. mesh: of the parameters."""
        self._modules = modules
        shards = mesh.shape[-1]
        for ranks in sorted(value for value in self.values if not isinstance(value, bool)):
            self._meshes[ranks] = None
            if ranks < shards:
                # fully_shard(reshard_after_forward=<int>) would make a mesh, and thus communicators, per block.
                smaller = partial_shard_mesh(ranks, mesh.device_type)
                self._meshes[ranks] = HSDPMeshInfo(smaller, shard_mesh_dim=1, replicate_mesh_dim=0)

    def set_value(self, value: bool | int) -> None:
        """Apply `value` from the next forward on; do not call it between a forward and its backward."""
        # Compare types as well: 1 == True.
        if value == self.value and isinstance(value, bool) == isinstance(self.value, bool):
            return
        self.value = value
        smaller = None if isinstance(value, bool) else self._meshes[value]
        for module in self._modules:
            module.set_reshard_after_forward(value is not False, recurse=False)
            if smaller is not None:
                _reshard_to(module, smaller)


def _reshard_to(module: FSDPModule, mesh_info: HSDPMeshInfo) -> None:
    """Set up what fully_shard(reshard_after_forward=<int>) does; set_reshard_after_forward takes no number.

    Groups that torch cannot keep on a smaller mesh are unchanged: parameters sharded along another dim than the first,
    and experts.
    """
    for group in param_groups(module):
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
    cpu_offload: bool = False,
) -> None:
    """Shard `model` (tok_embeddings, layers, head) in place over the last axis of `mesh`, replicated over a first one.

    expert_mesh: with expert parallelism `LevelMeshes.experts`; experts are sharded further over its axes before "ep".
    reshard: gets control of the blocks.
    separate_reduce_scatter: reduce gradients on a separate process group (has_separate_reductions).
    cpu_offload: keep the shards of parameters and gradients in host memory, pinned if `mesh` is of GPUs. Parameters
        must then be allocated on the CPU.
    """
    # cast_forward_inputs=False keeps a block's cos and sin in fp32.
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    # Without a GPU nothing can be pinned, and nothing is copied.
    offload = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if cpu_offload else OffloadPolicy()
    # Replicated, because the shards of a module are gathered in one dtype.
    biases = {block.experts_mlp.gate.e_score_correction_bias for block in model.blocks() if block.has_experts} - {None}
    shard = partial(fully_shard, mp_policy=policy, offload_policy=offload, ignored_params=cast(Any, biases))
    # Tied embeddings stay in the root's group: the same parameter is used first and last.
    if model.tok_embeddings.weight is not model.head.output.weight:
        # An embedding's backward needs no weights, so they are gathered only once at every level.
        shard(model.tok_embeddings, mesh=mesh).set_unshard_in_backward(False)
        # The head's backward directly follows its forward: freeing it in between would only gather it twice.
        shard(model.head, mesh=mesh, reshard_after_forward=False)
    blocks: list[FSDPModule] = []
    shard_block = partial(shard, reshard_after_forward=True)
    placement = partial(even_placement, shards=mesh.shape[-1])
    for block in model.blocks():
        if expert_mesh is None or not block.has_experts:
            blocks.append(shard_block(block, mesh=mesh, shard_placement_fn=placement))
            continue
        data_mesh = expert_mesh[("dp_replicate", "fsdp") if expert_mesh.ndim == 3 else ("fsdp",)]
        # Dim 0 is expert parallelism's.
        expert_placement = partial(even_placement, shards=data_mesh.shape[-1], first_dim=1)
        experts = shard_block(block.experts_mlp.experts, mesh=data_mesh, shard_placement_fn=expert_placement)
        blocks += [shard_block(block, mesh=mesh, shard_placement_fn=placement), experts]
    root = shard(model, mesh=mesh, reshard_after_forward=False)
    if expert_mesh is not None:
        _prefetch(blocks)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Neither call recurses. gloo has no pre-multiplied sum, so the factor 1 must not be a multiplication.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    if separate_reduce_scatter:
        for module in model.modules():
            for group in param_groups(module):
                # torch uses a group that is already set; its own would be a new one per engine, with torch's timeout.
                info = group.mesh_info
                info.reduce_scatter_process_group = reduce_group(info.shard_process_group, mesh.device_type)
        root.set_separate_reduce_scatter_group()
    reshard.attach(blocks, mesh)


def _prefetch(blocks: list[FSDPModule]) -> None:
    """Gather a block's parameters, including its experts', when the block before it starts.

    Expert parallelism's exchange makes the host wait for the device, so a gather issued after it would start only when
    the device has run out of work. Backward has no such wait, and FSDP2's own prefetch is enough there (after
    torchtitan's models/llama4/infra/parallelize.py).
    blocks: in the order of their forward, experts after their block.
    """
    starts = [k for k, module in enumerate(blocks) if isinstance(module, DecoderBlock)]
    for start, end in itertools.pairwise([*starts, len(blocks)]):
        following = next((k for k in starts if k > end), len(blocks))
        prefetched = blocks[end:following]
        blocks[start].set_modules_to_forward_prefetch(blocks[1:end] + prefetched if start == 0 else prefetched)


def has_separate_reductions(parallelism: Parallelism, device: torch.device) -> bool:
    """Return whether gradients are reduced on a process group of their own: on GPUs, if configured, from torch 2.13 on.

    On one NCCL communicator reductions and all-gathers run one after another; gloo has no such queue.
    """
    can = device.type == "cuda" and hasattr(FSDPModule, "set_separate_reduce_scatter_group")
    return can and parallelism.separate_reduce_scatter


class MicroBatchOverlap:
    """Lets the micro-batches of an optimizer step follow each other without waiting for FSDP2's collectives.

    By default a backward ends by waiting for all reductions, and the next forward's first gather waits for that
    backward: nothing computes while the embeddings are reduced, gathered again, and the first block with them. But only
    the optimizer reads the gradients and changes the parameters.

    model: with its reductions on a communicator of their own (apply_fsdp's separate_reduce_scatter): on a shared one
        the gathers would queue behind them. Not with cpu_offload, whose gradients arrive on the host at that wait.
    """

    def __init__(self, model: Decoder) -> None:
        self.root = cast(FSDPModule, model)
        self._updated: Any = None  # event: the parameters are those of this step
        blocks = list(model.blocks())
        blocks[len(blocks) // 2].register_forward_pre_hook(self._free_reduced)

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """Surround the forward and backward of a micro-batch. last: whether it is the last of its optimizer step."""
        state: Any = self.root._get_fsdp_state()
        if self._updated is None:
            self._updated = state._device_handle.current_stream().record_event()
        else:
            self.root.set_post_optim_event(self._updated)
        self.root.set_is_last_backward(last)
        ended = False
        try:
            yield
            ended = True
        finally:
            if last or not ended:
                self._updated = None
        if last:
            return
        # Otherwise the next backward would end by gathering the head, as if this micro-batch's backward followed.
        state._comm_ctx.post_forward_order.clear()
        for module in cast(nn.Module, self.root).modules():
            for group in param_groups(module):
                group._post_forward_indices.clear()

    def _free_reduced(self, *_: Any) -> None:
        """Free the embeddings' gradient, which FSDP2 keeps until the next reduction, before the forward's peak.

        record_stream instead would keep it for as long as the host is ahead of the device.
        """
        state: Any = self.root._get_fsdp_state()
        for reduction in state._comm_ctx.reduce_scatter_states:
            if reduction.event is not None:
                state._device_handle.current_stream().wait_event(reduction.event)
        state._comm_ctx.reduce_scatter_states.clear()


def sharded_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Return the (name, parameter) pairs of `model`, sharded, in the dtype in which they are stored."""
    # After a forward without backward, groups with reshard_after_forward=False still hold their gathered copy in the
    # compute dtype, and named_parameters() would return that.
    reshard(model)
    return model.named_parameters()


def param_groups(module: Any) -> list[Any]:
    """Return FSDP2's groups of the parameters that `module` gathers together; none of a module without FSDP."""
    state = module._get_fsdp_state() if isinstance(module, FSDPModule) else None
    # torch 2.11 has one group per module.
    groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
    return [group for group in groups if group is not None]


def compute_device(model: nn.Module) -> torch.device:
    """Return the device that computes with `model`: with cpu_offload its parameters are elsewhere, in host memory."""
    parameter = next(model.parameters())
    return torch.device(parameter.device_mesh.device_type) if isinstance(parameter, DTensor) else parameter.device


def whole_tensor(tensor: Tensor) -> Tensor:
    """Return a parameter or gradient as a whole, on the device that computes; a collective for a DTensor."""
    if not isinstance(tensor, DTensor):
        return tensor
    # NCCL cannot gather shards that are in host memory.
    moved: Any = tensor.to(tensor.device_mesh.device_type)
    whole = moved.full_tensor()
    return getattr(whole, "_tensor", whole)  # as checkpoint.local_part, where one shard is the whole


def reshard(model: nn.Module) -> None:
    """Free every gathered parameter of `model`; no collective."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def even_placement(parameter: nn.Parameter, shards: int, first_dim: int = 0) -> Shard | None:
    """Return the placement of stacked experts: the first dim from first_dim that `shards` divides, else None (dim 0).

    FSDP2 shards whole rows: with 160 experts over 256 ranks, 96 would hold none and gathered tensors would be padded to
    256 (after torchtitan's distributed/fsdp.py, which does the same for experts).
    """
    if parameter.ndim == 3:
        for dim in range(first_dim, parameter.ndim):
            if parameter.shape[dim] % shards == 0:
                return Shard(dim)
    return None
