"""A whole run with experts sharded over ranks, from an HF folder to an HF folder, compared with one process."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hbp_titan.components.checkpoint import Checkpointer
from hbp_titan.components.lora_checkpoint import checksum
from hbp_titan.components.optimizer import build_optimizer
from hbp_titan.config import load_config
from hbp_titan.distributed.fsdp import whole_tensor
from hbp_titan.distributed.world import World
from hbp_titan.engine import Engine
from hbp_titan.models.configs import ModelArgs
from hbp_titan.models.decoder import Decoder
from hbp_titan.models.hf import HFTensors
from hbp_titan.models.hf_export import save_hf_folder
from hbp_titan.preflight import check
from hbp_titan.testing.local_ranks import run_distributed
from hbp_titan.train import Trainer
from tests.models.deepseek_tiny import random_model, tiny_args
from tests.models.families import TINY
from tests.runs import equal, read_metrics
from tests.tiny_run import VOCAB_SIZE, write_tiny_run

ARGS = dataclasses.replace(
    tiny_args(4, moe={"aux_loss_alpha": 0.01}), vocab_size=VOCAB_SIZE, max_position_embeddings=1024
)
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    write_tiny_run(folder, num_rows=30)
    base = Decoder(ARGS)
    base.init_weights(7)
    save_hf_folder(ARGS, base.named_parameters(), folder / "base", dtype=torch.float32)
    return folder


def _argv(folder: Path, name: str, degree: int, *more: str, args: ModelArgs = ARGS) -> list[str]:
    return [
        *write_tiny_run(folder, num_rows=30, levels="", args=args),
        f"--job.dump_folder={folder / name}",
        f"--checkpoint.initial_load_path={folder / 'base'}",
        f"--parallelism.expert_parallel_degree={degree}",
        # The whole epoch is one step, whose gradient does not depend on the packing.
        "--training.global_batch_tokens=1000000",
        "--packing.level_order=interleave",
        "--training.epochs=2",
        # With the usual 1e-8, Adam's first update is the sign of the gradient even if that is rounding noise.
        "--optimizer.eps=1e-4",
        "--metrics.expert_load_interval=1",
        *more,
    ]


def _state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Tensors:
    named = dict(model.named_parameters())
    moments = {f"{name} moment": optimizer.state[p]["exp_avg"] for name, p in named.items() if p.requires_grad}
    return {name: whole_tensor(value.detach()) for name, value in {**named, **moments}.items()}


def _train(world: World, argv: list[str]) -> Tensors:
    trainer = Trainer(load_config(argv), world)
    trainer.train()
    return _state(trainer.model, trainer.optimizer)


def _load(world: World, argv: list[str], checkpoints: Path, args: ModelArgs = ARGS) -> Tensors:
    config = load_config(argv)
    engine = Engine(config, args, world)
    optimizer = build_optimizer(engine.model, config.optimizer)
    assert Checkpointer(checkpoints, engine.model, optimizer, config.checkpoint).load()
    return _state(engine.model, optimizer)


def _checksum(world: World, argv: list[str], args: ModelArgs) -> str:
    return checksum((name, p.detach()) for name, p in Engine(load_config(argv), args, world).model.named_parameters())


@pytest.fixture(scope="module")
def trained(folder: Path) -> Tensors:
    """The state after a run on four ranks with experts sharded over two."""
    return run_distributed(_train, 4, _argv(folder, "sharded", 2, "--levels=128:1,512:2:ulysses:full"))[0]


def test_weights_after_two_steps_are_those_of_one_process(folder: Path, trained: Tensors) -> None:
    run_distributed(_train, 1, _argv(folder, "alone", 1, "--levels=512:1"))
    alone, sharded, start = (HFTensors(folder / name) for name in ("alone/hf", "sharded/hf", "base"))
    assert alone.keys() == sharded.keys() == {name for name in trained if "moment" not in name}
    for name, value in sharded.items():
        torch.testing.assert_close(value, alone[name], rtol=0, atol=2e-6)
        assert value.equal(trained[name]), name
        assert not value.equal(start[name]), name


@pytest.mark.slow
def test_adapters_next_to_sharded_experts_are_those_next_to_whole_ones(folder: Path) -> None:
    words = ["--lora.rank=4", '--lora.target_modules=["q_b_proj","o_proj"]', "--levels=128:1,512:2:ulysses:full"]
    sharded, whole = (run_distributed(_train, 2, _argv(folder, f"lora{d}", d, *words))[0] for d in (2, 1))
    assert sharded.keys() == whole.keys()
    assert any("lora_B" in name and float(value.abs().max()) > 1e-3 for name, value in sharded.items())
    for name, value in sharded.items():
        torch.testing.assert_close(value, whole[name], rtol=0, atol=2e-6)


@pytest.mark.parametrize(("ranks", "degree"), [(2, 1), pytest.param(4, 4, marks=pytest.mark.slow)])
def test_checkpoint_is_loaded_with_another_expert_sharding(
    folder: Path, trained: Tensors, ranks: int, degree: int
) -> None:
    argv = _argv(folder, "elsewhere", degree, "--levels=512:1")
    assert equal(run_distributed(_load, ranks, argv, folder / "sharded" / "checkpoint")[0], trained)


def test_load_of_each_expert_is_logged(folder: Path, trained: Tensors) -> None:
    records = read_metrics(folder / "sharded")
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


V3 = dataclasses.replace(TINY["deepseek_v3"], vocab_size=VOCAB_SIZE, max_position_embeddings=1024)


def test_biases_of_deepseek_v3_move_towards_idle_experts_in_float32(tmp_path: Path) -> None:
    # Also through the folder, the checkpoint and the export, all else of which is in bfloat16.
    base = random_model(V3, 7)
    save_hf_folder(V3, base.named_parameters(), tmp_path / "base", dtype=torch.bfloat16)
    start = {name: value.float() for name, value in HFTensors(tmp_path / "base").items()}
    # Replicated, next to sharded parameters.
    argv = _argv(tmp_path, "start", 2, "--levels=512:1", args=V3)
    assert run_distributed(_checksum, 2, argv, V3)[0] == checksum(start.items())
    words = [
        "--levels=128:1,512:2:ulysses:full",
        "--checkpoint.export_dtype=bfloat16",
        "--optimizer.router_bias_rate=0.001",
    ]
    trained = run_distributed(_train, 2, _argv(tmp_path, "v3", 2, *words, args=V3))[0]
    alone = _argv(tmp_path, "elsewhere", 1, "--levels=512:1", args=V3)
    again = run_distributed(_load, 1, alone, tmp_path / "v3" / "checkpoint", V3)[0]
    biases = {name: value for name, value in base.named_parameters() if name.endswith("e_score_correction_bias")}
    assert len(biases) == 2
    exported, records = HFTensors(tmp_path / "v3" / "hf"), read_metrics(tmp_path / "v3")
    assert len(records) == 2
    for name, value in biases.items():
        assert exported[name].dtype == torch.float32
        counts_S = [torch.tensor(record["tokens_per_expert"][name.split(".")[1]]).float() for record in records]
        for counts in counts_S:
            value = value + 0.001 * (counts.mean() - counts).sign()
        assert value.equal(exported[name])
        assert exported[name].equal(trained[name])
        assert exported[name].equal(again[name])
    router = "layers.1.mlp.gate.weight"
    assert exported[router].dtype == torch.bfloat16
    assert not exported[router].equal(base.get_parameter(router).bfloat16())


@pytest.mark.parametrize(("args", "words"), [(ARGS, ()), (V3, ("--lora.rank=4",))])
def test_a_router_bias_rate_without_trained_biases_is_refused(
    tmp_path: Path, args: ModelArgs, words: tuple[str, ...]
) -> None:
    argv = _argv(tmp_path, "run", 1, "--levels=512:1", "--optimizer.router_bias_rate=0.001", *words, args=args)
    with pytest.raises(ValueError, match="router_bias_rate"):
        check(load_config(argv), 1, torch.device("cpu"), args)
