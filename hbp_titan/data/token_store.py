"""The store of one source: its shards and, over all of them, where each sample is and which row it comes from.

Owns the folder of a source, made once per fingerprint, and its reading through memory maps. N samples:

    shard-00000/ ...             (data/store/shards.py)
    samples.npy      PLACED [N]  the shards' samples one after the other, with the shard and the place in it
    not_chosen.npy   int64 [n,2] file and line of the rows outside data.max_samples or the source's limit
    ledger.jsonl     the shards' ledgers one after the other
    meta.json        fingerprint, files, names of sources, counts

Token store: the samples of one epoch, of one source or a mixture of several, as planner and loader see them.

Owns the folder of such a set, which only points into source stores (source_store.py), and its reading. N samples,
copies counted:

    lengths.npy      int64  [N]   tokens of each sample
    loss_tokens.npy  int64  [N]   trained positions after the shift: loss_mask[1:].sum()
    sources.npy      uint16 [N]   index into source_names
    stores.npy       uint16 [N]   index into the source stores
    places.npy       int64  [N]   sample of that store
    dropped.npy      int64  [n,3] store, sample and reason (index into DROPPED) of samples that the epoch does not train
    meta.json        fingerprint, names, counts, folders of the source stores, tokenizer

The sums of a store's ledger: every row and every sample accounted for.

Owns which counts of TokenStore.totals make up which.

What a person sees of a token store: the summary per source, and samples with their trained tokens coloured.
"""

from __future__ import annotations

import itertools
import json
import secrets
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from hbp_titan.data.rows import RowIndex
from hbp_titan.data.shards import (
    EXCLUDED,
    SAMPLE,
    SPLIT,
    TRUNCATED,
    Shard,
    ShardReport,
    TokenizeConfig,
    cut_shards,
    read_report,
    write_shards,
)
from hbp_titan.errors import UserError, WorkerGroup

FORMAT_VERSION = 4
PLACED = np.dtype([*((name, SAMPLE[name]) for name in SAMPLE.names or ()), ("shard", "<u4"), ("start", "<i8")])
# Each open shard takes two maps, and a map may take a file handle.
OPEN_SHARDS = 200


class SourceStore:
    """A source's store opened for reading. samples: PLACED [N], a memory map; meta: meta.json."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        meta_file = folder / "meta.json"
        if not meta_file.is_file():
            raise ValueError(f"{folder}: no token store here: run scripts/prepare_data.py")
        self.meta: dict[str, Any] = json.loads(meta_file.read_text(encoding="utf-8"))
        if self.meta["format_version"] != FORMAT_VERSION:
            raise ValueError(
                f"{folder}: format {self.meta['format_version']} is not this version's {FORMAT_VERSION}: delete it"
            )
        self.samples: NDArray[Any] = np.load(folder / "samples.npy", mmap_mode="r", allow_pickle=False)
        self._shard = lru_cache(maxsize=OPEN_SHARDS)(self._open_shard)

    def __len__(self) -> int:
        return len(self.samples)

    def __reduce__(self) -> tuple[type[SourceStore], tuple[Path]]:
        return SourceStore, (self.folder,)

    def sample(self, index: int) -> tuple[NDArray[np.uint32], NDArray[np.bool_]]:
        """Token ids [L] uint32 and loss mask [L] bool of one sample: read-only views of the memory maps."""
        place = self.samples[index]
        tokens, loss_mask = self._shard(int(place["shard"]))
        start = int(place["start"])
        end = start + int(place["length"])
        return tokens[start:end], loss_mask[start:end]

    def where(self, index: int) -> str:
        """The row that a sample comes from, as file:line."""
        place = self.samples[index]
        return f"{self.meta['files'][int(place['file'])]}:{int(place['line'])}"

    def ledger(self) -> list[dict[str, Any]]:
        """The rows that are not trained whole: file, line, outcome, reason, tokens, samples, detail."""
        text = (self.folder / "ledger.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.split("\n") if line]

    def _open_shard(self, number: int) -> tuple[NDArray[np.uint32], NDArray[np.bool_]]:
        folder, expected = self.folder / f"shard-{number:05d}", self.meta["shard_tokens"][number]
        maps = []
        for name, dtype in (("tokens.bin", "<u4"), ("loss_mask.bin", np.bool_)):
            values: NDArray[Any] = np.memmap(folder / name, dtype=dtype, mode="r").view(np.ndarray)
            if len(values) != expected:
                raise ValueError(
                    f"{folder / name}: {len(values)} tokens where meta.json says {expected}: the store is damaged: "
                    f"delete {self.folder}"
                )
            maps.append(values)
        return maps[0], maps[1]


def build_source_store(
    folder: Path,
    fingerprint: str,
    indexes: Sequence[RowIndex],
    chosen: Sequence[RowIndex],
    recipe: TokenizeConfig,
    team: WorkerGroup,
    num_proc: int,
    max_errors: int,
    skip_malformed: bool,
    progress: Callable[[int], None],
) -> None:
    """Make the store in `folder`, by all ranks of `team` together; what an earlier, killed call left is used.

    indexes: all rows of the source's files; chosen: those to tokenize. progress: told of rows done by this rank.
    Raises UserError "file:line: ..." with the first `max_errors` malformed rows unless `skip_malformed`.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    shards = cut_shards(chosen)

    def make_own() -> None:
        own = [shards[number] for number in team.share(len(shards))]
        with _ignore_if_exists(folder):
            for report in write_shards(partial, own, recipe, num_proc, max_errors):
                if report.malformed and not skip_malformed:
                    raise malformed_rows(report.faults, report.malformed)
                progress(report.rows)

    team.run_on_all(make_own)

    def finish() -> None:
        with _ignore_if_exists(folder):
            _finish(partial, fingerprint, indexes, chosen, shards)
            publish(partial, folder)
        shutil.rmtree(partial, ignore_errors=True)

    team.run_on_all(finish if team.rank == 0 else lambda: None)


@contextmanager
def _ignore_if_exists(folder: Path) -> Iterator[None]:
    """Another process that makes the same store (a second node's start, say) may finish first."""
    try:
        yield
    except FileNotFoundError:
        if not folder.is_dir():
            raise


def publish(temporary: Path, folder: Path) -> None:
    """Rename a finished folder to its place, where another process may have put the same meanwhile."""
    try:
        temporary.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
        shutil.rmtree(temporary, ignore_errors=True)


def malformed_rows(faults: list[str], count: int) -> UserError:
    """The error of `count` malformed rows, the first of which are `faults`."""
    if count == 1:
        return UserError([f'{faults[0]}; mend the row, or set data.malformed = "skip" to leave it out and list it'])
    more = f"{count - len(faults)} more malformed rows are not shown; " if count > len(faults) else ""
    return UserError([*faults, f'{more}mend the rows, or set data.malformed = "skip" to leave them out and list them'])


def _finish(
    folder: Path, fingerprint: str, indexes: Sequence[RowIndex], chosen: Sequence[RowIndex], shards: Sequence[Shard]
) -> None:
    """Write what lies over all shards; meta.json last."""
    reports = [read_report(folder / shard.name) for shard in shards]
    samples: list[NDArray[Any]] = [np.load(folder / shard.name / "samples.npy", allow_pickle=False) for shard in shards]
    names: dict[str, int] = {}
    placed = np.concatenate(
        [
            _place(part, shard.number, report, names)
            for part, shard, report in zip(samples, shards, reports, strict=True)
        ]
        or [np.zeros(0, PLACED)]
    )
    np.save(folder / "samples.npy", placed)
    np.save(folder / "not_chosen.npy", _not_chosen(indexes, chosen))
    outcomes: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    with (folder / "ledger.jsonl").open("w", encoding="utf-8") as stream:
        for shard in shards:
            for line in (folder / shard.name / "ledger.jsonl").open(encoding="utf-8"):
                entry = json.loads(line)
                outcomes[entry["outcome"]] += 1
                if entry["outcome"] == EXCLUDED:
                    reasons[entry["reason"]] += 1
                stream.write(line)
    rows, tokenized = sum(map(len, indexes)), sum(map(len, chosen))
    whole = tokenized - outcomes.total()
    meta = {
        "format_version": FORMAT_VERSION,
        "fingerprint": fingerprint,
        "files": [str(index.file) for index in indexes],
        "source_names": list(names),
        "rows": rows,
        "not_chosen": rows - tokenized,
        "excluded": dict(sorted(reasons.items())),
        "truncated": outcomes[TRUNCATED],
        "split": outcomes[SPLIT],
        "whole": whole,
        "samples": len(placed),
        "shard_tokens": [int(part["length"].sum()) for part in samples],
    }
    assert whole + outcomes[TRUNCATED] + outcomes[SPLIT] == int((placed["part"] == 0).sum()), "a row was lost"
    (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")


def _place(samples: NDArray[Any], shard: int, report: ShardReport, names: dict[str, int]) -> NDArray[Any]:
    placed = np.zeros(len(samples), PLACED)
    for column in SAMPLE.names or ():
        placed[column] = samples[column]
    ids = np.array([names.setdefault(name, len(names)) for name in report.source_names], dtype=np.uint32)
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


MAX_SOURCES = 1 << 16
DUPLICATE, NOT_DRAWN, HELD_OUT, NOT_HELD_OUT = "duplicate", "not drawn", "held out", "not held out"
DROPPED = (DUPLICATE, NOT_DRAWN, HELD_OUT, NOT_HELD_OUT)


class TokenStore:
    """A set of samples opened for reading; its arrays are memory maps, so opening costs nothing per sample.

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
        self._store_of: NDArray[np.uint16] = self._load("stores")
        self._place: NDArray[np.int64] = self._load("places")
        self.stores = [SourceStore(folder.parent / name) for name in self.meta["stores"]]

    @classmethod
    def open(cls, folder: Path | str) -> TokenStore:
        """The store in `folder`; ValueError where there is none, or it is of another format or damaged."""
        return cls(Path(folder))

    def __reduce__(self) -> tuple[type[TokenStore], tuple[Path]]:
        # Loader processes open the maps again: nothing of them is copied.
        return TokenStore, (self.folder,)

    def __len__(self) -> int:
        return len(self.lengths)

    def sample(self, index: int) -> tuple[NDArray[np.uint32], NDArray[np.bool_]]:
        """Token ids [L] uint32 and loss mask [L] bool of one sample: read-only views of the memory maps."""
        return self.stores[self._store_of[index]].sample(int(self._place[index]))

    def where(self, index: int) -> str:
        """The row that a sample comes from, as file:line."""
        return self.stores[self._store_of[index]].where(int(self._place[index]))

    def ledger(self) -> Iterator[dict[str, Any]]:
        """Every row or sample that is read but not trained whole, as `SourceStore.ledger` has it.

        A sample that is a duplicate or not drawn has these as outcome and reason. Rows outside a limit were not read:
        not_chosen.npy of each source store lists them.
        """
        for store in self.stores:
            yield from store.ledger()
        for number, place, reason in self._load("dropped").tolist():
            store, why = self.stores[number], DROPPED[reason]
            file, line = store.where(place).rsplit(":", 1)
            tokens = int(store.samples[place]["length"])
            yield {"file": file, "line": int(line), "outcome": why, "reason": why, "tokens": tokens, "samples": 0,
                   "detail": ""}  # fmt: skip

    def totals(self) -> dict[str, int]:
        """Counts of rows by outcome and of samples, which were seen to add up when the set was made:

        rows = not_chosen + excluded: each reason + whole + truncated + split
        samples_made (of the last three) = duplicate + not drawn + held out + not held out + trained
        samples (of an epoch) = trained + copies
        """
        return dict(self.meta["totals"])

    def _load(self, name: str) -> NDArray[Any]:
        return np.load(self.folder / f"{name}.npy", mmap_mode="r", allow_pickle=False).view(np.ndarray)


def write_set(
    folder: Path,
    stores: Sequence[SourceStore],
    drawn: Sequence[NDArray[np.int64]],
    dropped: NDArray[np.int64],
    meta: dict[str, Any],
) -> None:
    """Write the set in `folder`, atomically. drawn: samples of each store, copies included; dropped, meta: see above.

    Raises ValueError where no sample is left and where sources have too many names.
    """
    if not sum(map(len, drawn)):
        found = "; ".join(f"{store.meta['files'][0]}: {_reasons(store)}" for store in stores)
        raise ValueError(f"no sample is left to train on: {found}: mend the rows, or change [data]")
    names: dict[str, int] = {}
    columns: dict[str, list[NDArray[Any]]] = {
        name: [] for name in ("lengths", "loss_tokens", "sources", "stores", "places")
    }
    for number, (store, places) in enumerate(zip(stores, drawn, strict=True)):
        ids = np.array([names.setdefault(name, len(names)) for name in store.meta["source_names"]], dtype=np.int64)
        taken = store.samples[places]
        columns["lengths"].append(taken["length"])
        columns["loss_tokens"].append(taken["loss_tokens"])
        columns["sources"].append(ids[taken["source"]] if len(taken) else ids[:0])
        columns["stores"].append(np.full(len(places), number, dtype=np.uint16))
        columns["places"].append(places)
    if len(names) > MAX_SOURCES:
        raise ValueError(
            f"more than {MAX_SOURCES} different `source` values: give data.sources a name, or map no column"
        )
    totals = _totals(stores, drawn, dropped)
    temporary = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}")
    temporary.mkdir(parents=True)
    for name, parts in columns.items():
        np.save(
            temporary / f"{name}.npy", np.concatenate(parts).astype(np.uint16 if name == "sources" else parts[0].dtype)
        )
    np.save(temporary / "dropped.npy", dropped)
    lengths = np.concatenate(columns["lengths"])
    meta = {
        "format_version": FORMAT_VERSION,
        **meta,
        "stores": [store.folder.name for store in stores],
        "source_names": list(names),
        "num_samples": len(lengths),
        "num_tokens": int(lengths.sum()),
        "num_trained_tokens": int(sum(part.sum() for part in columns["loss_tokens"])),
        "totals": totals,
    }
    (temporary / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
    publish(temporary, folder)


def _totals(
    stores: Sequence[SourceStore], drawn: Sequence[NDArray[np.int64]], dropped: NDArray[np.int64]
) -> dict[str, int]:
    """See TokenStore.totals; each count is taken where it arises, and the sums must agree."""
    metas = [store.meta for store in stores]
    rows = {key: sum(meta[key] for meta in metas) for key in ("rows", "whole", "truncated", "split", "not_chosen")}
    excluded: Counter[str] = Counter()
    for meta in metas:
        excluded.update(meta["excluded"])
    trained = 0
    for store, places in zip(stores, drawn, strict=True):
        is_trained = np.zeros(len(store), dtype=np.bool_)
        is_trained[places] = True
        trained += int(is_trained.sum())
    samples = sum(map(len, drawn))
    reasons = np.bincount(dropped[:, 2], minlength=len(DROPPED)).tolist()
    made = sum(map(len, stores))
    counted = rows["whole"] + rows["truncated"] + rows["split"] + rows["not_chosen"] + excluded.total()
    assert rows["rows"] == counted, "a row was lost"
    assert made == trained + sum(reasons), "a sample was lost"
    return {
        **rows,
        **{f"excluded: {reason}": count for reason, count in sorted(excluded.items())},
        "samples_made": made,
        **dict(zip(DROPPED, reasons, strict=True)),
        "trained": trained,
        "copies": samples - trained,
        "samples": samples,
    }


def _reasons(store: SourceStore) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in store.meta["excluded"].items()) or "no row"


def check_fits(store: TokenStore, max_tokens: int, limit: str = "the largest level, levels.max_tokens") -> None:
    """Raise ValueError where a sample is longer than `max_tokens`, which is called `limit`."""
    longest = int(store.lengths.argmax())
    if store.lengths[longest] <= max_tokens:
        return
    count = int((store.lengths > max_tokens).sum())
    raise ValueError(
        f"{store.where(longest)}: a sample of {store.lengths[longest]} tokens is longer than {limit} = {max_tokens} "
        f"({count} of {len(store)} samples are): raise it, or set data.max_length_policy to skip, truncate or split"
    )


def check_strict(store: TokenStore, most_shown: int) -> None:
    """Raise UserError, with the first `most_shown` of them, where any row is left out or cut (data.strict)."""
    lines: list[str] = []
    count = 0
    for entry in store.ledger():
        count += 1
        if len(lines) < most_shown:
            why = f"{entry['outcome']}: {entry['reason']}" if entry["outcome"] != entry["reason"] else entry["reason"]
            lines.append(f"{entry['file']}:{entry['line']}: {why}{': ' if entry['detail'] else ''}{entry['detail']}")
    if count:
        raise UserError(
            [*lines, f"data.strict: {count} rows are not trained whole; mend them or set data.strict = false"]
        )


def check_ledger(totals: Mapping[str, int], samples: int) -> tuple[list[str], list[str]]:
    """The sums of a store's ledger (TokenStore.totals) as lines, and what does not add up to its `samples`."""
    outcomes = [key for key in totals if key.startswith("excluded: ")]
    sums = {
        "rows": ["whole", "truncated", "split", *outcomes, "not_chosen"],
        "samples_made": ["duplicate", "not drawn", "held out", "not held out", "trained"],
        "samples": ["trained", "copies"],
    }
    lines, faults = [], []
    for whole, parts in sums.items():
        text = " + ".join(f"{totals[part]:,} {part}" for part in parts if totals[part]) or "0"
        lines.append(f"ledger: {totals[whole]:,} {whole} = {text}")
        if totals[whole] != sum(totals[part] for part in parts):
            faults.append(f"ledger: {totals[whole]:,} {whole} are not {text}")
    if totals["samples"] != samples:
        faults.append(f"ledger: {totals['samples']:,} samples where the store has {samples:,}")
    return lines, faults


SHOWN_SOURCES = 30
_BLOCKS = " .:-=+*#%@"
_TRAINED, _RESET = "\x1b[32m", "\x1b[0m"


def summary(store: TokenStore) -> str:
    """Counts, tokens, trained tokens, percentiles and histogram of each source, and the rows left out."""
    lengths = store.lengths
    columns = f"{'source':24} {'samples':>9} {'tokens':>13} {'trained':>13} {'p50':>7} {'p90':>7} {'p99':>7} {'max':>7}"
    top = int(np.log2(lengths.max())) + 1
    lines = [f"{columns}  2^0..2^{top} tokens"]
    counts = np.bincount(store.sources, minlength=len(store.source_names))
    for source in np.argsort(-counts, kind="stable")[:SHOWN_SOURCES]:
        lines.append(_line(store.source_names[source], store, store.sources == source, top))
    if len(counts) > SHOWN_SOURCES:
        lines.append(f"... and {len(counts) - SHOWN_SOURCES} smaller sources")
    lines.append(_line("all", store, np.ones(len(store), dtype=bool), top))
    return "\n".join([*lines, *_ledger(store)])


def _ledger(store: TokenStore) -> list[str]:
    """The ledger's sums, and where its rows are listed."""
    lines, _ = check_ledger(store.totals(), len(store))
    listed = [s.folder for s in store.stores if s.meta["truncated"] or s.meta["split"] or s.meta["excluded"]]
    return [*lines, *(f"  listed in {folder / 'ledger.jsonl'}" for folder in listed)]


def _line(name: str, store: TokenStore, chosen: NDArray[np.bool_], top: int) -> str:
    lengths, trained = store.lengths[chosen], int(store.loss_tokens[chosen].sum())
    p50, p90, p99 = np.percentile(lengths, [50, 90, 99])
    numbers = f"{len(lengths):9,} {lengths.sum():13,} {trained:13,} {p50:7,.0f} {p90:7,.0f} {p99:7,.0f}"
    return f"{name[:24]:24} {numbers} {lengths.max():7,}  |{_histogram(lengths, top)}|"


def _histogram(lengths: NDArray[np.int64], top: int) -> str:
    """One character for each power of two: the darker, the more samples."""
    counts = np.bincount(np.log2(lengths).astype(np.int64), minlength=top)
    shades = np.ceil(counts / counts.max() * (len(_BLOCKS) - 1)).astype(np.int64)
    return "".join(_BLOCKS[shade] for shade in shades)


def show(store: TokenStore, count: int, tokenizer_path: Path) -> str:
    """The first `count` samples as text, their trained tokens in green."""
    tokenizer = Tokenizer.from_file(str(tokenizer_path / "tokenizer.json"))
    blocks = []
    for index in range(min(count, len(store))):
        tokens, loss_mask = store.sample(index)
        borders = [0, *(np.flatnonzero(np.diff(loss_mask)) + 1), len(tokens)]
        text = ""
        for start, end in itertools.pairwise(borders):
            piece = tokenizer.decode(tokens[start:end].tolist(), skip_special_tokens=False)
            text += f"{_TRAINED}{piece}{_RESET}" if loss_mask[start] else piece
        source = store.source_names[store.sources[index]]
        counted = f"{len(tokens)} tokens, {store.loss_tokens[index]} trained"
        blocks.append(f"--- sample {index} ({store.where(index)}, {source}, {counted})\n{text}")
    return "\n".join(blocks)
