"""A run that is killed, out of disk space or preempted resumes, and ends bit for bit like the undisturbed run."""

from __future__ import annotations

import errno
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from hbp_titan import engine
from hbp_titan.components import dcp_storage
from hbp_titan.components.checkpoint import completed_checkpoints
from hbp_titan.components.faults import EXIT_PREEMPTED
from hbp_titan.config import load_config
from hbp_titan.distributed.world import World
from hbp_titan.errors import UserError
from hbp_titan.experiments.soak import ranks_of
from hbp_titan.testing.local_ranks import run_distributed
from hbp_titan.train import Trainer
from tests.programs import run_python
from tests.runs import (
    DEADLINE,
    Kill,
    assert_same_run,
    equal,
    read_metrics,
    torchrun,
    train,
    train_and_signal,
    train_until,
    train_until_killed,
    wait_until,
)
from tests.tiny_run import write_tiny_run

NEEDS_PROC = pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc; run: scripts/run_tests.sh on Linux")
# In the order of a save, one per start; each start saves further than the one before. Per save, rank 0 calls write_json
# three times and sync_folder twice.
MOMENTS = [
    Kill((1,), function="write_safetensors", number=3, half_written=True),
    Kill((0, 1), function="write_safetensors", number=4),
    Kill((0,), function="write_json", number=7, half_written=True),  # tensors.json of the third save
    Kill((0,), function="sync_folder", number=7),  # all written, not yet renamed
    Kill((0, 1), function="sync_folder", number=8),  # renamed, the name perhaps not on disk
    Kill((0,), function="move_to_trash", number=8),  # before the fourth save's pruning
]


def _write_run(folder: Path, num_rows: int) -> list[str]:
    return [*write_tiny_run(folder, num_rows), "--training.epochs=2", "--metrics.timing_check_interval=0"]


@pytest.fixture(scope="module")
def argv(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The arguments of a run of two ranks and two epochs."""
    return _write_run(tmp_path_factory.mktemp("run"), 60)


@pytest.fixture(scope="module")
def whole(argv: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the undisturbed run."""
    folder = tmp_path_factory.mktemp("whole")
    run_distributed(train, 2, [*argv, f"--job.dump_folder={folder}"])
    return folder


def _resume_without_reading(world: World, argv: list[str]) -> bool:
    """Whether a run of whose initial weights nothing can be read starts with the state that it ended with."""
    ended = train_until(world, argv, 2)["ended"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "initialize", None)
        return equal(train_until(world, argv, 2)["started"], ended)


def test_resume_does_not_read_the_initial_weights(argv: list[str], tmp_path: Path) -> None:
    argv = [*argv, "--levels=512:1", "--checkpoint.interval=2", f"--job.dump_folder={tmp_path}"]
    assert run_distributed(_resume_without_reading, 1, argv) == [True]


def _saved_steps(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in completed_checkpoints(folder / "checkpoint")]


@pytest.mark.parametrize(
    "moments", [pytest.param(MOMENTS[::2], id="three"), pytest.param(MOMENTS, id="all", marks=pytest.mark.slow)]
)
def test_run_killed_at_every_moment_of_a_save(
    argv: list[str], whole: Path, tmp_path: Path, moments: list[Kill]
) -> None:
    argv = [*argv, "--checkpoint.interval=1", f"--job.dump_folder={tmp_path}"]
    newest = 0
    for kill in moments:
        train_until_killed(argv, kill)
        assert not (tmp_path / "hf").exists()
        steps = _saved_steps(tmp_path)
        assert steps[-1] > newest, kill
        newest = steps[-1]
    # And the newest checkpoint has lost a byte since.
    path = tmp_path / "checkpoint" / f"step-{newest}" / "rank-1.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    first, last = run_distributed(train, 2, argv)[0]
    assert first == steps[-2]
    names = {path.name for path in (tmp_path / "checkpoint").iterdir()}
    assert names == {f"step-{newest}.damaged", f"step-{last - 1}", f"step-{last}"}
    assert_same_run(whole, tmp_path)
    _check_audit(tmp_path, first)
    _check_finished_run(argv, tmp_path)


def _check_audit(folder: Path, first: int) -> None:
    """Audit the record of all starts, and, as a negative control, one with a step missing or twice."""
    result = run_python("scripts/audit_epoch.py", folder)
    assert (result.returncode, result.stderr) == (0, "")
    assert re.search(rf"resumed after step .*\b{first} on 2 ranks", result.stdout)
    assert result.stdout.count("each sample trained once") == 2
    path = max((folder / "sample_log").glob("start-*")) / "rank-0.jsonl"
    text = path.read_text()
    lines = text.splitlines(keepends=True)
    for wrong in (lines[:3] + lines[4:], lines[:4] + lines[3:]):
        path.write_text("".join(wrong))
        result = run_python("scripts/audit_epoch.py", folder)
        assert result.returncode == 1
        assert f"error: {path}:" in result.stderr
    path.write_text(text)


def _check_finished_run(argv: list[str], folder: Path) -> None:
    """A start of a finished run trains nothing; without the record of what was trained it is an error."""
    alone = ["-m", "hbp_titan.train", *argv, "--levels=512:1"]
    steps = len(read_metrics(folder))
    assert run_python(*alone).returncode == 0
    assert len(read_metrics(folder)) == steps
    (folder / "sample_log").rename(folder / "lost")
    result = run_python(*alone)
    assert result.returncode == 1
    assert result.stderr.startswith(f"error: cannot resume: {folder / 'sample_log'}")


def _train_until_the_third_save(world: World, argv: list[str]) -> tuple[str, int]:
    """Return the message and the last step of a run in which rank 1's disk fills up."""
    write, calls = dcp_storage.write_safetensors, []

    def fail(*args: Any) -> dict[str, Any]:
        calls.append(args)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*args)

    if world.rank == 1:
        dcp_storage.write_safetensors = fail
    trainer = Trainer(load_config(argv), world)
    with pytest.raises(UserError) as caught:
        trainer.train()
    return str(caught.value), trainer.step


def test_full_disk_of_one_rank_ends_the_run_on_all(argv: list[str], whole: Path, tmp_path: Path) -> None:
    argv = [*argv, "--checkpoint.interval=2", f"--job.dump_folder={tmp_path}"]
    (message, step), other = run_distributed(_train_until_the_third_save, 2, argv)
    assert (message, step) == other
    assert "no space for rank-1.safetensors" in message
    assert 6 <= step <= 8
    assert _saved_steps(tmp_path) == [2, 4]
    assert run_distributed(train, 2, argv)[0][0] == 4
    assert_same_run(whole, tmp_path)


def test_preempted_run_saves_the_current_step_on_all_ranks_and_exits(
    argv: list[str], whole: Path, tmp_path: Path
) -> None:
    argv = [*argv, "--checkpoint.interval=1000", f"--job.dump_folder={tmp_path}"]
    # Where parameters and optimizer state are between steps may change as well.
    first = [*argv, "--parallelism.cpu_offload=true"]
    assert run_distributed(train_and_signal, 2, first, 5, signal.SIGUSR1) == [(EXIT_PREEMPTED, 6)] * 2
    assert _saved_steps(tmp_path) == [6]
    assert (tmp_path / "preempted").read_text() == "SIGUSR1 step 6\n"
    assert run_distributed(train, 2, argv)[0] == [6, len(read_metrics(whole))]
    assert not (tmp_path / "preempted").exists()
    assert_same_run(whole, tmp_path)


def _signal_after(argv: list[str], folder: Path, step: int, number: signal.Signals, rank: int | None) -> str:
    """Start a run, signal torchrun or one rank after `step`, and return all output."""
    release = folder.with_name(f"after-{number.name}")
    process = torchrun(argv, "tests.held_run", str(step), str(release))
    wait_until(lambda: len(read_metrics(folder)) >= step, process)
    os.kill(process.pid if rank is None else ranks_of(process.pid)[rank], number)
    if rank is not None:
        release.touch()  # for the other rank, which gets no signal
    output = process.communicate(timeout=DEADLINE)[0]
    assert process.returncode != 0
    return output


@pytest.mark.slow
@NEEDS_PROC
def test_torchrun_passes_signals_on_and_its_loader_workers_survive_them(
    argv: list[str], whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    # Workers are in the process groups of the ranks, which torchrun signals as well.
    argv = [*argv, "--checkpoint.interval=1000", f"--job.dump_folder={folder}", "--data.num_workers=1"]
    # A scheduler ends a job by SIGTERM to torchrun, which passes it on. SLURM warns by SIGUSR1 to one rank.
    _signal_after(argv, folder, 5, signal.SIGTERM, None)
    assert (folder / "preempted").read_text() == "SIGTERM step 6\n"
    output = _signal_after(argv, folder, 11, signal.SIGUSR1, 1)
    assert (folder / "preempted").read_text() == "SIGUSR1 step 12\n"
    assert f"exitcode  : {EXIT_PREEMPTED}" in output
    assert "resumed from step 6" in output
    assert run_distributed(train, 2, argv)[0][0] == 12
    assert_same_run(whole, folder)


@pytest.mark.slow
@NEEDS_PROC
def test_rank_whose_peer_is_gone_ends_within_seconds_of_a_signal(tmp_path: Path) -> None:
    # A stopped peer is to gloo what a dead one is to NCCL: the collective waits, and no Python handler runs.
    # One level: only a wait of a kind that was seen before can be too long.
    argv = [*write_tiny_run(tmp_path), "--levels=512:1"]
    process = torchrun(argv, "tests.faulty_run", "stops")
    wait_until((tmp_path / "run" / "stopped").exists, process)
    ranks = ranks_of(process.pid)
    time.sleep(1)
    os.kill(ranks[0], signal.SIGTERM)
    started = time.monotonic()
    while _is_running(ranks[0]) and time.monotonic() < started + 60:
        time.sleep(0.1)
    taken = time.monotonic() - started
    os.kill(ranks[1], signal.SIGKILL)
    output = process.communicate(timeout=60)[0]
    assert "rank 0: SIGTERM received, but no progress" in output
    assert taken < 20  # STUCK_SECONDS, on a busy machine


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
