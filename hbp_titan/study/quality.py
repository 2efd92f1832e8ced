"""The quality study as a whole: from a configuration to runs, figures, table and chart.

Owns the study that is there without a configuration, a small model on the debug data, and the file that all is
written to.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hbp_titan.config import JobConfig, load_config, to_toml
from hbp_titan.config_checks import check_values
from hbp_titan.data.store.prepare import open_stores
from hbp_titan.models.hf import args_to_hf_config
from hbp_titan.models.registry import DEBUG
from hbp_titan.preflight import model_args, most_tokens
from hbp_titan.study.runs import Launch, Report, Run, figures_of, make_runs, train_all
from hbp_titan.study.variants import Variant

_COMMON = (
    "--job.config_file=train_configs/debug_model.toml",
    "--training.global_batch_tokens=4096",
    "--validation.max_samples=400",
    "--checkpoint.enable=false",
    "--data.num_workers=0",
    "--metrics.enable_tensorboard=false",
    "--metrics.log_interval=10",
)
BASE = (
    *_COMMON,
    "--levels=256:1",
    "--data.max_samples=4000",
    "--data.seed=1",
    "--data.train_on=all",
    "--validation.interval=1000",
)
"""What the built-in study starts from, one model a seed: trained on every token of samples up to 256 tokens."""

BUILT_IN = (
    *_COMMON,
    # Four ranks: packs of 256 tokens each, or two packs of 1024 side by side. An optimizer step is four iterations of
    # the one or two of the other, so that there is something to interleave.
    "--levels=256:1,1024:2",
    "--data.max_samples=1200",
    "--validation.interval=20",
    "--optimizer.lr=2e-3",
)
"""What the study trains where no configuration is named."""

MODEL = dataclasses.replace(
    DEBUG,
    name="debug_small",
    hf_model_type="llama",
    hidden_size=64,
    intermediate_size=176,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
)
"""The model of the built-in study, 0.35M parameters: a run of it is half a minute of one CPU core."""


def is_built_in(overrides: Sequence[str]) -> bool:
    """Whether the command line names no configuration of its own."""
    return not any(word.split("=")[0] == "--job.config_file" for word in overrides)


def train_bases(folder: Path, launch: Launch, seeds: Sequence[int], parallel: int, report: Report) -> None:
    """Train what the runs of the built-in study start from, where it is not there yet."""
    (folder / "model").mkdir(parents=True, exist_ok=True)
    text = json.dumps(args_to_hf_config(MODEL), indent=1)
    (folder / "model" / "config.json").write_text(text + "\n", encoding="utf-8")
    runs = []
    for seed in seeds:
        config = load_config([*BASE, f"--model.hf_path={folder / 'model'}"])
        config.packing.seed = config.training.seed = seed
        config.packing.curriculum_steps = 0.0
        config.packing.print_comparison = config.metrics.progress_bar = False
        config.job.dump_folder = str(folder / "base" / f"seed-{seed}")
        runs.append(Run(Variant("base", "what the runs start from"), seed, config, launch))
    # Prepared once, before several runs look for it.
    open_stores(runs[0].config, runs[0].config.levels[-1].max_tokens)
    train_all(runs, parallel, report)


def study_config(overrides: Sequence[str], folder: Path) -> JobConfig:
    """The configuration that the variants change; the built-in one where `overrides` names none.

    "{seed}" in checkpoint.initial_load_path stands for the seed of the run.
    """
    if is_built_in(overrides):
        base = folder / "base" / "seed-{seed}" / "hf"
        paths = [f"--model.hf_path={folder / 'model'}", f"--checkpoint.initial_load_path={base}"]
        overrides = [*BUILT_IN, *paths, *overrides]
    config = load_config(overrides)
    if config.packing.levels == "auto" or not config.levels:
        raise ValueError("a study compares runs on the same levels: name them in [[levels]] or by --levels")
    config.validation.enable = True
    config.checkpoint.export_hf = config.metrics.progress_bar = config.packing.print_comparison = False
    check_values(config)
    return config


def run_study(
    config: JobConfig,
    folder: Path,
    launch: Launch,
    variants: Sequence[Variant],
    seeds: Sequence[int],
    parallel: int,
    report: Report,
) -> dict[str, Any]:
    """Train what is not trained yet; returns what study.json holds, and writes it.

    plans: figures of each variant's plan with the first seed. runs: one entry a run, `runs.read_outcome` says what.
    """
    # Prepared once, before several runs look for it.
    store = open_stores(config, most_tokens(config, model_args(config)))[0]
    runs = make_runs(config, folder, launch, store, variants, seeds)
    study = {
        "launch": launch.kind,
        "ranks": launch.ranks,
        "samples": len(store),
        "config": to_toml(config),
        "variants": {variant.name: variant.says for variant in variants},
        "plans": {run.variant.name: figures_of(run, store) for run in runs[: len(variants)]},
        "runs": train_all(runs, parallel, report),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "study.json").write_text(json.dumps(study, indent=1) + "\n", encoding="utf-8")
    return study
