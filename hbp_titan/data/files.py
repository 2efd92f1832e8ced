"""The data files of a source, in an order that is the same on every machine.

Owns what a source's path may be: a file, a folder that HF `datasets` saved (`save_to_disk`), or a local dataset
repository, as cloned from a hub. The files of a repository's split are found by the rules of the library `datasets`
(its data_files.py): the `configs` in the front matter of README.md, or split keywords in file and folder names. Refuses
what cannot be data: loading scripts, which are never run, Git LFS pointers, paths that leave the folder.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from hbp_titan.job_config import DataSource
from hbp_titan.models.hf_files import check_not_pointer
from hbp_titan.utils import did_you_mean

JSON_SUFFIXES = tuple(f".{name}{packed}" for name in ("jsonl", "json", "ndjson") for packed in ("", ".gz", ".zst"))
ARROW_SUFFIXES = (".arrow", ".parquet")
SUFFIXES = JSON_SUFFIXES + ARROW_SUFFIXES
# The templates of data.chat_template that need no path, each a file in data/templates/.
READY_TEMPLATES = ("chatml", "deepseek_v3", "llama3", "qwen2_5", "qwen3", "r1_distill")

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


def source_files(source: DataSource, key: str) -> list[Path]:
    """Return the files of a source, each once: as a saved data set or README.md lists them, by name within a pattern.

    key: configuration key of the source, with which every ValueError begins.
    """
    if not source.path:
        raise ValueError(f"{key}.path: empty; set it to a file or a folder")
    path = Path(source.path).expanduser()
    if path.is_file():
        files = [path]
        if source.config or source.split != "train":
            name = "config" if source.config else "split"
            raise ValueError(f"{key}.{name} = {getattr(source, name)}: {path} is a file, which has no {name}")
    elif path.is_dir():
        files = _folder_files(path, source, key)
    else:
        raise ValueError(f"{key}: no such file or folder: {path}")
    for file in files:
        _check_file(file, key)
    return files


def _folder_files(folder: Path, source: DataSource, key: str) -> list[Path]:
    # One saved split has state.json; several have dataset_dict.json above a folder for each.
    saved = [name for name in ("dataset_dict.json", "state.json") if (folder / name).is_file()]
    if saved and source.config:
        raise ValueError(f"{key}.config = {source.config}: {folder} is a saved data set, which has no config")
    if "dataset_dict.json" in saved:
        splits = _read_json(folder / "dataset_dict.json").get("splits")
        if not isinstance(splits, list) or not all(isinstance(split, str) for split in splits):
            raise ValueError(f"{folder / 'dataset_dict.json'}: `splits` is not a list of names")
        if source.split not in splits:
            raise ValueError(f"{key}: {folder}: no split {source.split}; it has {', '.join(splits)}")
        return _saved_files(folder / _relative_path(source.split, str(folder / "dataset_dict.json")))
    if "state.json" in saved:
        split = _read_json(folder / "state.json").get("_split")
        if source.split not in ("train", split):
            raise ValueError(f"{key}.split = {source.split}: {folder} is one saved split ({split or 'unnamed'})")
        return _saved_files(folder)
    try:
        return repository_files(folder, source.config, source.split)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None


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


def _check_file(file: Path, key: str) -> None:
    if not file.name.lower().endswith(SUFFIXES):
        raise ValueError(f"{key}: {file}: unsupported file type; must be one of {', '.join(SUFFIXES)}")
    check_not_pointer(file, key)


def repository_files(folder: Path, config: str, split: str) -> list[Path]:
    """Return the files of a split. config: "" takes the only configuration, or the default one.

    Raises ValueError if there are none, and lists the existing configurations or splits.
    """
    names = _data_files(folder)
    if not names:
        scripts = sorted(file.name for file in folder.glob("*.py"))
        if scripts:
            raise ValueError(f"{folder}: has only a loading script ({scripts[0]}), which is never run; add data files")
        raise ValueError(f"{folder}: no data files ({', '.join(SUFFIXES)})")
    configs = _read_configs(folder / "README.md")
    if configs:
        splits = _splits_of_config(folder, names, *_choose_config(configs, config, folder))
    elif config:
        raise ValueError(f"{folder}: no configuration {config}; README.md lists none")
    else:
        splits = _splits_by_name(names)
    if split not in splits:
        raise ValueError(f"{folder}: no split {split}; it has {', '.join(splits) or 'none'}")
    _check_one_kind(folder, splits[split], split)
    return [folder / name for name in splits[split]]


def _data_files(folder: Path) -> list[str]:
    """Return the relative names of the data files, sorted; skips hidden ones and folders such as __pycache__."""
    names = []
    for file in folder.rglob("*"):
        name = file.relative_to(folder)
        hidden = any(part.startswith(".") for part in name.parts) or any(p.startswith("__") for p in name.parts[:-1])
        if not hidden and name.name not in _NOT_DATA and name.name.lower().endswith(SUFFIXES) and file.is_file():
            names.append(name.as_posix())
    return sorted(names)


def _check_one_kind(folder: Path, names: Sequence[str], split: str) -> None:
    """Raise ValueError if a split has both JSON and Parquet or Arrow files: most likely the same rows twice."""
    for suffixes in (JSON_SUFFIXES, (".parquet",), (".arrow",)):
        others = [name for name in names if not name.lower().endswith(suffixes)]
        if others and len(others) < len(names):
            same = next(name for name in names if name not in others)
            raise ValueError(
                f"{folder}: split {split} has files of two kinds, {same} and {others[0]}; set path to one of them"
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


def _splits_of_config(folder: Path, names: Sequence[str], name: str, config: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the files of each split that the configuration `name` of README.md lists."""
    where = f"{folder / 'README.md'}: configuration {name}"
    base = config.get("data_dir") or ""
    prefix = f"{_relative_path(base, where).strip('/')}/" if base else ""
    names = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    if config.get("data_files") is None:
        splits = _splits_by_name(names)
    else:
        patterns = _patterns(config["data_files"], where)
        splits = {split: _listed(names, patterns[split], f"{where}: split {split}") for split in patterns}
    return {split: [prefix + name for name in files] for split, files in splits.items() if files}


def _listed(names: Sequence[str], patterns: Sequence[str], where: str) -> list[str]:
    """Return the names that match, in the order of the patterns, each once."""
    listed: list[str] = []
    for pattern in patterns:
        try:
            found = _matching(names, _relative_path(pattern, where))
        except re.error as error:
            raise ValueError(f"{where}: {pattern!a} is not a file name pattern: {error}") from None
        if not found and not re.search(r"[*?\[]", pattern):
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


def require(module: str, file: Path) -> Any:
    """Import an optional module that reading `file` needs."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ValueError(f"{file}: reading it needs {module}; pip install 'hbp-titan[data]'") from None
