"""Context parallelism over packed documents: attention sees whole documents, everything else a sequence shard.

Owns the exchanges between the cp ranks and the check that a cp degree fits the heads. A level's cp ranks form
gather_degree groups of ulysses_degree ranks (Level.cp_shape), and attention runs through two optional layers:

    inside a group    Ulysses (arXiv 2309.14509): all-to-alls give each rank the group's sequence for some of the heads
    between groups    keys and values are all-gathered (arXiv 2407.21783, section 3.3.2), queries stay; backward
                      reduce-scatters their gradients. The groups hold head-tail shards (data/sequence_shard.py), so
                      their causal work is even

"ulysses" is the first alone, "allgather" the second alone, "hybrid" both. The active groups are read at each forward,
so that a level swap costs nothing. context_parallel_dtensor.py declares the same exchanges as DTensor placements.

Shape suffixes: T tokens of the pack (of the group's shard inside Ulysses), S tokens of a rank's shard, N query heads,
K key/value heads, D head dim, C ranks of a group, H = (N + 2K)/C heads that travel to one rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed import _functional_collectives as collectives
from torch.distributed._functional_collectives import all_to_all_single_autograd, wait_tensor
from torch.distributed.device_mesh import DeviceMesh

from hbp_titan.data.sequence_shard import HeadTailShard
from hbp_titan.packing.level import Level

# torch 2.13 has it under the first name and warns at the second, the only one of older versions.
_gather_autograd = getattr(collectives, "all_gather_single_autograd", None) or collectives.all_gather_tensor_autograd


@dataclass
class ContextParallelState:
    """What the attention layers read: the active cp mesh (`LevelMeshes.of`) and its groups, None of degree 1."""

    ulysses_degree: int = 1
    ulysses_group: ProcessGroup | None = None
    gather_group: ProcessGroup | None = None
    mesh: DeviceMesh | None = None

    def use(self, mesh: DeviceMesh | None) -> None:
        """Make the groups of a cp mesh, None at cp 1, the active ones."""
        self.mesh = mesh
        axes = mesh.mesh_dim_names if mesh is not None and mesh.mesh_dim_names else ()
        groups = {axis: mesh.get_group(axis) for axis in axes} if mesh is not None else {}
        self.ulysses_group, self.gather_group = groups.get("ulysses"), groups.get("gather")
        self.ulysses_degree = self.ulysses_group.size() if self.ulysses_group is not None else 1

    def sum(self, x: Tensor) -> Tensor:
        """`x` added up over the cp ranks, without a gradient."""
        for group in (self.ulysses_group, self.gather_group):
            if group is not None:
                x = wait_tensor(collectives.all_reduce(x, "sum", group))
        return x


class ContextParallelAttention(nn.Module):
    """Wraps a model's inner attention with the exchanges that the active level asks for; without any it is that.

    forward takes q [S, N, D] and k, v [S, K, D] of the rank's sequence shard, and the documents of the whole pack
    (PackedBatch.documents): a HeadTailShard where keys and values are gathered, else cu_seqlens. Returns o [S, N, D].
    """

    def __init__(self, inner: nn.Module, state: ContextParallelState) -> None:
        super().__init__()
        self.inner = inner
        self.state = state

    def forward(
        self, q_SND: Tensor, k_SKD: Tensor, v_SKD: Tensor, documents: Tensor | HeadTailShard, max_seqlen: int
    ) -> Tensor:
        scatters, gathers = self.state.ulysses_group is not None, self.state.gather_group is not None
        if scatters:
            q_SND, k_SKD, v_SKD = self.scatter_heads(q_SND, k_SKD, v_SKD)
        if gathers:
            assert isinstance(documents, HeadTailShard)
            k_TKD, v_TKD = self.gather_sequence(k_SKD, v_SKD)
            o_SND = attend_shard(self.inner, q_SND, k_TKD, v_TKD, documents, max_seqlen)
        else:
            o_SND = self.inner(q_SND, k_SKD, v_SKD, documents, max_seqlen)
        return self.gather_heads(o_SND) if scatters else o_SND

    def scatter_heads(self, q_SND: Tensor, k_SKD: Tensor, v_SKD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sequence shards with all heads -> the group's sequence with this rank's heads; one collective for all three.

        Fewer kv heads than ranks are repeated, so that each rank holds the kv head that its query heads use.
        Returns q [T, N/C, D], k and v [T, max(K, C)/C, D].
        """
        degree, num_kv_heads = self.state.ulysses_degree, k_SKD.shape[1]
        if num_kv_heads < degree:
            k_SKD = k_SKD.repeat_interleave(degree // num_kv_heads, dim=1)
            v_SKD = v_SKD.repeat_interleave(degree // num_kv_heads, dim=1)
        # [S, N, D] -> [S, C, N/C, D]: consecutive heads go to the same rank; q, k, v side by side on the head dim.
        parts = [x.unflatten(1, (degree, -1)) for x in (q_SND, k_SKD, v_SKD)]
        # [S, C, H, D] -> [C, S, H, D] -> all-to-all over dim 0 -> [C, S, H, D], now dim 0 is the sequence -> [T, H, D]
        qkv_CSHD = torch.cat(parts, dim=2).transpose(0, 1).contiguous()
        qkv_THD = self.all_to_all(qkv_CSHD).flatten(0, 1)
        q_TND, k_TKD, v_TKD = qkv_THD.split([part.shape[2] for part in parts], dim=1)
        return q_TND, k_TKD, v_TKD

    def gather_heads(self, o_TND: Tensor) -> Tensor:
        """The group's sequence with this rank's heads -> this rank's sequence shard with all heads, [S, N, D]."""
        # [T, N/C, D] -> [C, S, N/C, D] -> all-to-all -> [C, S, N/C, D], now dim 0 is the heads -> [S, C, N/C, D]
        o_CSND = o_TND.unflatten(0, (self.state.ulysses_degree, -1)).contiguous()
        return self.all_to_all(o_CSND).transpose(0, 1).flatten(1, 2)

    def gather_sequence(self, k_SKD: Tensor, v_SKD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a shard -> of all shards, end to end, [T, K, D] each; one collective for both."""
        # [S, K, D] twice -> [S, 2K, D] -> all-gather -> [T, 2K, D]
        k_TKD, v_TKD = self.all_gather(torch.cat([k_SKD, v_SKD], dim=1)).chunk(2, dim=1)
        return k_TKD, v_TKD

    def all_to_all(self, x: Tensor) -> Tensor:
        """Part i of dim 0 goes to rank i of the Ulysses group; differentiable."""
        assert self.state.ulysses_group is not None
        return wait_tensor(all_to_all_single_autograd(x, None, None, self.state.ulysses_group))

    def all_gather(self, x: Tensor) -> Tensor:
        """The parts of all ranks of the gather group, end to end on dim 0; differentiable."""
        assert self.state.gather_group is not None
        return wait_tensor(_gather_autograd(x, 0, self.state.gather_group))


def attend_shard(
    inner: nn.Module, q_SND: Tensor, k_TKD: Tensor, v_TKD: Tensor, shard: HeadTailShard, max_seqlen: int
) -> Tensor:
    """Attention of a head-tail shard's queries to the keys and values of all shards end to end; returns o [S, N, D].

    Heads and tails are two passes because they share keys.
    """
    k_TKD, v_TKD = (x.index_select(0, shard.kv_order) for x in (k_TKD, v_TKD))
    # A chunk is at most as long as one of a single document: the longest head there can be.
    longest = (len(q_SND) + 1) // 2
    head_SND, tail_SND = q_SND.split([longest, len(q_SND) - longest])
    return torch.cat(
        [
            inner(head_SND, k_TKD, v_TKD, shard.head_q, longest, shard.head_k, max_seqlen),
            inner(tail_SND, k_TKD, v_TKD, shard.tail_q, longest, shard.tail_k, max_seqlen),
        ]
    )


def check_heads(levels: Sequence[Level], num_heads: int, num_kv_heads: int) -> None:
    """Raise ValueError where the cp_degree of a level of style "ulysses" does not fit the model's heads."""
    for level in levels:
        if level.cp_style != "ulysses":
            continue
        cp = level.cp_degree
        where = f'the level with max_tokens={level.max_tokens}: change levels.cp_degree, or cp_style to "hybrid"'
        if num_heads % cp:
            raise ValueError(f"cp_degree={cp} does not divide the model's {num_heads} attention heads in {where}")
        if num_kv_heads % cp and cp % num_kv_heads:
            raise ValueError(
                f"cp_degree={cp} neither divides the model's {num_kv_heads} kv heads nor is a multiple of them in "
                f"{where}"
            )
