"""What a job says when a rank fails or nothing moves any more: the first error, once.

Owns the question which rank speaks. When one rank fails, the collectives of all others fail or never end; their errors
say nothing. So the first rank that fails tells, through the store in which the ranks met, and the others are silent.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.distributed import distributed_c10d

from hbp_titan.cli import Mistakes, error_lines


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
