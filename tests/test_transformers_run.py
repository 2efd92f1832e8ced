"""Training decoders of transformers on several ranks, against transformers on one process."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
import transformers

from hbp_titan.components.optimizer import lr_factor
from hbp_titan.config import load_config
from hbp_titan.data.epoch import EpochPlans
from hbp_titan.data.prepare import prepare
from hbp_titan.data.token_store import TokenStore
from hbp_titan.preflight import cost_model, model_args
from hbp_titan.testing.local_ranks import run_distributed
from tests.lora_run import train_each as resume
from tests.programs import run_python
from tests.reference import train_one_by_one
from tests.runs import assert_same_run
from tests.transformers_run import train_each, write_transformers_run

LEVELS = "64:1,128:2:ulysses:full,512:4:hybrid:full:1"
GATHERED = "64:2,512:4:allgather:full"


def _reference(argv: list[str], world_size: int) -> dict[str, torch.Tensor]:
    """Train transformers' own model in a plain loop, one sample at a time; only the order of samples is the plan's."""
    config = load_config(argv)
    store = TokenStore.open(prepare(config)[0])
    plan = EpochPlans(config, store, world_size, cost_model(model_args(config))).plan_for(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        config.model.hf_path, attn_implementation="eager", dtype=torch.float32
    )
    assert plan.num_steps >= 4
    train_one_by_one(model, store, plan, plan.num_steps, lr_factor(config.lr_scheduler, plan.num_steps))
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def _assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert expected.keys() == found.keys()
    errors = {name: float((found[name] - value).norm() / value.norm()) for name, value in expected.items()}
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize(
    ("model_type", "world_size", "levels"),
    [
        ("granite", 2, "64:1,512:2:ulysses:full"),
        pytest.param("gemma3_text", 4, LEVELS, marks=pytest.mark.slow),
        pytest.param("phi", 4, GATHERED, marks=pytest.mark.slow),
        pytest.param("qwen2_moe", 4, LEVELS, marks=pytest.mark.slow),
    ],
)
def test_ranks_and_levels_equal_transformers_on_one_process(
    tmp_path: Path, model_type: str, world_size: int, levels: str
) -> None:
    argv = write_transformers_run(tmp_path, model_type, levels)
    parameters, trained = run_distributed(train_each, world_size, [argv])[0][0]
    assert trained == set(range(levels.count(",") + 1))
    _assert_equal(parameters, _reference(argv, world_size))


@pytest.mark.slow
def test_compiled_run_equals_transformers(tmp_path: Path) -> None:
    argv = [*write_transformers_run(tmp_path, "glm4", "64:1,512:2:ulysses:full"), "--compile.enable=true"]
    argv.append("--compile.backend=aot_eager")
    _assert_equal(run_distributed(train_each, 2, [argv])[0][0][0], _reference(argv, 2))


@pytest.mark.slow
def test_run_with_lora_resumes_with_equal_bits_and_its_export_loads_in_transformers(tmp_path: Path) -> None:
    argv = write_transformers_run(tmp_path, "gemma3_text", "64:1,512:2:ulysses:full", saves=True)
    argv += ["--lora.rank=4", "--lora.alpha=8", "--training.steps=6", "--checkpoint.interval=4"]
    resumed = [*argv, f"--job.dump_folder={tmp_path / 'resumed'}"]
    whole, rest = run_distributed(resume, 2, [argv, resumed], tmp_path)[0]
    assert (whole["first_step"], rest["first_step"]) == (0, 4)
    assert_same_run(tmp_path / "run", tmp_path / "resumed")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "hf", dtype=torch.float32)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    merged = peft.PeftModel.from_pretrained(base, tmp_path / "run" / "hf_adapter").merge_and_unload()
    for name, value in merged.named_parameters():
        assert torch.allclose(value, loaded.get_parameter(name), atol=1e-6), name
    assert any("lora_A" in name for name in whole["with_gradient"])


@pytest.mark.slow
def test_equivalence_script_compares_with_transformers(tmp_path: Path) -> None:
    argv = write_transformers_run(tmp_path, "glm4", "64:1,512:2:hybrid:full")
    own = ["--world_sizes=2", "--max_tokens=512", "--num_samples=12", "--only=configured"]
    result = run_python("scripts/verify_equivalence.py", *own, *argv, timeout=400)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("equal") >= 2
