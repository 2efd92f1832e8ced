"""torchrun for run_train.sh: the same options, but ranks that ended are one line and not a traceback of torchrun.

A rank reports its own error, and a preempted run is no error: torchrun's traceback after either hides what matters.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Mapping, Sequence

from hbp_titan.errors import INSTALL_TRAIN
from hbp_titan.utils import first_n

try:
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
except ModuleNotFoundError as error:
    raise SystemExit(f"error: torchrun needs {error.name}; {INSTALL_TRAIN}") from None

MAX_LISTED = 8


def main(argv: Sequence[str] | None = None, torchrun: Callable[[Sequence[str] | None], None] = run.main) -> int:
    """Run torchrun; return its exit code: 0 if all ranks of this node ended with 0, else 1."""
    try:
        torchrun(argv)
    except ChildFailedError as error:
        print(f"torchrun: {describe(error.failures)}", file=sys.stderr, flush=True)
        return 1
    except SignalException as error:
        # torchrun has passed it on and waited for the ranks.
        print(f"torchrun: {signal.Signals(error.sigval).name} received, all ranks ended", file=sys.stderr, flush=True)
        return 1
    return 0


def describe(failures: Mapping[int, ProcessFailure]) -> str:
    """Return how each rank ended, the first to end first."""
    in_order = sorted(failures.items(), key=lambda item: item[1].timestamp)
    ends = (
        f"rank {rank} (pid {failure.pid}) "
        + (f"ended by {failure.signal_name()}" if failure.exitcode < 0 else f"exited with code {failure.exitcode}")
        for rank, failure in in_order
    )
    return first_n(list(ends), MAX_LISTED, "; ")


if __name__ == "__main__":
    raise SystemExit(main())
