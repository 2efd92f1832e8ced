"""Weights of a sharded model: exported bit for bit, drawn alike for every sharding, and identified by a checksum.

The LoRA runs themselves are in tests/test_lora_run.py.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from hbp_titan.components.lora_checkpoint import check_adapter, checksum
from hbp_titan.components.weights import check_load_path, initialize
from hbp_titan.config import JobConfig, load_config
from hbp_titan.distributed.world import World
from hbp_titan.engine import parallelized_on_meta
from hbp_titan.models.configs import ModelArgs, MoEArgs
from hbp_titan.models.decoder import init_parameter
from hbp_titan.models.flavors import DEBUG
from hbp_titan.models.hf import to_hf_name
from hbp_titan.models.hf_config import args_from_hf, args_to_hf_config
from hbp_titan.packing import Level
from hbp_titan.testing.local_ranks import run_distributed
from hbp_titan.train import Trainer
from tests.tiny_run import ARGS, write_tiny_run

Tensors = dict[str, torch.Tensor]


def _whole(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def _train(world: World, runs: list[list[str]]) -> list[tuple[Tensors, set[str]]]:
    """Return, per run, the values that the optimizer trained and the names of parameters that are not sharded."""
    found = []
    for argv in runs:
        trainer = Trainer(load_config(argv), world)
        names = {id(p): name for name, p in trainer.model.named_parameters()}
        trainer.train()
        held = [p for group in trainer.optimizer.param_groups for p in group["params"]]
        trained = {names[id(p)]: _whole(p).detach().clone() for p in held}
        gathered = {name for name, p in trainer.model.named_parameters() if not isinstance(p, DTensor)}
        found.append((trained, gathered))
    return found


def test_run_that_ends_with_validation_exports_its_weights_bit_for_bit(tmp_path: Path) -> None:
    runs = []
    for tied in (True, False):
        folder = tmp_path / f"tied_{tied}"
        folder.mkdir()
        argv = write_tiny_run(folder, args=dataclasses.replace(ARGS, tie_embeddings=tied))
        argv += ["--training.steps=2", "--training.mixed_precision_param=bfloat16", "--checkpoint.enable=false"]
        argv += ["--validation.enable=true", "--validation.share=0.2", "--validation.interval=1"]
        runs.append(argv)
    for argv, (trained, gathered) in zip(runs, run_distributed(_train, 2, runs)[0], strict=True):
        exported = load_file(load_config(argv).dump_folder / "hf" / "model.safetensors")
        assert not gathered
        assert set(exported) == {to_hf_name(name) for name in trained}
        for name, value in trained.items():
            assert exported[to_hf_name(name)].equal(value), name
            if value.ndim == 2:
                # Not rounded to the compute dtype.
                assert not value.bfloat16().float().equal(value)


@pytest.mark.parametrize(
    ("words", "path"),
    [
        ([], ""),
        (["--model.hf_path=base"], "base"),
        (["--model.hf_path=base", "--checkpoint.initial_load_path=other"], "other"),
        (["--model.hf_path=base", "--checkpoint.initial_load_path=none"], ""),
    ],
)
def test_run_starts_from_the_weights_of_its_model_unless_others_or_none_are_set(words: list[str], path: str) -> None:
    config = load_config(words)
    assert config.weights_path == path
    assert load_config([*words, "--model.flavor=llama3_1_8b"]).weights_path == path


@pytest.mark.parametrize(
    ("file", "word"),
    [
        ("notes.txt", "neither"),
        ("pytorch_model.bin", "M.from_pretrained"),
        ("pytorch_model-00001-of-00002.bin", "M.from_pretrained"),
        ("model-q8_0.gguf", "gguf_file='model-q8_0.gguf'"),
        ("consolidated.00.pth", "layout of transformers"),
        ("adapter_config.json", "merge_and_unload"),
        ("model-00001-of-00002.safetensors", "index"),
    ],
)
def test_folder_without_weights_is_an_error_that_names_what_it_has_and_how_to_train_new_ones(
    tmp_path: Path, file: str, word: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(args_to_hf_config(ARGS)))
    (tmp_path / file).touch()
    with pytest.raises(ValueError, match=r"model\.hf_path.*neither") as caught:
        check_load_path(str(tmp_path), ARGS, "model.hf_path")
    assert word in str(caught.value)
    assert 'initial_load_path = "none"' in str(caught.value)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"model\.hf_path: .* has no config\.json") as caught:
        args_from_hf(tmp_path, "model.hf_path")
    assert word in str(caught.value) or file == "notes.txt"


# Two ranks cannot share three experts evenly: the stacks are sharded along the second dim.
EXPERTS = dataclasses.replace(
    DEBUG,
    name="experts",
    moe=MoEArgs(n_routed_experts=3, num_experts_per_tok=2, moe_intermediate_size=96, n_shared_experts=1),
)


def _initial_weights(world: World, args: ModelArgs, copies: int) -> tuple[Tensors, set[int]]:
    config = JobConfig(levels=[Level(128)])
    config.parallelism.dp_replicate = copies
    model, _ = parallelized_on_meta(config, args, world, world.device)
    initialize(model, args, world.device, 7, "")
    dims = {p.placements[-1].dim for p in model.parameters() if isinstance(p, DTensor)}  # type: ignore[union-attr]
    return {name: _whole(p).detach().clone() for name, p in model.named_parameters()}, dims


@pytest.mark.parametrize(("world_size", "copies"), [(2, 1), pytest.param(4, 2, marks=pytest.mark.slow)])
def test_new_weights_are_the_same_for_every_sharding(world_size: int, copies: int) -> None:
    for weights, dims in run_distributed(_initial_weights, world_size, EXPERTS, copies):
        assert dims == {0, 1}
        for name, value in weights.items():
            assert value.equal(init_parameter(EXPERTS, name, value.shape, 7)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checksum_depends_on_every_bit_and_name_but_not_on_the_order(dtype: torch.dtype) -> None:
    one, two = torch.tensor([1.0, 2.0], dtype=dtype), torch.tensor([3.0, 4.0], dtype=dtype)
    found = checksum([("a", one), ("b", two)])
    assert found == checksum([("b", two), ("a", one)])
    assert found != checksum([("a", two), ("b", one)])
    assert found != checksum([("a", one), ("b", two.nextafter(torch.zeros(2, dtype=dtype)))])
    assert checksum([("a", torch.zeros(3))]) == "0" * 16


BASE = {"path": "/models/x", "seed": 1, "dtype": "float32", "checksum": "00"}
OWN = {"rank": 4, "alpha": 8.0, "target_modules": ["q_proj"], "base": BASE}


@pytest.mark.parametrize(
    ("saved", "own", "words"),
    [
        ({**OWN, "base": {**BASE, "dtype": "bfloat16"}}, OWN, "lora.base_dtype = bfloat16"),
        ({**OWN, "base": {**BASE, "checksum": "01"}}, OWN, "checksum 01"),
    ],
)
def test_adapters_of_another_base_are_rejected(saved: Any, own: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_adapter(saved, own, Path("step-4"))
    # The base may move.
    check_adapter(OWN, {**OWN, "base": {**BASE, "path": "/moved/x"}}, Path("step-4"))
