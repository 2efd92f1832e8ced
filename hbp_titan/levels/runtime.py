"""LevelRuntime: what a level swap changes, and the swap itself.

Owns the states that the wrapped model reads (context parallelism, activation checkpointing, FSDP) and the mesh of each
level. A switch assigns a few attributes: no group is made, nothing is rebuilt (paper 3.3).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hbp_titan.distributed.activation_checkpoint import ActivationCheckpointState
from hbp_titan.distributed.context_parallel import ContextParallelState
from hbp_titan.distributed.fsdp import ReshardState
from hbp_titan.distributed.mesh import LevelMeshes
from hbp_titan.packing.level import Level


class LevelRuntime:
    """Holds the active level; `activate` is called before each iteration.

    reshard_after_forward: the run's, for levels without their own.
    """

    def __init__(
        self,
        levels: Sequence[Level],
        meshes: LevelMeshes,
        num_layers: int,
        num_kv_heads: int,
        reshard_after_forward: bool | int = True,
    ) -> None:
        self.levels = tuple(levels)
        self.meshes = [meshes.of(level.cp_shape(num_kv_heads)) for level in levels]
        self.num_layers = num_layers
        self.cp_state = ContextParallelState()
        self.ac_state = ActivationCheckpointState()
        self.reshard_default = reshard_after_forward
        self.reshard_state = ReshardState({level.resharded(reshard_after_forward) for level in levels})
        self.active: int | None = None

    def activate(self, index: int) -> None:
        """Make level `index` the one that the next forward and backward run."""
        level = self.levels[index]
        self.cp_state.use(self.meshes[index])
        self.ac_state.policy = level.ac_policy
        self.ac_state.layers = self.num_layers if level.ac_layers is None else level.ac_layers
        # Without a backward nothing would free what a forward keeps, and the next level might need the memory.
        self.reshard_state.use(level.resharded(self.reshard_default) if torch.is_grad_enabled() else True)
        self.active = index
