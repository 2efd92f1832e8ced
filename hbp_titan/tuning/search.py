"""Selection of levels from candidates with known time and memory, for a given epoch.

Owns select_search, the least predicted time of the whole epoch, select_paper (paper section 3.1), and the baselines
that each selection is compared with: flat packing at its best single level, as ISF and sorted by cost. The search:

1. Large data is represented by a sample, evenly spaced over the sorted lengths.
2. Sets of lengths grow by one length at a time from the one that holds every sample; the best few sets of each size
   grow further. Evaluating a set means planning the epoch with it. Of the candidates that give the same plan (same
   length and cp degree), the one that is fastest on the packs of that plan is selected.
3. cp degrees of a set: those that look best on the packs of another choice, repeated until they agree. For the best
   sets each other degree of each level is then planned and tried.
4. The best few are evaluated on all data. A further level must save MIN_GAIN.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hbp_titan.components.timing import EpochTime, FloatArray, LevelTimeModel, pack_loads, predict_epoch
from hbp_titan.config import JobConfig
from hbp_titan.data.token_store import TokenStore
from hbp_titan.packing import CostModel, Level, Plan, build_plan
from hbp_titan.packing.level import describe_memory, level_name
from hbp_titan.packing.ragged import IntArray
from hbp_titan.utils import human_bytes, human_seconds

BASELINES = {"isf": "ISF", "flat_sorted": "flat + sort"}
"""Packing method of each baseline, and its name in tables."""
MAX_LEVELS = 4
SEARCH_SAMPLES = 50_000
"""Samples that represent the data during the search; planning 1 million of them takes half a second."""
BEAM = 8
"""Best sets of each size that grow further, at least. With few samples more: BEAM_SAMPLES are planned per size."""
BEAM_SAMPLES = 400_000
MAX_FINALISTS = 8
"""Best sets that are evaluated on all data."""
MIN_GAIN = 0.005
"""Share of the epoch that a further level must save; less is below the accuracy of the times."""

Shape = tuple[tuple[int, int], ...]
"""What a plan depends on: (max_tokens, cp_degree) of each level, ascending."""


@dataclass(frozen=True)
class Candidate:
    """A complete level: length, cp degree and style, checkpoint policy and depth.

    time: of one micro-batch, None if it does not fit in memory. peak_bytes: the most that a rank holds during a
    micro-batch, including parameters, gradients and optimizer state; None if unknown.
    """

    level: Level
    time: LevelTimeModel | None
    peak_bytes: int | None = None

    @property
    def fits(self) -> bool:
        """Whether it fits in memory."""
        return self.time is not None


@dataclass(frozen=True)
class Workload:
    """The epoch that levels are chosen for: its samples, and everything that its plan depends on except the levels.

    lengths, loss_tokens: int64 [num_samples]. cost: by which the run balances packs. step_seconds: of an optimizer step
    without its micro-batches. longest: tokens of the longest held-out sample, which the largest level must hold too.
    """

    lengths: IntArray
    loss_tokens: IntArray
    world_size: int
    cost: CostModel
    method: str = "hbp"
    seed: int = 0
    global_batch_tokens: int = 0
    level_order: str = "alternate"
    curriculum_steps: float = 0.0
    step_seconds: float = 0.0
    longest: int = 0

    @classmethod
    def of(
        cls, config: JobConfig, world_size: int, cost: CostModel, stores: Sequence[TokenStore], step_seconds: float = 0
    ) -> Workload:
        """Return the first epoch of a run. stores: the training data and, if any, the held-out data."""
        return cls(
            stores[0].lengths,
            stores[0].loss_tokens,
            world_size,
            cost,
            config.packing.method,
            config.seed_of("packing"),
            config.training.global_batch_tokens,
            config.packing.level_order,
            config.packing.curriculum_steps,
            step_seconds,
            max(int(store.lengths.max()) for store in stores),
        )

    @property
    def max_sample_tokens(self) -> int:
        """The tokens that the largest level must hold."""
        return max(self.longest, int(self.lengths.max()))

    def plan(self, levels: Sequence[Level], method: str | None = None) -> Plan:
        """Return the plan of the epoch at these levels, with another method if given."""
        return build_plan(
            self.lengths,
            levels,
            self.world_size,
            method=method or self.method,
            seed=self.seed,
            loss_tokens=self.loss_tokens,
            cost=self.cost,
            global_batch_tokens=self.global_batch_tokens,
            level_order=self.level_order,
            curriculum_steps=self.curriculum_steps,
        )

    def sampled(self, num_samples: int) -> Workload:
        """Return a workload of about `num_samples` with the same distribution of lengths and the same longest."""
        stride = -(-len(self.lengths) // num_samples)
        # From the middle of each stride, so that the mean length stays unbiased.
        kept = np.sort(np.argsort(self.lengths, kind="stable")[stride // 2 :: stride])
        return dataclasses.replace(
            self, lengths=self.lengths[kept], loss_tokens=self.loss_tokens[kept], longest=self.max_sample_tokens
        )


@dataclass(frozen=True)
class Selection:
    """Levels with the time of a micro-batch of each, and the predicted epoch. notes: decisions, for the user."""

    levels: tuple[Level, ...]
    times: tuple[LevelTimeModel, ...]
    predicted: EpochTime
    notes: tuple[str, ...] = ()


def selected(candidates: Sequence[Candidate], plan: Plan, workload: Workload, notes: Sequence[str] = ()) -> Selection:
    """Return the selection of one candidate per level of `plan`."""
    times = tuple(candidate.time for candidate in candidates if candidate.time is not None)
    levels = tuple(candidate.level for candidate in candidates)
    return Selection(levels, times, predict_epoch(plan, times, workload.step_seconds), tuple(notes))


def level_seconds(plan: Plan, level: int, candidates: Sequence[Candidate]) -> FloatArray:
    """Return the seconds of all micro-batches of `level` with each candidate, float64 [candidates].

    candidates: of the cp degree of `level`.
    """
    of_level = plan.pack_levels == level
    starts = np.arange(0, np.count_nonzero(of_level), plan.levels[level].dp_degree(plan.world_size))
    return slowest_sums(pack_loads(plan)[of_level], starts, candidates)


def slowest_sums(loads: FloatArray, starts: IntArray, candidates: Sequence[Candidate]) -> FloatArray:
    """Return the sum over micro-batches of their slowest pack with each candidate, float64 [candidates].

    loads: float64 [packs, 4] in the order of execution. starts: first pack of each micro-batch, int64.
    """
    if not len(starts):
        return np.zeros(len(candidates))
    # All ranks of a micro-batch wait for its slowest pack.
    weights = np.array([dataclasses.astuple(candidate.time) for candidate in candidates if candidate.time])
    return np.maximum.reduceat(loads @ weights.T, starts, axis=0).sum(axis=0)


def shortest_holding(candidates: Sequence[Candidate], tokens: int) -> int:
    """Return the shortest length that fits in memory and holds `tokens` tokens; raise ValueError if there is none."""
    lengths = [c.level.max_tokens for c in candidates if c.fits and c.level.max_tokens >= tokens]
    if lengths:
        return min(lengths)
    tried = [c for c in candidates if c.level.max_tokens >= tokens]
    if tried:
        least = min(tried, key=lambda c: math.inf if c.peak_bytes is None else c.peak_bytes)
        needs = f" needs {human_bytes(least.peak_bytes)}, the least of them" if least.peak_bytes else " is one of them"
        fits = max((c.level for c in candidates if c.fits), key=lambda level: level.max_tokens, default=None)
        longest = f"{describe_level(fits)} is the longest that does" if fits else "and no shorter one does"
        shorten = f", or data.max_length_policy for samples above {fits.max_tokens} tokens" if fits else ""
        raise ValueError(
            f"no candidate with max_tokens >= {min(c.level.max_tokens for c in tried)} (longest sample: {tokens} "
            f"tokens) fits in memory: {describe_level(least.level)}{needs}; {longest}; use more ranks{shorten}"
        )
    raise ValueError(f"no candidate holds the longest sample ({tokens} tokens); add a larger max_tokens")


def baselines(candidates: Sequence[Candidate], workload: Workload) -> dict[str, Selection]:
    """Return each method of BASELINES at the best candidate of the shortest length that holds every sample."""
    length = shortest_holding(candidates, workload.max_sample_tokens)
    fitting = [c for c in candidates if c.fits and c.level.max_tokens == length]
    best: dict[str, Selection] = {}
    for cp_degree in sorted({c.level.cp_degree for c in fitting}):
        same_cp = [c for c in fitting if c.level.cp_degree == cp_degree]
        for method in BASELINES:
            plan = workload.plan([Level(length, cp_degree)], method)
            fastest = same_cp[int(level_seconds(plan, 0, same_cp).argmin())]
            found = selected([fastest], plan, workload)
            # The best cp degree for each method, so that the comparison does not favor our choice.
            if method not in best or found.predicted.seconds < best[method].predicted.seconds:
                best[method] = found
    return best


def describe(selections: dict[str, Selection], compared: dict[str, Selection]) -> str:
    """Return a table of selections and baselines: levels, predicted epoch, idle share of the ranks, speed-ups.

    compared: from `baselines`.
    """
    rows = {**selections, **{BASELINES[name]: baseline for name, baseline in compared.items()}}
    names = {BASELINES[name]: baseline.predicted.seconds for name, baseline in compared.items()}
    lines = [f"{'levels':<12}{'epoch':>12}{'idle':>9}" + "".join(f"{'x ' + name:>14}" for name in names)]
    for name, row in rows.items():
        seconds = row.predicted.seconds
        gains = "".join(f"{baseline / seconds:>14.2f}" for baseline in names.values())
        lines.append(f"{name:<12}{human_seconds(seconds):>12}{row.predicted.idle:>9.2%}{gains}")
        lines += [f"  {describe_level(level)}" for level in row.levels]
        lines += [f"  ({note})" for note in row.notes]
    return "\n".join(lines)


def describe_level(level: Level) -> str:
    """Return a level and all its settings in a few words."""
    words = [level_name(level)]
    if level.cp_degree > 1:
        words.append(level.cp_style)
    if (memory := describe_memory(level)) != "none":
        words.append(memory)
    if level.reshard_after_forward is not None:
        words.append(f"reshard_after_forward {str(level.reshard_after_forward).lower()}")
    if level.float8 is False:
        words.append("no float8 products")
    return ", ".join(words)


def select_search(candidates: Sequence[Candidate], workload: Workload, beam_samples: int = BEAM_SAMPLES) -> Selection:
    """Return the one to MAX_LEVELS candidates of different lengths with the least predicted time of the epoch.

    beam_samples: effort, in samples that are planned for the sets of one size.
    Raises ValueError if no candidate that fits in memory holds the longest sample.
    """
    shortest_holding(candidates, workload.max_sample_tokens)
    # Planning every set on all data would take minutes.
    sampled = len(workload.lengths) > SEARCH_SAMPLES
    search = _Search(candidates, workload.sampled(SEARCH_SAMPLES) if sampled else workload, beam_samples)
    shapes = search.shapes()
    found = {shape: search.selection(shape) for shape in shapes}
    if sampled:
        everything = _Search(candidates, workload)
        found = {shape: everything.selection(shape) for shape in _best_of_each_size(found)}
    # Among nearly equal times the fewest levels win.
    least = min(selection.predicted.seconds for selection in found.values())
    enough = [s for s in found.values() if s.predicted.seconds <= least * (1 + MIN_GAIN)]
    return min(enough, key=lambda s: (len(s.levels), s.predicted.seconds))


def _best_of_each_size(found: dict[Shape, Selection]) -> list[Shape]:
    """Return MAX_FINALISTS shapes, including the best of each size."""
    ranked = sorted(found, key=lambda shape: found[shape].predicted.seconds)
    firsts = [next(shape for shape in ranked if len(shape) == size) for size in {len(shape) for shape in ranked}]
    return list(dict.fromkeys([*firsts, *ranked]))[:MAX_FINALISTS]


class _Search:
    """Evaluation of sets of levels on one workload, each once."""

    def __init__(self, candidates: Sequence[Candidate], workload: Workload, beam_samples: int = BEAM_SAMPLES) -> None:
        self.workload = workload
        # Candidates by length and cp degree, in the order given.
        self.options: dict[int, dict[int, list[Candidate]]] = {}
        for candidate in candidates:
            if candidate.fits:
                of_length = self.options.setdefault(candidate.level.max_tokens, {})
                of_length.setdefault(candidate.level.cp_degree, []).append(candidate)
        self.found: dict[Shape, Selection] = {}
        self.beam = max(BEAM, beam_samples // len(workload.lengths))

    def shapes(self) -> list[Shape]:
        """Return the best sets of every size, each with its best cp degrees, by predicted seconds."""
        max_sample_tokens = self.workload.max_sample_tokens
        shorter = [length for length in self.options if length < max_sample_tokens]
        # The start must hold every sample, so that any growth of the set is a valid choice too.
        front = [self.choose_cp_degrees((length,)) for length in self.options if length >= max_sample_tokens]
        best = self._ranked(front)
        for _ in range(MAX_LEVELS - 1):
            sets = {
                tuple(sorted({length, *(length for length, _ in shape)}))
                for shape in front
                for length in shorter
                if length not in dict(shape)
            }
            front = self._ranked([self.choose_cp_degrees(lengths) for lengths in sorted(sets)])[: self.beam]
            best += front
        return self._ranked([self.improve(shape) for shape in self._ranked(best)[: self.beam]] + best)

    def _ranked(self, shapes: list[Shape]) -> list[Shape]:
        return sorted(dict.fromkeys(shapes), key=self.seconds)

    def seconds(self, shape: Shape) -> float:
        """Return the predicted seconds of the epoch."""
        return self.selection(shape).predicted.seconds

    def selection(self, shape: Shape) -> Selection:
        """Return the best candidates of a shape."""
        if shape not in self.found:
            self.evaluate(shape)
        return self.found[shape]

    def evaluate(self, shape: Shape) -> Plan:
        """Plan the epoch and select each level's fastest candidate on its packs; return the plan."""
        plan = self.workload.plan([Level(length, cp_degree) for length, cp_degree in shape])
        chosen = []
        for k, (length, cp_degree) in enumerate(shape):
            options = self.options[length][cp_degree]
            chosen.append(options[int(level_seconds(plan, k, options).argmin())])
        self.found[shape] = selected(chosen, plan, self.workload)
        return plan

    def choose_cp_degrees(self, lengths: tuple[int, ...]) -> Shape:
        """Return the set of these lengths with the cp degrees that its packs suggest."""
        shape: Shape = tuple((length, self._cheapest_base(length)) for length in lengths)
        tried: list[Shape] = []
        # The suggestions may cycle.
        while shape not in tried:
            tried.append(shape)
            shape = self._suggested(self.evaluate(shape), shape)
        return min(tried, key=self.seconds)

    def _cheapest_base(self, length: int) -> int:
        def rank_seconds(cp_degree: int) -> float:
            return min(c.time.base for c in self.options[length][cp_degree] if c.time) * cp_degree

        return min(self.options[length], key=rank_seconds)

    def _suggested(self, plan: Plan, shape: Shape) -> Shape:
        """Return the shape with each level's fastest cp degree, if the packs stayed as they are in `plan`."""
        loads, costs = pack_loads(plan), plan.pack_costs(plan.costs)
        suggested = []
        for k, (length, _) in enumerate(shape):
            mine = np.flatnonzero((plan.pack_levels == k) & (loads[:, 3] > 0))
            # In the order of their cost, as the planner puts packs side by side.
            sorted_loads = loads[mine[np.argsort(-costs[mine], kind="stable")]]

            def fastest(cp_degree: int, length: int = length, sorted_loads: np.ndarray = sorted_loads) -> float:
                starts = np.arange(0, len(sorted_loads), self.workload.world_size // cp_degree)
                return float(slowest_sums(sorted_loads, starts, self.options[length][cp_degree]).min())

            suggested.append((length, min(self.options[length], key=fastest)))
        return tuple(suggested)

    def improve(self, shape: Shape) -> Shape:
        """Return the shape after changing the cp degree of one level at a time as long as that helps."""
        while True:
            neighbours = [
                (*shape[:k], (length, cp_degree), *shape[k + 1 :])
                for k, (length, _) in enumerate(shape)
                for cp_degree in self.options[length]
            ]
            best = min(neighbours, key=self.seconds)
            if self.seconds(best) >= self.seconds(shape):
                return shape
            shape = best


def select_paper(candidates: Sequence[Candidate], workload: Workload) -> Selection:
    """Return the result of the paper's two stages (section 3.1), up to the shortest length that holds every sample.

    Stage 1 selects for each length the candidate with the least time per token of a global micro-batch, on packs of the
    samples that this length holds; l_best is the fastest length, l_max the one that holds every sample. Stage 2 adds
    l_best / sp_best and l_max / sp_max at cp degree 1, the latter only if it is above l_best.

    The paper leaves open what happens if a length of stage 2 was not measured or does not fit at cp degree 1: here the
    largest shorter one replaces it, if there is one, with a note.
    Raises ValueError if no candidate that fits in memory holds the longest sample.
    """
    longest = shortest_holding(candidates, workload.max_sample_tokens)
    fitting = [c for c in candidates if c.fits and c.level.max_tokens <= longest]

    def fastest(among: list[Candidate]) -> Candidate:
        return min(among, key=lambda candidate: _seconds_per_token(candidate, workload))

    stage1 = {
        length: fastest([c for c in fitting if c.level.max_tokens == length])
        for length in sorted({c.level.max_tokens for c in fitting})
    }
    # l_best and l_max of the paper.
    best, largest = fastest(list(stage1.values())), stage1[longest]
    chosen = {c.level.max_tokens: c for c in (best, largest)}
    notes = []
    wanted_lengths = [source.level.max_tokens // source.level.cp_degree for source in (best, largest)]
    if wanted_lengths[1] <= best.level.max_tokens:
        del wanted_lengths[1]
    for wanted in wanted_lengths:
        if wanted in chosen:
            continue
        alone = [c for c in fitting if c.level.cp_degree == 1 and c.level.max_tokens <= wanted]
        length = max((c.level.max_tokens for c in alone), default=0)
        if length != wanted:
            instead = f"{length} replaces it" if length else "no shorter level can replace it"
            notes.append(f"{wanted} tokens at cp_degree 1: not measured or does not fit; {instead}")
        if length and length not in chosen:
            chosen[length] = fastest([c for c in alone if c.level.max_tokens == length])
    ascending = [chosen[length] for length in sorted(chosen)]
    return selected(ascending, workload.plan([c.level for c in ascending]), workload, notes)


def _seconds_per_token(candidate: Candidate, workload: Workload) -> float:
    """Return the seconds per token of the whole world of a micro-batch on full packs of average content."""
    assert candidate.time is not None
    capacity = candidate.level.max_tokens
    # The paper packs each length with the samples that it can hold.
    held = workload.lengths <= capacity
    lengths = workload.lengths[held]
    squares = workload.cost.squares(lengths).sum()
    sums = np.array([workload.loss_tokens[held].sum(), squares, len(lengths)]) / max(lengths.sum(), 1)
    seconds = float(np.array([1.0, *(sums * capacity)]) @ np.array(dataclasses.astuple(candidate.time)))
    return seconds / (capacity * candidate.level.dp_degree(workload.world_size))
