"""Tables of a study in Markdown, from what study.json holds.

Owns what is compared: the loss after the last step, whole and by length band, of each variant against the default with
the same seeds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from hbp_titan.packing.bands import band_name
from hbp_titan.study.statistics import Difference, mean_and_deviation, paired_difference
from hbp_titan.study.variants import DEFAULT

Outcome = dict[str, Any]


def values_of(study: dict[str, Any], variant: str, figure: Callable[[Outcome], float]) -> dict[int, float]:
    """A figure of each run of a variant, by seed."""
    return {run["seed"]: figure(run) for run in study["runs"] if run["variant"] == variant}


def difference(
    study: dict[str, Any], variant: str, figure: Callable[[Outcome], float], base: str = DEFAULT
) -> Difference | None:
    """Of a figure between a variant and `base`, over the seeds that both have; None where these are fewer than two."""
    own, other = values_of(study, variant, figure), values_of(study, base, figure)
    seeds = [seed for seed in own if seed in other]
    return paired_difference([own[s] for s in seeds], [other[s] for s in seeds]) if len(seeds) > 1 else None


def final_loss(run: Outcome) -> float:
    """Loss per token of the held-out samples after the last step."""
    return run["loss"]


def bands_of(study: dict[str, Any]) -> list[str]:
    """Upper borders of the length bands, ascending."""
    return sorted({band for run in study["runs"] for band in run["by_length"]}, key=int)


def band_loss(band: str) -> Callable[[Outcome], float]:
    """Reads the loss of a length band."""
    return lambda run: run["by_length"][band]["loss"]


def loss_table(study: dict[str, Any]) -> str:
    """A row a variant: final and best loss with their spread, the difference to the default, and whether it stands out.

    It does where p, times the number of variants that are compared with the default, is below 0.05 (Bonferroni): of
    so many intervals at 95% one may miss 0 by chance.
    """
    compared = len(study["variants"]) - 1
    lines = [
        "| variant | steps | final loss | best loss | final - default (95% interval) | p | stands out |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in study["variants"]:
        steps = sorted({run["steps"] for run in study["runs"] if run["variant"] == name})
        cells = [name, str(steps[0]) if len(steps) == 1 else f"{steps[0]}-{steps[-1]}"]
        cells += [_spread(study, name, final_loss), _spread(study, name, lambda run: run["best"])]
        found = None if name == DEFAULT else difference(study, name, final_loss)
        if found is None:
            cells += ["", "", ""]
        else:
            p = f"{found.p:.3f}" if found.p >= 0.001 else "< 0.001"
            cells += [_interval(found), p, "yes" if found.p * compared < 0.05 else "no"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def band_table(study: dict[str, Any]) -> str:
    """A row a variant: in each length band the default's loss, and the difference to it; bold where 0 is not in it."""
    bands = bands_of(study)
    counts = study["runs"][0]["by_length"]
    heads = [f"{band_name(int(band))} tokens ({counts[band]['trained_tokens']:,} trained)" for band in bands]
    lines = [f"| variant | {' | '.join(heads)} |", "|---" * (len(bands) + 1) + "|"]
    for name in study["variants"]:
        cells = [name]
        for band in bands:
            found = None if name == DEFAULT else difference(study, name, band_loss(band))
            text = _spread(study, name, band_loss(band)) if found is None else _interval(found)
            cells.append(f"**{text}**" if found is not None and found.low * found.high > 0 else text)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plan_table(study: dict[str, Any]) -> str:
    """A row a variant: how its plan is balanced, and what its optimizer steps are like."""
    lines = [
        "| variant | ABR | CR | PR | tokens per step | spread of trained tokens | spread of the long samples' share | "
        "heaviest / lightest token |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, plan in study["plans"].items():
        runs = [run for run in study["runs"] if run["variant"] == name]
        mean, deviation = np.mean([run["step_tokens"] for run in runs], axis=0)
        ratio = np.median([run["weight_ratio"] for run in runs])
        figures = " | ".join(f"{plan[key]:.3f}" for key in ("abr", "cr", "pr"))
        spreads = " | ".join(f"{100 * plan[key]:.1f}%" for key in ("trained_spread", "long_spread"))
        lines.append(f"| {name} | {figures} | {mean:,.0f} +- {deviation:,.0f} | {spreads} | {ratio:.3g} |")
    return "\n".join(lines)


def _spread(study: dict[str, Any], variant: str, figure: Callable[[Outcome], float]) -> str:
    mean, deviation = mean_and_deviation(list(values_of(study, variant, figure).values()))
    return f"{mean:.4f} +- {deviation:.4f}" if np.isfinite(deviation) else f"{mean:.4f}"


def _interval(found: Difference) -> str:
    return f"{found.mean:+.4f} ({found.low:+.4f} to {found.high:+.4f})"
