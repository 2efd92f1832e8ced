"""Token store: the samples of one epoch, of one source or a mixture of several, as planner and loader see them.

Owns the folder of such a set, which only points into source stores (source_store.py), and its reading. N samples,
copies counted:

    lengths.npy      int64  [N]   tokens of each sample
    loss_tokens.npy  int64  [N]   trained positions after the shift: loss_mask[1:].sum()
    sources.npy      uint16 [N]   index into source_names
    stores.npy       uint16 [N]   index into the source stores
    places.npy       int64  [N]   sample of that store
    dropped.npy      int64  [n,3] store, sample and reason (index into DROPPED) of samples that the epoch does not train
    meta.json        fingerprint, names, counts, folders of the source stores, tokenizer
"""

from __future__ import annotations

import json
import secrets
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hbp_titan.cli import Mistakes
from hbp_titan.data.store.source_store import FORMAT_VERSION, SourceStore, publish

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
        f"({count} of {len(store)} samples are): raise it, or set data.overlong to skip, truncate or split"
    )


def check_strict(store: TokenStore, most_shown: int) -> None:
    """Raise Mistakes, with the first `most_shown` of them, where any row is left out or cut (data.strict)."""
    lines: list[str] = []
    count = 0
    for entry in store.ledger():
        count += 1
        if len(lines) < most_shown:
            why = f"{entry['outcome']}: {entry['reason']}" if entry["outcome"] != entry["reason"] else entry["reason"]
            lines.append(f"{entry['file']}:{entry['line']}: {why}{': ' if entry['detail'] else ''}{entry['detail']}")
    if count:
        raise Mistakes(
            [*lines, f"data.strict: {count} rows are not trained whole; mend them or set data.strict = false"]
        )
