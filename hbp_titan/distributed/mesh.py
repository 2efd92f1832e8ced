"""Device meshes: one that shards the parameters, and one view of the same ranks per cp shape.

Owns every process group of the meshes. All are made at the start; a level switch only selects another view (design
after torchtitan v0.2.2 distributed/parallel_dims.py; paper section 3.3, adaptive SP). An axis of size 1, or one without
communication (data parallelism across cp groups), has no group. Groups live as long as the process and are shared by
all engines built in it (a profile, then the training after it). cp ranks are adjacent, and so are the ranks that share
one copy of the parameters: both stay inside a node where the degrees allow it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from hbp_titan.distributed.world import new_group
from hbp_titan.packing.level import Level

SHARD, REDUCE, REPLICATE, EXCHANGE = "shard", "reduce", "replicate", "exchange"
"""Purposes of an axis: FSDP's all-gathers, FSDP's reductions apart from the gathers, gradients of parameter copies
(HSDP), and cp and expert exchanges."""


class LevelMeshes:
    """The mesh of the parameters and the (gather, ulysses) mesh of each cp shape in use.

    fsdp: axes ("fsdp",), or ("dp_replicate", "fsdp") with dp_replicate > 1: parameters are sharded over the last and
        replicated over the first (HSDP).
    experts: the axes of `fsdp` plus a last axis "ep" of adjacent ranks, over which the experts of a layer are sharded
        first; None with expert_parallel = 1.
    cp_shapes: (gather_degree, ulysses_degree) as from `Level.cp_shape`.
    """

    def __init__(
        self,
        device: torch.device,
        world_size: int,
        cp_shapes: Iterable[tuple[int, int]],
        dp_replicate: int = 1,
        expert_parallel: int = 1,
    ) -> None:
        self._device, self._groups = device, axis_groups()
        shards = world_size // dp_replicate
        copies = {"dp_replicate": Axis(dp_replicate, shards, REPLICATE)} if dp_replicate > 1 else {}
        self.fsdp = self._mesh(copies | {"fsdp": Axis(shards, 1, SHARD)}, range(world_size))
        self.experts: DeviceMesh | None = None
        if expert_parallel > 1:
            rest = {"fsdp": Axis(shards // expert_parallel, expert_parallel, SHARD)}
            ep = {"ep": Axis(expert_parallel, 1, EXCHANGE)}
            self.experts = self._mesh(copies | rest | ep, range(world_size))
        # Sorted: every rank must make the groups in the same order.
        self._by_shape = {shape: self._cp_mesh(shape) for shape in sorted(set(cp_shapes))}

    def mesh_for(self, cp_shape: tuple[int, int]) -> DeviceMesh | None:
        """Return this rank's cp mesh with the axes "gather" and "ulysses" whose degree is above 1; None at cp 1."""
        return self._by_shape[cp_shape]

    def _cp_mesh(self, cp_shape: tuple[int, int]) -> DeviceMesh | None:
        axes, degree = _cp_axes(cp_shape), cp_shape[0] * cp_shape[1]
        first = dist.get_rank() // degree * degree
        return self._mesh(axes, range(first, first + degree)) if axes else None

    def _mesh(self, axes: dict[str, Axis], ranks: range) -> DeviceMesh:
        groups = [self._groups.get(axis, self._device.type) for axis in axes.values()]
        shape = [axis.size for axis in axes.values()]
        mesh = torch.tensor(ranks, dtype=torch.int).view(shape)
        if len(groups) == 1:
            return DeviceMesh.from_group(groups[0], self._device.type, mesh_dim_names=tuple(axes))
        return DeviceMesh.from_group(groups, self._device.type, mesh, mesh_dim_names=tuple(axes))


def _cp_axes(cp_shape: tuple[int, int]) -> dict[str, Axis]:
    """Return the axes of a cp shape that have a group, in the order of the mesh."""
    gather, ulysses = cp_shape
    # cp rank = gather_rank * ulysses + ulysses_rank: scattering heads is the more frequent exchange, so its ranks are
    # the nearest.
    axes = {"gather": Axis(gather, ulysses, EXCHANGE), "ulysses": Axis(ulysses, 1, EXCHANGE)}
    return {name: axis for name, axis in axes.items() if axis.size > 1}


def partial_shard_mesh(ranks: int, device_type: str) -> DeviceMesh:
    """Return the mesh [world / ranks, ranks], which shards over `ranks` adjacent ranks, such as those of a node."""
    world, groups = dist.get_world_size(), axis_groups()
    axes = [Axis(world // ranks, ranks, REPLICATE), Axis(ranks, 1, SHARD)]
    mesh = torch.arange(world, dtype=torch.int).view(-1, ranks)
    return DeviceMesh.from_group(
        [groups.get(axis, device_type) for axis in axes], device_type, mesh, mesh_dim_names=("replicate", "shard")
    )


def reduce_group(fsdp_group: ProcessGroup, device_type: str) -> ProcessGroup:
    """Return a second group of the ranks of `fsdp_group`, for reductions that overlap with its gathers."""
    groups, name = axis_groups(), fsdp_group.group_name
    axis = next(axis for axis, group in groups.groups.items() if axis.purpose == SHARD and group.group_name == name)
    return groups.get(replace(axis, purpose=REDUCE), device_type)


def destroy_unused_groups(cp_shapes: Iterable[tuple[int, int]], expert_parallel: int) -> None:
    """Destroy the exchange groups that neither these cp shapes nor this degree need; every rank calls it.

    Their communicators hold gigabytes of each GPU. No engine made with other shapes may run afterwards.
    """
    axes = [axis for shape in cp_shapes for axis in _cp_axes(shape).values()]
    axis_groups().keep_exchanges([*axes, Axis(expert_parallel, 1, EXCHANGE)])


def fsdp_group(tensors: Iterable[Tensor]) -> ProcessGroup | None:
    """Return the group of ranks that share one copy of a model's parameters; None if they are not sharded."""
    # Every parameter is sharded over all of these ranks: over the last axis of any mesh but the experts'.
    meshes = (x.device_mesh for x in tensors if isinstance(x, DTensor))
    return next((mesh.get_group(-1) for mesh in meshes if "ep" not in (mesh.mesh_dim_names or ())), None)


def cross_node_warnings(levels: Iterable[Level], expert_parallel: int, ranks_per_node: int) -> list[str]:
    """Return one warning per kind of group that does not lie inside a node of `ranks_per_node` adjacent ranks."""
    cp_degrees = sorted({level.cp_degree for level in levels if ranks_per_node % level.cp_degree})
    groups = [f"cp_degree {', '.join(map(str, cp_degrees))}"] if cp_degrees else []
    if ranks_per_node % expert_parallel:
        groups.append(f"expert_parallel_degree {expert_parallel}")
    return [f"groups of {group} cross nodes: their exchange is slow" for group in groups]


@dataclass(frozen=True)
class Axis:
    """A partition of the world into groups of `size` ranks that are `stride` ranks apart.

    purpose: what the groups carry. Axes of the same ranks but different purposes have separate communicators:
    collectives of one communicator run one after another, and FSDP's must overlap with the others.
    """

    size: int
    stride: int
    purpose: str

    def ranks(self, rank: int) -> list[int]:
        """Return the ranks of the group that contains `rank`."""
        first = rank - rank // self.stride % self.size * self.stride
        return list(range(first, first + self.size * self.stride, self.stride))


@dataclass
class AxisGroups:
    """The process groups made so far, by axis, for as long as the default group lives.

    destroyed: axes whose groups were destroyed.
    """

    default: ProcessGroup
    groups: dict[Axis, ProcessGroup] = field(default_factory=dict)
    destroyed: set[Axis] = field(default_factory=set)

    def get(self, axis: Axis, device_type: str) -> ProcessGroup:
        """Return this rank's group of `axis`, made by the first call; every rank of the world calls it."""
        if axis not in self.groups:
            self.groups[axis] = self._make(axis)
            _connect(self.groups[axis], axis.purpose, device_type)
        return self.groups[axis]

    def _make(self, axis: Axis) -> ProcessGroup:
        rank, description = dist.get_rank(), f"{axis.purpose}_{axis.size}x{axis.stride}"
        if axis.purpose == SHARD and axis.size == dist.get_world_size():
            return self.default
        if axis not in self.destroyed:
            return new_group(axis.ranks(rank), description=description, members_only=True)
        # torch names a members-only group by its ranks and the number of groups. Made again, it could get a name that
        # is still in the store, with the addresses of dead connections; groups made by all ranks get fresh names.
        partition = sorted({tuple(axis.ranks(other)) for other in range(dist.get_world_size())})
        groups = [new_group(ranks, description=description) for ranks in partition]
        return next(group for group, ranks in zip(groups, partition, strict=True) if rank in ranks)

    def keep_exchanges(self, axes: Iterable[Axis]) -> None:
        """Destroy the exchange groups of all axes but these; every rank calls it."""
        kept = set(axes)
        for axis in [axis for axis in self.groups if axis.purpose == EXCHANGE and axis not in kept]:
            dist.destroy_process_group(self.groups.pop(axis))
            self.destroyed.add(axis)


_axis_groups: AxisGroups | None = None


def axis_groups() -> AxisGroups:
    """Return the groups of the current default group."""
    global _axis_groups
    default = dist.group.WORLD
    assert default is not None, "call init_process_group first"
    if _axis_groups is None or _axis_groups.default is not default:
        _axis_groups = AxisGroups(default)
    return _axis_groups


def _connect(group: ProcessGroup, purpose: str, device_type: str) -> None:
    """Run each kind of collective that the group will carry once, on a few bytes.

    NCCL allocates a communicator's buffers with its first collective of a kind: gigabytes for all-to-all (NVIDIA/nccl
    issue 1685). They are thus allocated before free memory is measured, and a broken network shows at the start.
    """
    size = dist.get_world_size(group)
    one, many = torch.zeros(1, device=device_type), torch.zeros(size, device=device_type)
    if purpose == REPLICATE:
        dist.all_reduce(one, group=group)
        return
    if purpose != REDUCE:
        # [1] -> [size]
        dist.all_gather(list(many.split(1)), one, group=group)
    # [size] -> [1]
    dist.reduce_scatter(one, list(many.split(1)), group=group)
    if purpose == EXCHANGE:
        # [size] -> [size]
        dist.all_to_all_single(torch.empty_like(many), many, group=group)
