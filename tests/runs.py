"""Training runs as functions for `run_distributed`: to their end, up to a step, killed or signalled.

Apart from the checks, so that a rank imports little.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from hbp_titan.components import checkpoint, dcp_storage
from hbp_titan.components.faults import Preempted
from hbp_titan.config import load_config
from hbp_titan.distributed.world import World
from hbp_titan.testing.local_ranks import RankError, run_distributed
from hbp_titan.train import Trainer

ROOT = Path(__file__).resolve().parents[1]
DEADLINE = 150
"""Seconds for a run of several processes on a busy machine."""
COMPARED = ("step", "epoch", "level", "loss", "loss_by_level", "loss_by_length", "grad_norm", "lr", "tokens", "sources")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the complete lines of metrics.jsonl so far."""
    path = folder / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines() if line.endswith("}")]


def compared(folder: Path) -> list[list[Any]]:
    """Return each step's metrics that do not depend on the clock."""
    return [[step[key] for key in COMPARED] for step in read_metrics(folder)]


def equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Return whether two sets of named tensors are equal bit for bit."""
    return a.keys() == b.keys() and all(value.equal(b[name]) for name, value in a.items())


def assert_same_run(whole: Path, other: Path) -> None:
    """Compare every step's metrics and the exported weights of two runs bit for bit."""
    assert compared(other) == compared(whole)
    assert equal(*(load_file(folder / "hf" / "model.safetensors") for folder in (whole, other)))


@dataclass(frozen=True)
class Kill:
    """SIGKILL of some ranks: after `seconds`, or before the `number`-th call of a function of a save.

    loaded: count the seconds from when the checkpoint is loaded, otherwise from the start.
    half_written: begin the function's file first.
    """

    ranks: tuple[int, ...]
    seconds: float = 0
    loaded: bool = False
    function: str = ""
    number: int = 1
    half_written: bool = False


def train(world: World, argv: list[str], kill: Kill | None = None) -> list[int]:
    """Train to the end; return the first and the last step."""
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
    """Start the run on two ranks; the kill ends it."""
    with contextlib.suppress(RankError):
        run_distributed(train, 2, argv, kill)


class _Stop(Exception):
    pass


def train_until(world: World, argv: Sequence[str], last_step: int | None = None) -> dict[str, Any]:
    """Train up to `last_step`, where the run ends abruptly, or to its end.

    Returns the whole tensors at the start and at the end, the samples planned at the start, and more.
    """
    trainer = Trainer(load_config(list(argv)), world)
    started = whole_state(trainer)
    planned = trainer.position.plan.packs.ids.tolist()

    def stop(step: int) -> None:
        if step == last_step:
            raise _Stop

    before_step(trainer, stop)
    with contextlib.suppress(_Stop):
        trainer.train()
    # This end is not meant to interrupt the save in flight.
    trainer.checkpointer.wait()
    return {
        "started": started,
        "ended": whole_state(trainer),
        "step": trainer.step,
        "total_steps": trainer.total_steps,
        "planned": planned,
        "resumed": trainer.train_state.resumed,
    }


def train_until_each(world: World, runs: list[list[str]]) -> list[dict[str, Any]]:
    """Train several runs one after the other in the same processes."""
    return [train_until(world, argv) for argv in runs]


def train_and_signal(world: World, argv: list[str], after_step: int, number: int) -> tuple[int, int]:
    """Send signal `number` to rank 1 after a step; return the exit code and the last step."""
    trainer = Trainer(load_config(argv), world)

    def send(step: int) -> None:
        if step == after_step and world.rank == 1:
            os.kill(os.getpid(), number)

    before_step(trainer, send)
    try:
        trainer.train()
    except Preempted as ended:
        return int(ended.code or 0), trainer.step
    return 0, trainer.step


def before_step(trainer: Trainer, hook: Callable[[int], None]) -> None:
    """Call hook(steps done) before every optimizer step."""
    train_step = trainer.train_step

    def hooked(*args: Any) -> Any:
        hook(trainer.step)
        return train_step(*args)

    trainer.train_step = hooked  # type: ignore[method-assign]


def whole_state(trainer: Trainer) -> dict[str, Tensor]:
    """Return every parameter and every tensor of the optimizer's state by name."""
    found: dict[str, Tensor] = {}
    for name, parameter in trainer.model.named_parameters():
        found[name] = _whole(parameter)
        for key, value in trainer.optimizer.state.get(parameter, {}).items():
            found[f"{name}.{key}"] = _whole(value)
    return found


def _whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def torchrun(argv: Sequence[str], *module: str, ranks: int = 2) -> subprocess.Popen[str]:
    """Start `torchrun -m MODULE ARGV`, with stdout and stderr in one stream."""
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--rdzv-backend=c10d"]
    return subprocess.Popen(
        [*launcher, "--rdzv-endpoint=localhost:0", "-m", *(module or ("hbp_titan.train",)), *argv],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_until(reached: Callable[[], bool], *processes: subprocess.Popen[str]) -> None:
    """Wait for a condition, as long as the processes are alive."""
    deadline = time.monotonic() + DEADLINE
    while not reached():
        assert all(process.poll() is None for process in processes), [p.communicate() for p in processes]
        assert time.monotonic() < deadline
        time.sleep(0.01)
