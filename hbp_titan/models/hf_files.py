"""The files of an HF folder, and the mistakes of a download: Git LFS pointers, a hub id instead of a folder, weights of
another format."""

from __future__ import annotations

import hashlib
import json
import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from hbp_titan.utils import did_you_mean

_READ = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)
# Other tokenizer libraries, older versions and servers read these. Code is copied, but never run here.
_CARRIED = (
    "tokenizer*", "chat_template.json", "vocab*", "merges*", "*.model", "*.tiktoken", "*.bpe", "bpe.codes", "spiece*",
    "tekken.json", "tokenization_*.py",
)  # fmt: skip
# At the top of a folder, in any case: LICENSE.txt, Notice, USE_POLICY.md, LICENSE-MODEL, ...
LICENSE = re.compile(
    r"(?i)(?!.*\.(bin|gguf|json|pth?|py|safetensors)$)(.*licen[cs]e|notice|.*policy|copying|copyright|terms).*"
)
# Named by auto_map in config.json; copied, but never run here.
MODEL_CODE = ("configuration_*.py", "modeling_*.py")
_LFS_POINTER = b"version https://git-lfs"
# What a hub calls a repository: an owner and a name, which is not that of a file.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w-]*/(?!.*\.(?:[a-z]*json[a-z]*|csv|arrow|parquet|gz|zst)$)[A-Za-z0-9][\w.-]*")
# One slash is enough: a Path has lost the other.
_HUB_URL = {
    "dataset": re.compile(r"\w+:/{1,2}(?:.*/)?datasets/([^/?#@]+/[^/?#@]+)"),
    "model": re.compile(r"\w+:/{1,2}(?:[\w-]+\.[\w.-]+/)?([^/?#@]+/[^/?#@]+)"),
}
_AUTO = "from transformers import AutoModelForCausalLM as M; M.from_pretrained"
# In place, so that the tokenizer files stay next to the weights. transformers reads pickles with torch's safe loader.
_SAVE = "python -c \"{auto}('{folder}', dtype='auto'{option}).save_pretrained('{folder}')\""


def tokenizer_files(folder: Path, carried: bool = False) -> list[str]:
    """Return the names, relative to `folder`, of the tokenizer files in it that decide token ids and chat templates.

    carried: the files that only other programs read as well, for a copy of the tokenizer.
    """
    patterns = _READ + (_CARRIED if carried else ())
    files = [file for pattern in patterns for file in sorted(folder.glob(pattern)) if file.is_file()]
    return list(dict.fromkeys(file.relative_to(folder).as_posix() for file in files))


def is_tokenizer_file(name: str) -> bool:
    """Return whether `tokenizer_files` returns the file `name`, relative to its folder."""
    return any(fnmatchcase(name, p) and name.count("/") == p.count("/") for p in _READ + _CARRIED)


def download_folder(repo_id: str, repo_type: str) -> str:
    """Return the folder to which scripts/download.py writes a "model" or "dataset" of the hub."""
    return f"{'data' if repo_type == 'dataset' else 'models'}/{repo_id.rpartition('/')[2]}"


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`. Raises ValueError with the file name for anything else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        check_not_pointer(path)
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: not a JSON object")
    return values


def indexed_files(index: Path) -> list[str]:
    """Return the names of the safetensors files that an index lists, sorted."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{index}: weight_map is not an object of file names")
    names = sorted(set(weight_map.values()))
    for name in names:
        # The index is untrusted input: a path could name files outside the folder.
        if "/" in name or "\\" in name or not name.endswith(".safetensors"):
            raise ValueError(f"{index}: {name!r} is not the name of a safetensors file in this folder")
    return names


def check_tokenizer_folder(folder: Path, key: str = "model.tokenizer_path") -> None:
    """Raise ValueError unless `folder`, the value of `key`, has a tokenizer.json and no Git LFS pointer."""
    require_folder(folder, key)
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(f"{key}: {folder} has no tokenizer.json")
    for name in tokenizer_files(folder, carried=True):
        check_not_pointer(folder / name)


def weights_digest(folder: Path) -> str:
    """Return a hex SHA-256 that tells an HF folder or checkpoint from one with another config.json or other weights.

    Of a large file its size and 64 blocks of 4 KiB count, because a start must not read a model twice.
    """
    manifest = folder / "manifest.json"  # of a checkpoint, with the checksum of every file
    files = [manifest] if manifest.exists() else [*folder.glob("config.json"), *sorted(folder.glob("*.safetensors"))]
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size};".encode())
        with file.open("rb") as stream:
            for start in range(0, size, max(4096, size // 64)):
                stream.seek(start)
                digest.update(stream.read(4096))
    return digest.hexdigest()


def require_folder(folder: Path, key: str) -> None:
    """Raise ValueError unless `folder`, the value of `key`, exists; for a hub id, with the command that downloads."""
    if not folder.is_dir():
        raise ValueError(f"{key} = {str(folder)!r}: no such folder{missing_hint(folder, str(folder), 'model')}")


def missing_hint(path: Path, given: str, repo_type: str) -> str:
    """Return what to do about a path that does not exist: download it from a hub, or spell it as another one.

    given: as the user wrote it; repo_type: "model" or "dataset".
    """
    url = _HUB_URL[repo_type].match(given)
    if ":/" in given and not url:
        return "; a URL is not read: download the file first"
    close = did_you_mean(path.name, [file.name for file in path.parent.iterdir()]) if path.parent.is_dir() else ""
    if url or (_HUB_ID.fullmatch(given) and not close):
        name = url[1] if url else given
        # Both readings: a path from another working directory looks the same as a name on a hub.
        local = "" if url else f"; a local path is relative to {Path.cwd()}"
        option = " --dataset" if repo_type == "dataset" else ""
        return (
            f"{local}; if it is a {repo_type} of the Hugging Face hub, download it first: "
            f"hbp-titan download {name}{option} (and set the path to {download_folder(name, repo_type)})"
        )
    return close


def check_not_pointer(file: Path, key: str = "") -> None:
    """Raise ValueError "`key`: ..." if `file` is what a clone without git-lfs has in place of a large file."""
    with file.open("rb") as stream:
        if stream.read(len(_LFS_POINTER)) == _LFS_POINTER:
            where = f"{key}: {file}" if key else f"{file}"
            raise ValueError(f"{where} is a Git LFS pointer, not the file; run `git lfs pull` in its repository")


def describe_other_weights(folder: Path) -> str:
    """Return "; ..." on the weights of another format in `folder`, with the fix; "" if there are none."""
    if (folder / "adapter_config.json").is_file():
        return "; it is a PEFT adapter: merge it into its base with PeftModel.merge_and_unload() and save the result"
    if found := _first(folder, "pytorch_model*.bin"):
        return f"; {found} is a pickle, which is not read: convert it with {_command(folder)}"
    if found := _first(folder, "*.gguf"):
        return f"; {found} is not read: convert it with {_command(folder, f', gguf_file={found!r}')}"
    if found := _first(folder, "consolidated*") or _first(folder, "*.pth"):
        return f"; {found} has the names of another layout: download the folder in the layout of transformers"
    if found := _first(folder, "model-*-of-*.safetensors") or _first(folder, "*.safetensors"):
        return f"; {found} is there, but the index that names its tensors is missing: download it as well"
    return ""


def _first(folder: Path, pattern: str) -> str:
    return min((file.name for file in folder.glob(pattern)), default="")


def _command(folder: Path, option: str = "") -> str:
    return _SAVE.format(auto=_AUTO, folder=folder, option=option)
