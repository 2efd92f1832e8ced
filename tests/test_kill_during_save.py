"""Ranks are killed while every step is being saved; what is left goes on, and ends as if nothing had happened."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from hbp_titan.components.checkpoint import completed_checkpoints
from hbp_titan.testing.local_ranks import run_distributed
from tests.killed_run import Kill, outcome, train, train_until_killed
from tests.tiny_run import write_tiny_run

# In the order of a save; of one start each. write_json and sync_folder are rank 0's, three and two times a save.
MOMENTS = [
    Kill((1,), function="write_safetensors", number=3, half_written=True),
    Kill((0, 1), function="write_safetensors", number=4),
    Kill((0,), function="write_json", number=7, half_written=True),  # tensors.json of the third save
    Kill((0,), function="sync_folder", number=7),  # all written, not yet renamed
    Kill((0, 1), function="sync_folder", number=8),  # renamed, the name perhaps not on disk
    Kill((0,), function="move_to_trash", number=8),  # before the fourth save's pruning
]


def _same(first: Path, second: Path) -> None:
    (expected, weights), (found, again) = outcome(first), outcome(second)
    assert found == expected
    assert weights.keys() == again.keys()
    assert all(weights[name].equal(again[name]) for name in weights)


def _argv(folder: Path, name: str, num_rows: int, *more: str) -> list[str]:
    argv = write_tiny_run(folder, num_rows)
    return [
        *argv,
        "--checkpoint.interval=1",
        "--metrics.timing_check_interval=0",
        f"--job.dump_folder={folder}/{name}",
        *more,
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed run."""
    folder = tmp_path_factory.mktemp("run")
    run_distributed(train, 2, _argv(folder, "whole", 150))
    return folder / "whole"


def test_run_killed_at_every_moment_of_a_save_ends_like_the_undisturbed_one(whole: Path, tmp_path: Path) -> None:
    argv = _argv(tmp_path, "killed", 150)
    folder = tmp_path / "killed" / "checkpoint"
    newest = 0
    for kill in MOMENTS:
        train_until_killed(argv, kill)
        assert not (tmp_path / "killed" / "hf").exists()
        steps = [int(path.name.removeprefix("step-")) for path in completed_checkpoints(folder)]
        assert steps[-1] > newest, kill
        newest = steps[-1]
    # The newest one has lost a byte since.
    damaged = folder / f"step-{newest}"
    path = damaged / "rank-1.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    first, last = run_distributed(train, 2, argv)[0]
    assert first == steps[-2]
    assert {path.name for path in folder.iterdir()} == {f"{damaged.name}.damaged", f"step-{last - 1}", f"step-{last}"}
    _same(whole, tmp_path / "killed")


def _kill_at_random(whole: Path, tmp_path: Path, num_rows: int, kills: int, seed: int) -> None:
    generator = random.Random(seed)
    argv = _argv(tmp_path, "killed", num_rows)
    for number in range(kills):
        ranks = generator.choice([(0,), (1,), (0, 1)])
        train_until_killed(argv, Kill(ranks, seconds=generator.uniform(0, 2), loaded=number % 3 > 0))
    # How far a kill after seconds lets the run come depends on the machine; that nothing saved is lost does not.
    saved = [int(path.name.removeprefix("step-")) for path in completed_checkpoints(tmp_path / "killed" / "checkpoint")]
    assert run_distributed(train, 2, argv)[0][0] == max(saved, default=0)
    _same(whole, tmp_path / "killed")


@pytest.mark.slow
def test_run_killed_at_random_moments_ends_like_the_undisturbed_one(whole: Path, tmp_path: Path) -> None:
    _kill_at_random(whole, tmp_path, num_rows=150, kills=3, seed=0)


@pytest.mark.slow
def test_run_killed_twenty_times_ends_like_the_undisturbed_one(tmp_path: Path) -> None:
    run_distributed(train, 2, _argv(tmp_path, "whole", 1500))
    _kill_at_random(tmp_path / "whole", tmp_path, num_rows=1500, kills=20, seed=1)
