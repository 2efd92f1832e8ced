"""Process groups of the meshes: how many a run makes, shares and destroys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from hbp_titan.config import load_config
from hbp_titan.distributed.mesh import LevelMeshes, cross_node_warnings, destroy_unused_groups
from hbp_titan.distributed.world import World, fake_world
from hbp_titan.engine import parallelized_on_meta
from hbp_titan.packing import Level
from hbp_titan.preflight import model_args
from hbp_titan.testing.local_ranks import run_distributed
from tests.checkout import ROOT


def _count_new_groups(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    calls: list[Any] = []
    original: Callable[..., Any] = distributed_c10d.new_group

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return original(*args, **kwargs)

    for module in (dist, distributed_c10d, torch.distributed.device_mesh):
        monkeypatch.setattr(module, "new_group", counted)
    return calls


@pytest.mark.parametrize(
    ("preset", "expected"), [("llama3_1_8b_hbp", ["exchange_8x1", "reduce_256x1"]), ("deepseek_v2_236b_hbp", None)]
)
def test_256_ranks_make_one_group_per_communicating_axis(
    preset: str, expected: list[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The 8B preset has three communicators per rank: the default group, cp 8, reductions. With init_device_mesh per
    # level it would be 808 calls of new_group and six communicators.
    calls = _count_new_groups(monkeypatch)
    config = load_config(["--job.config_file", str(ROOT / "train_configs" / f"{preset}.toml")])
    args = replace(model_args(config), num_layers=3)
    with fake_world(256, torch.device("cuda")) as world:
        parallelized_on_meta(config, args, world, torch.device("cpu"))
        made = [group.group_desc for group in distributed_c10d._world.pg_map][1:]
        assert len(calls) == len(made) <= 5
        assert expected is None or made == expected
        # A second engine makes no group.
        parallelized_on_meta(config, args, world, torch.device("cpu"))
        assert len(calls) == len(made)


def _sums(mesh: Any, rank: int) -> list[float]:
    """Return the sum of rank numbers over each axis of a mesh."""
    sums = []
    for axis in mesh.mesh_dim_names:
        value = torch.tensor([float(rank)])
        dist.all_reduce(value, group=mesh.get_group(axis))
        sums.append(value.item())
    return sums


def _shared_and_remade(world: World) -> dict[str, Any]:
    def groups() -> int:
        return len(distributed_c10d._world.pg_map)

    meshes = LevelMeshes(world.device, 4, [(1, 1), (1, 2), (2, 2), (4, 1)], expert_parallel=2)
    first = groups()
    hybrid = meshes.mesh_for((2, 2))
    sums = _sums(hybrid, world.rank)
    experts = _sums(meshes.experts, world.rank)
    LevelMeshes(world.device, 4, [(2, 2)])
    again = groups()
    destroy_unused_groups([(1, 2)], expert_parallel=1)
    kept = groups()
    remade = LevelMeshes(world.device, 4, [(2, 2), (1, 2)])
    return {
        "groups": [first, again, kept, groups()],
        "sums": sums,
        "after": _sums(remade.mesh_for((2, 2)), world.rank),
        "experts": experts,
    }


def test_groups_are_shared_destroyed_and_made_again() -> None:
    for rank, found in enumerate(run_distributed(_shared_and_remade, 4)):
        near, far = rank + (rank ^ 1), rank + (rank ^ 2)
        assert found["sums"] == found["after"] == [far, near]
        assert found["experts"] == [far, near]
        # Default, control; near pairs (cp and experts alike), far pairs, all four; sharded experts.
        assert found["groups"] == [6, 6, 4, 5]


def test_warnings_for_groups_across_nodes() -> None:
    levels = [Level(48, degree) for degree in (1, 2, 8, 16, 3)]
    (warning,) = cross_node_warnings(levels, 8, ranks_per_node=8)
    assert "cp_degree 3, 16 " in warning
    (warning,) = cross_node_warnings(levels[:3], 16, ranks_per_node=8)
    assert "expert_parallel_degree 16 " in warning
    assert cross_node_warnings(levels[:3], 4, ranks_per_node=8) == []
