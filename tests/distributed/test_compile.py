"""Compiled blocks train as eager ones do, with one graph a level whatever the documents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hbp_titan.config import load_config
from hbp_titan.distributed.local_ranks import run_distributed
from hbp_titan.distributed.world import World
from hbp_titan.train import Trainer
from tests.tiny_run import write_tiny_run

LEVELS = """
[[levels]]
max_tokens = 128

[[levels]]
max_tokens = 512
cp_degree = 2
cp_style = "{style}"
ac_policy = "{policy}"
"""


def _train(world: World, argv: list[str]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    from torch._dynamo.utils import counters

    torch._dynamo.config.fail_on_recompile_limit_hit = True
    trainer = Trainer(load_config(argv), world)
    trainer.train()
    seen = {"graphs": counters["stats"]["unique_graphs"], "breaks": sum(counters["graph_break"].values())}
    return {name: p.full_tensor().detach() for name, p in trainer.model.named_parameters()}, seen  # type: ignore[attr-defined]


# The halves of a block are graphs of their own where attention is kept.
@pytest.mark.parametrize(
    ("style", "policy", "graphs"), [("ulysses", "full", 2), ("ulysses", "keep_attention", 3), ("allgather", "full", 2)]
)
def test_compiled_run_equals_the_eager_one_with_one_graph_a_level(
    style: str, policy: str, graphs: int, tmp_path: Path
) -> None:
    argv = [word for word in write_tiny_run(tmp_path) if not word.startswith("--levels")]
    (tmp_path / "run.toml").write_text(LEVELS.format(style=style, policy=policy))
    argv += [
        f"--job.config_file={tmp_path / 'run.toml'}",
        "--checkpoint.enable=false",
        "--checkpoint.export_hf=false",
        "--optimizer.eps=1e-4",
    ]
    expected, _ = run_distributed(_train, 2, argv)[0]
    found, seen = run_distributed(_train, 2, [*argv, "--compile.enable=true", "--compile.backend=aot_eager"])[0]
    assert seen == {"graphs": graphs, "breaks": 0}
    for name, value in expected.items():
        assert (found[name] - value).norm() < 1e-5 * value.norm(), name
