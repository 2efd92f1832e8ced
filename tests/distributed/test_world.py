"""Rendezvous of restarts, the control group, and the devices of a machine."""

from __future__ import annotations

import os
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hbp_titan.distributed import world
from hbp_titan.distributed.world import (
    SLOW_WORK_SECONDS,
    World,
    agree_on_prefix,
    any_rank,
    barrier,
    broadcast_value,
    check_same,
    control_group,
    gather_values,
    new_group,
    set_flight_recorder,
    set_timeouts,
    worker_group,
)
from hbp_titan.testing.local_ranks import run_distributed

TIMEOUT = timedelta(seconds=20)


def _start(store: dist.Store, ranks: list[int], found: dict[int, str], world_size: int) -> list[threading.Thread]:
    def join(rank: int) -> None:
        found[rank] = agree_on_prefix(store, rank, world_size, TIMEOUT)

    threads = [threading.Thread(target=join, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    return threads


@pytest.mark.parametrize("first", [[0, 1, 2], [1, 2, 0]])
def test_every_start_agrees_on_one_new_prefix(first: list[int]) -> None:
    store = dist.HashStore()
    names = set()
    for _ in range(4):
        found: dict[int, str] = {}
        threads = _start(store, first[:1], found, 3)
        # The other ranks come later, so the first one reads keys of the previous start for a while.
        time.sleep(0.2)
        for thread in [*threads, *_start(store, first[1:], found, 3)]:
            thread.join(30)
        assert len(found) == 3
        assert len(set(found.values())) == 1
        names |= set(found.values())
    assert len(names) == 4


def test_starts_by_one_torchrun_share_a_job_id(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(store: dist.Store) -> str:
        monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(store, 0, 1)]))
        return world._store_for_this_start(0, 1, TIMEOUT)[1]

    store = dist.HashStore()
    assert start(store) == start(store) != start(dist.HashStore())


def test_start_after_a_failed_rendezvous() -> None:
    store = dist.HashStore()
    # Rank 0 was killed after its offer, rank 1 after it had joined.
    store.set("hbp_titan/offer", "gone")
    store.set("hbp_titan/gone/1", "dead")
    store.set("hbp_titan/gone", '["dead"]')
    found: dict[int, str] = {}
    threads = _start(store, [1], found, 2)
    time.sleep(0.2)
    assert not found
    for thread in [*threads, *_start(store, [0], found, 2)]:
        thread.join(30)
    assert found[0] == found[1] != "hbp_titan/gone"


def test_rendezvous_timeout() -> None:
    with pytest.raises(RuntimeError, match=r"rank 1.*timed out"):
        agree_on_prefix(dist.HashStore(), 1, 2, timedelta(seconds=0.2))
    with pytest.raises(RuntimeError, match=r"rank 0.*timed out"):
        agree_on_prefix(dist.HashStore(), 0, 2, timedelta(seconds=0.2))


@pytest.fixture
def dev(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder like /dev of a machine with a GPU that torch cannot use."""
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path


@pytest.mark.parametrize(("version", "word"), [(None, "build without CUDA"), ("13.0", "too old")])
def test_gpu_that_torch_cannot_use_is_an_error(
    dev: Path, version: str | None, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nPlease update it.")

    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(torch.cuda, "init", init)
    with pytest.raises(ValueError, match=word):
        world.require_usable_gpu(dev)


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_cpu_is_used_on_request_or_without_a_gpu(dev: Path, hidden: str, monkeypatch: pytest.MonkeyPatch) -> None:
    world.require_usable_gpu(dev / "without")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    world.require_usable_gpu(dev)


def _launch(argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[str]:
    monkeypatch.setattr("sys.argv", ["devices", *argv])
    world.main()
    return capsys.readouterr().out.split()


def test_numa_binding_only_where_torchrun_can(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(world, "require_usable_gpu", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert _launch([], monkeypatch, capsys) == ["2"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(world.shutil, "which", lambda program: "/usr/bin/numactl")
    cpus = {gpu: {min(os.sched_getaffinity(0))} for gpu in range(4)}
    monkeypatch.setattr("torch.numa.binding._get_logical_cpus_to_bind_to", lambda gpu_index, **_: cpus[gpu_index])
    assert _launch([], monkeypatch, capsys) == ["4", "--numa-binding", "node"]
    assert _launch(["2"], monkeypatch, capsys) == ["2", "--numa-binding", "node"]
    monkeypatch.setenv("NUMA_BINDING", "none")
    assert _launch([], monkeypatch, capsys) == ["4"]
    monkeypatch.delenv("NUMA_BINDING")
    cpus[3] = {1 << 20}  # a CPU that the job may not use
    assert _launch([], monkeypatch, capsys) == ["4"]
    monkeypatch.setattr(world.shutil, "which", lambda program: None)
    assert _launch(["2"], monkeypatch, capsys) == ["2"]


def test_flight_recorder_keeps_the_users_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_DUMP_ON_TIMEOUT", "TORCH_FR_DUMP_TEMP_FILE"]
    old = ["TORCH_NCCL_TRACE_BUFFER_SIZE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"]
    for name in [*names, *old]:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    set_flight_recorder(tmp_path / "run")
    assert [os.environ[name] for name in names] == ["2000", "1", str(tmp_path / "run" / "flight_recorder" / "rank_")]
    # The run folder is not touched before its lock is held.
    assert not (tmp_path / "run").exists()
    for name, value in zip(names, ["500", "0"], strict=False):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCH_FR_DUMP_TEMP_FILE")
    monkeypatch.setenv(old[1], "/elsewhere/")
    set_flight_recorder(tmp_path / "run")
    assert [os.environ.get(name) for name in [*names, old[1]]] == ["500", "0", None, "/elsewhere/"]


def _control(world: World) -> dict[str, Any]:
    found: dict[str, Any] = {"gathered": gather_values(world.rank), "broadcast": broadcast_value(world.rank + 7)}
    found["own"] = control_group() is not dist.group.WORLD
    found["any"] = [any_rank(world.rank == 1), any_rank(False)]
    barrier()
    timeouts = [control_group(), dist.group.WORLD, new_group(backend="gloo")]
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


def test_control_group() -> None:
    for found in run_distributed(_control, 3):
        assert (found["gathered"], found["broadcast"], found["own"]) == ([0, 1, 2], 7, True)
        assert found["any"] == [True, False]
        # run_distributed sets 120 s.
        assert found["timeouts"] == [120, 120, 120]
        assert found["timeouts after"] == [SLOW_WORK_SECONDS, 40, 40]
        assert "rank 0 and rank 2 differ" in found["differs"]


def _alone(world: World, done: Path) -> None:
    if world.rank == 0:
        with pytest.raises(RuntimeError):
            any_rank(True, timeout_seconds=1)
        done.touch()
    else:
        while not done.exists():
            time.sleep(0.01)
    # It is unusable now; the test ends in the default group.
    dist.destroy_process_group(control_group())


def test_any_rank_times_out(tmp_path: Path) -> None:
    # Half of the group's own limit.
    run_distributed(_alone, 2, tmp_path / "done", timeout=60)


def _gives_up(world: World) -> str:
    workers = worker_group(world, timeout_seconds=0.2)
    assert workers.gather(world.rank) == [0, 1, 2]
    workers.report("tokenizing a.jsonl")
    barrier()
    if world.rank == 2:
        return ""
    with pytest.raises(TimeoutError) as raised:
        workers.gather(None)
    return str(raised.value)


def test_a_worker_names_the_rank_that_it_waited_for_in_vain() -> None:
    for rank, message in enumerate(run_distributed(_gives_up, 3)[:2]):
        assert message.startswith(f"rank {rank} waited")
        assert message.endswith("rank 2: tokenizing a.jsonl")
