"""The embedded corpus: an SFT data set and its tokenizer from the text of the running Python's standard library.

Owns which modules are read, the split into training and validation by module, and the folder's making: train.jsonl,
validation.jsonl (`messages` format, with the kind of each row as its `source`) and tokenizer/. For one version of
Python and one seed the folder's bytes are always the same. Lengths are heavy-tailed by nature: from tens of tokens
to 64K, the longest 1% of the samples holding a third of the tokens.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import secrets
import shutil
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from hbp_titan.data.chat.tokenizer import train_tokenizer
from hbp_titan.data.stdlib_questions import module_conversations

FILES = ("train.jsonl", "validation.jsonl", "tokenizer")
SKIPPED_FOLDERS = {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "turtledemo", "_bundled"}
# Every so many-th module, by hash, is held out.
VALIDATION_SHARE = 20
# Text that the tokenizer is trained on; more brings under 1% fewer tokens.
TOKENIZER_CHARACTERS = 16_000_000


def ensure_stdlib_corpus(folder: Path, seed: int = 0) -> bool:
    """Build the embedded corpus in `folder` unless it is there; True where it was built."""
    missing = [name for name in FILES if not (folder / name).exists()]
    if not missing:
        return False
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(
            f"data.embedded_folder {folder} is not empty and lacks {missing[0]}: delete it or name another"
        )
    build_stdlib_corpus(folder, seed)
    return True


def build_stdlib_corpus(folder: Path, seed: int = 0, stdlib: Path | None = None) -> None:
    """Write the embedded corpus to `folder`, which must not exist or be empty; it appears whole or not at all.

    stdlib: where the modules are; None means the running Python's own standard library.
    Raises ValueError where no module is found there.
    """
    temporary = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}")
    temporary.mkdir(parents=True)
    try:
        _write_corpus(temporary, stdlib or Path(sysconfig.get_path("stdlib")), seed)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_corpus(folder: Path, stdlib: Path, seed: int) -> None:
    train: list[str] = []
    with (
        (folder / "train.jsonl").open("w", encoding="utf-8", newline="\n") as train_file,
        (folder / "validation.jsonl").open("w", encoding="utf-8", newline="\n") as validation_file,
    ):
        for module, text in _modules(stdlib):
            held_out = _hash(f"{seed}:{module}") % VALIDATION_SHARE == 0
            for row in _rows(module, text, seed):
                line = json.dumps(row, ensure_ascii=False) + "\n"
                (validation_file if held_out else train_file).write(line)
            if not held_out:
                train.append(text)
    if not train:
        raise ValueError(f"{stdlib}: no Python module found for the embedded corpus")
    train_tokenizer(_share(train, seed), folder / "tokenizer")


def _modules(stdlib: Path) -> Iterator[tuple[str, str]]:
    """Name and source of each module, in the order of their names."""
    files = {}
    for file in stdlib.rglob("*.py"):
        parts = file.relative_to(stdlib).with_suffix("").parts
        if not SKIPPED_FOLDERS.intersection(parts[:-1]) and all(part.isidentifier() for part in parts):
            name = ".".join(parts)
            files[name.removesuffix(".__init__")] = file
    for name in sorted(files):
        try:
            with tokenize.open(files[name]) as stream:
                yield name, stream.read()
        except SyntaxError:
            continue  # an encoding that this Python does not know


def _rows(module: str, text: str, seed: int) -> list[dict[str, Any]]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            return list(module_conversations(module, text, Random(f"{seed}:{module}")))
    except SyntaxError:
        return []  # kept by the library as data, for other versions of Python


def _share(texts: list[str], seed: int) -> list[str]:
    """Modules in random order, up to TOKENIZER_CHARACTERS."""
    shuffled = Random(seed).sample(texts, len(texts))
    ends = itertools.accumulate(map(len, shuffled))
    return [text for text, end in zip(shuffled, ends, strict=True) if end <= TOKENIZER_CHARACTERS] or shuffled[:1]


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
