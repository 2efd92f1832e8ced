"""Helpers that several packages share, one per concept: files, hashes, suggestions and readable figures."""

from __future__ import annotations

import difflib
import hashlib
import os
import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path


def atomic_write(path: Path, content: str | bytes) -> None:
    """Write a small file so that a reader sees the old or the new content, never a part of it; text is UTF-8."""
    # A random name: ranks of several nodes may write the same file at the same time.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    temporary.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    os.replace(temporary, path)


def sha256_file(path: Path) -> str:
    """Return the hex SHA-256 of a file's content, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_text(text: str) -> str:
    """Return the hex SHA-256 of `text` in UTF-8."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Return "; did you mean NAME?" for the known name closest to `name`, "" if none is close."""
    # 0.4: a misspelt key still finds its name, another key does not.
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
    return f"; did you mean {prefix}{close[0]}?" if close else ""


def first_n(items: Sequence[object], limit: int, separator: str = ", ") -> str:
    """Return the first `limit` items as text, and how many more there are."""
    more = f" and {len(items) - limit:,} more" if len(items) > limit else ""
    return separator.join(map(str, items[:limit])) + more


def human_count(value: float, thousand: int = 1000) -> str:
    """Return a number in a few characters: 1.5M, 16K (thousand = 1024 for lengths), 0.25."""
    for size, unit in ((thousand**3, "G"), (thousand**2, "M"), (thousand, "K")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def human_bytes(num_bytes: float) -> str:
    """Return a size in memory or on disk: 64 KiB, 512 MiB, 1.5 GiB."""
    if num_bytes >= 2**30:
        return f"{num_bytes / 2**30:,.1f} GiB"
    return f"{num_bytes / 2**20:,.0f} MiB" if num_bytes >= 2**20 else f"{num_bytes / 2**10:,.0f} KiB"


def human_seconds(seconds: float) -> str:
    """Return a duration to two or three digits: 8.4 s, 4 min 10 s, 3 h 20 min, 2 d 4 h."""
    if seconds < 99.5:
        return f"{seconds:.2g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    days, hours = divmod(round(seconds / 3600), 24)
    return f"{days} d {hours} h"
