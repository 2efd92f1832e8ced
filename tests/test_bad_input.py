"""Every mistake of a user is one line on stderr before a rank starts."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch

from hbp_titan.config import JobConfig
from hbp_titan.preflight import check_device
from tests.data.preparing import run_script
from tests.tiny_run import write_tiny_run

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bad_input")


@pytest.fixture(scope="module")
def argv(folder: Path) -> list[str]:
    return write_tiny_run(folder)


def test_good_input_is_prepared(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, output, errors = run_script(capsys, "--world_size", "4", *argv)
    assert code == 0, errors
    assert "training store" in output


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--data.train_files=missing.jsonl"], "missing.jsonl"),
        (["--data.train_files={folder}/bad.jsonl"], "bad.jsonl:2: "),
        (["--training.step=1"], "command line: unknown key training.step; did you mean training.steps?"),
        (["--levels=128:1,512:3"], "not divisible by cp_degree=3"),
        (["--levels=128:1,513:3"], "cp_degree=3 of the level with max_tokens=513 does not divide the world size 4"),
        (["--levels=128:1,512:8"], "cp_degree=8 does not divide the model's 4 attention heads"),
        (["--levels=32:1,64:2"], "longer than the largest level, levels.max_tokens = 64"),
        (["--levels=128:1,2048:2"], "levels.max_tokens=2048 exceeds the model's max_position_embeddings=1024"),
        (["--model.hf_path=", "--model.flavor=debugg", "--model.tokenizer_path={folder}/model"], "did you mean debug?"),
        (["--model.tokenizer_path=nowhere"], "nowhere"),
        (["--compile.enable=true", "--compile.backend=inducto"], "compile.backend = 'inducto': must be one of"),
        (["--checkpoint.initial_load_path=nowhere"], "'nowhere' holds neither config.json nor state.json"),
    ],
)
def test_mistake_is_one_line(
    argv: list[str], folder: Path, capsys: pytest.CaptureFixture[str], changed: list[str], message: str
) -> None:
    (folder / "bad.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n{"messages": [}\n')
    world_size = 8 if "512:8" in changed[0] else 4
    words = [word.format(folder=folder) for word in changed]
    code, output, errors = run_script(capsys, "--world_size", str(world_size), *argv, *words)
    assert code == 1, output
    lines = errors.strip().splitlines()
    assert len(lines) == 1, errors
    assert lines[0].startswith("error: ")
    assert message in lines[0]


def test_run_script_stops_at_a_mistake_before_a_rank_starts() -> None:
    result = subprocess.run(
        ["bash", "run_train.sh", "--trainin.steps", "3"],
        cwd=ROOT,
        env={**os.environ, "NGPU": "2"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 1
    assert result.stderr.strip() == "error: command line: unknown key trainin.steps; did you mean training.steps?"


def test_float32_is_refused_on_a_gpu_before_one_is_asked_for() -> None:
    config = JobConfig()
    config.training.mixed_precision_param = "float32"
    check_device(config, torch.device("cpu"))
    with pytest.raises(ValueError, match="set it to bfloat16"):
        check_device(config, torch.device("cuda"))
