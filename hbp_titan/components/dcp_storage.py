"""What torch's distributed checkpoint (DCP) writes to and reads from: one folder of checkpoint_files.

Owns the StorageWriter, which makes a folder visible only when all of it is on disk, the StorageReader, and the planner
that takes data from host copies. DCP plans who writes and reads which chunk, for any DTensor and world size. Its own
file storage reads a pickle (`.metadata`).

The files of one checkpoint: their names, their writing, and what is refused when they are read.

Owns the folder's format. Nothing in it is a pickle:

    rank-R.safetensors   the shards that rank R wrote
    tensors.json         of every tensor: dtype (safetensors' name), shape, chunks = [[file, offsets, shape], ...]
    state.json           the trainer's own state
    manifest.json        files = {name: {bytes, sha256}} of the three kinds above

Names are those of files in the folder itself; paths, links and everything else are refused. `CorruptCheckpoint` says in
one line what is wrong with a folder.
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
from concurrent.futures import ThreadPoolExecutor
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

STATE, TENSORS, MANIFEST = "state.json", "tensors.json", "manifest.json"
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
# Bytes hashed and written at a time: large enough that Python's share of the time is nothing.
_PIECE = 1 << 24
# Hashing lets other threads run; a rank that verifies much uses several cores.
_VERIFY_THREADS = 4


class CorruptCheckpoint(ValueError):
    """A folder that is no whole checkpoint; the message names the file and what is wrong with it."""


@dataclass(frozen=True)
class SavedTensor:
    """Where a tensor lies. chunks: (file, offsets in the whole tensor, shape)."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]


def write_safetensors(path: Path, tensors: Sequence[tuple[str, Tensor]]) -> dict[str, Any]:
    """Write named CPU tensors in safetensors' format, on disk when this returns; returns the manifest's entry.

    By hand rather than by the library: it would hold the whole file in memory once more, and the bytes are hashed as
    they go by (https://huggingface.co/docs/safetensors: u64 size of the header, the header as JSON, the data).
    """
    header: dict[str, Any] = {}
    end = 0
    ordered = sorted(tensors, key=lambda pair: -pair[1].element_size())  # so that every offset is aligned
    for name, tensor in ordered:
        start, end = end, end + tensor.nbytes
        dtype = SAFETENSORS_DTYPES[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    views = (tensor.reshape(-1).view(torch.uint8).numpy().data for _, tensor in ordered)
    return _write(path, (len(text).to_bytes(8, "little"), text), views)


def write_json(path: Path, values: dict[str, Any], indent: int | None = 1) -> dict[str, Any]:
    """Write `values`, on disk when this returns; returns the manifest's entry."""
    return _write(path, (json.dumps(values, indent=indent).encode(),))


def _write(path: Path, *parts: Iterable[bytes | memoryview]) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for part in parts:
            for data in part:
                for start in range(0, len(data), _PIECE):
                    piece = data[start : start + _PIECE]
                    digest.update(piece)
                    file.write(piece)
        file.flush()
        os.fsync(file.fileno())
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


def sync_folder(folder: Path) -> None:
    """Put the names in `folder` on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`, which is a file of a checkpoint."""
    _check_regular(path)
    try:
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise CorruptCheckpoint(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpoint(f"{path}: not JSON ({type(error).__name__})") from None
    if not isinstance(values, dict):
        raise CorruptCheckpoint(f"{path}: not a JSON object")
    return values


def read_tensor_index(folder: Path) -> dict[str, SavedTensor]:
    """tensors.json of `folder`, every value checked: chunks lie inside their tensor and fill it."""
    path = folder / TENSORS
    index = {}
    for name, values in read_json(path).items():
        try:
            shape = _sizes(values["shape"])
            chunks = tuple((_file_name(path, f), _sizes(o), _sizes(s)) for f, o, s in values["chunks"])
            dtype = TORCH_DTYPES[values["dtype"]]
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, CorruptCheckpoint):
                raise
            raise CorruptCheckpoint(f"{path}: {name!r} is not described as a tensor") from None
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


def _file_name(path: Path, name: Any) -> str:
    if not isinstance(name, str) or not _FILE_NAME.fullmatch(name):
        raise CorruptCheckpoint(f"{path}: {name!r} is not the name of a file in this folder")
    return name


def _check_regular(path: Path) -> os.stat_result:
    try:
        found = path.lstat()
    except OSError as error:
        raise CorruptCheckpoint(f"{path}: {error.strerror}") from None
    if not stat.S_ISREG(found.st_mode):
        raise CorruptCheckpoint(f"{path}: not a regular file; links and devices are not followed")
    return found


def verify(folder: Path, *, checksums: bool = True, rank: int = 0, world_size: int = 1) -> None:
    """Raise CorruptCheckpoint unless every file of `folder` is there, of its size and, with `checksums`, its content.

    Each of `world_size` ranks hashes a share of the files; together they hash all.
    """
    path = folder / MANIFEST
    files = read_json(path).get("files")
    if not isinstance(files, dict) or not {STATE, TENSORS} <= files.keys():
        raise CorruptCheckpoint(f"{path}: does not list {STATE} and {TENSORS}")
    for name, entry in files.items():
        size = _check_regular(folder / _file_name(path, name)).st_size
        if not isinstance(entry, dict) or size != entry.get("bytes"):
            expected = entry.get("bytes") if isinstance(entry, dict) else None
            raise CorruptCheckpoint(f"{folder / name}: has {size} bytes, {MANIFEST} says {expected}")
    read_json(folder / STATE)
    for name, saved in read_tensor_index(folder).items():
        for file, _, _ in saved.chunks:
            if file not in files:
                raise CorruptCheckpoint(f"{folder / TENSORS}: {name!r} lies in {file}, which {MANIFEST} does not list")
    if checksums:
        mine = sorted(files, key=lambda name: (-files[name]["bytes"], name))[rank::world_size]
        with ThreadPoolExecutor(_VERIFY_THREADS) as pool:
            for name, found in zip(mine, pool.map(lambda name: _sha256(folder / name), mine), strict=True):
                if found != files[name].get("sha256"):
                    raise CorruptCheckpoint(f"{folder / name}: its content does not match the checksum in {MANIFEST}")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while piece := file.read(_PIECE):
                digest.update(piece)
    except OSError as error:
        raise CorruptCheckpoint(f"{path}: {error.strerror}") from None
    return digest.hexdigest()


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
    """Reads chunks of the tensors of one folder; CorruptCheckpoint where a file is not what tensors.json says."""

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
                raise CorruptCheckpoint(f"{self.folder / file}: not a whole safetensors file: {error}") from None
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _read(self, opened: Any, item: ReadItem, shape: tuple[int, ...], planner: LoadPlanner) -> None:
        name = item.storage_index.fqn
        found = opened.get_slice(name)
        dtype = SAFETENSORS_DTYPES[self.index[name].dtype]
        if (tuple(found.get_shape()), found.get_dtype()) != (shape, dtype):
            raise CorruptCheckpoint(
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
