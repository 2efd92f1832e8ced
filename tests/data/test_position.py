"""The position of a run: it comes back as it was, goes on on other ranks and levels, and refuses foreign plan files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hbp_titan.config import load_config
from hbp_titan.data import epoch as position_module
from hbp_titan.data.epoch import EpochPlans, EpochState, PlanSegment, plan_path
from hbp_titan.packing import CostModel, Plan
from tests.properties import examples

DATA = "d" * 64
LEVELS = "16:1,64:2"
OTHER_LEVELS = "32:1,64:1"


class Lengths:
    lengths = np.random.default_rng(5).integers(1, 65, 60)
    loss_tokens = lengths - 1


def _position(folder: Path, ranks: int, levels: str = LEVELS, *words: str) -> EpochState:
    config = load_config([f"--levels={levels}", "--training.epochs=3", *words])
    return EpochState(EpochPlans(config, Lengths(), ranks, CostModel()), folder, DATA)


def _train(position: EpochState, steps: int) -> list[list[int]]:
    """Train `steps` steps, fewer where the run ends, as the trainer does; returns the samples of each step."""
    trained = []
    total = position.total_steps()
    for _ in range(min(steps, total - position.step)):
        if position.finished:
            position.next_epoch()
        position.save_plan()
        plan, step = position.plan, position.step_in_plan
        trained.append(plan.samples_of(*plan.step_offsets[step : step + 2].tolist()).tolist())
        position.step += 1
        assert position.total_steps() == total
    return trained


def _saved(position: EpochState) -> dict[str, Any]:
    return json.loads(json.dumps(position.state()))


def test_same_ranks_go_on_in_the_same_plan(tmp_path: Path) -> None:
    first = _position(tmp_path, 4)
    _train(first, 3)
    again = _position(tmp_path, 4)
    assert again.restore(_saved(first)) == ""
    assert (again.step, again.epoch, again.step_in_plan) == (3, 0, 3)
    assert again.plan.fingerprint == first.plan.fingerprint
    # It is mapped, perhaps on other nodes: it must not be replaced.
    file = plan_path(tmp_path, 0).stat().st_ino
    again.save_plan()
    assert plan_path(tmp_path, 0).stat().st_ino == file
    assert again.total_steps() == first.total_steps() == sum(first.plans.of(e).num_steps for e in range(3))


@examples(25)
@given(st.lists(st.tuples(st.sampled_from([1, 2, 4]), st.booleans(), st.integers(0, 9)), min_size=1, max_size=6))
@example([(1, False, 1), (4, True, 9), (4, True, 9), (4, True, 9)])  # more steps than the 27 that the run has
def test_each_sample_is_trained_once_an_epoch_however_often_the_run_changes(
    tmp_path_factory: pytest.TempPathFactory, stretches: list[tuple[int, bool, int]]
) -> None:
    folder = tmp_path_factory.mktemp("position")
    saved: dict[str, Any] | None = None
    trained: list[list[int]] = []
    for ranks, other, steps in [*stretches, (2, False, 999)]:
        position = _position(folder, ranks, OTHER_LEVELS if other or ranks == 1 else LEVELS)
        if saved is not None:
            position.restore(saved)
        trained += _train(position, steps)
        # Where nothing was trained, a checkpoint on a signal is of the plan that the stretch began with.
        position.save_plan()
        saved = _saved(position)
    samples = [sample for step in trained for sample in step]
    assert [sorted(samples[start : start + 60]) for start in (0, 60, 120)] == [list(range(60))] * 3
    assert len(samples) == 3 * 60
    assert position.step == position.total_steps() == len(trained)
    assert position.finished


class Small:
    """Lengths of a data set whose every course of a run can be walked."""

    lengths = np.array([3, 60, 12, 16, 30, 7, 33, 16, 9])
    loss_tokens = lengths - 1


# A change at every step to every other, three times in a run: ranks, levels (also their number) and epochs.
SMALL_RUNS = [
    (1, "--levels=64:1", "--training.epochs=2"),
    (2, "--levels=16:1,64:2", "--training.epochs=2"),
    (4, "--levels=32:1,64:1", "--training.epochs=3"),
    (2, "--levels=32:1,64:1", "--training.epochs=1"),
]


@pytest.mark.parametrize("extra", ["", "--training.global_batch_tokens=90", "--packing.curriculum_steps=1.6"])
def test_every_small_run_ends_with_its_last_sample_at_the_promised_step(
    monkeypatch: pytest.MonkeyPatch, extra: str
) -> None:
    """Every sequence of up to three changes of SMALL_RUNS, each after every step: exhaustive, no example is drawn."""
    words = [word for word in [extra, "--packing.level_order=interleave" if "batch" in extra else ""] if word]
    makers = [(ranks, load_config([*own, *words])) for ranks, *own in SMALL_RUNS]
    plans = [EpochPlans(config, Small(), ranks, CostModel()) for ranks, config in makers]
    for own in plans:
        own.of = {epoch: own.of(epoch) for epoch in range(3)}.__getitem__  # type: ignore[assignment]
    files: dict[str, Plan] = {}  # by fingerprint: the courses share one folder, where names repeat
    monkeypatch.setattr(
        position_module,
        "load_segments",
        lambda folder, epoch, parts, data: [PlanSegment(part["first_step"], files[part["plan"]]) for part in parts],
    )
    walked: set[tuple[int, int, str]] = set()
    ends: set[int] = set()

    def walk(own: EpochPlans, saved: dict[str, Any] | None, trained: list[int], changes: int) -> None:
        """Run to the end from a checkpoint, `trained` its samples; and stop after every step for other changes."""
        position = EpochState(own, Path("run"), DATA)
        if saved is not None:
            position.restore(saved)
        total, trained = position.total_steps(), list(trained)
        over = position.step >= total  # it was longer when it was saved
        while True:
            for part in position.parts:
                files[part.plan.fingerprint] = part.plan
            branch = json.dumps(position.state())
            for number, other in enumerate(plans if changes and not over else []):
                if other is not own and (number, changes, branch) not in walked:
                    walked.add((number, changes, branch))
                    walk(other, json.loads(branch), trained, changes - 1)
            if position.step >= total:
                break
            if position.finished:
                position.next_epoch()
            plan, step = position.plan, position.step_in_plan
            trained += plan.samples_of(*plan.step_offsets[step : step + 2].tolist()).tolist()
            position.step += 1
            assert position.total_steps() == total
            if position.finished:
                assert sorted(trained[position.epoch * 9 :]) == list(range(9))
        if not over:
            ends.add(total)
            assert position.finished
            assert len(trained) == own.config.training.epochs * 9
            with pytest.raises(AssertionError, match="is the last"):
                position.next_epoch()

    for own in plans:
        walk(own, None, [], 3)
    assert len(walked) > 500
    assert len(ends) > 5


def test_a_remainder_is_the_same_whenever_and_by_whom_it_is_planned(tmp_path: Path) -> None:
    first = _position(tmp_path, 4)
    _train(first, 2)
    second, third = _position(tmp_path, 2), _position(tmp_path, 2)
    second.restore(_saved(first))
    _train(second, 2)  # killed before a checkpoint
    third.restore(_saved(first))
    assert third.plan.fingerprint == second.plan.fingerprint
    assert third.parts[1].first_step == second.parts[1].first_step == 3


def test_a_part_without_a_trained_step_is_replaced(tmp_path: Path) -> None:
    first = _position(tmp_path, 4)
    _train(first, 2)
    second = _position(tmp_path, 2)
    second.restore(_saved(first))
    second.save_plan()
    third = _position(tmp_path, 1, OTHER_LEVELS)
    assert "1 rank instead of 2" in third.restore(_saved(second))
    assert [part.first_step for part in third.parts] == [1, 3]
    assert sorted(third.plan.packs.ids) == sorted(second.plan.packs.ids)
    # Before the first step of an epoch it is planned as a whole.
    untrained = _position(tmp_path / "new", 4)
    untrained.save_plan()
    other = _position(tmp_path / "new", 2)
    other.restore(_saved(untrained))
    assert [part.plan.fingerprint for part in other.parts] == [other.plans.of(0).fingerprint]


def test_end_of_an_epoch_stays_there_whatever_the_ranks(tmp_path: Path) -> None:
    first = _position(tmp_path, 4)
    _train(first, first.plan.num_steps)
    other = _position(tmp_path, 2)
    assert other.restore(_saved(first)) == ""
    assert other.finished
    assert other.plan.fingerprint == first.plan.fingerprint
    other.next_epoch()
    assert (other.epoch, other.plan.world_size, other.parts[0].first_step) == (1, 2, first.plan.num_steps + 1)


def test_steps_of_the_configuration_are_all_whatever_the_ranks(tmp_path: Path) -> None:
    first = _position(tmp_path, 4, LEVELS, "--training.steps=9")
    _train(first, 2)
    other = _position(tmp_path, 2, LEVELS, "--training.steps=9")
    other.restore(_saved(first))
    assert first.total_steps() == other.total_steps() == 9


def test_a_run_that_is_to_be_shorter_is_over_where_it_should_have_ended(tmp_path: Path) -> None:
    first = _position(tmp_path, 4)
    epoch_steps = first.plan.num_steps
    _train(first, epoch_steps + 2)
    shorter = _position(tmp_path, 4, LEVELS, "--training.epochs=1")
    shorter.restore(_saved(first))
    assert shorter.total_steps() == epoch_steps < shorter.step


def test_plan_files_that_are_not_those_of_the_checkpoint_are_named(tmp_path: Path) -> None:
    first = _position(tmp_path, 4)
    _train(first, 2)
    second = _position(tmp_path, 2)
    second.restore(_saved(first))
    _train(second, 1)
    saved = _saved(second)
    rest, whole = plan_path(tmp_path, 0, 3), plan_path(tmp_path, 0)
    kept = rest.read_bytes()

    rest.write_bytes(whole.read_bytes())
    with pytest.raises(ValueError, match=r"epoch-0-step-3.safetensors is not the plan that was trained"):
        _position(tmp_path, 2).restore(saved)
    rest.write_bytes(kept[:-8])
    with pytest.raises(ValueError, match=r"epoch-0-step-3.safetensors: the plan file is damaged"):
        _position(tmp_path, 2).restore(saved)
    rest.write_bytes(kept)
    whole.unlink()
    with pytest.raises(ValueError, match=r"epoch-0.safetensors is missing: the plan of the epoch's steps from 1 on"):
        _position(tmp_path, 2).restore(saved)
    first.save_plan()
    with pytest.raises(ValueError, match=r"step 99 is none of the .* steps of its plan"):
        first.restore({**_saved(first), "step": 99})


def test_levels_too_short_for_what_is_left_are_refused(tmp_path: Path) -> None:
    first = _position(tmp_path, 4)
    _train(first, 1)
    shorter = _position(tmp_path, 4)
    shorter.plans.config.levels = list(load_config(["--levels=16:1,32:2"]).levels)
    with pytest.raises(ValueError, match=r"sample \d+ has \d\d tokens, more than the largest level's max_tokens=32"):
        shorter.restore(_saved(first))
