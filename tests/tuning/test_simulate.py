"""The replay of a plan by hand and by its accounting, and scripts/simulate.py."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

from hbp_titan.components.timing import predict_epoch
from hbp_titan.errors import format_error
from hbp_titan.packing import Level, build_plan, measure
from hbp_titan.tuning.hardware import get_hardware
from hbp_titan.tuning.simulate import replay, tulu3_longcite_like
from hbp_titan.tuning.time_model import TimeModel, get_dims
from scripts import simulate
from tests.tuning.toy import MACHINE, TOY

LEVELS = [Level(16384, 1, ac_policy="full", ac_layers=28), Level(131072, 8, ac_policy="full", ac_layers=28)]
H100 = TimeModel(get_dims("llama3_1_8b"), get_hardware("h100-80gb"), 32)


def test_plan_of_two_micro_batches_by_hand() -> None:
    headless = dataclasses.replace(TOY, head_params=0, embedding_params=0)
    model = TimeModel(headless, MACHINE, 2)
    # Sorted by cost: documents of 4 and 4 tokens in parallel, then one of 4 and 2 + 2.
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


def test_parts_add_up_to_the_prediction_from_level_times() -> None:
    plan = build_plan(tulu3_longcite_like(30_000), LEVELS, 32, "hbp_paper", global_batch_tokens=2_000_000)
    result = replay(plan, H100)
    epoch = predict_epoch(plan, [H100.level_time(level) for level in LEVELS], H100.step_seconds())
    assert result.seconds == pytest.approx(epoch.seconds)
    assert result.idle == pytest.approx(epoch.idle * epoch.slowest.sum())
    low, high = result.per_level
    assert low is not None
    assert high is not None
    assert low.seconds + high.seconds + result.steps == pytest.approx(result.seconds)
    assert low.micro_batches + high.micro_batches == plan.num_iterations
    assert (low.cr, high.cr, result.cr) == (0.0, 1.0, pytest.approx(measure(plan).cr))
    assert low.parts["sp"] == 0 < high.parts["sp"]
    assert sum(result.share(part) for part in (*result.parts, "idle", "steps")) == pytest.approx(1)


def test_without_packing_a_sample_takes_the_time_of_its_tokens() -> None:
    headless = dataclasses.replace(TOY, head_params=0, embedding_params=0)
    plan = build_plan([3, 4], [Level(64, 2)], world_size=2, method="nopack")
    parts = replay(plan, TimeModel(headless, MACHINE, 2)).parts
    # 3 tokens are rounded up to 4 on two ranks: 6 x 100 x 2 / 1000 each time.
    assert parts["linear"] == pytest.approx(2 * 1.2)
    padded = replay(plan, TimeModel(headless, MACHINE, 2), static_shapes=True).parts
    assert padded["linear"] == pytest.approx(2 * 6 * 100 * 32 / 1000)


def test_estimate_prints_memory_and_time_per_level(capsys: pytest.CaptureFixture[str]) -> None:
    words = "--estimate h100-80gb --world_size 32 --flavor llama3_1_8b --levels 16384:1,131072:8"
    simulate.main(words.split())
    printed = capsys.readouterr().out
    assert "estimated, not measured" in printed
    for level in ("16384:1", "131072:8"):
        assert re.search(rf"^{level} +full, \d+ of 32 +\d+\.\d +yes ", printed, re.MULTILINE)


def test_replay_of_methods_on_given_lengths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "l.npy", tulu3_longcite_like(3000))
    simulate.main(["--lengths", str(tmp_path / "l.npy"), "--methods", "isf,flexsp,hbp", "--ac_layers", "28"])
    printed = capsys.readouterr().out
    rows = [line.split()[0] for line in printed[printed.index("method") :].splitlines() if not line.startswith(" ")]
    assert rows == ["method", "isf", "flexsp", "hbp"]
    assert "3,000 samples" in printed
    assert "simulated" in printed


def test_calibration_prints_every_row_and_the_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"level": 0, "seconds": 1 + n / 10, "loads": [[1, n, n * n, 1]]} for n in range(1, 11)]
    path = tmp_path / "measured.json"
    path.write_text(json.dumps({"levels": [{"max_tokens": 64}], "iterations": rows}))
    np.save(tmp_path / "l.npy", np.arange(1, 60))
    simulate.main(["--calibrate", str(path), "--lengths", str(tmp_path / "l.npy"), "--world_size", "2"])
    printed = capsys.readouterr().out
    assert len(re.findall(r"^\d+ +64 ", printed, re.MULTILINE)) == 10
    assert printed.count("held out\n") == 5
    assert "good enough to plan with" in printed
    assert re.search(r"^hbp +[\d.]+ s per epoch, idle", printed, re.MULTILINE)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--estimate h100", "did you mean h100-80gb?"),
        ("--methods hbq --num_samples 100", "did you mean hbp?"),
        ("--calibrate missing.json", "missing.json"),
        ("--estimate h100-80gb --world_size 1 --levels 131072:1", "level"),
        ("--world_size 12", "cp_degree=8"),
        ("--levels 16384:1,131072:64 --world_size 64", "attention heads"),
    ],
)
def test_script_reports_mistakes(words: str, message: str) -> None:
    with pytest.raises((ValueError, OSError)) as raised:
        simulate.main(words.split())
    assert message in format_error(raised.value)
