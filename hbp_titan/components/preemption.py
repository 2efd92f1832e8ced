"""Preemption: a signal asks a run to save and leave, and every rank leaves after the same step.

Owns the signals, the exit code and the file `preempted` in the run folder that tells a launcher why the run ended:
torchrun itself exits with 1 whatever its ranks say.
"""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

# sysexits.h, EX_TEMPFAIL: try again later.
EXIT_PREEMPTED = 75
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
FILE = "preempted"


class Preempted(SystemExit):
    """The run has saved and ends for a signal; the same command goes on from there."""

    def __init__(self) -> None:
        super().__init__(EXIT_PREEMPTED)


class Preemption:
    """Notes SIGTERM and SIGUSR1 while it is entered, which is where a checkpoint can be made of the run."""

    def __init__(self, run_folder: Path, enabled: bool) -> None:
        self.file = run_folder / FILE
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

    def seen(self) -> int:
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

    def leave(self, number: int, step: int) -> str:
        """Write `preempted`; returns the line that says what happened. number: the signal that any rank got."""
        name = signal.Signals(number).name
        self.file.write_text(f"{name} step {step}\n", encoding="utf-8")
        return f"{name}: saved step {step}; the same command goes on from there (exit code {EXIT_PREEMPTED})"

    def clear(self) -> None:
        """Forget how an earlier start ended."""
        self.file.unlink(missing_ok=True)
