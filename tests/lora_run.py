"""Runs with LoRA, apart from their checks: a rank need not import PEFT and transformers."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hbp_titan.components.lora_checkpoint import checksum
from hbp_titan.config import load_config
from hbp_titan.distributed.world import World
from hbp_titan.models.decoder import Decoder
from hbp_titan.models.hf_export import save_hf_folder
from hbp_titan.models.layers import is_adapter
from hbp_titan.train import Trainer
from tests.runs import before_step
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
    """Write data, model and an HF base into `folder`; return the arguments of a run of two levels, cp 1 and 2."""
    args = dataclasses.replace(ARGS, tie_embeddings=tied)
    argv = write_tiny_run(folder, levels="", args=args)
    (folder / "run.toml").write_text(LEVELS.format(policy=policy))
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
        # With the usual 1e-8, Adam's first update is the sign of the gradient even if that is rounding noise.
        "--optimizer.eps=1e-4",
    ]


def train_each(world: World, runs: list[list[str]], folder: Path | None = None) -> list[dict[str, Any]]:
    """Train several runs one after the other; with `folder`, the second resumes from the first's older checkpoint."""
    found = []
    for argv in runs:
        found.append(_train(world, argv))
        if folder is not None and world.rank == 0 and len(found) == 1:
            shutil.copytree(folder / "run", folder / "resumed")
            shutil.rmtree(max((folder / "resumed" / "checkpoint").iterdir()))
            for name in ("hf", "hf_adapter"):
                shutil.rmtree(folder / "resumed" / name)
        dist.barrier()
    return found


def _train(world: World, argv: list[str]) -> dict[str, Any]:
    from torch._dynamo.utils import counters

    torch._dynamo.config.fail_on_recompile_limit_hit = True
    trainer = Trainer(load_config(argv), world)

    def base_checksum() -> str:
        return checksum((name, p) for name, p in trainer.model.named_parameters() if not is_adapter(name))

    first_step, first_checksum = trainer.step, base_checksum()
    plan, levels = trainer.position.plan, set[int]()
    before_step(
        trainer,
        lambda step: levels.update(plan.level_of_iteration[slice(*plan.step_offsets[step : step + 2])].tolist()),
    )
    trainer.train()
    state = [value for of in trainer.optimizer.state.values() for key, value in of.items() if key != "step"]
    return {
        "parameters": {name: p.full_tensor().detach() for name, p in trainer.model.named_parameters()},
        "with_gradient": {name for name, p in trainer.model.named_parameters() if p.requires_grad},
        "checksums": (first_checksum, base_checksum()),
        "first_step": first_step,
        "levels": levels,
        "optimizer_bytes": sum(value.to_local().nbytes for value in state),
        "graphs": counters["stats"]["unique_graphs"],
        "breaks": sum(counters["graph_break"].values()),
    }
