"""Device meshes: one that shards the parameters, and one view of the same ranks per form of context parallelism.

Owns every process group beside the default one. All groups are made at the start; a level swap only points at
another view (design after torchtitan v0.2.2 distributed/parallel_dims.py; paper section 3.3, adaptive SP).
cp ranks are adjacent, and so are the ranks that share one copy of the parameters: both lie inside a node, or inside a
group of nodes, where their number allows it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from hbp_titan.packing.level import Level


class LevelMeshes:
    """The mesh of the parameters and the (dp, gather, ulysses) mesh of each cp shape in use.

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
        shards = world_size // dp_replicate
        copies, copies_axis = ((dp_replicate,), ("dp_replicate",)) if dp_replicate > 1 else ((), ())
        self.fsdp = init_device_mesh(device.type, (*copies, shards), mesh_dim_names=(*copies_axis, "fsdp"))
        self.experts: DeviceMesh | None = None
        if expert_parallel > 1:
            shape = (*copies, shards // expert_parallel, expert_parallel)
            self.experts = init_device_mesh(device.type, shape, mesh_dim_names=(*copies_axis, "fsdp", "ep"))
        self._by_shape: dict[tuple[int, int], DeviceMesh] = {
            (gather, ulysses): init_device_mesh(
                device.type,
                (world_size // (gather * ulysses), gather, ulysses),
                mesh_dim_names=("dp", "gather", "ulysses"),
            )
            for gather, ulysses in sorted(set(cp_shapes))
        }

    def of(self, cp_shape: tuple[int, int]) -> DeviceMesh:
        """The (dp, gather, ulysses) mesh with these degrees on its last two axes."""
        return self._by_shape[cp_shape]


def shard_group(tensors: Iterable[Tensor]) -> ProcessGroup | None:
    """The ranks that share one copy of a model's parameters; None where they are not sharded.

    Every parameter is sharded over all of them, whatever its mesh: the last axis of any mesh but the experts'.
    """
    meshes = (x.device_mesh for x in tensors if isinstance(x, DTensor))
    return next((mesh.get_group(-1) for mesh in meshes if "ep" not in (mesh.mesh_dim_names or ())), None)


def crossed_nodes(levels: Iterable[Level], expert_parallel: int, ranks_per_node: int) -> list[str]:
    """A warning for each kind of group that does not lie inside one node of `ranks_per_node` adjacent ranks."""
    cp_degrees = sorted({level.cp_degree for level in levels if ranks_per_node % level.cp_degree})
    groups = [f"cp_degree {', '.join(map(str, cp_degrees))}"] if cp_degrees else []
    if ranks_per_node % expert_parallel:
        groups.append(f"expert_parallel_degree {expert_parallel}")
    return [f"groups of {group} cross nodes: their exchange is slow" for group in groups]
