"""Runs of the recall task on real ranks: the ordinary trainer, sound or with one fault, and the score of its answers.

Owns the settings, the faults and the scoring. A fault breaks every batch, in training and in scoring, as a mistake in
the training code would. The model is scored twice: by the ranks that trained it, on packs of their levels; and alone,
from the exported folder, in one process, one document at a time and without faults.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hbp_titan.config import JobConfig, load_config, to_toml
from hbp_titan.data.batch import PackedBatch, make_batch
from hbp_titan.data.prepare import open_stores
from hbp_titan.data.token_store import TokenStore
from hbp_titan.distributed.fsdp import reshard
from hbp_titan.distributed.world import World, gather_values
from hbp_titan.engine import Engine
from hbp_titan.evaluation.generate import load_model
from hbp_titan.experiments.recall.documents import (
    answers_in,
    first_word_id,
    mixed_lengths,
    write_documents,
    write_tokenizer,
)
from hbp_titan.models.configs import ModelArgs
from hbp_titan.models.documents import HeadTailShard, pack_documents
from hbp_titan.models.hf_config import args_to_hf_config
from hbp_titan.packing import Level
from hbp_titan.packing.level import level_name
from hbp_titan.preflight import max_sample_tokens, model_args
from hbp_titan.testing.equivalence_cases import BREAKAGES
from hbp_titan.testing.local_ranks import run_distributed
from hbp_titan.train import Trainer
from hbp_titan.utils import atomic_write

MODEL = ModelArgs(
    name="recall",
    hf_model_type="llama",
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=4,
    # Fewer than the largest cp degree: the exchange repeats them.
    num_kv_heads=2,
    head_dim=32,
    vocab_size=0,
    max_position_embeddings=65536,
    rope_theta=100000.0,
    norm_eps=1e-5,
    initializer_range=0.1,
)
"""The model, without the size of its vocabulary."""

LEVELS = (Level(256), Level(1024, 2, ac_policy="keep_attention"), Level(4096, 4, ac_policy="full"))
SETTINGS = {
    "checkpoint.initial_load_path": "none",
    "checkpoint.interval": 1 << 20,
    "data.num_workers": 0,
    "packing.curriculum_steps": 0.3,
    "packing.print_comparison": "false",
    # One micro-batch of the lowest level: the task is learned in many small steps.
    "training.global_batch_tokens": 1024,
    "optimizer.lr": 4e-3,
    "lr_scheduler.warmup_steps": 40,
    "validation.interval": 1 << 20,
    "metrics.enable_tensorboard": "false",
    "metrics.log_interval": 20,
    "metrics.progress_bar": "false",
    "metrics.report": "false",
}
DOCUMENTS = {"train": (5000, 500, 250), "held_out": (120, 60, 60)}
"""Documents whose length needs each level."""


def attention_within_shards(batch: PackedBatch) -> PackedBatch:
    """Return the batch with documents cut where the shards of its cp ranks begin: no rank reads another's tokens.

    Attention still runs over the exchanged pack; cut so, it computes what each rank's own shard would.
    """
    if isinstance(batch.documents, HeadTailShard):
        raise ValueError('levels: shards of gathered keys are not contiguous; use cp_style = "ulysses" for this fault')
    ends = np.cumsum(batch.lengths)
    cuts = np.union1d(ends, np.arange(len(batch.input_ids), ends[-1] + 1, len(batch.input_ids)))
    return dataclasses.replace(batch, documents=pack_documents(np.diff(cuts, prepend=0)))


FAULTS: dict[str, Callable[[PackedBatch], PackedBatch]] = {
    "sound": lambda batch: batch,
    "mask": BREAKAGES["attention across documents"],
    "positions": BREAKAGES["positions not reset"],
    "cp": attention_within_shards,
}
"""How a run breaks its batches: not at all; documents of a pack see each other; positions count through each rank's
shard; no rank sees another's shard."""

Scores = dict[str, list[Any]]
"""One entry per answer in each list: level (index), distance (tokens from the value to the question), ranks_away (of
the shards that hold them), documents_before (in the pack), rewritten, correct."""
FIELDS = ("level", "distance", "ranks_away", "documents_before", "rewritten", "correct")


def write_run(
    folder: Path, levels: Sequence[Level] = LEVELS, documents: Mapping[str, Sequence[int]] = DOCUMENTS
) -> None:
    """Write data, tokenizer, model configuration and recall.toml into `folder` if it has none."""
    path = folder / "recall.toml"
    if path.exists():
        return
    generator = np.random.default_rng(0)
    for name, counts in documents.items():
        lengths = mixed_lengths(generator, [level.max_tokens for level in levels], counts)
        write_documents(folder / f"{name}.jsonl", lengths, seed=int(generator.integers(1 << 31)))
    model = dataclasses.replace(MODEL, vocab_size=write_tokenizer(folder / "model"))
    (folder / "model" / "config.json").write_text(json.dumps(args_to_hf_config(model), indent=1), encoding="utf-8")
    config = load_config(
        [f"--{key}={value}" for key, value in SETTINGS.items()] + [f"--data.train_files={folder / 'train.jsonl'}"]
    )
    config.levels = list(levels)
    config.model.hf_path = str(folder / "model")
    config.data.validation_files = [str(folder / "held_out.jsonl")]
    config.data.cache_folder = str(folder / "cache")
    config.validation.enable = True
    # Last: its existence means that the folder is complete.
    atomic_write(path, to_toml(config))


def train_and_score(folder: Path, overrides: Sequence[str], fault: str, ranks: int) -> dict[str, Any]:
    """Return the outcome of one run of `folder`, which trains on `ranks` gloo ranks unless outcome.json exists.

    Keys: config (TOML), levels (names), shards (tokens of a rank), packed and alone (Scores), steps, tokens, loss.
    ValueError if the finished run had other settings.
    """
    run = folder / fault
    argv = [f"--job.config_file={folder / 'recall.toml'}", f"--job.dump_folder={run}", *overrides]
    config = load_config(argv)
    settings = f"# {ranks} ranks, fault {fault}\n{to_toml(config)}"
    path = run / "outcome.json"
    if path.exists():
        outcome: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if outcome["config"] != settings:
            raise ValueError(f"{run} contains a run with other settings; use another --folder")
        return outcome
    # Prepared here, with all cores; the ranks find it.
    store = open_stores(config, max_sample_tokens(config, model_args(config)))[1]
    packed = run_distributed(_train_rank, ranks, argv, fault, timeout=7200)[0]
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    outcome = {
        "config": settings,
        "levels": [level_name(level) for level in config.levels],
        "shards": [level.max_tokens // level.cp_degree for level in config.levels],
        "packed": packed,
        "alone": score_alone(run / "hf", store, config),
        "steps": len(steps),
        "tokens": sum(step["tokens"] for step in steps),
        "loss": steps[-1]["validation"]["loss"],
    }
    atomic_write(path, json.dumps(outcome) + "\n")
    return outcome


def _train_rank(world: World, argv: list[str], fault: str) -> Scores:
    """Train with `fault`, then score the held-out documents; only rank 0's result is complete."""
    trainer = Trainer(load_config(argv), world)
    breakage = FAULTS[fault]
    engine = trainer.engine
    sound = engine.forward_backward

    def broken(batch: PackedBatch, last: bool = True) -> Tensor:
        return sound(breakage(batch), last)

    engine.forward_backward = broken  # type: ignore[method-assign]
    trainer.train()
    assert trainer.validator is not None
    first_word = first_word_id(trainer.config.tokenizer_path)
    rows = [
        row
        for batch in trainer.validator.loader()
        for row in _answers(trainer.held_out[0], first_word, batch, _correct(engine, breakage(batch)))
    ]
    # Each cp rank has the answers of its own shard.
    return _scores([row for part in gather_values(rows) for row in part])


@torch.no_grad()
def _correct(engine: Engine, batch: PackedBatch) -> Tensor:
    """Return whether the likeliest token is the label, bool [L], in the order of loss_index. A collective."""
    engine.runtime.activate(batch.level)
    labels_L = batch.labels[batch.loss_index]

    def head(hidden_TH: Tensor, weight_VH: Tensor) -> Tensor:
        return (hidden_TH[batch.loss_index] @ weight_VH.T).argmax(dim=-1) == labels_L

    correct_L: Tensor = engine.model(batch.input_ids, batch.position_ids, batch.documents, head)
    # Without a backward FSDP leaves the root's parameters gathered.
    reshard(engine.model)
    return correct_L


def _answers(store: TokenStore, first_word: int, batch: PackedBatch, correct_L: Tensor) -> list[tuple[Any, ...]]:
    """Return FIELDS of each answer in the shard of this rank. batch: without the fault."""
    shard, starts, rows = len(batch.input_ids), np.cumsum(batch.lengths) - batch.lengths, []
    numbers, places = batch.document_ids[batch.loss_index].tolist(), batch.position_ids[batch.loss_index].tolist()
    answers = {
        (number, answer.place): answer
        for number in set(numbers)
        for answer in answers_in(store.sample(int(batch.sample_ids[number]))[0], first_word)
    }
    for number, place, correct in zip(numbers, places, correct_L.tolist(), strict=True):
        # Turn ends are trained too and are not answers.
        if answer := answers.get((number, place)):
            asked, written = ((starts[number] + index) // shard for index in (place, answer.written))
            away = int(asked - written)
            rows.append((batch.level, place - answer.written, away, number, answer.rewritten, correct))
    return rows


def _scores(rows: Sequence[tuple[Any, ...]]) -> Scores:
    return {name: [row[column] for row in rows] for column, name in enumerate(FIELDS)}


def score_alone(model_folder: Path, store: TokenStore, config: JobConfig) -> Scores:
    """Return the answers of an HF folder in this process: each document alone, no levels' packs, no cp ranks."""
    model = load_model(model_folder, torch.device("cpu"))
    first_word = first_word_id(config.tokenizer_path)
    bounds = [level.max_tokens for level in config.levels]
    rows: list[tuple[Any, ...]] = []
    for index, tokens in enumerate(store.lengths.tolist()):
        # Other text is held out too in a mixture.
        if not answers_in(store.sample(index)[0], first_word):
            continue
        batch = make_batch(store, [index], Level(tokens), 0, 1)

        def head(hidden_TH: Tensor, weight_VH: Tensor, batch: PackedBatch = batch) -> Tensor:
            logits_LV = hidden_TH[batch.loss_index] @ weight_VH.T
            return logits_LV.argmax(dim=-1) == batch.labels[batch.loss_index]

        with torch.no_grad():
            correct_L = model(batch.input_ids, batch.position_ids, batch.documents, head)
        # The level that a document of this length is packed into by training.
        level = int(np.searchsorted(bounds, tokens))
        rows += [(level, *row[1:]) for row in _answers(store, first_word, batch, correct_L)]
    return _scores(rows)
