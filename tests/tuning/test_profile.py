"""A profile of a tiny model on two ranks: measurements, memory limits, its file, and the fitted time models."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hbp_titan.components.oom import TRAINING, OutOfMemory, TorchFigures
from hbp_titan.components.timing import LevelTimeModel
from hbp_titan.config import JobConfig
from hbp_titan.distributed.world import World
from hbp_titan.engine import Engine
from hbp_titan.models.flavors import DEBUG
from hbp_titan.models.registry import get_flavor
from hbp_titan.packing import Level
from hbp_titan.testing.local_ranks import run_distributed
from hbp_titan.tuning.memory import estimate_memory
from hbp_titan.tuning.profile import Packs, default_forms, profile_levels
from hbp_titan.tuning.profile_file import (
    Measurement,
    Profile,
    fit_level_time,
    load_profile,
    nonnegative_least_squares,
    profile_key,
    save_profile,
)
from hbp_titan.tuning.search import Candidate
from tests.properties import examples
from tests.tiny_run import ARGS

CPU_WORLD = World(0, 1, torch.device("cpu"))
DEEP = dataclasses.replace(ARGS, num_layers=4)
LENGTHS = np.random.default_rng(0).integers(4, 120, 200)
LOSS_TOKENS = LENGTHS // 2
SHORT, LONG = Level(128), Level(256, cp_degree=2)


def _estimate(policy: str, layers: int | None) -> int:
    level = dataclasses.replace(SHORT, ac_policy=policy, ac_layers=layers)
    tokens = Packs.draw(128, LENGTHS, LOSS_TOKENS, 3, DEEP).max_loss_tokens
    return estimate_memory(DEEP, level, JobConfig(), 2, device_type="cpu", loss_tokens=tokens).peak_bytes


def _levels(level: Level, *policies: str) -> list[Level]:
    return [dataclasses.replace(level, ac_policy=policy) for policy in policies]


FORMS = (SHORT, LONG, dataclasses.replace(LONG, cp_style="allgather"))
# SHORT fails when it runs; the estimate of the last is so far above the limit that it must not run at all.
SOME_FAIL = [Level(64), SHORT, LONG, dataclasses.replace(SHORT, max_tokens=1 << 20, ac_policy="full")]


def _profile_each(world: World, folder: Path) -> None:
    """Profile three sets of candidates and write the JSON on rank 0."""
    torch.set_num_threads(1)
    run, fails_at = Engine.forward_backward, 0

    def forward_backward(self: Engine, batch: Any) -> Any:
        if self.runtime.levels[batch.level].max_tokens == fails_at:
            # As the engine raises it, in the middle of the work.
            raise OutOfMemory(TRAINING, None, TorchFigures())
        return run(self, batch)

    Engine.forward_backward = forward_backward  # type: ignore[method-assign]
    # Nearer to the peak of two layers: with several ranks a reading can be too high, never too low.
    short = (3 * _estimate("full", 2) + _estimate("full", 3)) // 4
    runs: dict[str, tuple[list[Level], int, dict[str, Any]]] = {
        "all fit": ([level for form in FORMS for level in _levels(form, "none", "full")], 0, {}),
        "some fail": (SOME_FAIL, 128, {"memory_limit": 2 * _estimate("none", None)}),
        "short": (_levels(SHORT, "none", "full", "keep_attention"), 0, {"memory_limit": short, "margin": 0.0}),
    }
    for name, (candidates, fails_at, options) in runs.items():  # noqa: B007
        profile = profile_levels(JobConfig(), DEEP, world, LENGTHS, LOSS_TOKENS, candidates, iterations=3, **options)
        if world.rank == 0:
            save_profile(profile, folder / name)


@pytest.fixture(scope="module")
def profiles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Profile]:
    folder = tmp_path_factory.mktemp("profiles")
    run_distributed(_profile_each, 2, folder)
    loaded = {path.name: load_profile(path, json.loads(path.read_text())["key"]) for path in folder.iterdir()}
    return {name: profile for name, profile in loaded.items() if profile}


def test_every_level_that_fits_gets_a_time(profiles: dict[str, Profile]) -> None:
    profile = profiles["all fit"]
    # Everything fits without recomputation, which is then the fastest: one candidate per form.
    assert [candidate.level for candidate in profile.candidates] == list(FORMS)
    timed = {row.level: row for row in profile.measurements if row.seconds}
    for candidate in profile.candidates:
        row = timed[candidate.level]
        assert candidate.time is not None
        # Three packs, each timed twice; the lesser time of each counts.
        assert len(row.seconds) == len(row.loads) == 6
        assert min(row.seconds) > 0
        least = [min(s for s, other in zip(row.seconds, row.loads, strict=True) if other == load) for load in row.loads]
        assert candidate.time.seconds(np.array(row.loads)).mean() == pytest.approx(np.mean(least), rel=0.5)
        assert candidate.peak_bytes is not None
        assert profile.resident_bytes < candidate.peak_bytes < profile.memory_limit
    assert profile.step_seconds > 0
    # The measured peak of each form is there too.
    assert [row.level for row in profile.measurements if not row.seconds] == list(FORMS)


def test_levels_out_of_memory_do_not_affect_the_others(profiles: dict[str, Profile]) -> None:
    profile = profiles["some fail"]
    fits = {candidate.level.max_tokens: candidate.fits for candidate in profile.candidates}
    assert fits == {64: True, 128: False, 256: True, 1 << 20: False}
    failed = {row.level.max_tokens: row.estimated for row in profile.measurements if row.out_of_memory}
    assert failed == {128: False, 1 << 20: True}


def test_fewest_layers_are_checkpointed_if_memory_is_short(profiles: dict[str, Profile]) -> None:
    profile = profiles["short"]
    found = {candidate.level.ac_policy: candidate for candidate in profile.candidates}
    assert not found["none"].fits
    for policy in ("full", "keep_attention"):
        peak, depth = found[policy].peak_bytes, found[policy].level.ac_layers
        assert found[policy].fits
        assert depth is not None
        assert peak is not None
        assert depth >= 3
        assert peak <= profile.memory_limit
    # One layer less did not fit: it was measured, or the two depths say so.
    assert found["full"].level.ac_layers == 3
    measured = {row.level.ac_layers for row in profile.measurements if row.level.ac_policy == "full"}
    assert len(measured) >= 2


def _made_up(key: dict[str, Any]) -> Profile:
    level = Level(512, 2, "hybrid", "full", 3)
    rows = [
        Measurement(level, peak_bytes=77),
        Measurement(level, 77, loads=[[1, 2, 3, 4], [1, 5, 6, 7]], seconds=[0.1, 0.30000000000000004], error=0.01),
        Measurement(SHORT, 99, out_of_memory=True, estimated=True),
    ]
    candidates = [Candidate(level, LevelTimeModel(0.1, 1e-7, 1e-11), 77), Candidate(SHORT, None, 99)]
    return Profile(key, 80, 40, 0.25, rows, candidates)


def _key(**changes: Any) -> dict[str, Any]:
    config = JobConfig()
    config.training.loss_chunk_tokens = changes.pop("chunk", 1024)
    args = dataclasses.replace(ARGS, **changes)
    return profile_key(config, args, CPU_WORLD, LENGTHS, LOSS_TOKENS, margin=0.05, candidates=[SHORT])


def test_file_round_trip(tmp_path: Path) -> None:
    profile = _made_up(_key())
    save_profile(profile, tmp_path / "new" / "profile.json")
    assert load_profile(tmp_path / "new" / "profile.json", _key()) == profile
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["profile.json"]


def test_file_with_another_key_is_ignored(tmp_path: Path) -> None:
    path, printed = tmp_path / "profile.json", list[str]()
    assert load_profile(path, _key(), printed.append) is None
    save_profile(_made_up(_key()), path)
    assert load_profile(path, _key(num_layers=3), printed.append) is None
    assert load_profile(path, _key(chunk=2048, num_layers=3), printed.append) is None
    assert load_profile(path, {**_key(), "lengths": "others"}, printed.append) is None
    assert [line.split("different ", 1)[1] for line in printed] == [
        "model; measuring again",
        "model, loss_chunk_tokens; measuring again",
        "lengths; measuring again",
    ]


def test_key_does_not_depend_on_the_order_of_samples() -> None:
    keys = [profile_key(JobConfig(), ARGS, CPU_WORLD, np.array(x), np.array(x))["lengths"] for x in ([3, 9], [9, 3])]
    assert keys[0] == keys[1]
    assert keys[0] != profile_key(JobConfig(), ARGS, CPU_WORLD, np.array([3, 8]), np.array([3, 8]))["lengths"]


def test_invalid_file(tmp_path: Path) -> None:
    (tmp_path / "profile.json").write_text('{"levels": ')
    with pytest.raises(ValueError, match="not a profile"):
        load_profile(tmp_path / "profile.json", _key())


def test_timed_packs_range_from_light_to_heavy() -> None:
    packs = Packs.draw(128, LENGTHS, LOSS_TOKENS, 4, ARGS)
    squares = packs.loads[:, 2]
    assert (np.diff(squares) >= 0).all()
    assert squares[-1] > 1.5 * squares[0]
    for number in range(4):
        batch = packs.batch(number, SHORT, 0, ARGS, 0)
        assert batch.input_ids.shape == (128,)
        assert batch.num_loss_tokens == packs.loads[number, 1]
        documents = batch.lengths[: int(packs.loads[number, 3])]
        assert (documents**2).sum() == squares[number]


def test_default_forms() -> None:
    forms = [(level.max_tokens, level.cp_degree, level.cp_style) for level in default_forms(8000, 2, DEBUG)]
    assert forms == [
        (tokens, cp, style)
        for tokens in (256, 512, 1024, 2048, 4096, 8192)
        for cp, style in ((1, "ulysses"), (2, "ulysses"), (2, "allgather"))
    ]
    # None below the median.
    assert {level.max_tokens for level in default_forms(8192, 2, DEBUG, median=3000)} == {4096, 8192}


@pytest.mark.parametrize(
    ("world_size", "longest", "forms"),
    [
        (3, (4128, 131070), {1: "u", 3: "a"}),
        (5, (4120, 131070), {1: "u", 5: "a"}),
        (6, (4128, 131070), {1: "u", 2: "ua", 3: "a", 6: "ha"}),
        (7, (4144, 131068), {1: "u", 7: "a"}),
        (8, (4096, 131072), {1: "u", 2: "ua", 4: "ua", 8: "ha"}),
        (12, (4128, 131064), {1: "u", 2: "ua", 3: "a", 4: "ua", 6: "ha", 12: "ha"}),
        (14, (4144, 131068), {1: "u", 2: "ua", 7: "a", 14: "ha"}),
    ],
)
def test_every_divisor_of_the_world_is_a_cp_degree(
    world_size: int, longest: tuple[int, int], forms: dict[int, str]
) -> None:
    # 28 query and 4 kv heads; a, h, u: allgather, hybrid, ulysses. The limit of 131072 is no multiple of 3, 5 and 7.
    levels = default_forms(78063, world_size, get_flavor("qwen2_5_7b_128k"))
    assert (levels[0].max_tokens, levels[-1].max_tokens) == longest
    found: dict[int, str] = {}
    for level in dict.fromkeys((level.cp_degree, level.cp_style) for level in levels):
        found[level[0]] = found.get(level[0], "") + level[1][0]
    assert found == forms
    assert all(level.max_tokens % world_size == 0 for level in levels)


def test_longest_sample_at_the_limit_has_the_cp_degrees_that_can_hold_it() -> None:
    levels = default_forms(131071, 6, get_flavor("qwen2_5_7b_128k"))
    assert {level.cp_degree: level.max_tokens for level in levels if level.max_tokens > 131000} == {
        1: 131072, 2: 131072, 3: 131070, 6: 131070,
    }  # fmt: skip


@examples(200)
@given(st.integers(0, 10**6), st.integers(4, 9))
def test_fit_is_the_constrained_optimum(seed: int, rows: int) -> None:
    # Karush-Kuhn-Tucker: the problem is convex, so they are sufficient.
    generator = np.random.default_rng(seed)
    columns, values = generator.normal(size=(rows, 4)), generator.normal(size=rows)
    x = nonnegative_least_squares(columns, values)
    gradient = columns.T @ (columns @ x - values)
    assert (x >= 0).all()
    assert (gradient >= -1e-9).all()
    np.testing.assert_allclose(gradient[x > 0], 0, atol=1e-9)


def test_fit_recovers_the_coefficients() -> None:
    # 1, trained tokens, squared tokens, documents
    loads = np.array(
        [[1, 100, 5000, 7], [1, 900, 90000, 3], [1, 400, 640000, 1], [1, 800, 20000, 60], [1, 50, 9000, 2]]
    )
    truth = LevelTimeModel(base=0.2, per_loss_token=1e-4, per_square=2e-7, per_document=3e-3)
    found, error = fit_level_time(loads, truth.seconds(loads))
    np.testing.assert_allclose(
        [found.base, found.per_loss_token, found.per_square, found.per_document], [0.2, 1e-4, 2e-7, 3e-3], rtol=1e-6
    )
    assert error < 1e-9


def test_fit_of_equal_packs_is_the_base() -> None:
    found, error = fit_level_time(np.tile([1.0, 500, 10000, 4], (4, 1)), np.array([0.9, 1.1, 0.9, 1.1]))
    assert found == LevelTimeModel(base=pytest.approx(1.0))
    assert error == pytest.approx(0.1)


def test_fit_of_collinear_columns_is_not_wild() -> None:
    # Trained tokens and documents rise together.
    loads = np.array([[1, 10 * k, 100, k] for k in (1.0, 2, 3, 4, 5)])
    found, _ = fit_level_time(loads, np.array([1.1, 1.2, 1.3, 1.4, 1.5]))
    assert found.base == pytest.approx(1.0)
    assert found.seconds(loads) == pytest.approx([1.1, 1.2, 1.3, 1.4, 1.5])
    assert min(found.per_loss_token, found.per_document) == 0.0
