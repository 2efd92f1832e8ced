"""The quality study as a whole: from a configuration to runs, figures, table and chart.

Owns the study that is there without a configuration (the debug data, a model of 0.35M parameters, four ranks in turn),
and the file that all is written to.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hbp_titan.config import JobConfig, load_config, to_toml
from hbp_titan.data.store.prepare import open_stores
from hbp_titan.models.hf import args_to_hf_config
from hbp_titan.models.registry import DEBUG
from hbp_titan.preflight import model_args, most_tokens
from hbp_titan.study.runs import Launch, figures_of, make_runs, train_all
from hbp_titan.study.variants import Variant

BUILT_IN = (
    "--job.config_file=train_configs/debug_model.toml",
    # Four ranks: 512 tokens each, or two packs of 2048 side by side. An optimizer step is four iterations of the one
    # or two of the other, so there are steps to interleave levels in.
    "--levels=512:1,2048:2",
    "--training.global_batch_tokens=8192",
    "--data.max_samples=2400",
    "--validation.max_samples=600",
    "--validation.interval=20",
    "--checkpoint.enable=false",
    "--data.num_workers=0",
    "--metrics.enable_tensorboard=false",
    "--metrics.log_interval=10",
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
"""The model of the built-in study: a run of it is half a minute of one CPU core."""


def base_config(overrides: Sequence[str], folder: Path) -> JobConfig:
    """The configuration that the variants change; the built-in one where `overrides` names no config file."""
    built_in: list[str] = []
    if not any(word.split("=")[0] == "--job.config_file" for word in overrides):
        built_in = [*BUILT_IN]
        if not any(word.startswith("--model.") for word in overrides):
            (folder / "model").mkdir(parents=True, exist_ok=True)
            text = json.dumps(args_to_hf_config(MODEL), indent=1)
            (folder / "model" / "config.json").write_text(text + "\n", encoding="utf-8")
            built_in.append(f"--model.hf_path={folder / 'model'}")
    config = load_config([*built_in, *overrides])
    if config.packing.levels == "auto" or not config.levels:
        raise ValueError(
            'a study compares runs on the same levels: name them in [[levels]], not packing.levels = "auto"'
        )
    if not (config.data.validation_files or config.data.validation_sources):
        raise ValueError("a study compares losses of held-out samples: data.validation_files is empty")
    config.validation.enable = True
    config.checkpoint.export_hf = config.metrics.progress_bar = config.packing.print_comparison = False
    return config


def run_study(
    config: JobConfig,
    folder: Path,
    launch: Launch,
    variants: Sequence[Variant],
    seeds: Sequence[int],
    parallel: int,
    report: Callable[[str], None],
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
