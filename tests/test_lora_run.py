"""Runs with LoRA on two ranks: compared with PEFT on one process, their checkpoints, their exports."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from hbp_titan.components.checkpoint import save_model_tensors
from hbp_titan.components.lora_checkpoint import checksum, whole_tensors
from hbp_titan.components.optimizer import lr_factor
from hbp_titan.components.weights import check_load_path, initialize
from hbp_titan.config import JobConfig, load_config
from hbp_titan.data.epoch import EpochPlans
from hbp_titan.data.prepare import open_stores
from hbp_titan.models.decoder import Decoder
from hbp_titan.models.hf import HFTensors, to_hf_name
from hbp_titan.models.layers import is_adapter
from hbp_titan.models.lora import apply_lora, init_lora_parameter
from hbp_titan.preflight import check, cost_model
from hbp_titan.testing.local_ranks import run_distributed
from tests.lora_run import train_each, write_lora_run
from tests.programs import run_python
from tests.reference import train_one_by_one
from tests.runs import equal
from tests.tiny_run import ARGS

PROMPT = torch.arange(5, 105)
# Per layer: rank 4 times inputs + outputs of q, k, v, o and gate, up, down of a model of width 32 and 64.
ADAPTER_PARAMS = 2 * 4 * (64 + 48 + 48 + 64 + 3 * 96)
Tensors = dict[str, torch.Tensor]
Run = tuple[list[str], Path, list[list[dict[str, Any]]]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Arguments, folder, and the results of two ranks of a run of 6 steps and of one resumed after step 4."""
    folder = tmp_path_factory.mktemp("lora")
    argv = [*write_lora_run(folder), "--training.steps=6", "--checkpoint.interval=4"]
    # Other memory changes no bit.
    resumed = [*argv, f"--job.dump_folder={folder / 'resumed'}", "--parallelism.cpu_offload=true"]
    return argv, folder, run_distributed(train_each, 2, [argv, resumed], folder)


def _base(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)


def _logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(PROMPT[None]).logits[0]


def _peft_name(fqn: str, adapter: str = "default.") -> str:
    return "base_model.model." + to_hf_name(fqn).removesuffix("weight") + adapter + "weight"


def _reference(config: JobConfig, fqns: list[str], world_size: int) -> Tensors:
    """Train PEFT on transformers, one sample at a time; only the choice of samples comes from the plan."""
    store = open_stores(config, 512)[0]
    plan = EpochPlans(config, store, world_size, cost_model(ARGS, frozen=True)).plan_for(0)
    import peft

    lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules=config.lora.target_modules, task_type="CAUSAL_LM")
    model = peft.get_peft_model(_base(Path(config.checkpoint.initial_load_path)), lora)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for fqn in fqns:
            parameter = parameters[_peft_name(fqn)]
            parameter.copy_(init_lora_parameter(fqn, parameter.shape, config.training.seed))
    assert sum(p.requires_grad for p in parameters.values()) == len(fqns)
    steps = config.training.steps
    train_one_by_one(model, store, plan, steps, lr_factor(config.lr_scheduler, steps))
    return {fqn: parameters[_peft_name(fqn)].detach() for fqn in fqns}


def _check_against_peft(argv: list[str], found: Tensors, world_size: int) -> None:
    fqns = [fqn for fqn in found if is_adapter(fqn)]
    for fqn, value in _reference(load_config(argv), fqns, world_size).items():
        assert value.norm() > 0.005
        assert (found[fqn] - value).norm() < 1e-5 * value.norm(), fqn


def test_two_ranks_with_two_levels_equal_peft_on_one(run: Run) -> None:
    argv, folder, ranks = run
    found = ranks[0][0]
    assert found["levels"] == {0, 1}
    _check_against_peft(argv, found["parameters"], 2)
    base = HFTensors(folder / "base", ARGS)
    assert all(found["parameters"][name].equal(base[name]) for name in base)
    assert found["with_gradient"] == {name for name in found["parameters"] if is_adapter(name)}
    # The shards of two ranks add up to the bits of the whole tensors, before and after training.
    assert {checksum(base.items())} == {value for rank in ranks for value in rank[0]["checksums"]}


@pytest.mark.slow
def test_base_in_bfloat16_trains_the_same_adapters_as_in_float32(tmp_path: Path) -> None:
    argv = [*write_lora_run(tmp_path, tied=False), "--training.steps=3", "--training.mixed_precision_param=bfloat16"]
    runs = [[*argv, f"--lora.base_dtype={d}", f"--job.dump_folder={tmp_path / d}"] for d in ("float32", "auto")]
    wide, narrow = (found["parameters"] for found in run_distributed(train_each, 2, runs)[0])
    args = dataclasses.replace(ARGS, tie_embeddings=False)
    base = HFTensors(tmp_path / "base", args)
    for name, value in wide.items():
        if is_adapter(name):
            assert value.norm() > 0.001
            assert narrow[name].dtype == torch.float32
            assert narrow[name].equal(value), name
        else:
            assert value.equal(base[name]), name
            assert narrow[name].dtype == torch.bfloat16
            assert narrow[name].equal(value.bfloat16()), name
    # The checkpoint's adapters are merged into the rounded base, as in the run's own export.
    step_folder = tmp_path / "auto" / "checkpoint" / "step-3"
    exported = load_file(tmp_path / "auto" / "hf" / "model.safetensors")
    for name, value in whole_tensors(step_folder, _state(step_folder), args):
        assert exported[to_hf_name(name)].equal(value.float()), name


# With four ranks two replicas, each sharded over two ranks.
@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "replicas"), [(2, 1), (4, 2)])
def test_compiled_run_that_keeps_attention_equals_peft_with_one_graph_per_level(
    tmp_path: Path, world_size: int, replicas: int
) -> None:
    argv = [
        # Untied: embeddings and head are frozen FSDP groups of their own.
        *write_lora_run(tmp_path, "keep_attention", tied=False),
        "--training.steps=3",
        f"--parallelism.dp_replicate={replicas}",
        "--compile.enable=true",
        "--compile.backend=aot_eager",
        "--checkpoint.enable=false",
        "--checkpoint.export_hf=false",
    ]
    (found,) = run_distributed(train_each, world_size, [argv])[0]
    assert found["levels"] == {0, 1}
    # Two regions of a block without cp, three with it; and the loss.
    assert (found["graphs"], found["breaks"]) == (6, 0)
    _check_against_peft(argv, found["parameters"], world_size)


def test_optimizer_and_checkpoint_contain_the_adapters_only(run: Run) -> None:
    _, folder, ranks = run
    # Two moments of 4 bytes.
    assert sum(rank[0]["optimizer_bytes"] for rank in ranks) == 2 * 4 * ADAPTER_PARAMS
    saved = json.loads((folder / "run" / "checkpoint" / "step-6" / "tensors.json").read_text())
    trained = ranks[0][0]["with_gradient"]
    assert {name for name in saved if name.startswith("model.")} == {f"model.{name}" for name in trained}
    moments = [name for name in saved if name.startswith("optimizer.") and not name.endswith(".step")]
    assert len(moments) == 2 * len(trained)


def test_resumed_run_repeats_the_uninterrupted_one(run: Run) -> None:
    _, folder, ranks = run
    whole, resumed = ranks[0]
    assert resumed["first_step"] == 4
    assert equal(whole["parameters"], resumed["parameters"])
    for name in ("hf/model.safetensors", "hf_adapter/adapter_model.safetensors"):
        assert (folder / "resumed" / name).read_bytes() == (folder / "run" / name).read_bytes()


def test_peft_loads_the_adapter_and_computes_the_logits_of_the_merged_model(run: Run) -> None:
    _, folder, ranks = run
    plain = _logits(_base(folder / "base"))
    import peft

    adapted = peft.PeftModel.from_pretrained(_base(folder / "base"), folder / "run" / "hf_adapter")
    # Without the adapter's name, as in the file.
    loaded = peft.get_peft_model_state_dict(adapted)
    expected = {_peft_name(n, ""): p for n, p in ranks[0][0]["parameters"].items() if is_adapter(n)}
    assert equal(loaded, expected)
    assert expected.keys() == load_file(folder / "run/hf_adapter/adapter_model.safetensors").keys()
    logits = _logits(adapted)
    assert (logits - plain).norm() > 1e-2 * plain.norm()
    torch.testing.assert_close(_logits(_base(folder / "run" / "hf")), logits, rtol=1e-5, atol=1e-5)
    config = json.loads((folder / "run" / "hf_adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folder / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (folder / "run" / "hf_adapter" / name).read_bytes() == (folder / "run" / "hf" / name).read_bytes()


def test_converted_checkpoint_is_the_merged_export(run: Run, tmp_path: Path) -> None:
    folder = run[1]
    run_python("scripts/convert_to_hf.py", folder / "run", tmp_path / "hf").check_returncode()
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (folder / "run" / "hf" / name).read_bytes()


def _state(step_folder: Path) -> dict[str, Any]:
    return json.loads((step_folder / "state.json").read_text())


def test_adapters_are_not_merged_into_another_base(run: Run, tmp_path: Path) -> None:
    folder = run[1]
    weights = load_file(folder / "base" / "model.safetensors")
    weights["model.norm.weight"] += 1e-3
    shutil.copytree(folder / "base", tmp_path / "base")
    save_file(weights, tmp_path / "base" / "model.safetensors")
    step_folder = folder / "run" / "checkpoint" / "step-6"
    state = _state(step_folder)
    state["lora"]["base"]["path"] = str(tmp_path / "base")
    with pytest.raises(ValueError, match="checksum"):
        whole_tensors(step_folder, state, ARGS)


def test_base_in_a_checkpoint_equals_the_base_in_an_hf_folder(run: Run, tmp_path: Path) -> None:
    folder = run[1]
    base = dict(HFTensors(folder / "base", ARGS))
    # A tied matrix has two names in a checkpoint.
    named = base | {"head.output.weight": base["tok_embeddings.weight"]}
    save_model_tensors(tmp_path / "base", named, {"model": {}})
    with torch.device("meta"):
        model = Decoder(ARGS)
        apply_lora(model, 4, 8, ["q_proj"])
    initialize(model, ARGS, torch.device("cpu"), 3, str(tmp_path / "base"))
    for name, value in model.state_dict().items():
        expected = init_lora_parameter(name, value.shape, 3) if is_adapter(name) else named[name]
        assert value.equal(expected), name

    step_folder = folder / "run" / "checkpoint" / "step-6"
    state = _state(step_folder)
    whole = dict(whole_tensors(step_folder, state, ARGS))
    state["lora"]["base"]["path"] = str(tmp_path / "base")
    assert equal(whole, dict(whole_tensors(step_folder, state, ARGS)))


def test_run_does_not_start_from_a_checkpoint_of_adapters(run: Run) -> None:
    with pytest.raises(ValueError, match=r"adapters only.*convert_to_hf\.py"):
        check_load_path(str(run[1] / "run" / "checkpoint" / "step-6"), ARGS)


def test_unknown_target_is_rejected_before_a_rank_starts(run: Run) -> None:
    config = load_config([*run[0], "--lora.target_modules=q_proj,wq"])
    with pytest.raises(ValueError, match="'wq'"):
        check(config, 2, torch.device("cpu"), ARGS)


def test_cost_of_attention_counts_half_as_much_again_with_frozen_weights() -> None:
    whole, frozen = cost_model(ARGS), cost_model(ARGS, frozen=True)
    assert frozen.beta / frozen.alpha == pytest.approx(1.5 * whole.beta / whole.alpha)
