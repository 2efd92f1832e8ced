"""scripts/plan_packing.py: its output files, and user errors on one line."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from hbp_titan.errors import exit_on_user_error
from hbp_titan.packing import METHODS, build_plan, load_plan, measure, parse_levels
from hbp_titan.tuning.simulate import tulu3_longcite_like
from scripts import plan_packing

LENGTHS = tulu3_longcite_like(3000, seed=9)


@pytest.fixture
def lengths_file(tmp_path):
    np.save(tmp_path / "lengths.npy", LENGTHS)
    return tmp_path / "lengths.npy"


def run(*words):
    exit_on_user_error(lambda: plan_packing.main([str(word) for word in words]))


def test_levels_side_by_side_are_compared_with_levels_one_at_a_time(lengths_file, tmp_path):
    levels = "16384:1,32768:2,32768:4,131072:8"
    words = ["--lengths", lengths_file, "--world_size", 8, "--levels", levels, "--level_order", "parallel"]
    run(*words, "--compare", "--json", tmp_path / "out.json", "--html", tmp_path / "out.html")
    found = json.loads((tmp_path / "out.json").read_text())["methods"]
    lengths, largest = LENGTHS, parse_levels("131072:8")
    assert found["isf"]["iterations"] == build_plan(lengths, largest, 8, "isf").num_iterations
    chosen = build_plan(lengths, parse_levels(levels), 8, level_order="parallel")
    assert found["hbp"]["time_imbalance"] == measure(chosen).time_imbalance
    assert "side by side" in (tmp_path / "out.html").read_text()


def test_compare_writes_every_method(lengths_file, tmp_path, capsys):
    run("--lengths", lengths_file, "--world_size", 8, "--compare", "--json", tmp_path / "out.json")
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["world_size"] == 8
    assert set(written["methods"]) == set(METHODS)
    m = measure(build_plan(LENGTHS, parse_levels("16384:1,131072:8"), 8))
    for key in ("dbr", "pr", "abr", "cr", "ave_tokens", "time_imbalance", "iterations"):
        assert written["methods"]["hbp"][key] == getattr(m, key)
        assert all(key in values for values in written["methods"].values())
    assert written["methods"]["hbp"]["seconds"] > 0
    printed = capsys.readouterr().out
    for name in METHODS:
        assert re.search(rf"^{name} ", printed, re.MULTILINE)


@pytest.mark.parametrize("lengths", [LENGTHS, [5], [7] * 40, [131072]], ids=["usual", "one", "equal", "full"])
def test_the_page_needs_no_other_file(tmp_path, lengths):
    np.save(tmp_path / "l.npy", np.array(lengths))
    run("--lengths", tmp_path / "l.npy", "--world_size", 2, "--levels", "16384:1,131072:2", "--html", tmp_path / "p")
    text = (tmp_path / "p").read_text()
    for word in ("://", "<script", "url(", "nan"):
        assert word not in text
    assert text.count("<svg") == text.count("</svg>") > 0


def test_a_token_store_provides_loss_tokens(tmp_path):
    np.save(tmp_path / "lengths.npy", np.array([5, 6, 7]))
    np.save(tmp_path / "loss_tokens.npy", np.array([1, 2, 3]))
    run("--store", tmp_path, "--world_size", 2, "--levels", "16:1", "--seed", 4, "--save_plan", tmp_path / "p")
    plan = load_plan(tmp_path / "p", {"seed": 4, "world_size": 2, "method": "hbp"})
    assert plan.step_loss_tokens.sum() == 6


def test_overlong_samples_are_an_error_or_skipped_and_listed_or_truncated(tmp_path, capsys):
    np.save(tmp_path / "l.npy", np.array([5, 60, 7]))
    words = ("--lengths", tmp_path / "l.npy", "--world_size", 1, "--levels", "16:1", "--json", tmp_path / "j")
    with pytest.raises(SystemExit):
        run(*words)
    assert "sample 1 has 60 tokens" in capsys.readouterr().err
    run(*words, "--overlong", "skip")
    skipped = json.loads((tmp_path / "j").read_text())
    assert (skipped["skipped"], skipped["samples"], skipped["tokens"]) == ([1], 2, 12)
    run(*words, "--overlong", "truncate")
    assert json.loads((tmp_path / "j").read_text())["tokens"] == 5 + 16 + 7


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "data"),
        (("--lengths", "missing.npy"), "missing.npy"),
        (("--lengths", "text.npy"), "text.npy"),
        (("--lengths", "matrix.npy"), "one-dimensional"),
        (("--lengths", "lengths.npy", "--method", "isv"), "isf"),
        (("--lengths", "lengths.npy", "--levels", "16"), "max_tokens"),
        (("--lengths", "lengths.npy", "--training.steps", "3"), "training.steps"),
    ],
)
def test_a_user_error_is_one_line(lengths_file, monkeypatch, capsys, words, message):
    monkeypatch.chdir(lengths_file.parent)
    (lengths_file.parent / "text.npy").write_text("hello")
    np.save(lengths_file.parent / "matrix.npy", np.ones((2, 2)))
    with pytest.raises(SystemExit) as exit:
        run(*words, "--world_size", 8)
    assert exit.value.code == 1
    assert re.fullmatch(rf"error: .*{message}.*\n", capsys.readouterr().err)
