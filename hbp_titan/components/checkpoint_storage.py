"""What torch's distributed checkpoint (DCP) writes to and reads from: one folder of checkpoint_files.

Owns the StorageWriter, which makes a folder visible only when all of it is on disk, the StorageReader, and the planner
that takes data from host copies. DCP plans who writes and reads which chunk, for any DTensor and world size. Its own
file storage reads a pickle (`.metadata`).
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, StorageReader, StorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from hbp_titan.components.checkpoint_files import (
    MANIFEST,
    SAFETENSORS_DTYPES,
    STATE,
    TENSORS,
    DamagedCheckpoint,
    read_tensor_index,
    sync_folder,
    write_json,
    write_safetensors,
)

PARTIAL = ".partial"


class WriteError(ValueError):
    """A checkpoint could not be written; the message names the folder, the bytes it needs and those that are free."""


class LocalDataPlanner(DefaultSavePlanner):
    """Plans for the tensors of a flat state, and writes `local` in place of each one's own data on this rank."""

    def __init__(self, local: Mapping[str, Tensor]) -> None:
        super().__init__(flatten_state_dict=False)
        self.local = local

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.local[index.fqn]


class FolderWriter(StorageWriter):
    """Writes one checkpoint: each rank its file; then rank 0 the rest, and the rename that makes it visible.

    state: what state.json gets. after: called on rank 0 when the checkpoint is there. DCP brings an error of any rank
    to all of them.
    """

    def __init__(
        self, target: Path, rank: int, state: dict[str, Any], after: Callable[[], None] = lambda: None
    ) -> None:
        self.target = target
        self.after = after
        self.partial = target.with_name(target.name + PARTIAL)
        self.rank = rank
        self.state = state

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On rank 0, before any rank writes: an empty folder, and room for all of it."""
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)
        needed = sum(item.tensor_storage_size() or 0 for plan in plans for item in plan.items)
        free = shutil.disk_usage(self.partial).free
        if needed > free:
            raise self._no_space("the checkpoint", needed, free)
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        tensors = []
        for item in plan.items:
            data = planner.resolve_data(item)
            assert isinstance(data, Tensor), f"{item.index.fqn} is not a tensor"
            # An empty shard of an uneven split holds nothing to read.
            if data.numel() or not data.dim():
                tensors.append((item, data.cpu().contiguous()))
        results = []
        if tensors:
            path = self.partial / f"rank-{self.rank}.safetensors"
            try:
                entry = write_safetensors(path, [(item.index.fqn, data) for item, data in tensors])
            except OSError as error:
                raise self._write_error(error, path, sum(data.nbytes for _, data in tensors)) from None
            results = [WriteResult(item.index, data.nbytes, (path.name, entry)) for item, data in tensors]
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On rank 0, after all ranks wrote. Everything is on disk before the name is."""
        files: dict[str, Any] = {}
        file_of = {}
        for result in (result for of_rank in results for result in of_rank):
            name, files[name] = result.storage_data[0], result.storage_data[1]
            file_of[result.index.fqn, result.index.offset] = name
        tensors = {
            name: {
                "dtype": SAFETENSORS_DTYPES[saved.properties.dtype],
                "shape": list(saved.size),
                "chunks": [
                    [file_of[name, chunk.offsets], list(chunk.offsets), list(chunk.sizes)]
                    for chunk in saved.chunks
                    if 0 not in chunk.sizes
                ],
            }
            for name, saved in metadata.state_dict_metadata.items()
            if isinstance(saved, TensorStorageMetadata)
        }
        try:
            files[TENSORS] = write_json(self.partial / TENSORS, tensors, indent=None)
            files[STATE] = write_json(self.partial / STATE, self.state)
            write_json(self.partial / MANIFEST, {"files": files})
            sync_folder(self.partial)
            old = hide(self.target)
            self.partial.rename(self.target)
            sync_folder(self.target.parent)
            shutil.rmtree(old, ignore_errors=True)
            self.after()
        except OSError as error:
            raise self._write_error(error, self.partial, sum(entry["bytes"] for entry in files.values())) from None

    def _write_error(self, error: OSError, path: Path, needed: int) -> WriteError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return self._no_space(path.name, needed, shutil.disk_usage(self.partial).free)
        hint = "; every node must see the same folder" if error.errno == errno.ENOENT else ""
        return WriteError(f"{path}: {error.strerror}{hint}")

    def _no_space(self, what: str, needed: int, free: int) -> WriteError:
        return WriteError(
            f"{self.partial}: no space for {what}: {needed:,} bytes needed, {free:,} free: free some, or lower "
            "checkpoint.keep_latest_k"
        )

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True


def hide(folder: Path) -> Path:
    """Rename a checkpoint, if it is there, to what is never read; so no moment shows a part of it under its name."""
    hidden = folder.with_name(f"{folder.name}.deleted{PARTIAL}")
    if folder.exists():
        shutil.rmtree(hidden, ignore_errors=True)
        folder.rename(hidden)
    return hidden


class FolderReader(StorageReader):
    """Reads chunks of the tensors of one folder; DamagedCheckpoint where a file is not what tensors.json says."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index = read_tensor_index(folder)

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        pass

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return Metadata(
            {
                name: TensorStorageMetadata(
                    TensorProperties(dtype=saved.dtype),
                    torch.Size(saved.shape),
                    [ChunkStorageMetadata(torch.Size(o), torch.Size(s)) for _, o, s in saved.chunks],
                )
                for name, saved in self.index.items()
            }
        )

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file: dict[str, list[tuple[ReadItem, tuple[int, ...]]]] = {}
        for item in plan.items:
            wanted = tuple(item.storage_index.offset or ())
            chunks = self.index[item.storage_index.fqn].chunks
            file, shape = next((file, shape) for file, offsets, shape in chunks if offsets == wanted)
            by_file.setdefault(file, []).append((item, shape))
        for file, items in by_file.items():
            try:
                with safe_open(self.folder / file, framework="pt") as opened:
                    for item, shape in items:
                        self._read(opened, item, shape, planner)
            except (SafetensorError, OSError) as error:
                raise DamagedCheckpoint(f"{self.folder / file}: not a whole safetensors file: {error}") from None
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _read(self, opened: Any, item: ReadItem, shape: tuple[int, ...], planner: LoadPlanner) -> None:
        name = item.storage_index.fqn
        found = opened.get_slice(name)
        dtype = SAFETENSORS_DTYPES[self.index[name].dtype]
        if (tuple(found.get_shape()), found.get_dtype()) != (shape, dtype):
            raise DamagedCheckpoint(
                f"{self.folder}: {name} is {found.get_dtype()} {found.get_shape()} in its file, "
                f"{TENSORS} says {dtype} {list(shape)}"
            )
        part = tuple(slice(o, o + n) for o, n in zip(item.storage_offsets, item.lengths, strict=True))
        data = found[part] if part else opened.get_tensor(name)
        target = planner.resolve_tensor(item).detach()
        target.copy_(data)
        planner.commit_tensor(item, target)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True
