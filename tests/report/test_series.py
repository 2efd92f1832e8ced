"""Derived series and figures, on numbers that can be added up by hand."""

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
    validation_series,
    whole_steps,
    window_of,
)


def _log(folder: Path, *lines: dict[str, object]) -> StepLog:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read_steps(folder / "metrics.jsonl")


def test_smoothing_is_the_weighted_mean_of_the_last_values() -> None:
    values, weights = np.array([1.0, np.nan, 3.0, 5.0]), np.array([1.0, 9.0, 3.0, 1.0])
    smoothed = smooth(values, weights, 2)
    assert smoothed[[0, 2, 3]].tolist() == [1.0, 2.5, 3.5]
    assert np.isnan(smoothed[1])
    assert smooth(values[[0, 2]], np.zeros(2), 2).tolist() == [1.0, 2.0]
    assert [window_of(n) for n in (1, 100, 101, 4000)] == [5, 5, 6, 200]


def test_totals_weigh_shares_by_what_they_are_shares_of(tmp_path: Path) -> None:
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


def test_levels_are_parted_as_recorded_and_older_mixed_steps_are_their_own(tmp_path: Path) -> None:
    each = {"micro_batches": 2, "tokens": 90, "positions": 100, "seconds": 3.0, "waiting_seconds": 0.3, "mfu": 20.0}
    other = {**each, "micro_batches": 1, "seconds": 1.0}
    log = _log(
        tmp_path,
        {"step": 1, "level_name": "1K/cp1", "loss_by_level": {"0": 1}, "micro_batches": 4, "tokens": 50,
         "padding": 50.0, "step_seconds": 1.0, "mfu": 40.0, "idle_share": 0.1},
        {"step": 2, "level_name": "1K/cp1+8K/cp2", "loss_by_level": {"0": 1, "1": 1}, "micro_batches": 7, "tokens": 99,
         "step_seconds": 9.0},
        {"step": 3, "level_name": "1K/cp1+8K/cp2", "loss_by_level": {"1K/cp1": 1, "8K/cp2": 1}, "micro_batches": 3,
         "tokens": 180, "step_seconds": 4.0, "per_level": {"1K/cp1": each, "8K/cp2": other}},
    )  # fmt: skip
    found = {name: totals(of) for name, of in level_steps(log).items()}
    assert list(found) == ["1K/cp1", "8K/cp2", "1K/cp1+8K/cp2"]
    low, high, mixed = found.values()
    assert (low.micro_batches, low.tokens, low.seconds) == (6, 140, 4.0)
    # 50 of 100 and 90 of 100 positions; 40% x 1 s and 20% x 3 s; 0.1 s and 0.3 s of 4 s.
    assert (low.padding, low.mfu, low.idle) == pytest.approx((0.3, 0.25, 0.1))
    assert (high.steps, high.micro_batches, high.seconds) == (1, 1, 1.0)
    assert (mixed.steps, mixed.micro_batches, mixed.tokens, mixed.seconds) == (1, 7, 99, 9.0)


def test_totals_of_a_log_that_lacks_keys_are_none(tmp_path: Path) -> None:
    found = totals(whole_steps(_log(tmp_path, {"step": 1, "tokens": 5})))
    assert (found.mfu, found.padding, found.idle, found.memory_gib) == (None,) * 4
    assert found.tokens_per_second is None


def test_ends_are_means_of_a_tenth_and_of_three_values_at_least() -> None:
    values = np.arange(1.0, 41.0)
    assert edge_means(values, np.ones(40)) == (2.5, 38.5)
    assert edge_means(values[:5], np.ones(5)) == (2.0, 4.0)
    assert edge_means(np.full(3, np.nan), np.ones(3)) is None


def test_combinations_come_in_the_order_of_their_levels(tmp_path: Path) -> None:
    log = _log(
        tmp_path,
        {"step": 1, "level_name": "1K/cp1+8K/cp2", "loss_by_level": {"0": 1, "1": 1}},
        {"step": 2, "level_name": "8K/cp2", "loss_by_level": {"1": 1}},
        {"step": 3, "level_name": "1K/cp1", "loss_by_level": {"0": 1}},
    )
    steps = {name: np.flatnonzero(of).tolist() for name, of in combinations(log).items()}
    assert list(steps.items()) == [("1K/cp1", [2]), ("8K/cp2", [1]), ("1K/cp1+8K/cp2", [0])]


def test_validation_is_read_as_older_runs_wrote_it(tmp_path: Path) -> None:
    old = _log(tmp_path, {"step": 1, "validation": {"loss": 2.0, "loss 1K/cp1": 1.5}})
    assert {name: values.tolist() for name, values in validation_series(old, "by_level").items()} == {"1K/cp1": [1.5]}
    assert validation_series(old, "by_length") == {}
    new = _log(tmp_path, {"step": 1, "validation": {"loss": 2.0, "by_length": {"1024": {"loss": 1.0}}}})
    assert list(validation_series(new, "by_length")) == ["1024"]


def test_the_work_of_ranks_adds_up_over_checks_of_the_newest_number_of_ranks(tmp_path: Path) -> None:
    work = ([9, 9, 9, 9], [1, 2], [3, 5])
    log = _log(tmp_path, *({"step": s, "timing_check": {"work_by_rank": w}} for s, w in enumerate(work, start=1)))
    assert total_seconds_by_rank(log) == [4.0, 7.0]


def test_end_figures_leave_skipped_steps_out_of_the_loss(tmp_path: Path) -> None:
    steps = [{"step": s, "loss": 1.0, "tokens": 10, "trained_tokens": 5} for s in range(1, 5)]
    log = _log(tmp_path, *steps, {"step": 5, "loss": 99.0, "tokens": 10, "trained_tokens": 0, "skipped": "spike"})
    figures = end_figures(log)
    assert (figures["loss"], figures["tokens"], figures["skipped"]) == (1.0, 50.0, 1.0)
    assert figures["validation loss"] is None


def test_the_loss_at_a_number_of_tokens_is_that_of_the_last_step_within_it(tmp_path: Path) -> None:
    log = _log(tmp_path, *({"step": s, "loss": float(s), "tokens": 10, "trained_tokens": 10} for s in range(1, 7)))
    assert loss_at(log, 45) == 2.5  # of steps 1 to 4
    assert loss_at(log, 9) is None
