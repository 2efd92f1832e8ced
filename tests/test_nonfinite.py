"""Poisoned samples: the run stops and names them, or skips their step and records it everywhere."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hbp_titan.config import load_config
from hbp_titan.data.sample_log import audit_run, read_starts
from hbp_titan.data.token_store import TokenStore
from hbp_titan.distributed.world import World
from hbp_titan.errors import UserError
from hbp_titan.packing import Plan
from hbp_titan.testing.local_ranks import run_distributed
from hbp_titan.train import Trainer
from tests.programs import run_python
from tests.runs import before_step, equal, whole_state
from tests.tiny_run import write_tiny_run

NUM_ROWS = 36


@pytest.fixture
def argv(tmp_path: Path) -> list[str]:
    return [*write_tiny_run(tmp_path, NUM_ROWS), "--checkpoint.export_hf=false", "--checkpoint.interval=100"]


def _last_sample(plan: Plan, level: int, number: int) -> tuple[int, int]:
    """Return (micro-batch, first sample of the last dp rank) of the level's micro-batch of that number."""
    micro_batch = [i for i in range(plan.num_iterations) if plan.level_of_iteration[i] == level][number]
    return micro_batch, int(plan.iteration(micro_batch).packs[-1][0])


def _train_poisoned(
    world: World, argv: Sequence[str], poison: str, places: Sequence[tuple[int, int]]
) -> dict[str, Any]:
    """Train with the "loss" or the "gradient" of samples poisoned, at `places` (level, number of its micro-batch).

    poison: "parameter" poisons one number of the first parameter before step 3 instead.
    """
    trainer = Trainer(load_config(list(argv)), world)
    plan = trainer.position.plan
    targets = [_last_sample(plan, level, number) for level, number in places]
    poisoned = {sample for _, sample in targets}
    active = False

    def spoil(module: torch.nn.Module, inputs: Any, output: Tensor) -> Tensor:
        if active and poison == "loss":
            return output * math.nan
        if active and output.requires_grad:
            output.register_hook(lambda gradient: gradient * math.inf)
        return output

    trainer.model.tok_embeddings.register_forward_hook(spoil)
    forward_backward, states = trainer.engine.forward_backward, []

    def marked(batch: Any, last: bool = True) -> Tensor:
        nonlocal active
        active = trainer.sample_log._file is not None and bool(poisoned & set(batch.sample_ids.tolist()))
        loss = forward_backward(batch, last)
        active = False
        return loss

    def record(step: int) -> None:
        if poison == "parameter" and step == 2 and world.rank == 0:
            with torch.no_grad():
                next(iter(trainer.model.parameters())).to_local()[0, 0] = math.nan  # type: ignore[attr-defined]
        states.append(whole_state(trainer))

    trainer.engine.forward_backward = marked  # type: ignore[method-assign]
    before_step(trainer, record)
    error = ""
    try:
        trainer.train()
    except UserError as raised:
        error = str(raised)
    states.append(whole_state(trainer))
    steps = [int(plan.step_of_iteration[micro_batch]) for micro_batch, _ in targets]
    return {
        "targets": targets,
        "steps": [step + 1 for step in steps],
        "samples": [plan.samples_of(*plan.step_offsets[step : step + 2].tolist()).tolist() for step in steps],
        "packs": [plan.iteration(micro_batch).packs[-1].tolist() for micro_batch, _ in targets],
        "states": states,
        "error": error,
        # The second is of a resumed run.
        "skipped": [trainer.nonfinite.steps, Trainer(load_config(list(argv)), world).nonfinite.steps],
    }


def _lines(path: Path) -> list[dict[str, Any]]:
    def not_json(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=not_json) for line in path.read_text().splitlines()]


def test_skipped_step_changes_nothing_and_is_recorded_everywhere(argv: list[str], tmp_path: Path) -> None:
    ranks = run_distributed(_train_poisoned, 2, [*argv, "--training.on_nonfinite=skip"], "loss", [(0, 2)])
    found = ranks[0]
    ((micro_batch, sample),), (step,), (samples,) = found["targets"], found["steps"], found["samples"]
    assert found["error"] == ""
    assert [rank["skipped"] for rank in ranks] == [[1, 1]] * 2
    for number, (before, after) in enumerate(zip(found["states"], found["states"][1:], strict=False), start=1):
        assert equal(before, after) == (number == step), number

    run = tmp_path / "run"
    steps = _lines(run / "metrics.jsonl")
    assert [m["step"] for m in steps if "skipped" in m] == [step]
    skipped = steps[step - 1]
    assert (skipped["loss"], skipped["grad_norm"], skipped["trained_tokens"], skipped["sources"]) == (None, None, 0, {})
    row = TokenStore.open(read_starts(run, step)[-1].store).where(sample)
    assert f"on rank 1 in micro-batch {micro_batch}, samples {sample} ({row})" in skipped["skipped"]
    assert f"step {step}, level 128/cp1" in skipped["skipped"]

    (event,) = _lines(run / "nonfinite.jsonl")
    assert (event["step"], event["action"], event["grad_norm"], event["samples"]) == (step, "skip", "nan", samples)
    assert event["packs_at_fault"] == [
        {"micro_batch": micro_batch, "level": 0, "dp_rank": 1, "ranks": [1], "samples": found["packs"][0]}
    ]
    for rank in range(2):
        lines = _lines(run / "sample_log" / "start-0001" / f"rank-{rank}.jsonl")
        assert [line["step"] for line in lines if line.get("skipped") == "nonfinite"] == [step]
    starts = read_starts(run, len(steps))
    (audit,), problems = audit_run(run, len(steps), starts, TokenStore.open(starts[-1].store))
    assert (problems, audit.problems) == ([], [])
    assert (audit.samples, audit.skipped) == (NUM_ROWS - len(samples), len(samples))
    assert audit.samples == sum(m["sources"]["train"]["samples"] for m in steps if "skipped" not in m)


def test_nonfinite_gradients_are_skipped_up_to_the_limit(argv: list[str], tmp_path: Path) -> None:
    words = ["--training.on_nonfinite=skip", "--training.max_nonfinite_steps=1", "--levels=128:1,512:1"]
    words += ["--optimizer.name=muon", "--optimizer.state_dtype=bfloat16"]
    (found,) = run_distributed(_train_poisoned, 1, [*argv, *words], "gradient", [(0, 1), (0, 3)])
    first, second = sorted(found["steps"])
    events = _lines(tmp_path / "run" / "nonfinite.jsonl")
    assert [(event["step"], event["action"], event["packs_at_fault"]) for event in events] == [
        (first, "skip", []),
        (second, "stop", []),
    ]
    assert f"step {second}, level 128/cp1: every loss is finite" in found["error"]
    assert "max_nonfinite_steps" in found["error"]
    for step in (first, second):
        assert equal(found["states"][step - 1], found["states"][step])
    assert len(found["states"]) == second + 1
    # The step that stopped the run was not done.
    assert len(_lines(tmp_path / "run" / "sample_log" / "start-0001" / "rank-0.jsonl")) == second - 1


def test_poisoned_parameter_reaches_the_limit_and_every_pack_is_at_fault(argv: list[str], tmp_path: Path) -> None:
    words = ["--training.on_nonfinite=skip", "--training.max_nonfinite_steps=2", "--levels=128:1,512:1"]
    ranks = run_distributed(_train_poisoned, 2, [*argv, *words], "parameter", [])
    events = _lines(tmp_path / "run" / "nonfinite.jsonl")
    assert [(event["step"], event["action"]) for event in events] == [(3, "skip"), (4, "skip"), (5, "stop")]
    for event in events:
        assert [pack["ranks"] for pack in event["packs_at_fault"]] == [[0], [1]]
        assert sorted(i for pack in event["packs_at_fault"] for i in pack["samples"]) == sorted(event["samples"])
    for found in ranks:
        assert found["error"].startswith("step 5, level ")
        before, after = (found["states"][number] for number in (3, 5))
        assert all(value.equal(after[name]) or bool(value.isnan().any()) for name, value in before.items())


def test_by_default_the_run_stops_and_names_the_pack_on_all_its_ranks(argv: list[str], tmp_path: Path) -> None:
    ranks = run_distributed(_train_poisoned, 2, argv, "loss", [(1, 0)])
    ((micro_batch, sample),), (step,) = ranks[0]["targets"], ranks[0]["steps"]
    for found in ranks:
        assert found["error"].startswith(f"step {step}, level 512/cp2: ")
        assert f"on rank 0, 1 in micro-batch {micro_batch}, samples {sample} (" in found["error"]
        assert found["skipped"][0] == 0
        assert equal(found["states"][step - 1], found["states"][step])
    (event,) = _lines(tmp_path / "run" / "nonfinite.jsonl")
    assert event["packs_at_fault"][0]["ranks"] == [0, 1]
    assert not any("skipped" in m for m in _lines(tmp_path / "run" / "metrics.jsonl"))


@pytest.mark.parametrize("ranks", [1, 2])
def test_stop_is_one_error_line_and_a_nonzero_exit_code(argv: list[str], tmp_path: Path, ranks: int) -> None:
    # The first update makes every parameter so large that the second forward overflows.
    words = ["--optimizer.lr=1e30", "--lr_scheduler.warmup_steps=0", "--levels=128:1,512:1"]
    result = run_python("-m", "hbp_titan.train", *argv, *words, ranks=ranks)
    assert result.returncode == 1
    assert result.stderr.startswith("error: step 2, level ")
    assert len(result.stderr.splitlines()) == 1
    assert "on_nonfinite" in result.stderr
