"""The process group and its device: start, stop, and reductions of a few scalars.

Owns the choice of device and backend: NCCL with one GPU a rank where CUDA is present, gloo on the CPU elsewhere.
Nothing else in the project asks which of the two it is.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from hbp_titan.distributed.rendezvous import fresh_store


@dataclass(frozen=True)
class World:
    """What a rank knows of itself; made once by `init_world`."""

    rank: int
    size: int
    device: torch.device


def local_device() -> torch.device:
    """The device of this rank: the GPU that torchrun's local rank numbers, or the CPU where there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def init_world(timeout_seconds: int) -> World:
    """Start the default process group from torchrun's environment (a world of one rank without it)."""
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = local_device()
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cuda:nccl,cpu:gloo"
    timeout = timedelta(seconds=timeout_seconds)
    store = fresh_store(rank, size, timeout) if "RANK" in os.environ else dist.HashStore()
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    return World(rank, size, device)


@contextmanager
def fake_world(size: int, device: torch.device) -> Iterator[World]:
    """Rank 0 of a world of `size` ranks that are not there: groups and meshes are made, collectives move nothing.

    device: what each rank would have, which need not be there; meshes of a fake world lie on the CPU.
    """
    # Test code of torch's, and what torchtitan's dry run is built on.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        yield World(0, size, device)
    finally:
        dist.destroy_process_group()


def log_rank(world_size: int) -> int:
    """The rank that prints and writes the metrics, from the environment's LOG_RANK; ValueError where there is none."""
    text = os.environ.get("LOG_RANK", "0")
    if not text.isdecimal() or int(text) >= world_size:
        raise ValueError(f"LOG_RANK={text} is no rank of {world_size}: set it to one of 0 to {world_size - 1}")
    return int(text)


def ranks_per_node(world_size: int) -> int:
    """Ranks on this node, as torchrun says; all of them without torchrun."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size))


def close_world() -> None:
    """Stop the default process group when there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def set_timeouts(seconds: int) -> None:
    """Change the timeout of every group: long while things are compiled and allocated, short afterwards."""
    for group in list(distributed_c10d._world.pg_map):
        set_timeout(group, seconds)


def set_timeout(group: dist.ProcessGroup, seconds: int) -> None:
    """Change the timeout of one group."""
    distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def gather_values(value: Any) -> list[Any]:
    """The values of all ranks, in their order; pickled between ranks of one run, never from outside."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def all_reduce_values(values: list[float], op: str, device: torch.device) -> list[float]:
    """Sum ("sum") or maximum ("max") of each value over all ranks, in float64."""
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op={"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[op])
    return tensor.tolist()
