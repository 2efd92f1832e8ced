"""The selection of levels against the paper's figures, brute force, and worlds with a known answer."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hbp_titan.components.timing import LevelTimeModel, predict_epoch
from hbp_titan.packing import CostModel, Level, build_plan
from hbp_titan.tuning.search import MIN_GAIN, Candidate, Workload, baselines, describe, select_paper, select_search
from hbp_titan.tuning.simulate import tulu3_longcite_like
from tests.properties import examples

K = 1024


def _workload(lengths: Sequence[int], world_size: int, **settings: object) -> Workload:
    array = np.array(lengths, np.int64)
    return Workload(array, array - 1, world_size, CostModel(), **settings)  # type: ignore[arg-type]


def _shape(levels: Sequence[Level]) -> list[tuple[int, int]]:
    return [(level.max_tokens, level.cp_degree) for level in levels]


# Seconds of an iteration of equal tokens on 32 ranks: Llama-3.1-8B, table 19; the last is 32K at SP 1, out of memory.
TABLE_19 = [(16, 1, 28, 2.65), (8, 2, 8, 2.69), (32, 8, 8, 2.83), (64, 4, 28, 3.01), (128, 8, 28, 3.05), (32, 1, 32, 0)]


def _table_19() -> list[Candidate]:
    equal_tokens = 32 * 16 * K
    candidates = []
    for length, sp, ckpt, seconds in TABLE_19:
        level = Level(length * K, sp, ac_policy="full", ac_layers=ckpt)
        tokens = level.max_tokens * 32 // sp
        candidates.append(Candidate(level, LevelTimeModel(seconds * tokens / equal_tokens) if seconds else None))
    return candidates


def test_paper_figures_give_the_paper_levels() -> None:
    workload = _workload(tulu3_longcite_like(3000), 32)
    selection = select_paper(_table_19(), workload)
    assert _shape(selection.levels) == [(16 * K, 1), (128 * K, 8)]
    assert [level.ac_layers for level in selection.levels] == [28, 28]
    assert selection.notes == ()


def _paper_world(best: tuple[int, int], largest: tuple[int, int], alone: Sequence[int]) -> list[Candidate]:
    """A world of 8 ranks where `best` is the fastest for each token; lengths in `alone` run at cp degree 1, slowly."""

    def candidate(length: int, cp: int, per_token: float) -> Candidate:
        return Candidate(Level(length, cp), LevelTimeModel(per_token * length * 8 / cp))

    return [candidate(*best, 1.0), candidate(*largest, 1.5), *(candidate(length, 1, 2.0) for length in alone)]


@pytest.mark.parametrize(
    ("best", "largest", "alone", "selected"),
    [
        # The paper's example: 32K at SP 2 gives 16K at SP 1; 128K / 2 is above 32K and stays.
        ((32, 2), (128, 2), (16, 64), [(16, 1), (32, 2), (64, 1), (128, 2)]),
        # 128K / 8 is below the best length and is dropped.
        ((32, 2), (128, 8), (8, 16), [(16, 1), (32, 2), (128, 8)]),
        # The best length holds every sample.
        ((128, 8), (128, 8), (8, 16), [(16, 1), (128, 8)]),
    ],
)
def test_stage_two_adds_lengths_at_cp_degree_1(
    best: tuple[int, int], largest: tuple[int, int], alone: tuple[int, ...], selected: list[tuple[int, int]]
) -> None:
    shapes = [(length * K, cp) for length, cp in (best, largest)]
    candidates = _paper_world(*shapes, [length * K for length in alone])
    selection = select_paper(candidates, _workload([100, 100 * K], 8))
    assert _shape(selection.levels) == [(length * K, cp) for length, cp in selected]


def test_unmeasured_length_of_stage_two_is_replaced_by_a_shorter_one() -> None:
    workload = _workload([100, 100 * K], 8)
    with_shorter = select_paper(_paper_world((32 * K, 2), (128 * K, 8), [8 * K]), workload)
    assert _shape(with_shorter.levels) == [(8 * K, 1), (32 * K, 2), (128 * K, 8)]
    assert with_shorter.notes[0].endswith("; 8192 replaces it")
    without = select_paper(_paper_world((32 * K, 2), (128 * K, 8), []), workload)
    assert _shape(without.levels) == [(32 * K, 2), (128 * K, 8)]
    assert "no shorter level" in without.notes[0]


def test_paper_stages_ignore_lengths_above_the_longest_sample() -> None:
    candidates = _paper_world((128 * K, 1), (16 * K, 1), [])
    assert _shape(select_paper(candidates, _workload([100, 9 * K], 8)).levels) == [(16 * K, 1)]


def _brute_force(candidates: Sequence[Candidate], workload: Workload) -> float:
    """Least predicted seconds over every set of one to four candidates of different lengths."""
    fitting = sorted((c for c in candidates if c.fits), key=lambda c: c.level.max_tokens)
    least = float("inf")
    for size in range(1, 5):
        for chosen in itertools.combinations(fitting, size):
            lengths = [c.level.max_tokens for c in chosen]
            if len(set(lengths)) < size or lengths[-1] < workload.max_sample_tokens:
                continue
            plan = build_plan(
                workload.lengths, [c.level for c in chosen], workload.world_size,
                loss_tokens=workload.loss_tokens, cost=workload.cost,
            )  # fmt: skip
            least = min(least, predict_epoch(plan, [c.time for c in chosen if c.time], workload.step_seconds).seconds)
    return least


@st.composite
def _worlds(draw: st.DrawFn) -> tuple[list[Candidate], Workload]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    num_samples = draw(st.integers(1, 200))
    lengths = np.clip(np.exp(rng.normal(3, draw(st.floats(0.2, 1.5)), num_samples)), 1, 512).astype(np.int64)
    candidates = []
    for max_tokens in draw(st.sets(st.sampled_from([32, 64, 128, 256]), max_size=3)) | {512}:
        for cp_degree, depth in itertools.product((1, 2, 4), (0, 1)):
            level = Level(max_tokens, cp_degree, ac_policy="full" if depth else "none")
            base = (0.3 + max_tokens / 64 / cp_degree + 0.2 * cp_degree) * (1 + 0.3 * depth) * rng.uniform(0.7, 1.3)
            time = LevelTimeModel(base, 1e-3 / cp_degree, rng.uniform(0, 2e-5) / cp_degree, rng.uniform(0, 1e-2))
            fits = max_tokens == 512 and cp_degree == 4 and depth == 1
            candidates.append(Candidate(level, time if fits or rng.random() < 0.7 else None))
    cost = CostModel(1.0, 1e-3)
    return candidates, Workload(lengths, lengths // 2, 4, cost, step_seconds=draw(st.sampled_from([0.0, 0.2])))


@examples(6)
@given(_worlds())
def test_search_equals_brute_force(world: tuple[list[Candidate], Workload]) -> None:
    candidates, workload = world
    selection = select_search(candidates, workload)
    fitting = [c.level for c in candidates if c.fits]
    assert all(level in fitting for level in selection.levels)
    assert selection.levels[-1].max_tokens >= workload.lengths.max()
    assert selection.predicted.seconds <= _brute_force(candidates, workload) * (1 + MIN_GAIN + 0.005)
    # Its prediction is that of the planner and the time model.
    again = predict_epoch(workload.plan(selection.levels), selection.times, workload.step_seconds)
    assert again.seconds == selection.predicted.seconds


def _linear_world(communication: float, lengths: Sequence[int] = (4 * K, 16 * K, 64 * K)) -> list[Candidate]:
    """One microsecond a token and rank, `communication` more for each token that is shared; 16K fits on a rank."""
    return [
        Candidate(
            Level(length, cp),
            LevelTimeModel(length / cp * 1e-6 * (1 + communication * (cp > 1)), per_square=1e-13 / cp),
        )
        if length // cp <= 16 * K
        else Candidate(Level(length, cp), None)
        for length in lengths
        for cp in (1, 4, 8)
    ]


MIXED = [500] * 4000 + [3000] * 400 + [60_000] * 16


def test_expensive_communication_keeps_short_data_on_one_rank() -> None:
    selection = select_search(_linear_world(0.5), _workload(MIXED, 8))
    assert _shape(selection.levels)[-1] == (64 * K, 4)
    assert all(level.cp_degree == 1 for level in selection.levels[:-1])
    # 3.2M of 4.2M tokens at 1 instead of 1.5 microseconds.
    one_level = predict_epoch(_workload(MIXED, 8).plan([Level(64 * K, 4)]), [LevelTimeModel(16 * K * 1.5e-6)]).seconds
    assert selection.predicted.seconds < 0.77 * one_level


@pytest.mark.parametrize(
    ("candidates", "lengths", "selected"),
    [
        # Communication is free, and a short pack costs as much as a long one: no gain from a second level.
        ([(4, 4, 1.0), (16, 4, 1.0), (64, 4, 1.0)], MIXED, [(64 * K, 4)]),
        # Packs of 64K are twice as fast for each token as those of 4K, which the longest sample would fit.
        ([(4, 1, 2.0), (64, 1, 16.0)], [500] * 9000, [(64 * K, 1)]),
    ],
)
def test_one_level_can_win(
    candidates: list[tuple[int, int, float]], lengths: list[int], selected: list[tuple[int, int]]
) -> None:
    made = [Candidate(Level(length * K, cp), LevelTimeModel(seconds)) for length, cp, seconds in candidates]
    assert _shape(select_search(made, _workload(lengths, 8)).levels) == selected


def test_held_out_data_can_require_a_longer_level() -> None:
    candidates = [Candidate(Level(4 * K), LevelTimeModel(1.0)), Candidate(Level(64 * K, 8), LevelTimeModel(90.0))]
    workload = _workload([500] * 900, 8, longest=5 * K)
    assert _shape(select_search(candidates, workload).levels) == [(4 * K, 1), (64 * K, 8)]
    assert _shape(select_paper(candidates, workload).levels)[-1] == (64 * K, 8)


@pytest.mark.parametrize("select", [select_search, select_paper, baselines])
def test_no_candidate_for_the_longest_sample(select) -> None:
    short, long = Candidate(Level(4 * K), LevelTimeModel(1.0)), Candidate(Level(64 * K), None)
    with pytest.raises(ValueError, match="max_tokens >= 65536"):
        select([short, long], _workload(MIXED, 8))
    with pytest.raises(ValueError, match="60000 tokens"):
        select([short], _workload(MIXED, 8))


def test_error_names_what_fits_and_what_the_longest_sample_needs() -> None:
    candidates = [
        Candidate(Level(16 * K), LevelTimeModel(1.0), 40 << 30),
        Candidate(Level(64 * K - 1, 5, "allgather", "full"), None, 90 << 30),
        Candidate(Level(64 * K), None, 200 << 30),
    ]
    with pytest.raises(ValueError, match="memory") as raised:
        select_search(candidates, _workload([60000] * 5, 5))
    for words in ("65535/cp5, allgather, full on all layers needs 90.0 GiB", "16K/cp1 is the longest", "above 16384"):
        assert words in str(raised.value)


def test_large_data_is_represented_by_a_sample() -> None:
    lengths = tulu3_longcite_like(120_000, seed=3)
    workload = Workload(lengths, lengths // 2, 8, CostModel())
    share = workload.sampled(5000)
    assert len(share.lengths) == 5000
    assert share.max_sample_tokens == lengths.max()
    assert share.lengths.mean() == pytest.approx(lengths.mean(), rel=0.01)
    candidates = _linear_world(0.3, (8 * K, 32 * K, 128 * K))
    selection = select_search(candidates, workload)
    for shape in ([(8 * K, 1), (128 * K, 8)], [(128 * K, 8)]):
        levels = [Level(*pair) for pair in shape]
        times = [next(c.time for c in candidates if c.level == level) for level in levels]
        found = predict_epoch(workload.plan(levels), [time for time in times if time]).seconds
        assert selection.predicted.seconds <= found * (1 + MIN_GAIN)
    # The prediction is of all the data, not of the share.
    assert sum(selection.predicted.slowest) > 0.9 * lengths.sum() / 8 * 1e-6


def test_baselines_are_flat_packing_at_its_best_level() -> None:
    candidates, workload = _linear_world(0.5), _workload(MIXED, 8)
    found = baselines(candidates, workload)
    for method, baseline in found.items():
        least = min(
            predict_epoch(workload.plan([c.level], method), [c.time]).seconds
            for c in candidates
            if c.level.max_tokens == 64 * K and c.time
        )
        assert baseline.predicted.seconds == least
        assert len(baseline.levels) == 1
    search = select_search(candidates, workload)
    assert all(search.predicted.seconds < 0.8 * baseline.predicted.seconds for baseline in found.values())
    text = describe({"search": search}, found)
    gain = found["isf"].predicted.seconds / search.predicted.seconds
    assert f"{gain:>14.2f}" in text.splitlines()[1]
