"""scripts/plan_packing.py: what it writes, and that a user's mistake ends in one line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hbp_titan.packing import METHODS, build_plan, load_plan, measure, parse_levels
from hbp_titan.tuning.simulate import tulu3_longcite_like

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "plan_packing.py"
LENGTHS = tulu3_longcite_like(3000, seed=9)


@pytest.fixture
def lengths_file(tmp_path):
    np.save(tmp_path / "lengths.npy", LENGTHS)
    return tmp_path / "lengths.npy"


def run(*words, cwd=None):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, words)], capture_output=True, text=True, cwd=cwd, timeout=120
    )


def test_compare_writes_every_method_in_the_agreed_shape(lengths_file, tmp_path):
    result = run("--lengths", lengths_file, "--world_size", 8, "--compare", "--json", "out.json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["world_size"] == 8
    assert set(written["methods"]) == set(METHODS)
    m = measure(build_plan(LENGTHS, parse_levels("16384:1,131072:8"), 8))
    for key in ("dbr", "pr", "abr", "cr", "ave_tokens", "time_imbalance", "iterations"):
        assert written["methods"]["hbp"][key] == getattr(m, key)
        assert all(key in values for values in written["methods"].values())
    assert written["methods"]["hbp"]["seconds"] > 0
    for name in METHODS:
        assert re.search(rf"^{name} ", result.stdout, re.MULTILINE)


def test_the_page_is_whole_in_itself(lengths_file, tmp_path):
    page = tmp_path / "page.html"
    assert run("--lengths", lengths_file, "--world_size", 8, "--html", page).returncode == 0
    text = page.read_text()
    assert "http" not in text
    assert "<script" not in text
    assert "url(" not in text
    # Two of lengths, two of balance and one of fill per level, one of the epoch, one of the steps.
    assert text.count("<svg") == text.count("</svg>") == 2 + 2 * 3 + 2
    for title in ("Share of tokens by length", "before:", "after:", "Fill of the 16K packs", "Levels over the epoch"):
        assert title in text


@pytest.mark.parametrize("lengths", [[5], [7] * 40, [131072]])
def test_the_page_of_tiny_data(tmp_path, lengths):
    np.save(tmp_path / "l.npy", np.array(lengths))
    result = run("--lengths", tmp_path / "l.npy", "--world_size", 2, "--html", tmp_path / "p.html")
    assert result.returncode == 0, result.stderr
    assert "nan" not in (tmp_path / "p.html").read_text()


def test_a_store_folder_brings_the_loss_tokens(tmp_path):
    np.save(tmp_path / "lengths.npy", np.array([5, 6, 7]))
    np.save(tmp_path / "loss_tokens.npy", np.array([1, 2, 3]))
    words = ("--store", tmp_path, "--world_size", 2, "--levels", "16:1", "--seed", 4, "--save_plan", tmp_path / "p")
    assert run(*words).returncode == 0
    plan = load_plan(tmp_path / "p", {"seed": 4, "world_size": 2, "method": "hbp"})
    assert plan.step_loss_tokens.sum() == 6


def test_overlong_samples_are_an_error_or_skipped_and_listed_or_truncated(tmp_path):
    np.save(tmp_path / "l.npy", np.array([5, 60, 7]))
    words = ("--lengths", tmp_path / "l.npy", "--world_size", 1, "--levels", "16:1", "--json", tmp_path / "j")
    refused = run(*words)
    assert refused.returncode == 1
    assert "sample 1 has 60 tokens" in refused.stderr
    assert run(*words, "--overlong", "skip").returncode == 0
    skipped = json.loads((tmp_path / "j").read_text())
    assert (skipped["skipped"], skipped["samples"], skipped["tokens"]) == ([1], 2, 12)
    assert run(*words, "--overlong", "truncate").returncode == 0
    assert json.loads((tmp_path / "j").read_text())["tokens"] == 5 + 16 + 7


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "no data is named"),
        (("--lengths", "missing.npy"), "missing.npy: No such file"),
        (("--lengths", "text.npy"), "text.npy: not an NPY file"),
        (("--lengths", "matrix.npy"), "matrix.npy: expected one-dimensional integers"),
        (("--lengths", "lengths.npy", "--method", "isv"), "did you mean isf"),
        (("--lengths", "lengths.npy", "--levels", "16"), "has .* tokens, more than"),
        (("--lengths", "lengths.npy", "--training.steps", "3"), "unknown argument '--training.steps'"),
    ],
)
def test_a_mistake_is_one_line(lengths_file, words, message):
    (lengths_file.parent / "text.npy").write_text("hello")
    np.save(lengths_file.parent / "matrix.npy", np.ones((2, 2)))
    result = run(*words, "--world_size", 8, cwd=lengths_file.parent)
    assert result.returncode == 1
    assert re.fullmatch(rf"error: .*{message}.*\n", result.stderr)
