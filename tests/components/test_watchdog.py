"""What the watchdog says of ranks that stand still, and when it says nothing."""

from __future__ import annotations

import re
import signal
import threading
import time

import pytest
import torch.distributed as dist

from hbp_titan.cli import guarded
from hbp_titan.components import watchdog as watchdog_module
from hbp_titan.components.watchdog import Watchdog, place_of


def _stand(seconds: float) -> None:
    time.sleep(seconds)


def _rank(rank: int, store: dist.Store, where: str, codes: list[int], seconds: float, timeout: float = 1.0) -> None:
    with Watchdog(rank, 4, store, end=codes.append) as watchdog:
        watchdog.at(where, timeout)
        _stand(seconds)


def test_ranks_that_stand_still_are_told_once_and_by_place(capsys: pytest.CaptureFixture[str]) -> None:
    store, codes = dist.HashStore(), [list[int]() for _ in range(3)]
    places = ["step 7, level 8K/cp2", "step 7, level 8K/cp2", "reading"]
    ranks = [threading.Thread(target=_rank, args=(i, store, places[i], codes[i], 3.4, 3.0)) for i in range(3)]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join()
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "nothing has moved for 3 s:"
    assert [line.partition(": ")[0] for line in told[1:]] == [
        "  ranks 0-1 in step 7, level 8K/cp2",
        "  rank 2 in reading",
        "  rank 3 in no word",
    ]
    assert told[1].endswith(": _stand")
    assert codes == [[], [], []]


def test_a_rank_that_does_not_end_is_ended(capsys: pytest.CaptureFixture[str]) -> None:
    codes: list[int] = []
    _rank(0, dist.HashStore(), "step 1", codes, 2.5)
    assert codes == [1]
    assert re.search(r"rank 0 is ended after [12] s without progress", capsys.readouterr().err)


def test_progress_is_not_told(capsys: pytest.CaptureFixture[str]) -> None:
    codes: list[int] = []
    with Watchdog(0, 1, dist.HashStore(), end=codes.append) as watchdog:
        for step in range(12):
            watchdog.at(f"step {step}", timeout_seconds=2.0)
            time.sleep(0.2)
        watchdog.at("an export, which takes its time")
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
        watchdog.at("step 1", 4.0, kind="level")
        time.sleep(0.3)
        watchdog.at("step 2", 4.0, kind=kind)
        time.sleep(0.6)  # twice the time of before: busy, not stuck
        assert codes == []
        time.sleep(0.7)
    assert codes == code
    line = "rank 0: SIGTERM, but no progress for 1 s in step 2: another rank is gone; ends without saving\n"
    assert capsys.readouterr().err == (line if code else "")


def test_the_place_names_the_line_of_the_package_that_a_call_comes_from() -> None:
    release = threading.Event()
    thread = threading.Thread(target=lambda: guarded(lambda: release.wait(20)))
    thread.start()
    time.sleep(0.1)
    assert thread.ident is not None
    found = place_of(thread.ident)
    release.set()
    thread.join()
    assert re.fullmatch(r"wait from hbp_titan/cli\.py:\d+", found)
