"""Metrics: sums and names, metrics.jsonl across a resume, console lines of at most 80 columns."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hbp_titan.components.metrics import (
    MetricsLogger,
    RunTotals,
    describe_plan,
    scalars,
    step_line,
    truncate_after_step,
)
from hbp_titan.components.step_stats import LossMeans, LossSums, Mean, attention_balance, count_sources
from hbp_titan.config import load_config
from hbp_titan.data.batch import make_batch
from hbp_titan.job_config import JobConfig
from hbp_titan.packing import Level, build_plan, measure


def _values(step: int) -> dict[str, Any]:
    done = {"micro_batches": 2, "tokens": 30, "positions": 40, "seconds": 2.0, "waiting_seconds": 0.5, "mfu": None}
    return {
        "step": step,
        "level_name": "1K/cp1",
        "loss": 2.5,
        "loss_by_level": {"1K/cp1": 2.5},
        "loss_by_length": {"256": {"loss": 2.5, "trained_tokens": 20}},
        "grad_norm": 1.0,
        "lr": 1e-3,
        "tokens": 30,
        "tokens_per_second": 12345.6,
        "mfu": None,
        "padding": 0.5,
        "idle_share": 0.25,
        "data_wait_seconds": 0.0,
        "step_seconds": 2.0,
        "per_level": {"1K/cp1": done},
        "memory_by_level": {"1K/cp1": 0.1},
        "peak_memory_gib": 0.1,
        "sources": {"chat": {"samples": 2, "tokens": 30, "trained_tokens": 20, "loss": 2.5}},
    }


def _logger(folder: Path, first_step: int, log_interval: int = 1, tensorboard: bool = False) -> MetricsLogger:
    config = JobConfig()
    config.job.dump_folder = str(folder)
    config.metrics.log_interval, config.metrics.enable_tensorboard = log_interval, tensorboard
    return MetricsLogger(config, True, first_step, 10, world_size=2)


def test_resumed_run_replaces_the_steps_after_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(_values(step)) + "\n" for step in (1, 2, 3)) + '{"step": 4, "lo')
    assert [kept["step"] for kept in truncate_after_step(path, 2)] == [1, 2]
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_every_step_is_written_and_every_interval_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with _logger(tmp_path, 0, log_interval=3) as logger:
        for step in range(1, 6):
            logger.log(_values(step))
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        " 1/10  1K/cp1  loss 2.5000  grad 1.000  12.3K tok/s  idle 25%  0.1G  eta 0:00:18",
        " 3/10  1K/cp1  loss 2.5000  grad 1.000  12.3K tok/s  idle 25%  0.1G  eta 0:00:14",
    ]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 5


def test_totals_include_the_steps_before_a_resume(tmp_path: Path) -> None:
    with _logger(tmp_path, 0) as logger:
        for step in (1, 2, 3):
            logger.log(_values(step))
    code = {"code": {"samples": 1, "tokens": 7, "trained_tokens": 5, "loss": None}}
    with _logger(tmp_path, 2) as logger:
        logger.log({**_values(3), "sources": code})
    table = logger.totals.describe().splitlines()
    assert [line.split() for line in table[-4:-1]] == [
        ["source", "samples", "tokens", "trained"],
        ["chat", "4", "60", "40"],
        ["code", "1", "7", "5"],
    ]
    assert table[1].split() == ["1K/cp1", "6", "90", "0:00:06", "15", "-", "25.0%", "25.0%"]


def test_skipped_step_counts_for_no_level_and_no_source() -> None:
    totals = RunTotals()
    totals.add({**_values(1), "skipped": "nan"})
    assert (totals.levels, totals.sources, totals.tokens, totals.seconds) == ({}, {}, 0, 2.0)


def test_mfu_of_a_level_is_the_time_weighted_mean() -> None:
    totals = RunTotals()
    for seconds, mfu in ((2.0, 30.0), (6.0, 50.0)):
        record = _values(1)
        record["per_level"]["1K/cp1"] |= {"seconds": seconds, "mfu": mfu}
        totals.add(record)
    assert totals.describe().splitlines()[1].split()[5] == "45.0%"


def test_tensorboard_uses_torchtitans_names(tmp_path: Path) -> None:
    with _logger(tmp_path, 0, tensorboard=True) as logger:
        for step in (1, 2):
            logger.log(_values(step))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("source/chat/tokens")] == [(1, 30), (2, 60)]
    assert [event.value for event in events.Scalars("loss_metrics/global_avg_loss")] == [2.5, 2.5]
    # Of one of two devices.
    assert [event.value for event in events.Scalars("throughput(tps)")] == pytest.approx([6172.8, 6172.8])
    assert [event.value for event in events.Scalars("n_tokens_seen")] == [30, 60]


def test_losses_of_the_initial_weights_are_those_of_step_0(tmp_path: Path) -> None:
    means = {"loss": 8.5, "by_level": {"1K/cp1": {"loss": None}}, "by_length": {}, "by_source": {}}
    with _logger(tmp_path, 0, tensorboard=True) as logger:
        logger.log({**_values(1), "validation_at_start": means})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("validation_metrics/loss")] == [(0, 8.5)]
    assert "validation_metrics/level/1K/cp1" not in events.Tags()["scalars"]


def test_validation_losses_are_named_by_group_without_nan() -> None:
    mean, none = {"loss": 1.5, "trained_tokens": 3}, {"loss": None, "trained_tokens": 3}
    groups = {"by_level": {"1K/cp1": mean}, "by_length": {"256": mean, "512": none}, "by_source": {"chat": mean}}
    totals = RunTotals()
    totals.add(_values(1))
    named = scalars({**_values(1), "validation": {**mean, **groups}}, totals, 1)
    assert {name: value for name, value in named.items() if name.startswith("validation")} == {
        "validation_metrics/loss": 1.5,
        "validation_metrics/level/1K/cp1": 1.5,
        "validation_metrics/length/256": 1.5,
        "validation_metrics/source/chat": 1.5,
    }
    assert "mfu(%)" not in named


def _plan_of_two_ranks() -> tuple[Any, Any]:
    """Samples of 3, 300, 5 and 600 tokens, of which 2, 3, 1 and 4 are trained, in two packs of one micro-batch."""
    plan = build_plan([3, 300, 5, 600], [Level(640)], 2, loss_tokens=np.array([2, 3, 1, 4]))
    sources = np.array([1, 0, 1, 2], np.uint16)
    store = SimpleNamespace(lengths=plan.lengths, sources=sources, source_names=["a", "b", "c"])
    return plan, store


def test_samples_are_counted_by_source() -> None:
    plan, store = _plan_of_two_ranks()
    whole = Mean(2.0, 6)
    means = LossMeans(whole, {0: whole}, {}, {"a": Mean(3.0, 3), "b": Mean(1.0, 3)})
    assert count_sources(plan, np.array([0, 2, 1]), store, means) == {
        "a": {"samples": 1, "tokens": 300, "trained_tokens": 3, "loss": 3.0},
        "b": {"samples": 2, "tokens": 8, "trained_tokens": 3, "loss": 1.0},
    }


def test_losses_are_grouped_by_level_length_band_and_source() -> None:
    plan, store = _plan_of_two_ranks()
    text = SimpleNamespace(sample=lambda index: (np.zeros(plan.lengths[index], np.int32), np.ones(plan.lengths[index])))
    sums = np.zeros(1 + 3 + 3)
    for dp_rank in range(2):
        ids = plan.pack(0, dp_rank)
        collector = LossSums(store, 1)
        # Sample i has a loss of i + 1 in all.
        collector.add(make_batch(text, ids, plan.levels[0], 0, len(ids)), torch.tensor(ids + 1.0))
        sums += collector.pop().numpy()
    means = collector.means(sums.tolist(), plan, 0, 1)
    assert means.whole == Mean(1.0, 10)
    assert means.by_level == {0: Mean(1.0, 10)}
    assert means.by_length == {256: Mean(4 / 3, 3), 512: Mean(2 / 3, 3), 1024: Mean(1.0, 4)}
    assert means.by_source == {"a": Mean(2 / 3, 3), "b": Mean(4 / 3, 3), "c": Mean(1.0, 4)}


def test_attention_balance_of_all_micro_batches_is_the_plans() -> None:
    lengths = np.random.default_rng(0).integers(1, 500, 200)
    plan = build_plan(lengths, [Level(512)], 4, method="isf")
    assert attention_balance(plan, 0, plan.num_iterations) == pytest.approx(measure(plan).abr, rel=1e-12)
    assert measure(plan).abr > 0.01


RECORD: dict[str, Any] = {
    "step": 12345,
    "level_name": "128K/cp16",
    "loss": 1.23456,
    "grad_norm": 0.51234,
    "tokens_per_second": 1.234e6,
    "mfu": 41.26,
    "idle_share": 0.123,
    "peak_memory_gib": 71.24,
}


def test_start_names_every_memory_setting_of_the_configuration_and_not_of_an_older_plan() -> None:
    plan = build_plan(np.full(4, 60), [Level(64), Level(128, 2)], world_size=2)
    config = load_config(["--levels=64:1:ulysses:none,128:2:ulysses:offload:3:false:2:8:4"])
    first, second = describe_plan(plan, 2, config).splitlines()[:2]
    assert first == "level 64/cp1: dp 2 x cp 1, checkpointing none, 2 micro-batches"
    assert second == (
        "level 128/cp2: dp 1 x cp 2 (ulysses, fused), checkpointing offload on 3 layers, 2 of them in host memory, "
        "chunks of 8 tokens, 4 groups of heads, parameters stay gathered, 0 micro-batches"
    )


def test_line_of_a_step_prints_nan_and_drops_its_least_important_parts_if_it_is_long() -> None:
    small = {"step": 7, "level_name": "8K/cp2", "loss": None, "grad_norm": None, "mfu": None, "peak_memory_gib": 7.12}
    assert step_line({**RECORD, **small}, 58, 61.0) == (
        " 7/58  8K/cp2  loss    nan  grad   nan  1.23M tok/s  idle 12%  7.1G  eta 0:01:01"
    )
    assert step_line(RECORD, 99999, 43210.0) == (
        "12345/99999  128K/cp16  loss 1.2346  1.23M tok/s  mfu 41.3%  eta 12:00:10"
    )
    mixed = {**RECORD, "level_name": "16K/cp1+32K/cp2+128K/cp16", "expert_load": {"worst": 1.5}}
    assert len(step_line(mixed, 99999, 43210.0)) <= 80
