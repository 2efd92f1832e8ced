"""The process groups and the device of a rank: start, stop, timeouts, and collectives of a few values.

The default group computes: NCCL with one GPU per rank where CUDA is present, gloo on the CPU elsewhere. One more gloo
group of all ranks, the control group, carries what the main thread agrees on outside of computation: objects, barriers,
failures. A barrier or a pickled object then never waits behind a GPU kernel and never meets a collective of the model.

The store in which the ranks of one start meet, empty even where torchrun starts them again.

Owns the agreement on a name that no earlier start has used. torchrun's restarts hand every start the same store (torch
2.13), full of what the ranks before left: addresses of the dead, counts that are full already. Nor does it tell them
apart: each node counts its own restarts, and those of two nodes may differ.

The GPUs of this machine, before any rank starts: whether torch can use them, and how torchrun should.

`python -m hbp_titan.distributed.world [RANKS]` prints for run_train.sh the number of ranks to start on this machine
(RANKS, or one for each GPU) and torchrun's options for GPUs. It ends with one error line where torch cannot use the
machine's GPU.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from hbp_titan.errors import exit_on_user_error, format_error

_MEND = "are all nodes started, with the same RDZV_ENDPOINT, RDZV_ID and NNODES, and is the port open?"
_POLL_SECONDS = 0.05


def store_for_this_start(rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """The job's store under a name that all ranks of this start have agreed on. Raises RuntimeError after `timeout`."""
    store, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=timeout))
    store.set_timeout(timeout)
    return dist.PrefixStore(agree_on_prefix(store, rank, world_size, timeout), store)


def agree_on_prefix(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> str:
    """A name that is the same on all ranks of this start, whatever earlier starts have left in `store`.

    1. Rank 0 offers a new name. 2. Each rank joins under the name that is offered, by a number of its own; that may
    still be an earlier start's name. 3. Rank 0 confirms its name with the numbers of those who joined. 4. A rank
    accepts a name that is confirmed with its own number; until then it looks for another offer.
    """
    offer, own = "hbp_titan/offer", uuid.uuid4().hex
    if rank == 0:
        store.set(offer, own)
        joined = [f"hbp_titan/{own}/{other}" for other in range(1, world_size)]
        if joined:
            try:
                store.wait(joined, timeout)
            except dist.DistStoreError as error:
                raise RuntimeError(f"the ranks did not meet within {timeout.total_seconds():.0f} s: {_MEND}") from error
        store.set(f"hbp_titan/{own}", json.dumps([store.get(key).decode() for key in joined]))
        return f"hbp_titan/{own}"
    end = time.monotonic() + timeout.total_seconds()
    joined_under = ""
    while time.monotonic() < end:
        if store.check([offer]):
            name = f"hbp_titan/{store.get(offer).decode()}"
            if name != joined_under:
                store.set(f"{name}/{rank}", own)
                joined_under = name
            if store.check([name]) and own in json.loads(store.get(name)):
                return name
        time.sleep(_POLL_SECONDS)
    raise RuntimeError(f"rank {rank} did not meet rank 0 within {timeout.total_seconds():.0f} s: {_MEND}")


CPU_RANKS = 2
"""Ranks on a machine without a GPU."""


def require_usable_gpu(dev: Path = Path("/dev")) -> None:
    """Raise ValueError where the machine has an NVIDIA GPU and torch, without CUDA, would train on the CPU unasked.

    CUDA_VISIBLE_DEVICES set to nothing asks for it. dev: where the driver's device files are.
    """
    device = dev / "nvidia0"
    if torch.cuda.is_available() or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1") or not device.exists():
        return
    raise ValueError(
        f"this machine has an NVIDIA GPU ({device}), but torch {torch.__version__} cannot use it: "
        f"{_reason()}; install a driver and a torch build that fit, or train on the CPU with CUDA_VISIBLE_DEVICES=''"
    )


def _reason() -> str:
    if torch.version.cuda is None:
        return "it is a build without CUDA"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return format_error(error).rstrip(".")
    return "it finds no CUDA device"


def numa_options(gpus: int) -> list[str]:
    """torchrun's options that bind each rank to the CPUs next to its GPU; none where that is not possible.

    torchrun does not start a rank that it cannot bind: without the program numactl, without an entry of the GPU in
    /sys, or where the job may not use the CPUs of the GPU's node. NUMA_BINDING in the environment names another mode
    of `torchrun --numa-binding`, or "none".
    """
    mode = os.environ.get("NUMA_BINDING", "node")
    if mode == "none" or shutil.which("numactl") is None:
        return []
    try:
        from torch.numa.binding import AffinityMode, NumaOptions, _get_logical_cpus_to_bind_to

        wanted = NumaOptions(affinity_mode=AffinityMode(mode))
        bound: Iterable[set[int]] = [
            set(_get_logical_cpus_to_bind_to(gpu_index=gpu, numa_options=wanted)) for gpu in range(gpus)
        ]
    except (ImportError, OSError, RuntimeError, ValueError, KeyError, AttributeError, TypeError):
        return []
    allowed = os.sched_getaffinity(0)
    return ["--numa-binding", mode] if all(cpus and cpus <= allowed for cpus in bound) else []


def main() -> None:
    """Print the number of ranks and torchrun's options on one line."""
    exit_on_user_error(require_usable_gpu)
    gpus = torch.cuda.device_count()
    ranks = int(sys.argv[1]) if len(sys.argv) > 1 else gpus or CPU_RANKS
    print(ranks, *(numa_options(ranks) if gpus >= ranks else []))


SLOW_WORK_SECONDS = 3600
"""Timeout of waits for a slow disk (checkpoints, export, audit): a rank that waits there does not hang."""
_CONTROL = "control"


@dataclass(frozen=True)
class World:
    """What a rank knows of itself; made once by `init_world`."""

    rank: int
    size: int
    device: torch.device

    @property
    def control(self) -> dist.ProcessGroup:
        """The gloo group of all ranks for objects, barriers and agreements of the main thread."""
        return control_group()


def local_device() -> torch.device:
    """The device of this rank: the GPU that torchrun's local rank numbers, or the CPU where there is none.

    Raises ValueError on a machine with an NVIDIA GPU that torch cannot use.
    """
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    require_usable_gpu()
    return torch.device("cpu")


def init_world(timeout_seconds: int, run_folder: Path | None = None) -> World:
    """Start the process groups from torchrun's environment (a world of one rank without it).

    run_folder: where NCCL's flight recorder writes when a collective times out.
    Raises ValueError as `local_device` does.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = local_device()
    timeout = timedelta(seconds=timeout_seconds)
    store = store_for_this_start(rank, size, timeout) if "RANK" in os.environ else dist.HashStore()
    if device.type == "cuda" and run_folder is not None:
        set_flight_recorder(run_folder)
    return start_groups(store, rank, size, device, timeout)


def start_groups(store: dist.Store, rank: int, size: int, device: torch.device, timeout: timedelta) -> World:
    """Make the default group and the control group of all ranks, which meet in `store`."""
    # Not with TORCH_GLOO_LAZY_INIT: an operation that is the first between two ranks can then outlast its timeout (seen
    # with torch 2.13), and a rank that waits for one that is gone never comes back.
    backend, device_id = "gloo", None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # With device_id the communicator is made now, and those of subgroups by one ncclCommSplit each.
        backend, device_id = "nccl", device
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout, device_id=device_id)
    new_group(backend="gloo", description=_CONTROL)
    return World(rank, size, device)


def new_group(
    ranks: Sequence[int] | None = None, backend: str | None = None, description: str = "", members_only: bool = False
) -> dist.ProcessGroup:
    """A process group with the timeout that the default group has now; `dist.new_group` would give it torch's.

    ranks: all unless given. backend: that of the default group unless given. members_only: each rank calls this for
    the group that it is in, and for no other.
    """
    devices = dist.group.WORLD._device_types  # type: ignore[union-attr]
    # The fake backend of a dry run has no options.
    options = dist.group.WORLD._get_backend(devices[0]).options  # type: ignore[union-attr]
    timeout = None if options is None else options._timeout
    return dist.new_group(
        ranks, timeout=timeout, backend=backend, group_desc=description, use_local_synchronization=members_only
    )


def control_group() -> dist.ProcessGroup:
    """The gloo group of all ranks made by `start_groups`; the default group where there is no other (a fake world)."""
    groups = list(distributed_c10d._world.pg_map)
    return next((group for group in groups if group.group_desc == _CONTROL), groups[0])


def set_flight_recorder(run_folder: Path) -> None:
    """Make NCCL's flight recorder dump each rank's last collectives into `run_folder` when one of them times out.

    What the environment already says wins; torch 2.11 to 2.13 read two names of each setting. torch reads them when
    the first NCCL group is made. `torchfrtrace` (torch.distributed.flight_recorder) reads the dumps.
    """
    folder = run_folder / "flight_recorder"
    settings = {
        ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"): "2000",
        ("TORCH_NCCL_DUMP_ON_TIMEOUT",): "1",
        ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"): str(folder.absolute() / "rank_"),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for names, value in settings.items():
        if not any(name in os.environ for name in names):
            os.environ[names[0]] = value


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
    """Change the timeout of every group: long while things are compiled and allocated, short afterwards.

    The control group's is at least SLOW_WORK_SECONDS: ranks wait in it for another's disk. The watchdog ends a hang
    there.
    """
    for group in list(distributed_c10d._world.pg_map):
        set_timeout(group, max(seconds, SLOW_WORK_SECONDS) if group.group_desc == _CONTROL else seconds)


def set_timeout(group: dist.ProcessGroup, seconds: int) -> None:
    """Change the timeout of one group."""
    distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def barrier() -> None:
    """Wait for the main threads of all ranks; what their GPUs still do is not waited for."""
    # Not dist.barrier: on a group that is bound to a GPU it launches and waits for a kernel there.
    dist.all_reduce(torch.zeros(1), group=control_group())


def any_rank(value: bool, timeout_seconds: float | None = None) -> bool:
    """Whether `value` is true on any rank, agreed on in the control group.

    Raises RuntimeError where other ranks do not come in time; the control group cannot be used after that.
    """
    tensor = torch.tensor([float(value)])
    options = dist.AllreduceOptions()
    options.reduceOp = dist.ReduceOp(dist.ReduceOp.MAX)
    if timeout_seconds is not None:
        options.timeout = timedelta(seconds=timeout_seconds)
    control_group().allreduce([tensor], options).wait()
    return bool(tensor.item())


def gather_values(value: Any) -> list[Any]:
    """The values of all ranks, in their order; pickled between ranks of one run, never from outside."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=control_group())
    return values


def check_same(value: str, what: str) -> None:
    """Raise ValueError on every rank unless all have the same `value` of `what`; the message names the others."""
    values = gather_values(value)
    differ = [rank for rank, other in enumerate(values) if other != values[0]]
    if differ:
        ranks = f"rank{'s' if len(differ) > 1 else ''} {', '.join(map(str, differ[:8]))}"
        more = f" and {len(differ) - 8} more" if len(differ) > 8 else ""
        raise ValueError(
            f"{what} is not the same on all ranks: rank 0 and {ranks}{more} differ; use the same Python, NumPy "
            "and hbp_titan, and the same data, on every node"
        )


def broadcast_value(value: Any) -> Any:
    """Rank 0's `value` on every rank; pickled as in `gather_values`."""
    values = [value]
    dist.broadcast_object_list(values, src=0, group=control_group())
    return values[0]


def all_reduce_values(values: list[float], op: str, device: torch.device) -> list[float]:
    """Sum ("sum") or maximum ("max") of each value over all ranks, in float64."""
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op={"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[op])
    return tensor.tolist()


if __name__ == "__main__":
    main()
