"""A step whose loss or gradient is NaN or infinite: who is at fault, and whether the run stops or goes on without it.

Owns `training.on_nonfinite` and nonfinite.jsonl of the run folder, which has a line with every sample id for each such
step. The decision needs nothing but sums that all ranks have, so all of them take it alike; only then do they ask one
another which packs it was. Skipped steps are counted over the whole run, resumptions included.

Preemption: a signal asks a run to save and leave, and every rank leaves after the same step.

Owns the signals, the exit code and the file `preempted` in the run folder that tells a launcher why the run ended:
torchrun itself exits with 1 whatever its ranks say.

Watchdog: says where every rank stands when nothing moves any more, and ends what does not end itself.

Owns a thread beside the training loop. Collectives have timeouts of their own and end a rank that waits in one; this
thread speaks a little before, because only it knows the step and the level, and it also sees what is no collective (a
loader, a file system). Ranks that stand at the same place are one line.

It also ends a rank that was asked to leave (SIGTERM, SIGUSR1) and cannot: one that waits for a rank that is gone, which
NCCL does not notice, never comes to the end of its step, where it would save. What a sound wait takes is known from
earlier ones of its kind; a kind that was not seen yet, and waits for a disk, are left to their own timeouts.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from hbp_titan.data.batch import PackedBatch
from hbp_titan.distributed.world import World, gather_values
from hbp_titan.job_config import Training
from hbp_titan.packing import Plan
from hbp_titan.packing.level import level_name

NONFINITE_FILE = "nonfinite.jsonl"
SHOWN = 10
"""Packs, and samples of a pack, that a message names; the file has all."""


@dataclass
class _Seen:
    """What this rank trained in one iteration. losses: of its samples, still on the device."""

    iteration: int
    level: int
    sample_ids: NDArray[np.int64]
    losses: Tensor


class NonFiniteGuard:
    """`observe` every micro-batch, `reset` after a finite step, `handle` one that is not.

    steps, samples: skipped so far. where: the row of a sample, as file:line.
    """

    def __init__(self, config: Training, run_folder: Path, world: World, where: Callable[[int], str]) -> None:
        self.config = config
        self.path = run_folder / NONFINITE_FILE
        self.world = world
        self.where = where
        self.steps = 0
        self.samples = 0
        self._seen: list[_Seen] = []

    def observe(self, iteration: int, batch: PackedBatch, losses: Tensor) -> None:
        """Keep what would have to be told; waits for nothing."""
        self._seen.append(_Seen(iteration, batch.level, batch.sample_ids, losses))

    def reset(self) -> None:
        """Forget the iterations of the step."""
        self._seen = []

    def state(self) -> dict[str, int]:
        """What a checkpoint keeps."""
        return {"steps": self.steps, "samples": self.samples}

    def restore(self, state: dict[str, int]) -> None:
        """Go on counting from `state`."""
        self.steps, self.samples = state["steps"], state["samples"]

    def handle(self, plan: Plan, step: int, step_in_plan: int, losses: Sequence[float], grad_norm: float) -> str:
        """Tell of optimizer step `step`, which must not be applied. A collective: every rank calls it.

        losses: sums of token losses by level over all ranks. Returns the message where the step is to be skipped;
        raises RuntimeError with it where the run has to stop.
        """
        packs = self._packs_at_fault(plan)
        first, last = plan.step_offsets[step_in_plan : step_in_plan + 2].tolist()
        samples = plan.samples_of(first, last).tolist()
        at_fault = [pack["level"] for pack in packs] or plan.level_of_iteration[first:last].tolist()
        levels = dict.fromkeys(level_name(plan.levels[k]) for k in at_fault)
        skips = self.config.on_nonfinite == "skip" and self.steps < self.config.max_nonfinite_steps
        if self.world.rank == 0:
            event = {"step": step, "epoch": plan.epoch, "levels": [*levels], "action": "skip" if skips else "stop"}
            event |= {"losses": [*map(_plain, losses)], "grad_norm": _plain(grad_norm)}
            self._write({**event, "packs_at_fault": packs, "samples": samples})
        fault = self._named(packs, len(samples))
        told = f"step {step}, level {', '.join(levels)}: {fault}; gradient norm {grad_norm}; the parameters were not "
        if not skips:
            raise RuntimeError(f"{told}updated{self._limit()} ({self.path} has every sample id)")
        self.steps += 1
        self.samples += len(samples)
        self.reset()
        return (
            f"{told}updated: the step is skipped, its {len(samples):,} samples are not trained; skipped step "
            f"{self.steps} of at most {self.config.max_nonfinite_steps}"
        )

    def describe(self) -> str:
        """A line for the end of a run."""
        return (
            f"skipped      {self.steps} steps without finite loss and gradient, {self.samples:,} samples ({self.path})"
        )

    def _limit(self) -> str:
        if self.config.on_nonfinite == "stop":
            return ""
        return f"; {self.steps} steps were skipped before, training.max_nonfinite_steps allows no more"

    def _packs_at_fault(self, plan: Plan) -> list[dict[str, Any]]:
        """The packs of the step on which some rank has no finite loss, with all such ranks."""
        mine = []
        for seen in self._seen:
            if not math.isfinite(seen.losses.sum().item()):
                dp_rank = self.world.rank // plan.levels[seen.level].cp_degree
                mine.append((seen.iteration, seen.level, dp_rank, seen.sample_ids.tolist()))
        packs: dict[tuple[int, int], dict[str, Any]] = {}
        for rank, found in enumerate(gather_values(mine)):
            for iteration, level, dp_rank, samples in found:
                pack = {"iteration": iteration, "level": level, "dp_rank": dp_rank, "ranks": [], "samples": samples}
                packs.setdefault((iteration, dp_rank), pack)["ranks"].append(rank)
        return [packs[key] for key in sorted(packs)]

    def _named(self, packs: Sequence[dict[str, Any]], num_samples: int) -> str:
        if not packs:
            return f"every loss is finite, but the gradient of its {num_samples:,} samples is not"
        parts = []
        for pack in packs[:SHOWN]:
            ids = pack["samples"]
            shown = ", ".join(f"{index} ({self.where(index)})" for index in ids[:SHOWN])
            more = f" and {len(ids) - SHOWN} more" if len(ids) > SHOWN else ""
            ranks = ", ".join(map(str, pack["ranks"]))
            parts.append(f"on rank {ranks} in iteration {pack['iteration']}, samples {shown}{more}")
        more = f"; and in {len(packs) - SHOWN} more packs" if len(packs) > SHOWN else ""
        return f"the loss is not finite {'; '.join(parts)}{more}"

    def _write(self, event: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")


def _plain(value: float) -> float | str:
    """JSON knows no NaN."""
    return value if math.isfinite(value) else str(value)


# sysexits.h, EX_TEMPFAIL: try again later.
EXIT_PREEMPTED = 75
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
PREEMPTED_FILE = "preempted"


class Preempted(SystemExit):
    """The run has saved and ends for a signal; the same command goes on from there."""

    def __init__(self) -> None:
        super().__init__(EXIT_PREEMPTED)


class Preemption:
    """Notes SIGTERM and SIGUSR1 while it is entered, which is where a checkpoint can be made of the run."""

    def __init__(self, run_folder: Path, enabled: bool) -> None:
        self.file = run_folder / PREEMPTED_FILE
        self.enabled = enabled
        self.received = 0
        self._before: dict[signal.Signals, Any] = {}
        self._pipe: tuple[int, int] | None = None
        # `seen` reads in another thread than the one that closes.
        self._pipe_lock = threading.Lock()
        self._seen = 0

    def __enter__(self) -> Preemption:
        if self.enabled:
            self._pid = os.getpid()
            self._pipe = os.pipe()
            for end in self._pipe:
                os.set_blocking(end, False)
            self._wakeup_before = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._pipe is not None:
            signal.set_wakeup_fd(self._wakeup_before)
            with self._pipe_lock:
                pipe, self._pipe = self._pipe, None
                for end in pipe:
                    os.close(end)

    def poll_signal(self) -> int:
        """The signal that this process got, 0 before; for another thread than the main one.

        `received` is set by a handler in Python, which does not run while the main thread waits in a collective. The
        interpreter's own handler writes the number into a pipe at once.
        """
        with self._pipe_lock:
            try:
                numbers = os.read(self._pipe[0], 64) if self._pipe is not None else b""
            except BlockingIOError:
                numbers = b""
        self._seen = next((number for number in numbers if number in SIGNALS), self._seen)
        return self._seen

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() == self._pid:
            self.received = number
            return
        # A process forked from this one inherits the handler, but has nothing to save.
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    def write_marker(self, number: int, step: int) -> str:
        """Write `preempted`; returns the line that says what happened. number: the signal that any rank got."""
        name = signal.Signals(number).name
        self.file.write_text(f"{name} step {step}\n", encoding="utf-8")
        return f"{name}: saved step {step}; the same command goes on from there (exit code {EXIT_PREEMPTED})"

    def remove_marker(self) -> None:
        """Forget how an earlier start ended."""
        self.file.unlink(missing_ok=True)


# Of the timeout of collectives.
SPEAKS_AT, ENDS_AT = 0.9, 1.2
# A rank that got a signal is stuck after this many seconds without progress, and after this many times the longest
# wait of the same kind before. torchrun kills after 30 s.
STUCK_SECONDS, STUCK_FACTOR = 10.0, 3.0
_PACKAGE = Path(__file__).resolve().parents[1]


class _Place(NamedTuple):
    where: str
    timeout: float
    since: float
    kind: str


class Watchdog:
    """A context manager around the run, which calls `heartbeat` whenever something new begins.

    store: where the ranks tell each other; made once a job.
    signal_received: set while signals ask the run to leave: the number of one that came, or 0.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        store: dist.Store,
        end: Callable[[int], None] = os._exit,
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self.store = store
        self.signal_received: Callable[[], int] = lambda: 0
        self._longest: dict[str, float] = {}
        self._end = end
        # Replaced as a whole: the thread never sees the time of one place and the timeout of another.
        self._place = _Place("the start", math.inf, time.monotonic(), "")
        self._watched = threading.get_ident()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def heartbeat(self, where: str, timeout_seconds: float = math.inf, kind: str = "") -> None:
        """Something new begins, which may take `timeout_seconds`.

        kind: of work that takes about as long each time, so that a stuck rank differs from a busy one.
        """
        now, before = time.monotonic(), self._place
        if before.kind:
            self._longest[before.kind] = max(self._longest.get(before.kind, 0.0), now - before.since)
        self._place = _Place(where, timeout_seconds, now, kind)

    @property
    def where(self) -> str:
        """What the main thread does."""
        return self._place.where

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        told = False
        while not self._stop.wait(min(1.0, 0.05 * self._place.timeout)):
            place = self._place
            idle, timeout = time.monotonic() - place.since, place.timeout
            if idle > self._stuck_after(place.kind) and (number := self.signal_received()):
                self._leave(number, idle)
                return
            if idle <= SPEAKS_AT * timeout:
                told = False
            elif not told:
                told = True
                self._tell(idle)
            elif idle > ENDS_AT * timeout:
                print(f"rank {self.rank} is ended after {idle:.0f} s without progress", file=sys.stderr, flush=True)
                self._end(1)
                return

    def _stuck_after(self, kind: str) -> float:
        longest = self._longest.get(kind)
        return math.inf if longest is None else max(STUCK_SECONDS, STUCK_FACTOR * longest)

    def _leave(self, number: int, idle: float) -> None:
        print(
            f"rank {self.rank}: {signal.Signals(number).name}, but no progress for {idle:.0f} s in {self.where}: "
            "another rank is gone; ends without saving",
            file=sys.stderr,
            flush=True,
        )
        self._end(1)

    def _tell(self, idle: float) -> None:
        """Leave this rank's place for the others; the first to do so prints the places of all."""
        self.store.set(f"hbp_titan/stands/{self.rank}", f"{self.where}: {place_of(self._watched)}")
        if self.store.add("hbp_titan/stands", 1) != 1:
            return
        # The others come to the same conclusion within a second or two.
        self._stop.wait(min(5.0, 0.1 * self._place.timeout))
        print(f"nothing has moved for {idle:.0f} s:\n{self._places()}", file=sys.stderr, flush=True)

    def _places(self) -> str:
        ranks_at: dict[str, list[int]] = {}
        for rank in range(self.world_size):
            key = f"hbp_titan/stands/{rank}"
            place = (
                self.store.get(key).decode() if self.store.check([key]) else "no word: gone, or not even Python runs"
            )
            ranks_at.setdefault(place, []).append(rank)
        return "\n".join(f"  {_ranks(ranks)} in {place}" for place, ranks in ranks_at.items())


def place_of(thread: int) -> str:
    """The innermost call of a thread, and the line of this package that it comes from."""
    frame = sys._current_frames().get(thread)
    stack = traceback.extract_stack(frame) if frame is not None else []
    if not stack:
        return "no stack"
    own = [entry for entry in stack if _PACKAGE in Path(entry.filename).parents]
    line = f" from {Path(own[-1].filename).relative_to(_PACKAGE.parent)}:{own[-1].lineno}" if own else ""
    return f"{stack[-1].name}{line}"


def _ranks(ranks: list[int]) -> str:
    """As 'rank 3' or 'ranks 0-2, 4'."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"
