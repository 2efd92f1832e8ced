"""Checkpointer: the whole state of a run in step-N folders, complete or absent.

Owns when a checkpoint is taken and written, for how long training stands still, which one a run goes on from and how
many are kept. A checkpoint is copied to host memory, written into step-N.partial by a thread with a process group of
its own, and renamed when every rank's part is on disk. The files are checkpoint_files', their way through torch's DCP
checkpoint_storage's.
"""

from __future__ import annotations

import copy
import re
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from hbp_titan.cli import Mistakes, one_line
from hbp_titan.components.checkpoint_files import DamagedCheckpoint, verify
from hbp_titan.components.checkpoint_storage import PARTIAL, FolderReader, FolderWriter, LocalDataPlanner, hide
from hbp_titan.components.checkpoint_tensors import CheckpointError, agree, describe, load_tensors, read_state
from hbp_titan.components.staging import HostBuffer, local_part
from hbp_titan.components.train_state import collect, restore, rng_state, set_rng_state
from hbp_titan.distributed.world import SLOW_WORK_SECONDS, gather_values, new_group, set_timeout
from hbp_titan.job_config import Checkpoint

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
        self._buffer = HostBuffer()
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

    def take_measured(self) -> dict[str, float]:
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
            except DamagedCheckpoint as error:
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
            raise Mistakes([f"{self.folder}: no checkpoint can be read: {reasons}; {mend}"])
        return None

    def _clean_up(self) -> list[Path]:
        """The complete checkpoints, as rank 0 sees them; what killed saves left is deleted."""
        if dist.get_rank() == 0:
            for left in self.folder.glob(f"step-*{PARTIAL}"):
                shutil.rmtree(left, ignore_errors=True)
        return gather_values(completed(self.folder) if dist.get_rank() == 0 else None)[0]

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
        for old in completed(self.folder)[: -self.config.keep_latest_k] if self.config.keep_latest_k else ():
            try:
                shutil.rmtree(hide(old))
            except OSError as error:
                print(f"warning: {old} could not be deleted: {one_line(error)}", flush=True)


def completed(folder: Path) -> list[Path]:
    """The complete checkpoints of `folder` in ascending step order."""
    found = [(int(match[1]), path) for path in folder.glob("step-*") if (match := _STEP_FOLDER.fullmatch(path.name))]
    return [path for _, path in sorted(found)]
