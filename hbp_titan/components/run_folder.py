"""The lock of a run folder: one run at a time writes into it; and what can be known of the folder before ranks start.

Owns `run.lock` in a run folder: a JSON file that names its holder (host, process, start). Rank 0 takes it before
anything else in the folder is touched, updates its modification time as a heartbeat, and deletes it at the end of the
run, also of one that fails or is preempted. Programs that only read a run folder need no lock.

There is no flock, which network file systems may ignore. The file is created by a hard link, which is atomic on them.
A killed run leaves its lock behind. The next start takes it over if the holder is known to be gone:

    same machine       its process has ended, or its process id belongs to a process that started later
    another machine    it is of the same torchrun job, which ends all ranks before it starts them again; or of an
                       earlier start of the same SLURM job; or it gave no heartbeat for STALE_SECONDS

Of several starts that find the same lock left over, one takes it over: it first creates run.lock.<id of that lock>,
which is a lock like any other, then renames it to run.lock if the lock is still that one.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

from hbp_titan.components.checkpoint import completed_checkpoints, read_state
from hbp_titan.components.dcp_storage import CorruptCheckpoint
from hbp_titan.components.resume import (
    RESTORE,
    check_resume_compatible,
    check_sample_log,
    check_starts_over,
    resume_invariants,
)
from hbp_titan.config import JobConfig
from hbp_titan.data.epoch import load_segments
from hbp_titan.distributed.world import World, gather_values
from hbp_titan.errors import raise_on_all_ranks
from hbp_titan.models.configs import ModelArgs
from hbp_titan.utils import human_seconds

LOCK_FILE = "run.lock"
HEARTBEAT_SECONDS = 15.0
STALE_SECONDS = 300.0
"""Longer than a file system stands still, and than the clocks of nodes differ."""
HIDDEN = "hidden"
"""Start of a process that exists, but may not be looked at."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lock.

    machine: boot and process namespace in which `process` is an id, "" if unknown. process_start: in clock ticks since
    the boot. since: UTC. torchrun_job: the same for all starts of the ranks by one torchrun, "" without it.
    slurm_job: "" outside of SLURM; slurm_restarts: how often it was requeued. id: of this lock, unique.
    """

    host: str = "unknown"
    machine: str = ""
    process: int = 0
    process_start: str = ""
    since: str = "unknown"
    torchrun_job: str = ""
    slurm_job: str = ""
    slurm_restarts: int = 0
    id: str = "unreadable"

    @classmethod
    def this_process(cls, torchrun_job: str) -> Holder:
        """Return this process as the holder of a new lock."""
        job, cluster = os.environ.get("SLURM_JOB_ID", ""), os.environ.get("SLURM_CLUSTER_NAME", "")
        return cls(
            host=socket.gethostname(),
            machine=_machine(),
            process=os.getpid(),
            process_start=process_start(os.getpid()),
            since=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC"),
            torchrun_job=torchrun_job,
            slurm_job=f"{cluster}/{job}" if job else "",
            slurm_restarts=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
            id=secrets.token_hex(8),
        )

    def why_gone(self, own: Holder, silent_seconds: float) -> str:
        """Return how `own` knows that this holder is gone, "" if it may be alive.

        silent_seconds: time since the last heartbeat.
        """
        if self.machine and (self.host, self.machine) == (own.host, own.machine):
            now = process_start(self.process)
            return "" if now in (self.process_start, HIDDEN) else "its process has ended"
        if self.torchrun_job and self.torchrun_job == own.torchrun_job:
            return "torchrun has restarted its ranks"
        if self.slurm_job and self.slurm_job == own.slurm_job and self.slurm_restarts < own.slurm_restarts:
            return f"SLURM has requeued its job {self.slurm_job.rpartition('/')[2]}"
        silent = silent_seconds > STALE_SECONDS
        return f"its last heartbeat was {human_seconds(silent_seconds)} ago" if silent else ""

    def __str__(self) -> str:
        return f"host {self.host}, process {self.process}, since {self.since}"


def process_start(process: int) -> str:
    """Return when a process of this machine started, in clock ticks since the boot; "" if there is none.

    A killed process whose parent has not noticed yet counts as ended.
    """
    try:
        stat = Path(f"/proc/{process}/stat").read_text(errors="replace")
    except OSError:
        # Processes of other users may be hidden (mount option hidepid).
        with suppress(PermissionError):
            try:
                os.kill(process, 0)
            except ProcessLookupError:
                return ""
        return HIDDEN
    # "id (name, which may contain any character) state ...": the state is field 3, the start field 22 (proc(5)).
    fields = stat.rpartition(")")[2].split()
    return "" if fields[0] in ("Z", "X") else fields[19]


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        # Containers of one machine may share its name, but not its process ids.
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


class RunLock:
    """Context manager that holds the lock of a run folder; every rank enters it, rank 0 holds the lock.

    Entering raises UserError on all ranks if another run holds it. end: ends the process with an exit code, if another
    run has taken the lock from this one.
    """

    def __init__(self, run_folder: Path, world: World, end: Callable[[int], None] = os._exit) -> None:
        self.path = run_folder / LOCK_FILE
        self.rank = world.rank
        self.own = Holder.this_process(world.torchrun_job)
        self._end = end
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="run lock", daemon=True)

    def __enter__(self) -> RunLock:
        raise_on_all_ranks(self._acquire if self.rank == 0 else lambda: None, gather_values)
        return self

    def __exit__(self, *_: object) -> None:
        if self.rank == 0:
            self._stop.set()
            self._thread.join()
            self.release()

    def _acquire(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.take(self.path)
        self._thread.start()

    def take(self, path: Path) -> None:
        """Create `path` as a lock of this run, or take it over; raise ValueError if its holder may be alive."""
        candidate = path.with_name(f".{path.name}.{self.own.id}")
        candidate.write_text(json.dumps(asdict(self.own), indent=1) + "\n", encoding="utf-8")
        try:
            while not _create(candidate, path):
                holder = read_holder(path)
                # By the clock of the file server, for both.
                silent = candidate.stat().st_mtime - _last_heartbeat(path)
                if holder is None or silent == math.inf:
                    continue  # deleted since
                reason = holder.why_gone(self.own, silent)
                if not reason:
                    raise ValueError(_in_use(self.path.parent, holder, self.own, silent))
                if self._take_over(path, holder):
                    print(f"{path}: taken over from {holder}: {reason}", flush=True)
                    return
        finally:
            candidate.unlink(missing_ok=True)

    def _take_over(self, path: Path, holder: Holder) -> bool:
        """Replace the lock that `holder` has left behind; return whether it was still there."""
        claim = path.with_name(f"{path.name}.{holder.id}")
        self.take(claim)
        # Another start may have replaced it, and deleted its claim, before this one was made.
        if read_holder(path) == holder:
            os.replace(claim, path)
            return True
        claim.unlink()
        return False

    def release(self) -> None:
        """Delete the lock, if it is still this run's."""
        with suppress(OSError):
            if read_holder(self.path) == self.own:
                self.path.unlink()

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            # A file system that does not answer for a while is no reason to end.
            with suppress(OSError):
                holder = read_holder(self.path)
                if holder == self.own:
                    os.utime(self.path)
                elif holder is None:
                    # Deleted by hand. If another start has taken it since, the next round ends this run.
                    with suppress(ValueError):
                        self.take(self.path)
                elif holder != Holder():
                    text = f"{self.path.parent}: taken over by {holder}; ending without saving"
                    print(text, file=sys.stderr, flush=True)
                    return self._end(1)


def check_run_folder(config: JobConfig, args: ModelArgs, data: str) -> None:
    """Raise ValueError if a start could not resume the run in the run folder. data: fingerprint of the training store.

    A checkpoint that cannot be read is left to `Checkpointer.load`, which tries the one before it.
    """
    check_starts_over(config)
    folder = config.dump_folder
    for path in reversed(completed_checkpoints(folder / "checkpoint")):
        with suppress(CorruptCheckpoint):
            state = read_state(path)
            if saved := state.get("resume_invariants"):
                own = resume_invariants(config, args, data)
                check_resume_compatible(saved, own, path, config.checkpoint.allow_changed)
                try:
                    load_segments(folder, state["epoch"], state["segments"], data)
                except ValueError as error:
                    raise ValueError(f"cannot resume: {error}; {RESTORE}") from None
                check_sample_log(folder, state["step"])
            return


def check_not_in_use(run_folder: Path) -> None:
    """Raise ValueError if a run that may be alive holds the lock of `run_folder`; writes nothing."""
    path, own = run_folder / LOCK_FILE, Holder.this_process("")
    holder, silent = read_holder(path), time.time() - _last_heartbeat(path)
    if holder and silent < math.inf and not holder.why_gone(own, silent):
        raise ValueError(_in_use(run_folder, holder, own, silent))


def read_holder(path: Path) -> Holder | None:
    """Return who holds the lock `path`, None if it does not exist."""
    try:
        return Holder(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        # Cut by a full disk or a crash, or still being written on a file system without hard links.
        return Holder()


def _last_heartbeat(path: Path) -> float:
    """Return the time of the last heartbeat, minus infinity if there is no lock."""
    # Opening a file makes NFS ask the server, where a look-up by name may be answered from a cache.
    with suppress(FileNotFoundError), path.open("rb") as file:
        return os.fstat(file.fileno()).st_mtime
    return -math.inf


def _create(candidate: Path, path: Path) -> bool:
    """Create `path` with the content of `candidate` unless it exists; return whether it was created."""
    try:
        os.link(candidate, path)
    except FileExistsError:
        # NFS repeats a request whose answer was lost: then the link is this one.
        return candidate.stat().st_nlink > 1
    except OSError:
        # A file system without hard links. A reader may find the file before its content, and waits.
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(candidate.read_text(encoding="utf-8"))
        except FileExistsError:
            return False
    return True


def _in_use(run_folder: Path, holder: Holder, own: Holder, silent_seconds: float) -> str:
    text = f"{run_folder} is in use by another run: {holder}; end that run first, or use a different --job.dump_folder"
    if holder.machine and (holder.host, holder.machine) == (own.host, own.machine):
        return text
    return (
        f"{text} (last heartbeat {human_seconds(max(silent_seconds, 0))} ago; after {human_seconds(STALE_SECONDS)} "
        f"without one the next start takes over)"
    )
