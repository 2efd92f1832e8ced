"""EpochState: it resumes bit for bit, replans for other ranks and levels, and refuses plan files that do not match."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from hbp_titan.components.optimizer import LRScheduler
from hbp_titan.config import load_config
from hbp_titan.data import epoch as epoch_module
from hbp_titan.data.epoch import EpochPlans, EpochState, PlanSegment, describe_segments, plan_path
from hbp_titan.data.sample_log import SampleLog, audit_run, check_epoch, read_starts, start_folders
from hbp_titan.packing import CostModel, Plan
from tests.properties import examples

DATA = "d" * 64
LEVELS = "16:1,64:2"
OTHER_LEVELS = "32:1,64:1"


class Lengths:
    lengths = np.random.default_rng(5).integers(1, 65, 60)
    loss_tokens = lengths - 1


def _state(folder: Path, ranks: int, levels: str = LEVELS, *words: str) -> EpochState:
    config = load_config([f"--levels={levels}", "--training.epochs=3", *words])
    return EpochState(EpochPlans(config, Lengths(), ranks, CostModel()), folder, DATA)


def _train(state: EpochState, steps: int) -> list[list[int]]:
    """Train `steps` steps, fewer where the run ends, as the trainer does; returns the samples of each step."""
    trained = []
    total = state.total_steps()
    for _ in range(min(steps, total - state.step)):
        if state.finished:
            state.next_epoch()
        state.save_plan()
        plan, step = state.plan, state.step_in_plan
        trained.append(plan.samples_of(*plan.step_offsets[step : step + 2].tolist()).tolist())
        state.step += 1
        assert state.total_steps() == total
    return trained


def _saved(state: EpochState) -> dict[str, Any]:
    return json.loads(json.dumps(state.state()))


@pytest.mark.parametrize("levels", [LEVELS, "16:1:ulysses:full:1:false,64:2:ulysses:offload:3:2:1:8:2"])
def test_the_same_ranks_and_levels_keep_the_plan_with_any_memory_settings(tmp_path: Path, levels: str) -> None:
    first = _state(tmp_path, 4)
    _train(first, 3)
    again = _state(tmp_path, 4, levels)
    assert again.restore(_saved(first)) == ""
    assert (again.step, again.epoch, again.step_in_plan) == (3, 0, 3)
    assert again.plan.fingerprint == first.plan.fingerprint
    # The file is mapped, perhaps on other nodes: it must not be replaced.
    file = plan_path(tmp_path, 0).stat().st_ino
    again.save_plan()
    assert plan_path(tmp_path, 0).stat().st_ino == file
    assert again.total_steps() == first.total_steps() == sum(first.plans.plan_for(e).num_steps for e in range(3))


class Store(Lengths):
    """Sample i is line i + 1 of data.jsonl."""

    fingerprint = DATA
    folder = Path("store")

    def __len__(self) -> int:
        return 60

    def where(self, index: int) -> str:
        return f"data.jsonl:{index + 1}"


class Start:
    """One start of a run without a model: what the trainer does with its position, its schedule and its sample log."""

    def __init__(self, state: EpochState, saved: dict[str, Any] | None) -> None:
        self.state, self.ranks, self.saved = state, state.plans.world_size, saved or _saved(state)
        total = state.total_steps()
        self.lr_scheduler = LRScheduler(**saved["lr"]) if saved else LRScheduler(total, total)
        if saved:
            state.restore(saved)
            self.lr_scheduler = self.lr_scheduler.extend(state.step, state.total_steps())
        self.total = self.lr_scheduler.total
        assert self.total == state.total_steps()

    def train(self, steps: int, saved_after: int) -> None:
        """Train `steps` steps, or up to the end; a checkpoint is written after `saved_after` of them and at the end."""
        state = self.state
        # As without a trained step: a checkpoint on a signal still needs the plan file.
        state.save_plan()
        if state.step >= self.total:
            return
        self._next_epoch()
        self._open_logs()
        for number in range(1, min(steps, self.total - state.step) + 1):
            state.save_plan()
            self._log_step()
            state.step += 1
            assert state.total_steps() == self.total
            if number <= saved_after or state.step == self.total:
                self.saved = {**_saved(state), "lr": dataclasses.asdict(self.lr_scheduler)}
            if state.finished:
                assert "60 samples, each trained once" in check_epoch(state.run_folder, state.segments, Store())  # type: ignore[arg-type]
            self._next_epoch()

    def _next_epoch(self) -> None:
        if self.state.finished and self.state.step < self.total:
            self.state.next_epoch()

    def _open_logs(self) -> None:
        state, number = self.state, 1 + len(start_folders(self.state.run_folder / "sample_log"))
        levels = state.plans.levels
        self.logs = [SampleLog(state.run_folder, rank, levels, lambda _: number) for rank in range(self.ranks)]
        for log in self.logs:
            log.start(state.step + 1, state.epoch, describe_segments(state.segments), DATA, Store.folder)

    def _log_step(self) -> None:
        plan, step = self.state.plan, self.state.step_in_plan
        for rank, log in enumerate(self.logs):
            for micro_batch in range(*plan.step_offsets[step : step + 2].tolist()):
                level = int(plan.level_of_iteration[micro_batch])
                samples = plan.iteration(micro_batch).packs[rank // plan.levels[level].cp_degree]
                log.add(micro_batch, SimpleNamespace(level=level, sample_ids=samples))  # type: ignore[arg-type]
            log.commit(self.state.step + 1, plan.epoch)


STRETCH = st.tuples(st.sampled_from([1, 2, 4]), st.booleans(), st.integers(0, 9), st.integers(0, 9))


@examples(20)
@given(st.lists(STRETCH, min_size=1, max_size=6))
@example([(1, False, 1, 9), (4, True, 9, 9), (4, True, 9, 9), (4, True, 9, 9)])  # once longer than total_steps
def test_each_sample_is_trained_once_per_epoch_over_random_changes(
    tmp_path_factory: pytest.TempPathFactory, stretches: list[tuple[int, bool, int, int]]
) -> None:
    """Ranks, other levels, steps up to a kill, steps up to the last checkpoint before it; then to the end."""
    folder = tmp_path_factory.mktemp("state")
    saved: dict[str, Any] | None = None
    for ranks, other, steps, saved_after in [*stretches, (2, False, 999, 999)]:
        state = _state(folder, ranks, OTHER_LEVELS if other or ranks == 1 else LEVELS)
        start = Start(state, saved)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.distributed, "get_world_size", lambda ranks=ranks: ranks)
            start.train(steps, saved_after)
        # A start that was killed before its first checkpoint leaves the one before it, or none.
        saved = start.saved if "lr" in start.saved else None
    assert state.finished
    assert state.step == state.total_steps() == start.total
    assert start.lr_scheduler.position_at(state.step) == pytest.approx(start.lr_scheduler.schedule_steps)
    audits, problems = audit_run(folder, state.step, read_starts(folder, state.step), Store())  # type: ignore[arg-type]
    assert problems == [problem for audit in audits for problem in audit.problems] == []
    assert [(audit.samples, audit.finished) for audit in audits] == [(60, True)] * 3
    assert sum(audit.steps_done for audit in audits) == state.step


class Small:
    """A data set so small that every sequence of changes can be tried."""

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
def test_every_small_run_trains_its_samples_in_the_announced_steps(monkeypatch: pytest.MonkeyPatch, extra: str) -> None:
    """Every sequence of up to three changes of SMALL_RUNS, each after every step: exhaustive, no example is drawn."""
    words = [word for word in [extra, "--packing.level_order=interleave" if "batch" in extra else ""] if word]
    makers = [(ranks, load_config([*own, *words])) for ranks, *own in SMALL_RUNS]
    plans = [EpochPlans(config, Small(), ranks, CostModel()) for ranks, config in makers]
    for own in plans:
        own.plan_for = {epoch: own.plan_for(epoch) for epoch in range(3)}.__getitem__  # type: ignore[assignment]
    files: dict[str, Plan] = {}  # by fingerprint: all runs share one folder, where names repeat
    monkeypatch.setattr(
        epoch_module,
        "load_segments",
        lambda folder, epoch, segments, data: [PlanSegment(s["first_step"], files[s["plan"]]) for s in segments],
    )
    walked: set[tuple[int, int, str]] = set()
    ends: set[int] = set()

    def walk(
        own: EpochPlans, saved: dict[str, Any] | None, trained: list[int], changes: int, lr: LRScheduler | None = None
    ) -> None:
        """Run to the end from a checkpoint, `trained` its samples; and stop after every step for other changes."""
        state = EpochState(own, Path("run"), DATA)
        if saved is not None:
            state.restore(saved)
        total, trained = state.total_steps(), list(trained)
        lr = lr.extend(state.step, total) if lr else LRScheduler(total, total)
        over = state.step >= total  # it was longer when it was saved
        while True:
            for segment in state.segments:
                files[segment.plan.fingerprint] = segment.plan
            branch = json.dumps(state.state())
            for number, other in enumerate(plans if changes and not over else []):
                if other is not own and (number, changes, branch) not in walked:
                    walked.add((number, changes, branch))
                    walk(other, json.loads(branch), trained, changes - 1, lr)
            if state.step >= total:
                break
            if state.finished:
                state.next_epoch()
            plan, step = state.plan, state.step_in_plan
            trained += plan.samples_of(*plan.step_offsets[step : step + 2].tolist()).tolist()
            state.step += 1
            assert state.total_steps() == total
            if state.finished:
                assert sorted(trained[state.epoch * 9 :]) == list(range(9))
        if not over:
            ends.add(total)
            assert state.finished
            # The learning rate reaches its end at the last step.
            assert lr.total == total
            assert lr.position_at(total) == pytest.approx(lr.schedule_steps)
            assert len(trained) == own.config.training.epochs * 9
            with pytest.raises(AssertionError, match="is the last"):
                state.next_epoch()

    for own in plans:
        walk(own, None, [], 3)
    assert len(walked) > 500
    assert len(ends) > 5


def test_a_remainder_is_replanned_the_same_after_a_kill(tmp_path: Path) -> None:
    first = _state(tmp_path, 4)
    _train(first, 2)
    second, third = _state(tmp_path, 2), _state(tmp_path, 2)
    second.restore(_saved(first))
    _train(second, 2)  # killed before a checkpoint
    third.restore(_saved(first))
    assert third.plan.fingerprint == second.plan.fingerprint
    assert third.segments[1].first_step == second.segments[1].first_step == 3


def test_a_segment_without_a_trained_step_is_replaced(tmp_path: Path) -> None:
    first = _state(tmp_path, 4)
    _train(first, 2)
    second = _state(tmp_path, 2)
    second.restore(_saved(first))
    second.save_plan()
    third = _state(tmp_path, 1, OTHER_LEVELS)
    assert "1 rank instead of 2" in third.restore(_saved(second))
    assert [part.first_step for part in third.segments] == [1, 3]
    assert sorted(third.plan.packs.ids) == sorted(second.plan.packs.ids)
    # Before the first step of an epoch it is planned as a whole.
    untrained = _state(tmp_path / "new", 4)
    untrained.save_plan()
    other = _state(tmp_path / "new", 2)
    other.restore(_saved(untrained))
    assert [part.plan.fingerprint for part in other.segments] == [other.plans.plan_for(0).fingerprint]


def test_the_end_of_an_epoch_needs_no_replanning(tmp_path: Path) -> None:
    first = _state(tmp_path, 4)
    _train(first, first.plan.num_steps)
    other = _state(tmp_path, 2)
    assert other.restore(_saved(first)) == ""
    assert other.finished
    assert other.plan.fingerprint == first.plan.fingerprint
    other.next_epoch()
    assert (other.epoch, other.plan.world_size, other.segments[0].first_step) == (1, 2, first.plan.num_steps + 1)


def test_training_steps_limit_the_run_on_any_ranks(tmp_path: Path) -> None:
    first = _state(tmp_path, 4, LEVELS, "--training.steps=9")
    _train(first, 2)
    other = _state(tmp_path, 2, LEVELS, "--training.steps=9")
    other.restore(_saved(first))
    assert first.total_steps() == other.total_steps() == 9


def test_a_run_with_fewer_epochs_than_trained_is_finished(tmp_path: Path) -> None:
    first = _state(tmp_path, 4)
    epoch_steps = first.plan.num_steps
    _train(first, epoch_steps + 2)
    shorter = _state(tmp_path, 4, LEVELS, "--training.epochs=1")
    shorter.restore(_saved(first))
    assert shorter.total_steps() == epoch_steps < shorter.step


def test_plan_files_that_differ_from_the_checkpoint_are_refused(tmp_path: Path) -> None:
    first = _state(tmp_path, 4)
    _train(first, 2)
    second = _state(tmp_path, 2)
    second.restore(_saved(first))
    _train(second, 1)
    saved = _saved(second)
    rest, whole = plan_path(tmp_path, 0, 3), plan_path(tmp_path, 0)
    kept = rest.read_bytes()

    rest.write_bytes(whole.read_bytes())
    with pytest.raises(ValueError, match=r"epoch-0-step-3.safetensors: not the plan"):
        _state(tmp_path, 2).restore(saved)
    rest.write_bytes(kept[:-8])
    with pytest.raises(ValueError, match=r"epoch-0-step-3.safetensors"):
        _state(tmp_path, 2).restore(saved)
    rest.write_bytes(kept)
    whole.unlink()
    with pytest.raises(ValueError, match=r"epoch-0.safetensors: missing"):
        _state(tmp_path, 2).restore(saved)
    first.save_plan()
    with pytest.raises(ValueError, match=r"step 99"):
        first.restore({**_saved(first), "step": 99})


def test_levels_too_short_for_a_remaining_sample_are_refused(tmp_path: Path) -> None:
    first = _state(tmp_path, 4)
    _train(first, 1)
    shorter = _state(tmp_path, 4)
    shorter.plans.config.levels = list(load_config(["--levels=16:1,32:2"]).levels)
    with pytest.raises(ValueError, match=r"max_tokens=32"):
        shorter.restore(_saved(first))
