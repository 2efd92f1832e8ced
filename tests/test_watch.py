"""What a run shows of itself: its console, its traces, what it hands to Weights & Biases."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from hbp_titan.components.metrics import check_wandb
from hbp_titan.distributed.world import log_rank
from tests.programs import run_python
from tests.runs import read_metrics
from tests.tiny_run import write_tiny_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """Run folder, stdout and stderr of two ranks of which rank 1 speaks, with a trace and W&B offline."""
    folder = tmp_path_factory.mktemp("watched")
    argv = [*write_tiny_run(folder), "--training.steps=5", "--training.global_batch_tokens=600"]
    argv += ["--metrics.enable_wandb=true", "--packing.print_comparison=true", "--metrics.timing_check_interval=2"]
    argv += ["--profiling.enable_profiling=true", "--profiling.first_step=2", "--profiling.last_step=3"]
    quiet = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "LOG_RANK": "1"}
    done = run_python("-m", "hbp_titan.train", *argv, env=quiet, ranks=2)
    assert done.returncode == 0, done.stderr
    return folder / "run", done.stdout, done.stderr


def test_console_is_of_one_rank_plain_and_of_80_columns(run: tuple[Path, str, str]) -> None:
    folder, output, errors = run
    lines = output.splitlines()
    long = [line for line in lines if len(line) > 80 and str(folder) not in line]
    assert long == []
    assert "\x1b" not in output + errors
    assert "\r" not in output + errors
    assert sum(line.startswith("model: ") for line in lines) == 1
    assert [line.split()[0] for line in lines if re.match(r"\d/5 ", line)] == [f"{step}/5" for step in range(1, 6)]
    assert "Traceback" not in errors


def test_start_names_every_derived_number_and_the_end_sums_up(run: tuple[Path, str, str]) -> None:
    folder, output, _ = run
    start, end = output.split("1/5", 1)
    for pattern in (
        r"^model: model, [\d,]+ parameters in float32, compute dtype float32",
        r"^weights: NEW",
        r"^ranks: 2 on cpu$",
        r"^data: 60 samples, [\d,]+ tokens, [\d,]+ of them trained$",
        r"^level 128/cp1: dp 2 x cp 1, checkpointing none, \d+ micro-batches$",
        r"^level 512/cp2: dp 1 x cp 2 \(ulysses, fused\), checkpointing none, \d+ micro-batches$",
        r"^total steps: 5; this plan: \d+ steps of [\d,]+ \+- [\d,]+ tokens",
        r"^predicted time: .* for 5 steps, from the warm-up of each level$",
    ):
        assert re.search(pattern, start, re.MULTILINE), pattern
    assert re.search(r"^level +batches +tokens +time +tok/s +mfu +padding +waiting$", end, re.MULTILINE)
    steps = read_metrics(folder)
    for name in ("128/cp1", "512/cp2"):
        done = sum(step["per_level"].get(name, {}).get("micro_batches", 0) for step in steps)
        assert re.search(rf"^{name} +{done} ", end, re.MULTILINE)


def test_measured_shares_add_up(run: tuple[Path, str, str]) -> None:
    steps = read_metrics(run[0])
    for step in steps:
        assert 0 <= step["time_imbalance"] < 1
        assert 0 <= step["idle_share"] < 1
        assert 0 <= step["abr"] < 1
        levels = step["per_level"].values()
        assert sum(level["seconds"] for level in levels) == pytest.approx(step["step_seconds"])
        waiting = sum(level["waiting_seconds"] for level in levels)
        assert waiting == pytest.approx(step["idle_share"] * step["step_seconds"])
        assert sum(level["tokens"] for level in levels) == step["tokens"]
        assert 0 < max(step["memory_by_level"].values()) <= step["peak_memory_gib"]
    work = [step["timing_check"]["work_by_rank"] for step in steps if "timing_check" in step]
    assert [len(of_ranks) for of_ranks in work] == [2] * len(work)
    assert len(work) >= 2


def test_one_trace_of_each_rank_holds_the_steps_that_were_asked_for(run: tuple[Path, str, str]) -> None:
    folder = run[0] / "profile"
    assert sorted(path.name for path in folder.glob("*/*")) == ["rank0.json", "rank1.json"]
    trace = json.loads((folder / "steps-2-3" / "rank0.json").read_text())
    names = [event.get("name", "") for event in trace["traceEvents"]]
    assert sum(name.startswith("Optimizer.step#") for name in names) == 2


def test_weights_and_biases_gets_each_step_offline(run: tuple[Path, str, str]) -> None:
    (path,) = (run[0] / "wandb").glob("offline-run-*/run-*.wandb")
    # A record per step, with the names and values of TensorBoard, which tests/components/test_metrics.py checks.
    assert path.read_bytes().count(b"loss_metrics/global_avg_loss") >= 5


def test_a_rank_that_is_not_there_cannot_speak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOG_RANK", "2")
    assert log_rank(3) == 2
    for text in ("3", "-1", "first"):
        monkeypatch.setenv("LOG_RANK", text)
        with pytest.raises(ValueError, match=f"LOG_RANK={text} is out of range"):
            log_rank(3)


def test_missing_wandb_login_is_an_error_before_the_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_wandb()
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(ValueError, match=r"enable_wandb = true, but: No API key .* set WANDB_MODE=offline"):
        check_wandb()
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="wandb is not installed: pip install"):
        check_wandb()
