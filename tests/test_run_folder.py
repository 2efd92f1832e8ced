"""A run folder in use by another run, or of another run: one line, and nothing in the folder is touched."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from scripts.convert_to_hf import main as convert_to_hf
from tests.data.preparing import run_script
from tests.programs import run_python
from tests.runs import read_metrics, wait_until
from tests.tiny_run import write_tiny_run


def _contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _start(argv: list[str], ranks: int = 0) -> tuple[int, str, list[str]]:
    """Exit code, output and error lines of a start."""
    result = run_python("-m", "hbp_titan.train", *argv, ranks=ranks)
    return result.returncode, result.stdout, result.stderr.splitlines()


def test_second_start_on_a_folder_in_use_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, release = tmp_path / "run", tmp_path / "release"
    argv = [*write_tiny_run(tmp_path), "--levels=512:1", "--training.steps=6", "--checkpoint.interval=2"]
    pool = ThreadPoolExecutor(1)
    running = pool.submit(run_python, "-m", "tests.held_run", 4, release, *argv, ranks=1)
    wait_until(lambda: running.done() or (folder / "checkpoint" / "step-4").exists())
    assert not running.done(), running.result()
    # What a start without the lock would delete, as what a killed save has left.
    partial = folder / "checkpoint" / "step-6.partial" / "rank-0.safetensors"
    partial.parent.mkdir()
    partial.touch()
    before = _contents(folder)
    code, output, errors = _start(argv, ranks=2)
    assert (code, output, len(errors)) == (1, "", 1), errors
    assert errors[0].startswith(f"error: {folder} is in use by another run: host {os.uname().nodename}, process ")
    assert run_script(capsys, "--check_run_folder", "--world_size", "1", *argv) == (1, "", f"{errors[0]}\n")
    assert _contents(folder) == before
    partial.unlink()
    partial.parent.rmdir()
    release.touch()
    ended = running.result()
    assert ended.returncode == 0, ended.stderr
    assert len(read_metrics(folder)) == 6
    assert not (folder / "run.lock").exists()
    assert run_python("scripts/audit_epoch.py", folder).returncode == 0


def test_resume_with_other_initial_weights_is_refused_unless_allowed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    argv = [*write_tiny_run(tmp_path), "--levels=512:1", "--checkpoint.interval=2", "--checkpoint.export_hf=false"]
    assert _start([*argv, "--training.steps=2"])[0] == 0
    convert_to_hf([str(folder), str(tmp_path / "hf")])
    argv += ["--training.steps=4", f"--checkpoint.initial_load_path={tmp_path / 'hf'}"]
    before = _contents(folder)
    code, output, errors = _start(argv)
    assert (code, len(errors)) == (1, 1), errors
    assert f'initial_weights: "new, training.seed = 42" (checkpoint) vs {tmp_path / "hf"}' in errors[0]
    assert output == ""
    assert run_script(capsys, "--world_size", "1", *argv)[2] == f"{errors[0]}\n"
    # Nor is a run replaced that could be resumed.
    code, output, errors = _start([*argv, "--checkpoint.enable=false"])
    assert (code, len(errors)) == (1, 1), errors
    assert "checkpoint.enable = false starts over" in errors[0]
    assert _contents(folder) == before
    argv.append("--checkpoint.allow_changed=initial_weights")
    for name in ("plan", "sample_log"):
        (folder / name).rename(folder / "lost")
        code, _, line = run_script(capsys, "--world_size", "1", *argv)
        assert code == 1
        assert line.startswith(f"error: cannot resume: {folder / name}")
        (folder / "lost").rename(folder / name)
    code, output, errors = _start(argv)
    assert code == 0, errors
    assert f"weights: those of step 2 in {folder / 'checkpoint'}" in output.replace("\n    ", " ")
    assert "resumed from step 2" in output
