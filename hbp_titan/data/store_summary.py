"""What commands print about a token store: a summary per source, the row accounting, samples with trained tokens."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hbp_titan.config import JobConfig
from hbp_titan.data.chat_template import ChatTemplate
from hbp_titan.data.files import NO_SPLIT, chat_template_file
from hbp_titan.data.template_probes import call_forms
from hbp_titan.data.token_store import DROPPED, INCOMPLETE_ROWS, TokenStore
from hbp_titan.data.tokenizer import read_tokenizer_folder
from hbp_titan.utils import first_n

MAX_SOURCES_SHOWN = 30
# Columns and files of a kind that are not read.
MAX_SHOWN = 20
_SHADES = " .:-=+*#%@"
_GREEN, _RESET = "\x1b[32m", "\x1b[0m"


def summary(store: TokenStore) -> str:
    """Return counts, tokens, trained tokens, percentiles and histogram of each source, what of its data is not read,
    and the row accounting.
    """
    lengths = store.lengths
    columns = f"{'source':24} {'samples':>9} {'tokens':>13} {'trained':>13} {'p50':>7} {'p90':>7} {'p99':>7} {'max':>7}"
    top = int(np.log2(lengths.max())) + 1
    lines = [f"{columns}  2^0..2^{top} tokens"]
    counts = np.bincount(store.sources, minlength=len(store.source_names))
    # The largest first; many data sets have thousands of small sources.
    for source in np.argsort(-counts, kind="stable")[:MAX_SOURCES_SHOWN]:
        lines.append(_source_line(store.source_names[source], store, store.sources == source, top))
    if len(counts) > MAX_SOURCES_SHOWN:
        lines.append(f"... and {len(counts) - MAX_SOURCES_SHOWN} smaller sources")
    lines.append(_source_line("all", store, np.ones(len(store), dtype=bool), top))
    accounting, _ = check_totals(store.totals(), len(store))
    incomplete = [
        source.folder
        for source in store.stores
        if any(source.meta[key] for key in ("partly", "truncated", "split", "excluded", "notes"))
    ]
    if incomplete and (store.folder / INCOMPLETE_ROWS).is_file():
        incomplete = [store.folder]
    listed = [f"  listed in {folder / INCOMPLETE_ROWS}" for folder in incomplete]
    return "\n".join([*lines, *unread(store), *_turns(store), *accounting, *listed])


def _turns(store: TokenStore) -> list[str]:
    """Return what trained turns end with, and one line per source with the notes of its rows."""
    ends = [
        f"{text} ({index}) {count:,}" if index >= 0 else f"none {count:,}" for index, text, count in store.turn_ends
    ]
    lines = [f"trained turns by end token: {', '.join(ends)}"] if ends else []
    for source in store.stores:
        if notes := source.meta["notes"]:
            rows = [f"{count:,} rows: {note}" for note, count in notes.items()]
            lines.append(
                f"noted: {', '.join(source.meta['source_names'][:3]) or source.files[0]}: {first_n(rows, MAX_SHOWN)}"
            )
    return lines


def unread(store: TokenStore) -> list[str]:
    """Return one line per kind of data of each source that is not read: columns, empty files, files of its folder.

    A further line names the files that several sources read.
    """
    lines = []
    times = Counter(os.path.abspath(file) for source in store.stores for file in source.files)
    if several := sorted(file for file, count in times.items() if count > 1):
        lines.append(f"read by several sources: {first_n(several, MAX_SHOWN)}")
    for source, place in zip(store.stores, store.places, strict=True):
        where = source.files[0] if len(source.files) == 1 else os.path.commonpath(source.files) or "."
        if columns := source.meta["unread_columns"]:
            listed = [f"{name!a} ({count:,} rows)" for name, count in columns.items()]
            lines.append(f"not read: {where}: columns {first_n(listed, MAX_SHOWN)}")
        if absent := source.meta["absent_columns"]:
            lines.append(f"not found: {where}: columns {first_n([ascii(name) for name in absent], MAX_SHOWN)}")
        if empty := source.empty_files():
            lines.append(f"not read: {len(empty)} files without rows: {first_n(empty, MAX_SHOWN)}")
        reasons: dict[str, list[str]] = {}
        for entry in place.get("unread_files", []):
            if os.path.abspath(entry["file"]) in times:
                continue
            file, rows = entry["file"], store.meta["unread_rows"].get(entry["file"])
            counted = f" ({rows:,} rows)" if rows is not None else " (not readable)"
            reasons.setdefault(entry["reason"], []).append(file + (counted if entry["reason"] == NO_SPLIT else ""))
        lines += [f"not read: files {reason}: {first_n(files, MAX_SHOWN)}" for reason, files in reasons.items()]
    return lines


def _source_line(name: str, store: TokenStore, chosen: NDArray[np.bool_], top: int) -> str:
    lengths, trained = store.lengths[chosen], int(store.loss_tokens[chosen].sum())
    if not len(lengths):
        # All samples of a small source may be held out, or none.
        return f"{name[:24]:24} {0:9} {0:13} {0:13}"
    p50, p90, p99 = np.percentile(lengths, [50, 90, 99])
    numbers = f"{len(lengths):9,} {lengths.sum():13,} {trained:13,} {p50:7,.0f} {p90:7,.0f} {p99:7,.0f}"
    # One character per power of two: the darker, the more samples.
    counts = np.bincount(np.log2(lengths).astype(np.int64), minlength=top)
    shades = np.ceil(counts / counts.max() * (len(_SHADES) - 1)).astype(np.int64)
    return f"{name[:24]:24} {numbers} {lengths.max():7,}  |{''.join(_SHADES[shade] for shade in shades)}|"


def check_totals(totals: Mapping[str, int], samples: int) -> tuple[list[str], list[str]]:
    """Return the sums of `TokenStore.totals` as lines, and one line per sum that does not add up.

    samples: number of samples in the store.
    """
    outcomes = [key for key in totals if key.startswith("excluded: ")]
    sums = {
        "rows": ["whole", "partly", "truncated", "split", *outcomes, "not_chosen"],
        "samples_made": [*DROPPED, "trained"],
        "samples": ["trained", "copies"],
    }
    lines, errors = [], []
    for whole, parts in sums.items():
        text = " + ".join(f"{totals[part]:,} {part}" for part in parts if totals[part]) or "0"
        lines.append(f"accounting: {totals[whole]:,} {whole} = {text}")
        if totals[whole] != sum(totals[part] for part in parts):
            errors.append(f"accounting: {totals[whole]:,} {whole} != {text}")
    if totals["samples"] != samples:
        errors.append(f"accounting: {totals['samples']:,} samples, but the store has {samples:,}")
    return lines, errors


def template_line(config: JobConfig) -> str:
    """Return which chat template the samples of a configuration are rendered with, and what it gets."""
    data = config.data
    folder = read_tokenizer_folder(config.tokenizer_path, chat_template_file(data.chat_template))
    tools = ", tool_use for rows with tools" if folder.tool_template else ""
    for_calls = dataclasses.replace(folder, chat_template=folder.tool_template or folder.chat_template)
    form = call_forms(ChatTemplate(for_calls, data.template_date))[0]
    variables = json.dumps(data.chat_template_kwargs) if data.chat_template_kwargs else "none but the rows' own"
    given = f"strftime_now: {data.template_date}; variables: {variables}; {form}"
    return f"chat template: {folder.template_name}{tools}; {given}"


def show_samples(store: TokenStore, count: int, tokenizer_path: Path) -> str:
    """Return the first `count` samples as text with their trained tokens in green."""
    tokenizer = read_tokenizer_folder(tokenizer_path).load()
    blocks = []
    for index in range(min(count, len(store))):
        tokens, loss_mask = store.sample(index)
        boundaries = [0, *(np.flatnonzero(np.diff(loss_mask)) + 1), len(tokens)]
        text = ""
        for start, end in itertools.pairwise(boundaries):
            piece = tokenizer.decode(tokens[start:end].tolist(), skip_special_tokens=False)
            text += f"{_GREEN}{piece}{_RESET}" if loss_mask[start] else piece
        source = store.source_names[store.sources[index]]
        counted = f"{len(tokens)} tokens, {store.loss_tokens[index]} trained"
        blocks.append(f"--- sample {index} ({store.where(index)}, {source}, {counted})\n{text}")
    return "\n".join(blocks)
