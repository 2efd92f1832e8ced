"""Token stores on disk: tokenized samples, read through memory maps.

Owns the file formats and their reading. A *source store* holds the samples of one data source; a *set* holds the
samples of one epoch, copies counted, and only points into source stores. A set of N samples:

    lengths.npy, loss_tokens.npy  int64  [N]   tokens of each sample; trained positions, loss_mask[1:].sum()
    sources.npy                   uint16 [N]   index into source_names
    stores.npy, places.npy        [N]          index of the source store; sample of that store
    dropped.npy                   int64  [n,3] store, sample and reason (index into DROPPED) of samples not trained
    incomplete_rows.jsonl         of all source stores, if the data lies elsewhere than where they were built
    meta.json                     fingerprint, names, counts, folders of the source stores, tokenizer; `places`: the
                                  files of each source in the last run that prepared the set, and files not read
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hbp_titan.errors import UserError
from hbp_titan.job_config import Data

FORMAT_VERSION = 7
SAMPLE = np.dtype(
    [
        ("length", "<i8"),
        ("loss_tokens", "<i8"),  # trained positions after the shift: loss_mask[1:].sum()
        ("line", "<i8"),
        ("file", "<u4"),  # index into the source's files
        ("part", "<u4"),  # number of the piece of a split row
        ("source", "<u4"),  # index into the source names
        ("digest", "V16"),  # of token ids and loss mask
    ]
)
PLACED = np.dtype([*((name, SAMPLE[name]) for name in SAMPLE.names or ()), ("shard", "<u4"), ("start", "<i8")])
"""A sample of a source store: SAMPLE, its shard and its first token in that shard."""

DUPLICATE, NOT_DRAWN, HELD_OUT, NOT_HELD_OUT = "duplicate", "not drawn", "held out", "not held out"
DROPPED = (DUPLICATE, NOT_DRAWN, HELD_OUT, NOT_HELD_OUT)
"""Why a set does not train a sample of its source stores."""

MALFORMED = "malformed"
INCOMPLETE_ROWS = "incomplete_rows.jsonl"
# Each open shard takes two maps, and a map may take a file handle.
OPEN_SHARDS = 200


@dataclass(frozen=True)
class TokenizeConfig:
    """Everything that the samples of a source depend on in addition to its rows (job_config.Data and DataSource).

    name: name of the source; "" takes each row's own, or else `folder`, the name of the folder of its files, or else
    its file's. max_tokens: longest sample; 0 keeps any length. max_length_policy: truncate, split or skip; unused if
    max_tokens is 0. chat_template: file of the template; None for that of the tokenizer folder.
    """

    tokenizer_path: Path
    train_on: str = "assistant"
    max_tokens: int = 0
    max_length_policy: str = "skip"
    format: str = "messages"
    columns: dict[str, str] = field(default_factory=dict)
    roles: dict[str, str] = field(default_factory=dict)
    name: str = ""
    folder: str = ""
    max_row_bytes: int = 1 << 25
    reasoning: str = "error"
    empty_answers: str = "skip"
    chat_template: Path | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    template_date: str = Data.template_date

    def values(self) -> dict[str, Any]:
        """Return the settings as JSON values, without paths, whose files count by content (data/prepare.py)."""
        return {**dataclasses.asdict(self), "tokenizer_path": "", "chat_template": ""}


def read_meta(folder: Path) -> dict[str, Any]:
    """Return meta.json of a set or a source store; raises ValueError unless it exists in this format."""
    file = folder / "meta.json"
    if not file.is_file():
        raise ValueError(f"{folder}: not a token store; run scripts/prepare_data.py")
    meta: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if meta["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{folder}: has format {meta['format_version']}, but this version reads {FORMAT_VERSION}; delete the folder"
        )
    return meta


class SourceStore:
    """The samples of one data source, opened for reading.

    samples: PLACED [N], a memory map; meta: meta.json; files: where they are, which the run that made the store may
    have found elsewhere. The folder, made once per fingerprint:

        shard-00000/ ...        token ids and loss masks (data/shards.py)
        samples.npy             PLACED [N], over all shards
        not_chosen.npy          int64 [n,2]: file and line of the rows outside data.max_samples or the source's limit
        incomplete_rows.jsonl   one object per row that is not trained whole
        meta.json               fingerprint, files, source names, counts, empty files, columns that are not read
    """

    def __init__(self, folder: Path, files: Sequence[str] = ()) -> None:
        self.folder = folder
        self.meta = read_meta(folder)
        self.files: list[str] = list(files) or self.meta["files"]
        # By the paths of the run that made the store.
        self._found: dict[str, str] = dict(zip(self.meta["files"], self.files, strict=True))
        self.samples: NDArray[Any] = np.load(folder / "samples.npy", mmap_mode="r", allow_pickle=False)
        self._shard = lru_cache(maxsize=OPEN_SHARDS)(self._open_shard)

    def __len__(self) -> int:
        return len(self.samples)

    def __reduce__(self) -> tuple[type[SourceStore], tuple[Path, list[str]]]:
        return SourceStore, (self.folder, self.files)

    def sample(self, index: int) -> tuple[NDArray[np.uint32], NDArray[np.bool_]]:
        """Return token ids [L] uint32 and loss mask [L] bool of one sample: read-only views of the memory maps."""
        place = self.samples[index]
        tokens, loss_mask = self._shard(int(place["shard"]))
        start = int(place["start"])
        end = start + int(place["length"])
        return tokens[start:end], loss_mask[start:end]

    def where(self, index: int) -> str:
        """Return the row that a sample comes from, as file:line."""
        place = self.samples[index]
        return f"{self.files[int(place['file'])]}:{int(place['line'])}"

    def incomplete_rows(self) -> list[dict[str, Any]]:
        """Return the rows not trained whole: file, line, outcome, reason, tokens, samples, detail, notes."""
        text = (self.folder / INCOMPLETE_ROWS).read_text(encoding="utf-8")
        rows = [json.loads(line) for line in text.split("\n") if line]
        return [{**row, "file": self._found[row["file"]]} for row in rows]

    def empty_files(self) -> list[str]:
        """Return the files that have no rows."""
        return [self._found[file] for file in self.meta["empty_files"]]

    def _open_shard(self, number: int) -> tuple[NDArray[np.uint32], NDArray[np.bool_]]:
        folder, expected = self.folder / f"shard-{number:05d}", self.meta["shard_tokens"][number]
        maps = []
        for name, dtype in (("tokens.bin", "<u4"), ("loss_mask.bin", np.bool_)):
            # A plain ndarray: each slice of a memmap object would cost several microseconds more.
            values: NDArray[Any] = np.memmap(folder / name, dtype=dtype, mode="r").view(np.ndarray)
            if len(values) != expected:
                raise ValueError(
                    f"{folder / name}: damaged: {len(values)} tokens, but meta.json has {expected}; "
                    f"delete {self.folder}"
                )
            maps.append(values)
        return maps[0], maps[1]


class TokenStore:
    """A set of samples, opened for reading; its arrays are memory maps, so opening costs nothing per sample.

    lengths, loss_tokens: int64 [N]; sources: uint16 [N] into source_names; fingerprint: hex SHA-256;
    meta: meta.json, which also holds vocab_size (the tokenizer's largest id + 1), pad_token_id and eos_token_id (None
    if the tokenizer has none).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.meta = read_meta(folder)
        self.fingerprint: str = self.meta["fingerprint"]
        self.source_names: list[str] = self.meta["source_names"]
        self.turn_ends: list[tuple[int, str, int]] = [tuple(end) for end in self.meta["turn_ends"]]
        self.lengths: NDArray[np.int64] = self._load("lengths")
        self.loss_tokens: NDArray[np.int64] = self._load("loss_tokens")
        self.sources: NDArray[np.uint16] = self._load("sources")
        self._store_of: NDArray[np.uint16] = self._load("stores")
        self._place: NDArray[np.int64] = self._load("places")
        # A set that no run has finished preparing has no places: then those of its stores hold.
        self.places: list[dict[str, Any]] = self.meta.get("places") or [{"files": []} for _ in self.meta["stores"]]
        self.stores = [
            SourceStore(folder.parent / name, place["files"])
            for name, place in zip(self.meta["stores"], self.places, strict=True)
        ]

    @classmethod
    def open(cls, folder: Path | str) -> TokenStore:
        """Open the store in `folder`; raises ValueError if there is none, or it has another format or is damaged."""
        return cls(Path(folder))

    def __reduce__(self) -> tuple[type[TokenStore], tuple[Path]]:
        # Loader processes open the maps again: none of the content is copied.
        return TokenStore, (self.folder,)

    def __len__(self) -> int:
        return len(self.lengths)

    def sample(self, index: int) -> tuple[NDArray[np.uint32], NDArray[np.bool_]]:
        """Return token ids [L] uint32 and loss mask [L] bool of one sample: read-only views of the memory maps."""
        return self.stores[self._store_of[index]].sample(int(self._place[index]))

    def where(self, index: int) -> str:
        """Return the row that a sample comes from, as file:line."""
        return self.stores[self._store_of[index]].where(int(self._place[index]))

    def incomplete_rows(self) -> Iterator[dict[str, Any]]:
        """Yield every row or sample that is read but not trained whole, as `SourceStore.incomplete_rows` does.

        A dropped sample (DROPPED) has the same word as outcome and reason. Rows outside a limit are not read:
        not_chosen.npy of each source store lists them.
        """
        for store in self.stores:
            yield from store.incomplete_rows()
        for number, place, reason in self._load("dropped").tolist():
            store, why = self.stores[number], DROPPED[reason]
            file, line = store.where(place).rsplit(":", 1)
            tokens = int(store.samples[place]["length"])
            yield {"file": file, "line": int(line), "outcome": why, "reason": why, "tokens": tokens, "samples": 0,
                   "detail": "", "notes": []}  # fmt: skip

    def totals(self) -> dict[str, int]:
        """Return the counts of rows by outcome and of samples, which were checked to add up when the set was made:

        rows = not_chosen + excluded: each reason + whole + partly + truncated + split
        samples_made (of the last four) = duplicate + not drawn + held out + not held out + trained
        samples (of an epoch) = trained + copies
        """
        return dict(self.meta["totals"])

    def _load(self, name: str) -> NDArray[Any]:
        return np.load(self.folder / f"{name}.npy", mmap_mode="r", allow_pickle=False).view(np.ndarray)


def check_fits(store: TokenStore, max_tokens: int, limit: str = "the largest level, levels.max_tokens") -> None:
    """Raise ValueError if a sample is longer than `max_tokens`, which the message calls `limit`."""
    # Reported with its row: the plan would fail later, with a sample number only.
    longest = int(store.lengths.argmax())
    if store.lengths[longest] <= max_tokens:
        return
    count = int((store.lengths > max_tokens).sum())
    raise ValueError(
        f"{store.where(longest)}: a sample of {store.lengths[longest]} tokens is longer than {limit} = {max_tokens} "
        f"({count} of {len(store)} samples are); raise it, or set data.max_length_policy to skip, truncate or split"
    )


def check_malformed(store: TokenStore, max_errors: int) -> None:
    """Raise UserError with the first `max_errors` malformed rows, if there are any (data.malformed = "error")."""
    count = store.totals().get(f"excluded: {MALFORMED}", 0)
    if count:
        rows = [row for row in store.incomplete_rows() if row["reason"] == MALFORMED][:max_errors]
        errors = [f"{row['file']}:{row['line']}: {row['detail']}" for row in rows]
        raise malformed_rows(errors, count, store.totals()["rows"])


def malformed_rows(errors: list[str], count: int, total: int) -> UserError:
    """Return the error of `count` malformed rows of `total`, the first of which are `errors`."""
    if count == total > 1:
        # Skipping would leave nothing.
        return UserError([*errors, f"all {count} rows fail: change the format, columns or chat template, not the rows"])
    hint = 'or set data.malformed = "skip" to skip and list'
    if count == 1:
        return UserError([f"{errors[0]}; fix the row, {hint} it"])
    more = f"{count - len(errors)} more malformed rows are not shown; " if count > len(errors) else ""
    return UserError([*errors, f"{more}fix the rows, {hint} them"])


def check_strict(store: TokenStore, max_errors: int) -> None:
    """Raise UserError with the first `max_errors` rows that are dropped or cut, if there are any (data.strict)."""
    lines: list[str] = []
    count = 0
    for row in store.incomplete_rows():
        # "": trained whole, listed for its notes. The others the user has chosen.
        if row["reason"] in ("", NOT_DRAWN, HELD_OUT, NOT_HELD_OUT):
            continue
        count += 1
        if len(lines) < max_errors:
            why = f"{row['outcome']}: {row['reason']}" if row["outcome"] != row["reason"] else row["reason"]
            lines.append(f"{row['file']}:{row['line']}: {why}{': ' if row['detail'] else ''}{row['detail']}")
    if count:
        raise UserError(
            [*lines, f"data.strict: {count} rows were dropped or truncated; fix them or set data.strict = false"]
        )
