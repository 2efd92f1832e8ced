"""Several ranks on this machine, spawned from one process, with their results and errors.

Owns the process handling of the multi-process tests and of scripts/verify_equivalence.py: gloo ranks on the CPU, or
NCCL ranks with one GPU each. Training uses torchrun instead.
"""

from __future__ import annotations

import gc
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from hbp_titan.distributed.world import barrier, close_world, start_groups

PRELOADED = ["hbp_titan.train", "torch.distributed.fsdp", "torch.distributed.checkpoint", "torch._dynamo"]
"""Modules that the fork server imports once for all ranks."""
GRACE_SECONDS = 10.0
"""How long ranks may continue after another has failed: enough to notice and to report it."""


class RankError(RuntimeError):
    """A rank failed or hung; the message contains its traceback."""


def run_distributed(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 240, device_type: str = "cpu"
) -> list[Any]:
    """Run the module-level `function(world, *args)` on `world_size` ranks and return their results in rank order.

    device_type: "cpu", or "cuda" with one GPU per rank. Results are plain containers and CPU tensors.
    Raises RankError with the traceback of the first rank that failed, or with exit codes. Ranks still running `timeout`
    seconds after the start, or GRACE_SECONDS after another failed, are killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        # CUDA cannot be used in a process forked from one that has initialized it, and the fork server might have.
        context = mp.get_context("spawn") if device_type == "cuda" else fork_server()
        processes = [
            context.Process(
                target=_rank_main, args=(function, rank, world_size, folder, dict(os.environ), device_type, args)
            )
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        hung = _join(processes, timeout)
        for rank in range(world_size):
            error = Path(folder, f"error_{rank}")
            if error.exists():
                raise RankError(f"rank {rank}:\n{error.read_text()}")
        codes = {rank: process.exitcode for rank, process in enumerate(processes) if process.exitcode}
        if codes:
            raise RankError(f"exit codes of ranks: {codes}; killed because they did not end: {hung or 'none'}")
        # Safe to unpickle: our own ranks wrote these files.
        return [torch.load(Path(folder, f"result_{rank}"), weights_only=False) for rank in range(world_size)]


def _join(processes: list[Any], timeout: float) -> list[int]:
    """Wait for the ranks, only GRACE_SECONDS after a failure, kill the remaining ones and return which these were."""
    deadline = time.monotonic() + timeout
    alive = {process.sentinel: rank for rank, process in enumerate(processes)}
    while alive and (ended := wait(list(alive), max(0.0, deadline - time.monotonic()))):
        for sentinel in ended:
            process = processes[alive.pop(sentinel)]
            process.join()
            if process.exitcode:
                # Other ranks would wait for the dead one until their own timeout.
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
    for rank in alive.values():
        processes[rank].kill()
        processes[rank].join()
    return sorted(alive.values())


def fork_server() -> Any:
    """Return the multiprocessing context that forks ranks from a server with everything imported, which saves 4 s each.

    The server has no threads and no device; it starts with the first process.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _rank_main(
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    folder: str,
    environment: dict[str, str],
    device_type: str,
    args: tuple[Any, ...],
) -> None:
    # A collection would visit, and so copy, everything that the server imported.
    gc.freeze()
    # The ranks share the machine's cores.
    torch.set_num_threads(1)
    # The fork server's children inherit the environment of its start, not ours.
    os.environ.update(environment)
    os.environ["RANK"], os.environ["WORLD_SIZE"] = str(rank), str(world_size)
    os.environ["LOCAL_RANK"] = str(rank)
    device = torch.device("cuda", rank) if device_type == "cuda" else torch.device("cpu")
    # A file, because a free port could be taken by another process before it is used.
    store = dist.FileStore(f"{folder}/rendezvous", world_size)
    try:
        world = start_groups(store, rank, world_size, device, timedelta(seconds=120))
        result = function(world, *args)
        torch.save(result, Path(folder, f"result_{rank}"))
        # A rank that leaves earlier would close connections that another still uses.
        barrier()
    except BaseException:
        Path(folder, f"error_{rank}").write_text(traceback.format_exc())
        # Without destroying process groups, which could wait for the ranks that still run.
        os._exit(1)
    close_world()
