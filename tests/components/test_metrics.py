"""metrics.jsonl across a resume, and the counts per source."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hbp_titan.components.metrics import MetricsLogger, keep_steps_up_to
from hbp_titan.components.step_record import count_sources
from hbp_titan.components.summary import describe_totals
from hbp_titan.packing import Level, build_plan


def _values(step: int) -> dict[str, object]:
    return {
        "step": step,
        "level_name": "1K/cp1",
        "loss": 2.5,
        "grad_norm": 1.0,
        "lr": 1e-3,
        "tokens_per_second": 12345.6,
        "mfu": None,
        "padding": 0.5,
        "data_wait_seconds": 0.0,
        "step_seconds": 2.0,
        "peak_memory_gib": 0.1,
        "sources": {"chat": {"samples": 2, "tokens": 30, "trained_tokens": 20}},
    }


def _logger(folder: Path, first_step: int, log_interval: int = 1) -> MetricsLogger:
    return MetricsLogger(folder, True, first_step, 10, log_interval=log_interval, tensorboard=False, progress_bar=False)


def test_resumed_run_replaces_the_steps_after_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(_values(step)) + "\n" for step in (1, 2, 3)) + '{"step": 4, "lo')
    assert [kept["step"] for kept in keep_steps_up_to(path, 2)] == [1, 2]
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_each_step_is_written_and_the_interval_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with _logger(tmp_path, 0, log_interval=3) as logger:
        for step in range(1, 6):
            logger.log(_values(step))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["1/10", "3/10"]
    assert "tok/s 12,346" in lines[0]
    assert "eta 00:00:18" in lines[0]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 5


def test_sources_are_counted_over_a_resume(tmp_path: Path) -> None:
    with _logger(tmp_path, 0) as logger:
        for step in (1, 2, 3):
            logger.log(_values(step))
    code = {"code": {"samples": 1, "tokens": 7, "trained_tokens": 5}}
    with _logger(tmp_path, 2) as logger:
        logger.log({**_values(3), "sources": code})
    assert logger.sources == {"chat": {"samples": 4, "tokens": 60, "trained_tokens": 40}, **code}
    table = describe_totals([], logger.sources).splitlines()[1:]
    assert [line.split() for line in table] == [
        ["source", "samples", "tokens", "trained"],
        ["chat", "4", "60", "40"],
        ["code", "1", "7", "5"],
    ]


def test_tensorboard_has_the_tokens_of_each_source_so_far(tmp_path: Path) -> None:
    with MetricsLogger(tmp_path, True, 0, 10, log_interval=9, tensorboard=True, progress_bar=False) as logger:
        for step in (1, 2):
            logger.log(_values(step))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("source/chat/tokens")] == [(1, 30), (2, 60)]


def test_a_steps_samples_are_counted_by_source() -> None:
    plan = build_plan([3, 4, 5, 6], [Level(16)], 1, loss_tokens=np.array([2, 3, 1, 0]))
    store = SimpleNamespace(sources=np.array([1, 0, 1, 2], np.uint16), source_names=["a", "b", "c"])
    assert count_sources(plan, np.array([0, 2, 1]), store) == {
        "a": {"samples": 1, "tokens": 4, "trained_tokens": 3},
        "b": {"samples": 2, "tokens": 8, "trained_tokens": 3},
    }
