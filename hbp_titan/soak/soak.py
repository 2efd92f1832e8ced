"""The soak: train with kills for a time, train the same steps undisturbed, compare.

Owns the order of the two runs, what they are compared by, and the report.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hbp_titan.components.checkpoint import completed
from hbp_titan.components.checkpoint_files import MANIFEST
from hbp_titan.config import load_config
from hbp_titan.data.audit import audit_run
from hbp_titan.data.consumed import read_attempts
from hbp_titan.data.store.token_store import TokenStore
from hbp_titan.soak.disturbed_run import DisturbedRun, Kill, steps_done, torchrun
from hbp_titan.soak.sampler import Lifetime, Sampler, growth

COMPARED = ("step", "epoch", "level", "loss", "loss_by_level", "loss_by_length", "grad_norm", "lr", "tokens", "sources")
"""The keys of metrics.jsonl that do not depend on the clock."""


@dataclass(frozen=True)
class Settings:
    """argv: of a run, without its folder. folder: the two run folders and the logs go there.

    seconds: for which the disturbed run trains, unless it is complete before. judged_seconds: a process that trained
    for less is not asked whether it is flat.
    """

    argv: Sequence[str]
    folder: Path
    ranks: int = 2
    seconds: float = float("inf")
    sample_seconds: float = 1.0
    judged_seconds: float = 60.0


def soak(settings: Settings, kills: Callable[[random.Random], Iterable[Kill]], seed: int) -> dict[str, Any]:
    """Run both; returns the report: plain JSON values, with every fault as a line of "faults".

    kills: makes them from the generator that also chooses the ranks. Raises ValueError where the folder has runs.
    """
    disturbed, whole = settings.folder / "disturbed", settings.folder / "whole"
    for folder in (disturbed, whole):
        if folder.exists():
            raise ValueError(f"{folder} is there: name another folder, a soak begins anew")
    settings.folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    generator = random.Random(seed)
    report: dict[str, Any] = {"seed": seed, "ranks": settings.ranks, "argv": list(settings.argv)}
    end = started + settings.seconds
    run, judged = _watched(settings, disturbed, kills(generator), generator, over=lambda: time.monotonic() > end)
    report["disturbed_seconds"] = round(time.monotonic() - started, 1)
    report["kills"] = [{**asdict(kill), "steps_done": steps} for kill, steps in run.killed]
    report["starts"], report["complete"] = run.starts, run.complete
    step = _last_regular(disturbed, load_config(settings.argv).checkpoint.interval, run.complete)
    report["steps"] = step
    restarted = time.monotonic()
    saved = whole / "checkpoint" / f"step-{step}"
    judged += _watched(settings, whole, (), generator, over=saved.exists)[1]
    report["whole_seconds"] = round(time.monotonic() - restarted, 1)
    report["lifetimes"] = [_row(life) for life in judged]
    report["faults"] = [*growth(judged), *audit_faults(disturbed), *differences(whole, disturbed, step)]
    return report


def _watched(
    settings: Settings, folder: Path, kills: Iterable[Kill], generator: random.Random, over: Callable[[], bool]
) -> tuple[DisturbedRun, list[Lifetime]]:
    # What is compared must not be gone for the one that is saved when the run is asked to leave.
    argv = [*settings.argv, "--checkpoint.keep_latest_k=3", f"--job.dump_folder={folder}"]
    command = torchrun(argv, settings.ranks)
    with folder.with_suffix(".log").open("w", encoding="utf-8") as log:
        run = DisturbedRun(command, folder, log, generator)
        with Sampler(folder, lambda: run.process.pid if run.process else None, settings.sample_seconds) as sampler:
            run.run(kills, over)
    return run, sampler.judged(settings.judged_seconds)


def _last_regular(folder: Path, interval: int, complete: bool) -> int:
    """The newest checkpoint's step that an undisturbed run saves as well."""
    steps = [int(path.name.removeprefix("step-")) for path in completed(folder / "checkpoint")]
    regular = [step for step in steps if step % interval == 0 or (complete and step == steps[-1])]
    if not regular:
        raise ValueError(f"{folder} has no checkpoint: more --minutes, or a smaller checkpoint.interval")
    return regular[-1]


def audit_faults(folder: Path) -> list[str]:
    """What the audit of a run finds wrong, a line each (scripts/audit_epoch.py)."""
    done = steps_done(folder)
    attempts = read_attempts(folder, done)
    audits, faults = audit_run(folder, done, attempts, TokenStore.open(attempts[-1].store))
    return [*faults, *(fault for audit in audits for fault in audit.faults)]


def differences(whole: Path, disturbed: Path, step: int) -> list[str]:
    """How two runs differ in their first `step` steps and in the checkpoint of that step, bit for bit; a line each."""
    found = []
    first, second = (_steps(folder)[:step] for folder in (whole, disturbed))
    if len(first) < step or len(second) < step:
        found.append(f"of {step} steps {whole} has {len(first)} and {disturbed} {len(second)}")
    for one, other in zip(first, second, strict=False):
        keys = [key for key in COMPARED if one[key] != other[key]]
        if keys:
            found.append(f"step {one['step']}: {keys[0]} is {one[keys[0]]} undisturbed, but {other[keys[0]]}")
            break
    one, other = (_tensors_sha256(folder / "checkpoint" / f"step-{step}") for folder in (whole, disturbed))
    if one != other:
        found.append(f"step-{step}: model, optimizer or random state differ in {sorted(one.items() ^ other.items())}")
    return found


def _steps(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines() if line.endswith("}")]


def _tensors_sha256(checkpoint: Path) -> dict[str, str]:
    files = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name.endswith(".safetensors")}


def _row(life: Lifetime) -> dict[str, Any]:
    return {
        "name": life.name,
        "from_second": round(life.samples[0][0], 1),
        "seconds": round(life.seconds, 1),
        "peak_mib": [round(size / 2**20, 1) for size in life.peaks(1)],
        "peak_handles": life.peaks(2),
        "samples": [[round(at, 1), size, handles] for at, size, handles in life.samples],
    }


def table(report: dict[str, Any]) -> str:
    """The report for people: kills, processes, verdict."""
    kills = report["kills"]
    counts = ", ".join(f"{sum(kill['moment'] == m for kill in kills)} {n}" for m, n in _MOMENT_NAMES.items())
    everyone = sum(kill["everyone"] for kill in kills)
    lines = [
        f"disturbed: {report['disturbed_seconds'] / 60:.1f} min, {report['steps']} steps; {len(kills)} kills "
        f"({counts}; {everyone} of all, {len(kills) - everyone} of one rank)",
        f"undisturbed: {report['whole_seconds'] / 60:.1f} min for the same steps",
        "peaks of the three thirds of each process's training:",
        f"{'process':<10}{'from s':>8}{'for s':>8}  {'MiB':<23}handles",
    ]
    for life in report["lifetimes"]:
        mib, handles = (" ".join(f"{value:6.0f}" for value in life[key]) for key in ("peak_mib", "peak_handles"))
        lines.append(f"{life['name']:<10}{life['from_second']:>8.0f}{life['seconds']:>8.0f}  {mib:<23}{handles}")
    lines += [f"wrong: {fault}" for fault in report["faults"]] or [
        "memory and handles flat, every sample trained once, losses and state bit for bit those of the undisturbed run"
    ]
    return "\n".join(lines)


_MOMENT_NAMES = {"any": "at any moment", "save": "during a save", "load": "in the first step after a load"}
