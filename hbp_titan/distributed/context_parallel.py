"""Context parallelism over packed documents: attention sees whole documents, everything else a sequence shard.

Owns the exchange of q, k, v and o between the cp ranks (Ulysses: arXiv 2309.14509) and the check that a cp
degree fits the heads. The active degree and group are read at each forward, so that a level swap costs nothing.

Shape suffixes: T tokens of the pack, S = T/CP tokens of a rank's shard, N query heads, K key/value heads,
D head dim, C cp ranks, H = (N + 2K)/C heads that travel to one rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed._functional_collectives import all_to_all_single_autograd, wait_tensor

from hbp_titan.models.decoder import Decoder
from hbp_titan.packing.level import Level


@dataclass
class ContextParallelState:
    """What the attention layers read: the cp group of the active level, None where cp_degree is 1."""

    degree: int = 1
    group: ProcessGroup | None = None


class UlyssesAttention(nn.Module):
    """Wraps a model's inner attention: heads are scattered and the sequence gathered around it.

    forward takes q [S, N, D] and k, v [S, K, D], the rank's contiguous sequence shard, and the cu_seqlens of the
    whole pack; returns o [S, N, D]. With degree 1 it is the inner attention itself.
    """

    def __init__(self, inner: nn.Module, state: ContextParallelState) -> None:
        super().__init__()
        self.inner = inner
        self.state = state

    def forward(self, q_SND: Tensor, k_SKD: Tensor, v_SKD: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        degree, group = self.state.degree, self.state.group
        if group is None:
            return self.inner(q_SND, k_SKD, v_SKD, cu_seqlens, max_seqlen)
        q_TND, k_TKD, v_TKD = scatter_heads(q_SND, k_SKD, v_SKD, degree, group)
        o_TND = self.inner(q_TND, k_TKD, v_TKD, cu_seqlens, max_seqlen)
        return gather_heads(o_TND, degree, group)


def scatter_heads(
    q_SND: Tensor, k_SKD: Tensor, v_SKD: Tensor, degree: int, group: ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """Sequence shards with all heads -> the whole sequence with this rank's heads; one collective for q, k and v.

    Fewer kv heads than ranks are repeated, so that each rank holds the kv head that its query heads use.
    Returns q [T, N/C, D], k and v [T, max(K, C)/C, D].
    """
    num_kv_heads = k_SKD.shape[1]
    if num_kv_heads < degree:
        k_SKD = k_SKD.repeat_interleave(degree // num_kv_heads, dim=1)
        v_SKD = v_SKD.repeat_interleave(degree // num_kv_heads, dim=1)
    # [S, N, D] -> [S, C, N/C, D]: consecutive heads go to the same rank; q, k, v side by side on the head dim.
    parts = [x.unflatten(1, (degree, -1)) for x in (q_SND, k_SKD, v_SKD)]
    # [S, C, H, D] -> [C, S, H, D] -> all-to-all over dim 0 -> [C, S, H, D], now dim 0 is the sequence -> [T, H, D]
    qkv_CSHD = torch.cat(parts, dim=2).transpose(0, 1).contiguous()
    qkv_THD = _all_to_all(qkv_CSHD, group).flatten(0, 1)
    q_TND, k_TKD, v_TKD = qkv_THD.split([part.shape[2] for part in parts], dim=1)
    return q_TND, k_TKD, v_TKD


def gather_heads(o_TND: Tensor, degree: int, group: ProcessGroup) -> Tensor:
    """The whole sequence with this rank's heads -> this rank's sequence shard with all heads, [S, N, D]."""
    # [T, N/C, D] -> [C, S, N/C, D] -> all-to-all -> [C, S, N/C, D], now dim 0 is the heads -> [S, C, N/C, D]
    o_CSND = o_TND.unflatten(0, (degree, -1)).contiguous()
    return _all_to_all(o_CSND, group).transpose(0, 1).flatten(1, 2)


def _all_to_all(x: Tensor, group: ProcessGroup) -> Tensor:
    return wait_tensor(all_to_all_single_autograd(x, None, None, group))


def apply_context_parallel(model: Decoder, state: ContextParallelState) -> None:
    """Wrap the inner attention of every layer of `model` (blocks in `model.layers`)."""
    for block in model.blocks():
        block.inner_attention = UlyssesAttention(block.inner_attention, state)


def check_heads(levels: Sequence[Level], num_heads: int, num_kv_heads: int) -> None:
    """Raise ValueError where a level's cp_degree does not fit the model's heads."""
    for level in levels:
        cp = level.cp_degree
        where = f"the level with max_tokens={level.max_tokens}: change levels.cp_degree"
        if num_heads % cp:
            raise ValueError(f"cp_degree={cp} does not divide the model's {num_heads} attention heads in {where}")
        if num_kv_heads % cp and cp % num_kv_heads:
            raise ValueError(
                f"cp_degree={cp} neither divides the model's {num_kv_heads} kv heads nor is a multiple of them in "
                f"{where}"
            )
