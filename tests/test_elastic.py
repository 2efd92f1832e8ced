"""A run that goes on with other ranks and levels, again and again, keeps its state and trains each sample once."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from hbp_titan.data.sample_log import audit_run, read_starts
from hbp_titan.data.token_store import TokenStore
from hbp_titan.testing.local_ranks import run_distributed
from tests.elastic_run import train_until
from tests.tiny_run import write_tiny_run

# Ranks, the step at which the stretch is killed, its levels. Checkpoints are at even steps.
STRETCHES: list[tuple[int, int | None, str]] = [
    (4, 5, "128:1,512:2"),
    (2, 8, "128:1,512:2"),
    (1, 15, "128:1,512:1"),
    (4, None, "128:1,512:2"),
]
LAST_SAVED = (4, 8, 14)
EXACT = ("step", "epoch", "level", "loss", "loss_by_level", "grad_norm", "lr", "tokens")

Run = tuple[list[str], Path, list[dict[str, Any]]]


def _steps(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _train(argv: list[str], ranks: int, until: int | None, levels: str, folder: Path) -> dict[str, Any]:
    return run_distributed(train_until, ranks, [*argv, f"--levels={levels}", f"--job.dump_folder={folder}"], until)[0]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Arguments, folder, and what the first rank of each stretch brought back; `again` is `run` after the first."""
    folder = tmp_path_factory.mktemp("elastic")
    argv = [
        *(word for word in write_tiny_run(folder, num_rows=110) if not word.startswith("--levels")),
        "--training.epochs=2",
        "--checkpoint.interval=2",
        "--checkpoint.export_hf=false",
        "--lr_scheduler.warmup_steps=0.2",
    ]
    found = []
    for ranks, until, levels in STRETCHES:
        found.append(_train(argv, ranks, until, levels, folder / "run"))
        if len(found) == 1:
            shutil.copytree(folder / "run", folder / "again")
    return argv, folder, found


def test_state_after_a_load_is_that_of_the_checkpoint_on_other_ranks(run: Run) -> None:
    # The second stretch ended right after a checkpoint: one rank starts from what two ended with.
    ended, started = run[2][1]["ended"], run[2][2]["started"]
    assert {name.rpartition(".")[2] for name in ended} == {"weight", "exp_avg", "exp_avg_sq", "step"}
    assert ended.keys() == started.keys()
    assert all(value.equal(started[name]) for name, value in ended.items())


def test_what_is_planned_anew_is_exactly_what_was_not_trained(run: Run) -> None:
    _, folder, found = run
    starts = read_starts(folder / "run", found[-1]["step"])
    assert [start.world_size for start in starts] == [4, 2, 1, 4]
    assert [start.last_step for start in starts[:-1]] == [*LAST_SAVED]
    left = set(range(110))
    assert set(found[0]["planned"]) == left
    for start, following in zip(starts, found[1:], strict=False):
        for path in start.folder.glob("rank-*.jsonl"):
            lines = [line for line in map(json.loads, path.open()) if line["step"] <= start.last_step]
            left -= {i for line in lines for pack in line["micro_batches"] for i in pack["samples"]}
        assert len(following["planned"]) == len(left)
        assert set(following["planned"]) == left


def test_audit_of_four_plans_finds_each_sample_trained_once(run: Run) -> None:
    _, folder, found = run
    last = found[-1]["step"]
    starts = read_starts(folder / "run", last)
    store = TokenStore.open(starts[-1].store)
    for done in (3, *LAST_SAVED, last):
        audits, faults = audit_run(folder / "run", done, read_starts(folder / "run", done), store)
        # Up to a step in a stretch that was over then, the later ones of the record are no part of it.
        assert [fault for audit in audits for fault in audit.problems] == []
    assert faults == []
    assert [(audit.samples, audit.finished, audit.tokens) for audit in audits] == [
        (110, True, int(store.lengths.sum()))
    ] * 2
    names = {path.name for path in (folder / "run" / "plan").iterdir()}
    assert names == {f"epoch-{name}.safetensors" for name in ("0", "0-step-5", "0-step-9", "0-step-15", "1")}


def test_what_changed_is_told(run: Run) -> None:
    found = run[2]
    assert found[0]["told"] == ""
    assert found[1]["told"].startswith("resumed from step 4, with 2 ranks instead of 4: replanned ")
    levels = "levels 128:1:ulysses:none,512:1:ulysses:none instead of 128:1:ulysses:none,512:2:ulysses:none"
    assert f"step 8, with 1 rank instead of 2 and {levels}: replanned " in found[2]["told"]
    left = len(found[3]["planned"])
    assert f"replanned the remaining {left} samples of epoch 0 into " in found[3]["told"]


def test_learning_rate_goes_on_without_a_jump_and_to_its_end(run: Run) -> None:
    _, folder, found = run
    rates = [step["lr"] for step in _steps(folder / "run")]
    assert len(rates) == found[-1]["total_steps"] != found[0]["total_steps"]
    assert rates[-1] == pytest.approx(1e-3)
    # Nowhere does the schedule rise or fall faster than in warm-up, over the first 0.2 of its steps.
    most = 1e-2 / -(-found[0]["total_steps"] // 5)
    assert max(abs(b - a) for a, b in itertools.pairwise(rates)) < 1.1 * most


def test_the_same_ranks_repeat_the_rest_of_a_remainder_bit_for_bit(run: Run) -> None:
    argv, folder, found = run
    ranks, until, levels = STRETCHES[1]
    _train(argv, ranks, 7, levels, folder / "again")
    second = _train(argv, ranks, until, levels, folder / "again")
    assert second["told"] == "resumed from step 6"
    again, whole = ([[step[key] for key in EXACT] for step in _steps(folder / name)] for name in ("again", "run"))
    assert again == whole[:8]
    assert found[1]["ended"].keys() == second["ended"].keys()
    assert all(value.equal(second["ended"][name]) for name, value in found[1]["ended"].items())
