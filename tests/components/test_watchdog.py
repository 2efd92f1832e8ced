"""What the watchdog says of ranks that stand still, and when it says nothing."""

from __future__ import annotations

import re
import signal
import threading
import time
from collections.abc import Callable

import pytest
import torch.distributed as dist

from hbp_titan.components import faults as watchdog_module
from hbp_titan.components.faults import Watchdog, innermost_call
from hbp_titan.errors import exit_on_user_error


def _stand(until: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 60
    while not until() and time.monotonic() < give_up:
        time.sleep(0.02)


def _rank(
    rank: int, store: dist.Store, where: str, codes: list[int], until: Callable[[], bool], timeout: float
) -> None:
    with Watchdog(rank, 4, store, end=codes.append) as watchdog:
        watchdog.heartbeat(where, timeout)
        _stand(until)


def test_ranks_that_stand_still_are_told_once_and_by_place(capsys: pytest.CaptureFixture[str]) -> None:
    store, codes = dist.HashStore(), [list[int]() for _ in range(3)]
    places = ["step 7, level 8K/cp2", "step 7, level 8K/cp2", "reading"]

    def all_spoke() -> bool:
        return store.check([f"hbp_titan/stands/{rank}" for rank in range(3)]) and store.add("hbp_titan/stands", 0) == 3

    # A rank is ended 1.5 s after it spoke, which is also how late a busy machine may make another.
    ranks = [threading.Thread(target=_rank, args=(i, store, places[i], codes[i], all_spoke, 5.0)) for i in range(3)]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join()
    told = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"nothing has moved for [456] s:", told[0])
    assert [line.partition(": ")[0] for line in told[1:]] == [
        "  ranks 0-1 in step 7, level 8K/cp2",
        "  rank 2 in reading",
        "  rank 3 in no word",
    ]
    assert re.search(r": (_stand|all_spoke)$", told[1])
    assert codes == [[], [], []]


def test_a_rank_that_does_not_end_is_ended(capsys: pytest.CaptureFixture[str]) -> None:
    codes: list[int] = []
    _rank(0, dist.HashStore(), "step 1", codes, lambda: bool(codes), 1.0)
    assert codes == [1]
    assert re.search(r"rank 0 is ended after \d+ s without progress", capsys.readouterr().err)


def test_progress_is_not_told(capsys: pytest.CaptureFixture[str]) -> None:
    codes: list[int] = []
    with Watchdog(0, 1, dist.HashStore(), end=codes.append) as watchdog:
        for step in range(20):
            watchdog.heartbeat(f"step {step}", timeout_seconds=4.0)
            time.sleep(0.2)
        watchdog.heartbeat("an export, which takes its time")
        time.sleep(0.8)
    assert (codes, capsys.readouterr().err) == ([], "")


@pytest.mark.parametrize(
    ("kind", "signal_number", "code"),
    [("level", signal.SIGTERM, [1]), ("level", 0, []), ("unknown", 15, []), ("", 15, [])],
)
def test_a_rank_with_a_signal_ends_where_it_stands_longer_than_ever_before(
    kind: str, signal_number: int, code: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(watchdog_module, "STUCK_SECONDS", 0.2)
    codes: list[int] = []
    with Watchdog(0, 1, dist.HashStore(), end=codes.append) as watchdog:
        watchdog.signal_received = lambda: signal_number
        watchdog.heartbeat("step 1", 4.0, kind="level")
        time.sleep(0.3)
        watchdog.heartbeat("step 2", 4.0, kind=kind)
        time.sleep(0.6)  # twice the time of before: busy, not stuck
        assert codes == []
        time.sleep(0.7)
    assert codes == code
    line = "rank 0: SIGTERM, but no progress for 1 s in step 2: another rank is gone; ends without saving\n"
    assert capsys.readouterr().err == (line if code else "")


def test_the_place_names_the_line_of_the_package_that_a_call_comes_from() -> None:
    release = threading.Event()
    thread = threading.Thread(target=lambda: exit_on_user_error(lambda: release.wait(20)))
    thread.start()
    time.sleep(0.1)
    assert thread.ident is not None
    found = innermost_call(thread.ident)
    release.set()
    thread.join()
    assert re.fullmatch(r"wait from hbp_titan/errors\.py:\d+", found)
