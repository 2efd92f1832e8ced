"""Compiled blocks train like eager ones, with one graph per level for any documents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hbp_titan.config import load_config
from hbp_titan.data.batch import PackedBatch
from hbp_titan.distributed.world import World
from hbp_titan.testing.local_ranks import run_distributed
from hbp_titan.train import Trainer
from tests.tiny_run import write_tiny_run


def _train(world: World, argv: list[str]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    from torch._dynamo.utils import counters

    torch._dynamo.config.fail_on_recompile_limit_hit = True
    trainer = Trainer(load_config(argv), world)
    trainer.train()
    seen = {"graphs": counters["stats"]["unique_graphs"], "breaks": sum(counters["graph_break"].values())}
    return {name: p.full_tensor().detach() for name, p in trainer.model.named_parameters()}, seen  # type: ignore[attr-defined]


# Graphs: without cp ranks one before and one after attention; with cp ranks two before (keys and values, queries) and
# one after, without the last product for recomputed blocks; one for the loss.
@pytest.mark.parametrize(
    ("style", "cp", "policy", "graphs"),
    [
        pytest.param("ulysses", 2, "full", 6, marks=pytest.mark.slow),
        pytest.param("ulysses", 2, "keep_attention", 6, marks=pytest.mark.slow),
        pytest.param("allgather", 2, "full", 6, marks=pytest.mark.slow),
        # Two kv heads: two groups that gather from each other, of two ranks each.
        pytest.param("hybrid", 4, "keep_attention", 6, marks=pytest.mark.slow),
    ],
)
def test_compiled_run_equals_the_eager_run(style: str, cp: int, policy: str, graphs: int, tmp_path: Path) -> None:
    argv = write_tiny_run(tmp_path, levels=f"128:1,512:{cp}:{style}:{policy}", saves=False)
    argv.append("--optimizer.eps=1e-4")
    expected, _ = run_distributed(_train, cp, argv)[0]
    found, seen = run_distributed(_train, cp, [*argv, "--compile.enable=true", "--compile.backend=aot_eager"])[0]
    assert seen == {"graphs": graphs, "breaks": 0}
    for name, value in expected.items():
        assert (found[name] - value).norm() < 1e-5 * value.norm(), name


def _train_without_recompiling(world: World, argv: list[str]) -> tuple[int, int, int]:
    """Return the graphs after the warm-up, those of the whole run, and the number of different packs."""
    from torch._dynamo.utils import counters

    trainer = Trainer(load_config(argv), world)
    probe, forward_backward = trainer._warm_up, trainer.engine.forward_backward
    after_probe: list[int] = []
    seen = set()

    def probe_then_forbid() -> None:
        probe()
        after_probe.append(counters["stats"]["unique_graphs"])
        torch._dynamo.config.error_on_recompile = True

    def recorded(batch: PackedBatch, last: bool = True) -> torch.Tensor:
        seen.add(tuple(batch.lengths.tolist()))
        return forward_backward(batch, last)

    trainer._warm_up = probe_then_forbid  # type: ignore[method-assign]
    trainer.engine.forward_backward = recorded  # type: ignore[method-assign]
    trainer.train()
    assert not counters["graph_break"]
    return after_probe[0], counters["stats"]["unique_graphs"], len(seen)


@pytest.mark.slow
def test_no_recompilation_in_200_steps_two_epochs_and_validation(tmp_path: Path) -> None:
    argv = write_tiny_run(tmp_path, 700, levels="128:1,512:2:ulysses:full", saves=False)
    held_out = "".join((tmp_path / "train.jsonl").read_text().splitlines(keepends=True)[:40])
    (tmp_path / "validation.jsonl").write_text(held_out)
    argv += [
        f"--data.validation_files={tmp_path / 'validation.jsonl'}",
        "--validation.enable=true",
        "--validation.interval=50",
        "--training.epochs=2",
        "--compile.enable=true",
        "--compile.backend=aot_eager",
    ]
    steps = 0
    for first, all_graphs, packs in run_distributed(_train_without_recompiling, 2, argv):
        # Two and three regions, each with and without gradients; the loss with them, for all numbers of its tokens.
        assert (first, all_graphs) == (11, 11)
        assert packs > 50
        steps = len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert steps >= 200
