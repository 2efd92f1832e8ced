"""Soak test: train with random kills, train the same steps undisturbed, and compare the two runs bit for bit.

Owns the fault injection (which process is killed when), the supervision of the killed run, the sampling of memory and
file handles from /proc, the leak criterion, and the report. torchrun restarts a killed rank; if all processes are
killed, the supervisor starts the same command again.

Leaks: a process is sampled from its first checkpoint on, which allocates buffers and connections that stay. Levels and
saves alternate, so peaks are compared: a process leaks if the peak of the last third of its samples exceeds that of the
first two by more than MEMORY_GROWTH and MEMORY_SLACK_BYTES together, or by more than HANDLE_SLACK handles.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

from hbp_titan.components.checkpoint import completed_checkpoints
from hbp_titan.components.dcp_storage import MANIFEST, PARTIAL
from hbp_titan.config import load_config
from hbp_titan.data.sample_log import SAMPLE_LOG, audit_run, read_starts, start_folders
from hbp_titan.data.token_store import TokenStore

PROC = Path("/proc")
MEMORY_GROWTH, MEMORY_SLACK_BYTES, HANDLE_SLACK = 0.05, 16 << 20, 2
LONG_SECONDS = 600
"""Processes that live at least this long are judged one by one, shorter ones together."""
MIN_SAMPLES = 16
MOMENTS = {"any": "at any moment", "save": "during a save", "load": "in the first step after a load"}
POLL_SECONDS = 0.005
COMPARED = ("step", "epoch", "level", "loss", "loss_by_level", "loss_by_length", "grad_norm", "lr", "tokens", "sources")
"""Keys of metrics.jsonl that do not depend on the clock."""


def descendants(pid: int) -> list[int]:
    """Return all descendants of `pid`, parents first."""
    # Not by process group: torchrun gives each rank its own session.
    children: dict[int, list[int]] = defaultdict(list)
    for entry in PROC.iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                # "pid (name, which may contain any character) state parent ..."
                parent = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[1]
                children[int(parent)].append(int(entry.name))
    found = [pid]
    for parent_id in found:
        found += children[parent_id]
    return found[1:]


def ranks_of(launcher: int) -> dict[int, int]:
    """Return the process id of each rank that the torchrun process `launcher` has started."""
    found: dict[int, int] = {}
    for pid in descendants(launcher):
        with contextlib.suppress(OSError, StopIteration):
            entries = (PROC / str(pid) / "environ").read_bytes().split(b"\0")
            rank = int(next(entry for entry in entries if entry.startswith(b"RANK="))[5:])
            # Workers of its data loader have the same environment, but come after it.
            found.setdefault(rank, pid)
    return found


def resident_bytes(pid: int) -> int:
    """Return the resident memory of a process without mapped files, 0 if it has exited."""
    with contextlib.suppress(OSError):
        lines = (PROC / str(pid) / "status").read_text().splitlines()
        # Without mapped files: pages of the token store come and go with the page cache.
        kib = [int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "RssShmem:"))]
        return sum(kib) * 1024
    return 0


def open_handles(pid: int) -> int:
    """Return the number of open file descriptors, 0 if the process has exited."""
    with contextlib.suppress(OSError):
        return len(os.listdir(PROC / str(pid) / "fd"))
    return 0


def kill_tree(pid: int) -> None:
    """Send SIGKILL to `pid` and its descendants."""
    for victim in [*descendants(pid), pid]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)


@dataclass
class ProcessSamples:
    """Samples of one process, (seconds since the start, bytes, handles), from its first checkpoint on."""

    name: str
    pid: int
    samples: list[tuple[float, int, int]] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Return the time from the first to the last sample."""
        return self.samples[-1][0] - self.samples[0][0] if self.samples else 0.0

    def peaks(self, column: int) -> list[float]:
        """Return the largest value of a column in each third of the samples."""
        size = len(self.samples)
        return [max(s[column] for s in self.samples[size * n // 3 : size * (n + 1) // 3]) for n in range(3)]

    def leaks(self) -> list[str]:
        """Return one line per leak."""
        *memory, last_memory = self.peaks(1)
        *handles, last_handles = self.peaks(2)
        where = f"{self.name} (process {self.pid}, {self.seconds:.0f} s)"
        found = []
        if last_memory > max(memory) * (1 + MEMORY_GROWTH) + MEMORY_SLACK_BYTES:
            found.append(f"{where}: memory grew from {max(memory) / 2**20:.0f} to {last_memory / 2**20:.0f} MiB")
        if last_handles > max(handles) + HANDLE_SLACK:
            found.append(f"{where}: handles grew from {max(handles):.0f} to {last_handles:.0f}")
        return found


def leaks(processes: Sequence[ProcessSamples], long_seconds: float = LONG_SECONDS) -> list[str]:
    """Return one line per leak: of each process of at least `long_seconds`, and of the shorter ranks together."""
    found = [leak for process in processes if process.seconds >= long_seconds for leak in process.leaks()]
    # A third of a minute has a few packs and at most one save, so its peak is random, in both directions. A leak only
    # grows: the median over the short processes shows it.
    short = [process for process in processes if process.seconds < long_seconds and process.name != "torchrun"]
    for name, column, unit, slack in (("memory", 1, 2**20, MEMORY_SLACK_BYTES), ("handles", 2, 1, HANDLE_SLACK)):
        growth = [last - max(before) for *before, last in (process.peaks(column) for process in short)]
        if growth and statistics.median(growth) > slack:
            size = f"{statistics.median(growth) / unit:.0f}{' MiB' if unit > 1 else ''}"
            found.append(f"{name} grew by {size}: median of {len(growth)} processes shorter than {long_seconds:.0f} s")
    return found


class Sampler:
    """A thread that samples torchrun and its ranks. launcher: returns torchrun's process id, None without one."""

    def __init__(self, folder: Path, launcher: Callable[[], int | None], interval_seconds: float) -> None:
        self.folder = folder
        self.launcher = launcher
        self.interval = interval_seconds
        self.processes: dict[int, ProcessSamples] = {}
        self._first_saved: dict[int, list[Path]] = {}
        self._start = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def judged(self, min_seconds: float) -> list[ProcessSamples]:
        """Return the processes that were sampled for at least `min_seconds`."""
        found = self.processes.values()
        return [process for process in found if process.seconds >= min_seconds and len(process.samples) >= MIN_SAMPLES]

    def _run(self) -> None:
        while not self._stop.wait(self.interval):
            launcher = self.launcher()
            if launcher is None:
                continue
            saved = completed_checkpoints(self.folder / "checkpoint")[-1:]
            for name, pid in {"torchrun": launcher, **{f"rank {r}": p for r, p in ranks_of(launcher).items()}}.items():
                process = self.processes.setdefault(pid, ProcessSamples(name, pid))
                # From the process's own first save on.
                if saved != self._first_saved.setdefault(pid, saved):
                    memory, handles = resident_bytes(pid), open_handles(pid)
                    if memory and handles:
                        process.samples.append((time.monotonic() - self._start, memory, handles))


@dataclass(frozen=True)
class Kill:
    """One kill.

    Args:
        moment: "any"; "save", while a checkpoint is written; "load", from the next load to the end of the first step
            after it.
        all_ranks: whether all ranks and torchrun are killed, or one rank.
        seconds: minimum time after the previous kill. step: minimum number of completed steps.
        delay: seconds to wait when all of these conditions hold.
    """

    moment: str
    all_ranks: bool
    seconds: float = 0
    step: int = 0
    delay: float = 0


def timed_kills(generator: random.Random, every_seconds: float) -> Iterator[Kill]:
    """Yield kills forever, 0.5 to 1.5 times `every_seconds` apart; of three, one is in a save and one after a load."""
    while True:
        for moment in generator.sample(list(MOMENTS), 3):
            # A load follows the kill before it, so it is not waited for.
            seconds = 0 if moment == "load" else every_seconds * generator.uniform(0.5, 1.5)
            yield Kill(moment, generator.random() < 0.5, seconds=seconds, delay=generator.uniform(0, 0.3))


def stepped_kills(generator: random.Random, number: int, total_steps: int) -> Iterator[Kill]:
    """Yield `number` kills at ascending random steps; of three, one is in a save and one after a load."""
    steps = sorted(generator.randrange(1, total_steps - 1) for _ in range(number))
    for index, step in enumerate(steps):
        moment = list(MOMENTS)[index % 3]
        at_step = 0 if moment == "load" else step
        yield Kill(moment, generator.random() < 0.5, step=at_step, delay=generator.uniform(0, 0.3))


def torchrun(argv: Sequence[str], ranks: int) -> list[str]:
    """Return the command of a run on `ranks` ranks of this machine."""
    # More restarts than kills of single ranks between two kills of all; but a run that cannot start still ends.
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--max-restarts=30"]
    return [*launcher, "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "-m", "hbp_titan.train", *argv]


class SupervisedRun:
    """Supervisor of `command`, which trains into `folder`.

    killed: (kill, steps completed at that time). starts: how often the supervisor started the command. complete:
    whether the run finished.
    """

    def __init__(self, command: Sequence[str], folder: Path, log: TextIO, generator: random.Random) -> None:
        self.command = list(command)
        self.folder = folder
        self.log = log
        self.generator = generator
        self.killed: list[tuple[Kill, int]] = []
        self.starts = 0
        self.complete = False
        self.process: subprocess.Popen[bytes] | None = None
        self._over: Callable[[], bool] = lambda: False

    def run(self, kills: Iterable[Kill], over: Callable[[], bool] = lambda: False) -> None:
        """Run and kill until the run is complete, or `over` returns True; then let it save and exit.

        Raises RuntimeError if it fails without having been killed.
        """
        self._over = over
        self._start()
        try:
            for kill in kills:
                seen = len(start_folders(self.folder / SAMPLE_LOG))
                if not self._wait_for(kill, time.monotonic(), seen):
                    break
                self._kill(kill)
            while self._running() and not self._over():
                time.sleep(POLL_SECONDS)
            self._stop()
        finally:
            if self.process is not None:
                kill_tree(self.process.pid)
                self.process.wait()

    def _start(self) -> None:
        self.starts += 1
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        self.process = subprocess.Popen(self.command, env=environment, stdout=self.log, stderr=subprocess.STDOUT)

    def _running(self) -> bool:
        assert self.process is not None, "start comes first"
        code = self.process.poll()
        # Not one of our kills: _kill waits for what it killed and starts the command again.
        if code:
            raise RuntimeError(f"the run failed with exit code {code} without a kill; see {self.log.name}")
        return code is None

    def _stop(self) -> None:
        assert self.process is not None, "start comes first"
        self.complete = not self._running()
        if not self.complete:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait()

    def _wait_for(self, kill: Kill, since: float, seen: int) -> bool:
        """Wait for the moment of `kill`; return False if the run ends before. seen: number of starts so far."""
        while self._running() and not self._over():
            early = time.monotonic() < since + kill.seconds or steps_done(self.folder) < kill.step
            if not early and self._is_moment(kill.moment, seen):
                # A save may be over after a delay.
                time.sleep(0 if kill.moment == "save" else kill.delay)
                return self._running()
            time.sleep(POLL_SECONDS)
        return False

    def _is_moment(self, moment: str, seen: int) -> bool:
        if moment == "save":
            return any((self.folder / "checkpoint").glob(f"step-*{PARTIAL}"))
        if moment == "load":
            # A start writes its folder of the sample log right before its first step.
            return len(start_folders(self.folder / SAMPLE_LOG)) > seen
        return True

    def _kill(self, kill: Kill) -> None:
        assert self.process is not None, "start comes first"
        ranks = ranks_of(self.process.pid)
        # While torchrun starts the ranks, there is no rank to kill.
        kill = replace(kill, all_ranks=kill.all_ranks or not ranks)
        self.killed.append((kill, steps_done(self.folder)))
        if kill.all_ranks:
            kill_tree(self.process.pid)
            self.process.wait()
            self._start()
        else:
            kill_one(ranks[self.generator.choice(sorted(ranks))])


def kill_one(pid: int) -> None:
    """Send SIGKILL to one process."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def steps_done(folder: Path) -> int:
    """Return the number of complete lines of metrics.jsonl, one per step."""
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


@dataclass(frozen=True)
class Settings:
    """Settings of a soak test.

    Args:
        argv: arguments of the training run, without its folder.
        folder: parent of both run folders and the logs.
        seconds: how long the disturbed run trains, unless it completes earlier.
        judged_seconds: processes that trained for less are not checked for leaks.
    """

    argv: Sequence[str]
    folder: Path
    ranks: int = 2
    seconds: float = float("inf")
    sample_seconds: float = 1.0
    judged_seconds: float = 60.0


def soak(settings: Settings, kills: Callable[[random.Random], Iterable[Kill]], seed: int) -> dict[str, Any]:
    """Train both runs; return the report as plain JSON values, with one line of "faults" per fault.

    kills: generator -> kills; the same generator chooses the ranks. Raises ValueError if the folder has runs.
    """
    disturbed, whole = settings.folder / "disturbed", settings.folder / "whole"
    for folder in (disturbed, whole):
        if folder.exists():
            raise ValueError(f"{folder} already exists; use another --folder")
    settings.folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    # One generator for moments and victims: a seed repeats the whole test.
    generator = random.Random(seed)
    report: dict[str, Any] = {"seed": seed, "ranks": settings.ranks, "argv": list(settings.argv)}
    end = started + settings.seconds
    run, judged = _watched(settings, disturbed, kills(generator), generator, over=lambda: time.monotonic() > end)
    report["disturbed_seconds"] = round(time.monotonic() - started, 1)
    report["kills"] = [{**asdict(kill), "steps_done": steps} for kill, steps in run.killed]
    report["starts"], report["complete"] = run.starts, run.complete
    step = _last_regular(disturbed, load_config(settings.argv).checkpoint.interval, run.complete)
    report["steps"] = step
    restarted = time.monotonic()
    saved = whole / "checkpoint" / f"step-{step}"
    judged += _watched(settings, whole, (), generator, over=saved.exists)[1]
    report["whole_seconds"] = round(time.monotonic() - restarted, 1)
    report["processes"] = [_row(process) for process in judged]
    report["faults"] = [*leaks(judged), *audit_faults(disturbed), *differences(whole, disturbed, step)]
    return report


def _watched(
    settings: Settings, folder: Path, kills: Iterable[Kill], generator: random.Random, over: Callable[[], bool]
) -> tuple[SupervisedRun, list[ProcessSamples]]:
    # Keep the compared checkpoint when another one is saved at the end.
    argv = [*settings.argv, "--checkpoint.keep_latest_k=3", f"--job.dump_folder={folder}"]
    command = torchrun(argv, settings.ranks)
    with folder.with_suffix(".log").open("w", encoding="utf-8") as log:
        run = SupervisedRun(command, folder, log, generator)
        with Sampler(folder, lambda: run.process.pid if run.process else None, settings.sample_seconds) as sampler:
            run.run(kills, over)
    return run, sampler.judged(settings.judged_seconds)


def _last_regular(folder: Path, interval: int, complete: bool) -> int:
    """Return the step of the newest checkpoint that an undisturbed run saves as well."""
    steps = [int(path.name.removeprefix("step-")) for path in completed_checkpoints(folder / "checkpoint")]
    # A run that is stopped by a signal also saves where it stands.
    regular = [step for step in steps if step % interval == 0 or (complete and step == steps[-1])]
    if not regular:
        raise ValueError(f"{folder} has no checkpoint; use more --minutes or a smaller checkpoint.interval")
    return regular[-1]


def audit_faults(folder: Path) -> list[str]:
    """Return one line per problem that the audit of a run finds (scripts/audit_epoch.py)."""
    done = steps_done(folder)
    starts = read_starts(folder, done)
    audits, faults = audit_run(folder, done, starts, TokenStore.open(starts[-1].store))
    return [*faults, *(fault for audit in audits for fault in audit.problems)]


def differences(whole: Path, disturbed: Path, step: int) -> list[str]:
    """Return one line per difference of two runs in their first `step` steps and the checkpoint of that step."""
    found = []
    first, second = (_steps(folder)[:step] for folder in (whole, disturbed))
    if len(first) < step or len(second) < step:
        found.append(f"{whole} has {len(first)} and {disturbed} {len(second)} of {step} steps")
    # The first difference is enough: all later steps differ as well.
    for one, other in zip(first, second, strict=False):
        keys = [key for key in COMPARED if one[key] != other[key]]
        if keys:
            found.append(f"step {one['step']}: {keys[0]} is {one[keys[0]]} undisturbed, but {other[keys[0]]} disturbed")
            break
    one, other = (_tensors_sha256(folder / "checkpoint" / f"step-{step}") for folder in (whole, disturbed))
    if one != other:
        found.append(f"step-{step}: different model, optimizer or random state: {sorted(one.items() ^ other.items())}")
    return found


def _steps(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines() if line.endswith("}")]


def _tensors_sha256(checkpoint: Path) -> dict[str, str]:
    # The checksums of the manifest stand for the content of gigabytes.
    files = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name.endswith(".safetensors")}


def _row(process: ProcessSamples) -> dict[str, Any]:
    return {
        "name": process.name,
        "from_second": round(process.samples[0][0], 1),
        "seconds": round(process.seconds, 1),
        "peak_mib": [round(size / 2**20, 1) for size in process.peaks(1)],
        "peak_handles": process.peaks(2),
        "samples": [[round(at, 1), size, handles] for at, size, handles in process.samples],
    }


def table(report: dict[str, Any]) -> str:
    """Return the report as text: kills, processes, verdict."""
    kills = report["kills"]
    counts = ", ".join(f"{sum(kill['moment'] == m for kill in kills)} {n}" for m, n in MOMENTS.items())
    all_ranks = sum(kill["all_ranks"] for kill in kills)
    lines = [
        f"disturbed: {report['disturbed_seconds'] / 60:.1f} min, {report['steps']} steps; {len(kills)} kills "
        f"({counts}; {all_ranks} of all, {len(kills) - all_ranks} of one rank)",
        f"undisturbed: {report['whole_seconds'] / 60:.1f} min for the same steps",
        "peaks in the three thirds of each process's samples:",
        f"{'process':<10}{'from s':>8}{'for s':>8}  {'MiB':<23}handles",
    ]
    for process in report["processes"]:
        mib, handles = (" ".join(f"{value:6.0f}" for value in process[key]) for key in ("peak_mib", "peak_handles"))
        lines.append(
            f"{process['name']:<10}{process['from_second']:>8.0f}{process['seconds']:>8.0f}  {mib:<23}{handles}"
        )
    lines += [f"wrong: {fault}" for fault in report["faults"]] or [
        "no leak, every sample trained once, losses and state bit for bit those of the undisturbed run"
    ]
    return "\n".join(lines)
