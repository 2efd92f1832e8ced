"""LevelRuntime: what a level swap changes, and the swap itself.

Owns the states that the wrapped model reads (context parallelism, activation checkpointing) and the mesh of each
level. A swap assigns a few attributes: no group is made, nothing is rebuilt (paper 3.3).
"""

from __future__ import annotations

from collections.abc import Sequence

from hbp_titan.distributed.activation_checkpoint import ActivationCheckpointState
from hbp_titan.distributed.context_parallel import ContextParallelState
from hbp_titan.distributed.mesh import LevelMeshes
from hbp_titan.packing.level import Level


class LevelRuntime:
    """Holds the active level; `activate` is called before each iteration."""

    def __init__(self, levels: Sequence[Level], meshes: LevelMeshes, num_layers: int, num_kv_heads: int) -> None:
        self.levels = tuple(levels)
        self.meshes = [meshes.of(level.cp_shape(num_kv_heads)) for level in levels]
        self.num_layers = num_layers
        self.cp_state = ContextParallelState()
        self.ac_state = ActivationCheckpointState()
        self.active: int | None = None

    def activate(self, index: int) -> None:
        """Make level `index` the one that the next forward and backward run."""
        level = self.levels[index]
        self.cp_state.use(self.meshes[index])
        self.ac_state.policy = level.ac_policy
        self.ac_state.layers = self.num_layers if level.ac_layers is None else level.ac_layers
        self.active = index
