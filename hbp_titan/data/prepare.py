"""From a configuration to its token stores: what scripts/prepare_data.py and the trainer's ranks all run.

What identifies a token store: the SHA-256 over everything that its tokens depend on.

Owns the digest of a file's content, remembered by (path, size, mtime_ns) so that unchanged files are not read again.

Which samples of which sources an epoch trains, and how often.

Owns repeats, weights, the removal of duplicates and the share that is held out: index arithmetic over finished source
stores, nothing is tokenized again.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from hbp_titan.config import JobConfig
from hbp_titan.data.chat_tokenizer import ChatTokenizer
from hbp_titan.data.files import source_files
from hbp_titan.data.formats import check_mapping, detect_format
from hbp_titan.data.rows import RowIndex, index_rows, read_records
from hbp_titan.data.shards import MALFORMED, TokenizeConfig
from hbp_titan.data.token_store import (
    DROPPED,
    DUPLICATE,
    FORMAT_VERSION,
    HELD_OUT,
    NOT_DRAWN,
    NOT_HELD_OUT,
    SourceStore,
    TokenStore,
    build_source_store,
    check_fits,
    check_strict,
    malformed_rows,
    write_set,
)
from hbp_titan.data.tokenizer import TOKENIZER_FILES
from hbp_titan.errors import WorkerGroup, cores_per_rank
from hbp_titan.experiments.corpus import ensure_stdlib_corpus
from hbp_titan.job_config import DataSource
from hbp_titan.utils import atomic_write, sha256_file, sha256_text


def fingerprint(parts: Any) -> str:
    """Hex SHA-256 of a JSON value."""
    return sha256_text(json.dumps(parts, sort_keys=True))


def file_digests(files: Sequence[Path], memory: Path, team: WorkerGroup) -> list[str]:
    """Hex SHA-256 of each file's content, read by the ranks in turn; `memory`: folder that keeps them."""
    own = {number: _remembered_digest(files[number], memory) for number in team.share(len(files))}
    merged: dict[int, str] = {}
    for found in team.run_on_all(lambda: own):
        merged.update(found)
    return [merged[number] for number in range(len(files))]


def _remembered_digest(file: Path, memory: Path) -> str:
    stat = file.stat()
    key = f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns}"
    kept = memory / sha256_text(key)[:32]
    try:
        digest = kept.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        digest = ""
    if len(digest) != 64:
        digest = sha256_file(file)
        memory.mkdir(parents=True, exist_ok=True)
        atomic_write(kept, digest)
    return digest


def share_out(total: int, counts: Sequence[int]) -> list[int]:
    """At most `total` items of groups of `counts` items, in proportion, by largest remainder."""
    everything = sum(counts)
    if total >= everything:
        return list(counts)
    exact = [total * count / everything for count in counts]
    shares = [int(value) for value in exact]
    by_remainder = sorted(range(len(counts)), key=lambda k: (shares[k] - exact[k], k))
    for k in by_remainder[: total - sum(shares)]:
        shares[k] += 1
    return shares


def epoch_counts(counts: Sequence[int], repeats: Sequence[float], weights: Sequence[float]) -> list[int]:
    """Samples that an epoch takes of each source, copies counted.

    A source without weight (0) gives repeat * count. Those with weights give samples in proportion to them, as many as
    can be had while none gives more than repeat * count.
    """
    most = [repeat * count for count, repeat in zip(counts, repeats, strict=True)]
    weighted = [k for k, weight in enumerate(weights) if weight]
    # Samples for each unit of weight; the source that runs out first decides.
    unit = min((most[k] / weights[k] for k in weighted), default=0.0)
    return [round(unit * weights[k]) if weights[k] else round(most[k]) for k in range(len(counts))]


def draw(samples: NDArray[np.int64], count: int, seed: Sequence[int]) -> NDArray[np.int64]:
    """`count` of `samples` [n], each as often as any other but for one; which those are is random by `seed`.

    Whole copies one after the other, each in the order of `samples`, then the share.
    """
    if not len(samples):
        return samples
    copies, rest = divmod(count, len(samples))
    share = np.sort(np.random.default_rng(list(seed)).choice(len(samples), size=rest, replace=False))
    return np.concatenate([np.tile(samples, copies), samples[share]])


def first_of_each(digests: Sequence[NDArray[np.void]]) -> list[NDArray[np.bool_]]:
    """For each sample of each source, whether no earlier sample, of this or an earlier source, has its digest."""
    everything = np.concatenate(list(digests))
    _, first = np.unique(everything.view("S16") if everything.dtype != "S16" else everything, return_index=True)
    is_first = np.zeros(len(everything), dtype=np.bool_)
    is_first[first] = True
    return np.split(is_first, np.cumsum([len(values) for values in digests])[:-1])


def held_out(digests: NDArray[np.void], rows: NDArray[np.int64], share: float, seed: int) -> NDArray[np.bool_]:
    """For each sample of a source, whether it is held out: a share of the rows, random by `seed`.

    digests: of 16 bytes, [n]; rows: the row of each sample, equal ones adjacent, [n]. The content of a row's first
    sample decides for all that the row was split into: equal rows, of any source, are on the same side, and a row stays
    there when others come or go.
    """
    first = np.ones(len(rows), dtype=np.bool_)
    first[1:] = rows[1:] != rows[:-1]
    words = np.ascontiguousarray(digests).view("<u8").reshape(-1, 2)[:, 0]
    drawn = _mixed(words ^ _mixed(np.array([seed], dtype=np.uint64)))
    return (drawn < np.uint64(int(share * 2.0**64)))[np.flatnonzero(first)[np.cumsum(first) - 1]]


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's output function: every bit of a value decides over every bit of the result."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


# Rows in which the format of a source is looked for.
FORMAT_ROWS = 100


def prepare(
    config: JobConfig, progress: bool = True, max_sample_tokens: int | None = None, team: WorkerGroup | None = None
) -> tuple[Path, Path | None]:
    """Folders of the training store and, where data.validation_files or _sources or validation.share asks for one, of
    the validation store.

    Builds the embedded corpus and the stores that are not there yet; what is there is found again in well under a
    second. The validation store takes its share by validation.max_samples. To be called by all ranks of `team`.
    max_sample_tokens: of a sample; None means those of the largest level.
    Raises UserError for malformed rows, and ValueError for a longer sample if data.max_length_policy is "error".
    """
    team = team or WorkerGroup()
    data = config.data
    if data.embedded:
        team.run_on_all(lambda: ensure_stdlib_corpus(Path(data.embedded_folder)) if team.rank == 0 else None)
    if max_sample_tokens is None:
        if not config.levels:
            raise ValueError("no level is given: add at least one [[levels]] block (scripts/select_levels.py chooses)")
        max_sample_tokens = config.levels[-1].max_tokens
    training = _Preparation(
        config, _named_sources(config, "train"), data.max_samples, max_sample_tokens, team, progress
    )
    named, most = _named_sources(config, "validation"), config.validation.max_samples
    folder = training.run()
    if named:
        return folder, dataclasses.replace(training, sources=named, max_samples=most).run()
    return folder, dataclasses.replace(training, holds_out=True).run() if config.validation.share else None


def open_stores(config: JobConfig, max_sample_tokens: int, team: WorkerGroup | None = None) -> list[TokenStore]:
    """The training store and, if any, the validation store, made where they are not there yet; as `prepare`."""
    folders = prepare(config, max_sample_tokens=max_sample_tokens, team=team)
    return [TokenStore.open(folder) for folder in folders if folder is not None]


def _named_sources(config: JobConfig, key: str) -> list[tuple[str, DataSource]]:
    """The sources of the training or the validation set, each with the key that names it."""
    data = config.data
    files, blocks = (
        (data.train_files, data.sources) if key == "train" else (data.validation_files, data.validation_sources)
    )
    blocks_key = "data.sources" if key == "train" else "data.validation_sources"
    short = [(f"data.{key}_files", DataSource(path=path)) for path in files]
    return short + [(f"{blocks_key}[{number}]", source) for number, source in enumerate(blocks, start=1)]


@dataclasses.dataclass
class _Preparation:
    """One set: its sources' files, their rows, their stores, the mixture.

    sources: each with the key that names it. max_samples: rows of all of them together. holds_out: the set has those
    samples that validation.share takes from training; the set without it has the others.
    """

    config: JobConfig
    sources: list[tuple[str, DataSource]]
    max_samples: int
    max_sample_tokens: int
    team: WorkerGroup
    progress: bool
    holds_out: bool = False

    def __post_init__(self) -> None:
        self.data = self.config.data
        self.cache = Path(self.data.cache_folder)
        self.share = self.config.validation.share
        self.recipe = TokenizeConfig(
            self.config.tokenizer_path, self.data.train_on, max_row_bytes=self.data.max_row_bytes
        )
        if self.data.max_length_policy != "error":
            self.recipe = dataclasses.replace(
                self.recipe, max_tokens=self.max_sample_tokens, max_length_policy=self.data.max_length_policy
            )

    def run(self) -> Path:
        """The folder of the set, made where it is not there yet; the checks that its configuration asks for."""
        for key, source in self.sources:
            check_mapping(source.format, source.columns, source.roles, key)
        files = [source_files(source, key) for key, source in self.sources]
        tokenizer_files = [self.config.tokenizer_path / name for name in TOKENIZER_FILES]
        tokenizer_files = [file for file in tokenizer_files if file.is_file()]
        every_file = [*tokenizer_files, *(file for group in files for file in group)]
        digests = dict(zip(every_file, file_digests(every_file, self.cache / "digests", self.team), strict=True))
        base = {
            "tokenizer": [[file.name, digests[file]] for file in tokenizer_files],
            "settings": {**dataclasses.asdict(self.recipe), "tokenizer_path": ""},
            "format": FORMAT_VERSION,
        }
        # The name of a file counts without its folder, because it names the rows' source.
        contents = [[[file.name, digests[file]] for file in group] for group in files]
        blocks = [{**dataclasses.asdict(source), "path": ""} for _, source in self.sources]
        settings = {"max_samples": self.max_samples, "duplicates": self.data.duplicates, "seed": self.data.seed}
        if self.share:
            most = self.config.validation.max_samples if self.holds_out else 0
            settings |= {"share": self.share, "holds_out": self.holds_out, "most": most}
        digest = fingerprint({**base, "sources": contents, "blocks": blocks, **settings})
        folder = self.cache / f"set-{digest[:16]}"
        if not all(self.team.gather(folder.is_dir())):
            stores = self._source_stores(files, contents, base, self.cache / f"unpacked-{digest[:16]}")
            meta = {"fingerprint": digest, "settings": settings}
            self.team.run_on_all(lambda: self._mix(folder, stores, meta) if self.team.rank == 0 else None)
        self.team.run_on_all(lambda: self._check(folder))
        return folder

    def _check(self, folder: Path) -> None:
        store, data = TokenStore.open(folder), self.data
        count = store.totals().get(f"excluded: {MALFORMED}", 0)
        if count and data.malformed == "error":
            entries = [entry for entry in store.ledger() if entry["reason"] == MALFORMED][: data.max_errors_shown]
            raise malformed_rows([f"{e['file']}:{e['line']}: {e['detail']}" for e in entries], count)
        if data.strict:
            check_strict(store, data.max_errors_shown)
        limit = () if self.config.levels else ("packing.max_sample_tokens (or the model's limit)",)
        check_fits(store, self.max_sample_tokens, *limit)

    def _source_stores(
        self, files: list[list[Path]], contents: list[Any], base: dict[str, Any], unpacked: Path
    ) -> list[SourceStore]:
        indexes = self._index(files, unpacked)
        counts = [sum(map(len, group)) for group in indexes]
        limits = [min(source.limit or count, count) for (_, source), count in zip(self.sources, counts, strict=True)]
        if self.max_samples:
            limits = share_out(self.max_samples, limits)
        stores = []
        # disable=None: a bar on a terminal only.
        hidden = None if self.progress and self.team.rank == 0 else True
        own_rows = sum(limits) // self.team.size
        with tqdm(total=own_rows, unit="row", desc="tokenizing", disable=hidden) as bar:
            for number, (key, source) in enumerate(self.sources):
                recipe = self._recipe_of(source, indexes[number], key)
                settings = {**dataclasses.asdict(recipe), "tokenizer_path": ""}
                # Which rows a limit leaves is random.
                rows = [limits[number], self.data.seed] if limits[number] < counts[number] else limits[number]
                digest = fingerprint({**base, "settings": settings, "source": contents[number], "rows": rows})
                folder = self.cache / f"source-{digest[:16]}"
                if not all(self.team.gather(folder.is_dir())):
                    build_source_store(
                        folder,
                        digest,
                        indexes[number],
                        _choose(indexes[number], limits[number], self.data.seed),
                        recipe,
                        self.team,
                        self.data.num_proc or cores_per_rank(),
                        self.data.max_errors_shown,
                        self.data.malformed == "skip",
                        bar.update,
                    )
                stores.append(SourceStore(folder))
        if self.team.rank == 0:
            shutil.rmtree(unpacked, ignore_errors=True)
        return stores

    def _index(self, files: list[list[Path]], unpacked: Path) -> list[list[RowIndex]]:
        """Where the rows of each source's files are; the ranks read the files in turn."""
        flat = [file for group in files for file in group]

        def read_own() -> dict[int, RowIndex]:
            return {number: index_rows(flat[number], unpacked) for number in self.team.share(len(flat))}

        found: dict[int, RowIndex] = {}
        for part in self.team.run_on_all(read_own):
            found.update(part)
        numbers = iter(range(len(flat)))
        return [[found[next(numbers)] for _ in group] for group in files]

    def _recipe_of(self, source: DataSource, indexes: list[RowIndex], key: str) -> TokenizeConfig:
        chosen = source.format
        if chosen == "auto":
            chosen = _detect(indexes, source.columns, self.data.max_row_bytes, key)
        return dataclasses.replace(
            self.recipe, format=chosen, columns=source.columns, roles=source.roles, name=source.name
        )

    def _mix(self, folder: Path, stores: list[SourceStore], meta: dict[str, Any]) -> None:
        """Draw the epoch's samples and write the set."""
        kept = [np.arange(len(store), dtype=np.int64) for store in stores]
        dropped = [np.zeros((0, 3), dtype=np.int64)]
        if self.data.duplicates == "skip":
            for number, first in enumerate(first_of_each([store.samples["digest"] for store in stores])):
                dropped.append(_dropped(number, kept[number][~first], DUPLICATE))
                kept[number] = kept[number][first]
        if self.share:
            kept = self._divided(stores, kept, dropped)
        blocks = [source for _, source in self.sources]
        available = [len(part) for part in kept]
        counts = epoch_counts(available, [s.repeat for s in blocks], [s.weight for s in blocks])
        if self.holds_out:
            counts = share_out(self.config.validation.max_samples or sum(available), available)
        drawn = []
        for number, (part, count) in enumerate(zip(kept, counts, strict=True)):
            drawn.append(draw(part, count, (self.data.seed, number)))
            dropped.append(_dropped(number, np.setdiff1d(part, drawn[-1]), NOT_DRAWN))
        tokenizer = ChatTokenizer(self.config.tokenizer_path)
        meta = {
            **meta,
            "tokenizer_path": str(self.config.tokenizer_path),
            "vocab_size": tokenizer.vocab_size,
            "pad_token_id": tokenizer.token_id("pad_token"),
            "eos_token_id": tokenizer.token_id("eos_token"),
        }
        write_set(folder, stores, drawn, np.concatenate(dropped), meta)

    def _divided(
        self, stores: list[SourceStore], kept: list[NDArray[np.int64]], dropped: list[NDArray[np.int64]]
    ) -> list[NDArray[np.int64]]:
        """The samples of each store on this set's side of validation.share; those of the other go to `dropped`."""
        parts = []
        for number, (store, part) in enumerate(zip(stores, kept, strict=True)):
            held = held_out(store.samples["digest"], _rows(store.samples), self.share, self.data.seed)[part]
            own = held == self.holds_out
            dropped.append(_dropped(number, part[~own], NOT_HELD_OUT if self.holds_out else HELD_OUT))
            parts.append(part[own])
        if not sum(map(len, parts)):
            use, mend = ("hold out", "raise") if self.holds_out else ("train on", "lower")
            raise ValueError(
                f"validation.share = {self.share} leaves no sample to {use} of {sum(map(len, kept))}: {mend} it"
            )
        return parts


def _rows(samples: NDArray[Any]) -> NDArray[np.int64]:
    """A number for the row of each sample of a store, [n]."""
    return (samples["file"].astype(np.int64) << 40) + samples["line"].astype(np.int64)


def _dropped(store: int, samples: NDArray[np.int64], reason: str) -> NDArray[np.int64]:
    constant = np.full(len(samples), store, dtype=np.int64)
    return np.stack([constant, samples, np.full(len(samples), DROPPED.index(reason), dtype=np.int64)], axis=1)


def _detect(indexes: list[RowIndex], columns: dict[str, str], max_row_bytes: int, key: str) -> str:
    """The format of the first row that has one; ValueError of the first row where none of the first few has."""
    mistake: ValueError | None = None
    for index in indexes:
        for line, record in read_records(index.take(slice(0, FORMAT_ROWS)), max_row_bytes):
            try:
                if isinstance(record, ValueError):
                    raise record
                return detect_format(record, columns)
            except ValueError as error:
                mistake = mistake or ValueError(f"{index.file}:{line}: {error} ({key})")
    assert mistake is not None, "index_rows refuses files without rows"
    raise mistake


def _choose(indexes: list[RowIndex], count: int, seed: int) -> list[RowIndex]:
    """A random share of `count` rows of all files of a source together, in their order."""
    counts = [len(index) for index in indexes]
    if count == sum(counts):
        return indexes
    chosen = np.sort(np.random.default_rng(seed).choice(sum(counts), size=count, replace=False))
    ends = np.cumsum(counts)
    parts = np.split(chosen, np.searchsorted(chosen, ends[:-1]))
    return [index.take(part - end + rows) for index, part, end, rows in zip(indexes, parts, ends, counts, strict=True)]
