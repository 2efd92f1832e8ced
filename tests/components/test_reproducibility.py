"""run.json says of each start what it ran on; a checkout, a changed one and none are told apart."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy
import pytest
import torch

import hbp_titan
from hbp_titan.components.resume import code_version, package_versions, read_starts, record_start, set_determinism
from hbp_titan.config import load_config

SEEDS = ["--data.seed=1", "--packing.seed=2", "--training.seed=3", "--training.rng_seed=4"]


def _git(folder: Path, *words: str) -> str:
    named = ["-c", "user.name=a", "-c", "user.email=a@b"]
    return subprocess.run(["git", "-C", folder, *named, *words], check=True, capture_output=True, text=True).stdout


def test_each_start_is_added_with_all_that_it_ran_on(tmp_path: Path) -> None:
    config = load_config([f"--job.dump_folder={tmp_path / 'run'}", "--levels=128", *SEEDS])
    record_start(config, 0, 2, torch.device("cpu"))
    record_start(config, 7, 4, torch.device("cpu"))
    first, second = read_starts(tmp_path / "run" / "run.json")
    assert (first["first_step"], first["world_size"]) == (1, 2)
    assert (second["first_step"], second["world_size"]) == (8, 4)
    assert first["seeds"] == {"data.seed": 1, "packing.seed": 2, "training.seed": 3, "training.rng_seed": 4}
    assert first["config"]["levels"][0]["max_tokens"] == 128
    assert first["config"]["packing"]["seed"] == 2
    assert first["device"] == "cpu"
    assert first["code"].keys() == {"commit", "dirty"} or first["code"]["why"]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.json"]


def test_generators_start_from_the_seed_and_kernels_are_held_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = torch.are_deterministic_algorithms_enabled()
    try:
        set_determinism(5, deterministic=False)
        drawn = torch.rand(3)
        assert not torch.are_deterministic_algorithms_enabled()
        assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
        set_determinism(5, deterministic=True)
        assert torch.rand(3).equal(drawn)
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(before)


def test_versions_are_those_that_are_imported() -> None:
    found = package_versions()
    assert found["torch"] == torch.__version__.split("+")[0] or found["torch"] == torch.__version__
    assert found["numpy"] == numpy.__version__
    assert found["hbp_titan"] == hbp_titan.__version__
    assert None not in found.values()


def test_a_clean_checkout_a_changed_one_and_none_are_told_apart(tmp_path: Path) -> None:
    root = tmp_path / "repo"
    root.mkdir()
    assert code_version(root)["commit"] is None
    assert "not a git repository" in code_version(root)["why"]
    _git(root, "init")
    (root / "a.py").write_text("1")
    _git(root, "add", "a.py")
    _git(root, "commit", "-m", "a")
    commit = _git(root, "rev-parse", "HEAD").strip()
    assert code_version(root) == {"commit": commit, "dirty": False}
    (root / "b.py").write_text("2")
    assert code_version(root) == {"commit": commit, "dirty": True}
    # Installed into a folder of somebody's checkout: the commit would be of other code.
    (root / "site").mkdir()
    assert code_version(root / "site") == {"commit": None, "why": f"{root / 'site'} is not a git checkout of its own"}


def test_no_git_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert code_version(tmp_path) == {"commit": None, "why": "git is not installed"}


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    for text in ("{", "[]", '{"starts": 1}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"run.json is damaged: move it away"):
            read_starts(path)
