"""Several ranks on this machine from within one process: spawned, with gloo, results and errors brought back.

Owns what the multi-process tests and scripts/verify_equivalence.py share. Training starts its ranks by torchrun.
"""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from hbp_titan.distributed.world import barrier, close_world, start_groups


class RankError(RuntimeError):
    """A rank failed or hung; the message holds its traceback."""


def run_distributed(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 240) -> list[Any]:
    """Run the module-level `function(world, *args)` on `world_size` ranks; returns what each returned, in rank order.

    Results are tensors and plain containers of them. Raises RankError with the traceback of the first rank that failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        # From a server that has torch: importing it takes a process seconds. The server has no thread and no device.
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(
            ["torch", "torch.distributed.fsdp", "torch.distributed.checkpoint", "torch._dynamo"]
        )
        processes = [
            context.Process(target=_rank_main, args=(function, rank, world_size, folder, dict(os.environ), args))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout)
        hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join()
        for rank in range(world_size):
            error = Path(folder, f"error_{rank}")
            if error.exists():
                raise RankError(f"rank {rank}:\n{error.read_text()}")
        if hung:
            raise RankError(f"ranks {hung} of {world_size} did not end within {timeout} s")
        # Written by our own ranks into our own folder a moment ago.
        return [torch.load(Path(folder, f"result_{rank}"), weights_only=False) for rank in range(world_size)]


def _rank_main(
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    folder: str,
    environment: dict[str, str],
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    # A fork server's children have the environment of its start.
    os.environ.update(environment)
    os.environ["RANK"], os.environ["WORLD_SIZE"] = str(rank), str(world_size)
    store = dist.FileStore(f"{folder}/rendezvous", world_size)
    world = start_groups(store, rank, world_size, torch.device("cpu"), timedelta(seconds=120))
    try:
        result = function(world, *args)
        torch.save(result, Path(folder, f"result_{rank}"))
        barrier()
    except BaseException:
        Path(folder, f"error_{rank}").write_text(traceback.format_exc())
        os._exit(1)
    close_world()
