"""Rows -> tokens, in this process or in several, in the order of the rows.

Owns the work of one process (a chunk of rows of one file) and the spreading of chunks over processes. The chunks do
not depend on the number of processes, and come back in order: neither does what is written.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hbp_titan.data.chat_template import ChatTokenizer
from hbp_titan.data.sources import Row, RowIndex, read_rows

# Bytes of one chunk: small enough for a progress bar that moves and for even work at the end.
CHUNK_BYTES = 256 * 1024
# A process takes about a second to start: it must have more than that to do.
BYTES_PER_PROCESS = 2 * 1024 * 1024

NO_ASSISTANT_TURN = "no assistant turn"
NO_TRAINED_TOKEN = "no trained token"
OVER_MAX_TOKENS = "over max_tokens"
TRUNCATED = "truncated at max_tokens"


@dataclass(frozen=True)
class Excluded:
    """A row that is not, or not whole, in the store. tokens: its length, 0 where it was not tokenized."""

    line: int
    reason: str
    tokens: int


@dataclass(frozen=True)
class TokenizedChunk:
    """S samples of T tokens in all, in the order of their rows.

    tokens: uint32 [T]; loss_mask: bool [T]; lengths, loss_tokens, lines: int64 [S]; sources: S names.
    """

    file: Path
    tokens: NDArray[np.uint32]
    loss_mask: NDArray[np.bool_]
    lengths: NDArray[np.int64]
    loss_tokens: NDArray[np.int64]
    lines: NDArray[np.int64]
    sources: list[str]
    excluded: list[Excluded]
    truncated: list[Excluded]


def tokenize(
    indexes: Sequence[RowIndex], tokenizer_path: Path, num_proc: int, max_tokens: int, truncate: bool
) -> Iterator[TokenizedChunk]:
    """The rows of `indexes`, tokenized in chunks; samples of more than `max_tokens` tokens (0: no limit) left out,
    or cut there with `truncate`.

    num_proc: processes; 0 means one per core. Fewer are started where the data is small.
    Raises ValueError "file:line: ..." for the first row that is malformed or that the template refuses.
    """
    chunks = [chunk for index in indexes for chunk in _chunks(index)]
    total_bytes = sum(int(index.sizes.sum()) for index in indexes)
    processes = min(num_proc or _cores(), len(chunks), -(-total_bytes // BYTES_PER_PROCESS))
    if processes <= 1:
        worker = _Worker(tokenizer_path, max_tokens, truncate)
        yield from map(worker.tokenize_chunk, chunks)
        return
    # Not forked: the caller may hold threads and device contexts.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _start_worker, (tokenizer_path, max_tokens, truncate)) as pool:
        try:
            yield from pool.map(_tokenize_chunk, chunks)
        except BrokenProcessPool:
            raise ValueError("a tokenization process died (out of memory?): lower data.num_proc") from None


class _Worker:
    def __init__(self, tokenizer_path: Path, max_tokens: int, truncate: bool) -> None:
        self.chat_tokenizer = ChatTokenizer(tokenizer_path)
        self.max_tokens = max_tokens
        self.truncate = truncate

    def tokenize_chunk(self, index: RowIndex) -> TokenizedChunk:
        samples, rows, excluded, truncated = [], [], [], []
        for row in read_rows(index):
            tokens, loss_mask, reason = self._tokenize_row(row)
            if reason:
                excluded.append(Excluded(row.line, reason, len(tokens)))
                continue
            if self.max_tokens and len(tokens) > self.max_tokens:
                truncated.append(Excluded(row.line, TRUNCATED, len(tokens)))
                tokens, loss_mask = tokens[: self.max_tokens], loss_mask[: self.max_tokens]
            samples.append((tokens, loss_mask))
            rows.append(row)
        # The empty arrays give a chunk without samples its dtypes.
        return TokenizedChunk(
            file=index.file,
            tokens=np.concatenate([np.zeros(0, np.uint32), *(tokens for tokens, _ in samples)]),
            loss_mask=np.concatenate([np.zeros(0, np.bool_), *(loss_mask for _, loss_mask in samples)]),
            lengths=np.array([len(tokens) for tokens, _ in samples], dtype=np.int64),
            # The first token of a sample is predicted by nothing.
            loss_tokens=np.array([loss_mask[1:].sum() for _, loss_mask in samples], dtype=np.int64),
            lines=np.array([row.line for row in rows], dtype=np.int64),
            sources=[row.source for row in rows],
            excluded=excluded,
            truncated=truncated,
        )

    def _tokenize_row(self, row: Row) -> tuple[NDArray[np.uint32], NDArray[np.bool_], str]:
        """Tokens, loss mask and the reason to leave the row out, "" to keep it."""
        if not any(message["role"] == "assistant" for message in row.messages):
            return np.zeros(0, np.uint32), np.zeros(0, np.bool_), NO_ASSISTANT_TURN
        try:
            tokens, loss_mask = self.chat_tokenizer.encode(row.messages)
        except ValueError as error:
            raise ValueError(f"{row.file}:{row.line}: {error}") from None
        except RecursionError:
            raise ValueError(f"{row.file}:{row.line}: nested too deeply") from None
        if self.max_tokens and len(tokens) > self.max_tokens and not self.truncate:
            return tokens, loss_mask, OVER_MAX_TOKENS
        kept = loss_mask[1 : self.max_tokens or None]
        return tokens, loss_mask, "" if kept.any() else NO_TRAINED_TOKEN


_worker: _Worker | None = None


def _start_worker(tokenizer_path: Path, max_tokens: int, truncate: bool) -> None:
    global _worker
    _worker = _Worker(tokenizer_path, max_tokens, truncate)


def _tokenize_chunk(index: RowIndex) -> TokenizedChunk:
    assert _worker is not None
    return _worker.tokenize_chunk(index)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _chunks(index: RowIndex) -> Iterator[RowIndex]:
    """The rows of one file in chunks of about CHUNK_BYTES."""
    chunk_of_row = np.cumsum(index.sizes) // CHUNK_BYTES
    borders = np.flatnonzero(np.diff(chunk_of_row)) + 1
    for start, stop in zip([0, *borders], [*borders, len(index)], strict=True):
        if start < stop:
            yield index.take(slice(int(start), int(stop)))
