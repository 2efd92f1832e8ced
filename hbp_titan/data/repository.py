"""Folders of data: which of their files a split has, and which files no source reads.

Owns two kinds of folders: one that HF `datasets` saved (`save_to_disk`), and a local dataset repository, as cloned from
a hub. The files of a repository's split are found by the rules of the library `datasets` (its data_files.py): the
`configs` in the front matter of README.md, or split keywords in file and folder names. By these rules a file named
`code_train.jsonl` leaves `math.jsonl` out: such files are returned as unread, with the reason. Loading scripts are
never run, and no path leaves the folder.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from hbp_titan.data.files import ARROW_SUFFIXES, CSV_SUFFIXES, JSON_SUFFIXES, NO_SPLIT, SUFFIXES, DataFiles, require
from hbp_titan.job_config import DataSource
from hbp_titan.utils import first_n

_KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SEPARATORS = "-._ 0-9"
_IN_FOLDER_NAME = ("**/{0}/**", "**/{0}[{1}]*/**", "**/*[{1}]{0}/**", "**/*[{1}]{0}[{1}]*/**")
_IN_FILE_NAME = ("**/{0}[{1}]*", "**/*[{1}]{0}[{1}]*")
_SHARD = re.compile(r"data/(?P<split>\w+(?:\.\w+)*)-\d{5}-of-\d{5}[^/]*\.[^/]*")
_NOT_DATA = ("config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json")


# Types of tables and archives that are not read: such a file next to data files is reported.
_OTHER_TYPES = (
    ".tsv", ".xlsx", ".gz", ".zst", ".xz", ".bz2", ".lz4", ".zip", ".7z", ".tar", ".tgz", ".jsonlines", ".feather",
    ".orc", ".avro", ".h5", ".db", ".sqlite", ".pkl",
)  # fmt: skip


def folder_files(folder: Path, source: DataSource, key: str) -> DataFiles:
    """Return the files of a folder's split, and the others; every ValueError begins with `key` or a file."""
    # One saved split has state.json; several have dataset_dict.json above a folder for each.
    saved = [name for name in ("dataset_dict.json", "state.json") if (folder / name).is_file()]
    names, others = _visible_files(folder)
    if not saved:
        try:
            files, unread = _repository_files(folder, names, source.config, source.split)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None
    else:
        if source.config:
            raise ValueError(f"{key}.config = {source.config}: {folder} is a saved data set, which has no config")
        files, splits = _saved_split(folder, source, key, several="dataset_dict.json" in saved)
        # `datasets` keeps the results of its functions next to the data.
        names = [name for name in names if not re.search(r"(^|/)(state\.json|cache-[^/]*\.arrow)$", name)]
        parts = {name: name.split("/")[0] for name in names}
        unread = {name: f"of split {part}" if part in splits else NO_SPLIT for name, part in parts.items()}
    unread |= dict.fromkeys(others, "of a type that is not read")
    chosen = set(files)
    rest = {folder / name: why for name, why in unread.items() if folder / name not in chosen}
    return DataFiles(files, _folder_name(folder), rest)


def _folder_name(folder: Path) -> str:
    """Return the name of a folder for its rows."""
    path = Path(os.path.abspath(folder))
    # A hub's cache names the folder of a data set's files after a commit.
    if path.parent.name == "snapshots":
        path = path.parent.parent
    return path.name.rpartition("--")[2] or str(path)


def _visible_files(folder: Path) -> tuple[list[str], list[str]]:
    """Return the relative names of data files, and of files of types that are not read, sorted.

    Skips hidden ones and folders such as __pycache__.
    """
    names, others = [], []
    for file in folder.rglob("*"):
        name = file.relative_to(folder)
        hidden = any(part.startswith(".") for part in name.parts) or any(p.startswith("__") for p in name.parts[:-1])
        if hidden or name.name in _NOT_DATA or not file.is_file():
            continue
        if name.name.lower().endswith(SUFFIXES):
            names.append(name.as_posix())
        elif name.name.lower().endswith(_OTHER_TYPES):
            others.append(name.as_posix())
    return sorted(names), sorted(others)


def _saved_split(folder: Path, source: DataSource, key: str, several: bool) -> tuple[list[Path], list[str]]:
    """Return the files of a split that `save_to_disk` wrote, and the names of all splits."""
    if not several:
        split = _read_json(folder / "state.json").get("_split")
        if source.split not in ("train", split):
            raise ValueError(f"{key}.split = {source.split}: {folder} is one saved split ({split or 'unnamed'})")
        return _saved_files(folder), []
    splits = _read_json(folder / "dataset_dict.json").get("splits")
    if not isinstance(splits, list) or not all(isinstance(split, str) for split in splits):
        raise ValueError(f"{folder / 'dataset_dict.json'}: `splits` is not a list of names")
    if source.split not in splits:
        raise ValueError(f"{key}: {folder}: no split {source.split}; it has {', '.join(splits)}")
    return _saved_files(folder / _relative_path(source.split, str(folder / "dataset_dict.json"))), splits


def _saved_files(folder: Path) -> list[Path]:
    """Return the Arrow files of a data set that `save_to_disk` wrote."""
    state = folder / "state.json"
    if not state.is_file():
        raise ValueError(f"{folder}: incomplete data set: no state.json; save it again")
    values = _read_json(state)
    if values.get("_indices_files") or values.get("_indices_data_files"):
        raise ValueError(f"{state}: saved with an index by an old version of datasets; load it and save it again")
    entries = values.get("_data_files")
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{state}: `_data_files` is not a list of objects with a filename")
    files = list(dict.fromkeys(folder / _relative_path(entry.get("filename"), str(state)) for entry in entries))
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


def _repository_files(folder: Path, names: Sequence[str], config: str, split: str) -> tuple[list[Path], dict[str, str]]:
    """Return the files of a split, and why each of the others is not read.

    names: the data files. config: "" takes the only configuration, or the default one. Raises ValueError if the split
    has no files, and lists what exists.
    """
    if not names:
        scripts = sorted(file.name for file in folder.glob("*.py"))
        if scripts:
            raise ValueError(f"{folder}: has only a loading script ({scripts[0]}), which is never run; add data files")
        raise ValueError(f"{folder}: no data files ({', '.join(SUFFIXES)})")
    if saved := [name.rpartition("/")[0] for name in names if name.endswith("/state.json")]:
        raise ValueError(f"{folder}: has saved data sets, {first_n(saved, 5)}; set path to one of them")
    configs = _read_configs(folder / "README.md")
    unread = dict.fromkeys(names, NO_SPLIT)
    if configs:
        chosen = _choose_config(configs, config, folder)
        splits = _splits_of_config(folder, names, *chosen, split)
        for name in configs:
            unread |= _of_other_config(folder, names, name, configs[name])
    elif config:
        raise ValueError(f"{folder}: no configuration {config}; README.md lists none")
    else:
        splits = _splits_by_name(names)
    for name, files in splits.items():
        unread |= dict.fromkeys(files, f"of split {name}")
    if split not in splits:
        raise ValueError(_no_split(folder, split, splits, [name for name in names if unread[name] == NO_SPLIT]))
    _check_one_kind(folder, splits[split], split)
    return [folder / name for name in splits[split]], unread


def _of_other_config(folder: Path, names: Sequence[str], name: str, config: Mapping[str, Any]) -> dict[str, str]:
    try:
        splits = _splits_of_config(folder, names, name, config)
    except ValueError:
        # Of no interest here: another configuration is chosen.
        return {}
    return {file: f"of configuration {name}" for files in splits.values() for file in files}


def _no_split(folder: Path, split: str, splits: Mapping[str, Sequence[str]], rest: Sequence[str]) -> str:
    """Return the error for a split without files, with all files of the folder and what to write."""
    found = "; ".join(f"{name} ({first_n(files, 3)})" for name, files in splits.items()) or "none"
    first = [*rest, *(name for files in splits.values() for name in files)][0]
    suffix = max((suffix for suffix in SUFFIXES if first.lower().endswith(suffix)), key=len)
    pattern = f"{folder}/{'**/' if '/' in first else ''}*{suffix}"
    unnamed = f"; in no split: {first_n(rest, 5)}" if rest else ""
    return (
        f"{folder}: no split {split}; it has {found}{unnamed}; set split to one of these, or name the files: "
        f'path = "{pattern}"'
    )


def _check_one_kind(folder: Path, names: Sequence[str], split: str) -> None:
    """Raise ValueError if a split has JSON, CSV, Parquet or Arrow files together: most likely the same rows twice."""
    for suffixes in (JSON_SUFFIXES, CSV_SUFFIXES, *((suffix,) for suffix in ARROW_SUFFIXES)):
        others = [name for name in names if not name.lower().endswith(suffixes)]
        if others and len(others) < len(names):
            same = next(name for name in names if name not in others)
            raise ValueError(
                f"{folder}: split {split} has files of two kinds, {same} and {others[0]}; "
                "set path to one of them, or to a pattern"
            )


def _read_configs(readme: Path) -> dict[str, dict[str, Any]]:
    """Return the configurations in the front matter of README.md by name; may be empty."""
    if not readme.is_file():
        return {}
    # Only the front matter matters: a card in another encoding must not fail.
    lines = readme.read_text(encoding="utf-8", errors="replace").removeprefix("\ufeff").splitlines()
    if not lines or lines[0] != "---" or "---" not in lines[1:]:
        return {}
    front = "\n".join(lines[1 : lines.index("---", 1)])
    if not re.search(r"^[\"']?configs[\"']?\s*:", front, re.MULTILINE):
        return {}
    # Only now: the front matter of most repositories is never read, and needs no YAML parser then.
    yaml = require("yaml", readme)
    try:
        values = yaml.safe_load(front)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{readme}: the front matter is not YAML: {' '.join(str(error).split())[:200]}") from None
    configs = (values.get("configs") if isinstance(values, dict) else None) or []
    if not isinstance(configs, list) or not all(
        isinstance(config, dict) and isinstance(config.get("config_name"), str) for config in configs
    ):
        raise ValueError(f"{readme}: `configs` is not a list of objects, each with a config_name")
    return {config["config_name"]: config for config in configs}


def _choose_config(configs: Mapping[str, dict[str, Any]], name: str, folder: Path) -> tuple[str, dict[str, Any]]:
    if name:
        if name not in configs:
            raise ValueError(f"{folder}: no configuration {name}; it has {', '.join(configs)}")
        return name, configs[name]
    defaults = [
        (name, config)
        for name, config in configs.items()
        if len(configs) == 1 or name == "default" or config.get("default") is True
    ]
    if len(defaults) != 1:
        count = "several defaults" if defaults else "no default"
        raise ValueError(f"{folder}: {count} among the configurations {', '.join(configs)}; set config to one of them")
    return defaults[0]


def _splits_of_config(
    folder: Path, names: Sequence[str], name: str, config: Mapping[str, Any], split: str = ""
) -> dict[str, list[str]]:
    """Return the files of each split that the configuration `name` of README.md lists.

    Raises ValueError if the folder lacks a file of `split`; of others it may have none, if only one was downloaded.
    """
    where = f"{folder / 'README.md'}: configuration {name}"
    base = config.get("data_dir") or ""
    prefix = f"{_relative_path(base, where).strip('/')}/" if base else ""
    names = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    if config.get("data_files") is None:
        splits = _splits_by_name(names)
    else:
        patterns = _patterns(config["data_files"], where)
        splits = {key: _listed(names, patterns[key], f"{where}: split {key}", key == split) for key in patterns}
    return {key: [prefix + name for name in files] for key, files in splits.items() if files}


def _listed(names: Sequence[str], patterns: Sequence[str], where: str, required: bool) -> list[str]:
    """Return the names that match, in the order of the patterns, each once; `required`: a named file must exist."""
    listed: list[str] = []
    for pattern in patterns:
        try:
            found = _matching(names, _relative_path(pattern, where))
        except re.error as error:
            raise ValueError(f"{where}: {pattern!a} is not a file name pattern: {error}") from None
        if required and not found and not re.search(r"[*?\[]", pattern):
            raise ValueError(f"{where}: no such data file: {pattern}")
        listed += found
    # A file that two patterns match counts once.
    return list(dict.fromkeys(listed))


def _patterns(data_files: Any, where: str) -> dict[str, list[str]]:
    """Return the patterns of each split, from any of the forms that `data_files` may have."""
    entries = data_files if isinstance(data_files, list) else [data_files]
    if entries and all(isinstance(entry, str) for entry in entries):
        return {"train": entries}
    splits: dict[str, list[str]] = {}
    for entry in entries:
        paths = entry.get("path") if isinstance(entry, dict) else None
        paths = [paths] if isinstance(paths, str) else paths
        if (
            not isinstance(paths, list)
            or not all(isinstance(path, str) for path in paths)
            or not isinstance(entry.get("split"), str)
        ):
            raise ValueError(f"{where}: data_files is neither a path, a list of paths, nor a list of split and path")
        if entry["split"] in splits:
            raise ValueError(f"{where}: data_files has the split {entry['split']} twice")
        splits[entry["split"]] = paths
    return splits


def _relative_path(name: Any, where: str) -> str:
    """Return `name`, a path relative to a folder; raises ValueError "`where`: ..." if it leaves the folder."""
    # The name comes with the data: it must not reach other files of this machine.
    if not isinstance(name, str) or ".." in PurePath(name).parts or PurePath(name).is_absolute():
        raise ValueError(f"{where}: {name!a} is not a path inside the folder")
    return name.removeprefix("./")


def _splits_by_name(names: Sequence[str]) -> dict[str, list[str]]:
    """Return the files of each split by the first rule that matches: shards in data/, folder names, file names, all."""
    sharded: dict[str, list[str]] = {}
    for name in names:
        if match := _SHARD.fullmatch(name):
            sharded.setdefault(match["split"], []).append(name)
    if sharded:
        return sharded
    # Folder names before file names, as in `datasets`; the first kind that finds a split decides for all.
    for patterns in (_IN_FOLDER_NAME, _IN_FILE_NAME):
        splits = {}
        for split, keywords in _KEYWORDS.items():
            filled = [pattern.format(word, _SEPARATORS) for word in keywords for pattern in patterns]
            if found := list(dict.fromkeys(name for pattern in filled for name in _matching(names, pattern))):
                splits[split] = found
        if splits:
            return splits
    return {"train": list(names)}


def _matching(names: Sequence[str], pattern: str) -> list[str]:
    expression = re.compile(_glob_expression(pattern))
    return [name for name in names if expression.fullmatch(name)]


def _glob_expression(pattern: str) -> str:
    """Return the regular expression of a glob: ** matches any folders, * and ? characters of one name."""
    # Not fnmatch, whose * also matches "/".
    parts = pattern.split("/")
    result = ""
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        if part == "**":
            result += ".*" if last else "(?:.+/)?"
            continue
        for token in re.findall(r"\[!?\]?[^\]]*\]|.", part, re.DOTALL):
            if token.startswith("[") and len(token) > 2:
                negated = token[1] == "!"
                inner = token[2 if negated else 1 : -1].replace("\\", "\\\\").replace("[", "\\[").replace("^", "\\^")
                result += f"[{'^' if negated else ''}{inner}]"
            else:
                result += {"*": "[^/]*", "?": "[^/]"}.get(token, re.escape(token))
        result += "" if last else "/"
    return result
