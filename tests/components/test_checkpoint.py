"""Checkpointer and its staging buffer: what counts as a checkpoint, what is loaded, and what failures leave behind."""

from __future__ import annotations

import errno
import json
import os
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
from hbp_titan.components.checkpoint import Checkpointer, PinnedStaging, completed_checkpoints
from hbp_titan.components.dcp_storage import CorruptCheckpoint, FolderWriter
from hbp_titan.components.faults import Watchdog
from hbp_titan.distributed.mesh import LevelMeshes
from hbp_titan.distributed.world import World
from hbp_titan.errors import UserError
from hbp_titan.job_config import Checkpoint
from hbp_titan.testing.local_ranks import run_distributed

Tensors = list[torch.Tensor]


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


def _parameters(model: torch.nn.Module) -> Tensors:
    return [p.full_tensor().detach().clone() for p in model.parameters()]  # type: ignore[attr-defined]


def _save(checkpointer: Checkpointer, step: int, last: bool = False) -> None:
    checkpointer.stage(step, {"step": step}, last=last)
    checkpointer.write()


def _save_and_wait(checkpointer: Checkpointer, step: int) -> None:
    _save(checkpointer, step)
    checkpointer.wait()


def _load(world: World, folder: Path, **config: Any) -> tuple[int, Tensors]:
    """Return the step and the parameters that a new process loads."""
    model, optimizer = _model(world, seed=1)
    state = Checkpointer(folder, model, optimizer, Checkpoint(**config)).load()
    return (state["step"] if state else 0), _parameters(model)


def _equal(a: Tensors, b: Tensors) -> bool:
    return all(x.equal(y) for x, y in zip(a, b, strict=True))


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """A world of one rank in this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield World(0, 1, torch.device("cpu"))
    dist.destroy_process_group()


def _save_steps_1_to_3(world: World, folder: Path, **config: Any) -> list[Tensors]:
    """Return the parameters after each step."""
    model, optimizer = _model(world, seed=0)
    parameters = []
    with Checkpointer(folder, model, optimizer, Checkpoint(keep_latest_k=3, **config)) as checkpointer:
        for step in (1, 2, 3):
            _train(model, optimizer, 1)
            _save(checkpointer, step, last=step == 3)
            parameters.append(_parameters(model))
    return parameters


def test_completed_checkpoints_are_ordered_by_number_without_partial_ones(tmp_path: Path) -> None:
    for name in ("step-9", "step-10", "step-100.partial", "step-11.damaged", "step-x", "other"):
        (tmp_path / name).mkdir()
    assert [path.name for path in completed_checkpoints(tmp_path)] == ["step-9", "step-10"]
    assert completed_checkpoints(tmp_path / "missing") == []


def test_folder_without_checkpoint_loads_nothing_and_is_cleaned(world: World, tmp_path: Path) -> None:
    for name in ("step-7.partial", "step-6.deleted.partial", "mine"):
        (tmp_path / name).mkdir()
    assert _load(world, tmp_path)[0] == 0
    assert _names(tmp_path) == ["mine"]


def _save_and_continue(world: World, folder: Path, mode: str) -> tuple[Tensors, bool]:
    """Save four steps, then train three more; return whether training overlapped the writing of every checkpoint."""
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
        # Belongs to the next step, not to what was staged.
        state["step"] = 99
        _train(model, optimizer, 3)
        training.set()
    return _parameters(model), all(overlapped)


def _load_and_continue(world: World, folder: Path) -> Tensors:
    model, optimizer = _model(world, seed=1)
    state = Checkpointer(folder, model, optimizer, Checkpoint()).load()
    assert state is not None
    assert state["step"] == 4
    # The random inputs have to be those of the first run as well.
    _train(model, optimizer, 3)
    return _parameters(model)


@pytest.mark.parametrize("mode", ["async", "disabled"])
def test_loaded_state_continues_bit_for_bit_and_old_folders_are_pruned(tmp_path: Path, mode: str) -> None:
    first = run_distributed(_save_and_continue, 2, tmp_path, mode)
    assert [overlapped for _, overlapped in first] == [mode == "async"] * 2
    assert _names(tmp_path) == ["step-3", "step-4"]
    second = run_distributed(_load_and_continue, 2, tmp_path)
    assert _equal(first[0][0], second[0])


@pytest.mark.parametrize("limited", [True, False])
def test_writing_may_take_longer_than_a_collective(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limited: bool
) -> None:
    write_data = FolderWriter.write_data

    def slow(*args: Any) -> Any:
        time.sleep(0.8)
        return write_data(*args)

    monkeypatch.setattr(FolderWriter, "write_data", slow)
    model, optimizer = _model(world, seed=0)
    codes: list[int] = []
    watchdog = Watchdog(0, 1, dist.HashStore(), end=codes.append)
    watchdog.heartbeat("checkpoint of step 1", 0.3)
    at = (lambda where: watchdog.heartbeat(where, 60.0)) if limited else (lambda where: None)
    with watchdog, Checkpointer(tmp_path, model, optimizer, Checkpoint(), at=at) as checkpointer:
        _save(checkpointer, 1)
    assert codes == ([] if limited else [1])
    assert _names(tmp_path) == ["step-1"]


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _claim_another_step(path: Path) -> None:
    path.write_text(path.read_text().replace('"step": 3', '"step": 4'))


DAMAGES = [
    ("rank-0.safetensors", _cut, "bytes"),
    ("rank-0.safetensors", _flip_a_bit, "checksum"),
    ("rank-0.safetensors", Path.unlink, "No such file"),
    ("state.json", _claim_another_step, "checksum"),
    ("tensors.json", _cut, "bytes"),
    ("manifest.json", _cut, "not JSON"),
    ("manifest.json", Path.unlink, "No such file"),
]


@pytest.mark.parametrize(("name", "damage", "word"), DAMAGES)
def test_corrupt_checkpoint_is_reported_and_the_previous_one_is_loaded(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, damage: Any, word: str
) -> None:
    parameters = _save_steps_1_to_3(world, tmp_path)
    damage(tmp_path / "step-3" / name)
    step, found = _load(world, tmp_path)
    assert step == 2
    assert _equal(found, parameters[1])
    assert re.search(rf"^warning: step-3 .*{name}: .*{word}", capsys.readouterr().out)
    assert _names(tmp_path) == ["step-1", "step-2", "step-3.damaged"]


def test_when_every_checkpoint_is_corrupt_all_are_named_and_none_is_changed(world: World, tmp_path: Path) -> None:
    _save_steps_1_to_3(world, tmp_path)
    for number in (1, 2, 3):
        _cut(tmp_path / f"step-{number}" / "rank-0.safetensors")
    with pytest.raises(ValueError, match=r"step-3.*; .*step-2.*; .*step-1.*"):
        _load(world, tmp_path)
    assert _names(tmp_path) == ["step-1", "step-2", "step-3"]


def test_without_verify_sizes_are_checked_but_not_the_content(world: World, tmp_path: Path) -> None:
    _save_steps_1_to_3(world, tmp_path)
    _flip_a_bit(tmp_path / "step-3" / "rank-0.safetensors")
    _cut(tmp_path / "step-2" / "rank-0.safetensors")
    assert _load(world, tmp_path, verify=False)[0] == 3
    _cut(tmp_path / "step-3" / "rank-0.safetensors")
    assert _load(world, tmp_path, verify=False)[0] == 1


def test_all_ranks_fall_back_together_if_the_file_of_one_is_corrupt(tmp_path: Path) -> None:
    parameters = run_distributed(_save_steps_1_to_3, 2, tmp_path)[0]
    _flip_a_bit(tmp_path / "step-3" / "rank-1.safetensors")
    for step, found in run_distributed(_load, 2, tmp_path):
        assert step == 2
        assert _equal(found, parameters[1])


def test_model_of_another_shape_is_a_user_error_and_not_corruption(world: World, tmp_path: Path) -> None:
    _save_steps_1_to_3(world, tmp_path)
    for model, word in (
        (torch.nn.Linear(6, 4), r"model.weight \[5, 6\] instead of \[4, 6\]"),
        (torch.nn.Sequential(torch.nn.Linear(6, 5)), "missing: model.0.bias"),
    ):
        with pytest.raises(ValueError, match=word) as caught:
            Checkpointer(tmp_path, model, torch.optim.AdamW(model.parameters()), Checkpoint()).load()
        assert not isinstance(caught.value, CorruptCheckpoint)


def test_last_checkpoint_without_optimizer_state_ends_a_run_and_cannot_be_trained(world: World, tmp_path: Path) -> None:
    parameters = _save_steps_1_to_3(world, tmp_path, last_save_model_only=True)
    saved = [json.loads((tmp_path / f"step-{n}" / "tensors.json").read_text()).keys() for n in (2, 3)]
    adam = ("step", "exp_avg", "exp_avg_sq")
    assert saved[0] - saved[1] == {f"optimizer.{p}.{s}" for p in ("weight", "bias") for s in adam}
    assert saved[1] == {"model.weight", "model.bias", "rng.0.cpu"}
    model, optimizer = _model(world, seed=1)
    checkpointer = Checkpointer(tmp_path, model, optimizer, Checkpoint())
    assert checkpointer.load() is not None
    assert _equal(_parameters(model), parameters[2])
    with pytest.raises(ValueError, match="last_save_model_only"):
        checkpointer.require_optimizer()


def test_full_file_system_fails_the_save_with_the_bytes_needed_and_free(world: World, tmp_path: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system; run: sudo scripts/run_tests.sh tests/components")
    try:
        checkpointer = Checkpointer(tmp_path, *_model(world, seed=0), Checkpoint())
        _save_and_wait(checkpointer, 1)
        filler = tmp_path / "filler"
        filler.write_bytes(bytes(shutil.disk_usage(tmp_path).free))
        with pytest.raises(UserError, match=r"no space for the checkpoint: [\d,]+ bytes needed, 0 free"):
            _save_and_wait(checkpointer, 2)
        assert _names(tmp_path) == ["filler", "step-1"]
        filler.unlink()
        assert _load(world, tmp_path)[0] == 1
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.parametrize("name", ["tensors.json", "state.json", "manifest.json"])
def test_save_that_fails_before_its_last_file_is_never_visible(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    checkpointer = Checkpointer(tmp_path, *_model(world, seed=0), Checkpoint(keep_latest_k=1))
    _save_and_wait(checkpointer, 1)
    write, visible = dcp_storage.write_json, []

    def fail_at(path: Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        visible.append([folder.name for folder in completed_checkpoints(tmp_path)])
        if path.name == name:
            raise OSError(errno.EIO, "Input/output error")
        return write(path, *args, **kwargs)

    monkeypatch.setattr(dcp_storage, "write_json", fail_at)
    with pytest.raises(UserError, match="Input/output error"):
        _save_and_wait(checkpointer, 2)
    assert visible[-1] == _names(tmp_path) == ["step-1"]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_staged_copies_do_not_follow_their_tensors_and_memory_is_reused(device: str) -> None:
    tensors = {
        "not contiguous": torch.arange(6.0, device=device).view(2, 3).t(),
        "bytes": torch.arange(3, dtype=torch.uint8, device=device),
        "half": torch.full((2,), 1.5, dtype=torch.bfloat16, device=device),
        "scalar": torch.tensor(7, device=device),
        "empty": torch.zeros(0, 4, device=device),
    }
    expected = {name: value.cpu().clone() for name, value in tensors.items()}
    staging = PinnedStaging()
    copies = staging.copy(tensors)
    for value in tensors.values():
        value.zero_()
    assert all(copies[name].equal(value) for name, value in expected.items())
    assert all(copy.is_contiguous() and not copy.is_cuda for copy in copies.values())
    again = staging.copy(tensors)
    assert [copy.data_ptr() for copy in again.values()] == [copy.data_ptr() for copy in copies.values()]
    assert not any(copy.any() for copy in again.values())
    assert copies["scalar"].is_pinned() == (device == "cuda")
    staging.close()


def test_forked_processes_do_not_inherit_the_staging_memory() -> None:
    copies = PinnedStaging().copy({"weight": torch.ones(1 << 20)})
    page = f"{copies['weight'].data_ptr():x}-"

    def is_mapped() -> bool:
        return any(line.startswith(page) for line in Path("/proc/self/maps").read_text().splitlines())

    assert is_mapped()
    child = os.fork()
    if child == 0:  # like a loader worker
        os._exit(is_mapped())
    assert os.waitpid(child, 0)[1] == 0
    assert copies["weight"].sum() == 1 << 20
