"""scripts/simulate.py: each form prints its table, and a user's mistake ends in one line."""

from __future__ import annotations

import functools
import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from hbp_titan.errors import format_error
from hbp_titan.tuning.simulate import tulu3_longcite_like
from tests.programs import run_python

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "simulate.py"


@functools.cache
def script() -> ModuleType:
    """The script as a module: a process for each test would mostly import torch."""
    spec = importlib.util.spec_from_file_location("simulate_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_estimate_names_memory_and_time_of_each_level(capsys: pytest.CaptureFixture[str]) -> None:
    words = "--estimate h100-80gb --world_size 32 --flavor llama3_1_8b --levels 16384:1,131072:8"
    script().main(words.split())
    printed = capsys.readouterr().out
    assert "estimated, not measured" in printed
    for level in ("16384:1", "131072:8"):
        assert re.search(rf"^{level} +full, \d+ of 32 +\d+\.\d +yes ", printed, re.MULTILINE)


def test_methods_are_replayed_on_given_lengths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "l.npy", tulu3_longcite_like(3000))
    script().main(["--lengths", str(tmp_path / "l.npy"), "--methods", "isf,flexsp,hbp", "--ac_layers", "28"])
    printed = capsys.readouterr().out
    rows = [line.split()[0] for line in printed[printed.index("method") :].splitlines() if not line.startswith(" ")]
    assert rows == ["method", "isf", "flexsp", "hbp"]
    assert "3,000 samples" in printed
    assert "simulated" in printed


def test_calibration_prints_every_row_and_the_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"level": 0, "seconds": 1 + n / 10, "loads": [[1, n, n * n, 1]]} for n in range(1, 11)]
    path = tmp_path / "measured.json"
    path.write_text(json.dumps({"levels": [{"max_tokens": 64}], "iterations": rows}))
    np.save(tmp_path / "l.npy", np.arange(1, 60))
    script().main(["--calibrate", str(path), "--lengths", str(tmp_path / "l.npy"), "--world_size", "2"])
    printed = capsys.readouterr().out
    assert len(re.findall(r"^\d+ +64 ", printed, re.MULTILINE)) == 10
    assert printed.count("held out\n") == 5
    assert "good enough to plan with" in printed
    assert re.search(r"^hbp +[\d.]+ s an epoch, idle", printed, re.MULTILINE)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--estimate h100", "did you mean h100-80gb?"),
        ("--methods hbq --num_samples 100", "did you mean hbp?"),
        ("--calibrate missing.json", "missing.json: No such file"),
        ("--estimate h100-80gb --world_size 1 --levels 131072:1", "not every level fits"),
        ("--world_size 12", "cp_degree=8 of the level with max_tokens=131072 does not divide the world size 12"),
        ("--levels 16384:1,131072:64 --world_size 64", "cp_degree=64 does not divide the model's 32 attention heads"),
    ],
)
def test_a_mistake_is_named(words: str, message: str) -> None:
    with pytest.raises((ValueError, OSError)) as raised:
        script().main(words.split())
    assert message in format_error(raised.value)


def test_a_mistake_ends_in_one_line_on_stderr() -> None:
    result = run_python(SCRIPT, "--estimate", "h100")
    assert result.returncode == 1
    assert result.stderr.startswith("error: hardware 'h100'")
    assert len(result.stderr.splitlines()) == 1
