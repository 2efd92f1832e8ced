"""Build a set of samples: index the files of its sources, tokenize the chosen rows, draw the mixture, write the set.

Owns repeats, weights, limits, the removal of duplicates and the held-out share: index arithmetic over finished source
stores (data/build_source.py), so that a changed mixture tokenizes nothing again. Imported by data/prepare.py only if a
set is missing.
"""

from __future__ import annotations

import dataclasses
import json
import secrets
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from hbp_titan.data.build_source import build_source_store, missing_rows
from hbp_titan.data.chat_tokenizer import ChatTokenizer
from hbp_titan.data.disk import check_free_space, commit_dir, copy_bytes, naming_full_disk, store_bytes
from hbp_titan.data.files import NO_SPLIT
from hbp_titan.data.formats import detect_format
from hbp_titan.data.prepare import SetRequest, SourceFiles, fingerprint
from hbp_titan.data.rows import RowIndex, count_rows, has_copy, index_rows, read_records
from hbp_titan.data.template_probes import served_template
from hbp_titan.data.token_store import (
    DROPPED,
    DUPLICATE,
    FORMAT_VERSION,
    HELD_OUT,
    INCOMPLETE_ROWS,
    NOT_DRAWN,
    NOT_HELD_OUT,
    SourceStore,
    TokenizeConfig,
    TokenStore,
    read_meta,
)
from hbp_titan.errors import WorkerGroup
from hbp_titan.job_config import DataSource
from hbp_titan.utils import atomic_write, first_n

# Rows that are searched for the format of a source.
FORMAT_ROWS = 100
MAX_SOURCE_NAMES = 1 << 16


def build_set(
    request: SetRequest, found: SourceFiles, folder: Path, digest: str, workers: WorkerGroup, progress: bool
) -> None:
    """Build the set in `folder`, and the source stores that it points into; all ranks of `workers` must call it.

    digest: fingerprint of the set. progress: whether rank 0 shows a progress bar.
    """
    unpacked = folder.with_name(f"unpacked-{digest[:16]}")
    try:
        stores = _source_stores(request, found, unpacked, workers, progress)
    except FileNotFoundError:
        # Another job that built the same set has removed the copies meanwhile.
        if folder.is_dir():
            return
        raise
    meta = {"fingerprint": digest, "settings": request.settings()}
    workers.report(f"drawing the samples of {folder}")

    def mix() -> None:
        with naming_full_disk(folder.parent):
            _mix(request, stores, folder, meta)

    workers.run_on_all(mix if workers.rank == 0 else lambda: None)
    # Only now: no rank of this job still reads the copies, and other jobs find the set instead.
    if workers.rank == 0:
        shutil.rmtree(unpacked, ignore_errors=True)


def _source_stores(
    request: SetRequest, found: SourceFiles, unpacked: Path, workers: WorkerGroup, progress: bool
) -> list[SourceStore]:
    """Return the store of each source, built if it does not exist."""
    data, seed = request.config.data, request.config.seed_of("data")
    indexes = index_files([source.files for source in found.sources], unpacked, workers)
    counts = [sum(map(len, group)) for group in indexes]
    for (key, _), files, count in zip(request.sources, found.sources, counts, strict=True):
        if not count:
            raise ValueError(f"{key}: no file has rows: {first_n(files.files, 5)}")
    limits = [min(source.limit or count, count) for (_, source), count in zip(request.sources, counts, strict=True)]
    if request.max_samples:
        limits = share_out(request.max_samples, limits)
    cache = Path(data.cache_folder)
    builds = []
    for number, (key, source) in enumerate(request.sources):
        settings = source_settings(request, source, indexes[number], key)
        settings = dataclasses.replace(settings, folder=found.sources[number].name)
        # The seed decides which rows a limit leaves.
        rows = [limits[number], seed] if limits[number] < counts[number] else limits[number]
        digest = fingerprint(
            {**found.base, "settings": settings.values(), "source": found.contents[number], "rows": rows}
        )
        chosen = _choose_rows(indexes[number], limits[number], seed)
        builds.append((cache / f"source-{digest[:16]}", digest, indexes[number], chosen, settings))

    def check_disk() -> None:
        # Of all sources, before any row is tokenized: hours later only the last one would not fit.
        needed = {folder: store_bytes(missing_rows(folder, chosen)) for folder, _, _, chosen, _ in builds}
        check_free_space(cache, sum(needed.values()), f"the tokens of {len(needed)} sources")

    workers.run_on_all(check_disk if workers.rank == 0 else lambda: None)
    stores = []
    # None shows the bar on a terminal only.
    hidden = None if progress and workers.rank == 0 else True
    with tqdm(total=sum(limits) // workers.size, unit="row", desc="tokenizing", disable=hidden) as bar:
        for (folder, digest, index, chosen, settings), source_files in zip(builds, found.sources, strict=True):
            # All ranks must take the same branch: building is collective.
            if not all(workers.gather(folder.is_dir())):
                build_source_store(folder, digest, index, chosen, settings, data, workers, bar.update)
            stores.append(SourceStore(folder, [str(file) for file in source_files.files]))
    return stores


def index_files(files: list[list[Path]], unpacked: Path, workers: WorkerGroup) -> list[list[RowIndex]]:
    """Return where the rows of each source's files are; each rank reads its share of the files."""
    flat = [file for group in files for file in group]
    cache = unpacked.parent

    def check_disk() -> None:
        needed = sum(copy_bytes(file) for file in set(flat) if not has_copy(file, unpacked))
        check_free_space(cache, needed, "copies of compressed, CSV and Parquet files")

    def read_own() -> dict[int, RowIndex]:
        own = {}
        with naming_full_disk(cache):
            for number in workers.share(len(flat)):
                workers.report(f"looking for the rows of {flat[number]}")
                own[number] = index_rows(flat[number], unpacked)
        return own

    workers.run_on_all(check_disk if workers.rank == 0 else lambda: None)

    found: dict[int, RowIndex] = {}
    for part in workers.run_on_all(read_own):
        found.update(part)
    numbers = iter(range(len(flat)))
    return [[found[next(numbers)] for _ in group] for group in files]


def source_settings(request: SetRequest, source: DataSource, indexes: list[RowIndex], key: str) -> TokenizeConfig:
    chosen = source.format
    if chosen == "auto":
        chosen = _detect_format(indexes, source.columns, request.config.data.max_row_bytes, key)
    return dataclasses.replace(
        request.tokenize_config(), format=chosen, columns=source.columns, roles=source.roles, name=source.name
    )


def _detect_format(indexes: list[RowIndex], columns: dict[str, str], max_row_bytes: int, key: str) -> str:
    """Return the format of the first row that has one; raises the first row's ValueError if no row has one."""
    first_error: ValueError | None = None
    for index in indexes:
        for line, record in read_records(index.select(slice(0, FORMAT_ROWS)), max_row_bytes):
            try:
                if isinstance(record, ValueError):
                    raise record
                return detect_format(record, columns)
            except ValueError as error:
                where = key if key.endswith("]") else f"{key}; a [[data.sources]] block takes these settings"
                first_error = first_error or ValueError(f"{index.file}:{line}: {error} ({where})")
    assert first_error is not None, "a source without rows is refused"
    raise first_error


def _choose_rows(indexes: list[RowIndex], count: int, seed: int) -> list[RowIndex]:
    """Return `count` random rows of all files of a source together, in their order."""
    counts = [len(index) for index in indexes]
    if count == sum(counts):
        return indexes
    # Sorted: rows keep the order of the files and are read forwards.
    chosen = np.sort(np.random.default_rng(seed).choice(sum(counts), size=count, replace=False))
    ends = np.cumsum(counts)
    parts = np.split(chosen, np.searchsorted(chosen, ends[:-1]))
    return [
        index.select(part - end + rows) for index, part, end, rows in zip(indexes, parts, ends, counts, strict=True)
    ]


def _mix(request: SetRequest, stores: list[SourceStore], folder: Path, meta: dict[str, Any]) -> None:
    """Draw the samples of the epoch and write the set."""
    config = request.config
    kept = [np.arange(len(store), dtype=np.int64) for store in stores]
    dropped = [np.zeros((0, 3), dtype=np.int64)]
    # Before shares and weights, which count distinct samples.
    if config.data.duplicates == "skip":
        for number, first in enumerate(first_of_each([store.samples["digest"] for store in stores])):
            dropped.append(_dropped(number, kept[number][~first], DUPLICATE))
            kept[number] = kept[number][first]
    if config.validation.share:
        kept = _own_side(request, stores, kept, dropped)
    blocks = [source for _, source in request.sources]
    available = [len(part) for part in kept]
    counts = epoch_counts(available, [s.repeat for s in blocks], [s.weight for s in blocks])
    if request.holds_out:
        counts = share_out(config.validation.max_samples or sum(available), available)
    drawn = []
    # A generator per source: how much one source draws does not shift the random numbers of the next.
    for number, (part, count) in enumerate(zip(kept, counts, strict=True)):
        drawn.append(draw(part, count, (config.seed_of("data"), number)))
        dropped.append(_dropped(number, np.setdiff1d(part, drawn[-1]), NOT_DRAWN))
    template = request.tokenize_config().chat_template
    tokenizer = ChatTokenizer(config.tokenizer_path, chat_template=template)
    meta |= {
        "tokenizer_path": str(config.tokenizer_path),
        "vocab_size": tokenizer.vocab_size,
        "pad_token_id": tokenizer.token_id("pad_token"),
        "eos_token_id": tokenizer.token_id("eos_token"),
        "turn_ends": _turn_ends(stores, tokenizer),
        "served_template": served_template(config.tokenizer_path, template, config.data),
    }
    write_set(folder, stores, drawn, np.concatenate(dropped), meta)


def _turn_ends(stores: Sequence[SourceStore], tokenizer: ChatTokenizer) -> list[list[Any]]:
    """Return [id, text, trained turns that end with it] of each control token, the most frequent first; the id is -1
    for turns that end without one."""
    counts: Counter[int] = Counter()
    for store in stores:
        counts.update({int(index): count for index, count in store.meta["turn_ends"].items()})
    return [
        [index, tokenizer.tokenizer.id_to_token(index) if index >= 0 else "", n] for index, n in counts.most_common()
    ]


def _own_side(
    request: SetRequest, stores: list[SourceStore], kept: list[NDArray[np.int64]], dropped: list[NDArray[np.int64]]
) -> list[NDArray[np.int64]]:
    """Return the samples of each store on this set's side of validation.share; appends the others to `dropped`."""
    share, seed = request.config.validation.share, request.config.seed_of("data")
    parts = []
    for number, (store, part) in enumerate(zip(stores, kept, strict=True)):
        # A unique number per row: all pieces of a split row must be on the same side.
        rows = (store.samples["file"].astype(np.int64) << 40) + store.samples["line"]
        own = held_out(store.samples["digest"], rows, share, seed)[part] == request.holds_out
        dropped.append(_dropped(number, part[~own], NOT_HELD_OUT if request.holds_out else HELD_OUT))
        parts.append(part[own])
    if not sum(map(len, parts)):
        use, fix = ("hold out", "raise") if request.holds_out else ("train on", "lower")
        raise ValueError(f"validation.share = {share} leaves no sample to {use} of {sum(map(len, kept))}; {fix} it")
    return parts


def record_places(folder: Path, places: list[dict[str, Any]]) -> None:
    """Write `places` into a set's meta.json (data/token_store.py), and the number of rows of each file in no split.

    Also writes the list of incomplete rows with these paths, if the source stores were built from other ones.
    """
    unread = [entry["file"] for place in places for entry in place["unread_files"] if entry["reason"] == NO_SPLIT]
    with tempfile.TemporaryDirectory(prefix=".count-", dir=folder.parent) as unpacked:
        rows = {file: count_rows(Path(file), Path(unpacked)) for file in unread}
    meta = {**read_meta(folder), "places": places, "unread_rows": rows}
    # In one step: another run may open the set at this moment.
    atomic_write(folder / "meta.json", json.dumps(meta, indent=1) + "\n")
    stores = TokenStore.open(folder).stores
    if any(store.files != store.meta["files"] for store in stores):
        lines = [json.dumps(row) + "\n" for store in stores for row in store.incomplete_rows()]
        atomic_write(folder / INCOMPLETE_ROWS, "".join(lines))
    else:
        (folder / INCOMPLETE_ROWS).unlink(missing_ok=True)


def _dropped(store: int, samples: NDArray[np.int64], reason: str) -> NDArray[np.int64]:
    """Return the rows of dropped.npy, int64 [n, 3]."""
    number, why = (np.full(len(samples), value, dtype=np.int64) for value in (store, DROPPED.index(reason)))
    return np.stack([number, samples, why], axis=1)


def share_out(total: int, counts: Sequence[int]) -> list[int]:
    """Divide at most `total` items among groups of `counts` items, in proportion, by largest remainder."""
    available = sum(counts)
    if total >= available:
        return list(counts)
    exact = [total * count / available for count in counts]
    shares = [int(value) for value in exact]
    by_remainder = sorted(range(len(counts)), key=lambda k: (shares[k] - exact[k], k))
    for k in by_remainder[: total - sum(shares)]:
        shares[k] += 1
    return shares


def epoch_counts(counts: Sequence[int], repeats: Sequence[float], weights: Sequence[float]) -> list[int]:
    """Return how many samples an epoch takes from each source, copies counted.

    A source without weight (0) gives repeat * count. Sources with weights give samples in proportion to them, as many
    as possible while none gives more than repeat * count.
    """
    limits = [repeat * count for count, repeat in zip(counts, repeats, strict=True)]
    weighted = [k for k, weight in enumerate(weights) if weight]
    # Samples per unit of weight; the source that runs out first decides.
    unit = min((limits[k] / weights[k] for k in weighted), default=0.0)
    return [round(unit * weights[k]) if weights[k] else round(limits[k]) for k in range(len(counts))]


def draw(samples: NDArray[np.int64], count: int, seed: Sequence[int]) -> NDArray[np.int64]:
    """Draw `count` of `samples` [n]: whole copies in their order, then a random share, sorted, for the rest."""
    if not len(samples):
        return samples
    copies, rest = divmod(count, len(samples))
    share = np.sort(np.random.default_rng(list(seed)).choice(len(samples), size=rest, replace=False))
    return np.concatenate([np.tile(samples, copies), samples[share]])


def first_of_each(digests: Sequence[NDArray[np.void]]) -> list[NDArray[np.bool_]]:
    """Return for each sample of each source whether no earlier sample, of any source so far, has its digest."""
    # Digests of dtype V16 do not sort; S16 compares them as bytes.
    _, first = np.unique(np.concatenate(list(digests)).view("S16"), return_index=True)
    is_first = np.zeros(sum(map(len, digests)), dtype=np.bool_)
    is_first[first] = True
    return np.split(is_first, np.cumsum([len(values) for values in digests])[:-1])


def held_out(digests: NDArray[np.void], rows: NDArray[np.int64], share: float, seed: int) -> NDArray[np.bool_]:
    """Return for each sample of a source whether it is held out: a share of the rows, random by `seed`.

    digests: of 16 bytes, [n]; rows: a number for the row of each sample, equal ones adjacent, [n]. The content of a
    row's first sample decides for all pieces of the row: equal rows of any source are on the same side, and a row stays
    there when other rows are added or removed.
    """
    first = np.ones(len(rows), dtype=np.bool_)
    first[1:] = rows[1:] != rows[:-1]
    words = np.ascontiguousarray(digests).view("<u8").reshape(-1, 2)[:, 0]
    drawn = _mix_bits(words ^ _mix_bits(np.array([seed], dtype=np.uint64)))
    return (drawn < np.uint64(int(share * 2.0**64)))[np.flatnonzero(first)[np.cumsum(first) - 1]]


def _mix_bits(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Apply SplitMix64's output function: every bit of a value affects every bit of the result."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def write_set(
    folder: Path,
    stores: Sequence[SourceStore],
    drawn: Sequence[NDArray[np.int64]],
    dropped: NDArray[np.int64],
    meta: dict[str, Any],
) -> None:
    """Write the set in `folder`, atomically (layout: data/token_store.py).

    drawn: samples of each store, copies included; dropped: int64 [n, 3]; meta: entries for meta.json.
    Raises ValueError if no sample is left, or the sources have too many names.
    """
    if not sum(map(len, drawn)):
        found = "; ".join(f"{store.files[0]}: {_reasons(store)}" for store in stores)
        raise ValueError(f"no sample is left to train on: {found}; fix the rows, or change [data]")
    names: dict[str, int] = {}
    columns: dict[str, list[NDArray[Any]]] = {
        name: [] for name in ("lengths", "loss_tokens", "sources", "stores", "places")
    }
    for number, (store, places) in enumerate(zip(stores, drawn, strict=True)):
        ids = np.array([names.setdefault(name, len(names)) for name in store.meta["source_names"]], dtype=np.int64)
        samples = store.samples[places]
        columns["lengths"].append(samples["length"])
        columns["loss_tokens"].append(samples["loss_tokens"])
        columns["sources"].append(ids[samples["source"]] if len(samples) else ids[:0])
        columns["stores"].append(np.full(len(places), number, dtype=np.uint16))
        columns["places"].append(places)
    if len(names) > MAX_SOURCE_NAMES:
        raise ValueError(
            f"more than {MAX_SOURCE_NAMES} different `source` values; give data.sources a name, or map no column"
        )
    totals = _totals(stores, drawn, dropped)
    # Renamed when complete: no reader ever sees half a set.
    temporary = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}")
    temporary.mkdir(parents=True)
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
    try:
        for name, parts in columns.items():
            dtype = np.uint16 if name == "sources" else parts[0].dtype
            np.save(temporary / f"{name}.npy", np.concatenate(parts).astype(dtype))
        np.save(temporary / "dropped.npy", dropped)
        (temporary / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
        commit_dir(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _totals(
    stores: Sequence[SourceStore], drawn: Sequence[NDArray[np.int64]], dropped: NDArray[np.int64]
) -> dict[str, int]:
    """Return TokenStore.totals. Each count is taken where it arises, and the sums must agree."""
    metas = [store.meta for store in stores]
    rows = {
        key: sum(meta[key] for meta in metas) for key in ("rows", "whole", "partly", "truncated", "split", "not_chosen")
    }
    excluded: Counter[str] = Counter()
    for meta in metas:
        excluded.update(meta["excluded"])
    trained = sum(len(np.unique(places)) for places in drawn)
    samples = sum(map(len, drawn))
    reasons = np.bincount(dropped[:, 2], minlength=len(DROPPED)).tolist()
    made = sum(map(len, stores))
    counted = sum(rows.values()) - rows["rows"] + excluded.total()
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
