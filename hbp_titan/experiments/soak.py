"""The soak: train with kills for a time, train the same steps undisturbed, compare.

Owns the order of the two runs, what they are compared by, and the report.

A run that is killed from outside, at moments that its run folder shows, and started again until it is complete.

Owns the moments and the supervisor. A rank that is killed is started again by torchrun, which lives on; where all are
killed, torchrun too, the supervisor starts the same command again.

The processes of a run, as /proc shows them: who they are, what memory and handles they hold, how they are killed.

Owns all reading of /proc. A process that is gone in the meantime has nothing.

Memory and handles of a run's processes over time, and whether they are flat.

Owns the samples and the criterion. A process counts from its first checkpoint on, which brings a buffer and connections
that stay. Levels and saves come and go, so peaks are compared: it is flat where the peak of the last third of its time
exceeds that of the two before by at most MEMORY_GROWTH and MEMORY_SLACK_BYTES together, and by HANDLE_SLACK handles.
In a life of a minute or two a third holds a few packs and a save or none, and its peak is chance: such lives are judged
together, by the median of what their last thirds exceed the others by. Chance has both signs, a leak has one.
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


MEMORY_GROWTH, MEMORY_SLACK_BYTES, HANDLE_SLACK = 0.05, 16 << 20, 2
LONG_SECONDS = 600
"""From then on a life is judged by itself."""
_MIN_SAMPLES = 16


@dataclass
class Lifetime:
    """One process. samples: (seconds since the soak's start, bytes, handles) from its first checkpoint on."""

    name: str
    pid: int
    samples: list[tuple[float, int, int]] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """From the first to the last sample."""
        return self.samples[-1][0] - self.samples[0][0] if self.samples else 0.0

    def peaks(self, column: int) -> list[float]:
        """The largest value of a column in each third of the samples."""
        size = len(self.samples)
        return [max(s[column] for s in self.samples[size * n // 3 : size * (n + 1) // 3]) for n in range(3)]

    def faults(self) -> list[str]:
        """What is not flat, a line each."""
        *memory, last_memory = self.peaks(1)
        *handles, last_handles = self.peaks(2)
        where = f"{self.name} (process {self.pid}, {self.seconds:.0f} s)"
        found = []
        if last_memory > max(memory) * (1 + MEMORY_GROWTH) + MEMORY_SLACK_BYTES:
            found.append(f"{where}: memory grew from {max(memory) / 2**20:.0f} to {last_memory / 2**20:.0f} MiB")
        if last_handles > max(handles) + HANDLE_SLACK:
            found.append(f"{where}: handles grew from {max(handles):.0f} to {last_handles:.0f}")
        return found


def growth(lives: Sequence[Lifetime], long_seconds: float = LONG_SECONDS) -> list[str]:
    """What is not flat: of each life of `long_seconds` or more, and of the shorter ones of the ranks together."""
    found = [fault for life in lives if life.seconds >= long_seconds for fault in life.faults()]
    short = [life for life in lives if life.seconds < long_seconds and life.name != "torchrun"]
    for what, column, unit, slack in (("memory", 1, 2**20, MEMORY_SLACK_BYTES), ("handles", 2, 1, HANDLE_SLACK)):
        grown = [last - max(before) for *before, last in (life.peaks(column) for life in short)]
        if grown and statistics.median(grown) > slack:
            size = f"{statistics.median(grown) / unit:.0f}{' MiB' if unit > 1 else ''}"
            found.append(f"{what} grew by {size} in the median of {len(grown)} lives shorter than {long_seconds:.0f} s")
    return found


class Sampler:
    """A thread that samples torchrun and its ranks. launcher: torchrun's process id, None while there is none."""

    def __init__(self, folder: Path, launcher: Callable[[], int | None], interval_seconds: float) -> None:
        self.folder = folder
        self.launcher = launcher
        self.interval = interval_seconds
        self.lifetimes: dict[int, Lifetime] = {}
        self._saved_at_birth: dict[int, list[Path]] = {}
        self._start = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def judged(self, min_seconds: float) -> list[Lifetime]:
        """The processes that trained for at least `min_seconds`."""
        found = self.lifetimes.values()
        return [life for life in found if life.seconds >= min_seconds and len(life.samples) >= _MIN_SAMPLES]

    def _run(self) -> None:
        while not self._stop.wait(self.interval):
            launcher = self.launcher()
            if launcher is None:
                continue
            saved = completed_checkpoints(self.folder / "checkpoint")[-1:]
            for name, pid in {"torchrun": launcher, **{f"rank {r}": p for r, p in ranks_of(launcher).items()}}.items():
                life = self.lifetimes.setdefault(pid, Lifetime(name, pid))
                if saved != self._saved_at_birth.setdefault(pid, saved):
                    memory, handles = resident_bytes(pid), open_handles(pid)
                    if memory and handles:
                        life.samples.append((time.monotonic() - self._start, memory, handles))


MOMENTS = ("any", "save", "load")
_POLL_SECONDS = 0.005


@dataclass(frozen=True)
class Kill:
    """One kill. moment: "any"; "save", while a checkpoint is being written; "load", between the next load and the end
    of the first step after it. everyone: all ranks and torchrun, otherwise one rank.

    seconds: after the kill before, at the earliest; step: with so many steps done, at the earliest. delay: seconds from
    when all of that is so.
    """

    moment: str
    everyone: bool
    seconds: float = 0
    step: int = 0
    delay: float = 0


def timed_kills(generator: random.Random, every_seconds: float) -> Iterator[Kill]:
    """Kills without end, 0.5 to 1.5 times `every_seconds` apart; of three one is in a save and one after a load."""
    while True:
        for moment in generator.sample(MOMENTS, 3):
            seconds = 0 if moment == "load" else every_seconds * generator.uniform(0.5, 1.5)
            yield Kill(moment, generator.random() < 0.5, seconds=seconds, delay=generator.uniform(0, 0.3))


def stepped_kills(generator: random.Random, number: int, total_steps: int) -> Iterator[Kill]:
    """So many kills at ascending random steps of a run; of each three one is in a save and one after a load."""
    steps = sorted(generator.randrange(1, total_steps - 1) for _ in range(number))
    for index, step in enumerate(steps):
        moment = MOMENTS[index % 3]
        at_step = 0 if moment == "load" else step
        yield Kill(moment, generator.random() < 0.5, step=at_step, delay=generator.uniform(0, 0.3))


def torchrun(argv: Sequence[str], ranks: int) -> list[str]:
    """The command of a run on so many ranks of this machine, in which torchrun starts ranks again when they die.

    More often than single ranks are killed between two kills of all; a run that cannot start ends all the same.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--max-restarts=30"]
    return [*launcher, "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "-m", "hbp_titan.train", *argv]


class DisturbedRun:
    """Supervises `command`, whose run folder is `folder`. log: where all that it says goes.

    killed: (kill, steps done then). starts: how often the supervisor started it. complete: whether it came to its end.
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
        """Run and kill until the run is complete, or is asked to save and leave because it is `over`.

        Raises RuntimeError where it fails without having been killed.
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
                time.sleep(_POLL_SECONDS)
            self._leave()
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
        if code:
            raise RuntimeError(f"the run failed with exit code {code} and was not killed: {self.log.name}")
        return code is None

    def _leave(self) -> None:
        assert self.process is not None, "start comes first"
        self.complete = not self._running()
        if not self.complete:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait()

    def _wait_for(self, kill: Kill, since: float, seen: int) -> bool:
        """Return at the moment of `kill`; False where the run or the time is over before. seen: starts by then."""
        while self._running() and not self._over():
            early = time.monotonic() < since + kill.seconds or steps_done(self.folder) < kill.step
            if not early and self._is_moment(kill.moment, seen):
                time.sleep(0 if kill.moment == "save" else kill.delay)
                return self._running()
            time.sleep(_POLL_SECONDS)
        return False

    def _is_moment(self, moment: str, seen: int) -> bool:
        if moment == "save":
            return any((self.folder / "checkpoint").glob(f"step-*{PARTIAL}"))
        if moment == "load":
            return len(start_folders(self.folder / SAMPLE_LOG)) > seen
        return True

    def _kill(self, kill: Kill) -> None:
        assert self.process is not None, "start comes first"
        ranks = ranks_of(self.process.pid)
        # Where torchrun is just starting them there is nobody else.
        kill = replace(kill, everyone=kill.everyone or not ranks)
        self.killed.append((kill, steps_done(self.folder)))
        if kill.everyone:
            kill_tree(self.process.pid)
            self.process.wait()
            self._start()
        else:
            kill_one(ranks[self.generator.choice(sorted(ranks))])


def kill_one(pid: int) -> None:
    """SIGKILL to one process."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def steps_done(folder: Path) -> int:
    """Whole lines of the run's metrics.jsonl, one a step."""
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


COMPARED = ("step", "epoch", "level", "loss", "loss_by_level", "loss_by_length", "grad_norm", "lr", "tokens", "sources")
"""The keys of metrics.jsonl that do not depend on the clock."""


@dataclass(frozen=True)
class Settings:
    """argv: of a run, without its folder. folder: the two run folders and the logs go there.

    seconds: for which the disturbed run trains, unless it is complete before. judged_seconds: a process that trained
    for less is not asked whether it is flat.
    """

    argv: Sequence[str]
    folder: Path
    ranks: int = 2
    seconds: float = float("inf")
    sample_seconds: float = 1.0
    judged_seconds: float = 60.0


def soak(settings: Settings, kills: Callable[[random.Random], Iterable[Kill]], seed: int) -> dict[str, Any]:
    """Run both; returns the report: plain JSON values, with every fault as a line of "faults".

    kills: makes them from the generator that also chooses the ranks. Raises ValueError where the folder has runs.
    """
    disturbed, whole = settings.folder / "disturbed", settings.folder / "whole"
    for folder in (disturbed, whole):
        if folder.exists():
            raise ValueError(f"{folder} is there: name another folder, a soak begins anew")
    settings.folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
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
    report["lifetimes"] = [_row(life) for life in judged]
    report["faults"] = [*growth(judged), *audit_faults(disturbed), *differences(whole, disturbed, step)]
    return report


def _watched(
    settings: Settings, folder: Path, kills: Iterable[Kill], generator: random.Random, over: Callable[[], bool]
) -> tuple[DisturbedRun, list[Lifetime]]:
    # What is compared must not be gone for the one that is saved when the run is asked to leave.
    argv = [*settings.argv, "--checkpoint.keep_latest_k=3", f"--job.dump_folder={folder}"]
    command = torchrun(argv, settings.ranks)
    with folder.with_suffix(".log").open("w", encoding="utf-8") as log:
        run = DisturbedRun(command, folder, log, generator)
        with Sampler(folder, lambda: run.process.pid if run.process else None, settings.sample_seconds) as sampler:
            run.run(kills, over)
    return run, sampler.judged(settings.judged_seconds)


def _last_regular(folder: Path, interval: int, complete: bool) -> int:
    """The newest checkpoint's step that an undisturbed run saves as well."""
    steps = [int(path.name.removeprefix("step-")) for path in completed_checkpoints(folder / "checkpoint")]
    regular = [step for step in steps if step % interval == 0 or (complete and step == steps[-1])]
    if not regular:
        raise ValueError(f"{folder} has no checkpoint: more --minutes, or a smaller checkpoint.interval")
    return regular[-1]


def audit_faults(folder: Path) -> list[str]:
    """What the audit of a run finds wrong, a line each (scripts/audit_epoch.py)."""
    done = steps_done(folder)
    starts = read_starts(folder, done)
    audits, faults = audit_run(folder, done, starts, TokenStore.open(starts[-1].store))
    return [*faults, *(fault for audit in audits for fault in audit.problems)]


def differences(whole: Path, disturbed: Path, step: int) -> list[str]:
    """How two runs differ in their first `step` steps and in the checkpoint of that step, bit for bit; a line each."""
    found = []
    first, second = (_steps(folder)[:step] for folder in (whole, disturbed))
    if len(first) < step or len(second) < step:
        found.append(f"of {step} steps {whole} has {len(first)} and {disturbed} {len(second)}")
    for one, other in zip(first, second, strict=False):
        keys = [key for key in COMPARED if one[key] != other[key]]
        if keys:
            found.append(f"step {one['step']}: {keys[0]} is {one[keys[0]]} undisturbed, but {other[keys[0]]}")
            break
    one, other = (_tensors_sha256(folder / "checkpoint" / f"step-{step}") for folder in (whole, disturbed))
    if one != other:
        found.append(f"step-{step}: model, optimizer or random state differ in {sorted(one.items() ^ other.items())}")
    return found


def _steps(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines() if line.endswith("}")]


def _tensors_sha256(checkpoint: Path) -> dict[str, str]:
    files = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name.endswith(".safetensors")}


def _row(life: Lifetime) -> dict[str, Any]:
    return {
        "name": life.name,
        "from_second": round(life.samples[0][0], 1),
        "seconds": round(life.seconds, 1),
        "peak_mib": [round(size / 2**20, 1) for size in life.peaks(1)],
        "peak_handles": life.peaks(2),
        "samples": [[round(at, 1), size, handles] for at, size, handles in life.samples],
    }


def table(report: dict[str, Any]) -> str:
    """The report for people: kills, processes, verdict."""
    kills = report["kills"]
    counts = ", ".join(f"{sum(kill['moment'] == m for kill in kills)} {n}" for m, n in _MOMENT_NAMES.items())
    everyone = sum(kill["everyone"] for kill in kills)
    lines = [
        f"disturbed: {report['disturbed_seconds'] / 60:.1f} min, {report['steps']} steps; {len(kills)} kills "
        f"({counts}; {everyone} of all, {len(kills) - everyone} of one rank)",
        f"undisturbed: {report['whole_seconds'] / 60:.1f} min for the same steps",
        "peaks of the three thirds of each process's training:",
        f"{'process':<10}{'from s':>8}{'for s':>8}  {'MiB':<23}handles",
    ]
    for life in report["lifetimes"]:
        mib, handles = (" ".join(f"{value:6.0f}" for value in life[key]) for key in ("peak_mib", "peak_handles"))
        lines.append(f"{life['name']:<10}{life['from_second']:>8.0f}{life['seconds']:>8.0f}  {mib:<23}{handles}")
    lines += [f"wrong: {fault}" for fault in report["faults"]] or [
        "memory and handles flat, every sample trained once, losses and state bit for bit those of the undisturbed run"
    ]
    return "\n".join(lines)


_MOMENT_NAMES = {"any": "at any moment", "save": "during a save", "load": "in the first step after a load"}
