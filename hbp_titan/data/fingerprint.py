"""What identifies a token store: the SHA-256 over everything that its tokens depend on.

Owns the digest of a file's content, remembered by (path, size, mtime_ns) so that unchanged files are not read again.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hbp_titan.data.tokenizer import TOKENIZER_FILES

DIGESTS_FILE = "file_digests.json"


def fingerprint(files: Sequence[Path], tokenizer_path: Path, settings: dict[str, Any], cache_folder: Path) -> str:
    """Hex SHA-256 over the content of `files` and of the tokenizer's files (its template among them) and `settings`.

    The name of a source file counts without its folder, because it names the rows' source.
    """
    tokenizer_files = [tokenizer_path / name for name in TOKENIZER_FILES if (tokenizer_path / name).is_file()]
    digests = _file_digests([*files, *tokenizer_files], cache_folder / DIGESTS_FILE)
    parts = {
        "sources": [[file.name, digests[file]] for file in files],
        "tokenizer": [[file.name, digests[file]] for file in tokenizer_files],
        "settings": settings,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """Write a small text file so that a reader sees the old or the new content, never a part."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _file_digests(files: Sequence[Path], memory: Path) -> dict[Path, str]:
    try:
        known = json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    digests, learned = {}, {}
    for file in files:
        stat = file.stat()
        key = f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns}"
        if key not in known:
            learned[key] = _digest(file)
        digests[file] = {**known, **learned}[key]
    if learned:
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(memory, json.dumps({**known, **learned}, indent=0))
    return digests


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
