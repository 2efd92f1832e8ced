"""Derived series and totals, on numbers that can be checked by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from hbp_titan.report.run import StepLog, read_steps
from hbp_titan.report.series import (
    combinations,
    edge_means,
    end_figures,
    level_steps,
    loss_at,
    smooth,
    total_seconds_by_rank,
    totals,
    whole_steps,
    window_of,
)


def _log(folder: Path, *lines: dict[str, object]) -> StepLog:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read_steps(folder / "metrics.jsonl")


def test_smooth_is_the_weighted_mean_of_the_last_values() -> None:
    values, weights = np.array([1.0, np.nan, 3.0, 5.0]), np.array([1.0, 9.0, 3.0, 1.0])
    smoothed = smooth(values, weights, 2)
    assert smoothed[[0, 2, 3]].tolist() == [1.0, 2.5, 3.5]
    assert np.isnan(smoothed[1])
    assert smooth(values[[0, 2]], np.zeros(2), 2).tolist() == [1.0, 2.0]
    assert [window_of(n) for n in (1, 100, 101, 4000)] == [5, 5, 6, 200]


def test_totals_weight_shares_by_their_base(tmp_path: Path) -> None:
    log = _log(
        tmp_path,
        {"step": 1, "tokens": 90, "trained_tokens": 50, "micro_batches": 2, "step_seconds": 1.0, "padding": 10.0,
         "mfu": 50.0, "data_wait_seconds": 0.5, "idle_share": 0.2, "peak_memory_gib": 3.0},
        {"step": 2, "tokens": 150, "trained_tokens": 0, "micro_batches": 1, "step_seconds": 3.0, "padding": 50.0,
         "mfu": 10.0, "data_wait_seconds": 0.0, "idle_share": 0.0, "peak_memory_gib": 2.0},
    )  # fmt: skip
    found = totals(whole_steps(log))
    assert (found.steps, found.micro_batches, found.tokens) == (2, 3, 240)
    assert found.tokens_per_second == 60
    # 100 + 300 positions for 240 tokens; (50% x 1 s + 10% x 3 s) / 4 s; 0.2 x 1 s of 4 s.
    assert (found.padding, found.mfu, found.idle) == pytest.approx((0.4, 0.2, 0.05))
    assert end_figures(log)["data wait"] == pytest.approx(0.125)
    assert found.memory_gib == 3.0
    assert totals(whole_steps(log, np.array([False, True]))).padding == pytest.approx(0.5)


def test_level_steps_are_those_of_per_level(tmp_path: Path) -> None:
    low = {"micro_batches": 2, "tokens": 90, "positions": 100, "seconds": 3.0, "waiting_seconds": 0.3, "mfu": 20.0}
    alone = {**low, "tokens": 50, "seconds": 1.0, "waiting_seconds": 0.1, "mfu": 40.0, "micro_batches": 4}
    log = _log(
        tmp_path,
        {"step": 1, "loss_by_level": {"1K/cp1": 1}, "per_level": {"1K/cp1": alone}},
        {"step": 2, "loss_by_level": {"1K/cp1": 1, "8K/cp2": 1}, "memory_by_level": {"8K/cp2": 7.0},
         "per_level": {"1K/cp1": low, "8K/cp2": {**low, "micro_batches": 1, "seconds": 1.0}}},
    )  # fmt: skip
    found = {name: totals(of) for name, of in level_steps(log).items()}
    assert list(found) == ["1K/cp1", "8K/cp2"]
    first, second = found.values()
    assert (first.steps, first.micro_batches, first.tokens, first.seconds) == (2, 6, 140, 4.0)
    # 50 of 100 and 90 of 100 positions; 40% x 1 s and 20% x 3 s; 0.1 s and 0.3 s of 4 s.
    assert (first.padding, first.mfu, first.idle) == pytest.approx((0.3, 0.25, 0.1))
    assert (second.steps, second.micro_batches, second.seconds, second.memory_gib) == (1, 1, 1.0, 7.0)


def test_edge_means_use_a_tenth_and_at_least_three_values() -> None:
    values = np.arange(1.0, 41.0)
    assert edge_means(values, np.ones(40)) == (2.5, 38.5)
    assert edge_means(values[:5], np.ones(5)) == (2.0, 4.0)
    assert edge_means(np.full(3, np.nan), np.ones(3)) is None


def test_combinations_are_in_the_order_of_their_levels(tmp_path: Path) -> None:
    log = _log(
        tmp_path,
        {"step": 1, "level_name": "1K/cp1+8K/cp2", "loss_by_level": {"1K/cp1": 1, "8K/cp2": 1}},
        {"step": 2, "level_name": "8K/cp2", "loss_by_level": {"8K/cp2": 1}},
        {"step": 3, "level_name": "1K/cp1", "loss_by_level": {"1K/cp1": 1}},
    )
    steps = {name: np.flatnonzero(of).tolist() for name, of in combinations(log).items()}
    assert list(steps.items()) == [("1K/cp1", [2]), ("8K/cp2", [1]), ("1K/cp1+8K/cp2", [0])]


def test_work_adds_up_over_checks_with_the_newest_number_of_ranks(tmp_path: Path) -> None:
    work = ([9, 9, 9, 9], [1, 2], [3, 5])
    log = _log(tmp_path, *({"step": s, "timing_check": {"work_by_rank": w}} for s, w in enumerate(work, start=1)))
    assert total_seconds_by_rank(log) == [4.0, 7.0]


def test_final_loss_ignores_skipped_steps(tmp_path: Path) -> None:
    steps = [{"step": s, "loss": 1.0, "tokens": 10, "trained_tokens": 5} for s in range(1, 5)]
    log = _log(tmp_path, *steps, {"step": 5, "loss": 99.0, "tokens": 10, "trained_tokens": 0, "skipped": "spike"})
    figures = end_figures(log)
    assert (figures["loss"], figures["tokens"], figures["skipped"]) == (1.0, 50.0, 1.0)
    assert figures["validation loss"] is None


def test_loss_at_tokens_is_of_the_last_step_within_them(tmp_path: Path) -> None:
    log = _log(tmp_path, *({"step": s, "loss": float(s), "tokens": 10, "trained_tokens": 10} for s in range(1, 7)))
    assert loss_at(log, 45) == 2.5  # of steps 1 to 4
    assert loss_at(log, 9) is None
