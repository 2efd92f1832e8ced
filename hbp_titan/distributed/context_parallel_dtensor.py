"""The exchanges of context parallelism as DTensor placements: the reference for context_parallel.py.

Owns the placements of queries, keys, values and outputs on a level's (gather, ulysses) mesh, from which DTensor derives
the collectives and their gradients. Slower (one collective per tensor, no overlap, not compiled), but it needs none of
the functional collectives that the fast path calls. Selected by parallelism.cp_backend = "dtensor".

Shape suffixes as in context_parallel.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from hbp_titan.distributed.context_parallel import ContextParallelAttention, KeysValues
from hbp_titan.models.documents import Documents, HeadTailShard

AXES = ("gather", "ulysses")
# Placements on these axes of tensors [T, heads, D]: dim 0 is the sequence, dim 1 the heads.
SEQUENCE_SHARD = (Shard(0), Shard(0))
HEADS_OF_GROUP = (Shard(0), Shard(1))
HEADS_OF_ALL = (Replicate(), Shard(1))


class DTensorContextParallelAttention(ContextParallelAttention):
    """ContextParallelAttention whose exchanges redistribute DTensors."""

    def start(self, k_SKD: Tensor, v_SKD: Tensor, documents: Documents | HeadTailShard) -> KeysValues:
        return DTensorKeysValues(self, k_SKD, v_SKD, documents)

    def scatter_queries(self, q_SND: Tensor) -> Tensor:
        # [S, N, D] -> [T, N/C, D]
        return redistribute(q_SND, self.mesh, SEQUENCE_SHARD, HEADS_OF_GROUP)

    def gather_heads(self, o_TND: Tensor) -> Tensor:
        # [T, N/C, D] -> [S, N, D]
        return redistribute(o_TND, self.mesh, HEADS_OF_GROUP, SEQUENCE_SHARD)

    @property
    def mesh(self) -> DeviceMesh:
        """The active level's cp mesh, with the axes whose degree is above 1."""
        assert self.state.mesh is not None
        return self.state.mesh


class DTensorKeysValues(KeysValues):
    """Keys and values that have arrived as soon as the object exists."""

    def __init__(
        self,
        attention: DTensorContextParallelAttention,
        k_SKD: Tensor,
        v_SKD: Tensor,
        documents: Documents | HeadTailShard,
    ) -> None:
        self.documents, self.window = documents, attention.window
        # DTensor cannot shard fewer kv heads than ranks evenly.
        repeats = max(attention.state.ulysses_degree // k_SKD.shape[1], 1)
        # [S, K, D] -> [T, K/C, D]
        sequence = [
            redistribute(x.repeat_interleave(repeats, dim=1), attention.mesh, SEQUENCE_SHARD, HEADS_OF_GROUP)
            for x in (k_SKD, v_SKD)
        ]
        if isinstance(documents, HeadTailShard):
            # [C * S, K/C, D] -> [T, K/C, D]. Each rank's queries contribute to the gradient of all keys.
            gradient = (Partial(), Shard(1))
            sequence = [redistribute(x, attention.mesh, HEADS_OF_GROUP, HEADS_OF_ALL, gradient) for x in sequence]
        self.k_TKD, self.v_TKD = sequence

    def sequence(self) -> tuple[Tensor, Tensor]:
        return self.k_TKD, self.v_TKD

    def passes(self) -> list[tuple[Tensor, Tensor]]:
        assert isinstance(self.documents, HeadTailShard)
        parts = self.documents.passes(self.window)
        return [(self.k_TKD[part.key_rows], self.v_TKD[part.key_rows]) for part in parts]


def redistribute(
    local: Tensor,
    mesh: DeviceMesh,
    source: Sequence[Placement],
    target: Sequence[Placement],
    gradient: Sequence[Placement] | None = None,
) -> Tensor:
    """Return this rank's part of a tensor after redistribution from `source` to `target` placements.

    gradient: placements of the result's gradient; those of `target` unless given.
    """

    def on_mesh(placements: Sequence[Placement]) -> list[Placement]:
        axes = mesh.mesh_dim_names or ()
        return [placement for axis, placement in zip(AXES, placements, strict=True) if axis in axes]

    placed = DTensor.from_local(local, mesh, on_mesh(source), run_check=False).redistribute(placements=on_mesh(target))
    return placed.to_local(grad_placements=on_mesh(gradient) if gradient else None)
