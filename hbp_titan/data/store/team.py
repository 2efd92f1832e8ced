"""Several processes that prepare the same data together on a shared file system, or one alone.

Owns what they agree on: results are gathered, and a user's mistake that one of them meets is raised by all.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from hbp_titan.cli import Mistakes, one_line

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
