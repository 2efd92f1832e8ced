"""The disk that a preparation writes to: the space that it needs, a disk that is full nevertheless, finished folders.

Not imported by a run whose stores exist, which writes nothing.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from hbp_titan.data.files import CSV_SUFFIXES, require
from hbp_titan.utils import human_bytes

if TYPE_CHECKING:
    from hbp_titan.data.rows import RowIndex

# A token is about 4 bytes of a row in most languages and tokenizers, and takes 4 bytes and 1 of the mask.
_STORED_PER_BYTE = 5 / 4
# Entries of a sample in the store's and the set's tables.
_STORED_PER_ROW = 150
# Of text, where the compressed file does not say it.
_COMPRESSION = 4
_FULL = (errno.ENOSPC, errno.EDQUOT)


def store_bytes(parts: Iterable[RowIndex]) -> int:
    """Return about how many bytes the tokens of these rows take on disk."""
    return sum(int(rows.sizes.sum() * _STORED_PER_BYTE) + len(rows) * _STORED_PER_ROW for rows in parts)


def copy_bytes(file: Path) -> int:
    """Return about how many bytes the copies of `file` take that `index_rows` makes; 0 if it makes none."""
    name, size = file.name.lower(), file.stat().st_size
    if not size:
        return 0
    if name.endswith(".parquet"):
        return _parquet_bytes(file)
    plain = size
    if name.endswith(".gz"):
        # The length modulo 4 GiB, of the last member: with several, it is often below the compressed size.
        with file.open("rb") as stream:
            stream.seek(-min(4, size), 2)
            plain = int.from_bytes(stream.read(4), "little")
    elif name.endswith(".zst"):
        with file.open("rb") as stream:
            plain = _zstd_bytes(stream.read(18), file)
    elif not name.endswith(CSV_SUFFIXES):
        return 0
    if plain < size:
        plain = _COMPRESSION * size
    # A compressed CSV file is decompressed, then written as JSON lines.
    return plain * (2 if name.endswith(CSV_SUFFIXES[1:]) else 1)


def _zstd_bytes(header: bytes, file: Path) -> int:
    zstandard = require("zstandard", file)
    try:
        return int(zstandard.frame_content_size(header))
    except zstandard.ZstdError:
        # index_rows names a broken file.
        return 0


def _parquet_bytes(file: Path) -> int:
    arrow = require("pyarrow", file)
    require("pyarrow.parquet", file)
    try:
        footer = arrow.parquet.read_metadata(file)
    except (arrow.ArrowException, OSError):
        return 0
    return sum(footer.row_group(number).total_byte_size for number in range(footer.num_row_groups))


def check_free_space(folder: Path, needed: int, what: str) -> None:
    """Raise ValueError if the disk of `folder`, data.cache_folder, has less than `needed` bytes free for `what`."""
    free = free_bytes(folder)
    if needed > free:
        raise ValueError(
            f"data.cache_folder = {str(folder)!r}: {what} take about {human_bytes(needed)}, but {human_bytes(free)} "
            "are free; free some space, or set data.cache_folder to a folder on another disk"
        )


def free_bytes(folder: Path) -> int:
    """Return the free bytes on the disk of `folder`."""
    # The folder itself may not exist yet.
    return shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.exists())).free


@contextmanager
def naming_full_disk(folder: Path) -> Iterator[None]:
    """Raise ValueError in place of the OSError of a full disk; `folder` is data.cache_folder."""
    try:
        yield
    except OSError as error:
        if not is_full(error):
            raise
        raise ValueError(
            f"data.cache_folder = {str(folder)!r}: the disk is full; free some space, or set it to a folder on another "
            "disk; the next call continues with what is finished"
        ) from error


def is_full(error: BaseException) -> bool:
    """Return whether an error is that of a full disk."""
    # numpy's own error of a short write has no number.
    return isinstance(error, OSError) and (error.errno in _FULL or "requested and" in str(error))


@contextmanager
def ignore_if_exists(folder: Path) -> Iterator[None]:
    """Ignore missing files if `folder` exists: another job that builds the same store may finish first."""
    try:
        yield
    except FileNotFoundError:
        if not folder.is_dir():
            raise


def commit_dir(temporary: Path, folder: Path) -> None:
    """Rename a finished folder to its place, or delete it if another process has put the same one there."""
    try:
        temporary.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
        shutil.rmtree(temporary, ignore_errors=True)
