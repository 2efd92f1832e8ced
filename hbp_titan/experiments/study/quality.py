"""The quality study: from a configuration to runs, study.json, Markdown tables and a chart.

Owns the comparison of each variant with the default at the same seeds, as paired differences with Student's t: the loss
after the last step, overall and by length band, and the share of values recalled by distance. Student's t is computed
with NumPy, because SciPy is not a dependency.
"""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hbp_titan.config import JobConfig, to_toml
from hbp_titan.data.prepare import open_stores
from hbp_titan.experiments.study.runs import DEFAULT, Launch, Report, Variant, make_runs, plan_metrics, train_all
from hbp_titan.packing.level import format_tokens
from hbp_titan.preflight import max_sample_tokens, model_args
from hbp_titan.report.charts import DOCUMENT_STYLE, ticks


def run_study(
    config: JobConfig,
    folder: Path,
    launch: Launch,
    variants: Sequence[Variant],
    seeds: Sequence[int],
    parallel: int,
    report: Report,
) -> dict[str, Any]:
    """Train the runs that are not finished; write and return the content of study.json.

    plans: metrics of each variant's plan with the first seed. runs: one entry per run (runs.read_outcome).
    """
    # Prepared once: parallel runs would all prepare it.
    store = open_stores(config, max_sample_tokens(config, model_args(config)))[0]
    runs = make_runs(config, folder, launch, store, variants, seeds)
    study = {
        "launch": launch.kind,
        "ranks": launch.ranks,
        "samples": len(store),
        "config": to_toml(config),
        "variants": {variant.name: variant.description for variant in variants},
        # The first runs are those of the first seed, one per variant.
        "plans": {run.variant.name: plan_metrics(run, store) for run in runs[: len(variants)]},
        "runs": train_all(runs, parallel, report),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "study.json").write_text(json.dumps(study, indent=1) + "\n", encoding="utf-8")
    return study


# Of the numerical integral in t_probability; the error is far below 1e-9.
_INTERVALS = 20000


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and sample standard deviation (n - 1), nan for a single value."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences over n seeds, its interval at `confidence`, and the two-sided p of no difference."""

    mean: float
    low: float
    high: float
    p: float
    n: int
    confidence: float = 0.95


def paired_difference(values: Sequence[float], base: Sequence[float], confidence: float = 0.95) -> Difference:
    """Return values - base of at least two pairs, with Student's t of n - 1 degrees of freedom."""
    differences = np.asarray(values, np.float64) - np.asarray(base, np.float64)
    n = len(differences)
    assert n > 1, "a standard deviation needs two pairs"
    mean, deviation = mean_and_deviation(differences.tolist())
    error = deviation / n**0.5
    half = t_quantile((1 + confidence) / 2, n - 1) * error
    # Differences without any deviation are certain, unless they are 0.
    p = 1 - t_probability(abs(mean) / error, n - 1) if error else float(mean == 0)
    return Difference(mean, mean - half, mean + half, p, n, confidence)


def t_probability(t: float, degrees: int) -> float:
    """Return P(|T| < t) of Student's t."""
    angles, cumulated = _angles(degrees)
    return float(np.interp(np.arctan(t / degrees**0.5), angles, cumulated))


def t_quantile(probability: float, degrees: int) -> float:
    """Return the t with P(T < t) = `probability`, at least one half."""
    angles, cumulated = _angles(degrees)
    return float(np.tan(np.interp(2 * probability - 1, cumulated, angles)) * degrees**0.5)


def _angles(degrees: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return angles from 0 to pi / 2 and P(|T| < sqrt(degrees) * tan(angle)).

    With this substitution the density of T is proportional to cos(angle)^(degrees - 1).
    """
    # Over the angle the domain is finite, so no tail is cut off.
    angles = np.linspace(0, np.pi / 2, _INTERVALS + 1)
    density = np.cos(angles) ** (degrees - 1)
    cumulated = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return angles, cumulated / cumulated[-1]


Outcome = dict[str, Any]


def values_of(study: dict[str, Any], variant: str, value: Callable[[Outcome], float]) -> dict[int, float]:
    """Return a value of each run of a variant, by seed."""
    return {run["seed"]: value(run) for run in study["runs"] if run["variant"] == variant}


def difference(
    study: dict[str, Any], variant: str, value: Callable[[Outcome], float], base: str = DEFAULT
) -> Difference | None:
    """Return the difference of a variant to `base` over their common seeds, None for fewer than two."""
    own, other = values_of(study, variant, value), values_of(study, base, value)
    # Paired by seed: the difference then excludes what the seeds share, such as the initial weights.
    seeds = [seed for seed in own if seed in other]
    return paired_difference([own[s] for s in seeds], [other[s] for s in seeds]) if len(seeds) > 1 else None


def final_loss(run: Outcome) -> float:
    """Return the loss per token of the held-out samples after the last step."""
    return run["loss"]


def bands_of(study: dict[str, Any]) -> list[str]:
    """Return the upper bounds of the length bands, ascending."""
    return sorted({band for run in study["runs"] for band in run["by_length"]}, key=int)


def band_loss(band: str) -> Callable[[Outcome], float]:
    """Return a function run -> loss of a length band."""
    return lambda run: run["by_length"][band]["loss"]


def band_recall(band: str) -> Callable[[Outcome], float]:
    """Return a function run -> percent of values recalled at the distances of a band."""
    return lambda run: 100 * run["recall"][band]["correct"] / run["recall"][band]["answers"]


def loss_table(study: dict[str, Any]) -> str:
    """Return one row per variant: steps, samples, final loss with deviation, difference to the default, significance.

    A difference is significant if p times the number of compared variants is below 0.05 (Bonferroni), because among
    several 95% intervals one may miss 0 by chance.
    """
    compared = len(study["variants"]) - 1
    lines = [
        "| variant | steps | samples | final loss | final - default (95% interval) | p | significant |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in study["variants"]:
        cells = [name, _range(study, name, "steps"), _range(study, name, "samples"), _spread(study, name, final_loss)]
        found = None if name == DEFAULT else difference(study, name, final_loss)
        if found is None:
            cells += ["", "", ""]
        else:
            p = f"{found.p:.3f}" if found.p >= 0.001 else "< 0.001"
            cells += [_interval(found), p, "yes" if found.p * compared < 0.05 else "no"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def band_table(study: dict[str, Any]) -> str:
    """Return one row per variant: loss of the default by length band and the differences to it, bold without 0."""
    bands = bands_of(study)
    counts = study["runs"][0]["by_length"]
    heads = [
        f"{name} ({counts[band]['trained_tokens']:,} trained)"
        for band, name in zip(bands, band_names(bands), strict=True)
    ]
    return _differences(study, heads, [band_loss(band) for band in bands])


def recall_table(study: dict[str, Any]) -> str:
    """Return one row per variant: share of values recalled by distance, in percent, and differences in points."""
    bands = sorted(study["runs"][0]["recall"], key=int)
    counts = study["runs"][0]["recall"]
    named = zip(bands, band_names(bands), strict=True)
    heads = [f"{name} back ({counts[band]['answers']} answers)" for band, name in named]
    return _differences(study, heads, [band_recall(band) for band in bands], digits=1)


def band_names(bands: Sequence[str]) -> list[str]:
    """Return "1 to 512 tokens", "513 to 2K tokens", ... of ascending upper bounds."""
    lows = [1, *(int(band) + 1 for band in bands[:-1])]
    return [f"{low:,} to {format_tokens(int(band))} tokens" for low, band in zip(lows, bands, strict=True)]


def _differences(
    study: dict[str, Any], heads: Sequence[str], values: Sequence[Callable[[Outcome], float]], digits: int = 4
) -> str:
    """Return a table of the default's values and the variants' differences, bold where the interval excludes 0."""
    lines = [f"| variant | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for name in study["variants"]:
        cells = [name]
        for value in values:
            found = None if name == DEFAULT else difference(study, name, value)
            text = _spread(study, name, value, digits) if found is None else _interval(found, digits)
            cells.append(f"**{text}**" if found is not None and found.low * found.high > 0 else text)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plan_table(study: dict[str, Any]) -> str:
    """Return one row per variant: balance of its plan, and composition of its optimizer steps."""
    lines = [
        "| variant | ABR | CR | PR | tokens per step | spread of trained tokens | spread of the long samples' share | "
        "heaviest / lightest token |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, plan in study["plans"].items():
        runs = [run for run in study["runs"] if run["variant"] == name]
        mean, deviation = np.mean([run["step_tokens"] for run in runs], axis=0)
        ratio = np.median([run["weight_ratio"] for run in runs])
        metrics = " | ".join(f"{plan[key]:.3f}" for key in ("abr", "cr", "pr"))
        spreads = " | ".join(f"{100 * plan[key]:.1f}%" for key in ("trained_spread", "long_spread"))
        lines.append(f"| {name} | {metrics} | {mean:,.0f} +- {deviation:,.0f} | {spreads} | {ratio:.3g} |")
    return "\n".join(lines)


def _range(study: dict[str, Any], variant: str, key: str) -> str:
    found = sorted({run[key] for run in study["runs"] if run["variant"] == variant})
    return f"{found[0]:,}" if len(found) == 1 else f"{found[0]:,}-{found[-1]:,}"


def _spread(study: dict[str, Any], variant: str, value: Callable[[Outcome], float], digits: int = 4) -> str:
    mean, deviation = mean_and_deviation(list(values_of(study, variant, value).values()))
    return f"{mean:.{digits}f} +- {deviation:.{digits}f}" if np.isfinite(deviation) else f"{mean:.{digits}f}"


def _interval(found: Difference, digits: int = 4) -> str:
    return f"{found.mean:+.{digits}f} ({found.low:+.{digits}f} to {found.high:+.{digits}f})"


_LEFT, _RIGHT, _TOP, _BOTTOM, _ROW, _WIDTH = 96, 16, 30, 40, 22, 420
_STYLE = DOCUMENT_STYLE + (
    "<style>.axis{stroke:var(--grid)}.zero{stroke:var(--ink);stroke-dasharray:4 3}"
    ".interval{stroke:var(--c0);stroke-width:2}.mean{fill:var(--c0)}.seed{fill:var(--c1);fill-opacity:.8}</style>"
)


@dataclass(frozen=True)
class Row:
    """One variant in the chart: its difference, and that of each seed."""

    name: str
    difference: Difference
    seeds: tuple[float, ...]


def draw(study: dict[str, Any]) -> str:
    """Return the SVG chart of all lengths and of the longest band; at least two seeds of a variant and the default."""
    panels: list[tuple[str, Callable[[dict[str, Any]], float]]] = [("all lengths", final_loss)]
    if bands := bands_of(study):
        panels.append((band_names(bands)[-1], band_loss(bands[-1])))
    parts = []
    height = 0
    for number, (title, loss) in enumerate(panels):
        base = values_of(study, DEFAULT, loss)
        rows = []
        for name in study["variants"]:
            own = values_of(study, name, loss)
            found = None if name == DEFAULT else difference(study, name, loss)
            if found:
                rows.append(Row(name, found, tuple(own[seed] - base[seed] for seed in own if seed in base)))
        assert rows, "nothing to draw"
        height = _TOP + _ROW * len(rows) + _BOTTOM
        panel = "".join(_panel(f"{title}: loss - {DEFAULT}'s", rows, height))
        parts.append(f'<svg x="{number * _WIDTH}" y="0" width="{_WIDTH}" height="{height}">{panel}</svg>')
    width = _WIDTH * len(panels)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
        f'{_STYLE}<rect width="{width}" height="{height}" fill="var(--paper)"/>{"".join(parts)}</svg>\n'
    )


def _panel(title: str, rows: Sequence[Row], height: int) -> list[str]:
    ends = [value for row in rows for value in (*row.seeds, row.difference.low, row.difference.high, 0.0)]
    low, high = min(ends), max(ends)
    low, high = low - 0.05 * (high - low), high + 0.05 * (high - low)

    def x(value: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * (value - low) / (high - low)

    bottom = height - _BOTTOM
    parts = [f'<text class="title" x="{_LEFT}" y="16">{html.escape(title)}</text>']
    for tick in ticks(low, high):
        parts.append(f'<line class="axis" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{_TOP}" y2="{bottom}"/>')
        parts.append(
            f'<text x="{x(tick):.1f}" y="{bottom + 15}" text-anchor="middle">{f"{tick:+.3g}" if tick else 0}</text>'
        )
    parts.append(f'<line class="zero" x1="{x(0):.1f}" x2="{x(0):.1f}" y1="{_TOP}" y2="{bottom}"/>')
    for number, row in enumerate(rows):
        y = _TOP + _ROW * (number + 0.5)
        found = row.difference
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{html.escape(row.name)}</text>')
        ends_of = f'x1="{x(found.low):.1f}" x2="{x(found.high):.1f}" y1="{y:.1f}" y2="{y:.1f}"'
        tip = f"{found.mean:+.4f} ({found.low:+.4f} to {found.high:+.4f}), p {found.p:.3f}"
        parts.append(f'<line class="interval" {ends_of}><title>{tip}</title></line>')
        parts += [f'<circle class="seed" cx="{x(value):.1f}" cy="{y:.1f}" r="2.5"/>' for value in row.seeds]
        parts.append(f'<rect class="mean" x="{x(found.mean) - 1.5:.1f}" y="{y - 6:.1f}" width="3" height="12"/>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    key = "worse to the right; bar: mean, line: 95% interval, dots: seeds"
    return [*parts, f'<text x="{middle:.1f}" y="{height - 8}" text-anchor="middle">{key}</text>']
