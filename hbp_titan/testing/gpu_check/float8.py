"""Step of the GPU check on FP8 products: loss, gradients and time of each recipe against bf16, and the level switch.

Owns the rows. On a CPU the products are emulated, and nothing is timed.
"""

from __future__ import annotations

import dataclasses
import gc
import time
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch
from torch._dynamo.utils import counters

from hbp_titan.components.optimizer import build_optimizer
from hbp_titan.config import JobConfig
from hbp_titan.data.batch import PackedBatch
from hbp_titan.distributed.float8 import CAPABILITY, torchao_version
from hbp_titan.distributed.world import World
from hbp_titan.engine import Engine
from hbp_titan.models.configs import ModelArgs
from hbp_titan.models.registry import get_flavor
from hbp_titan.packing import Level
from hbp_titan.testing.gpu_check.blocks import base_config, batches_of, one_rank, optimizer_step
from hbp_titan.testing.gpu_check.runner import Found, Settings, Table

RECIPES = {
    "bf16": ("", False),
    "tensorwise": ("tensorwise", False),
    "tensorwise, float8 all-gather": ("tensorwise", True),
    "rowwise": ("rowwise", False),
    "rowwise_with_gw_hp": ("rowwise_with_gw_hp", False),
}
"""float8.recipe and float8.fsdp_all_gather by the name of a row."""
STEPS = 3
LOSS_TOLERANCE = 0.02
NORM_TOLERANCE = 0.15
"""Largest relative differences from bf16: of the losses of three steps, and of the first gradient's norm. Rounding to
float8 changes a product by about 3%, and products of independent errors differ less."""


@dataclass(frozen=True)
class _Run:
    """losses, norms: of each step. seconds: of forward and backward, by level. graphs: of the compiler."""

    losses: list[float]
    norms: list[float]
    seconds: list[float]
    graphs: int


def float8(settings: Settings) -> Found:
    """Train three steps with each recipe, at a level with float8 products and one without."""
    if not torchao_version():
        return Found(skipped="torchao is not installed: pip install --no-deps 'torchao==0.18.*'")
    args = dataclasses.replace(
        get_flavor("debug" if settings.tiny else "llama3_1_8b"), num_layers=2 if settings.tiny else 4, vocab_size=4096
    )
    runs: dict[str, _Run] = {}
    missing = []
    with one_rank(settings) as world:
        for name, (recipe, gathers) in RECIPES.items():
            if reason := _unsupported(recipe, settings):
                missing.append([name, reason])
                continue
            runs[name] = _run(args, _config(settings, recipe, gathers), world)
            gc.collect()
    rows, problems = [], []
    plain = runs["bf16"]
    for name, run in runs.items():
        rows.append([name, *_cells(run, plain), str(run.graphs)])
        problems += [f"{name}: {text}" for text in _problems(run, plain, name, settings)]
    columns = ["products", "losses", "first norm", "loss - bf16", "norm - bf16", "ms, 16K", "x bf16", "graphs"]
    tables = [Table(f"{args.name}, {args.num_layers} layers", columns, rows), Table("not here", ["", "why"], missing)]
    speeds = ", ".join(
        f"{name} {plain.seconds[0] / run.seconds[0]:.2f}x" for name, run in runs.items() if run is not plain
    )
    details = {name: dataclasses.asdict(run) for name, run in runs.items()}
    summary = f"losses as in bf16; {speeds} in a micro-batch" if settings.device_type == "cuda" else "losses as in bf16"
    return Found(summary * (not problems), tables, details, problems)


def _unsupported(recipe: str, settings: Settings) -> str:
    """Return why a recipe cannot run here, "" if it can."""
    if not recipe or settings.device_type != "cuda" or torch.cuda.get_device_capability() >= CAPABILITY[recipe]:
        return ""
    return f"needs compute capability {'.'.join(map(str, CAPABILITY[recipe]))}"


def _config(settings: Settings, recipe: str, gathers: bool) -> JobConfig:
    config = base_config(settings, compiled=True)
    tokens = 64 if settings.tiny else 16384
    # The last level runs the same shapes without float8, except where weights are gathered in it.
    config.levels = [
        Level(tokens, ac_policy="full"),
        Level(2 * tokens, ac_policy="keep_attention", mlp_chunk_tokens=tokens),
    ]
    if recipe and not gathers:
        config.levels[1] = dataclasses.replace(config.levels[1], float8=False)
    config.float8.recipe, config.float8.fsdp_all_gather = recipe, gathers
    config.float8.emulate = settings.device_type != "cuda"
    if settings.tiny:
        config.float8.filter_fqns = []
    config.optimizer.lr = 1e-4
    return config


def _run(args: ModelArgs, config: JobConfig, world: World) -> _Run:
    torch._dynamo.reset()
    counters.clear()
    engine = Engine(config, args, world)
    optimizer = build_optimizer(engine.model, config.optimizer)
    if engine.runtime.float8_state:
        engine.runtime.float8_state.track(optimizer, engine.model)
    batches = batches_of(args, config, world.device)
    steps = [[value.sum().item() for value in optimizer_step(engine, optimizer, batches)] for _ in range(STEPS)]
    graphs = int(counters["stats"]["unique_graphs"])
    seconds = [_seconds(engine, batch, world.device) for batch in batches]
    losses = [sum(step[:-1]) for step in steps]
    return _Run(losses, [step[-1] for step in steps], seconds, graphs)


def _seconds(engine: Engine, batch: PackedBatch, device: torch.device) -> float:
    """Return the median time of a micro-batch."""
    times = []
    for _ in range(5 if device.type == "cuda" else 1):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        engine.forward_backward(batch).cpu()
        times.append(time.perf_counter() - started)
    engine.model.zero_grad()
    return median(times)


def _differences(run: _Run, plain: _Run) -> tuple[float, float]:
    # Python's max() ignores NaN.
    loss = float(np.max(np.abs(np.divide(run.losses, plain.losses) - 1)))
    return loss, abs(run.norms[0] - plain.norms[0]) / plain.norms[0]


def _cells(run: _Run, plain: _Run) -> list[str]:
    loss, norm = _differences(run, plain)
    losses = " ".join(f"{value:.5g}" for value in run.losses)
    times = [f"{1e3 * run.seconds[0]:.1f}", f"{plain.seconds[0] / run.seconds[0]:.2f}"]
    return [losses, f"{run.norms[0]:.4g}", f"{loss:.1e}", f"{norm:.1e}", *times]


def _problems(run: _Run, plain: _Run, name: str, settings: Settings) -> list[str]:
    loss, norm = _differences(run, plain)
    found = []
    # Negated comparisons, so that NaN is a problem.
    if not loss <= LOSS_TOLERANCE:
        found.append(f"the losses differ by {loss:.1e} from bf16's")
    if not norm <= NORM_TOLERANCE:
        found.append(f"the gradient's norm differs by {norm:.1e} from bf16's")
    if name != "bf16" and run.losses == plain.losses:
        found.append("the losses are bf16's, bit for bit: no product is in float8")
    if settings.device_type == "cuda" and name.startswith("tensorwise") and run.seconds[0] > plain.seconds[0]:
        found.append(f"a micro-batch takes {run.seconds[0] / plain.seconds[0]:.2f} times as long as in bf16")
    return found
