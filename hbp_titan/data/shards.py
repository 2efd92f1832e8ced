"""The shards of a source's store: pieces of its rows, each tokenized by one process into a folder of its own.

Owns the cut of rows into shards (the same for any number of processes and ranks), the format of a shard's folder, and
the work: a shard is written beside its place and renamed when it is whole, so that after a kill the shards that are
there need not be made again. S samples of T tokens:

    tokens.bin      uint32 [T]   token ids, sample after sample
    loss_mask.bin   uint8  [T]   1 where the token is trained
    samples.npy     SAMPLE [S]   length, trained positions, file, line, part, source, digest of each sample
    ledger.jsonl    one object for each row that is not trained whole
    shard.json      rows, names of sources, and the first malformed rows

One row -> its samples, or the reason why it has none.

Owns what becomes of a row: trained whole, truncated, split, or excluded for a reason that the ledger keeps.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
import os
import secrets
import shutil
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hbp_titan.data.chat_tokenizer import ChatTokenizer
from hbp_titan.data.formats import Conversation, parse_record
from hbp_titan.data.rows import RowIndex, read_records
from hbp_titan.data.truncate import Sample, split_conversation, truncate

WHOLE, TRUNCATED, SPLIT, EXCLUDED = "whole", "truncated", "split", "excluded"
MALFORMED = "malformed"
EMPTY = "empty"
NO_ASSISTANT_TURN = "no assistant turn"
NO_TRAINED_TOKEN = "no trained token"
OVER_MAX_TOKENS = "over max_tokens"


@dataclass(frozen=True)
class TokenizeConfig:
    """Everything that the samples of a source depend on beside its rows (job_config.Data and DataSource).

    name: of the source; "" takes each row's own, else its file's. max_tokens: of a sample; 0 keeps any length.
    max_length_policy: truncate, split or skip; not asked with max_tokens = 0.
    """

    tokenizer_path: Path
    train_on: str = "assistant"
    max_tokens: int = 0
    max_length_policy: str = "skip"
    format: str = "messages"
    columns: dict[str, str] = field(default_factory=dict)
    roles: dict[str, str] = field(default_factory=dict)
    name: str = ""
    max_row_bytes: int = 1 << 25


@dataclass(frozen=True)
class TokenizedRow:
    """outcome: whole, truncated, split or excluded. tokens: before any cut; 0 where the row was not tokenized.

    detail: what is wrong with a malformed row; what of a split one is left out.
    """

    outcome: str
    samples: list[Sample]
    source: str | None = None
    tokens: int = 0
    reason: str = ""
    detail: str = ""


class RowTokenizer:
    """Tokenizes rows by a recipe; never raises for a row. ValueError for a tokenizer folder that cannot be used."""

    def __init__(self, recipe: TokenizeConfig) -> None:
        self.recipe = recipe
        self._chat_tokenizer = ChatTokenizer(recipe.tokenizer_path, recipe.train_on)

    def tokenize(self, record: dict[str, Any] | ValueError) -> TokenizedRow:
        """The samples of a record; of an unreadable one (an error) the outcome malformed."""
        recipe = self.recipe
        try:
            if isinstance(record, ValueError):
                raise record
            conversation = parse_record(record, recipe.format, recipe.columns, recipe.roles)
            reason = _nothing_to_train(conversation, recipe.train_on)
            return _excluded(reason) if reason else self._encode(conversation)
        except RecursionError:
            return _excluded(MALFORMED, detail="nested too deeply")
        except ValueError as error:
            return _excluded(MALFORMED, detail=" ".join(str(error).split()))

    def _encode(self, conversation: Conversation) -> TokenizedRow:
        recipe, encode = self.recipe, self._chat_tokenizer.encode
        tokens, loss_mask = encode(conversation.messages, conversation.tools)
        length, outcome, reason, detail = len(tokens), WHOLE, "", ""
        samples = [(tokens, loss_mask)]
        if recipe.max_tokens and length > recipe.max_tokens:
            reason = OVER_MAX_TOKENS
            if recipe.max_length_policy == "skip":
                return _excluded(reason, length)
            if recipe.max_length_policy == "truncate":
                outcome, samples = TRUNCATED, [truncate(tokens, loss_mask, recipe.max_tokens)]
            else:
                outcome = SPLIT
                samples, left_out, left_out_tokens = split_conversation(conversation, encode, recipe.max_tokens)
                if not samples:
                    return _excluded(reason, length, "no exchange fits")
                detail = f"{left_out} exchanges of {left_out_tokens} tokens fit nowhere" if left_out else ""
        # The first token of a sample is predicted by nothing.
        trained = [sample for sample in samples if sample[1][1:].any()]
        if not trained:
            return _excluded(NO_TRAINED_TOKEN, length)
        return TokenizedRow(outcome, trained, conversation.source, length, reason, detail)


def _nothing_to_train(conversation: Conversation, train_on: str) -> str:
    messages = conversation.messages
    if not any(message.get("content") or message.get("tool_calls") for message in messages):
        return EMPTY
    if train_on != "all" and not any(message["role"] == "assistant" for message in messages):
        return NO_ASSISTANT_TURN
    return ""


def _excluded(reason: str, tokens: int = 0, detail: str = "") -> TokenizedRow:
    return TokenizedRow(EXCLUDED, [], tokens=tokens, reason=reason, detail=detail)


SAMPLE = np.dtype(
    [
        ("length", "<i8"),
        ("loss_tokens", "<i8"),  # trained positions after the shift: loss_mask[1:].sum()
        ("line", "<i8"),
        ("file", "<u4"),  # index into the source's files
        ("part", "<u4"),  # of a split row
        ("source", "<u4"),  # index into the shard's source names
        ("digest", "V16"),  # of ids and mask
    ]
)

# Small enough for even work and for little to do again after a kill.
SHARD_BYTES = 1 << 20
# Many files would slow down a shared file system and the opening of a store.
MOST_SHARDS = 1024
# A process takes about a second to start: it must have more than that to do.
BYTES_PER_PROCESS = 2 << 20


@dataclass(frozen=True)
class Shard:
    """Rows of one file. file_number: of the source's files."""

    number: int
    file_number: int
    rows: RowIndex

    @property
    def name(self) -> str:
        """Its folder's name."""
        return f"shard-{self.number:05d}"


class ShardReport(NamedTuple):
    """malformed: of the shard's rows; faults: the first of them as "file:line: what is wrong"."""

    rows: int
    source_names: list[str]
    malformed: int
    faults: list[str]


def cut_shards(indexes: Sequence[RowIndex]) -> list[Shard]:
    """The rows of a source's files as shards of about equal bytes, in their order."""
    total = sum(int(index.sizes.sum()) for index in indexes)
    shard_bytes = max(SHARD_BYTES, -(-total // MOST_SHARDS))
    shards: list[Shard] = []
    for file_number, index in enumerate(indexes):
        shard_of_row = (np.cumsum(index.sizes) - 1) // shard_bytes
        borders = [0, *(np.flatnonzero(np.diff(shard_of_row)) + 1).tolist(), len(index)]
        for start, stop in itertools.pairwise(borders):
            if start < stop:
                shards.append(Shard(len(shards), file_number, index.take(slice(start, stop))))
    return shards


def write_shards(
    folder: Path, shards: Sequence[Shard], recipe: TokenizeConfig, num_proc: int, max_errors: int
) -> Iterator[ShardReport]:
    """Make those of `shards` that `folder` does not have; yields the report of each, in their order."""
    missing = [shard for shard in shards if not (folder / shard.name).is_dir()]
    total = sum(int(shard.rows.sizes.sum()) for shard in missing)
    processes = min(num_proc, len(missing), -(-total // BYTES_PER_PROCESS))
    to_make = {shard.number for shard in missing}
    with ExitStack() as stack:
        if processes > 1:
            # Not forked: the caller may hold threads and device contexts.
            context = multiprocessing.get_context("spawn")
            pool = ProcessPoolExecutor(processes, context, _start_worker, (recipe,))
            stack.callback(pool.shutdown, cancel_futures=True)
            made = _in_order(pool, folder, missing, 2 * processes, max_errors)
        else:
            tokenizer = RowTokenizer(recipe) if missing else None
            made = (_write_shard(folder, shard, tokenizer, max_errors) for shard in missing if tokenizer)
        for shard in shards:
            yield next(made) if shard.number in to_make else read_report(folder / shard.name)


def read_report(folder: Path) -> ShardReport:
    """The report of a shard that is there."""
    return ShardReport(**json.loads((folder / "shard.json").read_text(encoding="utf-8")))


_tokenizer: RowTokenizer | None = None


def _start_worker(recipe: TokenizeConfig) -> None:
    global _tokenizer
    # One process a core: threads inside them would be in each other's way.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _tokenizer = RowTokenizer(recipe)


def _write_in_worker(folder: Path, shard: Shard, max_errors: int) -> ShardReport:
    assert _tokenizer is not None
    return _write_shard(folder, shard, _tokenizer, max_errors)


def _in_order(
    pool: ProcessPoolExecutor, folder: Path, shards: Sequence[Shard], ahead: int, max_errors: int
) -> Iterator[ShardReport]:
    """The reports of `shards` in their order, `ahead` of them at work at a time."""
    waiting: deque[Future[ShardReport]] = deque()
    left = iter(shards)
    try:
        while True:
            while len(waiting) < ahead and (shard := next(left, None)) is not None:
                waiting.append(pool.submit(_write_in_worker, folder, shard, max_errors))
            if not waiting:
                return
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise ValueError("a tokenization process died (out of memory?): lower data.num_proc") from None


def _write_shard(folder: Path, shard: Shard, tokenizer: RowTokenizer, max_errors: int) -> ShardReport:
    temporary = folder / f".{shard.name}-{secrets.token_hex(4)}"
    temporary.mkdir()
    try:
        report = _ShardWriter(temporary, shard, tokenizer, max_errors).write()
        try:
            temporary.rename(folder / shard.name)
        except OSError:
            # Another process made the same shard meanwhile.
            if not (folder / shard.name).is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return report


class _ShardWriter:
    """Writes one shard's files; only one row's tokens are held at a time."""

    def __init__(self, folder: Path, shard: Shard, tokenizer: RowTokenizer, max_errors: int) -> None:
        self.folder, self.shard, self.tokenizer, self.max_errors = folder, shard, tokenizer, max_errors
        self.samples: list[tuple[Any, ...]] = []
        self.source_ids: dict[str, int] = {}
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []

    def write(self) -> ShardReport:
        recipe, rows = self.tokenizer.recipe, self.shard.rows
        with ExitStack() as stack:
            self.tokens_file = stack.enter_context((self.folder / "tokens.bin").open("wb"))
            self.mask_file = stack.enter_context((self.folder / "loss_mask.bin").open("wb"))
            self.ledger_file = stack.enter_context((self.folder / "ledger.jsonl").open("w", encoding="utf-8"))
            for line, record in read_records(rows, recipe.max_row_bytes):
                self._add(line, self.tokenizer.tokenize(record))
        np.save(self.folder / "samples.npy", np.array(self.samples, dtype=SAMPLE))
        report = ShardReport(len(rows), list(self.source_ids), self.counts[MALFORMED], self.faults)
        (self.folder / "shard.json").write_text(json.dumps(report._asdict()), encoding="utf-8")
        return report

    def _add(self, line: int, row: TokenizedRow) -> None:
        file = self.shard.rows.file
        if row.outcome != WHOLE:
            entry = {"file": str(file), "line": line, "outcome": row.outcome, "reason": row.reason}
            entry |= {"tokens": row.tokens, "samples": len(row.samples), "detail": row.detail}
            self.ledger_file.write(json.dumps(entry) + "\n")
        if row.outcome == EXCLUDED:
            self.counts[row.reason] += 1
            if row.reason == MALFORMED and len(self.faults) < self.max_errors:
                self.faults.append(f"{file}:{line}: {row.detail}")
            return
        name = self.tokenizer.recipe.name or row.source or source_name(file)
        source = self.source_ids.setdefault(name, len(self.source_ids))
        for part, (tokens, loss_mask) in enumerate(row.samples):
            token_bytes, mask_bytes = tokens.astype("<u4", copy=False).tobytes(), loss_mask.tobytes()
            self.tokens_file.write(token_bytes)
            self.mask_file.write(mask_bytes)
            digest = hashlib.blake2b(token_bytes + mask_bytes, digest_size=16).digest()
            trained = int(loss_mask[1:].sum())
            self.samples.append((len(tokens), trained, line, self.shard.file_number, part, source, digest))


def source_name(file: Path) -> str:
    """The name of a source that has no other: its file's, without the suffixes of compression and format."""
    name = file.name
    for suffix in (".gz", ".zst", ".jsonl", ".json", ".parquet", ".arrow"):
        name = name.removesuffix(suffix)
    return name or file.name
