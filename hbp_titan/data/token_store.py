"""Token store: the tokens, loss masks and lengths of a data set in one folder, read through memory maps.

Owns the folder's format, its making (once per fingerprint, atomically) and its reading. N samples, T tokens in all:

    tokens.bin        uint32 [T]   token ids, sample after sample
    loss_mask.bin     uint8  [T]   1 where the token is trained (assistant turns)
    offsets.npy       int64  [N+1] sample i is tokens[offsets[i]:offsets[i+1]]
    lengths.npy       int64  [N]   tokens of each sample
    loss_tokens.npy   int64  [N]   trained positions after the shift: loss_mask[1:].sum() of each sample
    sources.npy       uint16 [N]   index into source_names
    files.npy, lines.npy int64 [N] the row that each sample comes from
    excluded.jsonl    one object for each row left out: file, line, reason, tokens
    truncated.jsonl   the same for each row that was cut; tokens before the cut
    meta.json         fingerprint, names, counts, settings
"""

from __future__ import annotations

import json
import secrets
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from hbp_titan.data.chat_template import ChatTokenizer
from hbp_titan.data.fingerprint import fingerprint
from hbp_titan.data.sources import RowIndex, check_files, index_rows
from hbp_titan.data.tokenize_rows import TokenizedChunk, tokenize

FORMAT_VERSION = 2
MAX_SOURCES = 1 << 16


class TokenStore:
    """A token store opened for reading; its arrays are memory maps, so opening costs nothing per sample.

    lengths, loss_tokens: int64 [N]; sources: uint16 [N] into source_names; fingerprint: hex SHA-256;
    meta: meta.json, which also holds vocab_size, pad_token_id and eos_token_id (None where the folder names none).
    """

    def __init__(self, folder: Path) -> None:
        meta_file = folder / "meta.json"
        if not meta_file.is_file():
            raise ValueError(f"{folder}: no token store here: run scripts/prepare_data.py")
        self.folder = folder
        self.meta: dict[str, Any] = json.loads(meta_file.read_text(encoding="utf-8"))
        if self.meta["format_version"] != FORMAT_VERSION:
            raise ValueError(
                f"{folder}: format {self.meta['format_version']} is not this version's {FORMAT_VERSION}: delete it"
            )
        self.fingerprint: str = self.meta["fingerprint"]
        self.source_names: list[str] = self.meta["source_names"]
        self.lengths: NDArray[np.int64] = self._load("lengths")
        self.loss_tokens: NDArray[np.int64] = self._load("loss_tokens")
        self.sources: NDArray[np.uint16] = self._load("sources")
        self._offsets: NDArray[np.int64] = self._load("offsets")
        self._tokens: NDArray[np.uint32] = self._map("tokens.bin", np.uint32)
        self._loss_mask: NDArray[np.bool_] = self._map("loss_mask.bin", np.bool_)

    @classmethod
    def open(cls, folder: Path | str) -> TokenStore:
        """The store in `folder`; ValueError where there is none, or it is of another format or damaged."""
        return cls(Path(folder))

    def __len__(self) -> int:
        return len(self.lengths)

    def sample(self, index: int) -> tuple[NDArray[np.uint32], NDArray[np.bool_]]:
        """Token ids [L] uint32 and loss mask [L] bool of one sample: read-only views of the memory map."""
        start, end = int(self._offsets[index]), int(self._offsets[index + 1])
        return self._tokens[start:end], self._loss_mask[start:end]

    def where(self, index: int) -> str:
        """The row that a sample comes from, as file:line."""
        file = self.meta["files"][int(self._load("files")[index])]
        return f"{file}:{int(self._load('lines')[index])}"

    def excluded(self) -> list[dict[str, Any]]:
        """The rows left out, each with file, line, reason and tokens."""
        return self._rows("excluded.jsonl")

    def truncated(self) -> list[dict[str, Any]]:
        """The rows that were cut, in the form of `excluded`."""
        return self._rows("truncated.jsonl")

    def _rows(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / name).read_text(encoding="utf-8").splitlines()]

    def _load(self, name: str) -> NDArray[Any]:
        return np.load(self.folder / f"{name}.npy", mmap_mode="r", allow_pickle=False).view(np.ndarray)

    def _map(self, name: str, dtype: Any) -> NDArray[Any]:
        values = np.memmap(self.folder / name, dtype=dtype, mode="r").view(np.ndarray)
        if len(values) != self.meta["num_tokens"]:
            raise ValueError(
                f"{self.folder / name}: {len(values)} tokens where meta.json says {self.meta['num_tokens']}: "
                "the store is damaged: delete its folder"
            )
        return values


def check_fits(store: TokenStore, max_tokens: int, limit: str = "the largest level, levels.max_tokens") -> None:
    """Raise ValueError where a sample is longer than `max_tokens`, which is called `limit`."""
    longest = int(store.lengths.argmax())
    if store.lengths[longest] <= max_tokens:
        return
    count = int((store.lengths > max_tokens).sum())
    raise ValueError(
        f"{store.where(longest)}: a sample of {store.lengths[longest]} tokens is longer than {limit} = "
        f"{max_tokens} ({count} of {len(store)} samples are): raise it, or set data.overlong to skip or truncate"
    )


def build_token_store(
    files: Sequence[str | Path],
    tokenizer_path: Path,
    cache_folder: Path,
    *,
    num_proc: int = 0,
    max_samples: int = 0,
    max_tokens: int = 0,
    overlong: str = "skip",
    seed: int = 0,
    progress: bool = True,
    key: str = "data.train_files",
) -> Path:
    """The folder of the token store of `files`, made where the cache has none of the same fingerprint.

    num_proc: processes; 0 means one per core. It does not change the store.
    max_samples: a random share, by `seed`, of so many rows is tokenized; 0 takes all.
    max_tokens: longer samples are left out (overlong="skip") or cut there ("truncate"), and listed; 0 keeps all.
    key: the configuration key of `files`, for messages.
    Raises ValueError "file:line: ..." for a malformed row, and where no sample is left.
    """
    paths = check_files(files, key)
    settings = {
        "max_samples": max_samples,
        "max_tokens": max_tokens,
        "overlong": overlong if max_tokens else "",
        "seed": seed,
        "format": FORMAT_VERSION,
    }
    digest = fingerprint(paths, tokenizer_path, settings, cache_folder)
    folder = cache_folder / digest[:16]
    if folder.is_dir():
        return folder
    temporary = cache_folder / f".{folder.name}-{secrets.token_hex(4)}"
    temporary.mkdir(parents=True)
    try:
        meta = {"format_version": FORMAT_VERSION, "fingerprint": digest, "settings": settings}
        _write_store(temporary, paths, tokenizer_path, num_proc, meta, progress)
        _publish(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _publish(temporary: Path, folder: Path) -> None:
    try:
        temporary.rename(folder)
    except OSError:
        # Another process made the same store meanwhile.
        if not folder.is_dir():
            raise


def _write_store(
    folder: Path, files: list[Path], tokenizer_path: Path, num_proc: int, meta: dict[str, Any], progress: bool
) -> None:
    settings = meta["settings"]
    everything = [index_rows(file) for file in files]
    chosen = _choose(everything, settings["max_samples"], settings["seed"])
    writer = _StoreWriter(folder)
    chunks = tokenize(
        chosen, tokenizer_path, num_proc, settings["max_tokens"], truncate=settings["overlong"] == "truncate"
    )
    # disable=None: a bar on a terminal only.
    with tqdm(total=sum(map(len, chosen)), unit="sample", desc="tokenizing", disable=None if progress else True) as bar:
        for chunk in chunks:
            writer.append(chunk)
            bar.update(len(chunk.lines) + len(chunk.excluded))
    rows = sum(map(len, everything))
    chat_tokenizer = ChatTokenizer(tokenizer_path)
    writer.finish(
        {
            **meta,
            "files": [str(file) for file in files],
            "rows": rows,
            "sampled_out": rows - sum(map(len, chosen)),
            "tokenizer_path": str(tokenizer_path),
            "vocab_size": chat_tokenizer.vocab_size,
            "pad_token_id": chat_tokenizer.token_id("pad_token"),
            "eos_token_id": chat_tokenizer.token_id("eos_token"),
        }
    )


def _choose(indexes: list[RowIndex], max_samples: int, seed: int) -> list[RowIndex]:
    """A random share of `max_samples` rows of all files together, in their order; 0 takes all."""
    counts = [len(index) for index in indexes]
    if not max_samples or max_samples >= sum(counts):
        return indexes
    chosen = np.sort(np.random.default_rng(seed).choice(sum(counts), size=max_samples, replace=False))
    ends = np.cumsum(counts)
    parts = np.split(chosen, np.searchsorted(chosen, ends[:-1]))
    return [
        index.take(part - end + count) for index, part, end, count in zip(indexes, parts, ends, counts, strict=True)
    ]


class _StoreWriter:
    """Appends chunks to the token files of a store's folder; small arrays stay in memory until the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.arrays: dict[str, list[NDArray[Any]]] = {
            name: [] for name in ("lengths", "loss_tokens", "sources", "files", "lines")
        }
        self.source_ids: dict[str, int] = {}
        self.file_ids: dict[Path, int] = {}
        self.reasons: Counter[str] = Counter()
        self.num_truncated = 0

    def append(self, chunk: TokenizedChunk) -> None:
        for name, values in (("tokens.bin", chunk.tokens), ("loss_mask.bin", chunk.loss_mask)):
            with (self.folder / name).open("ab") as stream:
                stream.write(np.ascontiguousarray(values).data)
        source_ids = [self.source_ids.setdefault(name, len(self.source_ids)) for name in chunk.sources]
        if len(self.source_ids) > MAX_SOURCES:
            raise ValueError(f"{chunk.file}: more than {MAX_SOURCES} different `source` values: name fewer, or none")
        file_id = self.file_ids.setdefault(chunk.file, len(self.file_ids))
        self.arrays["lengths"].append(chunk.lengths)
        self.arrays["loss_tokens"].append(chunk.loss_tokens)
        self.arrays["sources"].append(np.array(source_ids, dtype=np.uint16))
        self.arrays["files"].append(np.full(len(chunk.lines), file_id, dtype=np.int64))
        self.arrays["lines"].append(chunk.lines)
        self.reasons.update(row.reason for row in chunk.excluded)
        self.num_truncated += len(chunk.truncated)
        for name, rows in (("excluded.jsonl", chunk.excluded), ("truncated.jsonl", chunk.truncated)):
            with (self.folder / name).open("a", encoding="utf-8") as stream:
                for row in rows:
                    entry = {"file": str(chunk.file), "line": row.line, "reason": row.reason, "tokens": row.tokens}
                    stream.write(json.dumps(entry) + "\n")

    def finish(self, meta: dict[str, Any]) -> None:
        arrays = {name: np.concatenate(parts) for name, parts in self.arrays.items()}
        num_samples, num_tokens = len(arrays["lengths"]), int(arrays["lengths"].sum())
        if not num_samples:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.reasons.items())
            raise ValueError(f"{', '.join(meta['files'])}: no sample is left to train on ({reasons})")
        assert num_samples + self.reasons.total() + meta["sampled_out"] == meta["rows"], "a row was lost"
        for name, values in arrays.items():
            np.save(self.folder / f"{name}.npy", values)
        np.save(self.folder / "offsets.npy", np.concatenate([[0], np.cumsum(arrays["lengths"])]))
        meta = {
            **meta,
            "files": [str(file) for file in self.file_ids],
            "source_names": list(self.source_ids),
            "num_samples": num_samples,
            "num_tokens": num_tokens,
            "num_trained_tokens": int(arrays["loss_tokens"].sum()),
            "excluded": dict(self.reasons),
            "truncated": self.num_truncated,
        }
        (self.folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
