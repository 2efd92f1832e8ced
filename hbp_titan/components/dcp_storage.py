"""The storage behind torch's distributed checkpoint (DCP): one folder per checkpoint, without pickles.

DCP plans which rank writes and reads which chunk, for any DTensor and world size; its own file storage reads a pickle
(`.metadata`). Owns the format of the folder:

    rank-R.safetensors   the shards that rank R wrote
    tensors.json         per tensor: dtype (safetensors' name), shape, chunks = [[file, offsets, shape], ...]
    state.json           the trainer's state
    manifest.json        files = {name: {bytes, sha256}} of the three kinds above

Only names of files in the folder itself are accepted: no paths, no links. CorruptCheckpoint names the file at fault.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
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

from hbp_titan.errors import UserError

STATE, TENSORS, MANIFEST = "state.json", "tensors.json", "manifest.json"
PARTIAL = ".partial"
"""Suffix of folders that are being written or deleted; nothing reads them."""
SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
TORCH_DTYPES = {name: dtype for dtype, name in SAFETENSORS_DTYPES.items()}
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
# Bytes hashed and written at a time: large enough that Python's overhead does not matter.
_BLOCK = 1 << 24


class CorruptCheckpoint(ValueError):
    """A folder that is not an intact checkpoint; the message names the file and what is wrong with it."""


@dataclass(frozen=True)
class SavedTensor:
    """Where a tensor is stored. chunks: (file, offsets in the whole tensor, shape)."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]


class _FolderStorage:
    """The parts of DCP's storage interface for which a folder has nothing to do."""

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        pass

    def prepare_local_plan(self, plan: Any) -> Any:
        return plan

    def prepare_global_plan(self, plans: Any) -> Any:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True


class LocalDataPlanner(DefaultSavePlanner):
    """Save planner that writes this rank's data from `local` (by tensor name) instead of from the live tensors."""

    def __init__(self, local: Mapping[str, Tensor]) -> None:
        super().__init__(flatten_state_dict=False)
        self.local = local

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.local[index.fqn]


class FolderWriter(_FolderStorage, StorageWriter):
    """Writes one checkpoint: each rank its file, then rank 0 the rest and the rename that makes it visible.

    DCP brings an error of any rank to all ranks. state: content of state.json. on_complete: called on rank 0 when the
    checkpoint is visible.
    """

    def __init__(
        self, target: Path, rank: int, state: dict[str, Any], on_complete: Callable[[], None] = lambda: None
    ) -> None:
        self.target = target
        self.partial = target.with_name(target.name + PARTIAL)
        self.rank = rank
        self.state = state
        self.on_complete = on_complete

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On rank 0, before any rank writes: create an empty folder and check the free space."""
        # A killed save of the same step may have left files that this one does not write.
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)
        needed = sum(item.tensor_storage_size() or 0 for plan in plans for item in plan.items)
        free = shutil.disk_usage(self.partial).free
        if needed > free:
            raise self._no_space("the checkpoint", needed, free)
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """On each rank: write the rank's file."""
        tensors = []
        for item in plan.items:
            data = planner.resolve_data(item)
            assert isinstance(data, Tensor), f"{item.index.fqn} is not a tensor"
            # Uneven splits have empty shards, which no reader asks for.
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
        return _done(results)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On rank 0, after all ranks wrote: write the other files and make the checkpoint visible."""
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
            # The content has to be on disk before the name: a crash in between must not leave a visible half.
            sync_folder(self.partial)
            old = move_to_trash(self.target)
            self.partial.rename(self.target)
            sync_folder(self.target.parent)
            shutil.rmtree(old, ignore_errors=True)
            self.on_complete()
        except OSError as error:
            raise self._write_error(error, self.partial, sum(entry["bytes"] for entry in files.values())) from None

    def _write_error(self, error: OSError, path: Path, needed: int) -> UserError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return self._no_space(path.name, needed, shutil.disk_usage(self.partial).free)
        hint = "; every node must see the same folder" if error.errno == errno.ENOENT else ""
        return UserError([f"{path}: {error.strerror}{hint}"])

    def _no_space(self, what: str, needed: int, free: int) -> UserError:
        # Exact bytes: rounded figures of a nearly full disk could look alike.
        message = f"{self.partial}: no space for {what}: {needed:,} bytes needed, {free:,} free"
        return UserError([f"{message}; free some space, or lower checkpoint.keep_latest_k"])


class FolderReader(_FolderStorage, StorageReader):
    """Reads tensor chunks of one folder; raises CorruptCheckpoint if a file differs from what tensors.json lists."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index = read_tensor_index(folder)

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

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file: dict[str, list[tuple[ReadItem, tuple[int, ...]]]] = {}
        for item in plan.items:
            wanted = tuple(item.storage_index.offset or ())
            chunks = self.index[item.storage_index.fqn].chunks
            file, shape = next((file, shape) for file, offsets, shape in chunks if offsets == wanted)
            by_file.setdefault(file, []).append((item, shape))
        # Each file is opened once: headers of large checkpoints take long to parse.
        for file, items in by_file.items():
            try:
                with safe_open(self.folder / file, framework="pt") as opened:
                    for item, shape in items:
                        self._read(opened, item, shape, planner)
            except (SafetensorError, OSError) as error:
                raise CorruptCheckpoint(f"{self.folder / file}: not a complete safetensors file: {error}") from None
        return _done(None)

    def _read(self, opened: Any, item: ReadItem, shape: tuple[int, ...], planner: LoadPlanner) -> None:
        name = item.storage_index.fqn
        found = opened.get_slice(name)
        dtype = SAFETENSORS_DTYPES[self.index[name].dtype]
        if (tuple(found.get_shape()), found.get_dtype()) != (shape, dtype):
            raise CorruptCheckpoint(
                f"{self.folder}: {name} is {found.get_dtype()} {found.get_shape()} in its file, but "
                f"{dtype} {list(shape)} in {TENSORS}"
            )
        part = tuple(slice(o, o + n) for o, n in zip(item.storage_offsets, item.lengths, strict=True))
        # safetensors cannot slice a scalar.
        data = found[part] if part else opened.get_tensor(name)
        target = planner.resolve_tensor(item).detach()
        target.copy_(data)
        planner.commit_tensor(item, target)


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


def move_to_trash(folder: Path) -> Path:
    """Rename a checkpoint, if it exists, to a name that nothing reads; return that name.

    Deleting it under its own name would leave a visible part of it for a moment.
    """
    trash = folder.with_name(f"{folder.name}.deleted{PARTIAL}")
    if folder.exists():
        shutil.rmtree(trash, ignore_errors=True)
        folder.rename(trash)
    return trash


def write_safetensors(path: Path, tensors: Sequence[tuple[str, Tensor]]) -> dict[str, Any]:
    """Write named CPU tensors as a safetensors file and sync it to disk; return its manifest entry.

    The format (https://huggingface.co/docs/safetensors): u64 size of the header, the header as JSON, the data.
    """
    # Not by the library, which would hold the whole file in memory once more, and could not hash it while writing.
    header: dict[str, Any] = {}
    end = 0
    # The largest dtypes first, so that every offset is aligned.
    ordered = sorted(tensors, key=lambda pair: -pair[1].element_size())
    for name, tensor in ordered:
        start, end = end, end + tensor.nbytes
        dtype = SAFETENSORS_DTYPES[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    views = (tensor.reshape(-1).view(torch.uint8).numpy().data for _, tensor in ordered)
    return _write(path, (len(text).to_bytes(8, "little"), text), views)


def write_json(path: Path, values: dict[str, Any], indent: int | None = 1) -> dict[str, Any]:
    """Write `values` as JSON and sync the file to disk; return its manifest entry."""
    return _write(path, (json.dumps(values, indent=indent).encode(),))


def _write(path: Path, *parts: Iterable[bytes | memoryview]) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for part in parts:
            for data in part:
                for start in range(0, len(data), _BLOCK):
                    block = data[start : start + _BLOCK]
                    digest.update(block)
                    file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


def sync_folder(folder: Path) -> None:
    """Sync the names in `folder` to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file of a checkpoint; raise CorruptCheckpoint if there is none."""
    check_regular_file(path)
    try:
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise CorruptCheckpoint(f"{path}: {error.strerror}") from None
    # A hostile file may also nest deeper than the parser's stack.
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpoint(f"{path}: not JSON ({type(error).__name__})") from None
    if not isinstance(values, dict):
        raise CorruptCheckpoint(f"{path}: not a JSON object")
    return values


def read_tensor_index(folder: Path) -> dict[str, SavedTensor]:
    """Return tensors.json of `folder`, with every value checked: chunks lie inside their tensor and fill it."""
    path = folder / TENSORS
    index = {}
    for name, values in read_json(path).items():
        try:
            shape = _sizes(values["shape"])
            chunks = tuple((check_file_name(path, f), _sizes(o), _sizes(s)) for f, o, s in values["chunks"])
            dtype = TORCH_DTYPES[values["dtype"]]
        except CorruptCheckpoint:
            raise
        except (KeyError, TypeError, ValueError):
            raise CorruptCheckpoint(f"{path}: the entry of {name!r} does not describe a tensor") from None
        for _, offsets, sizes in chunks:
            inside = len(offsets) == len(sizes) == len(shape) and all(
                start + size <= whole for start, size, whole in zip(offsets, sizes, shape, strict=True)
            )
            if not inside:
                raise CorruptCheckpoint(f"{path}: a chunk of {name!r} lies outside the tensor's shape {list(shape)}")
        if sum(prod(sizes) for _, _, sizes in chunks) != prod(shape):
            raise CorruptCheckpoint(f"{path}: the chunks of {name!r} do not fill its shape {list(shape)}")
        index[name] = SavedTensor(dtype, shape, chunks)
    return index


def _sizes(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(type(value) is int and 0 <= value < 1 << 62 for value in values):
        raise ValueError("not a list of sizes")
    return tuple(values)


def check_file_name(path: Path, name: Any) -> str:
    """Return `name`, which `path` lists, if it is the plain name of a file; raise CorruptCheckpoint otherwise."""
    if not isinstance(name, str) or not _FILE_NAME.fullmatch(name):
        raise CorruptCheckpoint(f"{path}: {name!r} is not the name of a file in this folder")
    return name


def check_regular_file(path: Path) -> int:
    """Return the size of a file in bytes; raise CorruptCheckpoint if it is missing, a link or a device."""
    try:
        found = path.lstat()
    except OSError as error:
        raise CorruptCheckpoint(f"{path}: {error.strerror}") from None
    if not stat.S_ISREG(found.st_mode):
        raise CorruptCheckpoint(f"{path}: not a regular file; links and devices are not followed")
    return found.st_size
