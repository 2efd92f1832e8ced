"""The processes of a run, as /proc shows them: who they are, what memory and handles they hold, how they are killed.

Owns all reading of /proc. A process that is gone in the meantime has nothing.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections import defaultdict
from pathlib import Path

PROC = Path("/proc")


def descendants(pid: int) -> list[int]:
    """All processes below `pid`, parents first. torchrun gives each rank a session: a signal to a group misses them."""
    children: dict[int, list[int]] = defaultdict(list)
    for entry in PROC.iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                # "pid (name, which may hold anything) state parent ..."
                parent = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[1]
                children[int(parent)].append(int(entry.name))
    found = [pid]
    for parent_id in found:
        found += children[parent_id]
    return found[1:]


def ranks_of(launcher: int) -> dict[int, int]:
    """Process id of each rank that the torchrun `launcher` has started, by rank."""
    found: dict[int, int] = {}
    for pid in descendants(launcher):
        with contextlib.suppress(OSError, StopIteration):
            entries = (PROC / str(pid) / "environ").read_bytes().split(b"\0")
            rank = int(next(entry for entry in entries if entry.startswith(b"RANK="))[5:])
            # Its loader's workers come after it, with the same environment.
            found.setdefault(rank, pid)
    return found


def resident_bytes(pid: int) -> int:
    """Memory that a process holds and the kernel cannot drop: resident, without mapped files; 0 when it is gone."""
    with contextlib.suppress(OSError):
        lines = (PROC / str(pid) / "status").read_text().splitlines()
        kib = [int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "RssShmem:"))]
        return sum(kib) * 1024
    return 0


def open_handles(pid: int) -> int:
    """Number of open file descriptors; 0 when the process is gone."""
    with contextlib.suppress(OSError):
        return len(os.listdir(PROC / str(pid) / "fd"))
    return 0


def kill_tree(pid: int) -> None:
    """SIGKILL to `pid` and all below it."""
    for victim in [*descendants(pid), pid]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
