"""A signal makes a run save the step it is in and leave; the same command goes on as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hbp_titan.components.checkpoint import completed_checkpoints
from hbp_titan.components.faults import EXIT_PREEMPTED, Preemption
from hbp_titan.testing.local_ranks import run_distributed
from tests.killed_run import outcome, train
from tests.tiny_run import write_tiny_run

ROOT = Path(__file__).resolve().parents[1]
DEADLINE = 120
NEEDS_PROC = pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the ranks in /proc")


def test_signals_are_noted_inside_and_as_before_outside(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)
    with Preemption(tmp_path, enabled=True) as preemption:
        assert preemption.received == 0
        signal.raise_signal(signal.SIGUSR1)
        assert preemption.received == signal.SIGUSR1
        signal.raise_signal(signal.SIGTERM)
        assert preemption.received == signal.SIGTERM
        assert preemption.poll_signal() == signal.SIGUSR1
        assert preemption.poll_signal() == signal.SIGUSR1
        child = os.fork()
        if child == 0:  # a data worker, say: it has nothing to save, and must end
            signal.raise_signal(signal.SIGTERM)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == signal.SIGTERM
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)) == before
    with Preemption(tmp_path, enabled=False):
        assert signal.getsignal(signal.SIGTERM) == before[0]


def _start(argv: list[str], *module: str) -> subprocess.Popen[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    return subprocess.Popen(
        [*launcher, "--rdzv-endpoint=localhost:0", "-m", *(module or ("hbp_titan.train",)), *argv],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _steps(folder: Path) -> list[int]:
    path = folder / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line)["step"] for line in text.splitlines() if line.endswith("}")]


def _ranks(launcher: int) -> Iterator[tuple[str, int]]:
    """(RANK, process id) of torchrun's children."""
    listed = subprocess.run(["ps", "-e", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    for pid, parent in (map(int, line.split()) for line in listed.splitlines()):
        if parent == launcher:
            environment = dict(
                item.split("=", 1) for item in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in item
            )
            yield environment["RANK"], pid


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _signal_after(
    argv: list[str], folder: Path, step: int, number: signal.Signals, rank: str | None
) -> tuple[int, str]:
    """Start a run and signal torchrun, or one rank, after `step`; torchrun's exit code and all that it said."""
    release = folder.with_name(f"after-{number.name}")
    process = _start(argv, "tests.held_run", str(step), str(release))
    deadline = time.monotonic() + DEADLINE
    while max(_steps(folder), default=0) < step:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"{folder} did not reach step {step}"
        time.sleep(0.005)
    os.kill(process.pid if rank is None else dict(_ranks(process.pid))[rank], number)
    if rank is not None:
        release.touch()  # for the other rank, which gets no signal
    output = process.communicate(timeout=DEADLINE)[0]
    return process.returncode, output


# As a scheduler ends a job: torchrun gets SIGTERM and passes it on. As SLURM warns: one rank gets SIGUSR1.
TERMINATED, WARNED = (signal.SIGTERM, None), (signal.SIGUSR1, "1")


@NEEDS_PROC
@pytest.mark.parametrize("signals", [[WARNED], pytest.param([TERMINATED, WARNED], marks=pytest.mark.slow)])
def test_signalled_run_saves_its_step_leaves_and_goes_on_bit_for_bit(
    tmp_path: Path, signals: list[tuple[signal.Signals, str | None]]
) -> None:
    argv = [*write_tiny_run(tmp_path), "--training.epochs=2", "--checkpoint.interval=1000"]
    # Processes of the ranks' groups, which torchrun signals as well.
    argv.append("--data.num_workers=1")
    whole, folder = tmp_path / "whole", tmp_path / "signalled"
    run_distributed(train, 2, [*argv, f"--job.dump_folder={whole}"])
    total = _steps(whole)[-1]
    argv.append(f"--job.dump_folder={folder}")

    reached = 0
    for number, rank in signals:
        code, output = _signal_after(argv, folder, reached + 5, number, rank)
        (saved,) = completed_checkpoints(folder / "checkpoint")[-1:]
        step = int(saved.name.removeprefix("step-"))
        assert step == reached + 6 < total
        assert _steps(folder)[-1] == step
        assert f"{number.name}: saved step {step}; the same command goes on from there (exit code 75)" in output
        assert (folder / "preempted").read_text() == f"{number.name} step {step}\n"
        assert code != 0
        if rank is not None:
            assert f"exitcode  : {EXIT_PREEMPTED}" in output
            assert not reached or f"resumed from step {reached}" in output
        assert 'Traceback (most recent call last):\n  File "' + str(ROOT) not in output
        reached = step

    assert run_distributed(train, 2, argv)[0] == [reached, total]
    assert not (folder / "preempted").exists()
    (expected, weights), (found, again) = outcome(whole), outcome(folder)
    assert found == expected
    assert all(torch.equal(weights[name], again[name]) for name in weights)


@pytest.mark.slow
@NEEDS_PROC
def test_a_rank_whose_peer_is_gone_leaves_within_seconds_of_a_signal(tmp_path: Path) -> None:
    # A stopped peer is what a dead one is to NCCL: the collective waits, and no handler in Python runs.
    argv = [*write_tiny_run(tmp_path), "--levels=128:1,512:1"]
    process = _start(argv, "tests.faulty_run", "stops")
    deadline = time.monotonic() + DEADLINE
    while not (tmp_path / "run" / "stopped").exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    ranks = dict(_ranks(process.pid))
    time.sleep(1)
    os.kill(ranks["0"], signal.SIGTERM)
    started = time.monotonic()
    while _runs(ranks["0"]) and time.monotonic() < started + 60:
        time.sleep(0.1)
    taken = time.monotonic() - started
    os.kill(ranks["1"], signal.SIGKILL)
    output = process.communicate(timeout=60)[0]
    assert "rank 0: SIGTERM, but no progress for" in output
    assert taken < 20  # STUCK_SECONDS, on a busy machine
