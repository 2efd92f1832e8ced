"""Device meshes: one that shards the parameters, and one view of the same ranks per form of context parallelism.

Owns every process group of the meshes. All are made at the start; a level switch only points at another view (design
after torchtitan v0.2.2 distributed/parallel_dims.py; paper section 3.3, adaptive SP). An axis of degree 1, or one that
nothing communicates over (data parallelism across cp groups), has no group. Groups live as long as the process: engines
that are built again, a profile and the training after it share them by their place in the world (`AxisGroups`).
cp ranks are adjacent, and so are the ranks that share one copy of the parameters: both lie inside a node, or inside a
group of nodes, where their number allows it.
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


@dataclass(frozen=True)
class Axis:
    """A partition of the world into groups of `size` ranks that are `stride` ranks apart.

    use: what the groups carry. Sharding has communicators of its own even where its ranks are those of another axis:
    collectives of one communicator run one after another, and FSDP's are to overlap with all others.
    """

    size: int
    stride: int
    use: str

    def ranks(self, rank: int) -> list[int]:
        """The group of `rank`."""
        first = rank - rank // self.stride % self.size * self.stride
        return list(range(first, first + self.size * self.stride, self.stride))


SHARD, REDUCE, COPY, EXCHANGE = "shard", "reduce", "copy", "exchange"
"""Uses of an axis: parameters sharded over it (FSDP), their gradients reduced apart from the gathers; parameters copied
over it (HSDP); cp and expert exchanges."""


@dataclass
class AxisGroups:
    """The process groups of the meshes made so far, for as long as the default group lives.

    The default group is that of parameters sharded over all ranks.

    destroyed: axes whose groups are gone. torch names a group that only its members make by its ranks and the number of
    groups; made again, it could get a name that is still in the store, with addresses of dead connections.
    """

    default: ProcessGroup
    groups: dict[Axis, ProcessGroup] = field(default_factory=dict)
    destroyed: set[Axis] = field(default_factory=set)

    def get(self, axis: Axis, device_type: str) -> ProcessGroup:
        """This rank's group of `axis`, made on the first request; every rank of the world calls it."""
        if axis not in self.groups:
            self.groups[axis] = self._make(axis)
            _connect(self.groups[axis], axis.use, device_type)
        return self.groups[axis]

    def _make(self, axis: Axis) -> ProcessGroup:
        rank, description = dist.get_rank(), f"{axis.use}_{axis.size}x{axis.stride}"
        if axis.use == SHARD and axis.size == dist.get_world_size():
            return self.default
        if axis not in self.destroyed:
            return new_group(axis.ranks(rank), description=description, members_only=True)
        partition = sorted({tuple(axis.ranks(other)) for other in range(dist.get_world_size())})
        groups = [new_group(ranks, description=description) for ranks in partition]
        return next(group for group, ranks in zip(groups, partition, strict=True) if rank in ranks)

    def keep(self, axes: Iterable[Axis]) -> None:
        """Destroy the exchange groups of all axes but these; every rank calls it, and no engine uses them."""
        kept = set(axes)
        for axis in [axis for axis in self.groups if axis.use == EXCHANGE and axis not in kept]:
            dist.destroy_process_group(self.groups.pop(axis))
            self.destroyed.add(axis)


_axis_groups: AxisGroups | None = None


def axis_groups() -> AxisGroups:
    """Those of the default group that is there now."""
    global _axis_groups
    default = dist.group.WORLD
    assert default is not None, "init_process_group comes first"
    if _axis_groups is None or _axis_groups.default is not default:
        _axis_groups = AxisGroups(default)
    return _axis_groups


def _connect(group: ProcessGroup, use: str, device_type: str) -> None:
    """Run what the group will carry once, on a few bytes.

    NCCL allocates a communicator's buffers with its first collective of a kind: gigabytes for all-to-all (NVIDIA/nccl
    issue 1685). Here that happens before anyone asks how much memory is free, and a bad network shows by name.
    """
    size = dist.get_world_size(group)
    one, many = torch.zeros(1, device=device_type), torch.zeros(size, device=device_type)
    if use == COPY:
        dist.all_reduce(one, group=group)
        return
    if use != REDUCE:
        dist.all_gather(list(many.split(1)), one, group=group)
    dist.reduce_scatter(one, list(many.split(1)), group=group)
    if use == EXCHANGE:
        dist.all_to_all_single(torch.empty_like(many), many, group=group)


def reduce_group(fsdp_group: ProcessGroup, device_type: str) -> ProcessGroup:
    """A second group of the ranks of a mesh's sharding group, for reductions that overlap with its gathers."""
    groups, name = axis_groups(), fsdp_group.group_name
    axis = next(axis for axis, group in groups.groups.items() if axis.use == SHARD and group.group_name == name)
    return groups.get(replace(axis, use=REDUCE), device_type)


def near_mesh(ranks: int, device_type: str) -> DeviceMesh:
    """The world as (world / ranks, ranks): parameters sharded over `ranks` adjacent ranks, as those of a node."""
    world, groups = dist.get_world_size(), axis_groups()
    axes = [Axis(world // ranks, ranks, COPY), Axis(ranks, 1, SHARD)]
    mesh = torch.arange(world, dtype=torch.int).view(-1, ranks)
    return DeviceMesh.from_group(
        [groups.get(axis, device_type) for axis in axes], device_type, mesh, mesh_dim_names=("far", "near")
    )


def keep_groups(cp_shapes: Iterable[tuple[int, int]], expert_parallel: int) -> None:
    """Destroy the exchange groups that neither these cp shapes nor this degree need; every rank calls it.

    No engine that was made with others may run any more: their communicators hold gigabytes of each GPU.
    """
    axes = [axis for shape in cp_shapes for axis in _cp_axes(shape).values()]
    axis_groups().keep([*axes, Axis(expert_parallel, 1, EXCHANGE)])


def _cp_axes(cp_shape: tuple[int, int]) -> dict[str, Axis]:
    """The axes of a cp shape that have a group, in the mesh's order."""
    gather, ulysses = cp_shape
    axes = {"gather": Axis(gather, ulysses, EXCHANGE), "ulysses": Axis(ulysses, 1, EXCHANGE)}
    return {name: axis for name, axis in axes.items() if axis.size > 1}


class LevelMeshes:
    """The mesh of the parameters and the (gather, ulysses) mesh of each cp shape in use.

    fsdp: flat, axis "fsdp"; with dp_replicate > 1 it has the axes ("dp_replicate", "fsdp"): parameters are sharded over
    the last and copied over the first (HSDP).
    cp_shapes: (gather_degree, ulysses_degree) as from `Level.cp_shape`. A cp rank is gather_rank * ulysses_degree +
    ulysses_rank: the ranks that scatter heads, the more frequent exchange, are the nearest.
    experts: with expert_parallel > 1 a mesh of the axes of `fsdp` with an axis "ep" of adjacent ranks at its end, among
    which the experts of a layer are dealt out; each is sharded over the rest of "fsdp". None otherwise.
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
        copies = {"dp_replicate": Axis(dp_replicate, shards, COPY)} if dp_replicate > 1 else {}
        self.fsdp = self._mesh(copies | {"fsdp": Axis(shards, 1, SHARD)}, range(world_size))
        self.experts: DeviceMesh | None = None
        if expert_parallel > 1:
            rest = {"fsdp": Axis(shards // expert_parallel, expert_parallel, SHARD)}
            ep = {"ep": Axis(expert_parallel, 1, EXCHANGE)}
            self.experts = self._mesh(copies | rest | ep, range(world_size))
        self._by_shape = {shape: self._cp_mesh(shape) for shape in sorted(set(cp_shapes))}

    def of(self, cp_shape: tuple[int, int]) -> DeviceMesh | None:
        """This rank's cp group with the axes "gather" and "ulysses" whose degree is above 1; None without any."""
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


def fsdp_group(tensors: Iterable[Tensor]) -> ProcessGroup | None:
    """The ranks that share one copy of a model's parameters; None where they are not sharded.

    Every parameter is sharded over all of them, whatever its mesh: the last axis of any mesh but the experts'.
    """
    meshes = (x.device_mesh for x in tensors if isinstance(x, DTensor))
    return next((mesh.get_group(-1) for mesh in meshes if "ep" not in (mesh.mesh_dim_names or ())), None)


def cross_node_warnings(levels: Iterable[Level], expert_parallel: int, ranks_per_node: int) -> list[str]:
    """A warning for each kind of group that does not lie inside one node of `ranks_per_node` adjacent ranks."""
    cp_degrees = sorted({level.cp_degree for level in levels if ranks_per_node % level.cp_degree})
    groups = [f"cp_degree {', '.join(map(str, cp_degrees))}"] if cp_degrees else []
    if ranks_per_node % expert_parallel:
        groups.append(f"expert_parallel_degree {expert_parallel}")
    return [f"groups of {group} cross nodes: their exchange is slow" for group in groups]
