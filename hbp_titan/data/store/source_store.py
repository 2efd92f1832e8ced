"""The store of one source: its shards and, over all of them, where each sample is and which row it comes from.

Owns the folder of a source, made once per fingerprint, and its reading through memory maps. N samples:

    shard-00000/ ...             (data/store/shards.py)
    samples.npy      PLACED [N]  the shards' samples one after the other, with the shard and the place in it
    not_chosen.npy   int64 [n,2] file and line of the rows outside data.max_samples or the source's limit
    ledger.jsonl     the shards' ledgers one after the other
    meta.json        fingerprint, files, names of sources, counts
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hbp_titan.cli import Mistakes
from hbp_titan.data.sources.row_files import RowIndex
from hbp_titan.data.store.shards import SAMPLE, Shard, ShardReport, cut_shards, read_report, write_shards
from hbp_titan.data.store.team import Team
from hbp_titan.data.store.tokenize_rows import EXCLUDED, SPLIT, TRUNCATED, Recipe

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
    recipe: Recipe,
    team: Team,
    num_proc: int,
    most_faults: int,
    skip_malformed: bool,
    progress: Callable[[int], None],
) -> None:
    """Make the store in `folder`, by all ranks of `team` together; what an earlier, killed call left is used.

    indexes: all rows of the source's files; chosen: those to tokenize. progress: told of rows done by this rank.
    Raises Mistakes "file:line: ..." with the first `most_faults` malformed rows unless `skip_malformed`.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    shards = cut_shards(chosen)

    def make_own() -> None:
        own = [shards[number] for number in team.share(len(shards))]
        with _unless_there(folder):
            for report in write_shards(partial, own, recipe, num_proc, most_faults):
                if report.malformed and not skip_malformed:
                    raise malformed_rows(report.faults, report.malformed)
                progress(report.rows)

    team.run(make_own)

    def finish() -> None:
        with _unless_there(folder):
            _finish(partial, fingerprint, indexes, chosen, shards)
            publish(partial, folder)
        shutil.rmtree(partial, ignore_errors=True)

    team.run(finish if team.rank == 0 else lambda: None)


@contextmanager
def _unless_there(folder: Path) -> Iterator[None]:
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


def malformed_rows(faults: list[str], count: int) -> Mistakes:
    """The error of `count` malformed rows, the first of which are `faults`."""
    if count == 1:
        return Mistakes([f'{faults[0]}; mend the row, or set data.malformed = "skip" to leave it out and list it'])
    more = f"{count - len(faults)} more malformed rows are not shown; " if count > len(faults) else ""
    return Mistakes([*faults, f'{more}mend the rows, or set data.malformed = "skip" to leave them out and list them'])


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
