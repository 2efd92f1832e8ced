"""How every command of the project ends: the result, or one line on stderr that names the mistake.

Owns the guard that turns a user's mistake (ValueError, OSError; Mistakes are several) into one line each and exit
code 1. The traceback of such an error is shown when the environment has HBP_TRACEBACK=1. Any other exception keeps its
traceback: it is our bug.

What a job says when a rank fails or nothing moves any more: the first error, once.

Owns the question which rank speaks. When one rank fails, the collectives of all others fail or never end; their errors
say nothing. So the first rank that fails tells, through the store in which the ranks met, and the others are silent.

Several processes that prepare the same data together on a shared file system, or one alone.

Owns what they agree on: results are gathered, and a user's mistake that one of them meets is raised by all.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed import distributed_c10d

Result = TypeVar("Result")


class Mistakes(ValueError):
    """Several mistakes of the user's in one error, a line each."""

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__("\n".join(lines))
        self.lines = list(lines)

    def __reduce__(self) -> tuple[type[Mistakes], tuple[list[str]]]:
        return Mistakes, (self.lines,)


def one_line(error: BaseException) -> str:
    """The message of `error` on one line, with the file's name where the error is an OSError."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


def error_lines(error: BaseException) -> str:
    """What a command says of a mistake: a line each."""
    lines = error.lines if isinstance(error, Mistakes) else [one_line(error)]
    return "\n".join(f"error: {' '.join(line.split())}" for line in lines)


def guarded(function: Callable[[], Result], shows: Callable[[], bool] | None = None) -> Result:
    """Run `function`; a user's mistake ends the process with one line on stderr and exit code 1.

    shows: whether this process, of several that may run into the same mistake, prints it; without it Mistakes, which
    every rank raises, are printed by rank 0, other errors by any.
    """
    try:
        return function()
    except (ValueError, OSError) as error:
        every_rank = isinstance(error, Mistakes)
        if not (shows() if shows else not every_rank or os.environ.get("RANK", "0") == "0"):
            raise SystemExit(1) from None
        if os.environ.get("HBP_TRACEBACK") == "1":
            traceback.print_exc()
        print(error_lines(error), file=sys.stderr, flush=True)
        raise SystemExit(1) from None


def job_store() -> dist.Store:
    """The store in which the ranks met; keys of an earlier start of the job (torchrun's restarts) are not in it."""
    return distributed_c10d._get_default_store()


def first_to_fail() -> bool:
    """Whether no rank of the job has said so before; counts as this rank's saying so.

    Ranks that have not met yet run into the same mistakes: one a node speaks.
    """
    if not dist.is_initialized():
        return os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        return job_store().add("hbp_titan/failed", 1) == 1
    except (RuntimeError, ValueError):
        # The store is gone, with the rank or the node that held it: nobody else can know.
        return True


@contextmanager
def told_once(rank: int, where: Callable[[], str]) -> Iterator[None]:
    """End this process with exit code 1 for any exception inside; the first rank of the job shows it.

    Mistakes and OSError (a full disk) are one line each, as everywhere.

    where: what was being done, for the message.
    """
    try:
        yield
    except Exception as error:
        if first_to_fail():
            user_mistake = isinstance(error, Mistakes | OSError)
            text = error_lines(error) if user_mistake else f"rank {rank} failed in {where()}:\n{traceback.format_exc()}"
            if user_mistake and os.environ.get("HBP_TRACEBACK") == "1":
                text = f"{traceback.format_exc()}{text}"
            print(text.rstrip(), file=sys.stderr, flush=True)
        raise SystemExit(1) from None


T = TypeVar("T")


def _alone(value: Any) -> list[Any]:
    return [value]


@dataclass(frozen=True)
class Team:
    """rank of size processes. gather: value -> the values of all ranks, in their order; a collective."""

    rank: int = 0
    size: int = 1
    gather: Callable[[Any], list[Any]] = _alone

    def share(self, count: int) -> range:
        """Which of `count` pieces of work are this rank's: every size-th."""
        return range(self.rank, count, self.size)

    def run(self, work: Callable[[], T]) -> list[T]:
        """What `work` returns on each rank; Mistakes on all where it raises ValueError or OSError on any."""
        try:
            outcome: tuple[T | None, list[str]] = (work(), [])
        except Mistakes as mistakes:
            outcome = (None, mistakes.lines)
        except (ValueError, OSError) as error:
            outcome = (None, [one_line(error)])
        outcomes = self.gather(outcome)
        lines = [line for _, found in outcomes for line in found]
        if lines:
            # The same mistake met by all is said once.
            raise Mistakes(list(dict.fromkeys(lines)))
        return [result for result, _ in outcomes]


def own_cores() -> int:
    """Cores for each of the ranks that share this machine, at least one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
