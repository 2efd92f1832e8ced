"""The world of a run: device, process groups, timeouts, and collectives of small values.

Owns the choice of device, the rendezvous, and the two groups of all ranks. The default group computes: NCCL with one
GPU per rank, gloo on the CPU. The control group (always gloo) carries what the main thread agrees on outside of the
computation: objects, barriers, failures. A barrier then never waits behind a GPU kernel and is never mixed up with a
collective of the model.

`python -m hbp_titan.distributed.world [RANKS]` prints, for run_train.sh, the number of ranks to start on this machine
(RANKS, or one per GPU) and torchrun's options; it exits with one error line if torch cannot use the machine's GPU.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from hbp_titan.errors import WorkerGroup, default_store, exit_on_user_error, format_error
from hbp_titan.utils import first_n, human_seconds

DEFAULT_CPU_RANKS = 2
"""Ranks on a machine without a GPU."""
SLOW_WORK_SECONDS = 3600
"""Timeout of waits for a slow disk (checkpoint, export, audit), in the control group."""
PREPARE_SECONDS = 24 * 3600
"""How long ranks wait for a rank that prepares data: each may have hours of rows."""
FLIGHT_RECORDER = "flight_recorder"
"""Folder in the run folder with the dumps of NCCL's flight recorder."""
_CONTROL = "control"
_POLL_SECONDS = 0.05
_RENDEZVOUS_FIX = "check that all nodes are started with the same RDZV_ENDPOINT, RDZV_ID and NNODES and reach the port"


@dataclass(frozen=True)
class World:
    """A rank's place in the run; made once by `init_world`.

    torchrun_job: the same after torchrun has restarted the ranks, different for every other run; "" without torchrun.
    """

    rank: int
    size: int
    device: torch.device
    torchrun_job: str = ""


def init_world(timeout_seconds: int, run_folder: Path | None = None) -> World:
    """Start the process groups from torchrun's environment (a world of one rank without it).

    run_folder: where NCCL's flight recorder writes when a collective times out; nothing is created in it.
    Raises ValueError if torch cannot use this machine's GPU, RuntimeError if the rendezvous times out.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = local_device()
    timeout = timedelta(seconds=timeout_seconds)
    store, job = _store_for_this_start(rank, size, timeout) if "RANK" in os.environ else (dist.HashStore(), "")
    if device.type == "cuda" and run_folder is not None:
        set_flight_recorder(run_folder)
    return dataclasses.replace(start_groups(store, rank, size, device, timeout), torchrun_job=job)


def start_groups(store: dist.Store, rank: int, size: int, device: torch.device, timeout: timedelta) -> World:
    """Create the default group and the control group over an empty `store`."""
    # Without TORCH_GLOO_LAZY_INIT: the first operation between two ranks could then outlast its timeout (seen with
    # torch 2.13), so a rank that waits for a dead one would wait forever.
    backend, device_id = "gloo", None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # With device_id the communicator is made now, and those of subgroups by one ncclCommSplit each.
        backend, device_id = "nccl", device
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout, device_id=device_id)
    new_group(backend="gloo", description=_CONTROL)
    return World(rank, size, device)


def close_world() -> None:
    """Destroy all process groups, if there are any."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def fake_world(size: int, device: torch.device) -> Iterator[World]:
    """Provide rank 0 of a world whose other ranks do not exist: groups and meshes work, collectives move no data.

    device: what each rank would have. It need not exist on this machine; meshes of a fake world are on the CPU.
    """
    # A test utility of torch's, the same that torchtitan's dry run uses.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        yield World(0, size, device)
    finally:
        dist.destroy_process_group()


def log_rank(world_size: int) -> int:
    """Return the rank that prints and writes metrics, from LOG_RANK in the environment; raise ValueError if invalid."""
    text = os.environ.get("LOG_RANK", "0")
    if not text.isdecimal() or int(text) >= world_size:
        raise ValueError(f"LOG_RANK={text} is out of range for world size {world_size}; use 0 to {world_size - 1}")
    return int(text)


def ranks_per_node(world_size: int) -> int:
    """Return the number of ranks on this node, from torchrun's environment; without torchrun all of them."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size))


# Rendezvous


def _store_for_this_start(rank: int, world_size: int, timeout: timedelta) -> tuple[dist.Store, str]:
    """Return the job's store under a prefix that no earlier start has used, and the job's id.

    Raises RuntimeError after `timeout`.
    """
    store, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=timeout))
    store.set_timeout(timeout)
    # Sets the key if it is not there, and returns its value: all starts of the job share the store.
    job = store.compare_set("hbp_titan/job", "", uuid.uuid4().hex).decode()
    return dist.PrefixStore(agree_on_prefix(store, rank, world_size, timeout), store), job


def agree_on_prefix(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> str:
    """Return a key prefix that is the same on all ranks of this start and new in `store`.

    A torchrun restart reuses the store of the start before (torch 2.13), with addresses of dead ranks and counters at
    their limit. The restart count does not identify a start either: each node counts its own. So the ranks agree:
    1. Rank 0 offers a new prefix. 2. Each rank joins the prefix that is offered, which may still be an earlier start's,
    with a random id. 3. Rank 0 confirms its prefix with the ids of those that joined. 4. A rank accepts a prefix that
    is confirmed with its own id; until then it watches for another offer.
    """
    offer, own = "hbp_titan/offer", uuid.uuid4().hex
    if rank == 0:
        store.set(offer, own)
        joined = [f"hbp_titan/{own}/{other}" for other in range(1, world_size)]
        if joined:
            try:
                store.wait(joined, timeout)
            except dist.DistStoreError as error:
                raise _rendezvous_timeout(rank, "a rank did not join", timeout) from error
        store.set(f"hbp_titan/{own}", json.dumps([store.get(key).decode() for key in joined]))
        return f"hbp_titan/{own}"
    end = time.monotonic() + timeout.total_seconds()
    joined_under = ""
    while time.monotonic() < end:
        if store.check([offer]):
            prefix = f"hbp_titan/{store.get(offer).decode()}"
            if prefix != joined_under:
                store.set(f"{prefix}/{rank}", own)
                joined_under = prefix
            if store.check([prefix]) and own in json.loads(store.get(prefix)):
                return prefix
        time.sleep(_POLL_SECONDS)
    raise _rendezvous_timeout(rank, "rank 0 did not confirm", timeout)


def _rendezvous_timeout(rank: int, reason: str, timeout: timedelta) -> RuntimeError:
    seconds = timeout.total_seconds()
    return RuntimeError(f"rank {rank}: rendezvous timed out after {seconds:.0f} s: {reason}; {_RENDEZVOUS_FIX}")


# Groups and timeouts


def new_group(
    ranks: Sequence[int] | None = None, backend: str | None = None, description: str = "", members_only: bool = False
) -> dist.ProcessGroup:
    """Create a process group with the current timeout of the default group; `dist.new_group` would use torch's default.

    ranks: all unless given. backend: that of the default group unless given. members_only: only the members call this,
    each for its own group.
    """
    devices = dist.group.WORLD._device_types  # type: ignore[union-attr]
    # The fake backend of a dry run has no options.
    options = dist.group.WORLD._get_backend(devices[0]).options  # type: ignore[union-attr]
    timeout = None if options is None else options._timeout
    return dist.new_group(
        ranks, timeout=timeout, backend=backend, group_desc=description, use_local_synchronization=members_only
    )


def control_group() -> dist.ProcessGroup:
    """Return the gloo group of all ranks made by `start_groups`; in a fake world, which has none, the default group."""
    groups = list(distributed_c10d._world.pg_map)
    return next((group for group in groups if group.group_desc == _CONTROL), groups[0])


def set_timeouts(seconds: int) -> None:
    """Set the timeout of every group: long during compilation and allocation, short afterwards.

    The control group's is at least SLOW_WORK_SECONDS, because ranks wait there for another rank's disk; the watchdog
    detects a hang there.
    """
    for group in list(distributed_c10d._world.pg_map):
        set_timeout(group, max(seconds, SLOW_WORK_SECONDS) if group.group_desc == _CONTROL else seconds)


def set_timeout(group: dist.ProcessGroup, seconds: int) -> None:
    """Set the timeout of one group."""
    distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def set_flight_recorder(run_folder: Path) -> None:
    """Make NCCL's flight recorder dump each rank's last collectives into `run_folder` when one of them times out.

    Variables that the user has set are kept. torch reads the variables when it makes the first NCCL group, and
    `torchfrtrace` (torch.distributed.flight_recorder) reads the dumps. The caller creates the folder FLIGHT_RECORDER,
    once it holds the lock of the run folder.
    """
    folder = run_folder / FLIGHT_RECORDER
    # torch 2.11 to 2.13 read an old and a new name of each variable; the user may have set either.
    settings = {
        ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"): "2000",
        ("TORCH_NCCL_DUMP_ON_TIMEOUT",): "1",
        ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"): str(folder.absolute() / "rank_"),
    }
    for names, value in settings.items():
        if not any(name in os.environ for name in names):
            os.environ[names[0]] = value


# Collectives of small values


def barrier() -> None:
    """Wait for the main threads of all ranks, not for their GPUs."""
    # Not dist.barrier: on a group that is bound to a GPU it launches a kernel there and waits for it.
    dist.all_reduce(torch.zeros(1), group=control_group())


def any_rank(value: bool, timeout_seconds: float | None = None) -> bool:
    """Return whether `value` is true on any rank.

    Raises RuntimeError if other ranks do not call it in time; the control group is then unusable.
    """
    tensor = torch.tensor([float(value)])
    options = dist.AllreduceOptions()
    options.reduceOp = dist.ReduceOp(dist.ReduceOp.MAX)
    if timeout_seconds is not None:
        # dist.all_reduce takes no timeout.
        options.timeout = timedelta(seconds=timeout_seconds)
    control_group().allreduce([tensor], options).wait()
    return bool(tensor.item())


def gather_values(value: Any) -> list[Any]:
    """Return the values of all ranks in rank order. Pickled between ranks of one run, never from outside."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=control_group())
    return values


def broadcast_value(value: Any) -> Any:
    """Return rank 0's `value` on every rank; pickled as in `gather_values`."""
    values = [value]
    dist.broadcast_object_list(values, src=0, group=control_group())
    return values[0]


def check_same(value: str, what: str) -> None:
    """Raise ValueError on every rank unless all have the same `value` of `what`; the message lists the ranks."""
    values = gather_values(value)
    differ = [rank for rank, other in enumerate(values) if other != values[0]]
    if differ:
        raise ValueError(
            f"{what} is not the same on all ranks: rank 0 and rank{'s' * (len(differ) > 1)} {first_n(differ, 8)} "
            "differ; use the same Python, NumPy, hbp_titan and data on every node"
        )


def all_reduce_values(values: list[float], op: str, device: torch.device) -> list[float]:
    """Return the sum ("sum") or maximum ("max") of each value over all ranks, computed in float64 on `device`."""
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op={"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[op])
    return tensor.tolist()


# Preparation of data


class _Workers:
    """Ranks that wait for each other in the store, without a collective, until all have done their share.

    In a collective the group's timeout would end the wait, and nobody would know for whom. The store's key of a rank
    holds the number of waits that it has begun and what it is doing.
    """

    _groups = itertools.count()

    def __init__(self, world: World, timeout_seconds: float, log_seconds: float) -> None:
        self.rank, self.size = world.rank, world.size
        self.timeout_seconds, self.log_seconds = timeout_seconds, log_seconds
        # Ranks make their groups in the same order.
        self.store = dist.PrefixStore(f"hbp_titan/workers/{next(self._groups)}", default_store())
        self.waits = 0

    def report(self, work: str) -> None:
        self.store.set(str(self.rank), f"{self.waits} {work}")

    def gather(self, value: Any) -> list[Any]:
        self.waits += 1
        self.report("waiting")
        everyone = f"all/{self.waits}"
        if self.store.add(f"count/{self.waits}", 1) == self.size:
            self.store.set(everyone, "")
        start = logged = time.monotonic()
        pause = 0.001
        # Not store.wait: it would lock the store for this process's other threads (watchdog, NCCL's monitor).
        while not self.store.check([everyone]):
            now = time.monotonic()
            if now - logged >= self.log_seconds:
                logged = now
                self._log(now - start)
            if now - start > self.timeout_seconds:
                raise TimeoutError(f"rank {self.rank} waited {human_seconds(now - start)} for {self._behind()}")
            time.sleep(pause)
            pause = min(2 * pause, 0.5)
        return gather_values(value)

    def _log(self, seconds: float) -> None:
        # One rank is enough: the first that waits.
        if all(self._doing(rank) for rank in range(self.rank)):
            print(f"waiting for {self._behind()} ({human_seconds(seconds)} so far)", file=sys.stderr, flush=True)

    def _behind(self) -> str:
        doing = {rank: work for rank in range(self.size) if (work := self._doing(rank))}
        return first_n([f"rank {rank}: {work}" for rank, work in doing.items()], 8, "; ")

    def _doing(self, rank: int) -> str:
        """Return what a rank does that this one waits for, "" for a rank that waits as well."""
        key = str(rank)
        text = self.store.get(key).decode() if self.store.check([key]) else "0 starting"
        waits, _, work = text.partition(" ")
        return work if int(waits) < self.waits else ""


def worker_group(world: World, timeout_seconds: float = PREPARE_SECONDS, log_seconds: float = 60) -> WorkerGroup:
    """Return the ranks as a group that prepares data together, whatever the timeouts of the process groups are.

    timeout_seconds: of each wait; TimeoutError afterwards. log_seconds: between lines of a rank that waits.
    """
    workers = _Workers(world, timeout_seconds, log_seconds)
    return WorkerGroup(world.rank, world.size, workers.gather, workers.report)


# Devices of this machine


def local_device() -> torch.device:
    """Return the GPU with torchrun's local rank as its number, or the CPU if there is no GPU.

    Raises ValueError on a machine with an NVIDIA GPU that torch cannot use.
    """
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    require_usable_gpu()
    return torch.device("cpu")


def require_usable_gpu(dev: Path = Path("/dev")) -> None:
    """Raise ValueError if the machine has an NVIDIA GPU that torch cannot use: training would silently use the CPU.

    CUDA_VISIBLE_DEVICES="" requests the CPU. dev: the folder of the driver's device files.
    """
    device = dev / "nvidia0"
    if torch.cuda.is_available() or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1") or not device.exists():
        return
    reason = "it finds no CUDA device"
    if torch.version.cuda is None:
        reason = "it is a build without CUDA"
    else:
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as error:
            reason = format_error(error).rstrip(".")
    raise ValueError(
        f"this machine has an NVIDIA GPU ({device}), but torch {torch.__version__} cannot use it: {reason}; "
        "install a matching driver and torch build, or train on the CPU with CUDA_VISIBLE_DEVICES=''"
    )


def numa_options(gpus: int) -> list[str]:
    """Return torchrun's options that bind each rank to the CPUs next to its GPU; empty if that is not possible.

    NUMA_BINDING in the environment selects another mode of `torchrun --numa-binding`, or "none".
    """
    # torchrun refuses to start a rank that it cannot bind: without numactl, without an entry of the GPU in /sys, or if
    # the job may not use the CPUs of the GPU's node. All three occur in containers.
    mode = os.environ.get("NUMA_BINDING", "node")
    if mode == "none" or shutil.which("numactl") is None:
        return []
    try:
        from torch.numa.binding import AffinityMode, NumaOptions, _get_logical_cpus_to_bind_to

        numa = NumaOptions(affinity_mode=AffinityMode(mode))
        bound = [set(_get_logical_cpus_to_bind_to(gpu_index=gpu, numa_options=numa)) for gpu in range(gpus)]
    except (ImportError, OSError, RuntimeError, ValueError, KeyError, AttributeError, TypeError):
        return []
    allowed = os.sched_getaffinity(0)
    return ["--numa-binding", mode] if all(cpus and cpus <= allowed for cpus in bound) else []


def main() -> None:
    """Print the number of ranks and torchrun's options on one line."""
    exit_on_user_error(require_usable_gpu)
    gpus = torch.cuda.device_count()
    ranks = int(sys.argv[1]) if len(sys.argv) > 1 else gpus or DEFAULT_CPU_RANKS
    print(ranks, *(numa_options(ranks) if gpus >= ranks else []))


if __name__ == "__main__":
    main()
