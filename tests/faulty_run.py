"""A run of which one rank fails: `python -m torch.distributed.run -m tests.faulty_run FAULT ARGUMENTS`.

Owns the faults. They come to rank 1 in the forward of its third iteration after the first passes of the levels.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from hbp_titan import train
from hbp_titan.engine import Engine


def _raise() -> None:
    raise RuntimeError("the third iteration went wrong")


def _run_out() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64.00 KiB.")


def _sleep() -> None:
    time.sleep(1000)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _stop() -> None:
    folder = next(word.partition("=")[2] for word in sys.argv if word.startswith("--job.dump_folder="))
    Path(folder, "stopped").touch()
    os.kill(os.getpid(), signal.SIGSTOP)


FAULTS = {"raises": _raise, "runs out of memory": _run_out, "hangs": _sleep, "is killed": _die, "stops": _stop}


def main(fault: str, argv: list[str]) -> None:
    """Train with a fault."""
    calls = iter(range(1_000_000))
    whole = Engine.forward

    def forward(engine: Engine, batch: Any) -> Any:
        # Two levels have a first pass.
        if next(calls) == 2 + 2 and os.environ["RANK"] == "1":
            FAULTS[fault]()
        return whole(engine, batch)

    Engine.forward = forward  # type: ignore[method-assign]
    train.main(argv)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
