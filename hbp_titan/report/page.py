"""The report page: one self-contained HTML file about one run or several.

Owns the skeleton, the order of the sections, the header of each run and the comparison of several. The page loads
nothing: its content security policy forbids every request and every script but its own, so text from a run cannot
become a script.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from hbp_titan.report.balance import memory_section, plan_section, ranks_section, speed_section
from hbp_titan.report.charts import Curve, Plot
from hbp_titan.report.curriculum import curriculum_section, levels_side_by_side
from hbp_titan.report.experts import expert_section
from hbp_titan.report.gains import gains_section
from hbp_titan.report.html import (
    DASH,
    SCRIPT,
    cards,
    details,
    document,
    missing,
    note,
    number,
    percent,
    row,
    section,
    table,
    text,
)
from hbp_titan.report.learning import groups_section, loss_section, validation_section
from hbp_titan.report.run import Floats, Run, StepLog
from hbp_titan.report.series import (
    applied,
    edge_means,
    end_figures,
    held_out_loss,
    last,
    loss_at,
    mean,
    seconds_so_far,
    tokens_so_far,
    total_seconds_by_rank,
    totals,
    whole_steps,
)
from hbp_titan.utils import first_n, human_count, human_seconds

MAX_STARTS = 5
MAX_SOURCES = 4
MAX_NAMED = 3
# In the order of the page: what it gained, what was trained and learned, then what it cost.
SECTIONS = (
    gains_section,
    curriculum_section,
    loss_section,
    groups_section,
    validation_section,
    speed_section,
    ranks_section,
    plan_section,
    memory_section,
    expert_section,
)
# Row of the comparison -> how its numbers are printed.
FORMATS: dict[str, Callable[[float], str]] = {
    "steps": number,
    "tokens": number,
    "seconds": human_seconds,
    "loss": lambda value: number(value, 4),
    "validation loss": lambda value: number(value, 4),
    "tokens per second": number,
    "MFU": lambda value: percent(value, 1),
    "padding": percent,
    "idle": lambda value: percent(value, 1),
    "data wait": percent,
    "time imbalance": percent,
    "memory": lambda value: f"{value:.2f} GiB",
    "skipped": number,
}


LABELS = {"seconds": "time in steps", "loss": "training loss", "validation loss": "held-out loss", "idle": "idle share"}
"""Rows of the comparison whose name is not the figure's."""


def report_page(runs: Sequence[Run]) -> str:
    """Return the whole page as HTML."""
    # A share of nothing is NaN, which is printed as a dash.
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return _page(runs)


def _page(runs: Sequence[Run]) -> str:
    body = [f'<article id="run-{index}">{_article(run)}</article>' for index, run in enumerate(runs)]
    if len(runs) > 1:
        links = "".join(f'<a href="#run-{index}">{text(run.name)}</a>' for index, run in enumerate(runs))
        body.insert(0, f"<h1>{len(runs)} runs</h1><nav>{links}</nav>{comparison(runs)}")
    return document("Run report: " + ", ".join(run.name for run in runs), "".join(body), SCRIPT)


def _article(run: Run) -> str:
    if not len(run.log):
        # Without steps only the settings and the plan are known.
        return header(run) + plan_section(run)
    return header(run) + "".join(of(run) for of in SECTIONS)


def header(run: Run) -> str:
    """Return name, state, key numbers, settings and starts of a run."""
    notes = "".join(missing(sentence) for sentence in run.missing)
    figures = cards(_key_figures(run)) if len(run.log) else ""
    return f"<header><h2>{text(run.name)}</h2><p>{text(_state(run))}</p>{notes}{figures}{_facts(run)}</header>"


def _state(run: Run) -> str:
    """Return the progress of the run as a sentence."""
    if not len(run.log):
        return "The run has not finished a step yet."
    steps = [f"{len(run.log):,} steps, up to step {int(run.log.steps[-1]):,}"]
    total = _planned_steps(run)
    # A run whose settings were changed may be beyond them.
    if total and total >= int(run.log.steps[-1]):
        steps.append(f"of {total:,} planned")
    state = " ".join(steps)
    if run.exported:
        state += "; exported to hf/"
    elif total and int(run.log.steps[-1]) < total:
        state += "; in progress or stopped"
    if run.written:
        state += f"; last written {run.written:%Y-%m-%d %H:%M} UTC"
    return state + "."


def _planned_steps(run: Run) -> int | None:
    """Return the steps of the whole run by its settings and plans, None if they do not determine it."""
    steps, epochs = run.setting("training", "steps"), run.setting("training", "epochs")
    if isinstance(steps, int) and steps > 0:
        return steps
    whole = [part.plan.num_steps for part in run.plans if not part.is_remainder]
    # Steps of an epoch depend on the ranks: with several plans they cannot be extrapolated.
    same_ranks = len({part.plan.world_size for part in run.plans}) == 1 and len(run.plans) == len(whole)
    return whole[0] * epochs if same_ranks and whole and epochs == len(whole) == 1 else None


def _key_figures(run: Run) -> list[tuple[str, str, str]]:
    log = run.log
    ends, all_steps = end_figures(log), totals(whole_steps(log))
    trained = np.nansum(log.column("trained_tokens"))
    figures = [("training loss", number(ends["loss"], 4), "last tenth of the steps")]
    if ends["validation loss"] is not None:
        before = held_out_loss(log)[0]
        meaning = f"was {before:.4f} before step 1" if np.isfinite(before) else "last validation"
        figures.append(("held-out loss", number(ends["validation loss"], 4), meaning))
    figures += [
        ("tokens", number(all_steps.tokens), f"{trained:,.0f} trained"),
        ("time in steps", human_seconds(all_steps.seconds), f"{all_steps.micro_batches:,} micro-batches"),
        ("tokens per second", number(ends["tokens per second"]), "all ranks, without padding"),
    ]
    if ends["MFU"] is not None:
        figures.append(("MFU", percent(ends["MFU"], 1), "of the peak, averaged over time"))
    figures.append(("padding", percent(ends["padding"]), "of computed positions"))
    if ends["idle"] is not None:
        figures.append(("idle share", percent(ends["idle"], 1), "ranks waiting for others, measured"))
    if ends["memory"] is not None:
        figures.append(("memory", f"{ends['memory']:.2f} GiB", "max over ranks"))
    work = np.array(total_seconds_by_rank(log))
    if len(work):
        figures.append(
            ("slowest rank", str(int(work.argmax())), f"{work.max() / max(work.mean(), 1e-9):.3f}x the mean work")
        )
    if log.skipped:
        figures.append(("skipped steps", number(len(log.skipped)), "not applied"))
    return figures


def _facts(run: Run) -> str:
    """Return the settings of the newest start."""
    start = run.last_start
    if not start:
        return ""
    rows = [(name, text(value)) for name, value in _settings(run) if value]
    facts = "".join(f"<div><dt>{text(name)}</dt><dd>{value}</dd></div>" for name, value in rows)
    packages = start.get("packages")
    versions = f"Python {start.get('python', '?')}" + (f", CUDA {start['cuda']}" if start.get("cuda") else "")
    if isinstance(packages, dict):
        versions += "".join(f", {name} {version}" for name, version in packages.items())
    more = details("Versions and command", f"<p>{text(versions)}</p><pre>{text(_command(start))}</pre>")
    return f'<dl class="facts">{facts}</dl>{_starts(run)}{more if start.get("config") else ""}'


def _settings(run: Run) -> list[tuple[str, str]]:
    start = run.last_start
    ranks = f"{start.get('world_size', '?')} x {start.get('device', '?')}"
    packing = f"{run.setting('packing', 'method')}, {run.setting('packing', 'level_order')}"
    batch = run.setting("training", "global_batch_tokens")
    return [
        ("model", _model(run)),
        ("ranks", ranks),
        ("levels", _levels(run)),
        ("packing", packing if run.setting("packing", "method") else ""),
        ("data", _data(run)),
        ("tokens per step", number(batch) if isinstance(batch, int) and batch else ""),
        ("learning rate", str(run.setting("optimizer", "lr") or "")),
        ("precision", str(run.setting("training", "dtype") or "")),
        ("code", _code(start)),
        ("folder", str(run.folder)),
    ]


def _model(run: Run) -> str:
    named = str(run.setting("model", "hf_path") or run.setting("model", "flavor") or "")
    rank = run.setting("lora", "rank")
    return f"{named}, LoRA rank {rank}" if named and rank else named


def _levels(run: Run) -> str:
    levels = run.setting("levels")
    if not isinstance(levels, list):
        return ", ".join(run.log.levels)
    texts = []
    for level in levels:
        if isinstance(level, dict):
            policy = level.get("ac_policy", "none")
            recomputed = "" if policy == "none" else f" {policy}"
            size = level.get("max_tokens")
            tokens = human_count(size, 1024) if isinstance(size, int) else "?"
            texts.append(f"{tokens} at cp {level.get('cp_degree')}{recomputed}")
    return "; ".join(texts)


def _data(run: Run) -> str:
    files = run.setting("data", "train_files")
    sources = run.setting("data", "sources")
    named = [str(file) for file in files] if isinstance(files, list) else []
    if isinstance(sources, list):
        named += [
            str(source.get("name") or source.get("path") or "a source")
            for source in sources
            if isinstance(source, dict)
        ]
    shown = first_n(named, MAX_SOURCES)
    if run.plans:
        shown += f"; {run.plans[0].plan.num_samples:,} samples, {int(run.plans[0].plan.lengths.sum()):,} tokens"
    return shown.removeprefix("; ")


def _code(start: dict[str, Any]) -> str:
    code = start.get("code")
    if not isinstance(code, dict) or not code.get("commit"):
        return ""
    return str(code["commit"])[:12] + (", with changes" if code.get("dirty") else "")


def _command(start: dict[str, Any]) -> str:
    words = start.get("command")
    return " ".join(map(str, words)) if isinstance(words, list) else ""


def _starts(run: Run) -> str:
    """Return the starts of the run if there are several."""
    if len(run.starts) < 2:
        return ""
    rows = []
    for count, start in enumerate(run.starts, start=1):
        when = str(start.get("started", "?"))[:16].replace("T", " ")
        cells = (when, start.get("first_step", "?"), start.get("world_size", "?"),
                 start.get("device", "?"), _code(start) or "?")  # fmt: skip
        rows.append([str(count), *map(text, cells)])
    heads = ("start", "when", "first step", "ranks", "device", "code")
    shown = table(heads, rows[-MAX_STARTS:])
    if len(rows) > MAX_STARTS:
        shown = details(f"{len(rows) - MAX_STARTS} earlier starts", table(heads, rows[:-MAX_STARTS])) + shown
    return shown


def comparison(runs: Sequence[Run]) -> str:
    """Compare the final numbers and curves of several runs with those of the first.

    Over tokens and time, not steps: the steps of two runs need not be of the same size.
    """
    figures = [end_figures(run.log) for run in runs]
    size, unit = _time_unit(runs)
    rows = []
    for name, formatted in FORMATS.items():
        values = [of[name] for of in figures]
        # A figure that no run recorded, or that is 0 for all, gets no row.
        if any(values):
            rows.append([text(LABELS.get(name, name)), *_cells(values, formatted)])
    trained = {of["tokens"] for of in figures if of["tokens"]}
    if len(trained) > 1:
        # Runs of different length compare at the tokens that all of them have trained.
        fewest = min(filter(None, trained))
        losses = [loss_at(run.log, fewest) for run in runs]
        rows.append([f"training loss at {number(fewest)} tokens", *_cells(losses, FORMATS["loss"])])
    return section(
        "Comparison",
        f"In brackets: the ratio to {runs[0].name}. Curves are smoothed over a 20th of each run.",
        table(["", *(text(run.name) for run in runs)], rows),
        levels_side_by_side(runs),
        row(
            _plot(runs, "Loss over tokens", "nats per trained token", "tokens", _loss),
            _plot(runs, "Loss over time", "nats per trained token", unit, _loss, over=_seconds(1 / size)),
            _validation(runs),
            _plot(runs, "Throughput", "real tokens per second", "tokens", _column("tokens_per_second"), zero=True),
            _plot(runs, "Gradient norm", "before clipping", "tokens", _column("grad_norm"), log=True),
            _plot(runs, "MFU", "% of the peak", "tokens", _column("mfu"), zero=True),
            _plot(runs, "Idle share", "% of the ranks' time", "tokens", _column("idle_share", 100), zero=True),
        ),
        note("Losses are comparable only if runs trained, or validated, on the same samples."),
    )  # fmt: skip


def _cells(values: Sequence[float | None], formatted: Callable[[float], str]) -> list[str]:
    first = values[0]
    cells = []
    for index, value in enumerate(values):
        ratio = f" <small>({value / first:.3f}x)</small>" if index and first and value is not None else ""
        cells.append(DASH if value is None else f"{formatted(value)}{ratio}")
    return cells


def _time_unit(runs: Sequence[Run]) -> tuple[float, str]:
    """Return the unit of time for the longest run, in seconds, and its name."""
    # One unit for all runs, so that their curves share an axis.
    longest = max((float(np.nansum(run.log.column("step_seconds"))) for run in runs), default=0.0)
    sizes = ((3600.0, "hours in steps"), (60.0, "minutes in steps"), (1.0, "seconds in steps"))
    return next(unit for unit in sizes if longest >= 2 * unit[0] or unit[0] == 1)


def _loss(log: StepLog) -> Floats:
    return np.where(applied(log), log.column("loss"), np.nan)


def _column(name: str, factor: float = 1.0) -> Callable[[StepLog], Floats]:
    return lambda log: factor * log.column(name)


def _seconds(factor: float) -> Callable[[StepLog], Floats]:
    return lambda log: factor * seconds_so_far(log)


def _color(run: Run, index: int) -> int:
    """Return the color of a run, different from those of the levels."""
    # After the levels' colors, so that the same color never stands for a level and a run.
    return len(run.log.palette) + index


def _plot(
    runs: Sequence[Run],
    title: str,
    unit: str,
    x_label: str,
    values: Callable[[StepLog], Floats],
    over: Callable[[StepLog], Floats] = tokens_so_far,
    zero: bool = False,
    log: bool = False,
) -> str:
    """Plot the runs over tokens or `over`. zero: for rates and shares of time, which are smoothed over time."""
    # A rate is averaged over time, a loss over trained tokens.
    weight = "step_seconds" if zero else "trained_tokens"
    curves = [
        Curve(run.name, values(run.log), _color(run, index), run.log.column(weight), over(run.log))
        for index, run in enumerate(runs)
        if len(run.log)
    ]
    plot = Plot(title, unit, x_label, np.zeros(0), curves, zero=zero, log=log)
    # A rate is summed up by its mean, a loss by its end.
    values_of = {curve.name: mean(curve.y, curve.weights) if zero else _end(curve) for curve in curves}
    plot.message = _message(title, values_of, "on average" if zero else "at the end")
    return plot.figure()


def _end(curve: Curve) -> float | None:
    """Return the mean of the last tenth of a curve."""
    ends = edge_means(curve.y, np.ones(len(curve.y)) if curve.weights is None else np.nan_to_num(curve.weights))
    return ends[1] if ends else None


def _message(title: str, values: Mapping[str, float | None], when: str) -> str:
    """Return the figures of up to MAX_NAMED runs as a sentence, "" for more."""
    known = [f"{name} {value:,.4g}" for name, value in values.items() if value is not None]
    quantity = title.partition(" over ")[0]
    return f"{quantity} {when}: {', '.join(known)}" if 0 < len(known) <= MAX_NAMED else ""


def _validation(runs: Sequence[Run]) -> str:
    curves = [
        Curve(run.name, held_out_loss(run.log), _color(run, index), None, np.append(0.0, tokens_so_far(run.log)))
        for index, run in enumerate(runs)
        if len(run.log)
    ]
    plot = Plot("Held-out loss", "nats per token", "tokens", np.zeros(0), [], extra=curves)
    plot.message = _message("Held-out loss", {curve.name: last(curve.y) for curve in curves}, "at the end")
    return plot.figure()
