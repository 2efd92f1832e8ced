"""The built-in quality study: a small model, and a mixture of the embedded corpus and recall documents up to 8K tokens.

Owns its data, base models and settings. A base model has seen samples up to 128 tokens only; every variant continues
from it with samples up to 8,192. Recall documents (experiments/recall) ask for what is far back, and answers count as
right or wrong; the corpus measures the loss per token.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hbp_titan.config import JobConfig, check_values, load_config
from hbp_titan.data.prepare import open_stores
from hbp_titan.experiments.corpus import ensure_stdlib_corpus
from hbp_titan.experiments.recall.documents import add_words, mixed_lengths, write_documents
from hbp_titan.experiments.study.runs import RECALL, Launch, Report, Run, Variant, scores_recall, train_all
from hbp_titan.job_config import Data, DataSource
from hbp_titan.models.flavors import DEBUG
from hbp_titan.models.hf_config import args_to_hf_config

_COMMON = (
    "--checkpoint.enable=false",
    "--data.max_length_policy=skip",
    "--data.seed=0",
    "--data.num_workers=0",
    "--metrics.enable_tensorboard=false",
    "--metrics.log_interval=10",
    "--metrics.report=false",
    "--validation.enable=true",
    "--validation.interval=1000000",
    "--lr_scheduler.warmup_steps=0.05",
    "--optimizer.lr=3e-3",
)
BASE = (*_COMMON, "--levels=128:1", "--training.global_batch_tokens=512", "--checkpoint.initial_load_path=none")
"""The base model of the built-in study, one per seed."""
BUILT_IN = (
    *_COMMON,
    # Four ranks: four packs of 512 tokens, two of 2,048 or one of 8,192 in a micro-batch. An optimizer step is at least
    # one of the last, so that it can hold every level.
    "--levels=512:1,2048:2,8192:4",
    "--training.global_batch_tokens=8192",
)
"""The settings of the study without a configuration file."""

# Documents up to each bound, and rows of the corpus in all.
RECALL_DOCUMENTS = {
    "base": {128: 4500},
    "train": {512: 200, 2048: 50, 8192: 12},
    "held_out": {512: 60, 2048: 40, 8192: 24},
}
CORPUS_ROWS = {"base": 1500, "train": 420, "held_out": 160}
REWRITTEN = 0.3

MODEL = dataclasses.replace(
    DEBUG,
    name="debug_small",
    hf_model_type="llama",
    hidden_size=64,
    intermediate_size=176,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    rope_theta=100000.0,
    # 1 / sqrt(hidden_size): with 0.02 a model of this width takes many steps to start.
    initializer_range=0.1,
)
"""The model of the built-in study without the recall words of its vocabulary."""


def is_built_in(overrides: Sequence[str]) -> bool:
    """Return whether the command line has no configuration file."""
    return not any(word.split("=")[0] == "--job.config_file" for word in overrides)


def write_model_and_data(folder: Path) -> None:
    """Write model/ (configuration, tokenizer with the recall words) and the recall documents into `folder`."""
    if (folder / "model" / "config.json").exists():
        return
    corpus = Path(Data.embedded_folder)
    ensure_stdlib_corpus(corpus)
    shutil.copytree(corpus / "tokenizer", folder / "model", dirs_exist_ok=True)
    words = add_words(folder / "model")
    generator = np.random.default_rng(0)
    for name, counts in RECALL_DOCUMENTS.items():
        lengths = mixed_lengths(generator, list(counts), counts.values())
        write_documents(folder / f"recall_{name}.jsonl", lengths, int(generator.integers(1 << 31)), rewritten=REWRITTEN)
    model = dataclasses.replace(MODEL, vocab_size=words)
    # Last: its existence means that the folder is complete.
    (folder / "model" / "config.json").write_text(json.dumps(args_to_hf_config(model), indent=1), encoding="utf-8")


def _set_data(config: JobConfig, folder: Path, part: str) -> None:
    """Set the sources of training (`part`: base or train) and the held-out ones."""
    corpus = Path(Data.embedded_folder)
    config.data.sources = [
        DataSource(str(corpus / "train.jsonl"), limit=CORPUS_ROWS[part]),
        DataSource(str(folder / f"recall_{part}.jsonl"), name=RECALL),
    ]
    config.data.validation_sources = [
        DataSource(str(corpus / "validation.jsonl"), limit=CORPUS_ROWS["held_out"]),
        DataSource(str(folder / "recall_held_out.jsonl"), name=RECALL),
    ]


def train_bases(folder: Path, launch: Launch, seeds: Sequence[int], parallel: int, report: Report) -> None:
    """Train the base models of the built-in study that do not exist yet."""
    write_model_and_data(folder)
    runs = []
    for seed in seeds:
        config = load_config([*_needs_source(folder), *BASE, f"--model.hf_path={folder / 'model'}"])
        config.data.train_files, config.data.validation_files = [], []
        _set_data(config, folder, "base")
        config.data.seed = 1
        config.packing.seed = config.training.seed = seed
        config.packing.print_comparison = config.metrics.progress_bar = False
        config.job.dump_folder = str(folder / "base" / f"seed-{seed}")
        runs.append(Run(Variant("base", "the model that the runs start from"), seed, config, launch))
    # Prepared once: parallel runs would all prepare it.
    open_stores(runs[0].config, runs[0].config.levels[-1].max_tokens)
    train_all(runs, parallel, report)


def _needs_source(folder: Path) -> list[str]:
    # load_config checks that there is training data before the sources are set, which the command line cannot.
    return [f"--data.{key}_files={folder / 'recall_train.jsonl'}" for key in ("train", "validation")]


def study_config(overrides: Sequence[str], folder: Path) -> JobConfig:
    """Return the configuration that the variants change; the built-in one if `overrides` has no file.

    "{seed}" in checkpoint.initial_load_path stands for the seed of the run.
    """
    built_in = is_built_in(overrides)
    if built_in:
        base = folder / "base" / "seed-{seed}" / "hf"
        paths = [f"--model.hf_path={folder / 'model'}", f"--checkpoint.initial_load_path={base}"]
        overrides = [*_needs_source(folder), *BUILT_IN, *paths, *overrides]
    config = load_config(overrides)
    if built_in:
        config.data.train_files, config.data.validation_files = [], []
        _set_data(config, folder, "train")
    if config.packing.auto_levels or not config.levels:
        raise ValueError("a study compares runs on the same levels; set [[levels]] or --levels")
    config.validation.enable = True
    config.metrics.progress_bar = config.metrics.report = config.packing.print_comparison = False
    # Recall is scored on the exported weights.
    config.checkpoint.export_hf = scores_recall(config)
    # Again, because validation was switched on after load_config checked.
    check_values(config)
    return config
