"""training.deterministic: two runs from nothing are equal bit for bit; each seed decides what its key says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from hbp_titan.config import load_config
from hbp_titan.data.prepare import open_stores
from hbp_titan.distributed.world import World
from hbp_titan.testing.local_ranks import run_distributed
from tests.elastic_run import train_until
from tests.tiny_run import write_tiny_run

EXACT = ("step", "level", "loss", "loss_by_level", "grad_norm", "lr", "tokens")


@pytest.fixture
def argv(tmp_path: Path) -> list[str]:
    return [
        *write_tiny_run(tmp_path),
        "--training.deterministic=true",
        "--training.steps=4",
        "--checkpoint.enable=false",
        "--checkpoint.export_hf=false",
    ]


Outcome = tuple[list[list[Any]], dict[str, Tensor], dict[str, Tensor]]


def _train_each(world: World, runs: list[list[str]]) -> list[dict[str, Any]]:
    return [train_until(world, argv) for argv in runs]


def _outcomes(argv: list[str], folder: Path, changes: dict[str, str]) -> dict[str, Outcome]:
    """For each run, named by its folder: what metrics.jsonl tells of each step, and every tensor before and after."""
    runs = [[*argv, f"--job.dump_folder={folder / name}", *word.split()] for name, word in changes.items()]
    outcomes = {}
    for name, found in zip(changes, run_distributed(_train_each, 2, runs)[0], strict=True):
        steps = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        outcomes[name] = ([[step[key] for key in EXACT] for step in steps], found["started"], found["ended"])
    return outcomes


def _equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(value.equal(b[name]) for name, value in a.items())


def test_two_runs_from_nothing_are_equal_bit_for_bit_and_seeds_change_what_they_name(
    argv: list[str], tmp_path: Path
) -> None:
    # Nothing draws from the generators during training.
    changes = {"one": "", "two": "--training.rng_seed=7", "weights": "--training.seed=7", "order": "--packing.seed=7"}
    found = _outcomes(argv, tmp_path, changes)
    steps, started, ended = found["one"]
    assert len(steps) == 4
    assert found["two"][0] == steps
    assert _equal(found["two"][2], ended)

    assert not _equal(found["weights"][1], started)
    assert [step[-1] for step in found["weights"][0]] == [step[-1] for step in steps]
    assert _equal(found["order"][1], started)
    assert found["order"][0] != steps
    (start,) = json.loads((tmp_path / "order" / "run.json").read_text())["starts"]
    assert start["seeds"] == {"data.seed": 42, "packing.seed": 7, "training.seed": 42, "training.rng_seed": 42}
    assert (start["deterministic"], start["world_size"]) == (True, 2)


def test_data_seed_decides_which_rows_a_limit_takes(tmp_path: Path) -> None:
    argv = [*write_tiny_run(tmp_path), "--data.max_samples=30"]
    stores = [open_stores(load_config([*argv, f"--data.seed={seed}"]), 512)[0] for seed in (42, 1, 42)]
    rows = [[store.where(i) for i in range(30)] for store in stores]
    assert rows[0] == rows[2] != rows[1]
    assert stores[0].fingerprint == stores[2].fingerprint != stores[1].fingerprint
