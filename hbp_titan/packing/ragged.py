"""Arrays of the planner: ragged rows in CSR form, stable integer sorts, reproducible shuffles.

Owns the Ragged type and every source of order and randomness in this package. A plan must be the same bytes on every
rank, machine and NumPy version, so shuffles use the raw stream of PCG64 (which NumPy guarantees, unlike the methods of
Generator) and stable sorts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
Stream = tuple[int, ...]  # non-negative integers that identify a stream of random numbers


@dataclass(frozen=True)
class Ragged:
    """Rows of ids of any length, such as samples by pack: row r is ids[offsets[r] : offsets[r + 1]], perhaps empty.

    ids: int64 [num_ids]; offsets: int64 [num_rows + 1], ascending from 0 to num_ids.
    """

    ids: IntArray
    offsets: IntArray

    @property
    def num_rows(self) -> int:
        return len(self.offsets) - 1

    @property
    def counts(self) -> IntArray:
        """Length of each row, int64 [num_rows]."""
        return np.diff(self.offsets)

    def sums(self, values: IntArray) -> IntArray:
        """Return the sum of values[id] over each row, int64 [num_rows]."""
        return self._row_sums(values[self.ids])

    def sums_of_squares(self, values: IntArray) -> IntArray:
        """Return the sum of values[id]^2 over each row, int64 [num_rows]."""
        own = values[self.ids]
        return self._row_sums(np.multiply(own, own, out=own))

    def _row_sums(self, values: IntArray) -> IntArray:
        """Return the row sums of values [num_ids], one value per id; overwrites `values`."""
        # A running sum rather than np.add.reduceat, which returns the next row's value, not 0, for an empty row.
        np.cumsum(values, out=values)
        before = np.where(self.offsets > 0, values[self.offsets - 1], 0) if len(values) else 0 * self.offsets
        return np.diff(before)

    def take(self, order: IntArray) -> Ragged:
        """Return the rows with the indices `order`, in that order."""
        counts = self.counts[order]
        offsets = offsets_of(counts)
        index = np.repeat(self.offsets[:-1][order] - offsets[:-1], counts)
        index += np.arange(len(index))
        return Ragged(self.ids[index], offsets)


EMPTY = Ragged(np.zeros(0, np.int64), np.zeros(1, np.int64))


def offsets_of(counts: IntArray) -> IntArray:
    """Return the CSR offsets [n + 1] of groups with these counts [n]."""
    offsets = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    return offsets


def grouped(row_of: NDArray[np.integer], num_rows: int, ids: IntArray) -> Ragged:
    """Return rows in which ids[j] is in row row_of[j]; the order of `ids` is kept within a row."""
    counts = np.bincount(row_of, minlength=num_rows)
    return Ragged(ids[stable_argsort(row_of)], offsets_of(counts))


def concatenated(parts: list[Ragged]) -> Ragged:
    """Return the rows of all parts, one part after the other."""
    counts = np.concatenate([part.counts for part in parts])
    return Ragged(np.concatenate([part.ids for part in parts]), offsets_of(counts))


def round_up(value: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple


def runs(values: IntArray) -> tuple[IntArray, IntArray]:
    """Return the distinct values and their counts, in order, of an array whose equal values are adjacent."""
    starts = np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]])) if len(values) else values[:0]
    return values[starts], np.diff(np.append(starts, len(values)))


def stable_argsort(keys: NDArray[np.integer]) -> IntArray:
    """Return the ascending stable argsort of non-negative integers, in O(n) per 16 bits of the largest key."""
    # NumPy's stable sort is a radix sort for 16-bit keys and a merge sort, ten times slower, for wider ones.
    highest = int(keys.max()) if len(keys) else 0
    order = np.argsort(keys.astype(np.uint16), kind="stable")
    for shift in range(16, highest.bit_length(), 16):
        digit = (keys >> shift).astype(np.uint16)
        order = order[np.argsort(digit[order], kind="stable")]
    return order


def random_bits(num: int, *stream: int) -> NDArray[np.uint64]:
    """Return `num` random 64-bit words of a stream, uint64 [num]."""
    words = np.random.PCG64(np.random.SeedSequence(stream)).random_raw(num)
    return np.asarray(words, np.uint64).reshape(num)


def shuffled(num: int, *stream: int) -> IntArray:
    """Return a permutation of range(num) drawn from a stream, int64 [num]."""
    return np.argsort(random_bits(num, *stream), kind="stable")


def longest_first(lengths: IntArray, stream: Stream) -> IntArray:
    """Return sample ids by descending length, equal lengths in the random order of the stream, int64 [num_samples]."""
    # 16 random bits shuffle well enough within a length, and sort in one radix pass.
    shuffle = np.argsort(random_bits(len(lengths), *stream).astype(np.uint16), kind="stable")
    descending = lengths.max() - lengths if len(lengths) else lengths
    return shuffle[stable_argsort(descending[shuffle])]
