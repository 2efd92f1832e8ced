"""How a command ends: with its result, or with one line per user error on stderr and exit code 1.

Owns the distinction between a user error (ValueError, OSError) and a bug, which keeps its traceback; which rank of a
job reports; and errors that all ranks must raise together. HBP_TRACEBACK=1 shows the traceback of user errors as well.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch.distributed import Store

T = TypeVar("T")
INSTALL_TRAIN = "install it with: pip install 'hbp-titan[train]'"


class UserError(ValueError):
    """One or more mistakes of the user, one line per mistake."""

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__("\n".join(lines))
        self.lines = list(lines)

    def __reduce__(self) -> tuple[type[UserError], tuple[list[str]]]:
        # Pickled between ranks and worker processes; the default would pass the joined message as `lines`.
        return UserError, (self.lines,)


def format_error(error: BaseException) -> str:
    """Return the message of `error` on one line, with the file's name for an OSError."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


def format_errors(error: BaseException) -> str:
    """Return the lines that a command prints for a user error."""
    lines = error.lines if isinstance(error, UserError) else [format_error(error)]
    return "\n".join(f"error: {' '.join(line.split())}" for line in lines)


def exit_on_user_error(function: Callable[[], T], reports: Callable[[], bool] | None = None) -> T:
    """Return what `function` returns; print a user error and exit with code 1.

    reports: whether this process prints it, where several may fail alike; by default rank 0 prints a UserError, which
        every rank raises, and each process its own other errors.
    """
    try:
        return function()
    except (ValueError, OSError) as error:
        on_every_rank = isinstance(error, UserError)
        if not (reports() if reports else not on_every_rank or os.environ.get("RANK", "0") == "0"):
            raise SystemExit(1) from None
        _print_user_error(error)
        raise SystemExit(1) from None


def _print_user_error(error: BaseException) -> None:
    if os.environ.get("HBP_TRACEBACK") == "1":
        traceback.print_exception(error)
    print(format_errors(error), file=sys.stderr, flush=True)


def default_store() -> Store:
    """Return the store of the rendezvous; torchrun's restarts begin with an empty one."""
    from torch.distributed import distributed_c10d

    return distributed_c10d._get_default_store()


def claim_first_failure() -> bool:
    """Return whether this rank is the first of the job to fail, and record the claim.

    Before the rendezvous, local rank 0 of each node claims: all ranks run into the same user error.
    """
    # Not at the top: `hbp-titan --help` and the planner answer without torch.
    import torch.distributed as dist

    if not dist.is_initialized():
        return os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        return default_store().add("hbp_titan/failed", 1) == 1
    except (RuntimeError, ValueError):
        # The rank or node that held the store is gone, so no other rank can claim either.
        return True


@contextmanager
def report_first_error(rank: int, where: Callable[[], str]) -> Iterator[None]:
    """Exit with code 1 on any exception inside; only the first rank of the job to fail prints it.

    When one rank fails, the collectives of the others fail or hang, and their errors carry no information.
    where: what the rank was doing, for the message.
    """
    try:
        yield
    except Exception as error:
        if claim_first_failure():
            if isinstance(error, UserError | OSError):
                _print_user_error(error)
            else:
                print(
                    f"rank {rank} failed in {where()}:\n{traceback.format_exc().rstrip()}", file=sys.stderr, flush=True
                )
        raise SystemExit(1) from None


def raise_on_all_ranks(work: Callable[[], T], gather: Callable[[Any], list[Any]]) -> list[T]:
    """Return what `work` returns on each rank; raise UserError on all ranks if any raises ValueError or OSError.

    gather: value -> the values of all ranks in rank order; a collective.
    """
    try:
        outcome: tuple[T | None, list[str]] = (work(), [])
    except UserError as error:
        outcome = (None, error.lines)
    except (ValueError, OSError) as error:
        outcome = (None, [format_error(error)])
    outcomes = gather(outcome)
    lines = [line for _, found in outcomes for line in found]
    if lines:
        # A mistake that several ranks found is listed once.
        raise UserError(list(dict.fromkeys(lines)))
    return [result for result, _ in outcomes]


def _gather_one(value: Any) -> list[Any]:
    return [value]


@dataclass(frozen=True)
class WorkerGroup:
    """`size` processes that prepare data together on a shared file system, of which this is `rank`.

    gather: value -> the values of all ranks in rank order; a collective. report: called with what this rank is about to
    do, for the ranks that wait for it.
    """

    rank: int = 0
    size: int = 1
    gather: Callable[[Any], list[Any]] = _gather_one
    report: Callable[[str], None] = lambda work: None

    def share(self, count: int) -> range:
        """Return the indices, of `count` pieces of work, that are this rank's: every size-th."""
        return range(self.rank, count, self.size)

    def run_on_all(self, work: Callable[[], T]) -> list[T]:
        """Return what `work` returns on each rank; user errors of any rank are raised on all."""
        return raise_on_all_ranks(work, self.gather)


def cores_per_rank() -> int:
    """Return the cores for each rank on this machine, at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
