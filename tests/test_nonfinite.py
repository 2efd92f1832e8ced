"""Poisoned samples: the run stops and names them, or skips their step and says so in all that it tells."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from hbp_titan.data.sample_log import audit_run, read_starts
from hbp_titan.data.token_store import TokenStore
from hbp_titan.testing.local_ranks import run_distributed
from tests.poisoned_run import train_poisoned
from tests.tiny_run import write_tiny_run


@pytest.fixture
def argv(tmp_path: Path) -> list[str]:
    return [*write_tiny_run(tmp_path), "--checkpoint.export_hf=false", "--checkpoint.interval=100"]


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line, parse_constant=_not_json) for line in path.read_text().splitlines()]


def _not_json(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def _equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(value.equal(b[name]) for name, value in a.items())


def test_a_skipped_step_changes_nothing_and_is_told_everywhere(argv: list[str], tmp_path: Path) -> None:
    ranks = run_distributed(train_poisoned, 2, [*argv, "--training.on_nonfinite=skip"], "loss", [(0, 2)])
    found = ranks[0]
    ((iteration, sample),), (step,), (samples,) = found["meant"], found["steps"], found["samples"]
    assert found["error"] == ""
    assert [rank["counted"] for rank in ranks] == [[1, 1]] * 2  # the second is of a resumed run
    for number, (before, after) in enumerate(zip(found["states"], found["states"][1:], strict=False), start=1):
        assert _equal(before, after) == (number == step), number

    run = tmp_path / "run"
    steps = _lines(run / "metrics.jsonl")
    assert [m["step"] for m in steps if "skipped" in m] == [step]
    skipped = steps[step - 1]
    assert (skipped["loss"], skipped["grad_norm"], skipped["trained_tokens"], skipped["sources"]) == (None, None, 0, {})
    row = TokenStore.open(read_starts(run, step)[-1].store).where(sample)
    assert f"the loss is not finite on rank 1 in iteration {iteration}, samples {sample} ({row})" in skipped["skipped"]
    assert f"its {len(samples)} samples are not trained; skipped step 1 of at most 10" in skipped["skipped"]
    assert f"step {step}, level 128/cp1: " in skipped["skipped"]

    (event,) = _lines(run / "nonfinite.jsonl")
    assert (event["step"], event["action"], event["grad_norm"], event["samples"]) == (step, "skip", "nan", samples)
    assert event["packs_at_fault"] == [
        {"iteration": iteration, "level": 0, "dp_rank": 1, "ranks": [1], "samples": found["packs"][0]}
    ]
    for rank in range(2):
        lines = _lines(run / "sample_log" / "start-0001" / f"rank-{rank}.jsonl")
        assert [line["step"] for line in lines if line.get("skipped") == "nonfinite"] == [step]
    starts = read_starts(run, len(steps))
    (audit,), faults = audit_run(run, len(steps), starts, TokenStore.open(starts[-1].store))
    assert (faults, audit.problems) == ([], [])
    assert (audit.samples, audit.skipped) == (60 - len(samples), len(samples))
    assert audit.samples == sum(m["sources"]["train"]["samples"] for m in steps if "skipped" not in m)


def test_a_gradient_that_is_not_finite_is_skipped_up_to_the_limit(argv: list[str], tmp_path: Path) -> None:
    words = ["--training.on_nonfinite=skip", "--training.max_nonfinite_steps=1", "--levels=128:1,512:1"]
    (found,) = run_distributed(train_poisoned, 1, [*argv, *words], "gradient", [(0, 1), (0, 3)])
    first, second = sorted(found["steps"])
    events = _lines(tmp_path / "run" / "nonfinite.jsonl")
    assert [(event["step"], event["action"], event["packs_at_fault"]) for event in events] == [
        (first, "skip", []),
        (second, "stop", []),
    ]
    assert f"step {second}, level 128/cp1: every loss is finite, but the gradient of its " in found["error"]
    assert "1 steps were skipped before, training.max_nonfinite_steps allows no more" in found["error"]
    assert _equal(found["states"][first - 1], found["states"][first])
    assert _equal(found["states"][second - 1], found["states"][second])
    assert len(found["states"]) == second + 1
    # The step that stopped the run was not done.
    assert len(_lines(tmp_path / "run" / "sample_log" / "start-0001" / "rank-0.jsonl")) == second - 1


def test_a_poisoned_parameter_uses_the_limit_up_and_every_pack_is_at_fault(argv: list[str], tmp_path: Path) -> None:
    words = ["--training.on_nonfinite=skip", "--training.max_nonfinite_steps=2", "--levels=128:1,512:1"]
    ranks = run_distributed(train_poisoned, 2, [*argv, *words], "parameter", [])
    events = _lines(tmp_path / "run" / "nonfinite.jsonl")
    assert [(event["step"], event["action"]) for event in events] == [(3, "skip"), (4, "skip"), (5, "stop")]
    for event in events:
        assert [pack["ranks"] for pack in event["packs_at_fault"]] == [[0], [1]]
        assert sorted(i for pack in event["packs_at_fault"] for i in pack["samples"]) == sorted(event["samples"])
    for found in ranks:
        assert found["error"].startswith("step 5, level ")
        assert "2 steps were skipped before" in found["error"]
        before, after = (found["states"][number] for number in (3, 5))
        assert all(value.equal(after[name]) or bool(value.isnan().any()) for name, value in before.items())


def test_by_default_the_run_stops_and_names_the_samples_of_both_ranks_of_the_pack(
    argv: list[str], tmp_path: Path
) -> None:
    ranks = run_distributed(train_poisoned, 2, argv, "loss", [(1, 0)])
    ((iteration, sample),), (step,) = ranks[0]["meant"], ranks[0]["steps"]
    for found in ranks:
        assert found["error"].startswith(
            f"step {step}, level 512/cp2: the loss is not finite on rank 0, 1 in iteration "
        )
        assert f"iteration {iteration}, samples {sample} (" in found["error"]
        assert "the parameters were not updated (" in found["error"]
        assert found["counted"][0] == 0
        assert _equal(found["states"][step - 1], found["states"][step])
    (event,) = _lines(tmp_path / "run" / "nonfinite.jsonl")
    assert event["packs_at_fault"][0]["ranks"] == [0, 1]
    assert not any("skipped" in m for m in _lines(tmp_path / "run" / "metrics.jsonl"))
