"""Checkpointer: the whole state of a run in step-N folders, complete or absent.

Owns the folder layout, what is saved and how the newest complete checkpoint is found. A checkpoint is written
into step-N.partial and renamed when every rank is done; a folder without that rename is never read.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

_STEP_FOLDER = re.compile(r"step-(\d+)")


class Checkpointer:
    """Saves and loads what is trained of the model, its optimizer, per-rank RNG and the trainer's own state.

    `state` in save and load is the trainer's state: plain JSON values, the same on every rank.
    check: called with the state and the folder before any tensor is read; raises ValueError for one of another run.
    """

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        keep_latest_k: int,
        check: Callable[[dict[str, Any], Path], None] | None = None,
    ) -> None:
        self.folder = folder
        self.check = check
        self.model = model
        self.optimizer = optimizer
        self.keep_latest_k = keep_latest_k

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write checkpoint `step`; returns its folder. Every rank calls it."""
        target = self.folder / f"step-{step}"
        partial = self.folder / f"step-{step}.partial"
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        dcp.save(self._sharded_state() | {f"rng_{dist.get_rank()}": _rng_state()}, checkpoint_id=partial)
        if dist.get_rank() == 0:
            (partial / "state.json").write_text(json.dumps(state | {"world_size": dist.get_world_size()}, indent=2))
            # A run that went back to an older step meets its own later folders again.
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)
            self._prune()
        dist.barrier()
        return target

    def load(self) -> dict[str, Any] | None:
        """Load the newest checkpoint into model, optimizer and RNG; returns the trainer's state, None without one."""
        found = completed(self.folder)
        if not found:
            return None
        path = found[-1]
        state = json.loads((path / "state.json").read_text())
        if self.check:
            self.check(state, path)
        sharded = self._sharded_state()
        if state["world_size"] == dist.get_world_size():
            sharded[f"rng_{dist.get_rank()}"] = _rng_state()
        dcp.load(sharded, checkpoint_id=path)
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=sharded["model"],
            optim_state_dict=sharded["optimizer"],
            # Only frozen weights are missing: the keys are this model's own.
            options=StateDictOptions(strict=False),
        )
        if f"rng_{dist.get_rank()}" in sharded:
            _set_rng_state(sharded[f"rng_{dist.get_rank()}"])
        return state

    def _sharded_state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer, options=StateDictOptions())
        return {"model": {name: model[name] for name in _trained(self.model)}, "optimizer": optimizer}

    def _prune(self) -> None:
        if self.keep_latest_k:
            for old in completed(self.folder)[: -self.keep_latest_k]:
                shutil.rmtree(old)


def completed(folder: Path) -> list[Path]:
    """The complete checkpoints of `folder` in ascending step order."""
    found = [(int(match[1]), path) for path in folder.glob("step-*") if (match := _STEP_FOLDER.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def save_model_tensors(target: Path, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
    """Write whole tensors by parameter name as a checkpoint that a run may start from. Needs no process group."""
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    dcp.save({"model": tensors}, checkpoint_id=partial, no_dist=True)
    (partial / "state.json").write_text(json.dumps(state, indent=2))
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)


def load_model_tensors(path: Path, model: nn.Module) -> dict[str, Any]:
    """The full fp32 tensors of checkpoint `path` by parameter name, shaped as those of `model` (may be on meta).

    Needs no process group; reads the model's part only, and of it what is not frozen.
    """
    tensors = {name: torch.empty(p.shape, dtype=p.dtype) for name, p in _trained(model).items()}
    dcp.load({"model": tensors}, checkpoint_id=path, no_dist=True)
    return tensors


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    # A tied matrix has two names.
    return {name: p for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}


def _rng_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_rng_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
