"""Memory snapshots: written when memory runs out, and only then. Step traces are in tests/test_watch.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hbp_titan.components.profiling import memory_snapshot
from hbp_titan.job_config import Profiling

ENABLED = Profiling(enable_memory_snapshot=True)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Pretend that there is a GPU, and record the calls of its allocator."""
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **how: calls.append(f"record {how}"))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: calls.append(f"dump {Path(path).name}"))
    return calls


def _run_out_of_memory() -> None:
    try:
        raise torch.OutOfMemoryError("CUDA out of memory")
    except torch.OutOfMemoryError as error:
        raise RuntimeError("out of memory at level 8K/cp2") from error


def test_snapshot_is_written_when_memory_runs_out(calls: list[str], tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="8K/cp2"), memory_snapshot(ENABLED, tmp_path, 3):
        _run_out_of_memory()
    assert calls == ["record {'max_entries': 100000}", "dump rank3.pickle", "record {'enabled': None}"]


def test_no_snapshot_for_another_error_or_a_run_that_did_not_ask(calls: list[str], tmp_path: Path) -> None:
    with pytest.raises(KeyError), memory_snapshot(ENABLED, tmp_path, 0):
        raise KeyError("x")
    assert [call.split()[0] for call in calls] == ["record", "record"]
    with pytest.raises(RuntimeError), memory_snapshot(Profiling(), tmp_path, 0):
        _run_out_of_memory()
    assert len(calls) == 2


@pytest.mark.gpu
def test_snapshot_of_a_gpu_contains_the_allocations(tmp_path: Path) -> None:
    with pytest.raises(torch.OutOfMemoryError), memory_snapshot(ENABLED, tmp_path, 0):
        torch.empty(2**50, dtype=torch.uint8, device="cuda")
    assert (tmp_path / "memory_snapshot" / "rank0.pickle").stat().st_size > 1000
