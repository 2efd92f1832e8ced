"""Which folder counts as a checkpoint, what a rank finds in it, and what a failed or damaged one leaves behind."""

from __future__ import annotations

import errno
import json
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from hbp_titan.components import dcp_storage
from hbp_titan.components.checkpoint import Checkpointer, CheckpointError, completed_checkpoints
from hbp_titan.components.dcp_storage import CorruptCheckpoint, FolderWriter
from hbp_titan.components.faults import Watchdog
from hbp_titan.distributed.mesh import LevelMeshes
from hbp_titan.distributed.world import World
from hbp_titan.job_config import Checkpoint
from hbp_titan.testing.local_ranks import run_distributed


def test_newest_complete_folder_is_by_number_and_partial_ones_are_ignored(tmp_path: Path) -> None:
    for name in ("step-9", "step-10", "step-100.partial", "step-11.damaged", "step-x", "other"):
        (tmp_path / name).mkdir()
    assert [path.name for path in completed_checkpoints(tmp_path)] == ["step-9", "step-10"]
    assert completed_checkpoints(tmp_path / "missing") == []


def _model(world: World, seed: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = torch.nn.Linear(6, 5)
    fully_shard(model, mesh=LevelMeshes(world.device, world.size, []).fsdp)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)


def _train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        model(torch.randn(3, 6)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def _parameters(model: torch.nn.Module) -> list[torch.Tensor]:
    return [p.full_tensor().detach().clone() for p in model.parameters()]  # type: ignore[attr-defined]


def _save(checkpointer: Checkpointer, step: int) -> None:
    checkpointer.stage(step, {"step": step})
    checkpointer.write()


def _save_and_go_on(world: World, folder: Path, mode: str) -> tuple[list[torch.Tensor], bool]:
    """Four steps, each saved, then three more; whether a step was trained while the one before was being written."""
    model, optimizer = _model(world, seed=0)
    write = dcp_storage.write_safetensors
    training, overlapped = threading.Event(), []

    def write_while_training(*args: Any) -> dict[str, Any]:
        overlapped.append(training.wait(timeout=20 if mode == "async" else 0.05))
        return write(*args)

    dcp_storage.write_safetensors = write_while_training
    with Checkpointer(folder, model, optimizer, Checkpoint(async_mode=mode)) as checkpointer:
        state: dict[str, Any] = {}
        for step in range(1, 5):
            state["step"] = step
            _train(model, optimizer, 1)
            training.set()
            checkpointer.wait()
            training.clear()
            checkpointer.stage(step, state)
            checkpointer.write()
        state["step"] = 99  # of the next step: no part of what was staged
        _train(model, optimizer, 3)
        training.set()
    return _parameters(model), all(overlapped)


def _load_and_go_on(world: World, folder: Path) -> list[torch.Tensor]:
    model, optimizer = _model(world, seed=1)
    state = Checkpointer(folder, model, optimizer, Checkpoint()).load()
    assert state is not None
    assert state["step"] == 4
    _train(model, optimizer, 3)  # the random inputs too must be those of the first run
    return _parameters(model)


@pytest.mark.parametrize("mode", ["async", "disabled"])
def test_loaded_state_goes_on_bit_for_bit_and_old_folders_are_pruned(tmp_path: Path, mode: str) -> None:
    first = run_distributed(_save_and_go_on, 2, tmp_path, mode)
    assert [overlapped for _, overlapped in first] == [mode == "async"] * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-3", "step-4"]
    second = run_distributed(_load_and_go_on, 2, tmp_path)
    assert all(a.equal(b) for a, b in zip(first[0][0], second[0], strict=True))


def _load_nothing(world: World, folder: Path) -> bool:
    return Checkpointer(folder, *_model(world, seed=1), Checkpoint()).load() is None


def test_folder_without_checkpoint_loads_nothing_and_is_cleaned(tmp_path: Path) -> None:
    for name in ("step-7.partial", "step-6.deleted.partial", "mine"):
        (tmp_path / name).mkdir()
    assert run_distributed(_load_nothing, 1, tmp_path) == [True]
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[World]:
    """A world of one rank in this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield World(0, 1, torch.device("cpu"))
    dist.destroy_process_group()


def _steps_1_to_3(world: World, folder: Path, **config: Any) -> list[list[torch.Tensor]]:
    """Saves three steps; the parameters after each."""
    model, optimizer = _model(world, seed=0)
    parameters = []
    with Checkpointer(folder, model, optimizer, Checkpoint(keep_latest_k=3, **config)) as checkpointer:
        for step in (1, 2, 3):
            _train(model, optimizer, 1)
            checkpointer.stage(step, {"step": step}, last=step == 3)
            checkpointer.write()
            parameters.append(_parameters(model))
    return parameters


@pytest.mark.parametrize("limited", [True, False])
def test_a_slow_disk_has_more_time_than_a_collective(
    alone: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limited: bool
) -> None:
    whole = FolderWriter.write_data

    def slow(*args: Any) -> Any:
        time.sleep(1.5)
        return whole(*args)

    monkeypatch.setattr(FolderWriter, "write_data", slow)
    model, optimizer = _model(alone, seed=0)
    codes: list[int] = []
    with Watchdog(0, 1, dist.HashStore(), end=codes.append) as watchdog:
        at = (lambda where: watchdog.heartbeat(where, 60.0)) if limited else (lambda where: None)
        with Checkpointer(tmp_path, model, optimizer, Checkpoint(), at=at) as checkpointer:
            _train(model, optimizer, 1)
            watchdog.heartbeat("checkpoint of step 1", 0.5)
            _save(checkpointer, 1)
    assert codes == ([] if limited else [1])
    assert [path.name for path in completed_checkpoints(tmp_path)] == ["step-1"]


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _claim_another_step(path: Path) -> None:
    path.write_text(path.read_text().replace('"step": 3', '"step": 4'))


DAMAGES = [
    ("rank-0.safetensors", _cut, r"rank-0\.safetensors: has \d+ bytes, manifest\.json says \d+"),
    ("rank-0.safetensors", _flip_a_bit, r"rank-0\.safetensors: its content does not match the checksum"),
    ("rank-0.safetensors", Path.unlink, r"rank-0\.safetensors: No such file or directory"),
    ("state.json", _claim_another_step, r"state\.json: its content does not match the checksum"),
    ("tensors.json", _cut, r"tensors\.json: has \d+ bytes, manifest\.json says \d+"),
    ("manifest.json", _cut, r"manifest\.json: not JSON"),
    ("manifest.json", Path.unlink, r"manifest\.json: No such file or directory"),
]


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGES)
def test_damaged_checkpoint_is_named_and_the_one_before_it_is_used(
    alone: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, damage: Any, message: str
) -> None:
    parameters = _steps_1_to_3(alone, tmp_path)
    damage(tmp_path / "step-3" / name)
    model, optimizer = _model(alone, seed=1)
    state = Checkpointer(tmp_path, model, optimizer, Checkpoint()).load()
    assert state is not None
    assert state["step"] == 2
    assert all(a.equal(b) for a, b in zip(_parameters(model), parameters[1], strict=True))
    line = capsys.readouterr().out
    assert line.startswith("warning: step-3 is damaged, the one before it is tried: ")
    assert re.search(message, line)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1", "step-2", "step-3.damaged"]


def test_when_every_checkpoint_is_damaged_all_are_named_and_none_is_touched(alone: World, tmp_path: Path) -> None:
    _steps_1_to_3(alone, tmp_path)
    for number in (1, 2, 3):
        _cut(tmp_path / f"step-{number}" / "rank-0.safetensors")
    with pytest.raises(ValueError, match=r"no checkpoint can be read: .*step-3.*; .*step-2.*; .*step-1.*; restore one"):
        Checkpointer(tmp_path, *_model(alone, seed=1), Checkpoint()).load()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1", "step-2", "step-3"]


def test_without_verify_only_the_content_is_taken_on_trust(alone: World, tmp_path: Path) -> None:
    _steps_1_to_3(alone, tmp_path)
    _flip_a_bit(tmp_path / "step-3" / "rank-0.safetensors")
    _cut(tmp_path / "step-2" / "rank-0.safetensors")
    state = Checkpointer(tmp_path, *_model(alone, seed=1), Checkpoint(verify=False)).load()
    assert state is not None
    assert state["step"] == 3
    _cut(tmp_path / "step-3" / "rank-0.safetensors")
    state = Checkpointer(tmp_path, *_model(alone, seed=1), Checkpoint(verify=False)).load()
    assert state is not None
    assert state["step"] == 1


def _damage_of_another_ranks_file(world: World, folder: Path) -> tuple[int, list[torch.Tensor]]:
    model, optimizer = _model(world, seed=1)
    state = Checkpointer(folder, model, optimizer, Checkpoint()).load()
    assert state is not None
    return state["step"], _parameters(model)


def test_all_ranks_fall_back_together(tmp_path: Path) -> None:
    parameters = run_distributed(_steps_1_to_3, 2, tmp_path)[0]
    _flip_a_bit(tmp_path / "step-3" / "rank-1.safetensors")
    for step, found in run_distributed(_damage_of_another_ranks_file, 2, tmp_path):
        assert step == 2
        assert all(a.equal(b) for a, b in zip(found, parameters[1], strict=True))


def test_model_of_another_shape_is_a_mistake_and_no_damage(alone: World, tmp_path: Path) -> None:
    _steps_1_to_3(alone, tmp_path)
    for model, message in (
        (torch.nn.Linear(6, 4), r"step-3: model.weight is \[5, 6\], this model's \[4, 6\]"),
        (torch.nn.Sequential(torch.nn.Linear(6, 5)), r"step-3 lacks tensors of this model: model.0.bias, .*"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            Checkpointer(tmp_path, model, torch.optim.AdamW(model.parameters()), Checkpoint()).load()
        assert not isinstance(caught.value, CorruptCheckpoint)


def test_last_step_without_optimizer_state_ends_a_run_and_starts_no_longer_one(alone: World, tmp_path: Path) -> None:
    parameters = _steps_1_to_3(alone, tmp_path, last_save_model_only=True)
    saved = [json.loads((tmp_path / f"step-{n}" / "tensors.json").read_text()).keys() for n in (2, 3)]
    assert saved[0] - saved[1] == {f"optimizer.{p}.{s}" for p in ("weight", "bias") for s in _ADAM}
    assert saved[1] == {"model.weight", "model.bias", "rng.0.cpu"}
    model, optimizer = _model(alone, seed=1)
    checkpointer = Checkpointer(tmp_path, model, optimizer, Checkpoint())
    assert checkpointer.load() is not None
    assert all(a.equal(b) for a, b in zip(_parameters(model), parameters[2], strict=True))
    with pytest.raises(ValueError, match=r"cannot resume: .*step-3 holds the model alone"):
        checkpointer.require_optimizer()


_ADAM = ("step", "exp_avg", "exp_avg_sq")


def _disk_is_full(*args: Any) -> dict[str, Any]:
    raise OSError(errno.ENOSPC, "No space left on device")


def _fail_on_rank_1(world: World, folder: Path) -> tuple[str, list[str], float]:
    model, optimizer = _model(world, seed=0)
    checkpointer = Checkpointer(folder, model, optimizer, Checkpoint(keep_latest_k=1))
    _train(model, optimizer, 1)
    _save(checkpointer, 1)
    checkpointer.wait()
    if world.rank == 1:
        dcp_storage.write_safetensors = _disk_is_full  # type: ignore[assignment]
    _save(checkpointer, 2)
    started = time.monotonic()
    with pytest.raises(CheckpointError) as caught:
        checkpointer.wait()
    assert checkpointer.failed
    dist.barrier()
    return str(caught.value), sorted(path.name for path in folder.iterdir()), time.monotonic() - started


def test_full_disk_on_one_rank_of_two_stops_both_and_keeps_what_was_saved(tmp_path: Path) -> None:
    for message, names, seconds in run_distributed(_fail_on_rank_1, 2, tmp_path):
        assert message.startswith(f"{tmp_path}/step-2 was not saved: {tmp_path}/step-2.partial: no space for rank-1.")
        assert " bytes needed, " in message
        assert message.endswith(
            " free: free some, or lower checkpoint.keep_latest_k (rank 1); the checkpoints before it are untouched"
        )
        assert names == ["step-1"]
        assert seconds < 60  # not the timeout of a collective, also on a busy machine


FULL = {
    "seen beforehand": r"step-2\.partial: no space for the checkpoint: [\d,]+ bytes needed, 0 free",
    "met while writing": r"step-2\.partial: no space for rank-0\.safetensors: [\d,]+ bytes needed, 0 free",
}


@pytest.mark.parametrize("when", FULL)
def test_full_file_system_ends_the_save_with_the_bytes_needed_and_free(
    alone: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a small file system")
    try:
        model, optimizer = _model(alone, seed=0)
        checkpointer = Checkpointer(tmp_path, model, optimizer, Checkpoint())
        _save(checkpointer, 1)
        checkpointer.wait()
        filler = tmp_path / "filler"
        filler.write_bytes(bytes(shutil.disk_usage(tmp_path).free))
        if when == "met while writing":  # as where a quota is what ends
            answers = iter([shutil.disk_usage("/"), shutil.disk_usage(tmp_path)])
            monkeypatch.setattr(shutil, "disk_usage", lambda path: next(answers))
        _save(checkpointer, 2)
        with pytest.raises(CheckpointError, match=FULL[when]):
            checkpointer.wait()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["filler", "step-1"]
        filler.unlink()
        state = Checkpointer(tmp_path, *_model(alone, seed=1), Checkpoint()).load()
        assert state is not None
        assert state["step"] == 1
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.parametrize("name", ["tensors.json", "state.json", "manifest.json"])
def test_save_that_ends_before_its_last_file_is_never_visible(
    alone: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    model, optimizer = _model(alone, seed=0)
    checkpointer = Checkpointer(tmp_path, model, optimizer, Checkpoint(keep_latest_k=1))
    _save(checkpointer, 1)
    checkpointer.wait()
    write, seen = dcp_storage.write_json, []

    def stop_at(path: Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        seen.append([folder.name for folder in completed_checkpoints(tmp_path)])
        if path.name == name:
            raise OSError(errno.EIO, "Input/output error")
        return write(path, *args, **kwargs)

    monkeypatch.setattr(dcp_storage, "write_json", stop_at)
    _save(checkpointer, 2)
    with pytest.raises(CheckpointError, match=r"step-2 was not saved: .*Input/output error"):
        checkpointer.wait()
    assert seen[-1] == ["step-1"]
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
