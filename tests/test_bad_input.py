"""Every user error is one line on stderr before a rank starts."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from hbp_titan.config import JobConfig
from hbp_titan.preflight import check_device
from tests.data.preparing import run_script
from tests.runs import ROOT
from tests.tiny_run import write_tiny_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad_input")
    (folder / "bad.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n{"messages": [}\n')
    return folder


@pytest.fixture(scope="module")
def argv(folder: Path) -> list[str]:
    return write_tiny_run(folder)


def test_valid_input_is_prepared(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    # A pack may be longer than the model's 1024 positions if no sample is.
    for more in ([], ["--levels=2048:1", "--packing.max_sample_tokens=1024"]):
        code, output, errors = run_script(capsys, "--world_size", "4", *argv, *more)
        assert code == 0, errors
        assert "training store" in output


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (["--data.train_files=missing.jsonl"], "missing.jsonl"),
        (["--data.train_files={folder}/bad.jsonl"], "bad.jsonl:2: "),
        (["--training.step=1"], "training.step; did you mean training.steps?"),
        (["--levels=128:1,512:3"], "cp_degree=3"),
        (["--levels=128:1,513:3"], "world size 4"),
        (["--levels=128:1,512:8"], "4 attention heads"),
        (["--levels=32:1,64:2"], "largest level"),
        (["--levels=128:1,512:2", "--packing.max_sample_tokens=64"], "longer than packing.max_sample_tokens"),
        (["--levels=128:1,2048:2"], "max_position_embeddings=1024"),
        (["--model.hf_path=", "--model.flavor=debugg", "--model.tokenizer_path={folder}/model"], "did you mean debug?"),
        (["--model.tokenizer_path=nowhere"], "nowhere"),
        (["--compile.enable=true", "--compile.backend=inducto"], "compile.backend"),
        (["--checkpoint.initial_load_path=nowhere"], "checkpoint.initial_load_path = 'nowhere'"),
        (["--checkpoint.initial_load_path=org/base"], "hbp-titan download org/base"),
        (["--model.hf_path=org/base"], "model.hf_path = 'org/base': no such folder; a local path is"),
        (["--model.tokenizer_path=org/base"], "if it is a model of the Hugging Face hub"),
    ],
)
def test_user_error_is_one_line(
    argv: list[str], folder: Path, capsys: pytest.CaptureFixture[str], changed: list[str], words: str
) -> None:
    world_size = "8" if "512:8" in changed[0] else "4"
    overrides = [word.format(folder=folder) for word in changed]
    code, output, errors = run_script(capsys, "--world_size", world_size, *argv, *overrides)
    assert code == 1, output
    (line,) = errors.strip().splitlines()
    assert line.startswith("error: ")
    assert words in line


PYTHON = """\
#!/usr/bin/env bash
echo "$@" >> calls
case "$*" in
    *distributed.world*) echo 2 ;;
    *prepare_data*) echo "error: a mistake" >&2; exit 1 ;;
esac
"""


def test_run_script_stops_at_a_user_error_before_a_rank_starts(tmp_path: Path) -> None:
    # The preparation is that of the other tests here; what the script makes of its exit code does not need it.
    shutil.copy(ROOT / "run_train.sh", tmp_path)
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "setup_env.sh").write_text("PY=./python\n")
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    command = ["bash", str(tmp_path / "run_train.sh"), "--training.steps", "3"]
    environment = {**os.environ, "NGPU": "2"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr) == (1, "error: a mistake\n")
    world, prepare = (tmp_path / "calls").read_text().splitlines()
    assert world == "-m hbp_titan.distributed.world 2"
    assert prepare.startswith(
        "scripts/prepare_data.py --job.config_file train_configs/debug_model.toml --world_size 2 "
    )
    assert prepare.endswith("--training.steps 3")


def test_float32_is_rejected_on_a_gpu() -> None:
    config = JobConfig()
    config.training.mixed_precision_param = "float32"
    check_device(config, torch.device("cpu"))
    with pytest.raises(ValueError, match="bfloat16"):
        check_device(config, torch.device("cuda"))
