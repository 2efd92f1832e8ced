"""Memory snapshots: written where memory ran out, and only there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hbp_titan.components.profiling import memory_snapshot
from hbp_titan.job_config import Profiling

ASKED = Profiling(enable_memory_snapshot=True)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A GPU is pretended; what is called of its allocator is noted."""
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **how: calls.append(f"record {how}"))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: calls.append(f"dump {Path(path).name}"))
    return calls


def _run_out() -> None:
    try:
        raise torch.OutOfMemoryError("CUDA out of memory")
    except torch.OutOfMemoryError as error:
        raise RuntimeError("out of memory at level 8K/cp2") from error


def test_a_snapshot_is_written_where_memory_runs_out(calls: list[str], tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="8K/cp2"), memory_snapshot(ASKED, tmp_path, 3):
        _run_out()
    assert calls == ["record {'max_entries': 100000}", "dump rank3.pickle", "record {'enabled': None}"]


def test_another_error_and_a_run_that_did_not_ask_write_none(calls: list[str], tmp_path: Path) -> None:
    with pytest.raises(KeyError), memory_snapshot(ASKED, tmp_path, 0):
        raise KeyError("x")
    assert [call.split()[0] for call in calls] == ["record", "record"]
    with pytest.raises(RuntimeError), memory_snapshot(Profiling(), tmp_path, 0):
        _run_out()
    assert len(calls) == 2


@pytest.mark.gpu
def test_a_gpus_snapshot_names_the_allocations(tmp_path: Path) -> None:
    with pytest.raises(torch.OutOfMemoryError), memory_snapshot(ASKED, tmp_path, 0):
        torch.empty(2**50, dtype=torch.uint8, device="cuda")
    assert (tmp_path / "memory_snapshot" / "rank0.pickle").stat().st_size > 1000
