"""The checks of `hbp-titan doctor` on one machine: each returns what it found, a verdict and what to do about it.

Owns the thresholds, with the failure that each stands for. Nothing here imports torch at module level: what does not
need torch works without it. A check takes the files of the system that it reads, so that tests can pass others.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import mmap
import os
import platform
import re
import resource
import secrets
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hbp_titan import __version__
from hbp_titan.errors import INSTALL_TRAIN, format_error
from hbp_titan.utils import first_n, human_bytes

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30
# File systems that the nodes of a cluster usually share, by the start of their type in /proc/mounts.
SHARED_TYPES = ("nfs", "lustre", "gpfs", "beegfs", "ceph", "fuse.ceph", "wekafs", "panfs", "glusterfs", "fuse.gluster",
                "cifs", "smb", "afs", "virtiofs", "9p", "fuse.juicefs", "fuse.beegfs", "daos", "quobyte")  # fmt: skip
# The folder is gone with the container, or is memory.
VOLATILE_TYPES = ("overlay", "tmpfs", "ramfs")
SLOWING = {
    "CUDA_LAUNCH_BLOCKING": ("1",),
    "TORCH_DISTRIBUTED_DEBUG": ("DETAIL",),
    "NCCL_P2P_DISABLE": ("1",),
    "NCCL_IB_DISABLE": ("1",),
    "NCCL_SHM_DISABLE": ("1",),
}
"""Environment variables and values that make a run slow; most are left over from a search for an error."""


@dataclass(frozen=True)
class Check:
    """One row of the table. verdict: ok, warn (a run may fail or be slow) or fail (it will)."""

    name: str
    verdict: str
    found: str
    advice: str = ""


def verdict_of(name: str, found: str, *, warn: str = "", fail: str = "") -> Check:
    """Return a check that is ok unless there is an advice for a warning or a failure."""
    return Check(name, "fail" if fail else "warn" if warn else "ok", found, fail or warn)


# Software


def versions() -> list[Check]:
    """Check the interpreter, and report what must be the same on every node."""
    found = {"Python": platform.python_version(), "hbp_titan": __version__}
    for package in ("torch", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return [Check("versions", "ok", ", ".join(f"{name} {version}" for name, version in found.items()))]


def packages(extra: str = "") -> list[Check]:
    """Check that the packages of an extra are installed in a version that fits; by default "train" if torch is."""
    has_torch = importlib.util.find_spec("torch") is not None
    unmet = unmet_requirements(requirements(extra or "train"))
    if not unmet:
        return [Check("packages", "ok", f"the packages of the extra {extra or 'train'} fit")]
    if not extra and not has_torch:
        return [
            Check("packages", "warn", "torch is not installed: the planner works, training does not", INSTALL_TRAIN)
        ]
    return [Check("packages", "fail", f"missing packages: {', '.join(unmet)}", "install them with pip")]


def requirements(extra: str, root: Path = ROOT) -> list[str]:
    """Return the requirements of the package with an extra: those of the checkout, else of the installed package.

    Raises ValueError if there is no such extra.
    """
    file = root / "pyproject.toml"
    if file.is_file():
        project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
        base, extras = list(project["dependencies"]), dict(project["optional-dependencies"])
    else:
        base, extras = [], {}
        for text in importlib.metadata.requires("hbp-titan") or []:
            requirement, _, name = text.partition("; extra == ")
            (extras.setdefault(name.strip("'\""), []) if name else base).append(requirement)
    if extra not in extras:
        raise ValueError(f"--packages {extra}: must be one of {', '.join(extras)}")
    names, listed = [extra], base
    for name in names:
        for text in extras[name]:
            own = re.fullmatch(r"hbp-titan\[([\w,]+)\]", text)
            if own is None:
                listed.append(text)
            else:
                names += [other for other in own[1].split(",") if other not in names]
    return listed


def unmet_requirements(texts: list[str]) -> list[str]:
    """Return the requirements that the running interpreter does not meet."""
    try:
        from packaging.requirements import Requirement
    except ModuleNotFoundError:
        # pip is in most environments, and has a copy of the parser.
        from pip._vendor.packaging.requirements import Requirement  # type: ignore[assignment]
    unmet = []
    for text in texts:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            unmet.append(text)
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            unmet.append(f"{text} (found {version})")
    return unmet


def torch_and_gpus() -> list[Check]:
    """Check that torch can use the machine's GPUs; report driver, CUDA and NCCL; choose the attention kernel."""
    if importlib.util.find_spec("torch") is None:
        return []
    import torch

    from hbp_titan.distributed.world import require_usable_gpu

    build = f"torch {torch.__version__}, CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build of torch"
    try:
        require_usable_gpu()
    except ValueError as error:
        found, _, advice = str(error).rpartition("; ")
        return [Check("GPU", "fail", found, advice)]
    if not torch.cuda.is_available():
        return [Check("GPU", "ok", f"none; {build}; training runs on the CPU"), _kernel(torch.device("cpu"))]
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    peers = [i for i in range(1, torch.cuda.device_count()) if not torch.cuda.can_device_access_peer(0, i)]
    try:
        devices = gpus(nvidia_smi(GPU_QUERY))
    except (OSError, subprocess.SubprocessError) as error:
        found = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}; nvidia-smi: {format_error(error)}"
        devices = [
            Check("GPU", "warn", found, "driver, memory in use and memory errors are unknown: install nvidia-smi")
        ]
    return [
        *devices,
        verdict_of(
            "CUDA",
            f"{build}, NCCL {nccl}" + (f"; GPU 0 cannot access the memory of GPU {first_n(peers, 8)}" if peers else ""),
            warn="collectives go through host memory: check ACS and nvidia-smi topo -m" * bool(peers),
        ),
        _kernel(torch.device("cuda", 0)),
    ]  # fmt: skip


GPU_QUERY = ("name", "driver_version", "memory.total", "memory.used", "ecc.errors.uncorrected.volatile.total")


def nvidia_smi(query: tuple[str, ...], *options: str) -> list[list[str]]:
    """Return the values of a query, one row per GPU; raises OSError or SubprocessError without a working nvidia-smi."""
    command = ["nvidia-smi", f"--query-gpu={','.join(query)}", "--format=csv,noheader,nounits", *options]
    text = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    return [[value.strip() for value in line.split(",")] for line in text.strip().splitlines()]


def gpus(rows: list[list[str]]) -> list[Check]:
    """Check rows of GPU_QUERY: equal GPUs, free memory (MiB), no memory errors."""
    names = {row[0] for row in rows}
    used = [i for i, row in enumerate(rows) if row[3].isdecimal() and int(row[3]) > 0.05 * int(row[2])]
    errors = [i for i, row in enumerate(rows) if row[4].isdecimal() and int(row[4])]
    found = f"{len(rows)} x {' and '.join(sorted(names))}, driver {rows[0][1]}"
    advice, fail = [], ""
    if len(names) > 1:
        advice.append("packs are balanced for equal GPUs: choose some with CUDA_VISIBLE_DEVICES")
    if used:
        found += f"; memory in use on GPU {first_n(used, 8)}"
        advice.append("another process uses GPU memory: nvidia-smi shows which")
    if errors:
        found += f"; uncorrected memory errors on GPU {first_n(errors, 8)}"
        fail = "reset or replace the GPU (nvidia-smi -q -d ECC)"
    return [verdict_of("GPU", found, warn="; ".join(advice), fail=fail)]


def _kernel(device: Any) -> Check:
    """Report the attention kernel that model.attention_backend = "auto" chooses, and why not the fastest."""
    from hbp_titan.models.attention import choose_backend, missing, set_backend

    chosen = choose_backend("auto", device, head_dim=128)
    # It has selected that backend for the whole process.
    set_backend("auto")
    if device.type != "cuda":
        return Check("attention kernel", "ok", chosen)
    import torch

    best = {9: "fa3", 10: "fa4"}.get(torch.cuda.get_device_capability(device)[0], "fa2")
    if chosen == best:
        return Check("attention kernel", "ok", chosen)
    reason = first_n((missing(best) or "not chosen").splitlines(), 1)
    return Check("attention kernel", "warn", f"{chosen}; {best}: {reason}", f"{best} is faster: docs/models.md")


def compiler(which: Callable[[str], str | None] = shutil.which) -> list[Check]:
    """Check that a C compiler exists, which compile.enable needs on GPUs and CPUs."""
    path = which("gcc") or which("cc") or which("clang")
    return [verdict_of("C compiler", path or "none", warn="" if path else "install gcc, or set compile.enable = false")]


# Machine


def environment(variables: Mapping[str, str] = os.environ) -> list[Check]:
    """Check for environment variables that make a run slow."""
    slow = [f"{name}={variables[name]}" for name, values in SLOWING.items() if variables.get(name) in values]
    return [
        verdict_of("environment", first_n(slow, 8) or "nothing slow", warn="unset, it makes runs slow" * bool(slow))
    ]


def processors(num_gpus: int, cgroup: Path = Path("/sys/fs/cgroup")) -> list[Check]:
    """Check the cores that this process may use, by affinity and by the container's quota."""
    cores = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    quota = _words(cgroup / "cpu.max")
    limited = ""
    if len(quota) == 2 and quota[0].isdecimal() and int(quota[0]) / int(quota[1]) < cores:
        cores, limited = int(quota[0]) / int(quota[1]), ", the container's limit"
    few = "under 4 cores per GPU: loader workers and kernel launches wait for them; give the job more CPUs"
    return [verdict_of("CPU", f"{cores:g} cores{limited}", warn=few * (cores < 4 * num_gpus))]


def memory(num_gpus: int, proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> list[Check]:
    """Check the memory that is available, by the machine and by the container's limit."""
    available, limit = _meminfo(proc)["MemAvailable"], _words(cgroup / "memory.max")
    limited = ""
    if limit and limit[0].isdecimal():
        left = int(limit[0]) - int((_words(cgroup / "memory.current") or ["0"])[0])
        if left < available:
            available, limited = left, ", by the container's limit"
    needed = 16 * GIB * num_gpus or 2 * GIB
    advice = f"asynchronous checkpoints and loader workers need about {human_bytes(needed)}; raise the limit"
    return [verdict_of("memory", f"{human_bytes(available)} free{limited}", warn=advice * (available < needed))]


def shared_memory(folder: Path = Path("/dev/shm")) -> list[Check]:
    """Check /dev/shm, through which loader workers pass batches: Docker gives 64 MiB, and a full one is a bus error."""
    if not folder.is_dir():
        return [Check("/dev/shm", "warn", "missing", "data.num_workers = 0, or mount it")]
    free = shutil.disk_usage(folder).free
    advice = "start the container with --ipc=host or --shm-size=16g, or set data.num_workers = 0"
    return [verdict_of("/dev/shm", f"{human_bytes(free)} free", warn=advice * (free < GIB))]


def limits(infiniband: Path = Path("/sys/class/infiniband")) -> list[Check]:
    """Check the limits of this process: open files, locked memory (with InfiniBand) and processes."""
    no_limit = resource.RLIM_INFINITY
    values = {
        name: resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))[0] for name in ("NOFILE", "MEMLOCK", "NPROC")
    }

    def text(name: str) -> str:
        return "unlimited" if values[name] == no_limit else f"{values[name]:,}"

    checks = []
    for name, what, least, option in (
        ("NOFILE", "open files", 4096, "n 65536"), ("NPROC", "processes", 4096, "u unlimited"),
    ):  # fmt: skip
        low = values[name] != no_limit and values[name] < least
        checks.append(
            verdict_of(what, text(name), warn=f"ulimit -{option}: ranks, sockets and workers need more" * low)
        )
    if infiniband.is_dir() and any(infiniband.iterdir()):
        low = values["MEMLOCK"] != no_limit and values["MEMLOCK"] < GIB
        checks.append(verdict_of("locked memory", text("MEMLOCK"), warn="ulimit -l unlimited: NCCL over RDMA" * low))
    return checks


def network(
    variables: Mapping[str, str] = os.environ,
    interfaces: list[str] | None = None,
    infiniband: Path = Path("/sys/class/infiniband"),
    resolve: Callable[[str], str] = socket.gethostbyname,
) -> list[Check]:
    """Check that the host name leads to an address that other nodes reach, the chosen interfaces, and InfiniBand."""
    names = [name for _, name in socket.if_nameindex()] if interfaces is None else interfaces
    others = [name for name in names if name != "lo"]
    host, checks = socket.gethostname(), []
    try:
        address = resolve(host)
    except OSError:
        address = "no address"
    chosen = variables.get("GLOO_SOCKET_IFNAME", "")
    local = not chosen and (address.startswith("127.") or address == "no address")
    advice = f"several nodes: set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the shared one of {first_n(others, 8)}"
    checks.append(verdict_of("host name", f"{host}: {address}", warn=advice * local))
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        # NCCL takes prefixes, "=" before a whole name, and "^" before what it must not use.
        wanted = [] if variables.get(variable, "").startswith("^") else variables.get(variable, "").split(",")
        unknown = [name for name in filter(None, wanted) if not any(n.startswith(name.lstrip("=")) for n in names)]
        if unknown:
            fix = f"unset it, or use one of {first_n(others, 8)}"
            checks.append(Check("interface", "fail", f"{variable}={variables[variable]} does not exist", fix))
    ports = sorted(infiniband.glob("*/ports/*"))
    states = {f"{p.parts[-3]}:{p.name}": " ".join(_words(p / "state")[1:] + _words(p / "rate")[:2]) for p in ports}
    if states:
        down = [port for port, state in states.items() if not state.startswith("ACTIVE")]
        found = first_n([f"{port} {state}" for port, state in states.items()], 8)
        checks.append(verdict_of("InfiniBand", found, warn=f"not active: {first_n(down, 8)} (ibstat)" * bool(down)))
    return checks


# Folder


def folder(path: Path, mounts: Path = Path("/proc/mounts")) -> list[Check]:
    """Check the run folder's file system: type, space, speed of small writes, clock, and what it can do."""
    existing = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.is_dir())
    kind = file_system_type(existing, mounts)
    shared, free = kind.startswith(SHARED_TYPES), shutil.disk_usage(existing).free
    sort = "shared" if shared else "volatile" if kind in VOLATILE_TYPES else "of this node"
    advice = []
    if sort == "volatile":
        advice.append("its files are lost with the container or the machine: use a disk for what should remain")
    if free < 10 * GIB:
        advice.append("little space: a checkpoint takes 12 bytes per parameter")
    try:
        seconds, skew, problem = _write_files(existing)
    except OSError as error:
        return [Check("run folder", "fail", format_error(error), "choose a folder that you may write")]
    if seconds > 0.1:
        advice.append("slow: checkpoints with many files will take long")
    if abs(skew) > 2:
        advice.append("the file server's clock differs from the node's: synchronize them (chrony)")
    found = f"{existing}: {kind}, {sort}; {human_bytes(free)} free; fsync {1000 * seconds:.1f} ms"
    return [
        verdict_of(
            "run folder", found + f"; clock {skew:+.0f} s" * (abs(skew) > 2), warn="; ".join(advice), fail=problem
        )
    ]


def file_system_type(path: Path, mounts: Path) -> str:
    """Return the type of the file system of an existing folder, "unknown" without /proc/mounts."""
    lines = [line.split() for line in mounts.read_text().splitlines()] if mounts.exists() else []
    own = [str(path.resolve()), *map(str, path.resolve().parents)]
    kinds = {words[1].replace("\\040", " "): words[2] for words in lines if len(words) > 2}
    return next((kinds[name] for name in own if name in kinds), "unknown")


def _write_files(path: Path) -> tuple[float, float, str]:
    """Write small files; return the median seconds of write, fsync and rename, the clock's skew, and what fails."""
    seconds, name = [], path / f".doctor-{secrets.token_hex(4)}"
    renamed, linked = name.with_suffix(".renamed"), name.with_suffix(".linked")
    problem, step = "", "no hard links, which run.lock needs"
    try:
        for _ in range(5):
            started = time.perf_counter()
            with name.open("wb") as file:
                file.write(b"hbp_titan")
                file.flush()
                os.fsync(file.fileno())
            name.replace(renamed)
            seconds.append(time.perf_counter() - started)
        skew = renamed.stat().st_mtime - time.time()
        try:
            os.link(renamed, linked)
            step = "no mmap, which token stores need"
            with renamed.open("rb") as again, mmap.mmap(again.fileno(), 0, access=mmap.ACCESS_READ):
                pass
        except OSError as error:
            problem = f"{step} ({error.strerror}): choose a folder on another file system"
        return statistics.median(seconds), skew, problem
    finally:
        for file_name in (name, renamed, linked):
            file_name.unlink(missing_ok=True)


def _words(file: Path) -> list[str]:
    try:
        return file.read_text().split()
    except OSError:
        return []


def _meminfo(proc: Path) -> dict[str, int]:
    """Return /proc/meminfo in bytes."""
    lines = (line.split() for line in (proc / "meminfo").read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if len(words) > 1}
