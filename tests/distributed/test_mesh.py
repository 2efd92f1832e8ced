"""Process groups: how many a run makes and shares; the control group."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from hbp_titan.config import load_config
from hbp_titan.distributed.mesh import LevelMeshes, destroy_unused_groups
from hbp_titan.distributed.world import (
    SLOW_WORK_SECONDS,
    World,
    any_rank,
    barrier,
    broadcast_value,
    check_same,
    control_group,
    fake_world,
    gather_values,
    new_group,
    set_timeouts,
)
from hbp_titan.engine import parallelized_on_meta
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
def test_256_ranks_make_one_group_for_each_axis_that_communicates(
    preset: str, expected: list[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The 8B preset: two calls of new_group, and three communicators of a rank: the default group's, cp 8, reductions.

    Before, with init_device_mesh for each level: 808 calls and six communicators, five of them with gloo as well. A run
    adds the control group and the checkpoint writer's.
    """
    calls = _count_new_groups(monkeypatch)
    config = load_config(["--job.config_file", str(ROOT / "train_configs" / f"{preset}.toml")])
    with fake_world(256, torch.device("cuda")) as world:
        parallelized_on_meta(config, model_args(config), world, torch.device("cpu"))
        made = [group.group_desc for group in distributed_c10d._world.pg_map][1:]
        assert len(calls) == len(made) <= 5
        assert expected is None or made == expected
        # An engine that is built again, after out of memory or a profile, makes none.
        parallelized_on_meta(config, model_args(config), world, torch.device("cpu"))
        assert len(calls) == len(made)


def _sums(mesh: Any, rank: int) -> list[float]:
    """The sum of rank numbers over each axis of a mesh."""
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


def test_groups_are_shared_by_place_destroyed_when_unused_and_made_again() -> None:
    for rank, found in enumerate(run_distributed(_shared_and_remade, 4)):
        near, far = rank + (rank ^ 1), rank + (rank ^ 2)
        assert found["sums"] == found["after"] == [far, near]
        assert found["experts"] == [far, near]
        # Default, control; near pairs (cp and experts alike), far pairs, all four; sharded experts.
        assert found["groups"] == [6, 6, 4, 5]


def _control(world: World) -> dict[str, Any]:
    found: dict[str, Any] = {"gathered": gather_values(world.rank), "broadcast": broadcast_value(world.rank + 7)}
    found["own"] = world.control is control_group() is not dist.group.WORLD
    found["any"] = [any_rank(world.rank == 1), any_rank(False)]
    barrier()
    timeouts = [world.control, dist.group.WORLD, new_group(backend="gloo")]
    found["timeouts"] = [_timeout(group) for group in timeouts]
    set_timeouts(40)
    found["timeouts after"] = [_timeout(group) for group in timeouts]
    check_same("a", "this")
    try:
        check_same("b" if world.rank == 2 else "a", "the plan of epoch 1")
    except ValueError as error:
        found["differs"] = str(error)
    return found


def _timeout(group: Any) -> float:
    return group._get_backend(torch.device("cpu")).options._timeout.total_seconds()


def test_the_control_group_agrees_on_objects_failures_and_plans() -> None:
    for found in run_distributed(_control, 3):
        assert (found["gathered"], found["broadcast"], found["own"]) == ([0, 1, 2], 7, True)
        assert found["any"] == [True, False]
        # run_distributed's own 120 s for every group that is made, then train_timeout_seconds.
        assert found["timeouts"] == [120, 120, 120]
        assert found["timeouts after"] == [SLOW_WORK_SECONDS, 40, 40]
        assert found["differs"].startswith(
            "the plan of epoch 1 is not the same on all ranks: rank 0 and rank 2 differ;"
        )


def _alone(world: World) -> float:
    started = time.monotonic()
    if world.rank == 0:
        with pytest.raises(RuntimeError):
            any_rank(True, timeout_seconds=1)
    else:
        time.sleep(3)
    taken = time.monotonic() - started
    # It cannot be used any more: the test ends in the default group.
    dist.destroy_process_group(world.control)
    return taken


def test_a_rank_that_others_do_not_answer_gives_up_at_its_deadline() -> None:
    assert 0.5 < run_distributed(_alone, 2)[0] < 2.9
