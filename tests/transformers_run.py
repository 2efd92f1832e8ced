"""Runs of decoders of transformers, apart from their checks: a rank imports little."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from hbp_titan.config import load_config
from hbp_titan.distributed.world import World
from hbp_titan.testing.transformers_sweep import tiny_model
from hbp_titan.train import Trainer
from tests.runs import before_step, whole_state
from tests.tiny_run import VOCAB_SIZE, write_tiny_run


def write_transformers_run(folder: Path, model_type: str, levels: str, saves: bool = False, **own: Any) -> list[str]:
    """Write data and a tiny model of transformers into `folder`; return the arguments of a run."""
    argv = write_tiny_run(folder, num_rows=30, levels=levels, saves=saves)
    _, model = tiny_model(model_type, vocab_size=VOCAB_SIZE, max_position_embeddings=1024, **own)
    model.save_pretrained(folder / "model")
    return [
        *argv,
        "--checkpoint.initial_load_path=",
        "--model.backend=transformers",
        "--training.global_batch_tokens=350",
        # With the usual 1e-8, Adam's first update is the sign of the gradient even if that is rounding noise.
        "--optimizer.eps=1e-4",
    ]


def train_each(world: World, runs: list[list[str]]) -> list[tuple[dict[str, Tensor], set[int]]]:
    """Train several runs one after the other; return the whole parameters and the levels that were trained."""
    found = []
    for argv in runs:
        trainer = Trainer(load_config(argv), world)
        plan, levels = trainer.position.plan, set[int]()

        def note(step: int, plan: Any = plan, levels: set[int] = levels) -> None:
            levels.update(plan.level_of_iteration[slice(*plan.step_offsets[step : step + 2])].tolist())

        before_step(trainer, note)
        trainer.train()
        state = whole_state(trainer)
        found.append(({name: state[name] for name, _ in trainer.model.named_parameters()}, levels))
    return found
