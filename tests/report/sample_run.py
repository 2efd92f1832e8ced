"""Run folders for tests of the report, with numbers that can be checked by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from hbp_titan.packing import Level, build_plan, save_plan

LEVELS = (Level(1024, 1), Level(8192, 2))
NAMES = ("1K/cp1", "8K/cp2")
SOURCES = ("chat", "books")


def step_of(step: int, level: int, ranks: int = 4, sources: tuple[str, ...] = SOURCES) -> dict[str, Any]:
    """Return a line of metrics.jsonl: loss 2 + 6 / sqrt(step), 0.5 higher on the long level; 1000 tokens, 0.5 s."""
    loss = 2 + 6 / step**0.5 + 0.5 * level
    each = {"loss": loss, "trained_tokens": 400}
    line: dict[str, Any] = {
        "step": step,
        "epoch": 0,
        "level": level,
        "level_name": NAMES[level],
        "micro_batches": 4 if level == 0 else 1,
        "loss": loss,
        "loss_by_level": {NAMES[level]: loss},
        "loss_by_length": {"8192": each} if level else {"1024": each, "2048": {"loss": loss + 1, "trained_tokens": 4}},
        "grad_norm": 1 / step**0.5 + 0.1,
        "lr": 1e-3,
        "tokens": 1000,
        "trained_tokens": 800,
        "sources": {name: {"samples": 2, "tokens": 500, **each} for name in sources},
        "token_weights": [1.0, 1.0],
        "tokens_per_second": 2000.0,
        "mfu": 40.0,
        "padding": 20.0,
        "abr": 0.04,
        "time_imbalance": 0.03,
        "idle_share": 0.05,
        "data_wait_seconds": 0.01,
        "step_seconds": 0.5,
        "peak_memory_gib": 30.0,
        "per_level": {
            NAMES[level]: {
                "micro_batches": 4 if level == 0 else 1,
                "tokens": 1000,
                "positions": 1250,
                "seconds": 0.5,
                "waiting_seconds": 0.025,
                "mfu": 40.0,
            }
        },
        "memory_by_level": {NAMES[level]: 20.0 + 10 * level},
    }
    if step % 20 == 0:
        checks = {name: {"micro_batches": 9, "ratio": 1.01, "waiting": 0.03, "planned": 0.02} for name in NAMES}
        work = [9.0] * ranks
        work[ranks - 1] = 10.0
        line["timing_check"] = {"levels": checks, "slowest_rank": ranks - 1, "slowest_ratio": 1.1, "work_by_rank": work}
    if step % 50 == 0:
        line["checkpoint_blocked_seconds"] = 0.2
        groups = {"by_level": NAMES, "by_length": ("1024", "8192"), "by_source": sources}
        means = {kind: {name: {"loss": loss, "trained_tokens": 90} for name in of} for kind, of in groups.items()}
        line["validation"] = {"loss": loss, "trained_tokens": 180, **means}
    return line


def levels_of(steps: int, curriculum: float = 0.2, seed: int = 0) -> list[int]:
    """Return the level of each step: the lower one in the curriculum, then a random one."""
    generator = np.random.default_rng(seed)
    return [0 if step < curriculum * steps else int(generator.random() < 0.4) for step in range(steps)]


def start_of(first_step: int = 1, ranks: int = 4) -> dict[str, Any]:
    """Return a start as in run.json."""
    config = {
        "model": {"flavor": "debug"},
        "data": {"train_files": ["train.jsonl"]},
        "packing": {"method": "hbp", "level_order": "alternate", "curriculum_steps": 0.2},
        "levels": [{"max_tokens": level.max_tokens, "cp_degree": level.cp_degree} for level in LEVELS],
        "training": {"steps": 0, "epochs": 1, "max_norm": 1.0, "global_batch_tokens": 4096},
    }
    return {
        "started": "2026-01-02T03:04:05+00:00",
        "command": ["train.py", "--job.config_file", "x.toml"],
        "first_step": first_step,
        "world_size": ranks,
        "device": "cpu",
        "code": {"commit": "0123456789abcdef", "dirty": True},
        "python": "3.11",
        "packages": {"torch": "2.13.0"},
        "config": config,
    }


def write_run(folder: Path, lines: list[dict[str, Any]], starts: list[dict[str, Any]] | None = None) -> Path:
    """Write a run folder with these lines in metrics.jsonl, run.json and a plan of 300 samples on 4 ranks."""
    (folder / "checkpoint" / "step-50").mkdir(parents=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    described = {"starts": [start_of()] if starts is None else starts}
    (folder / "run.json").write_text(json.dumps(described), encoding="utf-8")
    lengths = np.random.default_rng(1).integers(20, 900, 300)
    lengths[::20] = 5000
    plan = build_plan(lengths, LEVELS, world_size=4, method="hbp", global_batch_tokens=4096)
    save_plan(plan, folder / "plan" / "epoch-0.safetensors")
    return folder


def write_usual_run(folder: Path, steps: int = 120, sources: tuple[str, ...] = SOURCES) -> Path:
    """Write a run of `steps` steps, resumed after step 100."""
    lines = [step_of(step, level, sources=sources) for step, level in enumerate(levels_of(steps), start=1)]
    return write_run(folder, lines, [start_of(), start_of(101, 2)])
