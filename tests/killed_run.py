"""The ranks of runs that end by SIGKILL: at a step of a save or after some seconds, on the ranks that a test names.

Owns how a rank dies and what two runs are compared by; nothing here checks anything.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from hbp_titan.components import checkpoint, dcp_storage
from hbp_titan.config import load_config
from hbp_titan.distributed.world import World
from hbp_titan.testing.local_ranks import RankError, run_distributed
from hbp_titan.train import Trainer

COMPARED = ("step", "epoch", "level", "loss", "loss_by_level", "loss_by_length", "grad_norm", "lr", "tokens", "sources")


@dataclass(frozen=True)
class Kill:
    """Who dies and when: after `seconds`, or in the `number`-th call of a function of a save, before it runs.

    loaded: the seconds count from when the rank has loaded its checkpoint, otherwise from its start.
    half_written: the function's file is begun first.
    """

    ranks: tuple[int, ...]
    seconds: float = 0
    loaded: bool = False
    function: str = ""
    number: int = 1
    half_written: bool = False


def train(world: World, argv: list[str], kill: Kill | None = None) -> list[int]:
    """Train to the end; returns the first and the last step."""
    if kill is not None and world.rank not in kill.ranks:
        kill = None
    if kill and kill.function:
        for module in (checkpoint, dcp_storage):
            if hasattr(module, kill.function):
                setattr(module, kill.function, _deadly(getattr(module, kill.function), kill))
    elif kill and not kill.loaded:
        _die_in(kill.seconds)
    trainer = Trainer(load_config(argv), world)
    if kill and kill.loaded:
        _die_in(kill.seconds)
    first = trainer.step
    trainer.train()
    return [first, trainer.step]


def _die_in(seconds: float) -> None:
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
    timer.daemon = True
    timer.start()


def _deadly(function: Callable[..., Any], kill: Kill) -> Callable[..., Any]:
    calls = []

    def call(path: Path, *args: Any, **kwargs: Any) -> Any:
        calls.append(path)
        if len(calls) == kill.number:
            if kill.half_written:
                path.write_bytes(bytes(1000))
            os.kill(os.getpid(), signal.SIGKILL)
        return function(path, *args, **kwargs)

    return call


def train_until_killed(argv: list[str], kill: Kill) -> None:
    """A start of the run on two ranks that a kill ends."""
    with contextlib.suppress(RankError):
        run_distributed(train, 2, argv, kill)


def outcome(folder: Path) -> tuple[list[list[Any]], dict[str, Tensor]]:
    """Every step's metrics that do not depend on the clock, and the final weights."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [[line[key] for key in COMPARED] for line in lines], load_file(folder / "hf" / "model.safetensors")
