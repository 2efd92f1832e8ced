"""scripts/simulate.py: each form prints its table, and a user's mistake ends in one line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hbp_titan.packing.synthetic import tulu3_longcite_like

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "simulate.py"


def run(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, words)], capture_output=True, text=True, timeout=120)


def test_estimate_names_memory_and_time_of_each_level() -> None:
    result = run(
        "--estimate", "h100-80gb", "--world_size", 32, "--flavor", "llama3_1_8b", "--levels", "16384:1,131072:8"
    )
    assert result.returncode == 0, result.stderr
    assert "estimated, not measured" in result.stdout
    for level in ("16384:1", "131072:8"):
        assert re.search(rf"^{level} +full, \d+ of 32 +\d+\.\d +yes ", result.stdout, re.MULTILINE)


def test_methods_are_replayed_on_given_lengths(tmp_path: Path) -> None:
    np.save(tmp_path / "l.npy", tulu3_longcite_like(3000))
    result = run("--lengths", tmp_path / "l.npy", "--methods", "isf,flexsp,hbp", "--ac_layers", 28)
    assert result.returncode == 0, result.stderr
    table = result.stdout[result.stdout.index("method") :]
    assert [line.split()[0] for line in table.splitlines() if not line.startswith(" ")] == [
        "method",
        "isf",
        "flexsp",
        "hbp",
    ]
    assert "3,000 samples" in result.stdout
    assert "simulated" in result.stdout


def test_calibration_prints_every_row_and_the_verdict(tmp_path: Path) -> None:
    rows = [{"level": 0, "seconds": 1 + n / 10, "loads": [[1, n, n * n, 1]]} for n in range(1, 11)]
    path = tmp_path / "measured.json"
    path.write_text(json.dumps({"levels": [{"max_tokens": 64}], "iterations": rows}))
    np.save(tmp_path / "l.npy", np.arange(1, 60))
    result = run("--calibrate", path, "--lengths", tmp_path / "l.npy", "--world_size", 2)
    assert result.returncode == 0, result.stderr
    assert len(re.findall(r"^\d+ +64 ", result.stdout, re.MULTILINE)) == 10
    assert result.stdout.count("held out\n") == 5
    assert "good enough to plan with" in result.stdout
    assert re.search(r"^hbp +[\d.]+ s an epoch, idle", result.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--estimate", "h100"), "did you mean h100-80gb?"),
        (("--methods", "hbq", "--num_samples", 100), "did you mean hbp?"),
        (("--calibrate", "missing.json"), "missing.json: No such file"),
        (("--estimate", "h100-80gb", "--world_size", 1, "--levels", "131072:1"), "not every level fits"),
        (("--world_size", 12,), "cp_degree=8 of the level with max_tokens=131072 does not divide the world size 12"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(words: tuple[object, ...], message: str) -> None:
    result = run(*words)
    assert result.returncode == 1
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
