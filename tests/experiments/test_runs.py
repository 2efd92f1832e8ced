"""Runs of a study: what each changes, that finished ones are not repeated, and what is read from them."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from hbp_titan.config import load_config
from hbp_titan.experiments.study import runs as study_runs
from hbp_titan.experiments.study.runs import (
    VARIANTS,
    Launch,
    Run,
    make_runs,
    parse_variants,
    plan_metrics,
    plan_of,
    read_outcome,
    recall_by_distance,
    scores_recall,
    train_all,
)
from hbp_titan.job_config import DataSource


@dataclass(frozen=True)
class Lengths:
    lengths: np.ndarray
    loss_tokens: np.ndarray


# 64 samples of 100 tokens, half of them trained: 3,200 tokens in steps of 800.
STORE = Lengths(np.full(64, 100), np.full(64, 50))
SETTINGS = ["--levels=100:1,200:2", "--training.global_batch_tokens=1600", "--optimizer.lr=0.004"]

# Writes two steps, the second with an evaluation, and counts its starts.
PROGRAM = """
import json, pathlib, sys
folder = pathlib.Path(sys.argv[1]).parent
with (folder / "starts").open("a") as file:
    file.write("x")
step = {"loss": 3.0, "tokens": 100, "trained_tokens": 50, "step_seconds": 1.0, "token_weights": [0.5, 2.0]}
step["sources"] = {"a": {"samples": 3}, "b": {"samples": 2}}
bands = {"64": {"loss": 1.0, "trained_tokens": 1}, "128": {"loss": 3.0, "trained_tokens": 3}}
evaluated = {"loss": 2.5, "by_length": {**bands, "256": {"loss": 5.0, "trained_tokens": 1}}}
lines = [{**step, "step": 1, "validation": {"loss": 2.25}}, {**step, "step": 2, "tokens": 300, "validation": evaluated}]
(folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
"""


@dataclass(frozen=True)
class FakeLaunch(Launch):
    program: str = PROGRAM

    def command(self, config_file: Path) -> list[str]:
        return [sys.executable, "-c", self.program, str(config_file)]


def _runs(folder: Path, variants: str = "", seeds: tuple[int, ...] = (1, 2), program: str = PROGRAM) -> list[Run]:
    launch = FakeLaunch("single_process", 4, program)
    return make_runs(load_config(SETTINGS), folder, launch, STORE, parse_variants(variants), seeds)


def test_each_variant_changes_only_its_setting(tmp_path: Path) -> None:
    runs = {run.variant.name: run for run in _runs(tmp_path, seeds=(3,))}
    default = runs["hbp"].description.splitlines()
    changed = {}
    for name, run in runs.items():
        lines = zip(default, run.description.splitlines(), strict=True)
        changed[name] = [new for old, new in lines if new != old and "dump_folder" not in new]
    assert changed == {
        "hbp": [],
        "hbp_paper": ['method = "hbp_paper"'],
        "flat_sorted": ['method = "flat_sorted"'],
        "isf": ['method = "isf"'],
        "curriculum": ["curriculum_steps = 0.15"],
        "interleave": ['level_order = "interleave"'],
        "parallel": ['level_order = "parallel"'],
        "token_mean": ['loss_normalization = "token_mean"'],
        "sample_mean": ['loss_normalization = "sample_mean"'],
        # 64 samples in 4 steps are 800 trained tokens a step.
        "sum": ["max_norm = 800.0", 'loss_normalization = "sum"', "eps = 8e-06"],
        "half_rate": ["lr = 0.002"],
    }


def test_runs_are_ordered_by_seed_which_sets_order_weights_and_base(tmp_path: Path) -> None:
    config = load_config([*SETTINGS, "--checkpoint.initial_load_path=base/seed-{seed}/hf"])
    runs = make_runs(config, tmp_path, Launch("single_process", 4), STORE, parse_variants("isf"), (5, 7))
    assert [(run.variant.name, run.seed) for run in runs] == [("hbp", 5), ("isf", 5), ("hbp", 7), ("isf", 7)]
    last = runs[-1].config
    assert (last.packing.seed, last.training.seed, last.data.seed) == (7, 7, 42)
    assert last.checkpoint.initial_load_path == "base/seed-7/hf"
    assert runs[-1].folder == tmp_path / "isf" / "seed-7"


def test_all_runs_have_the_steps_of_the_shortest_plan(tmp_path: Path) -> None:
    lengths = np.random.default_rng(0).integers(20, 200, 300)
    store, variants, launch = Lengths(lengths, lengths // 2), parse_variants("isf"), Launch("single_process", 4)
    runs = make_runs(load_config(SETTINGS), tmp_path, launch, store, variants, (1, 2))
    plans = [plan_of(run.config, 4, store).num_steps for run in runs]
    # Padding makes plans of unequal length, or the test shows nothing.
    assert min(plans) < max(plans)
    assert {run.config.training.steps for run in runs} == {min(plans)}
    twice = make_runs(load_config([*SETTINGS, "--training.epochs=2"]), tmp_path, launch, store, variants, (1, 2))
    assert min(plans) * 2 - 2 <= twice[0].config.training.steps <= max(plans) * 2
    fewer = load_config([*SETTINGS, "--training.steps=2"])
    assert {run.config.training.steps for run in make_runs(fewer, tmp_path, launch, store, variants, (1,))} == {2}
    more = load_config([*SETTINGS, f"--training.steps={min(plans) + 1}"])
    with pytest.raises(ValueError, match=r"training\.steps"):
        make_runs(more, tmp_path, launch, store, variants, (1, 2))


def test_finished_runs_are_not_repeated(tmp_path: Path) -> None:
    lines: list[str] = []
    first = train_all(_runs(tmp_path, "isf", (1,)), 1, lines.append)
    # Stopped before it was written.
    (tmp_path / "hbp" / "seed-1" / "outcome.json").rename(tmp_path / "hbp" / "seed-1" / "outcome.partial")
    again = train_all(_runs(tmp_path, "isf"), 2, lines.append)
    assert again[:2] == first
    starts = {path.parent: path.read_text() for path in tmp_path.glob("*/*/starts")}
    assert {f"{folder.parent.name} {folder.name}": text for folder, text in starts.items()} == {
        "hbp seed-1": "xx",
        "isf seed-1": "x",
        "hbp seed-2": "x",
        "isf seed-2": "x",
    }
    assert "4 runs, 1 already finished; 2 at a time" in lines


def test_run_with_other_settings_raises(tmp_path: Path) -> None:
    train_all(_runs(tmp_path, "isf", (1,)), 1, lambda line: None)
    config = load_config([*SETTINGS, "--optimizer.lr=0.001"])
    runs = make_runs(config, tmp_path, FakeLaunch("single_process", 4), STORE, parse_variants("isf"), (1,))
    with pytest.raises(ValueError, match=r"'lr = 0\.004', now 'lr = 0\.001'"):
        train_all(runs, 1, lambda line: None)
    two_ranks = FakeLaunch("single_process", 2)
    runs = make_runs(load_config(SETTINGS), tmp_path, two_ranks, STORE, parse_variants("isf"), (1,))
    with pytest.raises(ValueError, match="4 ranks"):
        train_all(runs, 1, lambda line: None)


def test_failed_run_raises_with_its_last_line(tmp_path: Path) -> None:
    program = "print('started'); raise SystemExit('error: no such tokenizer')"
    with pytest.raises(RuntimeError, match="exit code 1: error: no such tokenizer"):
        train_all(_runs(tmp_path, "isf", (1,), program), 1, lambda line: None)
    assert not list(tmp_path.glob("*/*/outcome.json"))


def test_outcome_by_hand(tmp_path: Path) -> None:
    train_all(_runs(tmp_path, "isf", (1,)), 1, lambda line: None)
    outcome = read_outcome(tmp_path / "isf" / "seed-1", (128, 200))
    assert outcome["loss"] == 2.5
    assert (outcome["best"], outcome["best_step"], outcome["course"]) == (2.25, 1, [[1, 2.25], [2, 2.5]])
    # The bands up to 64 and 128 tokens are those of the first level; (1 + 3 * 3) / 4 = 2.5.
    assert outcome["by_length"] == {"128": {"loss": 2.5, "trained_tokens": 4}, "200": {"loss": 5, "trained_tokens": 1}}
    assert (outcome["steps"], outcome["samples"], outcome["tokens"], outcome["trained_tokens"]) == (2, 10, 400, 100)
    assert outcome["step_tokens"] == [200, 100]
    assert outcome["weight_ratio"] == 4
    assert json.loads((tmp_path / "isf" / "seed-1" / "outcome.json").read_text())["loss"] == 2.5


def test_plan_metrics_by_hand(tmp_path: Path) -> None:
    # 32 long samples and 32 short ones, a step holds 1,600 tokens: alternating, a step is all long or all short.
    lengths = np.repeat([100, 200], [32, 16])
    store = Lengths(lengths, np.repeat([60, 20], [32, 16]))
    config = load_config([*SETTINGS, "--packing.level_order=alternate"])
    runs = make_runs(config, tmp_path, Launch("single_process", 4), store, parse_variants("interleave"), (1,))
    alternating, mixed = (plan_metrics(run, store) for run in runs)
    # Two steps of 16 short samples, 960 trained tokens each, and two of 8 long ones, 160 each: mean 560.
    assert (alternating["long_spread"], alternating["trained_spread"]) == (0.5, 400 / 560)
    assert (mixed["long_spread"], mixed["trained_spread"]) == (0, 0)
    assert (alternating["cr"], alternating["pr"], alternating["abr"]) == (0.5, 0, 0)


def test_unknown_choices_raise() -> None:
    assert [variant.name for variant in parse_variants("sum,isf")] == ["hbp", "isf", "sum"]
    assert [variant.name for variant in parse_variants("")] == list(VARIANTS)
    with pytest.raises(ValueError, match="did you mean interleave"):
        parse_variants("interleaved")
    with pytest.raises(ValueError, match="--ranks 0"):
        Launch("single_process", 0)


def test_recall_is_counted_by_the_lengths_of_levels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = {"distance": [1, 100, 101, 150, 200], "correct": [True, False, True, True, False]}
    monkeypatch.setattr(study_runs, "open_stores", lambda config, limit: [None, None])
    monkeypatch.setattr(study_runs, "score_alone", lambda folder, store, config: scores)
    config = load_config(SETTINGS)
    assert not scores_recall(config)
    assert recall_by_distance(config) == {"100": {"answers": 2, "correct": 1}, "200": {"answers": 3, "correct": 2}}
    config.data.validation_sources = [DataSource("held_out.jsonl", name="recall")]
    assert scores_recall(config)
