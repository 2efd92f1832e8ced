"""The lock of a run folder: who may take it over, that one of several starts does, and that it is released."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from hbp_titan.components import run_folder
from hbp_titan.components.run_folder import (
    HIDDEN,
    LOCK_FILE,
    STALE_SECONDS,
    Holder,
    RunLock,
    check_not_in_use,
    process_start,
    read_holder,
)

NOW = time.time()
OWN = Holder("node1", "boot1", 500, "9000", torchrun_job="b", slurm_job="c/7", slurm_restarts=1, id="own")
OTHER = Holder("node2", "boot2", 400, "8000", "2026-11-28 10:00:00 UTC", torchrun_job="a", slurm_job="c/6", id="other")
LOCAL = dataclasses.replace(OTHER, host="node1", machine="boot1")


class _World:
    rank = 0
    torchrun_job = "b"


def _lock(folder: Path, end: Any = None) -> RunLock:
    return RunLock(folder, _World(), end)  # type: ignore[arg-type]


def _write(folder: Path, holder: Holder | str, silent: float = 0.0) -> Path:
    """Write a lock whose last heartbeat is `silent` seconds old."""
    path = folder / LOCK_FILE
    path.write_text(holder if isinstance(holder, str) else json.dumps(dataclasses.asdict(holder)))
    os.utime(path, (time.time() - silent,) * 2)
    return path


@pytest.mark.parametrize(
    ("holder", "running", "silent", "words"),
    [
        (LOCAL, "8000", 9e9, ""),  # stopped in a debugger, perhaps
        (LOCAL, HIDDEN, 9e9, ""),
        (LOCAL, "", 0, "has ended"),
        (LOCAL, "8001", 0, "has ended"),  # the id is another process's now
        (OTHER, "", STALE_SECONDS - 1, ""),
        (OTHER, "", STALE_SECONDS + 1, "last heartbeat was 5 min 1 s ago"),
        (dataclasses.replace(LOCAL, machine="boot0"), "", 0, ""),  # another container, or before a reboot
        (dataclasses.replace(OTHER, torchrun_job="b"), "", 0, "torchrun"),
        (dataclasses.replace(OTHER, slurm_job="c/7"), "", 0, "SLURM has requeued its job 7"),
        (dataclasses.replace(OTHER, slurm_job="c/7", slurm_restarts=1), "", 0, ""),  # a second start within the job
        (dataclasses.replace(OTHER, torchrun_job="", slurm_job="", machine=""), "", 0, ""),
        (Holder(), "", 0, ""),
        (Holder(), "", STALE_SECONDS + 1, "last heartbeat"),
    ],
)
def test_a_lock_is_left_over_only_if_its_holder_is_known_to_be_gone(
    monkeypatch: pytest.MonkeyPatch, holder: Holder, running: str, silent: float, words: str
) -> None:
    monkeypatch.setattr(run_folder, "process_start", lambda process: running)
    reason = holder.why_gone(OWN, silent)
    assert words in reason
    assert bool(reason) == bool(words)


def test_a_start_on_a_folder_in_use_names_the_run_and_leaves_the_lock(tmp_path: Path) -> None:
    path = _write(tmp_path, OTHER, silent=40)
    text = path.read_text()
    for start in (_lock(tmp_path)._acquire, lambda: check_not_in_use(tmp_path)):
        with pytest.raises(ValueError, match="in use") as caught:
            start()
        assert "host node2, process 400, since 2026-11-28 10:00:00 UTC" in str(caught.value)
        assert "--job.dump_folder" in str(caught.value)
        assert "40 s ago" in str(caught.value)
    assert path.read_text() == text
    assert list(tmp_path.iterdir()) == [path]
    _write(tmp_path, OTHER, silent=STALE_SECONDS + 1)
    check_not_in_use(tmp_path)
    check_not_in_use(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("links", [True, False])
def test_a_lock_is_held_once_and_released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError(1, "not permitted")))
    folder = tmp_path / "new" / "run"
    first = _lock(folder)
    first._acquire()
    assert read_holder(folder / LOCK_FILE) == first.own
    # This process lives.
    with pytest.raises(ValueError, match=f"process {os.getpid()}"):
        _lock(folder)._acquire()
    first.__exit__()
    assert list(folder.iterdir()) == []
    second = _lock(folder)
    second._acquire()
    second.__exit__()


def test_a_killed_run_leaves_a_lock_that_the_next_start_takes_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    gone = dataclasses.replace(
        _lock(tmp_path).own, process=child.pid, process_start=process_start(child.pid), torchrun_job=""
    )
    assert gone.process_start
    _write(tmp_path, gone)
    with pytest.raises(ValueError, match="in use"):
        _lock(tmp_path)._acquire()
    child.kill()
    # Not waited for: a zombie has ended, too.
    while process_start(child.pid):
        time.sleep(0.01)
    lock = _lock(tmp_path)
    lock._acquire()
    assert f"taken over from host {gone.host}, process {child.pid}" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == [LOCK_FILE]
    assert read_holder(tmp_path / LOCK_FILE) == lock.own
    lock.__exit__()
    child.wait()


def test_a_lock_that_is_released_while_it_is_looked_at_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _write(tmp_path, OTHER)
    read = run_folder.read_holder

    def released(lock: Path) -> Holder | None:
        holder = read(lock)
        lock.unlink(missing_ok=True)
        return holder

    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "read_holder", released)
        check_not_in_use(tmp_path)
        _write(tmp_path, OTHER)
        lock = _lock(tmp_path)
        lock.take(path)
    assert read_holder(path) == lock.own


def test_a_process_that_cannot_be_looked_at_is_not_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    def hidden(*_: Any, **__: Any) -> str:
        raise PermissionError

    assert process_start(os.getpid()) == process_start(os.getpid())
    monkeypatch.setattr(Path, "read_text", hidden)
    assert process_start(os.getpid()) == HIDDEN
    # Above the largest process id.
    assert process_start(1 << 30) == ""


def test_a_start_that_died_while_it_took_over_blocks_no_other(tmp_path: Path) -> None:
    _write(tmp_path, OTHER, silent=STALE_SECONDS + 1)
    claim = tmp_path / f"{LOCK_FILE}.{OTHER.id}"
    claim.write_text(json.dumps(dataclasses.asdict(dataclasses.replace(LOCAL, id="died"))))
    with pytest.raises(ValueError, match="in use"):
        _lock(tmp_path)._acquire()
    os.utime(claim, (NOW - STALE_SECONDS - 60,) * 2)
    lock = _lock(tmp_path)
    lock._acquire()
    assert [path.name for path in tmp_path.iterdir()] == [LOCK_FILE]
    lock.__exit__()


def _race(folder: Path, barrier: Any, winners: Any) -> None:
    lock = _lock(folder)
    barrier.wait()
    try:
        lock.take(lock.path)
    except ValueError:
        winners.put(None)
    else:
        winners.put(lock.own.id)
    # The losers must find the winner alive.
    barrier.wait()


@pytest.mark.parametrize("leftover", [True, False])
def test_one_of_several_starts_at_the_same_time_wins(tmp_path: Path, leftover: bool) -> None:
    context = multiprocessing.get_context("fork")
    for number in range(10):
        folder = tmp_path / str(number)
        folder.mkdir()
        if leftover:
            _write(folder, OTHER, silent=STALE_SECONDS + 1)
        barrier, winners = context.Barrier(3), context.Queue()
        racers = [context.Process(target=_race, args=(folder, barrier, winners)) for _ in range(3)]
        for racer in racers:
            racer.start()
        found = [name for name in (winners.get(timeout=60) for _ in racers) if name]
        for racer in racers:
            racer.join()
        assert len(found) == 1
        assert [path.name for path in folder.iterdir()] == [LOCK_FILE]
        holder = read_holder(folder / LOCK_FILE)
        assert holder is not None
        assert holder.id == found[0]


def test_a_late_start_that_judged_the_old_lock_does_not_replace_the_new_one(tmp_path: Path) -> None:
    _write(tmp_path, OTHER, silent=STALE_SECONDS + 1)
    first, late = _lock(tmp_path), _lock(tmp_path)
    first._acquire()
    assert not late._take_over(late.path, OTHER)
    assert read_holder(late.path) == first.own
    assert [path.name for path in tmp_path.iterdir()] == [LOCK_FILE]
    first.__exit__()


def test_a_run_that_lost_its_lock_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_folder, "HEARTBEAT_SECONDS", 0.005)
    ended: list[int] = []
    lock = _lock(tmp_path, ended.append)
    lock._acquire()
    # Its heartbeat.
    _write(tmp_path, lock.own, silent=1000)
    while time.time() - lock.path.stat().st_mtime > 500:
        time.sleep(0.005)
    # Deleted by hand: it is held again.
    lock.path.unlink()
    while read_holder(lock.path) != lock.own:
        time.sleep(0.005)
    assert ended == []
    temporary = tmp_path / "new"
    temporary.write_text(json.dumps(dataclasses.asdict(OTHER)))
    temporary.rename(lock.path)
    lock._thread.join(60)
    assert ended == [1]
    assert "taken over by host node2" in capsys.readouterr().err
    lock.__exit__()
    # It is the other run's.
    assert read_holder(lock.path) == OTHER
