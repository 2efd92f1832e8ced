"""A run of which rank 1 fails: `python -m tests.faulty_run FAULT ARGUMENTS`, under torchrun or run_python.

The fault comes in the forward of the third micro-batch after the warm-up of the two levels.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from hbp_titan import train
from hbp_titan.engine import Engine


def _raise() -> None:
    raise RuntimeError("the third micro-batch went wrong")


def _sleep() -> None:
    time.sleep(1000)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _stop() -> None:
    folder = next(word.partition("=")[2] for word in sys.argv if word.startswith("--job.dump_folder="))
    Path(folder, "stopped").touch()
    os.kill(os.getpid(), signal.SIGSTOP)


FAULTS = {"raises": _raise, "hangs": _sleep, "is killed": _die, "stops": _stop}


def main(fault: str, argv: list[str]) -> None:
    """Train with a fault."""
    calls = iter(range(1_000_000))
    forward = Engine.forward

    def faulty(engine: Engine, batch: Any) -> Any:
        # The warm-up runs each of the two levels once.
        if next(calls) == 2 + 2 and os.environ["RANK"] == "1":
            FAULTS[fault]()
        return forward(engine, batch)

    Engine.forward = faulty  # type: ignore[method-assign]
    train.main(argv)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
