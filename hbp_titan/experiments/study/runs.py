"""The runs of a study: each variant with each seed, an ordinary training run in a folder of its own.

Owns their settings and their order, how they are started, several at a time, and what is read from them when they are
done. A finished run has an outcome.json beside its run.toml and is not repeated; one that was stopped goes on from its
checkpoint where it has one, or starts anew.

The variants of the quality study: a default, and others that change one thing of it each.

Owns the names, what each changes and the settings that follow from the data. The default is HBP with its levels in
random alternation from the first step on, without curriculum, so that the methods of one length, which can have none,
differ from it in packing alone.
"""

from __future__ import annotations

import copy
import difflib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import hbp_titan
from hbp_titan.config import JobConfig, to_toml
from hbp_titan.data.epoch import EpochPlans, SampleLengths
from hbp_titan.packing import Plan, measure
from hbp_titan.packing.level import check_levels
from hbp_titan.preflight import cost_model, model_args

CURRICULUM = 0.15
"""Share of all steps that train the lowest level alone."""


@dataclass(frozen=True)
class Variant:
    """changes(config, step_tokens) changes the default's settings; step_tokens: trained tokens of a mean step."""

    name: str
    says: str
    changes: Callable[[JobConfig, float], None] = lambda config, step_tokens: None


def _method(name: str) -> Callable[[JobConfig, float], None]:
    def change(config: JobConfig, step_tokens: float) -> None:
        config.packing.method = name

    return change


def _normalizer(name: str) -> Callable[[JobConfig, float], None]:
    def change(config: JobConfig, step_tokens: float) -> None:
        config.training.loss_normalization = name

    return change


def _sum(config: JobConfig, step_tokens: float) -> None:
    # AdamW's update is the same for gradients of another scale if the clipping norm and epsilon have that scale too. So
    # the learning rate stays, and what is left is what `sum` is about: steps with more trained tokens weigh more.
    config.training.loss_normalization = "sum"
    config.training.max_norm *= step_tokens
    config.optimizer.eps *= step_tokens


def _curriculum(config: JobConfig, step_tokens: float) -> None:
    config.packing.curriculum_steps = CURRICULUM


def _interleave(config: JobConfig, step_tokens: float) -> None:
    config.packing.level_order = "interleave"


def _half_rate(config: JobConfig, step_tokens: float) -> None:
    config.optimizer.lr /= 2


DEFAULT = "hbp"
VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant(DEFAULT, "the default: levels, alternate, no curriculum, ave_token"),
        Variant("hbp_paper", "packing as the paper prints it", _method("hbp_paper")),
        Variant("flat_sorted", "one length, packs sorted by cost", _method("flat_sorted")),
        Variant("isf", "one length, packs in random order", _method("isf")),
        Variant("curriculum", f"the first {CURRICULUM:.0%} of the steps train the lowest level", _curriculum),
        Variant("interleave", "every step has its share of every level", _interleave),
        Variant("token_mean", "normalizer", _normalizer("token_mean")),
        Variant("sample_mean", "normalizer", _normalizer("sample_mean")),
        Variant("sum", "normalizer; clipping norm and epsilon times the mean step's trained tokens", _sum),
        Variant("half_rate", "yardstick: half the learning rate", _half_rate),
    )
}


def parse_variants(text: str) -> list[Variant]:
    """From "isf,sum": those of VARIANTS in their order, the default always among them; "" is all."""
    names = [word.strip() for word in text.split(",")] if text else list(VARIANTS)
    for name in names:
        if name not in VARIANTS:
            close = "".join(f"; did you mean {near}?" for near in difflib.get_close_matches(name, VARIANTS, n=1))
            raise ValueError(f"--variants {text}: {name!r} is none of {', '.join(VARIANTS)}{close}")
    return [variant for name, variant in VARIANTS.items() if name in (*names, DEFAULT)]


LAUNCHES = ("in_turn", "torchrun")

Report = Callable[[str], None]
"""Tells of progress, a line at a time."""


@dataclass(frozen=True)
class Launch:
    """How a run is started. ranks: that its plans are for. kind: "in_turn", one process that trains the packs of all
    ranks one after another, or "torchrun", so many ranks on this machine."""

    kind: str
    ranks: int

    def __post_init__(self) -> None:
        assert self.kind in LAUNCHES
        if self.ranks < 1:
            raise ValueError(f"--ranks {self.ranks} must be at least 1")

    def command(self, config_file: Path) -> list[str]:
        """What starts the run that `config_file` describes."""
        train = ["hbp_titan.experiments.study.in_turn", f"--ranks={self.ranks}"]
        if self.kind == "torchrun":
            ranks = [f"--nproc-per-node={self.ranks}", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
            train = ["torch.distributed.run", *ranks, "-m", "hbp_titan.train"]
        return [sys.executable, "-m", *train, f"--job.config_file={config_file}"]


@dataclass(frozen=True)
class Run:
    """One variant with one seed."""

    variant: Variant
    seed: int
    config: JobConfig
    launch: Launch

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.config.dump_folder

    @property
    def description(self) -> str:
        """run.toml: all that decides what the run gives."""
        return f"# {self.launch.kind}, plans for {self.launch.ranks} ranks\n{to_toml(self.config)}"

    def outcome(self) -> dict[str, Any] | None:
        """What the finished run gave, None where it is not finished; ValueError where that was with other settings."""
        path, described = self.folder / "outcome.json", self.folder / "run.toml"
        if not path.exists():
            return None
        before, now = (text.splitlines() for text in (described.read_text(encoding="utf-8"), self.description))
        if before != now:
            old, new = next((a, b) for a, b in zip([*before, ""], [*now, ""], strict=False) if a != b)
            raise ValueError(
                f"{self.folder} holds a run with other settings: {old!r}, now {new!r}; name another --folder"
            )
        return json.loads(path.read_text(encoding="utf-8"))

    def train(self, threads: int) -> dict[str, Any]:
        """Train, or go on; returns the outcome. RuntimeError, with the last line that the run said, where it fails."""
        finished = self.outcome()
        if finished is not None:  # meanwhile, by another command on the same folder
            return finished
        self.folder.mkdir(parents=True, exist_ok=True)
        described = self.folder / "run.toml"
        described.write_text(self.description, encoding="utf-8")
        root = str(Path(hbp_titan.__file__).resolve().parents[1])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {"OMP_NUM_THREADS": str(threads), **os.environ, "PYTHONPATH": path}
        log = self.folder / "log.txt"
        with log.open("w", encoding="utf-8") as file:
            status = subprocess.call(
                self.launch.command(described), env=environment, stdout=file, stderr=subprocess.STDOUT
            )
        if status:
            said = [line for line in log.read_text(encoding="utf-8").splitlines() if line.strip()]
            raise RuntimeError(f"{self.folder} failed with exit code {status}: {said[-1] if said else ''} ({log})")
        outcome = read_outcome(self.folder)
        partial = self.folder / "outcome.partial"
        partial.write_text(json.dumps(outcome) + "\n", encoding="utf-8")
        partial.replace(self.folder / "outcome.json")
        return outcome


def read_outcome(folder: Path) -> dict[str, Any]:
    """What metrics.jsonl says of a finished run: losses of the held-out samples, and what its steps were like.

    loss, by_length: after the last step, per trained token. best: the lowest of all evaluations, after step best_step.
    step_tokens: mean and standard deviation over the steps. weight_ratio: how many times the weight of the lightest
    token of its step the heaviest one has, median over the steps.
    """
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [json.loads(line) for line in lines]
    course = [[step["step"], step["validation"]["loss"]] for step in steps if "validation" in step]
    last = steps[-1]["validation"]
    tokens = [step["tokens"] for step in steps]
    ratios = [heaviest / lightest for lightest, heaviest in (step["token_weights"] for step in steps) if lightest]
    end = [step for step in steps[-max(len(steps) // 10, 1) :] if step["loss"] is not None]
    best_step, best = min(course, key=lambda point: point[1])
    return {
        "loss": last["loss"],
        "by_length": last.get("by_length", {}),
        "best": best,
        "best_step": best_step,
        "course": course,
        "train_loss": sum(s["loss"] * s["trained_tokens"] for s in end) / sum(s["trained_tokens"] for s in end),
        "steps": len(steps),
        "tokens": sum(tokens),
        "trained_tokens": sum(step["trained_tokens"] for step in steps),
        "step_tokens": [float(np.mean(tokens)), float(np.std(tokens))],
        "weight_ratio": float(np.median(ratios)),
        "seconds": sum(step["step_seconds"] for step in steps),
    }


def plan_of(config: JobConfig, ranks: int, store: SampleLengths) -> Plan:
    """The plan of the first epoch, as the trainer makes it."""
    cost = cost_model(model_args(config), frozen=config.lora.rank > 0)
    return EpochPlans(config, store, ranks, cost).plan_for(0)


def make_runs(
    base: JobConfig,
    folder: Path,
    launch: Launch,
    store: SampleLengths,
    variants: Sequence[Variant],
    seeds: Sequence[int],
) -> list[Run]:
    """All runs, the seeds one after another: a study that is stopped has every variant for the seeds that it has."""
    check_levels(base.levels, launch.ranks)
    runs = []
    for seed in seeds:
        for variant in variants:
            config = copy.deepcopy(base)
            config.packing.seed = config.training.seed = seed
            config.packing.method, config.packing.level_order, config.packing.curriculum_steps = "hbp", "alternate", 0.0
            config.training.loss_normalization = "ave_token"
            step_tokens = float(plan_of(config, launch.ranks, store).step_loss_tokens.mean())
            variant.changes(config, step_tokens)
            config.checkpoint.initial_load_path = config.checkpoint.initial_load_path.replace("{seed}", str(seed))
            config.job.dump_folder = str(folder / variant.name / f"seed-{seed}")
            runs.append(Run(variant, seed, config, launch))
    return runs


def figures_of(run: Run, store: SampleLengths) -> dict[str, float]:
    """What the plan of a run has for its ranks, as in docs/levels.md, and what its optimizer steps are made of.

    long_spread: standard deviation over the steps of the share that samples longer than the lowest level have in the
    trained tokens. trained_spread: that of the trained tokens of a step, as a share of their mean.
    """
    plan = plan_of(run.config, run.launch.ranks, store)
    metrics = measure(plan)
    long = np.where(plan.lengths > plan.levels[0].max_tokens, plan.loss_tokens, 0)
    steps = [plan.samples_of(*plan.step_offsets[step : step + 2]) for step in range(plan.num_steps)]
    trained = plan.step_loss_tokens
    return {
        **{name: float(getattr(metrics, name)) for name in ("dbr", "abr", "cr", "pr")},
        "long_spread": float(np.std([long[ids].sum() for ids in steps] / np.maximum(trained, 1))),
        "trained_spread": float(trained.std() / trained.mean()),
    }


def train_all(runs: Sequence[Run], parallel: int, report: Report) -> list[dict[str, Any]]:
    """The outcome of every run, in their order; those that are not finished are trained, `parallel` at a time."""
    outcomes: dict[int, dict[str, Any]] = {}
    for index, run in enumerate(runs):
        outcome = run.outcome()
        if outcome is not None:
            outcomes[index] = outcome
    waiting = [index for index in range(len(runs)) if index not in outcomes]
    report(f"{len(runs)} runs, {len(outcomes)} of them finished before; {parallel} at a time")
    threads = max(1, (os.cpu_count() or 1) // parallel)
    with ThreadPoolExecutor(parallel) as pool:
        training = {pool.submit(runs[index].train, threads): index for index in waiting}
        try:
            for number, done in enumerate(as_completed(training), start=1):
                index = training[done]
                outcomes[index] = done.result()
                report(f"{number}/{len(waiting)}  {runs[index].folder}: loss {outcomes[index]['loss']:.4f}")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [{"variant": run.variant.name, "seed": run.seed, **outcomes[index]} for index, run in enumerate(runs)]
