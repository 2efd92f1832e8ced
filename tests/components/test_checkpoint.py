"""Which folder counts as a checkpoint, and what a rank finds in it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.distributed.fsdp import fully_shard

from hbp_titan.components.checkpoint import Checkpointer, completed
from hbp_titan.distributed.local_ranks import run_distributed
from hbp_titan.distributed.mesh import LevelMeshes
from hbp_titan.distributed.world import World
from hbp_titan.job_config import Checkpoint


def test_newest_complete_folder_is_by_number_and_partial_ones_are_ignored(tmp_path: Path) -> None:
    for name in ("step-9", "step-10", "step-100.partial", "step-x", "other"):
        (tmp_path / name).mkdir()
    assert [path.name for path in completed(tmp_path)] == ["step-9", "step-10"]
    assert completed(tmp_path / "missing") == []


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


def _save_and_go_on(world: World, folder: Path) -> list[torch.Tensor]:
    model, optimizer = _model(world, seed=0)
    with Checkpointer(folder, model, optimizer, Checkpoint()) as checkpointer:
        for step in range(1, 5):
            _train(model, optimizer, 1)
            checkpointer.stage(step, {"step": step})
            checkpointer.write()
    _train(model, optimizer, 3)
    return [p.full_tensor().detach() for p in model.parameters()]  # type: ignore[attr-defined]


def _load_and_go_on(world: World, folder: Path) -> list[torch.Tensor]:
    model, optimizer = _model(world, seed=1)
    state = Checkpointer(folder, model, optimizer, Checkpoint()).load()
    assert state is not None
    assert state["step"] == 4
    _train(model, optimizer, 3)  # the random inputs too must be those of the first run
    return [p.full_tensor().detach() for p in model.parameters()]  # type: ignore[attr-defined]


def test_loaded_state_goes_on_bit_for_bit_and_old_folders_are_pruned(tmp_path: Path) -> None:
    first = run_distributed(_save_and_go_on, 2, tmp_path)
    assert [path.name for path in completed(tmp_path)] == ["step-3", "step-4"]
    second = run_distributed(_load_and_go_on, 2, tmp_path)
    assert all(a.equal(b) for a, b in zip(first[0], second[0], strict=True))


def _load_nothing(world: World, folder: Path) -> bool:
    return Checkpointer(folder, *_model(world, seed=1), Checkpoint()).load() is None


def test_folder_without_checkpoint_loads_nothing(tmp_path: Path) -> None:
    (tmp_path / "step-7.partial").mkdir()
    assert run_distributed(_load_nothing, 1, tmp_path) == [True]
