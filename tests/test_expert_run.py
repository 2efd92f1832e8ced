"""A whole run with experts spread over ranks, from an HF folder to an HF folder, against one process."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hbp_titan.components.checkpoint import Checkpointer
from hbp_titan.components.optimizer import build_optimizer
from hbp_titan.config import load_config
from hbp_titan.distributed.world import World
from hbp_titan.engine import Engine
from hbp_titan.models.decoder import Decoder
from hbp_titan.models.hf import args_to_hf_config, load_hf_tensors, save_hf_folder
from hbp_titan.testing.local_ranks import run_distributed
from hbp_titan.train import Trainer
from tests.models.deepseek_tiny import tiny_args
from tests.tiny_run import VOCAB_SIZE, write_tiny_run

ARGS = dataclasses.replace(
    tiny_args(4, moe={"aux_loss_alpha": 0.01}), vocab_size=VOCAB_SIZE, max_position_embeddings=1024
)
SPREAD = ["--parallelism.expert_parallel_degree=2", "--levels=128:1,512:2:ulysses:full"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    write_tiny_run(folder)
    base = Decoder(ARGS)
    base.init_weights(7)
    save_hf_folder(ARGS, base.named_parameters(), folder / "base", dtype=torch.float32)
    (folder / "model" / "config.json").write_text(json.dumps(args_to_hf_config(ARGS)), encoding="utf-8")
    return folder


def _argv(folder: Path, name: str, *more: str) -> list[str]:
    argv = [word for word in write_tiny_run(folder) if not word.startswith(("--levels", "--job.dump_folder"))]
    (folder / "model" / "config.json").write_text(json.dumps(args_to_hf_config(ARGS)), encoding="utf-8")
    return [
        *argv,
        f"--job.dump_folder={folder / name}",
        f"--checkpoint.initial_load_path={folder / 'base'}",
        # The whole epoch is one step: however it is packed, its gradient is the same.
        "--training.global_batch_tokens=1000000",
        "--packing.level_order=interleave",
        "--training.epochs=2",
        # With the usual 1e-8 Adam's first update is the sign of the gradient, also where that is rounding noise.
        "--optimizer.eps=1e-4",
        "--metrics.expert_load_interval=1",
        *more,
    ]


def _state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    moments = {f"{name} moment": optimizer.state[p]["exp_avg"] for name, p in named.items() if p.requires_grad}
    return {name: value.detach().full_tensor() for name, value in {**named, **moments}.items()}  # type: ignore[attr-defined]


def _train(world: World, argv: list[str]) -> dict[str, Tensor]:
    trainer = Trainer(load_config(argv), world)
    trainer.train()
    return _state(trainer.model, trainer.optimizer)


def _load(world: World, argv: list[str], checkpoints: Path) -> dict[str, Tensor]:
    config = load_config(argv)
    engine = Engine(config, ARGS, world)
    optimizer = build_optimizer(engine.model, config.optimizer)
    assert Checkpointer(checkpoints, engine.model, optimizer, config.checkpoint).load()
    return _state(engine.model, optimizer)


@pytest.fixture(scope="module")
def trained(folder: Path) -> dict[str, Tensor]:
    return run_distributed(_train, 4, _argv(folder, "spread", *SPREAD))[0]


def test_weights_after_two_steps_are_those_of_one_process(folder: Path, trained: dict[str, Tensor]) -> None:
    run_distributed(_train, 1, _argv(folder, "alone", "--levels=512:1"))
    alone, spread = load_hf_tensors(folder / "alone" / "hf"), load_hf_tensors(folder / "spread" / "hf")
    assert alone.keys() == spread.keys() == {name for name in trained if "moment" not in name}
    start = load_hf_tensors(folder / "base")
    for name, value in spread.items():
        torch.testing.assert_close(value, alone[name], rtol=0, atol=2e-6)
        torch.testing.assert_close(value, trained[name], rtol=0, atol=0)
        assert not torch.equal(value, start[name]), name


@pytest.mark.slow
def test_adapters_beside_spread_experts_are_those_beside_whole_ones(folder: Path) -> None:
    words = ["--lora.rank=4", '--lora.target_modules=["q_b_proj","o_proj"]', "--levels=128:1,512:2:ulysses:full"]
    spread, whole = (
        run_distributed(
            _train, 2, _argv(folder, f"lora{degree}", *words, f"--parallelism.expert_parallel_degree={degree}")
        )[0]
        for degree in (2, 1)
    )
    assert spread.keys() == whole.keys()
    assert any("lora_B" in name and float(value.abs().max()) > 1e-3 for name, value in spread.items())
    for name, value in spread.items():
        torch.testing.assert_close(value, whole[name], rtol=0, atol=2e-6)


@pytest.mark.parametrize(("ranks", "degree"), [(2, 1), (4, 4)])
def test_another_spread_loads_the_same_checkpoint(
    folder: Path, trained: dict[str, Tensor], ranks: int, degree: int
) -> None:
    argv = _argv(folder, "elsewhere", "--levels=512:1", f"--parallelism.expert_parallel_degree={degree}")
    loaded = run_distributed(_load, ranks, argv, folder / "spread" / "checkpoint")[0]
    assert loaded.keys() == trained.keys()
    for name, value in loaded.items():
        assert torch.equal(value, trained[name]), name


def test_the_load_of_each_expert_is_logged(folder: Path, trained: dict[str, Tensor]) -> None:
    records: list[dict[str, Any]] = list(map(json.loads, (folder / "spread" / "metrics.jsonl").open()))
    assert len(records) == 2
    for record in records:
        table, load = record["tokens_per_expert"], record["expert_load"]
        # The first layer is dense.
        assert list(table) == ["1", "2"]
        positions = record["tokens"] / (1 - record["padding"] / 100)
        for counts in table.values():
            assert len(counts) == 8
            assert sum(counts) == pytest.approx(positions * 3)
        worst = max(max(counts) / (sum(counts) / 8) for counts in table.values())
        ranks = max(max(sum(counts[:4]), sum(counts[4:])) / (sum(counts) / 2) for counts in table.values())
        assert load["worst"] == pytest.approx(worst)
        assert load["ranks"] == pytest.approx(ranks)
        assert load["idle"] == sum(counts.count(0) for counts in table.values())
        assert load["mean"] <= load["worst"]
