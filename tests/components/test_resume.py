"""Resume invariants, run.json and determinism; the resumption itself is tested in tests/test_resume.py."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import hbp_titan
from hbp_titan.components.resume import (
    check_resume_compatible,
    code_version,
    package_versions,
    record_start,
    recorded_starts,
    resume_invariants,
    set_determinism,
)
from hbp_titan.config import load_config
from tests.tiny_run import ARGS

PATH = Path("run/checkpoint/step-4")


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    (tmp_path / "tokenizer.json").write_text("{}")
    return tmp_path


def _invariants(tokenizer: Path, *words: str, data: str = "a" * 64, **changes: Any) -> dict[str, Any]:
    config = load_config([f"--model.tokenizer_path={tokenizer}", "--levels=128", *words])
    return resume_invariants(config, dataclasses.replace(ARGS, **changes), data)


def test_settings_that_may_change_are_not_compared(tokenizer: Path) -> None:
    saved = json.loads(json.dumps(_invariants(tokenizer)))
    changed = [
        "--float8.recipe=rowwise",
        "--levels=64,512:2",
        "--training.epochs=3",
        "--checkpoint.interval=7",
        "--compile.enable=true",
    ]
    check_resume_compatible(saved, _invariants(tokenizer, *changed), PATH)
    check_resume_compatible(saved, _invariants(tokenizer, "--parallelism.dp_replicate=2", name="renamed"), PATH)


def test_every_difference_is_named(tokenizer: Path) -> None:
    saved = _invariants(tokenizer)
    words = ["--packing.seed=1", "--optimizer.lr=0.5", "--lr_scheduler.decay=linear", "--optimizer.name=muon"]
    words.append("--optimizer.state_dtype=bfloat16")
    (tokenizer / "tokenizer.json").write_text("{ }")
    own = _invariants(tokenizer, *words, data="b" * 64, num_layers=3)
    del saved["packing.level_order"]
    with pytest.raises(ValueError, match="cannot resume") as error:
        check_resume_compatible(saved, own, PATH)
    message = str(error.value)
    names = (
        "data",
        "tokenizer",
        "packing.seed",
        "packing.level_order",
        "optimizer.lr",
        "optimizer.name",
        "optimizer.state_dtype",
        "lr_scheduler.decay",
        "model.num_layers",
    )
    assert all(f" {name}: " in message for name in names)
    assert message.count("(checkpoint) vs") == len(names)
    assert "data.max_length_policy" in message


def _weights(folder: Path, name: str, value: float) -> Path:
    (folder / name).mkdir()
    (folder / name / "config.json").write_text("{}")
    # Larger than what is sampled, and different everywhere.
    save_file({"w": torch.full((1 << 19,), value)}, folder / name / "model.safetensors")
    return folder / name


def test_initial_weights_count_by_content_and_may_be_allowed_to_differ(tokenizer: Path) -> None:
    base, other = (_weights(tokenizer, name, value) for name, value in (("base", 1.0), ("other", 2.0)))
    saved, moved = _invariants(tokenizer, f"--checkpoint.initial_load_path={base}"), base.rename(tokenizer / "moved")
    check_resume_compatible(saved, _invariants(tokenizer, f"--checkpoint.initial_load_path={moved}"), PATH)
    for words, value in ((f"--checkpoint.initial_load_path={other}", str(other)), ("--training.seed=7", "seed = 7")):
        own = _invariants(tokenizer, words, "--packing.seed=42")
        with pytest.raises(ValueError, match="initial_weights") as error:
            check_resume_compatible(saved, own, PATH)
        assert str(base) in str(error.value)
        assert value in str(error.value)
        assert "--checkpoint.allow_changed initial_weights" in str(error.value)
        check_resume_compatible(saved, own, PATH, ["initial_weights"])
        with pytest.raises(ValueError, match=r"optimizer\.lr") as error:
            check_resume_compatible({**saved, "optimizer.lr": 1.0}, own, PATH, ["initial_weights"])
        assert "initial_weights" not in str(error.value)


def test_what_the_data_are_made_of_is_named_only_if_they_differ(tokenizer: Path) -> None:
    saved, words = _invariants(tokenizer), ["--data.train_on=all", "--data.train_files=moved.jsonl", "--data.seed=5"]
    check_resume_compatible(saved, _invariants(tokenizer, *words), PATH)
    with pytest.raises(ValueError, match="data") as error:
        check_resume_compatible(saved, _invariants(tokenizer, *words, data="b" * 64), PATH)
    assert 'data.train_on: "assistant" (checkpoint) vs "all" (this run)' in str(error.value)
    assert "moved.jsonl" in str(error.value)
    assert "data.seed: 42" in str(error.value)
    assert "allow_changed" not in str(error.value)


def test_adapters_that_differ_are_named(tokenizer: Path) -> None:
    saved = _invariants(tokenizer, "--lora.rank=8")
    for words in (["--lora.rank=4"], ["--lora.rank=0"], ["--lora.rank=8", "--lora.alpha=2"]):
        with pytest.raises(ValueError, match=r"lora\."):
            check_resume_compatible(saved, _invariants(tokenizer, *words), PATH)


def test_each_start_is_added_to_run_json(tmp_path: Path) -> None:
    seeds = {"data.seed": 1, "packing.seed": 2, "training.seed": 3, "training.rng_seed": 4}
    words = [f"--{key}={value}" for key, value in seeds.items()]
    config = load_config([f"--job.dump_folder={tmp_path / 'run'}", "--levels=128", *words])
    record_start(config, 0, 2, torch.device("cpu"))
    record_start(config, 7, 4, torch.device("cpu"))
    first, second = recorded_starts(tmp_path / "run" / "run.json")
    assert (first["first_step"], first["world_size"]) == (1, 2)
    assert (second["first_step"], second["world_size"]) == (8, 4)
    assert first["seeds"] == seeds
    assert first["config"]["levels"][0]["max_tokens"] == 128
    assert first["device"] == "cpu"
    assert first["packages"] == package_versions()
    assert first["code"].keys() == {"commit", "dirty"} or first["code"]["why"]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.json"]


@pytest.mark.parametrize("text", ["{", "[]", '{"starts": 1}'])
def test_corrupt_run_json_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"run\.json"):
        recorded_starts(path)


def test_generators_start_from_the_seed_and_kernels_are_deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["hbp_titan"] == hbp_titan.__version__
    assert None not in found.values()


def _git(folder: Path, *words: str) -> str:
    named = ["-c", "user.name=a", "-c", "user.email=a@b"]
    return subprocess.run(["git", "-C", folder, *named, *words], check=True, capture_output=True, text=True).stdout


def test_code_version_is_of_a_clean_checkout_a_changed_one_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "repo"
    root.mkdir()
    assert "not a git repository" in code_version(root)["why"]
    _git(root, "init")
    (root / "scripts").mkdir()
    (root / "scripts" / "a.py").write_text("1")
    _git(root, "add", "scripts")
    _git(root, "commit", "-m", "a")
    commit = _git(root, "rev-parse", "HEAD").strip()
    assert code_version(root) == {"commit": commit, "dirty": False}
    for name in ("slurm-7.out", "my_data.jsonl", "X.toml"):
        (root / name).touch()
    assert code_version(root) == {"commit": commit, "dirty": False}
    (root / "scripts" / "b.py").write_text("2")
    assert code_version(root) == {"commit": commit, "dirty": True}
    # Installed into a folder of another checkout, whose commit says nothing about this code.
    (root / "site").mkdir()
    assert code_version(root / "site")["commit"] is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert code_version(root) == {"commit": None, "why": "git is not installed"}
