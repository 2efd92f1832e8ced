"""Checkpoints of the whole state of a run: step-N folders, each complete or absent.

This file follows the data:

    stage   copy the local shards to host memory, so that training continues
    write   a thread with a process group of its own writes step-N.partial; rank 0 renames it once all files are on disk
    verify  compare sizes and checksums with the manifest
    load    fill model, optimizer and RNG from the newest intact checkpoint, resharding if the ranks differ

Owns the names in a checkpoint: model.<parameter>, optimizer.<parameter>.<state>, rng.<rank>.<device>. Values that are
not tensors (the optimizer's settings per parameter group) go into state.json. The files belong to dcp_storage.py.
"""

from __future__ import annotations

import copy
import re
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.tensor import DTensor

from hbp_titan.components.dcp_storage import (
    MANIFEST,
    PARTIAL,
    STATE,
    TENSORS,
    CorruptCheckpoint,
    FolderReader,
    FolderWriter,
    LocalDataPlanner,
    check_file_name,
    check_regular_file,
    move_to_trash,
    read_json,
    read_tensor_index,
)
from hbp_titan.distributed.world import SLOW_WORK_SECONDS, gather_values, new_group, set_timeout
from hbp_titan.errors import UserError, WorkerGroup, format_error
from hbp_titan.job_config import Checkpoint
from hbp_titan.models.layers import is_adapter
from hbp_titan.utils import first_n, sha256_file

ParamGroups = list[dict[str, Any]]
MAX_LISTED = 20
"""Tensors of one kind in a message."""
# Bytes; enough for every dtype.
_ALIGNMENT = 64
# hashlib releases the GIL: a rank with many files to verify uses several cores.
_VERIFY_THREADS = 4
_STEP_FOLDER = re.compile(r"step-(\d+)")


class Checkpointer:
    """Saves and loads the trained part of the model, its optimizer, each rank's RNG and the trainer's state.

    The trainer's state (`state` in stage and load) is plain JSON values, the same on every rank. As a context manager
    around training it waits at the end for the save in flight.

    Args:
        check: called with (state, folder) before tensors are read; raises ValueError for another run's checkpoint.
        at: called with a description before each wait for a disk, which may take SLOW_WORK_SECONDS.
    """

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: Checkpoint,
        check: Callable[[dict[str, Any], Path], None] = lambda state, folder: None,
        at: Callable[[str], None] = lambda where: None,
    ) -> None:
        self.folder = folder
        self.model = model
        self.optimizer = optimizer
        self.config = config
        self.check = check
        self._at = at
        self._loaded_model_only: Path | None = None
        self._staging = PinnedStaging()
        # Not the control group: its collectives run in the writing thread, while the main thread has others.
        self._group = new_group(backend="gloo", description="checkpoint") if config.enable else None
        self._staged: tuple[FolderWriter, dict[str, Tensor], dict[str, Tensor]] | None = None
        self._thread: threading.Thread | None = None
        self._error: str | None = None
        self._write_seconds: float | None = None

    def stage(self, step: int, state: dict[str, Any], last: bool = False) -> float:
        """Copy the state that `write` saves as checkpoint `step`; return the seconds for which training stood still.

        Called on every rank. Waits for the previous save and raises its error. last: whether it is the run's last step.
        """
        started = time.perf_counter()
        self.wait()
        model_only = self.config.last_save_model_only and last
        tensors, param_groups = collect_state(self.model, None if model_only else self.optimizer)
        tensors |= rng_state()
        if self.config.async_mode == "async":
            local = self._staging.copy(tensors)
        else:
            local = {name: local_part(tensor) for name, tensor in tensors.items()}
        own = {"world_size": dist.get_world_size(), "model_only": model_only, "param_groups": param_groups}
        # A copy as well: the thread writes it after the next step has changed the original.
        values = copy.deepcopy(state | own)
        writer = FolderWriter(self.folder / f"step-{step}", dist.get_rank(), values, self._prune)
        self._staged = (writer, tensors, local)
        return time.perf_counter() - started

    def write(self) -> None:
        """Start writing what `stage` copied; with async_mode "disabled" return when it is written."""
        assert self._staged is not None, "stage comes first"
        self._thread = threading.Thread(target=self._write, args=self._staged, name="checkpoint", daemon=True)
        self._staged = None
        self._thread.start()
        if self.config.async_mode == "disabled":
            self.wait()

    def _write(self, writer: FolderWriter, tensors: dict[str, Tensor], local: dict[str, Tensor]) -> None:
        """Write in the thread, with collectives of the thread's own group only."""
        started = time.perf_counter()
        try:
            device = next(iter(tensors.values())).device
            if device.type == "cuda":
                # The current device is per thread.
                torch.cuda.set_device(device)
            planner = LocalDataPlanner(local)
            dcp.save(tensors, storage_writer=writer, planner=planner, process_group=self._group)
            self._write_seconds = time.perf_counter() - started
        except BaseException as error:
            # Kept for `wait`: an exception in a thread would only be printed.
            if dist.get_rank() == 0:
                shutil.rmtree(writer.partial, ignore_errors=True)
            self._error = f"{writer.target} was not saved: {_describe(error)}; earlier checkpoints are unchanged"

    @property
    def failed(self) -> bool:
        """Whether this rank knows that the last save failed; `wait` raises the error."""
        return self._error is not None

    def pop_write_seconds(self) -> dict[str, float]:
        """Return the metric of how long the last save took to write, once; {} if it is not known yet."""
        seconds, self._write_seconds = self._write_seconds, None
        return {} if seconds is None else {"checkpoint_write_seconds": seconds}

    def wait(self) -> None:
        """Return when no save is in flight; raise UserError, on every rank, if the last one failed."""
        self._join()
        if self._error is not None:
            raise UserError([self._error])

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

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._join()
        # If the run failed at a later step, that error is shown; this checkpoint may be complete nevertheless.
        if kind is None:
            self.wait()
        self._staging.close()

    def _prune(self) -> None:
        keep = self.config.keep_latest_k
        for old in completed_checkpoints(self.folder)[:-keep] if keep else ():
            try:
                shutil.rmtree(move_to_trash(old))
            except OSError as error:
                print(f"warning: {old} could not be deleted: {format_error(error)}", flush=True)

    def load(self) -> dict[str, Any] | None:
        """Load the newest intact checkpoint into model, optimizer and RNG; return the trainer's state, or None.

        A corrupt one is reported, and renamed to step-N.damaged once an older one is loaded. Raises ValueError if all
        are corrupt, or for a checkpoint of another model.
        """
        corrupt: list[tuple[Path, str]] = []
        for path in reversed(self._clean_up()):
            try:
                state = self._load(path)
            except CorruptCheckpoint as error:
                corrupt.append((path, str(error)))
                if dist.get_rank() == 0:
                    print(f"warning: {path.name} is corrupt; trying the previous checkpoint: {error}", flush=True)
                continue
            # Renamed only now: while no checkpoint is loaded, the user may still repair one.
            if dist.get_rank() == 0:
                for later, _ in corrupt:
                    aside = later.with_name(f"{later.name}.damaged")
                    shutil.rmtree(aside, ignore_errors=True)
                    later.rename(aside)
            return state
        if corrupt:
            reasons = "; ".join(reason for _, reason in corrupt)
            fix = "restore one, or use a different --job.dump_folder"
            raise UserError([f"{self.folder}: no checkpoint can be read: {reasons}; {fix}"])
        return None

    def _clean_up(self) -> list[Path]:
        """Delete what killed saves left behind; return the complete checkpoints as rank 0 sees them."""
        if dist.get_rank() == 0:
            for left in self.folder.glob(f"step-*{PARTIAL}"):
                shutil.rmtree(left, ignore_errors=True)
        return gather_values(completed_checkpoints(self.folder) if dist.get_rank() == 0 else None)[0]

    def _load(self, path: Path) -> dict[str, Any]:
        _on_all_ranks(lambda: verify(path, self.config.verify))
        state = read_state(path)
        if not {"step", "world_size", "model_only", "param_groups"} <= state.keys():
            raise ValueError(f"cannot resume: {path} is not a training checkpoint; use a different --job.dump_folder")
        self.check(state, path)
        optimizer = None if state["model_only"] else self.optimizer
        # The live tensors, which are filled in place; settings of param groups stay this run's.
        tensors, _ = collect_state(self.model, optimizer)
        if state["world_size"] == dist.get_world_size():
            # A start on other devices may lack some of them.
            saved = FolderReader(path).index
            tensors |= {name: value for name, value in rng_state().items() if name in saved}
        _on_all_ranks(lambda: load_tensors(path, tensors))
        set_rng_state(tensors)
        self._loaded_model_only = path if state["model_only"] else None
        return state

    def require_optimizer(self) -> None:
        """Raise ValueError if the loaded checkpoint cannot be trained further: it lacks the optimizer state."""
        if self._loaded_model_only:
            raise ValueError(
                f"cannot resume: {self._loaded_model_only} contains model weights only "
                "(checkpoint.last_save_model_only); pass it as checkpoint.initial_load_path to a run with another "
                "--job.dump_folder"
            )


def completed_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints in `folder` in ascending step order."""
    found = [(int(match[1]), path) for path in folder.glob("step-*") if (match := _STEP_FOLDER.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that a checkpoint contains, with LoRA the adapters, by name. A tied one has two names."""
    named = dict(model.named_parameters(remove_duplicate=False))
    # A full training also saves what no gradient trains: the biases of DeepSeek-V3's routers.
    adapted = any(map(is_adapter, named))
    return {name: p for name, p in named.items() if p.requires_grad or not adapted}


def collect_state(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> tuple[dict[str, Tensor], ParamGroups]:
    """Return the live, sharded tensors of model and optimizer by name, and the param groups; a collective."""
    model_state: dict[str, Any] = get_model_state_dict(model)
    optimizer_state: dict[str, Any] = {"state": {}, "param_groups": []}
    if optimizer is not None:
        optimizer_state = get_optimizer_state_dict(model, optimizer)
    tensors = {f"model.{name}": model_state[name] for name in trained_parameters(model)}
    for name, values in optimizer_state["state"].items():
        tensors |= {f"optimizer.{name}.{key}": value for key, value in values.items()}
    return tensors, optimizer_state["param_groups"]


def rng_state() -> dict[str, Tensor]:
    """Return the random states of this rank by checkpoint name."""
    state = {f"rng.{dist.get_rank()}.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state[f"rng.{dist.get_rank()}.cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(tensors: Mapping[str, Tensor]) -> None:
    """Set this rank's random states, if `tensors` has them."""
    if (cpu := tensors.get(f"rng.{dist.get_rank()}.cpu")) is not None:
        torch.set_rng_state(cpu)
    if (cuda := tensors.get(f"rng.{dist.get_rank()}.cuda")) is not None:
        torch.cuda.set_rng_state(cuda)


def local_part(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a DTensor, or any other tensor as it is."""
    local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
    return getattr(local, "_tensor", local)  # what a weight that FSDP2 gathers in float8 wraps


class PinnedStaging:
    """Copies of tensors in one block of host memory, allocated once and pinned if the tensors are on a GPU."""

    def __init__(self) -> None:
        self._block = torch.empty(0, dtype=torch.uint8)

    @torch.no_grad()
    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return complete CPU copies of the local parts by name; valid until the next call."""
        parts = {name: local_part(tensor) for name, tensor in tensors.items()}
        ends = [0]
        for part in parts.values():
            ends.append(ends[-1] + -(-part.nbytes // _ALIGNMENT) * _ALIGNMENT)
        on_gpu = any(part.is_cuda for part in parts.values())
        if self._block.numel() < ends[-1]:
            self._allocate(ends[-1], on_gpu)
        copies = {}
        for (name, part), start in zip(parts.items(), ends, strict=False):
            copies[name] = self._block[start : start + part.nbytes].view(part.dtype).view(part.shape)
            copies[name].copy_(part, non_blocking=True)
        if on_gpu:
            torch.cuda.current_stream().synchronize()
        return copies

    def _allocate(self, size: int, pinned: bool) -> None:
        self.close()
        if not size:
            return
        from hbp_titan.distributed.offload import host_memory

        self._block = host_memory(size, pinned, "checkpoints; raise the job's memory limit")

    def close(self) -> None:
        """Free the memory."""
        self._block = torch.empty(0, dtype=torch.uint8)


def verify(folder: Path, checksums: bool = True) -> None:
    """Raise CorruptCheckpoint unless every file has the size and, with `checksums`, the content in the manifest.

    Each rank of the job hashes its share of the files; together they hash all.
    """
    path = folder / MANIFEST
    files = read_json(path).get("files")
    if not isinstance(files, dict) or not {STATE, TENSORS} <= files.keys():
        raise CorruptCheckpoint(f"{path}: does not list {STATE} and {TENSORS}")
    for name, entry in files.items():
        size = check_regular_file(folder / check_file_name(path, name))
        expected = entry.get("bytes") if isinstance(entry, dict) else None
        if size != expected:
            raise CorruptCheckpoint(f"{folder / name}: has {size} bytes instead of {expected} in {MANIFEST}")
    read_json(folder / STATE)
    for name, saved in read_tensor_index(folder).items():
        for file, _, _ in saved.chunks:
            if file not in files:
                raise CorruptCheckpoint(f"{folder / TENSORS}: {name!r} is in {file}, which {MANIFEST} does not list")
    if checksums:
        largest_first = sorted(files, key=lambda name: (-files[name]["bytes"], name))
        mine = [largest_first[i] for i in _ranks().share(len(files))]
        with ThreadPoolExecutor(_VERIFY_THREADS) as pool:
            for name, found in zip(mine, pool.map(lambda name: _sha256(folder / name), mine), strict=True):
                if found != files[name].get("sha256"):
                    raise CorruptCheckpoint(f"{folder / name}: content does not match the checksum in {MANIFEST}")


def _sha256(path: Path) -> str:
    try:
        return sha256_file(path)
    except OSError as error:
        raise CorruptCheckpoint(f"{path}: {error.strerror}") from None


def _ranks() -> WorkerGroup:
    if not dist.is_initialized():
        return WorkerGroup()
    return WorkerGroup(dist.get_rank(), dist.get_world_size(), gather_values)


def _on_all_ranks(work: Callable[[], None]) -> None:
    """Run `work` on every rank; raise on all ranks if any raises CorruptCheckpoint or another ValueError."""

    def attempt() -> str:
        try:
            work()
        except CorruptCheckpoint as error:
            return str(error)
        return ""

    # As a value: raise_on_all_ranks would turn it into a UserError, and no older checkpoint would be tried.
    damage = next(filter(None, _ranks().run_on_all(attempt)), "")
    if damage:
        raise CorruptCheckpoint(damage)


def read_state(path: Path) -> dict[str, Any]:
    """Return the trainer's state of checkpoint `path`."""
    return read_json(path / STATE)


def load_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Fill `tensors`, whole or DTensors by checkpoint name, from checkpoint `path`, resharding where necessary.

    Each rank reads what it holds without communicating, so a file that only one rank cannot read blocks no other rank.
    Raises ValueError if a tensor is missing or has another shape, CorruptCheckpoint if a file cannot be read.
    """
    reader = FolderReader(path)
    saved = {name: reader.index[name].shape for name in tensors if name in reader.index}
    _check_shapes(path, saved, {name: tensor.shape for name, tensor in tensors.items()})
    try:
        _without_group(
            dcp.load, tensors, storage_reader=reader, planner=dcp.DefaultLoadPlanner(flatten_state_dict=False)
        )
    except CheckpointException as error:
        cause = error.failures[0][0]
        if isinstance(cause, CorruptCheckpoint):
            raise cause from None
        raise RuntimeError(f"{path} could not be loaded: {_describe(error)}") from cause


def save_model_tensors(target: Path, tensors: Mapping[str, Tensor], state: dict[str, Any]) -> None:
    """Write whole tensors by parameter name as a checkpoint that a run can start from; needs no process group."""
    named = {f"model.{name}": tensor for name, tensor in tensors.items()}
    try:
        _without_group(dcp.save, named, storage_writer=FolderWriter(target, 0, state), planner=LocalDataPlanner(named))
    except CheckpointException as error:
        raise UserError([f"{target} was not saved: {_describe(error)}"]) from None


def load_model_tensors(path: Path, model: nn.Module) -> dict[str, Tensor]:
    """Return the full tensors of checkpoint `path` for the trained parameters of `model`, which may be on meta.

    Needs no process group.
    """
    tensors = {name: torch.empty(p.shape, dtype=p.dtype) for name, p in trained_parameters(model).items()}
    load_model_shards(path, tensors)
    return tensors


def load_model_shards(path: Path, shards: Mapping[str, Tensor]) -> None:
    """Fill a model's tensors, sharded or whole by parameter name, from checkpoint `path`; called on every rank.

    Raises ValueError before reading, naming all tensors that are missing, unknown or of another shape.
    """
    check_model_shapes(path, {name: tensor.shape for name, tensor in shards.items()})
    _on_all_ranks(lambda: verify(path))
    _on_all_ranks(lambda: load_tensors(path, {f"model.{name}": tensor for name, tensor in shards.items()}))


def check_model_shapes(path: Path, shapes: Mapping[str, Sequence[int]]) -> None:
    """Raise ValueError unless checkpoint `path` contains exactly the model tensors of these names and shapes."""
    saved = {name: tensor.shape for name, tensor in FolderReader(path).index.items() if name.startswith("model.")}
    _check_shapes(path, saved, {f"model.{name}": shape for name, shape in shapes.items()})


def _check_shapes(path: Path, found: Mapping[str, Sequence[int]], expected: Mapping[str, Sequence[int]]) -> None:
    kinds = {
        "missing": sorted(expected.keys() - found.keys()),
        "unknown": sorted(found.keys() - expected.keys()),
        "wrong shape": [
            f"{name} {list(found[name])} instead of {list(expected[name])}"
            for name in sorted(found.keys() & expected.keys())
            if tuple(found[name]) != tuple(expected[name])
        ],
    }
    problems = [f"{kind}: {first_n(names, MAX_LISTED)}" for kind, names in kinds.items() if names]
    if problems:
        raise ValueError(
            f"{path}: its tensors are not those of this model; {'; '.join(problems)}; select the model that it was "
            "saved from"
        )


def _without_group(function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Call a DCP function for this process alone, without its warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        function(*args, no_dist=True, **kwargs)


def _describe(error: BaseException) -> str:
    """Return `error` on one line; for a DCP error the first rank's, and how many other ranks failed."""
    if isinstance(error, CheckpointException):
        (rank, (cause, _)), *others = sorted(error.failures.items())
        return f"{_describe(cause)} (rank {rank}{f' and {len(others)} more' if others else ''})"
    expected = isinstance(error, OSError | ValueError)
    return format_error(error) if expected else f"{type(error).__name__}: {format_error(error)}"
