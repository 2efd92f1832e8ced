"""What a change of level costs: the same iterations with the levels alternating and grouped by level.

Owns the two orders and the noise they are held against: each round runs the grouped order twice, and the ratio of those
two is what chance alone gives.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from torch.distributed import distributed_c10d

from hbp_titan.config import JobConfig
from hbp_titan.distributed.world import World
from hbp_titan.experiments.bench_train import Documents, random_batches
from hbp_titan.models.decoder import ModelArgs
from hbp_titan.packing import Level
from hbp_titan.tuning.measured_engine import MeasuredEngine


@dataclass
class SwapCost:
    """Seconds of each round in each order. groups_made: process groups made after the first round began.

    again: the grouped order a second time. iterations: of a round, swaps: changes of level in its alternating order.
    """

    alternating: list[float]
    grouped: list[float]
    again: list[float]
    iterations: int
    swaps: int
    groups_made: int

    def ratios(self, control: bool = False) -> list[float]:
        """Round by round alternating / grouped; with `control` grouped / grouped."""
        return [a / b for a, b in zip(self.again if control else self.alternating, self.grouped, strict=True)]

    def __str__(self) -> str:
        texts = [f"{median(r):.3f} ({min(r):.3f}-{max(r):.3f})" for r in (self.ratios(), self.ratios(control=True))]
        return (
            f"{self.iterations} iterations, {self.swaps} swaps when levels alternate, {len(self.grouped)} rounds: "
            f"alternating / grouped {texts[0]}, grouped / grouped {texts[1]}; groups made {self.groups_made}"
        )


def measure_swap(
    config: JobConfig,
    args: ModelArgs,
    world: World,
    levels: Sequence[Level],
    documents: Documents,
    iterations: int,
    repeats: int,
) -> SwapCost:
    """Time `iterations` packs of each level in both orders, `repeats` rounds after one that does not count."""
    measured = MeasuredEngine(config, args, world, levels)
    by_level = []
    for index, level in enumerate(levels):
        packs = [documents.lengths(level.max_tokens, seed) for seed in range(iterations)]
        batches = random_batches(packs, args, level, index, world.rank)
        by_level.append([b.pin_memory() for b in batches] if world.device.type == "cuda" else batches)
    grouped = list(itertools.chain.from_iterable(by_level))
    alternating = list(itertools.chain.from_iterable(zip(*by_level, strict=True)))
    orders = {"grouped": grouped, "alternating": alternating, "again": grouped}
    seconds: dict[str, list[float]] = {name: [] for name in orders}
    measured.attempt(lambda engine: None)
    groups = len(distributed_c10d._world.pg_map)
    for number in range(repeats + 1):
        names = list(orders)[number % 3 :] + list(orders)[: number % 3]
        for name in names:
            taken = measured.seconds(orders[name])
            if taken is None:
                raise ValueError("--swap: out of memory; lower --lengths or --layers, or recompute more")
            if number:
                seconds[name].append(taken)
    return SwapCost(
        **seconds,
        iterations=len(grouped),
        swaps=sum(a.level != b.level for a, b in itertools.pairwise(alternating)),
        groups_made=len(distributed_c10d._world.pg_map) - groups,
    )
