"""The choice of levels from candidates whose time and memory are known: by the paper's two stages, or by search.

Owns select_paper (paper section 3.1) and select_search, the least predicted time of the whole epoch. The search:
1. Data of many samples is represented by a share of it, evenly spaced over the sorted lengths.
2. Sets of lengths grow by one length at a time from the one that holds every sample; the best few sets of each size
   grow on. Evaluating a set means planning the epoch with it; of the candidates that differ in nothing that the plan
   depends on (length, cp degree), the one that is fastest on the packs of that plan is taken, exactly.
3. cp degrees of a set: those that look best on the packs of another cp degree, until they agree; for the best sets
   then each other degree of each level is planned and tried.
4. The best few are evaluated on all data. A further level has to earn LEAST_GAIN.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from hbp_titan.levels.candidate import Candidate
from hbp_titan.levels.level_time import pack_loads
from hbp_titan.packing import Level, Plan
from hbp_titan.selection.selection import Selection, Workload, holding, level_seconds, selected, slowest_sums

MAX_LEVELS = 4
# Samples that represent the data during the search; 1 million of them are planned in half a second.
SEARCH_SAMPLES = 50_000
# Best sets of a size that grow on, at least; with few samples more, so that so many samples are planned in all.
BEAM = 8
BEAM_SAMPLES = 400_000
# Best sets that are evaluated on all data.
FINALISTS = 8
# Share of the epoch that a further level must save: less is below what times are known to.
LEAST_GAIN = 0.005

Shape = tuple[tuple[int, int], ...]
"""What a plan depends on: (max_tokens, cp_degree) of each level, ascending."""


def select_search(candidates: Sequence[Candidate], workload: Workload) -> Selection:
    """The set of one to MAX_LEVELS candidates of different lengths with the least predicted time of the epoch.

    Raises ValueError where no candidate that fits memory holds the longest sample.
    """
    holding(candidates, workload.most_tokens)
    sampled = len(workload.lengths) > SEARCH_SAMPLES
    search = _Search(candidates, workload.sampled(SEARCH_SAMPLES) if sampled else workload)
    shapes = search.shapes()
    found = {shape: search.selection(shape) for shape in shapes}
    if sampled:
        everything = _Search(candidates, workload)
        found = {shape: everything.selection(shape) for shape in _best_of_each_size(found)}
    least = min(selection.predicted.seconds for selection in found.values())
    enough = [s for s in found.values() if s.predicted.seconds <= least * (1 + LEAST_GAIN)]
    return min(enough, key=lambda s: (len(s.levels), s.predicted.seconds))


def _best_of_each_size(found: dict[Shape, Selection]) -> list[Shape]:
    """FINALISTS shapes, the best of each size among them."""
    ranked = sorted(found, key=lambda shape: found[shape].predicted.seconds)
    firsts = [next(shape for shape in ranked if len(shape) == size) for size in {len(shape) for shape in ranked}]
    return list(dict.fromkeys([*firsts, *ranked]))[:FINALISTS]


class _Search:
    """Evaluates sets of levels on one workload, each once."""

    def __init__(self, candidates: Sequence[Candidate], workload: Workload) -> None:
        self.workload = workload
        # By length and cp degree, in the order given.
        self.options: dict[int, dict[int, list[Candidate]]] = {}
        for candidate in candidates:
            if candidate.fits:
                of_length = self.options.setdefault(candidate.level.max_tokens, {})
                of_length.setdefault(candidate.level.cp_degree, []).append(candidate)
        self.found: dict[Shape, Selection] = {}

    @cached_property
    def beam(self) -> int:
        return max(BEAM, BEAM_SAMPLES // len(self.workload.lengths))

    def shapes(self) -> list[Shape]:
        """The best sets of every size, each with its best cp degrees, by predicted seconds."""
        most_tokens = self.workload.most_tokens
        shorter = [length for length in self.options if length < most_tokens]
        front = [self.settle((length,)) for length in self.options if length >= most_tokens]
        best = self._ranked(front)
        for _ in range(MAX_LEVELS - 1):
            sets = {
                tuple(sorted({length, *(length for length, _ in shape)}))
                for shape in front
                for length in shorter
                if length not in dict(shape)
            }
            front = self._ranked([self.settle(lengths) for lengths in sorted(sets)])[: self.beam]
            best += front
        return self._ranked([self.refine(shape) for shape in self._ranked(best)[: self.beam]] + best)

    def _ranked(self, shapes: list[Shape]) -> list[Shape]:
        return sorted(dict.fromkeys(shapes), key=self.seconds)

    def seconds(self, shape: Shape) -> float:
        """Predicted seconds of the epoch."""
        return self.selection(shape).predicted.seconds

    def selection(self, shape: Shape) -> Selection:
        """The best candidates of a shape."""
        if shape not in self.found:
            self.evaluate(shape)
        return self.found[shape]

    def evaluate(self, shape: Shape) -> Plan:
        """Plan the epoch; the fastest candidate of each level on its packs becomes the shape's selection."""
        plan = self.workload.plan([Level(length, cp_degree) for length, cp_degree in shape])
        chosen = []
        for k, (length, cp_degree) in enumerate(shape):
            options = self.options[length][cp_degree]
            chosen.append(options[int(level_seconds(plan, k, options).argmin())])
        self.found[shape] = selected(chosen, plan, self.workload)
        return plan

    def settle(self, lengths: tuple[int, ...]) -> Shape:
        """The set of these lengths with the cp degrees that its packs suggest."""
        shape: Shape = tuple((length, self._cheapest_base(length)) for length in lengths)
        tried: list[Shape] = []
        while shape not in tried:
            tried.append(shape)
            shape = self._suggested(self.evaluate(shape), shape)
        return min(tried, key=self.seconds)

    def _cheapest_base(self, length: int) -> int:
        def rank_seconds(cp_degree: int) -> float:
            return min(c.time.base for c in self.options[length][cp_degree] if c.time) * cp_degree

        return min(self.options[length], key=rank_seconds)

    def _suggested(self, plan: Plan, shape: Shape) -> Shape:
        """For each level the cp degree that would be fastest if its packs stayed as they are in `plan`."""
        loads, costs = pack_loads(plan), plan.costs_of_packs(plan.costs)
        suggested = []
        for k, (length, _) in enumerate(shape):
            mine = np.flatnonzero((plan.pack_levels == k) & (loads[:, 3] > 0))
            sorted_loads = loads[mine[np.argsort(-costs[mine], kind="stable")]]

            def fastest(cp_degree: int, length: int = length, sorted_loads: np.ndarray = sorted_loads) -> float:
                starts = np.arange(0, len(sorted_loads), self.workload.world_size // cp_degree)
                return float(slowest_sums(sorted_loads, starts, self.options[length][cp_degree]).min())

            suggested.append((length, min(self.options[length], key=fastest)))
        return tuple(suggested)

    def refine(self, shape: Shape) -> Shape:
        """Change the cp degree of one level at a time as long as that helps."""
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
    """The two stages of the paper (section 3.1), on the candidates up to the shortest length that holds every sample.

    Stage 1 takes for each length the setting with the least time per token of a global iteration, on packs of the
    samples that this length holds; l_best is the fastest length, l_max the one that holds every sample. Stage 2 adds
    l_best / sp_best and l_max / sp_max at cp degree 1, the latter only where it lies above l_best.

    The paper does not say what to do where a length of stage 2 was not measured or does not fit at cp degree 1: the
    largest shorter one that does is taken, and none where there is none; a note says so.
    Raises ValueError where no candidate that fits memory holds the longest sample.
    """
    longest = holding(candidates, workload.most_tokens)
    fitting = [c for c in candidates if c.fits and c.level.max_tokens <= longest]

    def fastest(among: list[Candidate]) -> Candidate:
        return min(among, key=lambda candidate: _seconds_per_token(candidate, workload))

    stage1 = {
        length: fastest([c for c in fitting if c.level.max_tokens == length])
        for length in sorted({c.level.max_tokens for c in fitting})
    }
    best, largest = fastest(list(stage1.values())), stage1[longest]
    chosen = {c.level.max_tokens: c for c in (best, largest)}
    notes = []
    wanted_alone = [source.level.max_tokens // source.level.cp_degree for source in (best, largest)]
    if wanted_alone[1] <= best.level.max_tokens:
        del wanted_alone[1]
    for wanted in wanted_alone:
        if wanted in chosen:
            continue
        alone = [c for c in fitting if c.level.cp_degree == 1 and c.level.max_tokens <= wanted]
        length = max((c.level.max_tokens for c in alone), default=0)
        if length != wanted:
            instead = f"{length} takes its place" if length else "there is no level below to take its place"
            notes.append(f"{wanted} tokens at cp_degree 1 were not measured or do not fit; {instead}")
        if length and length not in chosen:
            chosen[length] = fastest([c for c in alone if c.level.max_tokens == length])
    ascending = [chosen[length] for length in sorted(chosen)]
    return selected(ascending, workload.plan([c.level for c in ascending]), workload, notes)


def _seconds_per_token(candidate: Candidate, workload: Workload) -> float:
    """Seconds of an iteration on full packs of average content, for each token of its whole world."""
    assert candidate.time is not None
    capacity = candidate.level.max_tokens
    held = workload.lengths <= capacity
    lengths = workload.lengths[held].astype(np.float64)
    sums = np.array([workload.loss_tokens[held].sum(), (lengths**2).sum(), len(lengths)]) / max(lengths.sum(), 1)
    seconds = float(np.array([1.0, *(sums * capacity)]) @ np.array(dataclasses.astuple(candidate.time)))
    return seconds / (capacity * candidate.level.dp_degree(workload.world_size))
