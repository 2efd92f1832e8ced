"""Several ranks on this machine from within one process: spawned, results and errors brought back.

Owns what the multi-process tests and scripts/verify_equivalence.py share: gloo ranks on the CPU, or NCCL ranks with one
GPU each. Training starts its ranks by torchrun.
"""

from __future__ import annotations

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

SURVIVES_SECONDS = 10.0
"""How long ranks may live on when another has failed: long enough to find that out and say so."""


class RankError(RuntimeError):
    """A rank failed or hung; the message holds its traceback."""


def run_distributed(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 240, device_type: str = "cpu"
) -> list[Any]:
    """Run the module-level `function(world, *args)` on `world_size` ranks; returns what each returned, in rank order.

    device_type: "cpu", or "cuda" with one GPU per rank. Results are plain containers and tensors, of the CPU. Raises
    RankError with the traceback of the first rank that failed, or with exit codes. Ranks that have not ended `timeout`
    seconds after the start, or SURVIVES_SECONDS after another failed, are killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        # A process that is forked from one in which torch has asked for GPUs cannot use them; nothing rules that out.
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
            raise RankError(f"exit codes of ranks: {codes}; stopped because they did not end: {hung or 'none'}")
        # Written by our own ranks into our own folder a moment ago.
        return [torch.load(Path(folder, f"result_{rank}"), weights_only=False) for rank in range(world_size)]


def _join(processes: list[Any], timeout: float) -> list[int]:
    """Wait for the ranks, only a while once one has failed, and kill those that are left; returns which were killed."""
    deadline = time.monotonic() + timeout
    alive = {process.sentinel: rank for rank, process in enumerate(processes)}
    while alive and (ended := wait(list(alive), max(0.0, deadline - time.monotonic()))):
        for sentinel in ended:
            process = processes[alive.pop(sentinel)]
            process.join()
            if process.exitcode:
                # Ranks that need the one that is gone would wait for it until their own timeout.
                deadline = min(deadline, time.monotonic() + SURVIVES_SECONDS)
    for rank in alive.values():
        processes[rank].kill()
        processes[rank].join()
    return sorted(alive.values())


def fork_server() -> Any:
    """The multiprocessing context whose processes are forked from a server that has imported what a rank needs.

    These imports take a process 4 s. The server has no thread and no device; it starts with the first process.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(
        ["hbp_titan.train", "torch.distributed.fsdp", "torch.distributed.checkpoint", "torch._dynamo"]
    )
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
    torch.set_num_threads(1)
    # A fork server's children have the environment of its start.
    os.environ.update(environment)
    os.environ["RANK"], os.environ["WORLD_SIZE"] = str(rank), str(world_size)
    os.environ["LOCAL_RANK"] = str(rank)
    device = torch.device("cuda", rank) if device_type == "cuda" else torch.device("cpu")
    store = dist.FileStore(f"{folder}/rendezvous", world_size)
    try:
        world = start_groups(store, rank, world_size, device, timedelta(seconds=120))
        result = function(world, *args)
        torch.save(result, Path(folder, f"result_{rank}"))
        barrier()
    except BaseException:
        Path(folder, f"error_{rank}").write_text(traceback.format_exc())
        os._exit(1)
    close_world()
