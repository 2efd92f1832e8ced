"""The data files of a source, in an order that is the same on every machine.

Owns what a source's path may be: a file, a pattern of files (`data/*.jsonl`), or a folder (data/repository.py). Refuses
what cannot be read: Git LFS pointers, names of data sets on a hub, unknown file types.
"""

from __future__ import annotations

import glob
import importlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hbp_titan.job_config import DataSource
from hbp_titan.models.hf_files import check_not_pointer, missing_hint
from hbp_titan.utils import did_you_mean

_PACKED = ("", ".gz", ".zst")
JSON_SUFFIXES = tuple(f".{name}{packed}" for name in ("jsonl", "json", "ndjson") for packed in _PACKED)
CSV_SUFFIXES = tuple(f".csv{packed}" for packed in _PACKED)
ARROW_SUFFIXES = (".arrow", ".parquet")
SUFFIXES = JSON_SUFFIXES + CSV_SUFFIXES + ARROW_SUFFIXES
# The templates of data.chat_template that need no path, each a file in data/templates/.
READY_TEMPLATES = ("chatml", "deepseek_v3", "llama3", "qwen2_5", "qwen3", "r1_distill")

# Why a file of a folder is not read although no setting excludes it.
NO_SPLIT = "in no split"


@dataclass(frozen=True)
class DataFiles:
    """The files of a source.

    files: to read. name: of a folder, which names the rows without a source of their own; "" names them after their
    files. unread: data files of the folder that are not read, and why.
    """

    files: list[Path]
    name: str = ""
    unread: dict[Path, str] = field(default_factory=dict)


def chat_template_file(setting: str) -> Path | None:
    """Return the file of data.chat_template; None if it is empty. Raises ValueError if there is no such template."""
    if setting in READY_TEMPLATES:
        return Path(__file__).parent / "templates" / f"{setting}.jinja"
    path = Path(setting).expanduser()
    if setting and not path.is_file():
        raise ValueError(
            f"data.chat_template = {setting!r}: must be one of {', '.join(READY_TEMPLATES)} or a file, which does not "
            f"exist{did_you_mean(setting, READY_TEMPLATES)}"
        )
    return path if setting else None


def source_files(source: DataSource, key: str) -> DataFiles:
    """Return the files of a source, each once: as a saved data set or README.md lists them, by name within a pattern.

    key: configuration key of the source, with which every ValueError begins.
    """
    if not source.path:
        raise ValueError(f"{key}.path: empty; set it to a file, a pattern of files or a folder")
    path = Path(source.path).expanduser()
    if path.is_dir():
        # Imported here: most runs name files.
        from hbp_titan.data.repository import folder_files

        found = folder_files(path, source, key)
    else:
        found = DataFiles([path] if path.is_file() else _matching_files(path, source.path, key))
        if source.config or source.split != "train":
            name = "config" if source.config else "split"
            raise ValueError(f"{key}.{name} = {getattr(source, name)}: {path} is not a folder, so it has no {name}")
    for file in found.files:
        _check_file(file, key)
    return found


def _matching_files(path: Path, given: str, key: str) -> list[Path]:
    """Return the files that a pattern matches, sorted."""
    if not glob.has_magic(given):
        raise ValueError(f"{key}: no such file or folder: {path}{missing_hint(path, given, 'dataset')}")
    found = sorted(map(Path, glob.glob(str(path), recursive=True)))
    files = [file for file in found if file.is_file()]
    if not files:
        what = "matches folders only; end it with /*.jsonl, or name one folder" if found else "matches no file"
        raise ValueError(f"{key}: the pattern {path} {what}")
    return files


def _check_file(file: Path, key: str) -> None:
    if not file.name.lower().endswith(SUFFIXES):
        raise ValueError(f"{key}: {file}: unsupported file type; must be one of {', '.join(SUFFIXES)}")
    check_not_pointer(file, key)


def require(module: str, file: Path) -> Any:
    """Import an optional module that reading `file` needs."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ValueError(f"{file}: reading it needs {module}; pip install 'hbp-titan[data]'") from None
