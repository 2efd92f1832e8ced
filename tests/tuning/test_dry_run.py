"""What a dry run finds: counts against literals, mistakes as one line, and changes that do make a level fit."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch.distributed as dist

from hbp_titan.config import load_config
from hbp_titan.errors import UserError, exit_on_user_error
from hbp_titan.packing import build_plan
from hbp_titan.tuning.dry_run import DryRun, describe, dry_run, main
from hbp_titan.tuning.hardware import get_hardware
from hbp_titan.tuning.simulate import tulu3_longcite_like
from tests.tiny_run import write_tiny_run

ROOT = Path(__file__).resolve().parents[2]
LLAMA = ["--model.flavor=llama3_1_8b", "--data.train_files=absent.jsonl"]
FEW_SAMPLES = 20_000


@pytest.fixture(autouse=True)
def _few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hbp_titan.tuning.dry_run.SYNTHETIC_SAMPLES", FEW_SAMPLES)


def _try(words: Sequence[str], world_size: int = 8, gpu: str = "h100-80gb") -> DryRun:
    return dry_run(load_config(words), world_size, get_hardware(gpu))


def test_state_of_a_rank_is_16_bytes_a_parameter() -> None:
    # 8,030,261,248 parameters (tests/models/test_registry.py) on 8 ranks: 4 bytes, as much for the gradient, and twice
    # that for AdamW's moments, with a step count of 4 bytes for each of 32 x 9 + 3 tensors.
    found = _try([*LLAMA, "--levels=16384:1:ulysses:full,131072:8:ulysses:full"])
    state = found.rank_state
    assert found.num_params == 8_030_261_248
    own = 8_030_261_248 // 8
    assert (state.parameters, state.parameter_bytes, state.gradient_bytes) == (own, 4 * own, 4 * own)
    assert state.optimizer_bytes == 8 * own + 4 * (32 * 9 + 3)
    assert not dist.is_initialized()


def test_two_copies_of_the_parameters_double_the_state() -> None:
    words = [*LLAMA, "--levels=131072:8:ulysses:full"]
    one, two = _try(words).rank_state, _try([*words, "--parallelism.dp_replicate=2"]).rank_state
    assert two.parameters == 2 * one.parameters


def test_synthetic_data_are_planned_as_a_run_would_plan_them() -> None:
    words = [*LLAMA, "--levels=8192:1:ulysses:full,32768:4:ulysses:full", "--training.global_batch_tokens=1048576"]
    found = _try([*words, "--training.epochs=3", "--parallelism.reshard_after_forward=true"])
    lengths = tulu3_longcite_like(FEW_SAMPLES)
    held = lengths[lengths <= 32768]
    plan = build_plan(held, found.config.levels, 8, global_batch_tokens=1 << 20, cost=found.plan.costs[0], seed=42)
    assert found.plan.fingerprint == plan.fingerprint
    assert found.total_steps == pytest.approx(3 * plan.num_steps, rel=0.01)
    text = describe(found)
    assert (
        f"{len(held):,} lengths like Tulu3 with LongCite, {len(lengths) - len(held):,} above 32,768 tokens skipped"
        in text
    )
    assert "--model.hf_path" in text
    assert "--checkpoint.initial_load_path" in text


def test_groups_across_nodes_are_told() -> None:
    found = _try([*LLAMA, "--levels=131072:16:hybrid:full"], world_size=16)
    assert len(found.warnings) == 1
    assert "warning: groups of cp_degree 16 cross nodes: their exchange is slow" in describe(found)


def test_uneven_shards_are_told() -> None:
    # Of the debug model's matrices most have 352 or 128 rows, so of 300 ranks each has two rows or one, or none.
    (warning,) = _try(["--data.train_files=absent.jsonl", "--levels=131072:1"], world_size=300).warnings
    assert warning.startswith("rank 0 holds 1.7")
    assert "some parameters have too few rows for 300 ranks" in warning


def test_curriculum_that_covers_all_short_samples_is_told() -> None:
    words = ["--data.train_files=absent.jsonl", "--levels=16384:1,131072:2"]
    plan = _try(words).plan
    short = plan.num_iterations - int(plan.level_of_iteration.sum())
    (warning,) = _try([*words, "--packing.curriculum_steps=500"]).warnings
    assert warning.startswith(f"packing.curriculum_steps = 500 covers all {short} steps ")
    assert _try([*words, f"--packing.curriculum_steps={short - 5}"]).warnings == []


# What does not fit, and what is proposed: checkpointing; one copy of the parameters; a higher cp degree; more ranks.
UNFIT = [
    (["--levels=131072:8"], 8, r"set ac_policy = \"(keep_attention|full)\", ac_layers = \d+$"),
    (["--levels=16384:1:ulysses:full", "--parallelism.dp_replicate=8"], 8, r"set parallelism.dp_replicate = 1$"),
    (["--levels=131072:1:ulysses:full"], 8, r"set cp_degree = 8, ac_policy = \"keep_attention\", ac_layers = \d+$"),
    (["--levels=16384:1:ulysses:full"], 1, r"use 2 ranks"),
]


@pytest.mark.parametrize(("words", "world_size", "change"), UNFIT)
def test_level_that_does_not_fit_gets_a_change_that_fits(words: list[str], world_size: int, change: str) -> None:
    found = _try([*LLAMA, *words], world_size)
    with pytest.raises(UserError, match=r"has 75\.1 GiB to use") as caught:
        found.check_memory()
    (line,) = caught.value.lines
    assert re.search(change, line), line
    level = found.levels[0].level
    told = dict(re.findall(r"(cp_degree|cp_style|ac_policy|ac_layers|dp_replicate) = \"?([\w]+)", line))
    ranks = re.search(r"use (\d+) ranks", line)
    settings = {"cp_degree": level.cp_degree, "cp_style": level.cp_style, "ac_policy": level.ac_policy, **told}
    short = ":".join([str(level.max_tokens), *(str(settings[key]) for key in ("cp_degree", "cp_style", "ac_policy"))])
    if "ac_layers" in told:
        short += f":{told['ac_layers']}"
    again = _try(
        [*LLAMA, f"--levels={short}", f"--parallelism.dp_replicate={told.get('dp_replicate', 1)}"],
        int(ranks[1]) if ranks else world_size,
    )
    again.check_memory()


@pytest.mark.slow
def test_experts_that_fill_a_gpu_are_spread() -> None:
    words = ["--model.flavor=deepseek_v2_236b", "--data.train_files=absent.jsonl", "--levels=32768:1:ulysses:full"]
    with pytest.raises(UserError, match=r"set ac_layers = 5\d and set parallelism\.expert_parallel_degree = 2$"):
        _try(words, 256).check_memory()
    found = _try([*words, "--parallelism.expert_parallel_degree=2"], 256)
    found.check_memory()
    assert "FSDP over 256 ranks, experts over 2: " in describe(found)


def test_logits_of_too_many_tokens_are_held_in_smaller_chunks() -> None:
    # The logits of 131,072 tokens and 128,256 entries alone are 34 GB in bfloat16, and several such.
    words = ["--model.flavor=llama3_2_1b", "--data.train_files=absent.jsonl", "--levels=131072:1:ulysses:full"]
    found = _try([*words, "--training.loss_chunk_tokens=131072"], 1)
    with pytest.raises(UserError, match=r"set training\.loss_chunk_tokens = 256"):
        found.check_memory()
    _try([*words, "--training.loss_chunk_tokens=256"], 1).check_memory()


@pytest.mark.slow
def test_model_that_nothing_can_hold_is_told() -> None:
    # 236 billion parameters of 16 bytes are 55 GiB a rank of 64; a layer's experts, whole, and their gradients in
    # float32 do not fit beside them.
    words = ["--model.flavor=deepseek_v2_236b", "--data.train_files=absent.jsonl"]
    found = _try([*words, "--levels=16384:1:ulysses:full"], 1, "a100-80gb")
    with pytest.raises(UserError, match="even 64 ranks"):
        found.check_memory()


MISTAKES = [
    (["--world_size=12"], "cp_degree=8"),
    (["--world_size=0"], "world size 0"),
    (["--gpu=h100"], "did you mean h100-80gb?"),
    (["--levels=16384:1,131072:64", "--world_size=64"], "32 attention heads"),
    (["--levels=262144:8"], "max_position_embeddings"),
    (["--model.flavor=llama3_8b"], "model.flavor"),
    (["--model.hf_path=nowhere"], "nowhere/config.json"),
    (["--model.tokenizer_path=nowhere"], "nowhere"),
    (["--checkpoint.initial_load_path=nowhere"], "nowhere"),
    (["--training.mixed_precision_param=float32"], "attention kernel"),
    (["--compile.backend=inducto"], "compile.backend"),
    (["--parallelism.dp_replicate=3"], "parallelism.dp_replicate"),
    (["--packing.method=hpb"], "hpb"),
    (["--data.sources=[]"], "data.train_files"),
    (["--levels=131072:8"], "level 128K/cp8 needs 99.7 GiB"),
    (["--training.step=1"], "training.step"),
]


@pytest.mark.parametrize(("changed", "message"), MISTAKES)
def test_mistake_is_one_line(changed: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--job.config_file", str(ROOT / "train_configs/llama3_1_8b_hbp.toml"), "--world_size=32", *changed]
    with pytest.raises(SystemExit, match="1"):
        exit_on_user_error(lambda: main(words))
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_levels_to_be_measured_cannot_be_tried() -> None:
    with pytest.raises(ValueError, match="auto_levels"):
        _try([*LLAMA, "--packing.auto_levels=true"])


def test_tokenizer_that_the_model_does_not_hold_is_refused(tmp_path: Path) -> None:
    write_tiny_run(tmp_path)
    folder = tmp_path / "model"
    words = ["--data.train_files=absent.jsonl", f"--model.hf_path={folder}", "--levels=512:1"]
    _try(words)
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"vocab_size": 320', '"vocab_size": 300'))
    with pytest.raises(ValueError, match="has 320 entries, the model model 300"):
        _try(words)


def test_run_script_tries_without_starting_a_rank() -> None:
    environment = {**os.environ, "COMM_MODE": "fake", "NGPU": "4", "GPU": "h200-141gb", "PYTHON": sys.executable}
    command = ["bash", "run_train.sh", "--data.embedded=", "--model.tokenizer_path=", "--data.train_files=absent.jsonl"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "dry run: 4 x h200-141gb" in result.stdout
    assert "level 8K/cp2: dp 2 x cp 2" in result.stdout
