"""A run resumed with other ranks and levels, several times, keeps its state and trains each sample once."""

from __future__ import annotations

import itertools
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from hbp_titan.data.sample_log import audit_run, read_starts
from hbp_titan.data.token_store import TokenStore
from hbp_titan.distributed.world import World
from hbp_titan.testing.local_ranks import run_distributed
from tests.runs import compared, equal, read_metrics, train_until
from tests.tiny_run import write_tiny_run

# Per start: ranks, the step at which it is killed, levels. Checkpoints are at even steps.
STARTS: list[tuple[int, int | None, str]] = [
    (4, 5, "128:1,512:2"),
    (2, 8, "128:1,512:2"),
    (1, 15, "128:1,512:1"),
    (2, None, "128:1,512:2"),
]
LAST_SAVED = (4, 8, 14)
Run = tuple[list[str], Path, list[dict[str, Any]]]


CHANGES = [(4, "128:1,512:2"), (2, "128:1,512:2"), (2, "256:1,512:1"), (1, "128:1,512:1"), (4, "512:1")]


def _train(argv: list[str], ranks: int, levels: str, until: int | None, folder: Path) -> dict[str, Any]:
    return run_distributed(train_until, ranks, [*argv, f"--levels={levels}", f"--job.dump_folder={folder}"], until)[0]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Arguments, folder, and the result of rank 0 of each start; `again` is a copy of `run` after the first."""
    folder = tmp_path_factory.mktemp("elastic")
    argv = [
        *write_tiny_run(folder, num_rows=110, levels=""),
        "--training.epochs=2",
        "--checkpoint.interval=2",
        "--checkpoint.export_hf=false",
        "--lr_scheduler.warmup_steps=0.2",
    ]
    found = []
    for ranks, until, levels in STARTS:
        found.append(_train(argv, ranks, levels, until, folder / "run"))
        if len(found) == 1:
            shutil.copytree(folder / "run", folder / "again")
    return argv, folder, found


def test_state_loaded_on_other_ranks_is_that_of_the_checkpoint(run: Run) -> None:
    # The second start ended right after a checkpoint: one rank starts from what two ended with.
    ended, started = run[2][1]["ended"], run[2][2]["started"]
    assert {name.rpartition(".")[2] for name in ended} == {"weight", "exp_avg", "exp_avg_sq", "step"}
    assert equal(ended, started)


def test_replanned_samples_are_exactly_those_not_trained(run: Run) -> None:
    _, folder, found = run
    starts = read_starts(folder / "run", found[-1]["step"])
    assert [start.world_size for start in starts] == [4, 2, 1, 2]
    assert [start.last_step for start in starts[:-1]] == [*LAST_SAVED]
    remaining = set(range(110))
    assert set(found[0]["planned"]) == remaining
    for start, following in zip(starts, found[1:], strict=False):
        for path in start.folder.glob("rank-*.jsonl"):
            lines = [line for line in map(json.loads, path.open()) if line["step"] <= start.last_step]
            remaining -= {i for line in lines for pack in line["micro_batches"] for i in pack["samples"]}
        assert sorted(following["planned"]) == sorted(remaining)


def test_audit_of_four_plans_finds_each_sample_trained_once(run: Run) -> None:
    _, folder, found = run
    last = found[-1]["step"]
    starts = read_starts(folder / "run", last)
    store = TokenStore.open(starts[-1].store)
    # Also up to a step of an earlier start, of which the later ones are ignored.
    for done in (3, *LAST_SAVED, last):
        audits, problems = audit_run(folder / "run", done, read_starts(folder / "run", done), store)
        assert [problem for audit in audits for problem in audit.problems] == []
    assert problems == []
    assert [(audit.samples, audit.finished, audit.tokens) for audit in audits] == [
        (110, True, int(store.lengths.sum()))
    ] * 2
    names = {path.name for path in (folder / "run" / "plan").iterdir()}
    assert names == {f"epoch-{name}.safetensors" for name in ("0", "0-step-5", "0-step-9", "0-step-15", "1")}


def test_changes_are_reported(run: Run) -> None:
    lines = [found["resumed"] for found in run[2]]
    assert lines[0] == ""
    assert lines[1].startswith("resumed from step 4, with 2 ranks instead of 4")
    assert "1 rank instead of 2 and levels 128:1:ulysses:none,512:1:ulysses:none instead of " in lines[2]
    assert f" {len(run[2][3]['planned'])} " in lines[3]


def test_learning_rate_does_not_jump_and_reaches_its_end(run: Run) -> None:
    _, folder, found = run
    rates = [step["lr"] for step in read_metrics(folder / "run")]
    assert len(rates) == found[-1]["total_steps"] != found[0]["total_steps"]
    assert rates[-1] == pytest.approx(1e-3)
    # The schedule changes fastest in warm-up, over the first 0.2 of its steps.
    most = 1e-2 / -(-found[0]["total_steps"] // 5)
    assert max(abs(b - a) for a, b in itertools.pairwise(rates)) < 1.1 * most


def test_same_ranks_repeat_a_replanned_epoch_bit_for_bit(run: Run) -> None:
    argv, folder, found = run
    ranks, until, levels = STARTS[1]
    _train(argv, ranks, levels, 7, folder / "again")
    second = _train(argv, ranks, levels, until, folder / "again")
    assert second["resumed"] == "resumed from step 6"
    assert compared(folder / "again") == compared(folder / "run")[:8]
    assert equal(found[1]["ended"], second["ended"])


def _end(world: World, argv: list[str], steps: int) -> tuple[str, int]:
    ended = train_until(world, [*argv, f"--training.steps={steps}"])
    return ended["resumed"], ended["step"]


def _end_twice(world: World, argv: list[str]) -> list[tuple[str, int]]:
    return [_end(world, argv, steps) for steps in (2, 4)]


def test_steps_after_the_end_of_the_schedule_are_announced(tmp_path: Path) -> None:
    argv = [*write_tiny_run(tmp_path, levels="512:1"), "--lr_scheduler.min_lr_factor=0.5"]
    (_, ended), (resumed, last) = run_distributed(_end_twice, 1, argv)[0]
    assert (ended, last) == (2, 4)
    assert "steps 3 to 4 train at its last rate, 0.005; " in resumed
    assert f"--checkpoint.initial_load_path {tmp_path}/run/checkpoint/step-2 " in resumed
    assert [step["lr"] for step in read_metrics(tmp_path / "run")][1:] == pytest.approx([0.005] * 3)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_random_chain_of_changes_trains_each_sample_once(tmp_path: Path, seed: int) -> None:
    """Kills at any step, up to six changes; every sequence of changes without a model: tests/data/test_epoch.py."""
    generator = random.Random(seed)
    argv = [*write_tiny_run(tmp_path, num_rows=150, levels=""), "--training.epochs=2"]
    argv += [f"--checkpoint.interval={generator.randint(1, 3)}", "--checkpoint.export_hf=false"]
    step, changes = 0, 6 - seed % 6
    for number in range(changes + 1):
        until = None if number == changes else step + generator.randint(1, 4)
        ended = _train(argv, *generator.choice(CHANGES), until, tmp_path / "run")
        step = ended["step"]
    assert step == ended["total_steps"] == len(read_metrics(tmp_path / "run"))
    starts = read_starts(tmp_path / "run", step)
    audits, problems = audit_run(tmp_path / "run", step, starts, TokenStore.open(starts[-1].store))
    assert problems == [problem for audit in audits for problem in audit.problems] == []
    assert [(audit.samples, audit.finished) for audit in audits] == [(150, True)] * 2
    assert len(starts) == changes + 1
