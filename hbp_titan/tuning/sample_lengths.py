"""Lengths of a user's data before anything is prepared: a random sample of the rows, tokenized as a run would.

Owns how many rows are read, and how the lengths of a whole epoch follow from them. The largest rows are always among
them, so that the longest sample is known even where one row in a million is long.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hbp_titan.config import JobConfig
from hbp_titan.data.build_set import draw, index_files, source_settings
from hbp_titan.data.build_source import cut_shards, write_shards
from hbp_titan.data.files import source_files
from hbp_titan.data.formats import check_variables
from hbp_titan.data.prepare import SetRequest
from hbp_titan.data.rows import RowIndex
from hbp_titan.data.token_store import INCOMPLETE_ROWS, SAMPLE, TokenizeConfig, malformed_rows
from hbp_titan.data.tokenize_row import EXCLUDED
from hbp_titan.errors import WorkerGroup, cores_per_rank
from hbp_titan.job_config import DataSource
from hbp_titan.models.hf_files import check_tokenizer_folder
from hbp_titan.packing.ragged import IntArray
from hbp_titan.utils import first_n, human_bytes

SAMPLE_ROWS = 10_000
"""Rows that are tokenized: of a percentile p, the standard error is sqrt(p (1 - p) / rows), 0.1% at the 99th."""
SAMPLE_BYTES = 64 << 20
"""Bytes of them: about half a minute of a core."""
LARGEST_ROWS = 64
"""Rows that are read because they have the most bytes; at most an eighth of the bytes."""


@dataclass(frozen=True)
class DataLengths:
    """Lengths of the samples that the rows of the data become.

    lengths, loss_tokens: tokens and trained tokens, int64 [n], of a random share of the rows and then of the largest
    rows. num_random: how many of them are of the random share. rows: in all files; random_rows, largest_rows: of these
    the rows that were tokenized; all of them are if their sum is `rows`. excluded: read rows that give no sample, by
    reason.
    """

    lengths: IntArray
    loss_tokens: IntArray
    num_random: int
    rows: int
    random_rows: int
    largest_rows: int
    excluded: dict[str, int]

    @property
    def complete(self) -> bool:
        """Whether all rows were read."""
        return self.random_rows + self.largest_rows == self.rows

    def epoch(self, seed: int, share: float = 1.0) -> tuple[IntArray, IntArray]:
        """Return lengths and trained tokens of all rows, or of a share of them, int64 [samples] each.

        The samples of the random rows stand for those that were not read; the largest rows stand for themselves.
        """
        rest = self.rows - self.largest_rows
        count = round(share * self.num_random * rest / max(self.random_rows, 1))
        chosen = draw(np.arange(self.num_random), count, (seed,))
        chosen = np.append(chosen, np.arange(self.num_random, len(self.lengths)))
        return self.lengths[chosen], self.loss_tokens[chosen]


def read_lengths(config: JobConfig, sample_rows: int, log: Callable[[str], None]) -> DataLengths:
    """Tokenize at most about `sample_rows` rows of data.train_files and return their lengths.

    Raises ValueError for files that are missing, cannot be read or have no rows, UserError for malformed rows unless
    data.malformed is "skip".
    """
    check_variables(config.data.chat_template_kwargs, "data.chat_template_kwargs")
    sources = [("--data", DataSource(path=path)) for path in config.data.train_files]
    files = [source_files(source, key).files for key, source in sources]
    check_tokenizer_folder(config.tokenizer_path, "--model")
    request = SetRequest(config, sources, 0, sys.maxsize)
    cache = Path(config.data.cache_folder)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".lengths-", dir=cache) as folder:
        indexes = index_files(files, Path(folder) / "unpacked", WorkerGroup())
        for group, of_source in zip(files, indexes, strict=True):
            if not sum(map(len, of_source)):
                raise ValueError(f"--data: no file has rows: {first_n(group, 5)}; give files with one row per sample")
        chosen = choose_rows([index for group in indexes for index in group], sample_rows, config.seed_of("data"))
        random_rows, largest_rows = (sum(map(len, part)) for part in chosen)
        size = sum(int(index.sizes.sum()) for part in chosen for index in part)
        total = sum(len(index) for group in indexes for index in group)
        read = f"{random_rows + largest_rows:,} of {total:,} rows ({human_bytes(size)})"
        log(f"tokenizing {read} with {config.tokenizer_path}")
        settings = [
            source_settings(request, source, group, key) for (key, source), group in zip(sources, indexes, strict=True)
        ]
        ends = np.cumsum([len(group) for group in indexes])[:-1].tolist()
        parts = []
        for number, part in enumerate(chosen):
            groups = [part[start:end] for start, end in itertools.pairwise([0, *ends, len(part)])]
            parts.append(_tokenize(Path(folder) / str(number), groups, settings, config))
    samples = np.concatenate([part for part, _ in parts])
    excluded = Counter(parts[0][1]) + Counter(parts[1][1])
    if not len(samples):
        found = ", ".join(f"{count} {reason}" for reason, count in excluded.items())
        raise ValueError(f"--data: no row gives a sample to train on: {found}; fix the rows, or change [data]")
    lengths, loss_tokens = (samples[key].astype(np.int64) for key in ("length", "loss_tokens"))
    return DataLengths(lengths, loss_tokens, len(parts[0][0]), total, random_rows, largest_rows, dict(excluded))


def choose_rows(
    indexes: Sequence[RowIndex], count: int, seed: int, most_bytes: int = SAMPLE_BYTES
) -> tuple[list[RowIndex], list[RowIndex]]:
    """Return about `count` random rows, and the largest of the others; all rows if they are few enough.

    Each is a list with one index per file. Random rows have at most about `most_bytes` bytes and the largest rows an
    eighth of that, but at least one row each.
    """
    sizes = np.concatenate([index.sizes for index in indexes])
    if len(sizes) <= count and sizes.sum() <= most_bytes:
        return list(indexes), _rows(indexes, np.zeros(0, np.int64))
    by_size = np.argsort(-sizes, kind="stable")[:LARGEST_ROWS]
    largest = by_size[: max(1, int((np.cumsum(sizes[by_size]) <= most_bytes // 8).sum()))]
    others = np.random.default_rng(seed).permutation(np.setdiff1d(np.arange(len(sizes)), largest))[:count]
    few = max(1, int((np.cumsum(sizes[others]) <= most_bytes).sum()))
    return _rows(indexes, np.sort(others[:few])), _rows(indexes, np.sort(largest))


def _rows(indexes: Sequence[RowIndex], chosen: IntArray) -> list[RowIndex]:
    """Return the rows with these numbers, counted over all files."""
    starts = np.cumsum([0, *map(len, indexes)])
    parts = np.split(chosen, np.searchsorted(chosen, starts[1:-1]))
    return [index.select(part - start) for index, part, start in zip(indexes, parts, starts, strict=False)]


def _tokenize(
    folder: Path, rows: Sequence[Sequence[RowIndex]], settings: Sequence[TokenizeConfig], config: JobConfig
) -> tuple[NDArray[Any], Counter[str]]:
    """Return the samples of the rows of each source as SAMPLE [n], and the rows without one, by reason."""
    parts, excluded = [np.zeros(0, SAMPLE)], Counter[str]()
    errors: list[str] = []
    malformed = total = 0
    num_proc, shown = config.data.num_proc or cores_per_rank(), config.data.max_errors_shown
    for number, (of_source, own) in enumerate(zip(rows, settings, strict=True)):
        shards, target = cut_shards(of_source), folder / str(number)
        target.mkdir(parents=True)
        for shard, report in zip(shards, write_shards(target, shards, own, num_proc, shown), strict=True):
            parts.append(np.load(target / shard.name / "samples.npy", allow_pickle=False))
            errors += [f"{shard.rows.file}:{error}" for error in report.errors]
            malformed, total = malformed + report.malformed, total + report.rows
            for line in (target / shard.name / INCOMPLETE_ROWS).open(encoding="utf-8"):
                entry = json.loads(line)
                excluded[entry["reason"]] += entry["outcome"] == EXCLUDED
    if malformed and config.data.malformed == "error":
        raise malformed_rows(errors[:shown], malformed, total)
    return np.concatenate(parts), +excluded
