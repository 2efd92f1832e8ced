"""The study's command: what it refuses, and a whole small study that is asked for twice."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hbp_titan.experiments.study.quality import BASE, BUILT_IN, MODEL, paired_difference, study_config
from tests.tiny_run import write_tiny_run

ROOT = Path(__file__).resolve().parents[2]


def _call(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "scripts/quality_study.py", *words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )


def test_without_a_config_file_the_built_in_study_is_meant(tmp_path: Path) -> None:
    config = study_config(["--optimizer.lr=1e-3"], tmp_path)
    assert [(level.max_tokens, level.cp_degree) for level in config.levels] == [(256, 1), (1024, 2)]
    assert config.optimizer.lr == 1e-3
    assert config.model.hf_path == f"{tmp_path}/model"
    assert config.checkpoint.initial_load_path == f"{tmp_path}/base/seed-{{seed}}/hf"
    assert config.validation.enable
    assert not config.checkpoint.export_hf
    # Of what is short in the study the base knows the kind; the study's long samples it cannot have seen.
    assert "--levels=256:1" in BASE
    assert "--levels=256:1,1024:2" in BUILT_IN
    assert MODEL.num_layers == 2


def test_a_study_needs_levels_and_held_out_samples(tmp_path: Path) -> None:
    (tmp_path / "empty.toml").write_text("")
    own = [f"--job.config_file={tmp_path / 'empty.toml'}"]
    with pytest.raises(ValueError, match="the same levels: name them in"):
        study_config([*own, "--packing.auto_levels=true"], tmp_path)
    with pytest.raises(ValueError, match=r"nothing is held out: name data.validation_files"):
        study_config([*own, "--levels=128:1"], tmp_path)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--seeds", "1,x"], "--seeds 1,x: not different whole numbers, parted by commas"),
        (["--seeds", "2,2"], "--seeds 2,2: not different whole numbers, parted by commas"),
        (["--parallel", "0"], "--parallel 0 must be at least 1"),
        (["--variants", "ifs"], "did you mean isf?"),
    ],
)
def test_a_mistake_is_named(words: list[str], says: str, tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("quality_study", ROOT / "scripts" / "quality_study.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    with pytest.raises(ValueError, match=re.escape(says)):
        script.main([*words, "--folder", str(tmp_path / "study")])
    assert not (tmp_path / "study").exists()


@pytest.mark.slow
def test_a_study_is_trained_once_and_its_tables_are_of_its_runs(tmp_path: Path) -> None:
    argv = write_tiny_run(tmp_path)
    (tmp_path / "empty.toml").write_text("")
    words = [
        f"--job.config_file={tmp_path / 'empty.toml'}",
        *argv,
        f"--data.validation_files={tmp_path / 'train.jsonl'}",
    ]
    words += ["--checkpoint.enable=false", "--training.global_batch_tokens=1200", "--validation.interval=2"]
    words += ["--folder", str(tmp_path / "study"), "--variants", "sum", "--ranks", "2", "--parallel", "2"]
    result = _call(*words, "--seeds", "1,2")
    assert result.returncode == 0, result.stderr
    study = json.loads((tmp_path / "study" / "study.json").read_text())
    losses = {(run["variant"], run["seed"]): run["loss"] for run in study["runs"]}
    assert sorted(losses) == [("hbp", 1), ("hbp", 2), ("sum", 1), ("sum", 2)]
    assert len(set(losses.values())) == 4
    found = paired_difference([losses["sum", 1], losses["sum", 2]], [losses["hbp", 1], losses["hbp", 2]])
    assert f"{found.mean:+.4f} ({found.low:+.4f} to {found.high:+.4f})" in result.stdout
    for run in study["runs"]:
        assert [run["steps"], run["tokens"]] == [study["runs"][0]["steps"], study["runs"][0]["tokens"]]
        assert run["loss"] < run["course"][0][1]
        bands = run["by_length"].values()
        mean = sum(b["loss"] * b["trained_tokens"] for b in bands) / sum(b["trained_tokens"] for b in bands)
        assert mean == pytest.approx(run["loss"])
    assert (tmp_path / "study" / "tables.md").read_text().strip() in result.stdout
    assert "<svg" in (tmp_path / "study" / "quality.svg").read_text()

    again = _call(*words, "--seeds", "1,2")
    assert again.returncode == 0, again.stderr
    assert "4 runs, 4 of them finished before" in again.stdout
    assert json.loads((tmp_path / "study" / "study.json").read_text()) == study
