"""Checkpointer: the whole state of a run in step-N folders, complete or absent.

Owns when a checkpoint is taken and written, for how long training stands still, which one a run goes on from and how
many are kept. A checkpoint is copied to host memory, written into step-N.partial by a thread with a process group of
its own, and renamed when every rank's part is on disk. The files are checkpoint_files', their way through torch's DCP
checkpoint_storage's.

Tensors by name out of a checkpoint and into one: whole or sharded, with a process group or without.

Owns the reading that a resumed run, initial_load_path and the conversion scripts share, and its errors. Each rank reads
what it holds and asks no other, so that a file that only one rank cannot read stops none of the others.

Host copies of what is about to be saved, so that training goes on while they are written.

Owns one buffer in host memory, allocated at the first save and used again by every later one. Forked processes do not
inherit it.

The tensors of a run by flat names, out of model, optimizer and random generators and back into them.

Owns the names in a checkpoint: model.<parameter>, optimizer.<parameter>.<state>, rng.<rank>.<device>. What is not a
tensor, the optimizer's settings by parameter group, is plain values.
"""

from __future__ import annotations

import copy
import mmap
import re
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from hbp_titan.components.dcp_storage import (
    PARTIAL,
    STATE,
    CorruptCheckpoint,
    FolderReader,
    FolderWriter,
    LocalDataPlanner,
    hide,
    read_json,
    verify,
)
from hbp_titan.distributed.world import SLOW_WORK_SECONDS, gather_values, new_group, set_timeout
from hbp_titan.errors import UserError, format_error
from hbp_titan.job_config import Checkpoint

# Of each tensor in the buffer: enough for any dtype.
_ALIGNMENT = 64
# cudaHostRegisterPortable.
_PORTABLE = 1


def local_part(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor; any other tensor as it is."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


class PinnedStaging:
    """The local parts of a set of tensors in one block of host memory, pinned where they come from a GPU."""

    def __init__(self) -> None:
        self._block = torch.empty(0, dtype=torch.uint8)

    @torch.no_grad()
    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """CPU copies of the local parts, by name; good until the next call. Returns when the last byte is there."""
        parts = {name: local_part(tensor) for name, tensor in tensors.items()}
        ends = [0]
        for part in parts.values():
            ends.append(ends[-1] + -(-part.nbytes // _ALIGNMENT) * _ALIGNMENT)
        on_gpu = any(part.is_cuda for part in parts.values())
        if self._block.numel() < ends[-1]:
            self._allocate(ends[-1], on_gpu)
        copies = {}
        for (name, part), start in zip(parts.items(), ends, strict=False):
            room = self._block[start : start + part.nbytes]
            copies[name] = room.view(part.dtype).view(part.shape)
            copies[name].copy_(part, non_blocking=True)
        if on_gpu:
            torch.cuda.current_stream().synchronize()
        return copies

    def _allocate(self, size: int, pinned: bool) -> None:
        self.close()
        if not size:
            return
        block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        # Loader workers are forked at each epoch, and Linux gives a child a copy of pinned pages at once. They do not
        # need these.
        block.madvise(mmap.MADV_DONTFORK)
        self._block = torch.frombuffer(block, dtype=torch.uint8)
        if pinned:
            # torch's own pinned allocator would round up to a power of two: gigabytes here.
            _check(torch.cuda.cudart().cudaHostRegister(self._block.data_ptr(), size, _PORTABLE))

    def close(self) -> None:
        """Give the memory back."""
        if self._block.is_pinned():
            _check(torch.cuda.cudart().cudaHostUnregister(self._block.data_ptr()))
        self._block = torch.empty(0, dtype=torch.uint8)


def _check(code: Any) -> None:
    if int(code):
        raise RuntimeError(f"host memory for checkpoints could not be pinned or given back: CUDA error {int(code)}")


ParamGroups = list[dict[str, Any]]


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What a checkpoint holds of the model, by name: everything but frozen weights."""
    # A tied matrix has two names.
    return {name: p for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}


def collect(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> tuple[dict[str, Tensor], ParamGroups]:
    """The live tensors of model and optimizer, sharded as they are; a collective. optimizer: None leaves it out."""
    model_state: dict[str, Any] = get_model_state_dict(model)
    optimizer_state: dict[str, Any] = {"state": {}, "param_groups": []}
    if optimizer is not None:
        optimizer_state = get_optimizer_state_dict(model, optimizer)
    tensors = {f"model.{name}": model_state[name] for name in trained_parameters(model)}
    for name, values in optimizer_state["state"].items():
        tensors |= {f"optimizer.{name}.{key}": value for key, value in values.items()}
    return tensors, optimizer_state["param_groups"]


def restore(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, tensors: dict[str, Tensor], param_groups: ParamGroups
) -> None:
    """Put what `collect` returned, filled from a checkpoint, back to where it belongs; a collective."""
    model_state: dict[str, Any] = {name: tensors[f"model.{name}"] for name in trained_parameters(model)}
    # Only frozen weights are missing: the keys are this model's own.
    options = StateDictOptions(strict=False)
    set_model_state_dict(model, model_state, options=options)
    if optimizer is None:
        return
    states: dict[str, Any] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            parameter, _, key = name.removeprefix("optimizer.").rpartition(".")
            states.setdefault(parameter, {})[key] = value
    groups: list[Any] = [_group(values) for values in param_groups]
    set_optimizer_state_dict(model, optimizer, {"state": states, "param_groups": groups}, options=options)


def _group(values: dict[str, Any]) -> dict[str, Any]:
    # JSON has no tuples: betas is one.
    return {k: tuple(v) if isinstance(v, list) and k != "params" else v for k, v in values.items()}


def rng_state() -> dict[str, Tensor]:
    """The random state of this rank, by the names of a checkpoint."""
    state = {f"rng.{dist.get_rank()}.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state[f"rng.{dist.get_rank()}.cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(tensors: dict[str, Tensor]) -> None:
    """Set what `tensors` has of this rank's random state."""
    for name, value in tensors.items():
        if name == f"rng.{dist.get_rank()}.cpu":
            torch.set_rng_state(value)
        elif name == f"rng.{dist.get_rank()}.cuda":
            torch.cuda.set_rng_state(value)


SHOWN = 20
"""Tensors of a kind that a message names."""


class CheckpointError(UserError):
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

    Raises ValueError where one is missing or has another shape, CorruptCheckpoint where a file cannot be read.
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
        if isinstance(cause, CorruptCheckpoint):
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
    return format_error(error) if expected else f"{type(error).__name__}: {format_error(error)}"


_STEP_FOLDER = re.compile(r"step-(\d+)")


class Checkpointer:
    """Saves and loads what is trained of the model, its optimizer, per-rank RNG and the trainer's own state.

    `state` in stage and load is the trainer's state: plain JSON values, the same on every rank.
    check: called with the state and the folder before any tensor is read; raises ValueError for one of another run.
    at: called with the place before each wait for a disk, which may take SLOW_WORK_SECONDS.
    As a context manager, entered when training begins, it waits at the end for the save that is in flight.
    """

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: Checkpoint,
        check: Callable[[dict[str, Any], Path], None] | None = None,
        at: Callable[[str], None] = lambda where: None,
    ) -> None:
        self.folder = folder
        self.model = model
        self.optimizer = optimizer
        self.config = config
        self.check = check
        self._at = at
        self._loaded_model_only: Path | None = None
        self._buffer = PinnedStaging()
        # Not the control group: its collectives run in the writing thread, while the main thread has others.
        self._group = new_group(backend="gloo", description="checkpoint") if config.enable else None
        self._staged: tuple[FolderWriter, dict[str, Tensor], dict[str, Tensor]] | None = None
        self._thread: threading.Thread | None = None
        self._error: str | None = None
        self._write_seconds: float | None = None

    def stage(self, step: int, state: dict[str, Any], last: bool = False) -> float:
        """Take the state that `write` will save as checkpoint `step`; returns the seconds that training stood still.

        Every rank calls it. Waits for the save before; what that could not write is raised here. last: of the run.
        """
        started = time.perf_counter()
        self.wait()
        model_only = self.config.last_save_model_only and last
        tensors, param_groups = collect(self.model, None if model_only else self.optimizer)
        tensors |= rng_state()
        if self.config.async_mode == "async":
            local = self._buffer.copy(tensors)
        else:
            local = {name: local_part(tensor) for name, tensor in tensors.items()}
        own = {"world_size": dist.get_world_size(), "model_only": model_only, "param_groups": param_groups}
        # Copied too: it is written when training has gone on.
        values = copy.deepcopy(state | own)
        writer = FolderWriter(self.folder / f"step-{step}", dist.get_rank(), values, self._prune)
        self._staged = (writer, tensors, local)
        return time.perf_counter() - started

    def write(self) -> None:
        """Begin to write what `stage` took and return; with async_mode "disabled", return when it is written."""
        assert self._staged is not None, "stage comes first"
        self._thread = threading.Thread(target=self._write, args=self._staged, name="checkpoint", daemon=True)
        self._staged = None
        self._thread.start()
        if self.config.async_mode == "disabled":
            self.wait()

    def _write(self, writer: FolderWriter, tensors: dict[str, Tensor], local: dict[str, Tensor]) -> None:
        """In the thread: every collective here is of the thread's own group."""
        started = time.perf_counter()
        try:
            device = next(iter(tensors.values())).device
            if device.type == "cuda":
                torch.cuda.set_device(device)
            planner = LocalDataPlanner(local)
            dcp.save(tensors, storage_writer=writer, planner=planner, process_group=self._group)
            self._write_seconds = time.perf_counter() - started
        except BaseException as error:
            if dist.get_rank() == 0:
                shutil.rmtree(writer.partial, ignore_errors=True)
            self._error = f"{writer.target} was not saved: {describe(error)}; the checkpoints before it are untouched"

    @property
    def failed(self) -> bool:
        """Whether this rank knows that the last save failed; `wait` raises it."""
        return self._error is not None

    def pop_write_seconds(self) -> dict[str, float]:
        """The key of metrics.jsonl for how long the last save took to write; nothing until that is known, and once."""
        seconds, self._write_seconds = self._write_seconds, None
        return {} if seconds is None else {"checkpoint_write_seconds": seconds}

    def wait(self) -> None:
        """Return when no save is in flight. Raises CheckpointError where the last one failed."""
        self._join()
        if self._error is not None:
            raise CheckpointError([self._error])

    def _join(self) -> None:
        if self._thread is not None:
            self._at("the wait for the checkpoint's writing")
            self._thread.join()
            self._thread = None

    def __enter__(self) -> Checkpointer:
        if self._group is not None:
            # The writing threads wait for the slowest rank's disk, which is not a hang.
            set_timeout(self._group, SLOW_WORK_SECONDS)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.wait()
        else:
            # The run failed at a later step: its own error is the one to show, and this checkpoint may still be whole.
            self._join()
        self._buffer.close()

    def load(self) -> dict[str, Any] | None:
        """Load the newest whole checkpoint into model, optimizer and RNG; returns the trainer's state, or None.

        A damaged one is named, and set aside as step-N.damaged once an older one is loaded. Raises ValueError where
        none is left, or where one is another model's.
        """
        damaged: list[tuple[Path, str]] = []
        for path in reversed(self._clean_up()):
            try:
                state = self._load(path)
            except CorruptCheckpoint as error:
                damaged.append((path, str(error)))
                if dist.get_rank() == 0:
                    print(f"warning: {path.name} is damaged, the one before it is tried: {error}", flush=True)
                continue
            if dist.get_rank() == 0:
                for later, _ in damaged:
                    aside = later.with_name(f"{later.name}.damaged")
                    shutil.rmtree(aside, ignore_errors=True)
                    later.rename(aside)
            return state
        if damaged:
            reasons = "; ".join(reason for _, reason in damaged)
            mend = "restore one, or name another --job.dump_folder"
            raise UserError([f"{self.folder}: no checkpoint can be read: {reasons}; {mend}"])
        return None

    def _clean_up(self) -> list[Path]:
        """The complete checkpoints, as rank 0 sees them; what killed saves left is deleted."""
        if dist.get_rank() == 0:
            for left in self.folder.glob(f"step-*{PARTIAL}"):
                shutil.rmtree(left, ignore_errors=True)
        return gather_values(completed_checkpoints(self.folder) if dist.get_rank() == 0 else None)[0]

    def _load(self, path: Path) -> dict[str, Any]:
        checksums, rank, world_size = self.config.verify, dist.get_rank(), dist.get_world_size()
        agree(lambda: verify(path, checksums=checksums, rank=rank, world_size=world_size))
        state = read_state(path)
        if not {"step", "world_size", "model_only", "param_groups"} <= state.keys():
            raise ValueError(f"cannot resume: {path} is no checkpoint of a run; name another --job.dump_folder")
        if self.check:
            self.check(state, path)
        optimizer = None if state["model_only"] else self.optimizer
        tensors, _ = collect(self.model, optimizer)
        if state["world_size"] == world_size:
            saved = FolderReader(path).index
            tensors |= {name: value for name, value in rng_state().items() if name in saved}
        agree(lambda: load_tensors(path, tensors))
        restore(self.model, optimizer, tensors, state["param_groups"])
        set_rng_state(tensors)
        self._loaded_model_only = path if state["model_only"] else None
        return state

    def require_optimizer(self) -> None:
        """Raise ValueError where what was loaded cannot be trained on: the last checkpoint of a shorter run."""
        if self._loaded_model_only:
            raise ValueError(
                f"cannot resume: {self._loaded_model_only} holds the model alone (checkpoint.last_save_model_only): "
                "name it as checkpoint.initial_load_path in another --job.dump_folder"
            )

    def _prune(self) -> None:
        keep = self.config.keep_latest_k
        for old in completed_checkpoints(self.folder)[:-keep] if keep else ():
            try:
                shutil.rmtree(hide(old))
            except OSError as error:
                print(f"warning: {old} could not be deleted: {format_error(error)}", flush=True)


def completed_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of `folder` in ascending step order."""
    found = [(int(match[1]), path) for path in folder.glob("step-*") if (match := _STEP_FOLDER.fullmatch(path.name))]
    return [path for _, path in sorted(found)]
