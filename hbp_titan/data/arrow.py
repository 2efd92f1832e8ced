"""Arrow files: their rows as records, through a memory map.

Owns the conversion to what a JSON file would contain, by the types of the columns: null fields of a struct are dropped
(it gives every object the fields of all objects, so a null that the row itself has looks the same), JSON text of
the extension type arrow.json becomes its value, whose nulls stay, dates become ISO text, maps objects. Other values
that JSON does not have (bytes, decimals) stay as they are; only reading the field fails. Reads the stream format
(written by HF `datasets`) and the file format; record batches are memory-mapped unless they are compressed.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hbp_titan.data.files import require
from hbp_titan.data.jsonl import parse_json, too_large

# Rows that are converted to Python objects at a time.
_ROWS_AT_ONCE = 64
_LISTS = ("list", "large_list", "fixed_size_list", "list_view", "large_list_view")

Reader = Callable[[Any], Any]


def index_arrow(file: Path, name: Path) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return position, estimated bytes, number (from 1) of each row: int64 [R] each. name: the file, in messages."""
    require("pyarrow", name)
    try:
        batches, ends = _open(file, file.stat().st_mtime_ns)
    except (ValueError, OSError) as error:
        raise ValueError(f"{name}:1: not a readable Arrow file: {first_line(error)}") from None
    for batch, start in zip(batches, ends[:-1].tolist(), strict=True):
        _check_batch(batch, f"{name}:{start + 1}")
    if batches and len(set(batches[0].schema.names)) < len(batches[0].schema.names):
        raise ValueError(f"{name}:1: two columns have the same name: {', '.join(batches[0].schema.names)}")
    # The mean of the batch: exact sizes of nested values would cost a pass over all of them.
    sizes = [np.full(len(batch), max(1, batch.nbytes // max(1, len(batch)))) for batch in batches]
    rows = np.arange(ends[-1])
    return rows, np.concatenate([np.zeros(0, np.int64), *sizes]), rows + 1


def _check_batch(batch: Any, where: str) -> None:
    """Raise ValueError if offsets of the batch point outside it: reading such a row would crash the process."""
    try:
        batch.validate(full=True)
    except ValueError as error:
        # Text that is not UTF-8 makes only its row malformed.
        if "UTF8" not in str(error):
            raise ValueError(f"{where}: a damaged Arrow file: {first_line(error)}") from None


@lru_cache(maxsize=4)
def _open(file: Path, mtime_ns: int) -> tuple[list[Any], NDArray[np.int64]]:
    """Return the record batches of a file, and the number of rows before each: int64 [batches + 1].

    mtime_ns: of the file; part of the cache key, so that a changed file is opened again.
    """
    arrow = require("pyarrow", file)
    source = arrow.memory_map(str(file))
    try:
        reader = arrow.ipc.open_file(source)
        batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
    except arrow.ArrowInvalid:
        source.seek(0)
        batches = list(arrow.ipc.open_stream(source))
    return batches, np.cumsum([0, *map(len, batches)])


def read_arrow(file: Path, positions: NDArray[np.int64], max_row_bytes: int) -> Iterator[dict[str, Any] | ValueError]:
    """Yield the records of the rows at these positions; a ValueError in the place of a malformed one."""
    batches, ends = _open(file, file.stat().st_mtime_ns)
    read = _object_reader(require("pyarrow", file), batches[0].schema) if batches else dict
    numbers = np.searchsorted(ends, positions, side="right") - 1
    # Neighbouring rows are converted in one call: a call per row would dominate the time.
    new_run = (np.diff(positions) != 1) | (np.diff(numbers) != 0)
    for run in np.split(np.arange(len(positions)), np.flatnonzero(new_run) + 1):
        for part in np.split(run, range(_ROWS_AT_ONCE, len(run), _ROWS_AT_ONCE)):
            if len(part):
                number = int(numbers[part[0]])
                batch = batches[number].slice(positions[part[0]] - ends[number], len(part))
                yield from _records(batch, read, max_row_bytes)


def _records(batch: Any, read: Reader, max_row_bytes: int) -> Iterator[dict[str, Any] | ValueError]:
    if batch.nbytes <= max_row_bytes:
        try:
            yield from [read(record) for record in batch.to_pylist()]
            return
        except (ValueError, TypeError, OverflowError, ArithmeticError):
            pass  # Row by row below: only the rows with such a value are malformed.
    for number in range(len(batch)):
        row = batch.slice(number, 1)
        yield too_large(row.nbytes, max_row_bytes) if row.nbytes > max_row_bytes else read(_values(row))


def _values(row: Any) -> dict[str, Any]:
    """Return the values of one row; a cell that Python cannot hold has a ValueError as its value."""
    values: dict[str, Any] = {}
    for name, column in zip(row.schema.names, row.columns, strict=True):
        try:
            values[name] = column[0].as_py()
        except (ValueError, TypeError, OverflowError, ArithmeticError) as error:
            values[name] = ValueError(f"not readable: {first_line(error)}")
    return values


def _object_reader(arrow: Any, fields: Any) -> Reader:
    """Return the conversion of a record (a schema's fields) or of a struct's value."""
    readers = {field.name: reader for field in fields if (reader := _reader(arrow, field))}

    def read(values: dict[str, Any]) -> dict[str, Any]:
        return {
            name: readers[name](value) if name in readers and not isinstance(value, ValueError) else value
            for name, value in values.items()
            if value is not None
        }

    return read


def _reader(arrow: Any, field: Any) -> Reader | None:
    """Return the conversion of a field's values that are not null; None keeps them as they are."""
    types, kind = arrow.types, field.type
    # Of an extension that this version of pyarrow does not know, the metadata is left.
    name = getattr(kind, "extension_name", None) or (field.metadata or {}).get(b"ARROW:extension:name", b"").decode()
    if name == "arrow.json":
        return _json_value
    if types.is_struct(kind):
        return _object_reader(arrow, [kind.field(number) for number in range(kind.num_fields)])
    if types.is_map(kind):
        inner = _reader(arrow, kind.item_field)
        return lambda pairs: {key: inner(value) if inner and value is not None else value for key, value in pairs}
    is_list = (getattr(types, f"is_{name}", None) for name in _LISTS)
    if any(check and check(kind) for check in is_list):
        inner = _reader(arrow, kind.value_field)
        return inner and (lambda values: [inner(value) if value is not None else None for value in values])
    if types.is_temporal(kind):
        return _iso_text
    return None


def _json_value(text: Any) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        return ValueError(f"not readable: {error}")


def _iso_text(value: Any) -> Any:
    return value.isoformat() if isinstance(value, (datetime.date, datetime.time)) else value


def first_line(error: Exception) -> str:
    """Return the first line of another library's error message."""
    return (str(error).splitlines() or [type(error).__name__])[0]
