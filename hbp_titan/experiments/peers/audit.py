"""What a peer trained, from the tokens that reached its model: samples, masks, documents, and its probe.

Owns the comparison with the samples that it was given, and the verdicts. Needs no torch.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hbp_titan.experiments.peers.runners.protocol import IGNORE_INDEX

PADDING = -1
LEAK = 1e-4
"""Change of another document's logits, over the change of the changed document's own, that counts as attention between
them. Without it the difference is exactly 0: the same kernels compute the same values."""


class Samples:
    """The samples that a peer was given: found by their tokens, or by their first tokens within a longer row."""

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        """rows: input_ids and labels of each sample. Raises ValueError for two samples of the same tokens."""
        self.tokens = [np.array(row["input_ids"], dtype=np.int32) for row in rows]
        self.trained = [np.array(row["labels"]) != IGNORE_INDEX for row in rows]
        for trained in self.trained:
            # Nothing predicts the first token.
            trained[0] = False
        self.by_checksum = {checksum(tokens): number for number, tokens in enumerate(self.tokens)}
        if len(self.by_checksum) != len(self.tokens):
            raise ValueError("two samples have the same tokens; use data without duplicates")
        self.head = min(16, *map(len, self.tokens))
        self.by_head: dict[bytes, list[int]] = {}
        for number in sorted(range(len(rows)), key=lambda n: -len(self.tokens[n])):
            self.by_head.setdefault(self.tokens[number][: self.head].tobytes(), []).append(number)

    def __len__(self) -> int:
        return len(self.tokens)

    def find(self, tokens: NDArray[np.int32]) -> int | None:
        """Return the sample of exactly these tokens."""
        return self.by_checksum.get(checksum(tokens))

    def starting_at(self, tokens: NDArray[np.int32], start: int) -> tuple[int, int] | None:
        """Return (sample, tokens) of the longest one that starts here: all of it, or what the row has of it."""
        for number in self.by_head.get(tokens[start : start + self.head].tobytes(), ()):
            length = min(len(self.tokens[number]), len(tokens) - start)
            if np.array_equal(self.tokens[number][:length], tokens[start : start + length]):
                return number, length
        return None


def checksum(tokens: NDArray[np.int32]) -> str:
    """Return the SHA-256 of token ids."""
    return hashlib.sha256(np.ascontiguousarray(tokens, dtype=np.int32).tobytes()).hexdigest()


@dataclass(frozen=True)
class Piece:
    """A part of a row: a sample, or tokens of none.

    sample: None for tokens that belong to no sample. whole: whether all of the sample is there.
    trained: bool [length], whether a token is a label that the loss counts. wrong_labels: labels that are not the
    row's own next token. first_trained: whether the first token is predicted from another document.
    """

    sample: int | None
    whole: bool
    tokens: NDArray[np.int32]
    trained: NDArray[np.bool_]
    wrong_labels: int
    first_trained: bool


@dataclass(frozen=True)
class Row:
    """One row of a micro-batch: its pieces, and its padding. rank: of a pack on several ranks, its number."""

    rank: int
    micro_batch: int
    pieces: tuple[Piece, ...]
    padding: int


class Recording:
    """The tokens of one run, from rank-N.npz of its folder."""

    def __init__(self, folder: Path, samples: Samples) -> None:
        """Raises ValueError if the folder has no recording."""
        self.samples = samples
        self.ranks = [dict(np.load(path, allow_pickle=False)) for path in sorted(folder.glob("rank-*.npz"))]
        if not self.ranks:
            raise ValueError(f"{folder}: no rank-N.npz; the run recorded nothing")
        self.labels_shifted = bool(self.ranks[0]["labels_shifted"])
        self.spans_ranks = bool(self.ranks[0]["spans_ranks"])
        self.rows = list(self._rows())

    def step_of(self, row: Row) -> int:
        """Return the optimizer step, from 0, of a row."""
        rank = self.ranks[0 if self.spans_ranks else row.rank]
        return int(np.searchsorted(rank["steps"], row.micro_batch, side="right"))

    def seconds(self) -> NDArray[np.float64]:
        """Return the seconds of each step, of the slowest rank."""
        return np.max([np.diff(rank["marks"]) for rank in self.ranks], axis=0)

    def cpu_seconds(self) -> NDArray[np.float64]:
        """Return the CPU seconds of each step, summed over the ranks: other programs do not change them much."""
        return np.sum([np.diff(rank["cpu_marks"]) for rank in self.ranks], axis=0)

    def _rows(self) -> Iterator[Row]:
        parts = []
        for number, rank in enumerate(self.ranks):
            owner = rank["row"] if self.spans_ranks else np.full_like(rank["row"], number)
            parts.append(np.stack([owner, *(rank[n] for n in ("micro_batch", "row", "document", "position"))]))
        keys = np.concatenate(parts, axis=1)
        tokens, labels = (np.concatenate([rank[name] for rank in self.ranks]) for name in ("token", "label"))
        if self.spans_ranks:
            # Shards of a pack: documents are sorted by their numbers, tokens by their positions.
            order = np.lexsort(keys[::-1])
            keys, tokens, labels = keys[:, order], tokens[order], labels[order]
        for part in _runs(keys[:3]):
            document = keys[3, part]
            pieces: list[Piece] = []
            for inner in _runs(document[None]):
                if document[inner.start] != PADDING:
                    pieces += self.split(tokens[part][inner], labels[part][inner], first=not pieces)
            padding = int((document == PADDING).sum())
            kept = tuple(piece for piece in pieces if not _is_padding(piece))
            padding += sum(len(piece.tokens) for piece in pieces if _is_padding(piece))
            yield Row(int(keys[0, part.start]), int(keys[1, part.start]), kept, padding)

    def split(self, tokens: NDArray[np.int32], labels: NDArray[np.int32], first: bool = True) -> list[Piece]:
        """Return the pieces of a document as the peer declared it: one, or several samples that it runs together.

        first: whether it is the first of its row, whose first token no loss counts.
        """
        trained = labels != IGNORE_INDEX
        if self.labels_shifted:
            # The token of a label is the next one; the last label of a document may be a token that is no input.
            if trained[-1]:
                tokens = np.append(tokens, labels[-1])
                trained = np.append(trained, False)
                labels = np.append(labels, IGNORE_INDEX)
            trained, own = np.append(False, trained[:-1]), np.append(tokens[0], labels[:-1])
        else:
            own = labels
        wrong = trained & (own != tokens)

        def piece(sample: int | None, start: int, end: int) -> Piece:
            counted = trained[start:end].copy()
            outside = bool(counted[0]) and not (first and start == 0)
            counted[0] = False
            whole = sample is not None and self._is_whole(sample, end - start)
            return Piece(sample, whole, tokens[start:end], counted, int(wrong[start:end].sum()), outside)

        if (sample := self.samples.find(tokens)) is not None:
            return [piece(sample, 0, len(tokens))]
        pieces, start, unknown = [], 0, 0
        while start < len(tokens):
            found = self.samples.starting_at(tokens, start)
            if found:
                if unknown < start:
                    pieces.append(piece(None, unknown, start))
                pieces.append(piece(found[0], start, start + found[1]))
                start = unknown = start + found[1]
            else:
                start += 1
        if unknown < len(tokens):
            pieces.append(piece(None, unknown, len(tokens)))
        return pieces

    def _is_whole(self, sample: int, length: int) -> bool:
        """Return whether so many tokens are all of a sample, or all that predict a trained one of it."""
        missing = len(self.samples.tokens[sample]) - length
        # The last token of a sample predicts nothing: a peer with shifted labels need not feed it.
        return missing == 0 or (self.labels_shifted and missing == 1 and not self.samples.trained[sample][-1])

    def leak(self) -> float | None:
        """Return the largest change of another document's logits over that of the changed document's own.

        The probe changed the first tokens of row 0. None if there is no probe, or it had one document only.
        """
        own = other = 0.0
        found = False
        for rank in (rank for rank in self.ranks if "probe_delta" in rank):
            number = -1
            for inner, sample in self._probed_documents(rank):
                number += 1
                largest = float(rank["probe_delta"][inner].max())
                # Shards of one pack name its documents; other peers' first document is the first one in the row.
                is_first = int(rank["probe_document"][inner.start]) == 0 if self.spans_ranks else number == 0
                if is_first:
                    own = max(own, largest)
                elif sample is not None:
                    other, found = max(other, largest), True
        return other / own if found and own else None

    def _probed_documents(self, rank: dict[str, NDArray[Any]]) -> Iterator[tuple[slice, int | None]]:
        """Yield the places and the sample of each document in the probed micro-batch of a rank."""
        keys = np.stack([rank["probe_row"], rank["probe_document"]])
        for inner in _runs(keys):
            if rank["probe_document"][inner.start] == PADDING:
                continue
            if self.spans_ranks:
                yield inner, int(rank["probe_document"][inner.start])
                continue
            # Labels play no role here, so none crosses the end of a document.
            tokens, start = rank["probe_token"][inner], inner.start
            for piece in self.split(tokens, np.full(len(tokens), IGNORE_INDEX, dtype=np.int32)):
                yield slice(start, start + len(piece.tokens)), piece.sample
                start += len(piece.tokens)


def _runs(keys: NDArray[Any]) -> Iterator[slice]:
    """Yield the slices in which the columns of `keys` are equal."""
    if keys.shape[1]:
        ends = np.flatnonzero((np.diff(keys, axis=1) != 0).any(axis=0)) + 1
        for start, end in zip([0, *ends.tolist()], [*ends.tolist(), keys.shape[1]], strict=True):
            yield slice(start, end)


def _is_padding(piece: Piece) -> bool:
    return piece.sample is None and not piece.trained.any() and len(np.unique(piece.tokens)) == 1


@dataclass
class Audit:
    """What one run trained.

    tokens, padding: that reached the model. trained: labels that the loss counts. missing, doubled: samples.
    doubled_tokens: of the repetitions. cut: samples of which a row has only a part. other_masks: samples whose trained
    tokens differ, by extra_labels that should not be trained (prompts) and lost_labels. across: first tokens of
    documents that are predicted from another one. wrong_labels: labels that are not the next token. unknown: tokens of
    no sample. leak: see Recording.leak.
    per_step: tokens of each optimizer step. seconds: of each step, slowest rank; cpu_seconds: sum over the ranks.
    """

    tokens: int = 0
    padding: int = 0
    trained: int = 0
    missing: int = 0
    doubled: int = 0
    doubled_tokens: int = 0
    cut: int = 0
    other_masks: int = 0
    extra_labels: int = 0
    lost_labels: int = 0
    across: int = 0
    wrong_labels: int = 0
    unknown: int = 0
    leak: float | None = None
    per_step: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)

    def differences(self, whole_epoch: bool) -> list[str]:
        """Return how the trained tokens differ from those given, in words; a repeated sample is a difference."""
        found = {
            "samples missing": self.missing if whole_epoch else 0,
            "samples cut": self.cut,
            "samples with other masks": self.other_masks,
            "labels too many (prompts)": self.extra_labels,
            "labels lost": self.lost_labels,
            "labels across documents": self.across,
            "labels that are not the next token": self.wrong_labels,
            "tokens of no sample": self.unknown,
            "samples doubled": self.doubled,
        }
        return [f"{count:,} {name}" for name, count in found.items() if count]

    def comparable(self, whole_epoch: bool, max_doubled: float) -> bool:
        """Return whether the run trained what it was given; max_doubled: share of tokens that may be repeated."""
        wrong = (self.cut, self.other_masks, self.across, self.wrong_labels, self.unknown)
        missing = self.missing if whole_epoch else 0
        return not any(wrong) and not missing and self.doubled_tokens <= max_doubled * max(self.tokens, 1)


def audit(recording: Recording) -> Audit:
    """Compare what reached the model with the samples it was given."""
    samples, found, seen = recording.samples, Audit(leak=recording.leak()), Counter[int]()
    found.seconds, found.cpu_seconds = recording.seconds().tolist(), recording.cpu_seconds().tolist()
    found.per_step = [0] * len(found.seconds)
    for row in recording.rows:
        found.padding += row.padding
        for piece in row.pieces:
            length = len(piece.tokens)
            found.tokens += length
            found.per_step[recording.step_of(row)] += length
            found.trained += int(piece.trained.sum())
            found.across += piece.first_trained
            found.wrong_labels += piece.wrong_labels
            if piece.sample is None:
                found.unknown += length
                continue
            if not piece.whole:
                found.cut += 1
            else:
                seen[piece.sample] += 1
                found.doubled_tokens += length if seen[piece.sample] > 1 else 0
            expected = samples.trained[piece.sample][:length]
            found.other_masks += not np.array_equal(expected, piece.trained)
            found.extra_labels += int((piece.trained & ~expected).sum())
            found.lost_labels += int((expected & ~piece.trained).sum())
    found.missing = len(samples) - len(seen)
    found.doubled = sum(count - 1 for count in seen.values())
    return found
