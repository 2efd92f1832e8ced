"""The ranks of the runs with LoRA: apart from their checks, so that a rank need not import what these compare with."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hbp_titan.components.weights import checksum
from hbp_titan.config import load_config
from hbp_titan.distributed.world import World
from hbp_titan.models.decoder import Decoder
from hbp_titan.models.hf import args_to_hf_config, save_hf_folder
from hbp_titan.models.lora import is_adapter
from hbp_titan.train import Trainer
from tests.tiny_run import ARGS, write_tiny_run

LEVELS = """
[[levels]]
max_tokens = 128

[[levels]]
max_tokens = 512
cp_degree = 2
ac_policy = "{policy}"
"""


def write_lora_run(folder: Path, policy: str = "full", tied: bool = True) -> list[str]:
    """Data, model and a base of HF's format in `folder`; the arguments of a run of two levels, cp 1 and 2."""
    argv = [word for word in write_tiny_run(folder) if not word.startswith("--levels")]
    (folder / "run.toml").write_text(LEVELS.format(policy=policy))
    args = dataclasses.replace(ARGS, tie_embeddings=tied)
    (folder / "model" / "config.json").write_text(json.dumps(args_to_hf_config(args)), encoding="utf-8")
    base = Decoder(args)
    base.init_weights(7)
    save_hf_folder(args, base.named_parameters(), folder / "base", dtype=torch.float32)
    return [
        *argv,
        f"--job.config_file={folder / 'run.toml'}",
        f"--checkpoint.initial_load_path={folder / 'base'}",
        "--lora.rank=4",
        "--lora.alpha=8",
        "--training.global_batch_tokens=500",
        # With the usual 1e-8 Adam's first update is the sign of the gradient, also where that is rounding noise.
        "--optimizer.eps=1e-4",
    ]


def train_and_resume(world: World, argv: list[str], folder: Path) -> list[dict[str, Any]]:
    """A run, and one in `folder`/resumed that finds its state as it was before the last checkpoint."""
    whole = train(world, argv)
    resumed = folder / "resumed"
    if world.rank == 0:
        shutil.copytree(folder / "run", resumed)
        shutil.rmtree(max((resumed / "checkpoint").iterdir()))
        for name in ("hf", "hf_adapter"):
            shutil.rmtree(resumed / name)
    dist.barrier()
    return [whole, train(world, [*argv, f"--job.dump_folder={resumed}"])]


def train_each(world: World, runs: list[list[str]]) -> list[dict[str, Any]]:
    """Several runs one after the other."""
    return [train(world, argv) for argv in runs]


def train(world: World, argv: list[str]) -> dict[str, Any]:
    """The whole parameters after a run, and what a rank saw: graphs, levels, bytes of the optimizer's state."""
    from torch._dynamo.utils import counters

    torch._dynamo.config.fail_on_recompile_limit_hit = True
    trainer = Trainer(load_config(argv), world)
    before = checksum((name, p) for name, p in trainer.model.named_parameters() if not is_adapter(name))
    levels: set[int] = set()
    whole_step = trainer.train_step

    def counted(plan: Any, step: int, batches: Any) -> dict[str, Any]:
        levels.update(plan.level_of_iteration[plan.step_offsets[step] : plan.step_offsets[step + 1]].tolist())
        return whole_step(plan, step, batches)

    trainer.train_step = counted  # type: ignore[method-assign]
    first_step = trainer.step
    trainer.train()
    state = [value for of in trainer.optimizer.state.values() for key, value in of.items() if key != "step"]
    return {
        "parameters": {name: p.full_tensor().detach() for name, p in trainer.model.named_parameters()},
        "with_gradient": {name for name, p in trainer.model.named_parameters() if p.requires_grad},
        "checksums": (before, checksum((n, p) for n, p in trainer.model.named_parameters() if not is_adapter(n))),
        "first_step": first_step,
        "levels": levels,
        "optimizer_bytes": sum(value.to_local().nbytes for value in state),
        "graphs": counters["stats"]["unique_graphs"],
        "breaks": sum(counters["graph_break"].values()),
    }
