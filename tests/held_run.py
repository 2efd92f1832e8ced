"""A run that waits after a step until the test continues it: `python -m tests.held_run STEP RELEASE ARGUMENTS`.

A signal or a kill then comes at a known step, however busy the machine is.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any


def hold(trainer_class: Any, step: int, release: Path) -> None:
    """Make every rank wait after `step` until it receives a signal or `release` exists."""
    train_step = trainer_class.train_step

    def held(trainer: Any, *args: Any) -> Any:
        if trainer.step == step:
            # Otherwise written in the next step's first micro-batch, and the test waits for it.
            trainer._write_pending_metrics()
        while trainer.step == step and not trainer.preemption.received and not release.exists():
            time.sleep(0.01)
        return train_step(trainer, *args)

    trainer_class.train_step = held


def main(step: int, release: Path, argv: list[str]) -> None:
    """Train with that wait."""
    from hbp_titan import train

    hold(train.Trainer, step, release)
    train.main(argv)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
