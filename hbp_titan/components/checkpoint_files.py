"""The files of one checkpoint: their names, their writing, and what is refused when they are read.

Owns the folder's format. Nothing in it is a pickle:

    rank-R.safetensors   the shards that rank R wrote
    tensors.json         of every tensor: dtype (safetensors' name), shape, chunks = [[file, offsets, shape], ...]
    state.json           the trainer's own state
    manifest.json        files = {name: {bytes, sha256}} of the three kinds above

Names are those of files in the folder itself; paths, links and everything else are refused. `DamagedCheckpoint` says in
one line what is wrong with a folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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


class DamagedCheckpoint(ValueError):
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
        raise DamagedCheckpoint(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpoint(f"{path}: not JSON ({type(error).__name__})") from None
    if not isinstance(values, dict):
        raise DamagedCheckpoint(f"{path}: not a JSON object")
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
            if isinstance(error, DamagedCheckpoint):
                raise
            raise DamagedCheckpoint(f"{path}: {name!r} is not described as a tensor") from None
        for _, offsets, sizes in chunks:
            inside = len(offsets) == len(sizes) == len(shape) and all(
                start + size <= whole for start, size, whole in zip(offsets, sizes, shape, strict=True)
            )
            if not inside:
                raise DamagedCheckpoint(f"{path}: a chunk of {name!r} lies outside the tensor's shape {list(shape)}")
        if sum(prod(sizes) for _, _, sizes in chunks) != prod(shape):
            raise DamagedCheckpoint(f"{path}: the chunks of {name!r} do not fill its shape {list(shape)}")
        index[name] = SavedTensor(dtype, shape, chunks)
    return index


def _sizes(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(type(value) is int and 0 <= value < 1 << 62 for value in values):
        raise ValueError("not a list of sizes")
    return tuple(values)


def _file_name(path: Path, name: Any) -> str:
    if not isinstance(name, str) or not _FILE_NAME.fullmatch(name):
        raise DamagedCheckpoint(f"{path}: {name!r} is not the name of a file in this folder")
    return name


def _check_regular(path: Path) -> os.stat_result:
    try:
        found = path.lstat()
    except OSError as error:
        raise DamagedCheckpoint(f"{path}: {error.strerror}") from None
    if not stat.S_ISREG(found.st_mode):
        raise DamagedCheckpoint(f"{path}: not a regular file; links and devices are not followed")
    return found


def verify(folder: Path, *, checksums: bool = True, rank: int = 0, world_size: int = 1) -> None:
    """Raise DamagedCheckpoint unless every file of `folder` is there, of its size and, with `checksums`, its content.

    Each of `world_size` ranks hashes a share of the files; together they hash all.
    """
    path = folder / MANIFEST
    files = read_json(path).get("files")
    if not isinstance(files, dict) or not {STATE, TENSORS} <= files.keys():
        raise DamagedCheckpoint(f"{path}: does not list {STATE} and {TENSORS}")
    for name, entry in files.items():
        size = _check_regular(folder / _file_name(path, name)).st_size
        if not isinstance(entry, dict) or size != entry.get("bytes"):
            expected = entry.get("bytes") if isinstance(entry, dict) else None
            raise DamagedCheckpoint(f"{folder / name}: has {size} bytes, {MANIFEST} says {expected}")
    read_json(folder / STATE)
    for name, saved in read_tensor_index(folder).items():
        for file, _, _ in saved.chunks:
            if file not in files:
                raise DamagedCheckpoint(f"{folder / TENSORS}: {name!r} lies in {file}, which {MANIFEST} does not list")
    if checksums:
        mine = sorted(files, key=lambda name: (-files[name]["bytes"], name))[rank::world_size]
        with ThreadPoolExecutor(_VERIFY_THREADS) as pool:
            for name, found in zip(mine, pool.map(lambda name: _sha256(folder / name), mine), strict=True):
                if found != files[name].get("sha256"):
                    raise DamagedCheckpoint(f"{folder / name}: its content does not match the checksum in {MANIFEST}")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while piece := file.read(_PIECE):
                digest.update(piece)
    except OSError as error:
        raise DamagedCheckpoint(f"{path}: {error.strerror}") from None
    return digest.hexdigest()
