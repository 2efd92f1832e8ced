"""What a person sees of a token store: the summary per source, and samples with their trained tokens coloured."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from hbp_titan.data.store.ledger import check_ledger
from hbp_titan.data.store.token_store import TokenStore

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
