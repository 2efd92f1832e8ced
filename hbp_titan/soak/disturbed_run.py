"""A run that is killed from outside, at moments that its run folder shows, and started again until it is complete.

Owns the moments and the supervisor. A rank that is killed is started again by torchrun, which lives on; where all are
killed, torchrun too, the supervisor starts the same command again.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

from hbp_titan.components.checkpoint_storage import PARTIAL
from hbp_titan.data.consumed import FOLDER, attempt_folders
from hbp_titan.soak.processes import kill_tree, ranks_of

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
                seen = len(attempt_folders(self.folder / FOLDER))
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
        """Return at the moment of `kill`; False where the run or the time is over before. seen: attempts by then."""
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
            return len(attempt_folders(self.folder / FOLDER)) > seen
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
