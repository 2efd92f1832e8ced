"""A data source -> its files, in an order that is the same everywhere.

Owns what a source's path may be (a file; a folder that HF `datasets` saved; a dataset repository) and the refusal of
what cannot be data: scripts, which are never run, Git LFS pointers, names that lead out of the folder.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hbp_titan.data.sources.dataset_repository import inside, repository_files
from hbp_titan.data.sources.row_files import SUFFIXES
from hbp_titan.job_config import DataSource

_LFS_POINTER = b"version https://git-lfs"


def source_files(source: DataSource, key: str) -> list[Path]:
    """The files of a source, each once; ValueError names `key`, the source's place in the configuration.

    Order: as a saved data set or README.md lists them, and by name within a pattern.
    """
    if not source.path:
        raise ValueError(f"{key}.path is empty: name a file or a folder")
    path = Path(source.path).expanduser()
    if path.is_file():
        files = [path]
        if source.config or source.split != "train":
            name = "config" if source.config else "split"
            raise ValueError(f"{key}.{name} is {getattr(source, name)}, but {path} is a file, which has none")
    elif path.is_dir():
        files = _folder_files(path, source, key)
    else:
        raise ValueError(f"{key}: no such file or folder: {path}")
    for file in files:
        _check_file(file, key)
    return files


def _folder_files(folder: Path, source: DataSource, key: str) -> list[Path]:
    saved = [name for name in ("dataset_dict.json", "state.json") if (folder / name).is_file()]
    if saved and source.config:
        raise ValueError(f"{key}.config is {source.config}, but {folder} is a saved data set, which has none")
    if "dataset_dict.json" in saved:
        splits = _read_json(folder / "dataset_dict.json").get("splits")
        if not isinstance(splits, list) or not all(isinstance(split, str) for split in splits):
            raise ValueError(f"{folder / 'dataset_dict.json'}: `splits` is not a list of names")
        if source.split not in splits:
            raise ValueError(f"{key}: {folder} has no split {source.split}: it has {', '.join(splits)}")
        return _saved_files(folder / inside(source.split, str(folder / "dataset_dict.json")))
    if "state.json" in saved:
        split = _read_json(folder / "state.json").get("_split")
        if source.split not in ("train", split):
            raise ValueError(f"{key}.split is {source.split}, but {folder} is one saved split ({split or 'unnamed'})")
        return _saved_files(folder)
    try:
        return repository_files(folder, source.config, source.split)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None


def _saved_files(folder: Path) -> list[Path]:
    """The Arrow files of a data set that `save_to_disk` wrote."""
    state = folder / "state.json"
    if not state.is_file():
        raise ValueError(f"{folder}: no state.json: the saved data set is not whole")
    values = _read_json(state)
    if values.get("_indices_files") or values.get("_indices_data_files"):
        raise ValueError(f"{state}: saved with an index by an old version of datasets: load it and save it again")
    entries = values.get("_data_files")
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{state}: `_data_files` is not a list of objects with a filename")
    files = list(dict.fromkeys(folder / inside(entry.get("filename"), str(state)) for entry in entries))
    for file in files:
        if not file.is_file():
            raise ValueError(f"{state}: no such file: {file}")
    return files


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file}: not a JSON object")
    return values


def _check_file(file: Path, key: str) -> None:
    if not file.name.lower().endswith(SUFFIXES):
        raise ValueError(f"{key}: {file} is no known kind of data file: expected one of {', '.join(SUFFIXES)}")
    with file.open("rb") as stream:
        if stream.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise ValueError(f"{key}: {file} is a Git LFS pointer, not the data: run `git lfs pull` in its repository")
