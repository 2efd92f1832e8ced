"""Each cp style over gloo ranks against the same attention on one process, forward and backward."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hbp_titan.data.batch import PackedBatch, shard_batch
from hbp_titan.distributed.context_parallel import ContextParallelState, check_heads
from hbp_titan.distributed.mesh import LevelMeshes
from hbp_titan.distributed.parallelize import cp_attention
from hbp_titan.distributed.world import World
from hbp_titan.engine import LevelRuntime
from hbp_titan.models.attention import VarlenAttention
from hbp_titan.models.documents import Documents, HeadTailShard, head_tail_shard, pack_documents
from hbp_titan.packing import Level
from hbp_titan.testing.local_ranks import run_distributed

# Four ranks have 15 tokens each: 8 of heads and 7 of tails.
T = 60
DOCUMENTS = {
    "uneven": [1, 13, 1, 26, 19],
    "one document": [60],
    "single tokens": [1] * 60,
    "shorter than the chunks are many": [2, 3, 4, 5, 6, 7, 33],
    "longer than a window": [33, 7, 20],
    "one window of a document": [60],
}
WINDOWS = {name: 5 if "window" in name else None for name in DOCUMENTS}


def _inputs(num_heads: int, num_kv_heads: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_heads * 100 + num_kv_heads)
    shapes = ((T, num_heads, 8), (T, num_kv_heads, 8), (T, num_kv_heads, 8), (T, num_heads, 8))
    q_TND, k_TKD, v_TKD, grad_TND = (torch.randn(shape, generator=generator) for shape in shapes)
    return q_TND, k_TKD, v_TKD, grad_TND


def _attend(
    attention: torch.nn.Module,
    tokens: Tensor,
    documents: Documents | HeadTailShard,
    num_heads: int,
    num_kv_heads: int,
) -> list[Tensor]:
    """Return output and gradients of q, k, v of the shard with `tokens`, for a given gradient of the output."""
    *inputs, grad_TND = (x[tokens] for x in _inputs(num_heads, num_kv_heads))
    leaves = [x.clone().requires_grad_() for x in inputs]
    o_TND = attention(*leaves, documents)
    o_TND.backward(grad_TND)
    return [o_TND.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def _numbered_pack(lengths: list[int]) -> PackedBatch:
    """Return a pack whose input_ids are the positions in the pack."""
    ids, share = torch.zeros(T, dtype=torch.int64), torch.ones(len(lengths))
    documents, none = pack_documents(lengths), np.zeros(0, np.int64)
    whole = (documents, torch.ones(T), torch.arange(T), 0, T, T, none, np.array(lengths), ids, share)
    return PackedBatch(*[torch.arange(T)] * 3, *whole)


CASES = {
    1: [("ulysses", 1, [(4, 2)]), ("allgather", 1, [(4, 2)])],
    2: [
        ("ulysses", 1, [(4, 2)]),
        ("ulysses", 2, [(4, 4), (8, 2), (4, 1)]),
        ("allgather", 2, [(4, 4), (8, 2), (3, 1)]),
        ("hybrid", 2, [(4, 4), (3, 1)]),
    ],
    3: [("ulysses", 3, [(6, 3), (3, 1)]), ("allgather", 3, [(4, 2)]), ("hybrid", 3, [(4, 2)])],
    4: [
        ("ulysses", 2, [(8, 2)]),
        ("ulysses", 4, [(4, 4), (8, 2), (8, 8), (4, 1)]),
        ("allgather", 2, [(8, 2)]),
        ("allgather", 4, [(4, 4), (8, 2), (3, 3), (6, 2), (5, 1)]),
        ("hybrid", 4, [(4, 4), (8, 2), (6, 2), (6, 6), (3, 1)]),
    ],
}
"""World size -> (style, cp degree, [(query heads, kv heads)])."""


def _rank(world: World, backend: str) -> dict[object, list[Tensor]]:
    """Return tokens, output and gradients of this rank's shard for each case, one level switch after another."""
    state = ContextParallelState()
    attention = {window: cp_attention(backend)(VarlenAttention(None, window), state) for window in {*WINDOWS.values()}}
    # DTensor does each exchange in many small steps: only the reference's first layouts of each form.
    most = 2 if backend == "dtensor" else None
    cases = [(Level(T, degree, style), x) for style, degree, layouts in CASES[world.size] for x in layouts[:most]]
    meshes = LevelMeshes(world.device, world.size, [level.cp_shape(layout[1]) for level, layout in cases])
    results: dict[object, list[Tensor]] = {}
    for level, layout in cases:
        shape = level.cp_shape(layout[1])
        state.set_mesh(meshes.mesh_for(shape))
        for name, window in WINDOWS.items():
            cp_rank = world.rank % level.cp_degree
            # Layers with and without a window share the batches of a model.
            batch = shard_batch(_numbered_pack(DOCUMENTS[name]), cp_rank, level.cp_degree, shape[0], window=5)
            outcome = _attend(attention[window], batch.input_ids, batch.documents, *layout)
            results[level.cp_style, level.cp_degree, layout, name] = [batch.input_ids, *outcome]
    return results


@pytest.mark.parametrize("backend", ["fused", "dtensor"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_shards_equal_unsharded_attention(world_size: int, backend: str) -> None:
    results = run_distributed(_rank, world_size, backend)
    for case in results[0]:
        _, degree, layout, name = case
        whole = VarlenAttention(None, WINDOWS[name])
        expected = _attend(whole, torch.arange(T), pack_documents(DOCUMENTS[name]), *layout)
        for first in range(0, world_size, degree):
            parts = [results[first + cp_rank][case] for cp_rank in range(degree)]
            tokens, *found = (torch.cat(pieces) for pieces in zip(*parts, strict=True))
            assert sorted(tokens.tolist()) == list(range(T))
            assert len(found) == 4
            ordered = [x[tokens.argsort()] for x in found]
            torch.testing.assert_close(ordered, expected, rtol=1e-5, atol=1e-5, msg=str(case))


def _in_bfloat16(world: World) -> list[list[Tensor]]:
    """Return tokens of this rank and gradients of its q, k, v by style, for 32 short documents shared by all ranks."""
    attention = cp_attention("fused")(VarlenAttention(), state := ContextParallelState())
    shapes = [Level(1024, 4, style).cp_shape(2) for style in ("ulysses", "hybrid", "allgather")]
    meshes = LevelMeshes(world.device, world.size, shapes)
    results = []
    for gather_degree, ulysses_degree in shapes:
        state.set_mesh(meshes.mesh_for((gather_degree, ulysses_degree)))
        group, part = divmod(world.rank, ulysses_degree)
        positions, documents = np.arange(1024), pack_documents(np.full(32, 32))
        if gather_degree > 1:
            positions, documents = head_tail_shard(np.full(32, 32), group, gather_degree)
        positions = positions[part * 256 : (part + 1) * 256]
        leaves = [x[positions].requires_grad_() for x in _bfloat16_inputs()]
        attention(*leaves, documents).square().sum().backward()
        results.append([torch.from_numpy(positions), *(leaf.grad for leaf in leaves if leaf.grad is not None)])
    return results


def _bfloat16_inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1024, heads, 16, generator=generator).bfloat16() for heads in (4, 2, 2)]


def test_bfloat16_gradients_are_as_exact_as_on_one_rank() -> None:
    whole = pack_documents(np.full(32, 32))
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        leaves = [x.to(dtype).requires_grad_() for x in _bfloat16_inputs()]
        VarlenAttention()(*leaves, whole).square().sum().backward()
        gradients.append([leaf.grad.float() for leaf in leaves if leaf.grad is not None])
    for parts in zip(*run_distributed(_in_bfloat16, 4), strict=True):
        tokens, *found = (torch.cat(pieces) for pieces in zip(*parts, strict=True))
        for shared, wanted, alone in zip(found, *gradients, strict=True):
            assert shared.dtype == torch.bfloat16
            error = (shared[tokens.argsort()].float() - wanted).norm()
            # Parts are rounded once by their kernel and their fp32 sum once, alone the sum only: sqrt(2) times as much.
            # Sums in bfloat16 of eight parts would round seven times more.
            assert error <= 1.5 * (alone - wanted).norm()


def test_cp_ranks_are_adjacent_and_level_switches_make_no_groups() -> None:
    for rank, (groups, new_groups) in enumerate(run_distributed(_switch, 4)):
        # Ulysses groups, then gather groups: in hybrid {0, 1} and {2, 3} scatter heads, {0, 2} and {1, 3} gather.
        near, far = sorted([rank, rank ^ 1]), sorted([rank, rank ^ 2])
        everyone = [0, 1, 2, 3]
        assert groups == [([], []), (near, []), (everyone, []), ([], everyone), (near, far), ([], [])]
        assert new_groups == 0


def _switch(world: World) -> tuple[list[tuple[list[int], list[int]]], int]:
    """Return the ranks of the (Ulysses, gather) groups after each switch, and the number of new groups."""
    levels = [Level(16), Level(24, 2), Level(32, 4), Level(64, 4, "allgather"), Level(128, 4, "hybrid")]
    meshes = LevelMeshes(world.device, world.size, [level.cp_shape(2) for level in levels])
    runtime = LevelRuntime(levels, meshes, num_layers=1, num_kv_heads=2)
    before = dist.distributed_c10d.get_pg_count()
    groups = []
    for index in (0, 1, 2, 3, 4, 0):
        runtime.activate(index)
        state = runtime.cp_state
        active = [dist.get_process_group_ranks(g) if g else [] for g in (state.ulysses_group, state.gather_group)]
        groups.append((active[0], active[1]))
    return groups, dist.distributed_c10d.get_pg_count() - before


@pytest.mark.parametrize(
    ("cp_degree", "style", "num_kv_heads", "shape"),
    [
        (8, "ulysses", 2, (1, 8)),
        (8, "allgather", 8, (8, 1)),
        (8, "hybrid", 8, (1, 8)),
        (16, "hybrid", 8, (2, 8)),
        (6, "hybrid", 8, (3, 2)),
        (4, "hybrid", 1, (4, 1)),
    ],
)
def test_cp_shape(cp_degree: int, style: str, num_kv_heads: int, shape: tuple[int, int]) -> None:
    assert Level(48 * cp_degree, cp_degree, style).cp_shape(num_kv_heads) == shape


def test_heads_must_fit_the_cp_degree() -> None:
    check_heads([Level(128, 4, style) for style in ("allgather", "hybrid")], num_heads=6, num_kv_heads=3)
    for cp_degree, num_kv_heads in ((8, 8), (8, 2), (2, 8)):
        check_heads([Level(128, cp_degree)], num_heads=32, num_kv_heads=num_kv_heads)
    fitting = {(6, 2): "attention heads; use 1, 2, 6,", (24, 6): "kv heads .*; use 1, 2, 3, 6, 12, 24,"}
    for (num_heads, num_kv_heads), message in fitting.items():
        with pytest.raises(ValueError, match=message):
            check_heads([Level(64), Level(128, 4)], num_heads, num_kv_heads)
