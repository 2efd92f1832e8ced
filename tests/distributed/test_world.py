"""Rendezvous of restarts, the control group, and the devices of a machine."""

from __future__ import annotations

import os
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from hbp_titan.distributed import world
from hbp_titan.distributed.world import agree_on_prefix, set_flight_recorder

TIMEOUT = timedelta(seconds=20)


def _start(store: dist.Store, ranks: list[int], found: dict[int, str], world_size: int) -> list[threading.Thread]:
    def meet(rank: int) -> None:
        found[rank] = agree_on_prefix(store, rank, world_size, TIMEOUT)

    threads = [threading.Thread(target=meet, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    return threads


@pytest.mark.parametrize("first", [[0, 1, 2], [1, 2, 0]])
def test_every_start_meets_under_one_new_name(first: list[int]) -> None:
    store = dist.HashStore()
    names = set()
    for _ in range(4):
        found: dict[int, str] = {}
        threads = _start(store, first[:1], found, 3)
        # The others come later: whoever waits sees what the start before has left for a while.
        time.sleep(0.2)
        for thread in [*threads, *_start(store, first[1:], found, 3)]:
            thread.join(30)
        assert len(found) == 3
        assert len(set(found.values())) == 1
        names |= set(found.values())
    assert len(names) == 4


def test_a_start_after_one_that_never_met_meets() -> None:
    store = dist.HashStore()
    # Rank 0 was killed when it had made its offer, rank 1 when it had joined.
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


def test_ranks_that_do_not_come_are_told() -> None:
    with pytest.raises(RuntimeError, match=r"rank 1.*timed out"):
        agree_on_prefix(dist.HashStore(), 1, 2, timedelta(seconds=0.2))
    with pytest.raises(RuntimeError, match=r"rank 0.*timed out"):
        agree_on_prefix(dist.HashStore(), 0, 2, timedelta(seconds=0.2))


@pytest.fixture
def dev(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as /dev of a machine with a GPU, which torch does not see."""
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path


def test_a_gpu_that_a_cpu_build_cannot_use_is_an_error(dev: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ValueError, match=r"nvidia0.*build without CUDA.*CUDA_VISIBLE_DEVICES=''"):
        world.require_usable_gpu(dev)


def test_a_driver_that_is_too_old_is_an_error_with_torchs_reason(dev: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def init() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nPlease update it.")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", init)
    with pytest.raises(ValueError, match=r"cannot use it: The NVIDIA driver .* too old \(found version 11040\)\. Plea"):
        world.require_usable_gpu(dev)


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_the_cpu_is_used_where_that_is_asked_for_or_there_is_no_gpu(
    dev: Path, hidden: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.require_usable_gpu(dev / "without")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    world.require_usable_gpu(dev)


def _launch(argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[str]:
    monkeypatch.setattr("sys.argv", ["devices", *argv])
    world.main()
    return capsys.readouterr().out.split()


def test_ranks_are_bound_to_the_cpus_of_their_gpu_where_torchrun_can(
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


def test_the_flight_recorder_dumps_into_the_run_folder_unless_the_user_chose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_DUMP_ON_TIMEOUT", "TORCH_FR_DUMP_TEMP_FILE"]
    old = ["TORCH_NCCL_TRACE_BUFFER_SIZE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"]
    for name in [*names, *old]:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    set_flight_recorder(tmp_path / "run")
    assert [os.environ[name] for name in names] == ["2000", "1", str(tmp_path / "run" / "flight_recorder" / "rank_")]
    assert (tmp_path / "run" / "flight_recorder").is_dir()
    for name, value in zip(names, ["500", "0"], strict=False):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCH_FR_DUMP_TEMP_FILE")
    monkeypatch.setenv(old[1], "/elsewhere/")
    set_flight_recorder(tmp_path / "run")
    assert [os.environ.get(name) for name in [*names, old[1]]] == ["500", "0", None, "/elsewhere/"]
