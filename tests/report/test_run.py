"""metrics.jsonl as columns, of whole, running and killed runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from hbp_titan.report.run import StepLog, read_steps


def _read(folder: Path, *lines: Any, end: str = "") -> StepLog:
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + end, encoding="utf-8")
    return read_steps(folder / "metrics.jsonl")


def test_column_has_a_value_per_step_or_nan(tmp_path: Path) -> None:
    log = _read(
        tmp_path,
        {"step": 1, "loss": 3.5, "sources": {"a": {"tokens": 7}}},
        {"step": 2, "loss": None, "sources": {"b": {"tokens": 9}, "a": {"tokens": 1}}},
    )
    assert log.steps.tolist() == [1, 2]
    assert log.column("loss")[0] == 3.5
    assert np.isnan(log.column("loss")[1])
    assert log.names("sources") == ["a", "b"]
    assert log.column("sources", "a", "tokens").tolist() == [7, 1]
    assert log.present("sources", "b").tolist() == [False, True]
    assert np.isnan(log.column("no such key")).all()
    assert log.has("loss")
    assert not log.has("sources")


def test_incomplete_last_line_is_ignored_and_noted(tmp_path: Path) -> None:
    log = _read(tmp_path, {"step": 1, "loss": 1.0}, end='{"step": 2, "lo')
    assert (log.steps.tolist(), log.cut, log.unreadable) == ([1], True, 0)


def test_lines_that_are_not_steps_are_counted(tmp_path: Path) -> None:
    log = _read(tmp_path, "[]", '{"step": "2"}', '{"step": true}', {"step": 3}, "{", '{"loss": 1}', "[" * 9000)
    assert (log.steps.tolist(), log.cut, log.unreadable) == ([3], False, 6)


def test_last_line_of_a_repeated_step_counts(tmp_path: Path) -> None:
    log = _read(
        tmp_path,
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 2.0, "skipped": "not finite"},
        {"step": 3, "loss": 3.0},
        {"step": 2, "loss": 2.5},
    )
    assert log.steps.tolist() == [1, 2, 3]
    assert log.column("loss").tolist() == [1.0, 2.5, 3.0]
    assert log.skipped == {}


def test_levels_are_sorted_shortest_first(tmp_path: Path) -> None:
    log = _read(
        tmp_path,
        {"step": 1, "level_name": "16K/cp4", "loss_by_level": {"16K/cp4": 4.0}},
        {"step": 2, "level_name": "1K/cp1+16K/cp4", "loss_by_level": {"1K/cp1": 1.0, "16K/cp4": None}},
        {"step": 3, "level_name": "1000/cp1+16K/cp2", "loss_by_level": {"1000/cp1": 3.0, "16K/cp2": 5.0}},
    )
    assert log.levels == ["1000/cp1", "1K/cp1", "16K/cp2", "16K/cp4"]
    assert log.present("loss_by_level", "16K/cp4").tolist() == [True, True, False]


def test_work_of_ranks_and_newest_expert_counts_are_kept(tmp_path: Path) -> None:
    log = _read(
        tmp_path,
        {"step": 1, "timing_check": {"work_by_rank": [1, 2]}, "tokens_per_expert": {"0": [1, 1]}},
        {"step": 2, "timing_check": {"work_by_rank": [3, 4.5]}, "tokens_per_expert": {"0": [5, 6]}},
    )
    assert log.work_by_rank == [(1, [1.0, 2.0]), (2, [3.0, 4.5])]
    assert log.experts.newest is not None
    assert (log.experts.layers, log.experts.newest[0], log.experts.newest[1].tolist()) == (["0"], 2, [[5, 6]])


def test_expert_tables_of_a_long_run_are_evenly_spaced_and_those_of_repeated_steps_the_last(tmp_path: Path) -> None:
    lines = [{"step": step, "tokens_per_expert": {"1": [step, 1]}} for step in range(1000)]
    resumed = [{"step": step, "tokens_per_expert": {"1": [step, 2]}} for step in range(900, 1010)]
    broken = [{"step": 2000, "tokens_per_expert": value} for value in ({"1": [1]}, {"1": ["x", 1]}, {"1": [0, 0]}, 3)]
    experts = _read(tmp_path, *lines, *resumed, *broken).experts
    steps = [step for step, _ in experts.all]
    assert 48 <= len(experts.kept) <= 96
    # 1010 tables at a distance of 16, then the newest one.
    assert set(np.diff(steps[:-1]).tolist()) <= {16, *range(1, 32)}
    assert np.diff(steps[:50]).tolist() == [16] * 49
    assert steps[-1] == 1009
    assert [table[0, 1] for step, table in experts.all if step >= 900] == [2] * sum(step >= 900 for step in steps)
