"""A run that is killed in mid-epoch and started again repeats the uninterrupted one bit for bit."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.tiny_run import write_tiny_run

ROOT = Path(__file__).resolve().parents[1]


def _command(argv: list[str], num_ranks: int = 2) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={num_ranks}"]
    return [*launcher, "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "-m", "hbp_titan.train", *argv]


def _start(argv: list[str], num_ranks: int = 2) -> subprocess.Popen[str]:
    return subprocess.Popen(
        _command(argv, num_ranks),
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _alone(argv: list[str]) -> str:
    """What one rank says, without a launcher, on levels that suit it."""
    command = [sys.executable, "-m", "hbp_titan.train", *argv, "--levels=128:1,512:1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    return result.stdout + result.stderr


def _finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    return output


def _steps(folder: Path) -> list[dict[str, object]]:
    path = folder / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines() if line.endswith("}")]


def _kill_after(process: subprocess.Popen[str], folder: Path, step: int) -> None:
    deadline = time.monotonic() + 240
    while len(_steps(folder)) < step:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"{folder} did not reach step {step}"
        time.sleep(0.005)
    for pid in [*_descendants(process.pid), process.pid]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.communicate()


def _descendants(pid: int) -> list[int]:
    """The launcher gives each rank a session of its own: a signal to the group would miss them."""
    listed = subprocess.run(["ps", "-e", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    parent_of = {int(child): int(parent) for child, parent in (line.split() for line in listed.splitlines())}
    found = [child for child, parent in parent_of.items() if parent == pid]
    return found + [below for child in found for below in _descendants(child)]


def _audit(folder: Path) -> tuple[int, str, str]:
    command = [sys.executable, "scripts/audit_epoch.py", str(folder)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    return result.returncode, result.stdout, result.stderr


def _check_audit(folder: Path, reached: int) -> None:
    """The run was killed after step `reached` and resumed after step 10: what it trained in between is not counted."""
    code, table, errors = _audit(folder)
    assert (code, errors) == (0, "")
    assert "resumed after step 10" in table
    assert table.count("150  ") == table.count("each sample trained once") == 2
    first, second = ([*(folder / f"sample_log/start-000{n}").glob("rank-*.jsonl")] for n in (1, 2))
    assert len(first) == len(second) == 2
    assert min(len(path.read_text().splitlines()) for path in first) >= reached

    lines = second[0].read_text().splitlines(keepends=True)
    for wrong in (lines[:3] + lines[4:], lines[:4] + lines[3:]):
        second[0].write_text("".join(wrong))
        code, table, errors = _audit(folder)
        assert code == 1
        assert f"error: {second[0]}:" in errors
        assert "  wrong" in table
    second[0].write_text("".join(lines))


@pytest.fixture
def argv(tmp_path: Path) -> list[str]:
    return [
        *write_tiny_run(tmp_path, num_rows=150),
        "--training.epochs=2",
        "--checkpoint.interval=10",
        "--data.num_workers=1",
    ]


@pytest.mark.slow
def test_killed_run_repeats_the_uninterrupted_one_bit_for_bit(argv: list[str], tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    _finish(_start([*argv, f"--job.dump_folder={whole}"]))
    second = [*argv, f"--job.dump_folder={killed}"]
    _kill_after(_start(second), killed, step=14)
    reached = len(_steps(killed))
    assert 14 <= reached < len(_steps(whole))
    code, table, errors = _audit(killed)
    assert (code, errors) == (0, "")
    assert "in progress" in table
    output = _finish(_start(second))
    assert "resumed from step 10" in output
    assert "epoch 0: 150 samples, each trained once" in output
    assert "epoch 1: 150 samples, each trained once" in output

    kept = ("step", "epoch", "level", "loss", "loss_by_level", "grad_norm", "lr", "tokens")
    expected, found = ([[m[key] for key in kept] for m in _steps(folder)] for folder in (whole, killed))
    assert found == expected
    assert expected[-1][1] == 1  # the second epoch was reached, and the first one resumed in its middle
    _check_audit(killed, reached)
    weights, again = (load_file(folder / "hf" / "model.safetensors") for folder in (whole, killed))
    assert weights.keys() == again.keys()
    assert all(weights[name].equal(again[name]) for name in weights)

    assert "is complete at step" in _alone(second)
    (killed / "sample_log").rename(killed / "lost")
    output = _alone(second)
    assert f"error: cannot resume: {killed / 'sample_log'} does not have the samples of steps 1 to" in output
