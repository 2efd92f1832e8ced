"""How the simulated ratios change over the range of each figure of the hardware table.

Owns the table of ours over each baseline with one figure at a time at the low and the high end of its range
(tuning/published.py), all methods with the fastest memory plans that fit on that machine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from hbp_titan.experiments.paper.dynamic_cp import TENSOR_EXPOSED
from hbp_titan.experiments.paper.methods import memory_choice, replay_methods
from hbp_titan.models.registry import get_flavor
from hbp_titan.packing import Level
from hbp_titan.packing.ragged import IntArray
from hbp_titan.tuning.hardware import Hardware
from hbp_titan.tuning.published import RANGES
from hbp_titan.tuning.simulate import Replay

BASELINES = ("isf", "flat_sorted", "flexsp", "dynamic_cp", "hbp_paper")


def variants(hardware: Hardware) -> Iterator[tuple[str, Hardware, float]]:
    """Yield (name, machine, exposed share of Megatron's tensor parallelism): as assumed, then one change at a time."""
    yield "as in the table", hardware, TENSOR_EXPOSED
    for r in RANGES:
        for value in (r.low, r.high):
            machine = dataclasses.replace(hardware, **{r.field: value})  # type: ignore[arg-type]
            yield f"{r.field} = {value:g}", machine, TENSOR_EXPOSED
    yield "FlashAttention-2", hardware.with_attention("fa2"), TENSOR_EXPOSED
    yield "dynamic CP: tensor parallelism hidden", hardware, 0.0
    yield "dynamic CP: tensor parallelism exposed", hardware, 1.0


def sensitivity(
    flavor: str, levels: Sequence[Level], world_size: int, hardware: Hardware, lengths: IntArray, seed: int = 0
) -> Iterator[tuple[str, dict[str, Replay]]]:
    """Yield each variant with the replay of ours and of BASELINES; raise ValueError if a level does not fit."""
    for name, machine, exposed in variants(hardware):
        choice = memory_choice(get_flavor(flavor), machine, world_size, levels)
        if choice is None:
            raise ValueError(f"{flavor} on {world_size} x {hardware.name}: a level does not fit; use more ranks")
        yield name, replay_methods(lengths, levels, choice.model, (*BASELINES, "hbp"), seed, choice, exposed)


def over(replays: dict[str, Replay], baseline: str) -> float:
    """Return the speed-up of ours over a baseline, per token."""
    ours, other = replays["hbp"], replays[baseline]
    return other.gpu_days / other.tokens / (ours.gpu_days / ours.tokens)


def sensitivity_table(rows: Sequence[tuple[str, dict[str, Replay]]]) -> str:
    """Return one Markdown row per variant: ours over each baseline, and the shares of our time."""
    names = [name for name in BASELINES if all(name in replays for _, replays in rows)]
    lines = [
        "| figure | ours over "
        + " | over ".join(names)
        + " | idle | SP | recomp. | attention |\n"
        + "|---" * (len(names) + 5)
        + "|"
    ]
    for title, replays in rows:
        ups = " | ".join(f"{over(replays, name):.2f}x" for name in names)
        shares = " | ".join(f"{replays['hbp'].share(part):.1%}" for part in ("idle", "sp", "recompute", "attention"))
        lines.append(f"| {title} | {ups} | {shares} |")
    spans = [[over(replays, name) for _, replays in rows] for name in names]
    lines.append("| range | " + " | ".join(f"{min(s):.2f}x to {max(s):.2f}x" for s in spans) + " | | | | |")
    return "\n".join(lines)
