"""Tensors by name out of a checkpoint and into one: whole or sharded, with a process group or without.

Owns the reading that a resumed run, initial_load_path and the conversion scripts share, and its errors. Each rank reads
what it holds and asks no other, so that a file that only one rank cannot read stops none of the others.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from hbp_titan.cli import Mistakes, one_line
from hbp_titan.components.checkpoint_files import STATE, DamagedCheckpoint, read_json, verify
from hbp_titan.components.checkpoint_storage import FolderReader, FolderWriter, LocalDataPlanner
from hbp_titan.components.train_state import trained_parameters
from hbp_titan.distributed.world import gather_values

SHOWN = 20
"""Tensors of a kind that a message names."""


class CheckpointError(Mistakes):
    """A checkpoint could not be written; raised on every rank."""


def read_state(path: Path) -> dict[str, Any]:
    """The trainer's state of checkpoint `path`."""
    return read_json(path / STATE)


def save_model_tensors(target: Path, tensors: Mapping[str, Tensor], state: dict[str, Any]) -> None:
    """Write whole tensors by parameter name as a checkpoint that a run may start from. Needs no process group."""
    named = {f"model.{name}": tensor for name, tensor in tensors.items()}
    try:
        _alone(dcp.save, named, storage_writer=FolderWriter(target, 0, state), planner=LocalDataPlanner(named))
    except CheckpointException as error:
        raise CheckpointError([f"{target} was not saved: {describe(error)}"]) from None


def load_model_tensors(path: Path, model: nn.Module) -> dict[str, Tensor]:
    """The full fp32 tensors of checkpoint `path` by parameter name, shaped as those of `model` (may be on meta).

    Needs no process group; reads the model's part only, and of it what is not frozen.
    """
    tensors = {name: torch.empty(p.shape, dtype=p.dtype) for name, p in trained_parameters(model).items()}
    load_model_shards(path, tensors)
    return tensors


def load_model_shards(path: Path, shards: Mapping[str, Tensor]) -> None:
    """Fill the tensors of a model, sharded or not, by parameter name from checkpoint `path`; every rank calls it.

    Raises ValueError, before any is read, naming all that are missing, unknown or misshapen.
    """
    check_model_shapes(path, {name: tensor.shape for name, tensor in shards.items()})
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    agree(lambda: verify(path, rank=rank, world_size=world_size))
    agree(lambda: load_tensors(path, {f"model.{name}": tensor for name, tensor in shards.items()}))


def check_model_shapes(path: Path, shapes: Mapping[str, Sequence[int]]) -> None:
    """Raise ValueError unless checkpoint `path` has these tensors of a model, by parameter name, and no others."""
    found = {name: saved.shape for name, saved in FolderReader(path).index.items() if name.startswith("model.")}
    expected = {f"model.{name}": tuple(shape) for name, shape in shapes.items()}
    both = found.keys() & expected.keys()
    kinds = {
        "missing": sorted(expected.keys() - found.keys()),
        "unknown": sorted(found.keys() - expected.keys()),
        "misshapen": [
            f"{name} {list(found[name])} instead of {list(expected[name])}"
            for name in sorted(both)
            if found[name] != expected[name]
        ],
    }
    faults = [f"{kind}: {_listed(names)}" for kind, names in kinds.items() if names]
    if faults:
        raise ValueError(
            f"{path}: its tensors are not those of this model; {'; '.join(faults)}: name the model that it was saved of"
        )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def load_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Fill `tensors`, whole or DTensors, from the checkpoint `path` by the names in it, resharding where they differ.

    Raises ValueError where one is missing or has another shape, DamagedCheckpoint where a file cannot be read.
    """
    reader = FolderReader(path)
    missing = sorted(tensors.keys() - reader.index.keys())
    if missing:
        raise ValueError(f"{path} lacks tensors of this model: {_listed(missing)}")
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != reader.index[name].shape:
            raise ValueError(f"{path}: {name} is {list(reader.index[name].shape)}, this model's {list(tensor.shape)}")
    try:
        _alone(dcp.load, tensors, storage_reader=reader, planner=dcp.DefaultLoadPlanner(flatten_state_dict=False))
    except CheckpointException as error:
        cause = error.failures[0][0]
        if isinstance(cause, DamagedCheckpoint):
            raise cause from None
        raise RuntimeError(f"{path} could not be loaded: {describe(error)}") from cause


def _alone(function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        function(*args, no_dist=True, **kwargs)


def agree(function: Callable[[], None]) -> None:
    """Run `function` on every rank; where it raised a ValueError on any, raise the first rank's on all."""
    if not dist.is_initialized():
        function()
        return
    error: ValueError | None = None
    try:
        function()
    except ValueError as raised:
        error = raised
    errors = [found for found in gather_values(error) if found is not None]
    if errors:
        raise errors[0]


def describe(error: BaseException) -> str:
    """`error` in one line; of a DCP error the first rank's own, and how many others failed."""
    if isinstance(error, CheckpointException):
        (rank, (cause, _)), *others = sorted(error.failures.items())
        return f"{describe(cause)} (rank {rank}{f' and {len(others)} more' if others else ''})"
    expected = isinstance(error, OSError | ValueError)
    return one_line(error) if expected else f"{type(error).__name__}: {one_line(error)}"
