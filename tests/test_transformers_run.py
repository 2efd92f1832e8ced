"""Training decoders of transformers on several ranks, against transformers on one process."""

from __future__ import annotations

from pathlib import Path

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
from tests.reference import train_one_by_one
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


@pytest.mark.parametrize(
    ("model_type", "world_size", "levels"),
    [
        ("granite", 2, "64:1,512:2:ulysses:full"),
        ("gemma3_text", 4, LEVELS),
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
    expected = _reference(argv, world_size)
    assert expected.keys() == parameters.keys()
    errors = {name: float((parameters[name] - value).norm() / value.norm()) for name, value in expected.items()}
    assert max(errors.values()) < 1e-5, errors
