"""metrics.jsonl across a resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hbp_titan.components.metrics import MetricsLogger, keep_steps_up_to


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
    }


def _logger(folder: Path, first_step: int, log_interval: int = 1) -> MetricsLogger:
    return MetricsLogger(folder, True, first_step, 10, log_interval=log_interval, tensorboard=False, progress_bar=False)


def test_resumed_run_replaces_the_steps_after_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(_values(step)) + "\n" for step in (1, 2, 3)) + '{"step": 4, "lo')
    keep_steps_up_to(path, 2)
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
