"""The replay of a plan, by hand and by the account that it keeps; the order of the paper's methods."""

from __future__ import annotations

import dataclasses

import pytest

from hbp_titan.components.timing import predict_epoch
from hbp_titan.experiments.paper.scale import without_balance
from hbp_titan.packing import Level, build_plan, measure
from hbp_titan.tuning.hardware import get_hardware
from hbp_titan.tuning.simulate import replay, replay_table, tulu3_longcite_like
from hbp_titan.tuning.time_model import TimeModel, get_dims
from tests.tuning.toy import MACHINE, TOY

LEVELS = [Level(16384, 1, ac_policy="full", ac_layers=28), Level(131072, 8, ac_policy="full", ac_layers=28)]
H100 = TimeModel(get_dims("llama3_1_8b"), get_hardware("h100-80gb"), 32)


def test_a_plan_of_two_iterations_by_hand() -> None:
    headless = dataclasses.replace(TOY, head_params=0, embedding_params=0)
    model = TimeModel(headless, MACHINE, 2)
    # Sorted by cost: documents of 4 and 4 tokens side by side, then one of 4 beside 2 + 2.
    plan = build_plan([4, 2, 4, 2, 4], [Level(4)], world_size=2, method="hbp")
    result = replay(plan, model)
    # An iteration: matrix products 6 x 100 x 4 / 1000 = 2.4; attention 96 x 16 / 1000, of 2 + 2 half of it; FSDP 1 s
    # forward of which 0.8 is hidden, 3 s backward of which 1.6 is hidden.
    assert result.parts["linear"] == pytest.approx(2 * 2.4)
    assert result.parts["attention"] == pytest.approx((1.536 + (1.536 + 0.768) / 2) / 0.75)
    assert result.parts["fsdp"] == pytest.approx(2 * (0.2 + 1.4))
    assert result.idle == pytest.approx(0.768 / 2 / 0.75)
    # 28 bytes x 50 parameters of a rank at 1400 byte/s, twice.
    assert result.steps == pytest.approx(2.0)
    assert result.seconds == pytest.approx(2 * (2.4 + 1.536 / 0.75 + 1.6) + 2)
    assert result.gpu_days == pytest.approx(14.096 * 2 / 86400)
    assert result.tokens == 16


def test_the_account_is_whole_and_equals_the_prediction_from_level_times() -> None:
    plan = build_plan(tulu3_longcite_like(30_000), LEVELS, 32, "hbp_paper", global_batch_tokens=2_000_000)
    result = replay(plan, H100)
    epoch = predict_epoch(plan, [H100.level_time(level) for level in LEVELS], H100.step_seconds())
    assert result.seconds == pytest.approx(epoch.seconds)
    assert result.idle == pytest.approx(epoch.idle * epoch.slowest.sum())
    low, high = result.per_level
    assert low is not None
    assert high is not None
    assert low.seconds + high.seconds + result.steps == pytest.approx(result.seconds)
    assert low.iterations + high.iterations == plan.num_iterations
    assert (low.cr, high.cr, result.cr) == (0.0, 1.0, pytest.approx(measure(plan).cr))
    assert low.parts["sp"] == 0 < high.parts["sp"]
    assert sum(result.share(part) for part in (*result.parts, "idle", "steps")) == pytest.approx(1)


def test_without_packing_a_lone_sample_takes_its_own_tokens() -> None:
    headless = dataclasses.replace(TOY, head_params=0, embedding_params=0)
    plan = build_plan([3, 4], [Level(64, 2)], world_size=2, method="nopack")
    parts = replay(plan, TimeModel(headless, MACHINE, 2)).parts
    # 3 tokens are rounded up to 4 on two ranks: 6 x 100 x 2 / 1000 each time.
    assert parts["linear"] == pytest.approx(2 * 1.2)
    padded = replay(plan, TimeModel(headless, MACHINE, 2), static_shapes=True).parts
    assert padded["linear"] == pytest.approx(2 * 6 * 100 * 32 / 1000)


def test_the_methods_come_out_in_the_papers_order() -> None:
    lengths = tulu3_longcite_like(100_000)
    days = {
        name: replay(build_plan(lengths, LEVELS, 32, name), H100).gpu_days
        for name in ("nopack", "random", "isf", "hbp_paper", "hbp")
    }
    unbalanced = replay(without_balance(build_plan(lengths, LEVELS, 32, "hbp_paper")), H100).gpu_days
    assert days["nopack"] > 5 * days["isf"]
    assert days["random"] > days["isf"] > unbalanced > days["hbp_paper"] > days["hbp"]
    assert 1.3 < days["isf"] / days["hbp_paper"] < 1.6


def test_the_table_has_a_line_for_each_method_and_level() -> None:
    lengths = tulu3_longcite_like(5000)
    table = replay_table({name: replay(build_plan(lengths, LEVELS, 32, name), H100) for name in ("isf", "hbp")})
    assert [line.split()[0] for line in table.splitlines()] == ["method", "isf", "hbp", "level", "level"]
    assert all(len(line) <= 112 for line in table.splitlines())
