"""Ulysses attention over gloo ranks against the same attention on one process, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hbp_titan.distributed.context_parallel import ContextParallelState, UlyssesAttention, check_heads
from hbp_titan.distributed.local_ranks import run_distributed
from hbp_titan.distributed.mesh import LevelMeshes, nodes_crossed
from hbp_titan.distributed.world import World
from hbp_titan.models.attention import VarlenAttention
from hbp_titan.packing import Level

T = 48
DOCUMENTS = {
    "uneven, with padding of cu_seqlens": [0, 1, 14, 15, 41, 48, 48, 48],
    "one document": [0, 48],
    "single tokens": list(range(49)),
}


def _inputs(num_heads: int, num_kv_heads: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_heads * 100 + num_kv_heads)
    shapes = ((T, num_heads, 8), (T, num_kv_heads, 8), (T, num_kv_heads, 8), (T, num_heads, 8))
    q_TND, k_TKD, v_TKD, grad_TND = (torch.randn(shape, generator=generator) for shape in shapes)
    return q_TND, k_TKD, v_TKD, grad_TND


def _attend(
    attention: torch.nn.Module, shard: slice, cu_seqlens: list[int], num_heads: int, num_kv_heads: int
) -> list[Tensor]:
    """Output and gradients of q, k, v of one shard, the output's gradient given."""
    *inputs, grad_TND = (x[shard] for x in _inputs(num_heads, num_kv_heads))
    leaves = [x.clone().requires_grad_() for x in inputs]
    o_TND = attention(*leaves, torch.tensor(cu_seqlens, dtype=torch.int32), T)
    o_TND.backward(grad_TND)
    return [o_TND.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def _rank(world: World, layouts: list[tuple[int, int]], degree: int) -> dict[object, list[Tensor]]:
    mesh = LevelMeshes(world.device, world.size, [degree]).of(degree)
    state = ContextParallelState(degree, mesh.get_group("cp") if degree > 1 else None)
    attention = UlyssesAttention(VarlenAttention(), state)
    cp_rank = mesh.get_local_rank("cp")
    shard = slice(cp_rank * T // degree, (cp_rank + 1) * T // degree)
    return {
        (layout, name): _attend(attention, shard, cu_seqlens, *layout)
        for layout in layouts
        for name, cu_seqlens in DOCUMENTS.items()
    }


@pytest.mark.parametrize(
    ("world_size", "degree", "layouts"),
    [
        (2, 1, [(4, 2)]),
        (2, 2, [(4, 4), (8, 2), (4, 1)]),
        (4, 2, [(8, 2)]),
        (4, 4, [(4, 4), (8, 2), (8, 8), (4, 1)]),
    ],
)
def test_shards_of_ulysses_equal_the_whole_attention(
    world_size: int, degree: int, layouts: list[tuple[int, int]]
) -> None:
    results = run_distributed(_rank, world_size, layouts, degree)
    for layout in layouts:
        for name, cu_seqlens in DOCUMENTS.items():
            expected = _attend(VarlenAttention(), slice(None), cu_seqlens, *layout)
            for first in range(0, world_size, degree):
                parts = [results[first + cp_rank][layout, name] for cp_rank in range(degree)]
                found = [torch.cat(pieces) for pieces in zip(*parts, strict=True)]
                assert len(found) == 4
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, msg=f"{layout} {name}")


def test_cp_ranks_are_adjacent_and_groups_are_shared_by_degree() -> None:
    assert run_distributed(_coordinates, 4) == [(0, 0), (0, 1), (1, 0), (1, 1)]


def _coordinates(world: World) -> tuple[int, int]:
    meshes = LevelMeshes(world.device, world.size, [2, 2, 1])
    assert meshes.of(2) is meshes.of(2)
    return meshes.of(2).get_local_rank("dp"), meshes.of(2).get_local_rank("cp")


@pytest.mark.parametrize(
    ("cp_degree", "num_heads", "num_kv_heads", "message"),
    [
        (4, 6, 2, "cp_degree=4 does not divide the model's 6 attention heads"),
        (4, 24, 6, "cp_degree=4 neither divides the model's 6 kv heads nor is a multiple of them"),
    ],
)
def test_heads_that_do_not_fit_are_refused(cp_degree: int, num_heads: int, num_kv_heads: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_heads([Level(64), Level(128, cp_degree)], num_heads, num_kv_heads)


def test_kv_heads_may_be_fewer_or_more_than_ranks() -> None:
    check_heads([Level(128, 8)], num_heads=32, num_kv_heads=8)
    check_heads([Level(128, 8)], num_heads=32, num_kv_heads=2)
    check_heads([Level(128, 2)], num_heads=32, num_kv_heads=8)


def test_cp_groups_that_cross_a_node_are_named() -> None:
    assert nodes_crossed([1, 2, 8, 16, 3], ranks_per_node=8) == [3, 16]
