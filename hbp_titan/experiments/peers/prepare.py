"""The model and the samples that every peer gets, rendered once by the data pipeline of hbp_titan.

Owns the folder inputs/ of a comparison: model/ (initial weights, tokenizer), train.jsonl (input_ids, labels, messages)
and the store of held-out samples. hbp_titan itself trains on the messages of the same file, so that the comparison of
tokens also covers its own tokenization.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hbp_titan.components.weights import initialize
from hbp_titan.data.prepare import open_stores
from hbp_titan.data.token_store import TokenStore
from hbp_titan.experiments.corpus import ensure_stdlib_corpus
from hbp_titan.experiments.peers.runners.protocol import IGNORE_INDEX
from hbp_titan.job_config import JobConfig
from hbp_titan.models.decoder import Decoder
from hbp_titan.models.flavors import FLAVORS
from hbp_titan.models.hf_export import save_hf_folder
from hbp_titan.packing import Level

TINY = "tiny"
"""Value of --model: the debug flavor with random weights, on the embedded corpus."""
CORPUS = Path(".data/stdlib")


@dataclass(frozen=True)
class Inputs:
    """What every peer gets.

    model, train: HF folder and JSONL. held_out: store of samples that nobody trains. lengths: tokens of each sample.
    left_out: number of rows that no peer gets, by reason.
    """

    model: Path
    train: Path
    held_out: TokenStore
    lengths: tuple[int, ...]
    left_out: dict[str, int]


def prepare(
    folder: Path,
    model: str,
    data: Sequence[str],
    held_out: Sequence[str],
    max_tokens: int,
    samples: int,
    multiple: int,
    seed: int,
) -> Inputs:
    """Write inputs/ into `folder`; return it.

    model: TINY or an HF folder with a tokenizer. data, held_out: chat data, as data.train_files; empty means the
    embedded corpus. samples: taken from `data` at random, a fifth of it from `held_out`; 0 takes all. multiple: the
    number of samples is a multiple of it, so that no peer drops or repeats some to fill its last micro-batch.
    Raises ValueError for data without held-out samples, and for a model folder with code, which ms-swift would run.
    """
    if bool(data) != bool(held_out):
        raise ValueError("--data and --held_out belong together; pass both, or neither for the embedded corpus")
    if not data:
        ensure_stdlib_corpus(CORPUS)
    inputs = folder / "inputs"
    hf_folder = _tiny_model(inputs / "model", seed) if model == TINY else Path(model)
    if code := sorted(path.name for path in hf_folder.glob("*.py")):
        raise ValueError(f"--model {model}: contains code ({', '.join(code)}), which a peer may run; remove it")
    config = JobConfig(levels=[Level(max_tokens)])
    config.model.hf_path = str(hf_folder)
    config.data.train_files = list(data) or [str(CORPUS / "train.jsonl")]
    config.data.validation_files = list(held_out) or [str(CORPUS / "validation.jsonl")]
    config.data.max_length_policy, config.data.duplicates = "skip", "skip"
    config.data.max_samples, config.validation.max_samples = samples, samples // 5
    config.data.seed, config.data.cache_folder = seed, str(folder / "cache")
    store, validation = open_stores(config, max_tokens)
    left_out: dict[str, int] = {}
    for row in store.incomplete_rows():
        if not row["samples"]:
            left_out[row["reason"]] = left_out.get(row["reason"], 0) + 1
    count = len(store) - len(store) % multiple
    if not count or not len(validation):
        raise ValueError(
            f"--max_tokens {max_tokens}, --samples {samples}: {len(store)} samples to train and {len(validation)} held "
            f"out are at most that long; at least {multiple} and 1 are needed"
        )
    if count < len(store):
        left_out["over a multiple of ranks and rows"] = len(store) - count
    path = inputs / "train.jsonl"
    inputs.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in _rows(store, count)), encoding="utf-8")
    return Inputs(hf_folder, path, validation, tuple(store.lengths[:count].tolist()), left_out)


def _tiny_model(out: Path, seed: int) -> Path:
    """Write the debug flavor with random weights as an HF folder, with the tokenizer of the embedded corpus."""
    args = FLAVORS["debug"]
    with torch.device("meta"):
        model = Decoder(args)
    initialize(model, args, torch.device("cpu"), seed, "")
    ensure_stdlib_corpus(CORPUS)
    save_hf_folder(
        args, model.named_parameters(), out, dtype=torch.float32, tokenizer_path=CORPUS / "tokenizer", overwrite=True
    )
    return out


def _rows(store: TokenStore, count: int) -> list[dict[str, Any]]:
    """Return the first rows: input_ids, labels, and the messages that they come from."""
    lines: dict[str, list[str]] = {}
    rows = []
    for index in range(count):
        tokens, trained = store.sample(index)
        file, number = store.where(index).rsplit(":", 1)
        if file not in lines:
            lines[file] = Path(file).read_text(encoding="utf-8").split("\n")
        row = json.loads(lines[file][int(number) - 1])
        if "messages" not in row:
            raise ValueError(f"{file}:{number}: no messages; the comparison takes JSONL with chat messages")
        labels = np.where(trained, tokens.astype(np.int64), IGNORE_INDEX)
        rows.append({"input_ids": tokens.tolist(), "labels": labels.tolist(), "messages": row["messages"]})
    return rows
