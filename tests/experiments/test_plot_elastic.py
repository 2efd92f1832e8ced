"""The chart of a run on changing ranks, from runs that torchrun starts and a signal ends."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.programs import run_python
from tests.tiny_run import write_tiny_run

ROOT = Path(__file__).resolve().parents[2]


def _call(*words: str) -> subprocess.CompletedProcess[str]:
    return run_python(*words, timeout=500)


@pytest.mark.slow
def test_four_stretches_are_trained_drawn_and_audited(tmp_path: Path) -> None:
    argv = [word for word in write_tiny_run(tmp_path, num_rows=600) if not word.startswith("--job")]
    words = ["--folder", str(tmp_path), "--svg", str(tmp_path / "elastic.svg"), "--stretches", "4,2,1,4"]
    settings = ["--checkpoint.interval=3", "--checkpoint.export_hf=false", "--training.global_batch_tokens=600"]
    result = _call("scripts/plot_elastic.py", *words, *argv, *settings)
    assert result.returncode == 0, result.stderr
    for ranks, before in ((2, 4), (1, 2), (4, 1)):
        assert f"with {ranks} rank{'s' if ranks > 1 else ''} instead of {before}" in result.stdout
    svg = (tmp_path / "elastic.svg").read_text()
    assert [svg.count(f">{label}</text>") for label in ("4 ranks", "2 ranks", "1 rank")] == [4, 2, 2]
    for name in ("whole", "elastic"):
        audit = _call("scripts/audit_epoch.py", str(tmp_path / name))
        assert (audit.returncode, audit.stderr) == (0, "")
        assert "each sample trained once" in audit.stdout


def test_stretches_that_are_no_numbers_are_refused() -> None:
    result = _call("scripts/plot_elastic.py", "--stretches", "4,two")
    assert result.returncode == 1
    assert result.stderr == "error: --stretches 4,two: not numbers of ranks, parted by commas\n"
