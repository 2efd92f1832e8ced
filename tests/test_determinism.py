"""training.deterministic: two new runs are equal bit for bit; each seed decides what its key says."""

from __future__ import annotations

import json
from pathlib import Path

from hbp_titan.config import load_config
from hbp_titan.data.prepare import open_stores
from hbp_titan.testing.local_ranks import run_distributed
from tests.runs import compared, equal, read_metrics, train_until_each
from tests.tiny_run import write_tiny_run


def test_new_runs_are_equal_bit_for_bit_and_each_seed_changes_what_it_names(tmp_path: Path) -> None:
    argv = [*write_tiny_run(tmp_path, saves=False), "--training.deterministic=true", "--training.steps=4"]
    # No generator is used during training, so rng_seed changes nothing.
    changes = {
        "one": "",
        "two": "--training.rng_seed=7",
        "weights": "--training.seed=7 --data.seed=42 --packing.seed=42",
        "order": "--packing.seed=7",
    }
    runs = [[*argv, f"--job.dump_folder={tmp_path / name}", *word.split()] for name, word in changes.items()]
    found = dict(zip(changes, run_distributed(train_until_each, 2, runs)[0], strict=True))
    steps = {name: compared(tmp_path / name) for name in changes}
    tokens = {name: [step["tokens"] for step in read_metrics(tmp_path / name)] for name in changes}
    assert len(steps["one"]) == 4
    assert steps["two"] == steps["one"]
    assert equal(found["two"]["ended"], found["one"]["ended"])

    assert not equal(found["weights"]["started"], found["one"]["started"])
    assert tokens["weights"] == tokens["one"]
    assert equal(found["order"]["started"], found["one"]["started"])
    assert steps["order"] != steps["one"]
    (start,) = json.loads((tmp_path / "order" / "run.json").read_text())["starts"]
    assert start["seeds"] == {"data.seed": 42, "packing.seed": 7, "training.seed": 42, "training.rng_seed": 42}
    assert (start["deterministic"], start["world_size"]) == (True, 2)


def test_data_seed_decides_which_rows_a_limit_selects(tmp_path: Path) -> None:
    argv = [*write_tiny_run(tmp_path), "--data.max_samples=30"]
    stores = [open_stores(load_config([*argv, f"--data.seed={seed}"]), 512)[0] for seed in (42, 1, 42)]
    rows = [[store.where(i) for i in range(30)] for store in stores]
    assert rows[0] == rows[2] != rows[1]
    assert stores[0].fingerprint == stores[2].fingerprint != stores[1].fingerprint
