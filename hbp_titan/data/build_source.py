"""Build the store of one source: its rows, cut into shards, each tokenized by one process into a folder of its own.

Owns the outcome of a row (trained whole, truncated, split, or excluded for a reason), the cut of rows into shards,
which is the same for any number of processes and ranks, and the shard format. A shard is written under a temporary
name and renamed when complete, so that a killed build resumes with the shards that exist. S samples of T tokens:

    tokens.bin, loss_mask.bin   uint32, uint8 [T]   token ids; 1 where the token is trained
    samples.npy                 SAMPLE [S]          length, trained positions, origin and digest of each sample
    incomplete_rows.jsonl       one object per row that is not trained whole
    shard.json                  ShardReport
"""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
import os
import re
import secrets
import shutil
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hbp_titan.data.disk import commit_dir, ignore_if_exists, naming_full_disk
from hbp_titan.data.files import SUFFIXES
from hbp_titan.data.formats import filled_names, mapped_columns, read_columns
from hbp_titan.data.rows import RowIndex, read_records
from hbp_titan.data.token_store import (
    FORMAT_VERSION,
    INCOMPLETE_ROWS,
    MALFORMED,
    PLACED,
    SAMPLE,
    TokenizeConfig,
    malformed_rows,
)
from hbp_titan.data.tokenize_row import EXCLUDED, PARTLY, SPLIT, TRUNCATED, WHOLE, RowTokenizer, TokenizedRow
from hbp_titan.errors import WorkerGroup, cores_per_rank
from hbp_titan.job_config import Data

# Small enough to balance the processes and to lose little work in a kill.
SHARD_BYTES = 1 << 20
# Many files would slow down a shared file system and the opening of a store.
MAX_SHARDS = 1024
# A process takes about a second to start: it needs enough work to be worth that.
BYTES_PER_PROCESS = 2 << 20
# Rows may use names of columns as data.
MAX_UNREAD_COLUMNS, OTHER_COLUMNS = 1000, "(others)"


def build_source_store(
    folder: Path,
    digest: str,
    indexes: Sequence[RowIndex],
    chosen: Sequence[RowIndex],
    settings: TokenizeConfig,
    data: Data,
    workers: WorkerGroup,
    progress: Callable[[int], None],
) -> None:
    """Build the store in `folder`; all ranks of `workers` must call it. Shards of an earlier, killed call are used.

    digest: fingerprint of the store. indexes: all rows of the source's files; chosen: those to tokenize.
    progress: called with the rows that this rank has finished.
    Raises UserError "file:line: ..." with the first malformed rows unless data.malformed is "skip".
    """
    partial = _partial(folder)
    partial.mkdir(parents=True, exist_ok=True)
    shards = cut_shards(chosen)

    def write_own() -> None:
        own = [shards[number] for number in workers.share(len(shards))]
        num_proc = data.num_proc or cores_per_rank()
        with (
            naming_full_disk(folder.parent),
            ignore_if_exists(folder),
            closing(write_shards(partial, own, settings, num_proc, data.max_errors_shown)) as reports,
        ):
            for shard in own:
                # A row may take minutes: the other ranks wait for this one then.
                workers.report(f"tokenizing {shard.rows.file}")
                report = next(reports)
                if report.malformed and data.malformed != "skip":
                    errors = [f"{shard.rows.file}:{error}" for error in report.errors]
                    raise malformed_rows(errors, report.malformed, report.rows)
                progress(report.rows)

    workers.run_on_all(write_own)
    workers.report(f"writing the index of {folder}")

    def finish() -> None:
        with naming_full_disk(folder.parent), ignore_if_exists(folder):
            _write_index(partial, digest, indexes, chosen, shards)
            commit_dir(partial, folder)
        shutil.rmtree(partial, ignore_errors=True)

    workers.run_on_all(finish if workers.rank == 0 else lambda: None)


def missing_rows(folder: Path, chosen: Sequence[RowIndex]) -> list[RowIndex]:
    """Return the rows that building the store in `folder` would tokenize: those of shards that do not exist yet."""
    if folder.is_dir():
        return []
    return [shard.rows for shard in cut_shards(chosen) if not (_partial(folder) / shard.name).is_dir()]


def _partial(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.partial")


def _write_index(
    folder: Path, digest: str, indexes: Sequence[RowIndex], chosen: Sequence[RowIndex], shards: Sequence[Shard]
) -> None:
    """Write the files that span all shards; meta.json last."""
    reports = [read_report(folder / shard.name) for shard in shards]
    samples: list[NDArray[Any]] = [np.load(folder / shard.name / "samples.npy", allow_pickle=False) for shard in shards]
    names: dict[str, int] = {}
    placed = [
        _place(part, shard.number, report, names) for part, shard, report in zip(samples, shards, reports, strict=True)
    ]
    all_placed = np.concatenate(placed or [np.zeros(0, PLACED)])
    np.save(folder / "samples.npy", all_placed)
    np.save(folder / "not_chosen.npy", _not_chosen(indexes, chosen))
    unread: Counter[str] = Counter()
    absent = set.intersection(*(set(report.absent_columns) for report in reports)) if reports else set()
    for report in reports:
        unread.update(report.unread_columns)
    outcomes: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    notes: Counter[str] = Counter()
    turn_ends: Counter[str] = Counter()
    for report in reports:
        turn_ends.update(report.turn_ends)
    with (folder / INCOMPLETE_ROWS).open("w", encoding="utf-8") as stream:
        for shard in shards:
            for line in (folder / shard.name / INCOMPLETE_ROWS).open(encoding="utf-8"):
                entry = json.loads(line)
                notes.update(entry["notes"])
                if entry["outcome"] != WHOLE:
                    outcomes[entry["outcome"]] += 1
                if entry["outcome"] == EXCLUDED:
                    reasons[entry["reason"]] += 1
                # A shard of an earlier, killed call may have another path of the same data.
                stream.write(json.dumps({**entry, "file": str(shard.rows.file)}) + "\n")
    rows, tokenized = sum(map(len, indexes)), sum(map(len, chosen))
    whole = tokenized - outcomes.total()
    meta = {
        "format_version": FORMAT_VERSION,
        "fingerprint": digest,
        "files": [str(index.file) for index in indexes],
        "empty_files": [str(index.file) for index in indexes if not len(index)],
        "absent_columns": sorted(absent),
        "unread_columns": dict(sorted(unread.items(), key=lambda item: (-item[1], item[0]))),
        "source_names": list(names),
        "rows": rows,
        "not_chosen": rows - tokenized,
        "excluded": dict(sorted(reasons.items())),
        "partly": outcomes[PARTLY],
        "truncated": outcomes[TRUNCATED],
        "split": outcomes[SPLIT],
        "whole": whole,
        "samples": len(all_placed),
        "notes": dict(sorted(notes.items())),
        "turn_ends": dict(sorted(turn_ends.items())),
        "shard_tokens": [int(part["length"].sum()) for part in samples],
    }
    used = whole + sum(outcomes[outcome] for outcome in (PARTLY, TRUNCATED, SPLIT))
    assert used == int((all_placed["part"] == 0).sum()), "a row was lost"
    # Last: a folder without it is not a store.
    (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")


def _place(samples: NDArray[Any], shard: int, report: ShardReport, names: dict[str, int]) -> NDArray[Any]:
    """Return a shard's samples as PLACED; adds its source names to `names`."""
    placed = np.zeros(len(samples), PLACED)
    for column in SAMPLE.names or ():
        placed[column] = samples[column]
    ids = np.array([names.setdefault(name, len(names)) for name in report.source_names], dtype=np.uint32)
    # A shard without samples has no names to index.
    placed["source"] = ids[samples["source"]] if len(samples) else 0
    placed["shard"] = shard
    placed["start"] = np.cumsum(samples["length"]) - samples["length"]
    return placed


def _not_chosen(indexes: Sequence[RowIndex], chosen: Sequence[RowIndex]) -> NDArray[np.int64]:
    parts = []
    for number, (every, some) in enumerate(zip(indexes, chosen, strict=True)):
        lines = np.setdiff1d(every.lines, some.lines, assume_unique=True)
        parts.append(np.stack([np.full(len(lines), number, dtype=np.int64), lines.astype(np.int64)], axis=1))
    return np.concatenate(parts)


@dataclass(frozen=True)
class Shard:
    """Rows of one file; file_number: index of the file among the source's files."""

    number: int
    file_number: int
    rows: RowIndex

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"shard-{self.number:05d}"


class ShardReport(NamedTuple):
    """malformed: number of malformed rows; errors: the first of them as "line: what is wrong".

    unread_columns: the columns that the format does not read, with the number of rows that have a value there.
    absent_columns: the columns and keys of messages that `columns` maps and no row has.
    turn_ends: token id (as text, for JSON) -> trained turns that end with it; -1: without a control token.
    """

    rows: int
    source_names: list[str]
    malformed: int
    errors: list[str]
    unread_columns: dict[str, int]
    absent_columns: list[str]
    turn_ends: dict[str, int]


def cut_shards(indexes: Sequence[RowIndex]) -> list[Shard]:
    """Return the rows of a source's files as shards of about equal bytes, in their order."""
    total = sum(int(index.sizes.sum()) for index in indexes)
    # Large sources get larger shards instead of more files.
    shard_bytes = max(SHARD_BYTES, -(-total // MAX_SHARDS))
    shards: list[Shard] = []
    for file_number, index in enumerate(indexes):
        # By the bytes up to the end of each row, so that the cut does not depend on processes or ranks.
        shard_of_row = (np.cumsum(index.sizes) - 1) // shard_bytes
        boundaries = [0, *(np.flatnonzero(np.diff(shard_of_row)) + 1).tolist(), len(index)]
        for start, stop in itertools.pairwise(boundaries):
            if start < stop:
                shards.append(Shard(len(shards), file_number, index.select(slice(start, stop))))
    return shards


def write_shards(
    folder: Path, shards: Sequence[Shard], settings: TokenizeConfig, num_proc: int, max_errors: int
) -> Generator[ShardReport, None, None]:
    """Write the shards that `folder` lacks; yields the report of every shard, in order."""
    missing = [shard for shard in shards if not (folder / shard.name).is_dir()]
    total = sum(int(shard.rows.sizes.sum()) for shard in missing)
    processes = min(num_proc, len(missing), -(-total // BYTES_PER_PROCESS))
    to_write = {shard.number for shard in missing}
    with ExitStack() as stack:
        if processes > 1:
            # Spawned, not forked: the caller may hold threads and device contexts.
            context = multiprocessing.get_context("spawn")
            pool = ProcessPoolExecutor(processes, context, _start_worker, (settings,))
            stack.callback(pool.shutdown, cancel_futures=True)
            written = _in_order(pool, folder, missing, 2 * processes, max_errors)
        else:
            tokenizer = RowTokenizer(settings) if missing else None
            written = (_write_shard(folder, shard, tokenizer, max_errors) for shard in missing if tokenizer)
        for shard in shards:
            yield next(written) if shard.number in to_write else read_report(folder / shard.name)


def read_report(folder: Path) -> ShardReport:
    """Read the report of a finished shard."""
    return ShardReport(**json.loads((folder / "shard.json").read_text(encoding="utf-8")))


_tokenizer: RowTokenizer | None = None


def _start_worker(settings: TokenizeConfig) -> None:
    global _tokenizer
    # One process per core: more threads inside each would compete for the cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _tokenizer = RowTokenizer(settings)


def _write_in_worker(folder: Path, shard: Shard, max_errors: int) -> ShardReport:
    assert _tokenizer is not None
    return _write_shard(folder, shard, _tokenizer, max_errors)


def _in_order(
    pool: ProcessPoolExecutor, folder: Path, shards: Sequence[Shard], ahead: int, max_errors: int
) -> Iterator[ShardReport]:
    """Yield the reports of `shards` in order, with `ahead` shards submitted at a time."""
    pending: deque[Future[ShardReport]] = deque()
    left = iter(shards)
    try:
        while True:
            while len(pending) < ahead and (shard := next(left, None)) is not None:
                pending.append(pool.submit(_write_in_worker, folder, shard, max_errors))
            if not pending:
                return
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise ValueError("data.num_proc: a tokenization process died (out of memory?); lower it") from None


def _write_shard(folder: Path, shard: Shard, tokenizer: RowTokenizer, max_errors: int) -> ShardReport:
    temporary = folder / f".{shard.name}-{secrets.token_hex(4)}"
    temporary.mkdir()
    try:
        report = _ShardWriter(temporary, shard, tokenizer, max_errors).write()
        commit_dir(temporary, folder / shard.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return report


class _ShardWriter:
    """Writes one shard's files; holds the tokens of one row at a time."""

    def __init__(self, folder: Path, shard: Shard, tokenizer: RowTokenizer, max_errors: int) -> None:
        self.folder, self.shard, self.tokenizer, self.max_errors = folder, shard, tokenizer, max_errors
        self.samples: list[tuple[Any, ...]] = []
        self.source_ids: dict[str, int] = {}
        self.malformed = 0
        self.errors: list[str] = []
        settings = tokenizer.settings
        self.read_columns = read_columns(settings.format, settings.columns)
        self.unread_columns: Counter[str] = Counter()
        self.absent_columns = mapped_columns(settings.format, settings.columns)
        self.turn_ends: Counter[str] = Counter()

    def write(self) -> ShardReport:
        rows = self.shard.rows
        with ExitStack() as stack:
            self.tokens_file = stack.enter_context((self.folder / "tokens.bin").open("wb"))
            self.mask_file = stack.enter_context((self.folder / "loss_mask.bin").open("wb"))
            self.incomplete = stack.enter_context((self.folder / INCOMPLETE_ROWS).open("w", encoding="utf-8"))
            for line, record in read_records(rows, self.tokenizer.settings.max_row_bytes):
                if not isinstance(record, ValueError):
                    self._count_columns(record)
                self._add(line, self.tokenizer.tokenize(record))
        np.save(self.folder / "samples.npy", np.array(self.samples, dtype=SAMPLE))
        report = ShardReport(
            len(rows),
            list(self.source_ids),
            self.malformed,
            self.errors,
            dict(self.unread_columns),
            sorted(self.absent_columns),
            dict(self.turn_ends),
        )
        (self.folder / "shard.json").write_text(json.dumps(report._asdict()), encoding="utf-8")
        return report

    def _count_columns(self, record: dict[str, Any]) -> None:
        if self.absent_columns:
            settings = self.tokenizer.settings
            self.absent_columns -= filled_names(record, settings.format, settings.columns)
        for name in record.keys() - self.read_columns:
            # Arrow gives every row all columns.
            if record[name] is not None:
                known = name in self.unread_columns or len(self.unread_columns) < MAX_UNREAD_COLUMNS
                self.unread_columns[name if known else OTHER_COLUMNS] += 1

    def _add(self, line: int, row: TokenizedRow) -> None:
        file = self.shard.rows.file
        self.turn_ends.update(map(str, row.ends))
        if row.outcome != WHOLE or row.notes:
            entry = {"file": str(file), "line": line, "outcome": row.outcome, "reason": row.reason}
            entry |= {"tokens": row.tokens, "samples": len(row.samples), "detail": row.detail}
            entry["notes"] = list(row.notes)
            self.incomplete.write(json.dumps(entry) + "\n")
        if row.reason == MALFORMED:
            self.malformed += 1
            if len(self.errors) < self.max_errors:
                self.errors.append(f"{line}: {row.detail}")
        if not row.samples:
            # No sample, no source: a set lists only the sources that it trains.
            return
        settings = self.tokenizer.settings
        name = settings.name or row.source or settings.folder or source_name(file)
        source = self.source_ids.setdefault(name, len(self.source_ids))
        for part, (tokens, loss_mask) in enumerate(row.samples):
            token_bytes, mask_bytes = tokens.astype("<u4", copy=False).tobytes(), loss_mask.tobytes()
            self.tokens_file.write(token_bytes)
            self.mask_file.write(mask_bytes)
            # Of the content only: equal samples are duplicates in any file and source.
            digest = hashlib.blake2b(token_bytes + mask_bytes, digest_size=16).digest()
            trained = int(loss_mask[1:].sum())
            self.samples.append((len(tokens), trained, line, self.shard.file_number, part, source, digest))


def source_name(file: Path) -> str:
    """Return the name of a source that has no other: its file's, without suffixes and the number of a shard."""
    suffix = max((suffix for suffix in SUFFIXES if file.name.lower().endswith(suffix)), key=len, default="")
    name = file.name[: len(file.name) - len(suffix)]
    return re.sub(r"-\d{5}-of-\d{5}$", "", name) or file.name
