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

from hbp_titan.data.store.team import Team


def fingerprint(parts: Any) -> str:
    """Hex SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def file_digests(files: Sequence[Path], memory: Path, team: Team) -> list[str]:
    """Hex SHA-256 of each file's content, read by the ranks in turn; `memory`: folder that keeps them."""
    own = {number: _remembered_digest(files[number], memory) for number in team.share(len(files))}
    merged: dict[int, str] = {}
    for found in team.run(lambda: own):
        merged.update(found)
    return [merged[number] for number in range(len(files))]


def write_atomically(path: Path, text: str) -> None:
    """Write a small text file so that a reader sees the old or the new content, never a part."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _remembered_digest(file: Path, memory: Path) -> str:
    stat = file.stat()
    key = f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns}"
    kept = memory / hashlib.sha256(key.encode()).hexdigest()[:32]
    try:
        digest = kept.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        digest = ""
    if len(digest) != 64:
        digest = _digest(file)
        memory.mkdir(parents=True, exist_ok=True)
        write_atomically(kept, digest)
    return digest


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
