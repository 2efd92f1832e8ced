"""What a run gained: held-out loss before and after, and its plan next to the baselines' plans of the same samples."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hbp_titan.packing import CostModel, Level, build_plan, measure, replan
from hbp_titan.report import read_runs
from hbp_titan.report.gains import held_out
from hbp_titan.report.methods import planned_by, with_baselines
from hbp_titan.report.summary import summary, write_report
from tests.report.sample_run import levels_of, start_of, step_of, write_run, write_usual_run


def _means(loss: float) -> dict[str, Any]:
    one, other = {"loss": loss, "trained_tokens": 40}, {"loss": loss + 1, "trained_tokens": 2}
    return {
        **one,
        "by_level": {"1K/cp1": one},
        "by_length": {"8192": other, "1024": one},
        "by_source": {"chat": one},
    }


def _trained(folder: Path, at_start: bool = True) -> Path:
    lines = [step_of(step, 0) for step in range(1, 5)]
    if at_start:
        lines[0]["validation_at_start"] = _means(8.0)
    lines[1]["validation"], lines[3]["validation"] = _means(6.0), _means(5.0)
    return write_run(folder, lines, [start_of(), start_of(3)])


def test_held_out_loss_goes_from_the_initial_weights_to_the_last_validation(tmp_path: Path) -> None:
    (run,) = read_runs([_trained(tmp_path)])
    assert [(of.group, of.name, of.before, of.after, of.change, of.tokens) for of in held_out(run.log)] == [
        ("all", "all samples", 8.0, 5.0, -3.0, 40),
        ("level", "1K/cp1", 8.0, 5.0, -3.0, 40),
        ("length", "513 to 1K", 8.0, 5.0, -3.0, 40),
        ("length", "4,097 to 8K", 9.0, 6.0, -3.0, 2),
        ("source", "chat", 8.0, 5.0, -3.0, 40),
    ]
    lines = summary(run).splitlines()
    assert lines[1].split() == ["all", "samples", "8.0000", "5.0000", "-3.0000", "2981", "->", "148.4", "40"]
    assert max(map(len, lines)) <= 80


def test_without_initial_losses_the_last_ones_are_shown(tmp_path: Path) -> None:
    (run,) = read_runs([_trained(tmp_path, at_start=False)])
    assert {of.change for of in held_out(run.log)} == {None}
    assert summary(run).splitlines()[1].split() == ["all", "samples", "-", "5.0000", "-", "148.4", "40"]  # e^5


def test_baselines_plan_the_same_samples_and_the_summary_has_their_metrics(tmp_path: Path) -> None:
    (run,) = read_runs([write_usual_run(tmp_path, 20)])
    plan = run.plans[0].plan
    compared = run.compared()
    assert [of.plan.method for of in compared] == ["hbp", "flat_sorted", "isf"]
    for of in compared:
        assert sorted(of.plan.lengths[of.plan.packs.ids]) == sorted(plan.lengths)
        assert of.metrics == measure(of.plan)
    text = summary(run)
    (row,) = [line.split() for line in text.splitlines() if "ISF" in line]
    isf = build_plan(plan.lengths, plan.levels, 4, "isf", global_batch_tokens=4096, curriculum_steps=0)
    assert row[1:3] == [f"{measure(isf).pr:.2%}", f"{measure(isf).time_imbalance:.2%}"]


def test_baselines_differ_from_the_plan_in_the_method_alone() -> None:
    lengths, levels = np.arange(10, 90), [Level(16), Level(96, 2)]
    settings: dict[str, Any] = {
        "loss_tokens": lengths // 3,
        # Squares count far more than by default, so packs are sorted otherwise.
        "cost": CostModel(alpha=1.0, beta=5.0),
        "global_batch_tokens": 500,
        "level_order": "interleave",
        "epoch": 2,
    }
    plan = build_plan(lengths, levels, 4, "hbp", 7, **settings)
    for method in ("flat_sorted", "isf"):
        wanted, found = build_plan(lengths, levels, 4, method, 7, **settings), planned_by(plan, method)
        assert found.fingerprint == wanted.fingerprint
        assert found.costs == wanted.costs


def test_baselines_of_the_rest_of_an_epoch_have_its_samples_only() -> None:
    plan = build_plan(np.arange(10, 90), [Level(16), Level(96, 2)], 4)
    rest = replan(plan, plan.num_iterations - 2)
    assert len(rest.packs.ids) < 80
    assert sorted(planned_by(rest, "isf").lengths) == sorted(plan.lengths[rest.packs.ids])


def test_levels_side_by_side_are_compared_with_one_length() -> None:
    levels = [Level(32), Level(64, 2), Level(64, 4)]
    plan = build_plan(np.arange(10, 60), levels, 8, level_order="parallel")
    assert [of.label for of in with_baselines(plan)] == ["HBP", "flat + sort", "ISF"]
    assert {of.plan.level_order for of in with_baselines(plan)[1:]} == {"alternate"}


def test_finished_run_prints_the_path_of_its_report_last(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = _trained(tmp_path)
    write_report(run)
    assert capsys.readouterr().out.endswith(f"\nreport       {run / 'report.html'}\n")
    assert re.search("held-out", (run / "report.html").read_text(), re.I)


def test_failed_report_is_said_and_does_not_raise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path, [step_of(step, level) for step, level in enumerate(levels_of(5), start=1)])
    (run / "report.html").mkdir()
    write_report(run)
    assert "warning: no report" in capsys.readouterr().err
