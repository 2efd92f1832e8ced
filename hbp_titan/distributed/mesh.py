"""Device meshes: one flat mesh that shards the parameters, one (dp, cp) view of the same ranks per cp degree.

Owns every process group beside the default one. All groups are made at the start; a level swap only points at
another view (design after torchtitan v0.2.2 distributed/parallel_dims.py; paper section 3.3, adaptive SP).
cp ranks are adjacent, so that a cp group lies inside one node.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


class LevelMeshes:
    """The flat "fsdp" mesh of the world and the (dp, cp) mesh of each cp degree in use."""

    def __init__(self, device: torch.device, world_size: int, cp_degrees: Iterable[int]) -> None:
        self.fsdp = init_device_mesh(device.type, (world_size,), mesh_dim_names=("fsdp",))
        self._by_cp: dict[int, DeviceMesh] = {
            cp: init_device_mesh(device.type, (world_size // cp, cp), mesh_dim_names=("dp", "cp"))
            for cp in sorted(set(cp_degrees))
        }

    def of(self, cp_degree: int) -> DeviceMesh:
        """The (dp, cp) mesh with `cp_degree` ranks on its cp axis."""
        return self._by_cp[cp_degree]
