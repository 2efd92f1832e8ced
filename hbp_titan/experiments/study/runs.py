"""Runs of the quality study: each variant with each seed is an ordinary training run in its own folder.

Owns the variants, the settings of the runs, how they are started (several in parallel) and what is read from them. The
default variant is HBP with alternating levels and without curriculum; methods of one length cannot have one, so they
differ from it only in packing. Every other variant changes one setting. A finished run has an outcome.json and is not
repeated; one that was stopped resumes from its checkpoint, if it has one.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import hbp_titan
from hbp_titan.config import JobConfig, to_toml
from hbp_titan.data.epoch import EpochPlans, SampleLengths
from hbp_titan.data.prepare import open_stores
from hbp_titan.experiments.recall.runs import score_alone
from hbp_titan.packing import Plan, measure
from hbp_titan.packing.level import check_levels
from hbp_titan.preflight import cost_model, max_sample_tokens, model_args
from hbp_titan.utils import atomic_write, did_you_mean


@dataclass(frozen=True)
class Variant:
    """One variant: the keys that it sets, and the keys that it multiplies with a factor or with "step_tokens".

    step_tokens: mean trained tokens of an optimizer step.
    """

    name: str
    description: str
    settings: Mapping[str, str | float] = field(default_factory=dict)
    factors: Mapping[str, str | float] = field(default_factory=dict)

    def apply(self, config: JobConfig, step_tokens: float) -> None:
        """Change the default settings to those of the variant."""
        for key, value in self.settings.items():
            section, _, name = key.partition(".")
            setattr(getattr(config, section), name, value)
        for key, factor in self.factors.items():
            section, _, name = key.partition(".")
            scale = step_tokens if factor == "step_tokens" else factor
            setattr(getattr(config, section), name, getattr(getattr(config, section), name) * scale)


DEFAULT = "hbp"
RECALL = "recall"
"""Name of the held-out source whose answers are scored."""
NORMALIZATION = "training.loss_normalization"
VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant(DEFAULT, "the default: levels, alternate, no curriculum, ave_token"),
        Variant("hbp_paper", "packing as the paper prints it", {"packing.method": "hbp_paper"}),
        Variant("flat_sorted", "one length, packs sorted by cost", {"packing.method": "flat_sorted"}),
        Variant("isf", "one length, packs in random order", {"packing.method": "isf"}),
        Variant("curriculum", "first 15% of the steps: lowest level only", {"packing.curriculum_steps": 0.15}),
        Variant("interleave", "every step trains its share of every level", {"packing.level_order": "interleave"}),
        Variant("parallel", "every micro-batch trains all levels side by side", {"packing.level_order": "parallel"}),
        Variant("token_mean", "loss normalization", {NORMALIZATION: "token_mean"}),
        Variant("sample_mean", "loss normalization", {NORMALIZATION: "sample_mean"}),
        # AdamW's update does not depend on the gradients' scale if clipping norm and epsilon are scaled too. The
        # learning rate stays; what remains is the effect of `sum`: steps with more trained tokens weigh more.
        Variant(
            "sum",
            "loss normalization; clipping norm and epsilon times the mean trained tokens per step",
            {NORMALIZATION: "sum"},
            {"training.max_norm": "step_tokens", "optimizer.eps": "step_tokens"},
        ),
        Variant("half_rate", "reference: half the learning rate", factors={"optimizer.lr": 0.5}),
    )
}


def parse_variants(text: str) -> list[Variant]:
    """Return the variants in "isf,sum" in the order of VARIANTS, always with the default; all for ""."""
    names = [word.strip() for word in text.split(",")] if text else list(VARIANTS)
    for name in names:
        if name not in VARIANTS:
            hint = did_you_mean(name, VARIANTS)
            raise ValueError(f"--variants {text}: {name!r} must be one of {', '.join(VARIANTS)}{hint}")
    return [variant for name, variant in VARIANTS.items() if name in (*names, DEFAULT)]


LAUNCHES = ("single_process", "torchrun")

Report = Callable[[str], None]
"""Prints a line on progress."""


@dataclass(frozen=True)
class Launch:
    """How a run is started.

    kind: "torchrun", `ranks` processes on this machine, or "single_process", one that emulates them.
    """

    kind: str
    ranks: int

    def __post_init__(self) -> None:
        assert self.kind in LAUNCHES
        if self.ranks < 1:
            raise ValueError(f"--ranks {self.ranks} must be at least 1")

    def command(self, config_file: Path) -> list[str]:
        """Return the command that starts the run of `config_file`."""
        train = ["hbp_titan.experiments.study.single_process", f"--ranks={self.ranks}"]
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
        """Return the text of run.toml: everything that determines the outcome."""
        return f"# {self.launch.kind}, plans for {self.launch.ranks} ranks\n{to_toml(self.config)}"

    def outcome(self) -> dict[str, Any] | None:
        """Return the outcome of the finished run, None if it is not; ValueError if it had other settings."""
        path, described = self.folder / "outcome.json", self.folder / "run.toml"
        if not path.exists():
            return None
        before, now = (text.splitlines() for text in (described.read_text(encoding="utf-8"), self.description))
        if before != now:
            old, new = next((a, b) for a, b in zip([*before, ""], [*now, ""], strict=False) if a != b)
            raise ValueError(
                f"{self.folder} contains a run with other settings: {old!r}, now {new!r}; use another --folder"
            )
        return json.loads(path.read_text(encoding="utf-8"))

    def train(self, threads: int) -> dict[str, Any]:
        """Train or resume; return the outcome. RuntimeError, with the last line of its log, if the run fails."""
        finished = self.outcome()
        if finished is not None:  # in the meantime, by another command on the same folder
            return finished
        self.folder.mkdir(parents=True, exist_ok=True)
        described = self.folder / "run.toml"
        described.write_text(self.description, encoding="utf-8")
        root = str(Path(hbp_titan.__file__).resolve().parents[1])
        # The run uses this checkout, also where another one is installed.
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {"OMP_NUM_THREADS": str(threads), **os.environ, "PYTHONPATH": path}
        log = self.folder / "log.txt"
        with log.open("w", encoding="utf-8") as file:
            status = subprocess.call(
                self.launch.command(described), env=environment, stdout=file, stderr=subprocess.STDOUT
            )
        if status:
            lines = [line for line in log.read_text(encoding="utf-8").splitlines() if line.strip()]
            raise RuntimeError(f"{self.folder} failed with exit code {status}: {lines[-1] if lines else ''} ({log})")
        outcome = read_outcome(self.folder, [level.max_tokens for level in self.config.levels])
        if scores_recall(self.config):
            outcome["recall"] = recall_by_distance(self.config)
        # Last and atomically: its existence means that the run is finished.
        atomic_write(self.folder / "outcome.json", json.dumps(outcome) + "\n")
        return outcome


def scores_recall(config: JobConfig) -> bool:
    """Return whether a held-out source is named `RECALL`: recall documents, whose answers are scored."""
    return any(source.name == RECALL for source in config.data.validation_sources)


def recall_by_distance(config: JobConfig) -> dict[str, dict[str, int]]:
    """Return answers and correct ones of a finished run, by the levels' max_tokens as bounds of the distance."""
    store = open_stores(config, max_sample_tokens(config, model_args(config)))[1]
    scores = score_alone(config.dump_folder / "hf", store, config)
    bounds = [level.max_tokens for level in config.levels]
    band = np.searchsorted(bounds, scores["distance"])
    answers = np.bincount(band, minlength=len(bounds))
    correct = np.bincount(band, scores["correct"], minlength=len(bounds))
    return {
        str(bound): {"answers": int(answers[k]), "correct": int(correct[k])}
        for k, bound in enumerate(bounds)
        if answers[k]
    }


def _by_level_length(by_length: Mapping[str, Mapping[str, Any]], bounds: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Return mean loss and trained tokens by the first of the ascending `bounds` that is at least a band's end."""
    sums: dict[str, list[float]] = {}
    for end, mean in by_length.items():
        total = sums.setdefault(str(bounds[min(int(np.searchsorted(bounds, int(end))), len(bounds) - 1)]), [0.0, 0])
        total[0] += mean["loss"] * mean["trained_tokens"]
        total[1] += mean["trained_tokens"]
    return {bound: {"loss": total / count, "trained_tokens": count} for bound, (total, count) in sums.items()}


def read_outcome(folder: Path, bounds: Sequence[int]) -> dict[str, Any]:
    """Return losses of the held-out samples and statistics of the steps of a finished run, from metrics.jsonl.

    loss, by_length: after the last step, per trained token; lengths up to each of `bounds`. best: the lowest of all
    evaluations, after step best_step. step_tokens: mean and standard deviation over the steps. weight_ratio: heaviest /
    lightest weight of two tokens in a step, median over the steps.
    """
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [json.loads(line) for line in lines]
    curve = [[step["step"], step["validation"]["loss"]] for step in steps if "validation" in step]
    last = steps[-1]["validation"]
    tokens = [step["tokens"] for step in steps]
    ratios = [heaviest / lightest for lightest, heaviest in (step["token_weights"] for step in steps) if lightest]
    end = [step for step in steps[-max(len(steps) // 10, 1) :] if step["loss"] is not None]
    best_step, best = min(curve, key=lambda point: point[1])
    return {
        "loss": last["loss"],
        "by_length": _by_level_length(last.get("by_length", {}), bounds),
        "best": best,
        "best_step": best_step,
        "course": curve,
        "train_loss": sum(s["loss"] * s["trained_tokens"] for s in end) / sum(s["trained_tokens"] for s in end),
        "steps": len(steps),
        "samples": sum(source["samples"] for step in steps for source in step["sources"].values()),
        "tokens": sum(tokens),
        "trained_tokens": sum(step["trained_tokens"] for step in steps),
        "step_tokens": [float(np.mean(tokens)), float(np.std(tokens))],
        "weight_ratio": float(np.median(ratios)),
        "seconds": sum(step["step_seconds"] for step in steps),
    }


def plans_of(config: JobConfig, ranks: int, store: SampleLengths) -> EpochPlans:
    """Return the plans of the epochs, as the trainer builds them."""
    cost = cost_model(model_args(config), frozen=config.lora.rank > 0)
    return EpochPlans(config, store, ranks, cost)


def plan_of(config: JobConfig, ranks: int, store: SampleLengths) -> Plan:
    """Return the plan of the first epoch."""
    return plans_of(config, ranks, store).plan_for(0)


def make_runs(
    base: JobConfig,
    folder: Path,
    launch: Launch,
    store: SampleLengths,
    variants: Sequence[Variant],
    seeds: Sequence[int],
) -> list[Run]:
    """Return all runs, seed by seed: a study that is stopped has all variants of its finished seeds.

    All runs have the same number of optimizer steps: training.steps, or the fewest that any run needs for
    training.epochs. Raises ValueError if one needs fewer than training.steps, because it would repeat samples.
    """
    # Before any run starts: levels that do not fit would fail in every one.
    check_levels(base.levels, launch.ranks)
    runs = []
    for seed in seeds:
        for variant in variants:
            config = copy.deepcopy(base)
            # The samples are the same for all seeds; data.seed would otherwise follow training.seed.
            config.data.seed = base.seed_of("data")
            config.packing.seed = config.training.seed = seed
            # The default variant, whatever the configuration file sets.
            config.packing.method, config.packing.level_order, config.packing.curriculum_steps = "hbp", "alternate", 0.0
            config.training.loss_normalization = "ave_token"
            step_tokens = float(plan_of(config, launch.ranks, store).step_loss_tokens.mean())
            variant.apply(config, step_tokens)
            config.checkpoint.initial_load_path = config.checkpoint.initial_load_path.replace("{seed}", str(seed))
            config.job.dump_folder = str(folder / variant.name / f"seed-{seed}")
            runs.append(Run(variant, seed, config, launch))
    steps, name = min((plans_of(run.config, launch.ranks, store).steps_from(0), run.variant.name) for run in runs)
    if base.training.steps > steps:
        raise ValueError(
            f"training.steps={base.training.steps}: an epoch of {name} has {steps} steps; use at most these"
        )
    for run in runs:
        # The schedule of the learning rate depends on it too.
        run.config.training.steps = base.training.steps or steps
    return runs


def plan_metrics(run: Run, store: SampleLengths) -> dict[str, float]:
    """Return the metrics of a run's plan, and how its optimizer steps are composed.

    long_spread: standard deviation over the steps of the share of trained tokens in samples longer than the lowest
    level. trained_spread: standard deviation of the trained tokens of a step, as a share of their mean.
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
    """Return the outcome of every run, in order; train those that are not finished, `parallel` at a time."""
    outcomes: dict[int, dict[str, Any]] = {}
    for index, run in enumerate(runs):
        outcome = run.outcome()
        if outcome is not None:
            outcomes[index] = outcome
    waiting = [index for index in range(len(runs)) if index not in outcomes]
    report(f"{len(runs)} runs, {len(outcomes)} already finished; {parallel} at a time")
    # Runs in parallel share the cores; otherwise each would start a thread per core.
    threads = max(1, (os.cpu_count() or 1) // parallel)
    with ThreadPoolExecutor(parallel) as pool:
        training = {pool.submit(runs[index].train, threads): index for index in waiting}
        try:
            for number, done in enumerate(as_completed(training), start=1):
                index = training[done]
                outcomes[index] = done.result()
                report(f"{number}/{len(waiting)}  {runs[index].folder}: loss {outcomes[index]['loss']:.4f}")
        except BaseException:
            # Runs that have not started would fail in the same way.
            pool.shutdown(cancel_futures=True)
            raise
    return [{"variant": run.variant.name, "seed": run.seed, **outcomes[index]} for index, run in enumerate(runs)]
