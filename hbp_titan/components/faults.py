"""What can go wrong while training, and how the run ends or continues: NaN guard, preemption, watchdog.

NonFiniteGuard  a step with a NaN or infinite loss or gradient: names the samples; stops the run or skips the step
Preemption      SIGTERM or SIGUSR1: all ranks save after the same step and exit
Watchdog        no progress: reports where each rank is, and ends a rank that does not end by itself

Owns training.on_nonfinite, and in the run folder nonfinite.jsonl and the marker file `preempted`.
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
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from hbp_titan.data.batch import PackedBatch
from hbp_titan.distributed.world import World, gather_values
from hbp_titan.errors import UserError
from hbp_titan.job_config import Training
from hbp_titan.packing import Plan
from hbp_titan.packing.level import level_name
from hbp_titan.utils import first_n

NONFINITE_FILE = "nonfinite.jsonl"
PREEMPTED_FILE = "preempted"
MAX_LISTED = 10
"""Packs, and samples per pack, in a message; nonfinite.jsonl has all of them."""
# sysexits.h, EX_TEMPFAIL: try again later.
EXIT_PREEMPTED = 75
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# Fractions of a place's timeout after which the watchdog reports, and ends the rank.
WARN_AT, KILL_AT = 0.9, 1.2
# A rank that received a signal counts as stuck after this many seconds without progress, and after this many times the
# longest earlier wait of the same kind. torchrun kills after 30 s.
STUCK_SECONDS, STUCK_FACTOR = 10.0, 3.0
_PACKAGE = Path(__file__).resolve().parents[1]


class NonFiniteGuard:
    """Stops the run, or skips the step, when a loss or gradient is not finite, and records the samples.

    Call `observe` for every micro-batch, `handle` after a step that is not finite, `reset` after every step. Whether a
    step is finite follows from sums that all ranks have, so all ranks decide alike; only `handle` communicates.
    steps and samples count what was skipped over the whole run, restarts included.
    """

    def __init__(self, config: Training, run_folder: Path, world: World, where: Callable[[int], str]) -> None:
        self.config = config
        self.path = run_folder / NONFINITE_FILE
        self.world = world
        self.where = where  # sample id -> "file:line" of its row
        self.steps = 0
        self.samples = 0
        # Per micro-batch: index in the plan, level, sample ids, losses per sample (still on the device).
        self._observed: list[tuple[int, int, NDArray[np.int64], Tensor]] = []

    def observe(self, micro_batch: int, batch: PackedBatch, losses: Tensor) -> None:
        """Keep what `handle` would need of this micro-batch, without synchronizing with the device."""
        self._observed.append((micro_batch, batch.level, batch.sample_ids, losses))

    def reset(self) -> None:
        """Forget the micro-batches of the step."""
        self._observed = []

    def state(self) -> dict[str, int]:
        """Return the counts for a checkpoint."""
        return {"steps": self.steps, "samples": self.samples}

    def restore(self, state: dict[str, int]) -> None:
        """Continue from the counts of a checkpoint."""
        self.steps, self.samples = state["steps"], state["samples"]

    def handle(self, plan: Plan, step: int, step_in_plan: int, losses: Sequence[float], grad_norm: float) -> str:
        """Record optimizer step `step`, which was not applied, and return the message if it is to be skipped.

        A collective. losses: sums of the token losses over all ranks, per level. Raises UserError on all ranks if the
        run has to stop.
        """
        packs = self._nonfinite_packs(plan)
        first, last = plan.step_offsets[step_in_plan : step_in_plan + 2].tolist()
        samples = plan.samples_of(first, last).tolist()
        planned = plan.pack_levels[slice(*plan.pack_offsets[[first, last]])]
        level_indices = [pack["level"] for pack in packs] or np.unique(planned).tolist()
        levels = list(dict.fromkeys(level_name(plan.levels[k]) for k in level_indices))
        skips = self.config.on_nonfinite == "skip" and self.steps < self.config.max_nonfinite_steps
        if self.world.rank == 0:
            event = {"step": step, "epoch": plan.epoch, "levels": levels, "action": "skip" if skips else "stop"}
            event |= {"losses": [*map(_json_number, losses)], "grad_norm": _json_number(grad_norm)}
            self._append({**event, "packs_at_fault": packs, "samples": samples})
        cause = self._describe(packs, len(samples))
        message = f"step {step}, level {', '.join(levels)}: {cause}; gradient norm {grad_norm}; parameters not updated"
        if not skips:
            raise UserError([f"{message}{self._advice()}"])
        self.steps += 1
        self.samples += len(samples)
        return (
            f"{message}: step skipped, {len(samples):,} samples not trained; skipped step {self.steps} of at most "
            f"{self.config.max_nonfinite_steps}"
        )

    def describe(self) -> str:
        """Return the summary line for the end of a run."""
        return f"skipped      {self.steps} steps that were not finite, {self.samples:,} samples ({self.path})"

    def _advice(self) -> str:
        listed = f"{self.path} lists every sample id"
        if self.config.on_nonfinite == "stop":
            return f'; {listed}; fix these rows, lower optimizer.lr, or set training.on_nonfinite = "skip"'
        return f"; {self.steps} steps already skipped, as many as training.max_nonfinite_steps allows; {listed}"

    def _nonfinite_packs(self, plan: Plan) -> list[dict[str, Any]]:
        """Return the packs of the step whose loss is not finite on some rank, each with all such ranks."""
        mine = [
            (index, level, self.world.rank // plan.levels[level].cp_degree, sample_ids.tolist())
            for index, level, sample_ids, losses in self._observed
            if not math.isfinite(losses.sum().item())
        ]
        packs: dict[tuple[int, int], dict[str, Any]] = {}
        for rank, found in enumerate(gather_values(mine)):
            for index, level, dp_rank, samples in found:
                pack = {"micro_batch": index, "level": level, "dp_rank": dp_rank, "ranks": [], "samples": samples}
                packs.setdefault((index, dp_rank), pack)["ranks"].append(rank)
        return [packs[key] for key in sorted(packs)]

    def _describe(self, packs: Sequence[dict[str, Any]], num_samples: int) -> str:
        if not packs:
            return f"every loss is finite, but the gradient of its {num_samples:,} samples is not"
        parts = []
        for pack in packs:
            ids = pack["samples"]
            # A lookup per listed sample only: a pack may hold thousands.
            samples = first_n([f"{i} ({self.where(i)})" for i in ids[:MAX_LISTED]] + ids[MAX_LISTED:], MAX_LISTED)
            ranks = first_n(pack["ranks"], MAX_LISTED)
            parts.append(f"on rank {ranks} in micro-batch {pack['micro_batch']}, samples {samples}")
        return f"the loss is not finite {first_n(parts, MAX_LISTED, '; ')}"

    def _append(self, event: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")


def _json_number(value: float) -> float | str:
    """Return a number that JSON can hold; NaN and infinity as text."""
    return value if math.isfinite(value) else str(value)


class Preempted(SystemExit):
    """The run has saved and exits for a signal; the same command resumes it."""

    def __init__(self) -> None:
        super().__init__(EXIT_PREEMPTED)


class Preemption:
    """Context manager that records SIGTERM and SIGUSR1 in `received`, while a checkpoint of the run can be saved.

    The marker file says why the run ended: torchrun exits with 1 whatever its ranks return.
    """

    def __init__(self, run_folder: Path, enabled: bool) -> None:
        self.file = run_folder / PREEMPTED_FILE
        self.enabled = enabled
        self.received = 0
        self._handlers_before: dict[signal.Signals, Any] = {}
        self._pipe: tuple[int, int] | None = None
        # The watchdog's thread reads the pipe that the main thread closes.
        self._pipe_lock = threading.Lock()
        self._polled = 0

    def __enter__(self) -> Preemption:
        if self.enabled:
            self._pid = os.getpid()
            self._pipe = os.pipe()
            for end in self._pipe:
                os.set_blocking(end, False)
            self._wakeup_before = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
            self._handlers_before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)
        if self._pipe is not None:
            signal.set_wakeup_fd(self._wakeup_before)
            with self._pipe_lock:
                pipe, self._pipe = self._pipe, None
                for end in pipe:
                    os.close(end)

    def poll_signal(self) -> int:
        """Return the signal that this process received, 0 if none; for threads other than the main one."""
        # `received` is set by a Python handler, which cannot run while the main thread waits in a collective. The
        # interpreter's C handler writes the number into the pipe at once.
        with self._pipe_lock:
            try:
                numbers = os.read(self._pipe[0], 64) if self._pipe is not None else b""
            except BlockingIOError:
                numbers = b""
        self._polled = next((number for number in numbers if number in SIGNALS), self._polled)
        return self._polled

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() == self._pid:
            self.received = number
            return
        # A forked loader worker inherits the handler, but has nothing to save.
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    def write_marker(self, number: int, step: int) -> str:
        """Write the marker file and return the message. number: the signal, which any rank may have received."""
        name = signal.Signals(number).name
        self.file.write_text(f"{name} step {step}\n", encoding="utf-8")
        return (
            f"{name} received: checkpoint saved at step {step}; rerun the same command to resume "
            f"(exit code {EXIT_PREEMPTED})"
        )

    def remove_marker(self) -> None:
        """Remove the marker of an earlier start."""
        self.file.unlink(missing_ok=True)


class _Place(NamedTuple):
    where: str
    timeout: float
    since: float
    kind: str


class Watchdog:
    """Context manager around the run with a thread that reports missing progress and ends a stuck rank.

    The collectives have timeouts of their own. This thread reports a little earlier, because only it knows the step
    and the level, and it also covers waits that are not collectives (a loader, a file system).

    It ends a rank that received a signal and cannot reach the end of its step, where it would save: NCCL does not
    notice that a peer is gone. How long a normal wait takes is known from earlier waits of the same kind; a kind not
    seen before, and waits for a disk, are left to their timeouts.

    Args:
        store: shared by the ranks of the job and used by one watchdog per rank.
        end: ends the process with an exit code.
    """

    def __init__(self, rank: int, world_size: int, store: dist.Store, end: Callable[[int], None] = os._exit) -> None:
        self.rank = rank
        self.world_size = world_size
        self.store = store
        # Set while signals ask the run to save and exit: returns the signal received, or 0.
        self.signal_received: Callable[[], int] = lambda: 0
        self._longest: dict[str, float] = {}
        self._end = end
        # Replaced as a whole: the thread never combines the time of one place with the timeout of another.
        self._place = _Place("the start", math.inf, time.monotonic(), "")
        self._watched = threading.get_ident()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def heartbeat(self, where: str, timeout_seconds: float = math.inf, kind: str = "") -> None:
        """Report progress: the work described by `where` begins, and may take `timeout_seconds`.

        kind: names work that takes about equally long each time, so that a stuck rank differs from a busy one.
        """
        now, before = time.monotonic(), self._place
        if before.kind:
            self._longest[before.kind] = max(self._longest.get(before.kind, 0.0), now - before.since)
        self._place = _Place(where, timeout_seconds, now, kind)

    @property
    def where(self) -> str:
        """What the main thread is doing."""
        return self._place.where

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        reported = False
        while not self._stop.wait(min(1.0, 0.05 * self._place.timeout)):
            place = self._place
            idle, timeout = time.monotonic() - place.since, place.timeout
            if idle > self._stuck_after(place.kind) and (number := self.signal_received()):
                name = signal.Signals(number).name
                self._exit(f"{name} received, but no progress for {idle:.0f} s in {place.where}, another rank is gone")
                return
            if idle <= WARN_AT * timeout:
                reported = False
            elif not reported:
                reported = True
                self._report(idle)
            elif idle > KILL_AT * timeout:
                self._exit(f"no progress for {idle:.0f} s")
                return

    def _stuck_after(self, kind: str) -> float:
        longest = self._longest.get(kind)
        return math.inf if longest is None else max(STUCK_SECONDS, STUCK_FACTOR * longest)

    def _exit(self, reason: str) -> None:
        print(f"rank {self.rank}: {reason}; exiting without saving", file=sys.stderr, flush=True)
        self._end(1)

    def _report(self, idle: float) -> None:
        """Publish where this rank is; the first rank to do so prints the places of all."""
        self.store.set(f"hbp_titan/stalled/{self.rank}", f"{self.where}: {innermost_call(self._watched)}")
        if self.store.add("hbp_titan/stalled", 1) != 1:
            return
        # The other ranks reach the same conclusion within a second or two.
        self._stop.wait(min(5.0, 0.1 * self._place.timeout))
        print(f"no progress for {idle:.0f} s:\n{self._places()}", file=sys.stderr, flush=True)

    def _places(self) -> str:
        """Return one line per place, with its ranks."""
        ranks_at: dict[str, list[int]] = {}
        for rank in range(self.world_size):
            key = f"hbp_titan/stalled/{rank}"
            no_response = "no response: process died or is stuck in native code"
            place = self.store.get(key).decode() if self.store.check([key]) else no_response
            ranks_at.setdefault(place, []).append(rank)
        return "\n".join(f"  {_format_ranks(ranks)} in {place}" for place, ranks in ranks_at.items())


def innermost_call(thread: int) -> str:
    """Return the innermost function of a thread, and the line of this package that called it."""
    frame = sys._current_frames().get(thread)
    stack = traceback.extract_stack(frame) if frame is not None else []
    if not stack:
        return "no stack"
    own = [entry for entry in stack if _PACKAGE in Path(entry.filename).parents]
    line = f" from {Path(own[-1].filename).relative_to(_PACKAGE.parent)}:{own[-1].lineno}" if own else ""
    return f"{stack[-1].name}{line}"


def _format_ranks(ranks: list[int]) -> str:
    """Return ascending ranks as text: 'rank 3' or 'ranks 0-2, 4'."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"
