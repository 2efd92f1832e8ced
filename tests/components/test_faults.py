"""Preemption's signal handling, and what the watchdog reports and ends. The NaN guard is in tests/test_nonfinite.py."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

from hbp_titan.components import faults
from hbp_titan.components.faults import Preemption, Watchdog, innermost_call
from hbp_titan.errors import exit_on_user_error


def test_signals_are_recorded_inside_and_handlers_are_restored_outside(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)
    with Preemption(tmp_path, enabled=True) as preemption:
        assert preemption.received == 0
        signal.raise_signal(signal.SIGUSR1)
        assert preemption.received == signal.SIGUSR1
        signal.raise_signal(signal.SIGTERM)
        assert preemption.received == signal.SIGTERM
        assert [preemption.poll_signal(), preemption.poll_signal()] == [signal.SIGUSR1] * 2
        child = os.fork()
        if child == 0:
            # A loader worker has nothing to save and must end.
            signal.raise_signal(signal.SIGTERM)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == signal.SIGTERM
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)) == before
    with Preemption(tmp_path, enabled=False):
        assert signal.getsignal(signal.SIGTERM) == before[0]


def _watchdog(codes: list[int], where: str, timeout: float, rank: int = 0, store: dist.Store | None = None) -> Watchdog:
    watchdog = Watchdog(rank, 4, store or dist.HashStore(), end=codes.append)
    # Before its thread starts, which polls the more often the shorter the timeout is.
    watchdog.heartbeat(where, timeout)
    return watchdog


def _stand(until: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 60
    while not until() and time.monotonic() < give_up:
        time.sleep(0.02)


def test_stalled_ranks_are_reported_once_by_place(capsys: pytest.CaptureFixture[str]) -> None:
    store, codes = dist.HashStore(), [list[int]() for _ in range(3)]
    places = ["step 7, level 8K/cp2", "step 7, level 8K/cp2", "reading"]

    def all_reported() -> bool:
        keys = [f"hbp_titan/stalled/{rank}" for rank in range(3)]
        return store.check(keys) and store.add("hbp_titan/stalled", 0) == 3

    def stall(rank: int) -> None:
        with _watchdog(codes[rank], places[rank], 3.0, rank, store):
            _stand(all_reported)

    # A rank is ended 0.9 s after it reports: a busy machine may delay the others by as much.
    ranks = [threading.Thread(target=stall, args=(rank,)) for rank in range(3)]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join()
    first, *lines = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"no progress for [234] s:", first)
    assert [line.partition(": ")[0] for line in lines] == [
        "  ranks 0-1 in step 7, level 8K/cp2",
        "  rank 2 in reading",
        "  rank 3 in no response",
    ]
    assert re.search(r": (_stand|all_reported)$", lines[0])
    assert codes == [[], [], []]


def test_rank_that_does_not_end_is_ended(capsys: pytest.CaptureFixture[str]) -> None:
    codes: list[int] = []
    with _watchdog(codes, "step 1", 0.3):
        _stand(lambda: bool(codes))
    assert codes == [1]
    assert "rank 0: no progress for" in capsys.readouterr().err


def test_progress_and_work_without_a_limit_are_not_reported(capsys: pytest.CaptureFixture[str]) -> None:
    codes: list[int] = []
    with _watchdog(codes, "step 0", 1.0) as watchdog:
        for step in range(10):
            watchdog.heartbeat(f"step {step}", 1.0)
            time.sleep(0.1)
        watchdog.heartbeat("an export, which takes its time")
        time.sleep(1.1)
    assert (codes, capsys.readouterr().err) == ([], "")


@pytest.mark.parametrize(
    ("kind", "signal_number", "expected"), [("level", signal.SIGTERM, [1]), ("level", 0, []), ("", signal.SIGTERM, [])]
)
def test_signalled_rank_is_ended_if_a_wait_outlasts_all_earlier_ones_of_its_kind(
    kind: str, signal_number: int, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faults, "STUCK_SECONDS", 0.1)
    codes: list[int] = []
    with _watchdog(codes, "the start", 4.0) as watchdog:
        watchdog.signal_received = lambda: signal_number
        watchdog.heartbeat("step 1", 4.0, kind="level")
        time.sleep(0.3)
        watchdog.heartbeat("step 2", 4.0, kind=kind)
        time.sleep(0.6)
        # Twice the time of the first wait: busy, not stuck.
        assert codes == []
        time.sleep(0.7)
    assert codes == expected


def test_innermost_call_names_the_line_of_the_package_that_made_it() -> None:
    release = threading.Event()
    thread = threading.Thread(target=lambda: exit_on_user_error(lambda: release.wait(20)))
    thread.start()
    time.sleep(0.1)
    assert thread.ident is not None
    found = innermost_call(thread.ident)
    release.set()
    thread.join()
    assert re.fullmatch(r"wait from hbp_titan/errors\.py:\d+", found)
