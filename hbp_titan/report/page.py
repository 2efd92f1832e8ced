"""The page: one self-contained HTML file for one run or several.

Owns its skeleton and the order of its sections. The page loads nothing: its policy forbids every request, and every
script but its own, so that no text from a run can become one.

The head of a run's report: what the run is, its key figures, its starts, and what could not be read.

Owns the choice of these facts.

The comparison of several runs: their end figures with ratios, and their curves over each other.

Owns what is compared. Runs are compared over tokens and time: their steps need not be of one size.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hbp_titan.report.balance import (
    levels_side_by_side,
    memory_section,
    plan_section,
    ranks_section,
    speed_section,
    timeline_section,
)
from hbp_titan.report.charts import PALETTE
from hbp_titan.report.html import (
    DASH,
    SCRIPT,
    STYLE,
    Curve,
    Plot,
    cards,
    duration,
    folded,
    missing,
    note,
    number,
    percent,
    row,
    section,
    table,
    text,
)
from hbp_titan.report.learning import expert_section, groups_section, loss_section, validation_section
from hbp_titan.report.run import Floats, Run, StepLog
from hbp_titan.report.series import (
    applied,
    end_figures,
    loss_at,
    seconds_so_far,
    tokens_so_far,
    total_seconds_by_rank,
    totals,
    whole_steps,
)
from hbp_titan.utils import human_count

_SHOWN: dict[str, Callable[[float], str]] = {
    "steps": number,
    "tokens": number,
    "seconds": duration,
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


def comparison(runs: Sequence[Run]) -> str:
    """The section; the first run is what the others are compared with."""
    figures = [end_figures(run.log) for run in runs]
    size, unit = _time_unit(runs)
    rows = []
    for name, shown in _SHOWN.items():
        values = [of[name] for of in figures]
        if any(values):
            rows.append([text("time in steps" if name == "seconds" else name), *_cells(values, shown)])
    trained = {of["tokens"] for of in figures if of["tokens"]}
    if len(trained) > 1:
        least = min(filter(None, trained))
        losses = [loss_at(run.log, least) for run in runs]
        rows.append([f"loss at {number(least)} tokens", *_cells(losses, _SHOWN["loss"])])
    return section(
        "Comparison",
        f"In brackets: the ratio to {runs[0].name}. Curves are smoothed over a 20th of each run.",
        table(["", *(text(run.name) for run in runs)], rows),
        levels_side_by_side(runs),
        row(
            _plot(runs, "Loss over tokens", "nats per trained token", "tokens", _loss),
            _plot(runs, "Loss over time", "nats per trained token", unit, _loss, _time(size)),
            _validation(runs),
            _plot(runs, "Throughput", "real tokens per second", "tokens", _column("tokens_per_second"), zero=True),
            _plot(runs, "Gradient norm", "before clipping", "tokens", _column("grad_norm"), log=True),
            _plot(runs, "MFU", "% of the peak", "tokens", _column("mfu"), zero=True),
            _plot(runs, "Idle share", "% of the ranks' time", "tokens", _idle, zero=True),
        ),
        note("Losses of runs compare where they trained the same samples; validation losses where these are the same."),
    )  # fmt: skip


def _cells(values: Sequence[float | None], shown: Callable[[float], str]) -> list[str]:
    first = values[0]
    cells = []
    for at, value in enumerate(values):
        if value is None:
            cells.append(DASH)
            continue
        ratio = f" <small>({value / first:.3f}x)</small>" if at and first else ""
        cells.append(f"{shown(value)}{ratio}")
    return cells


def _time_unit(runs: Sequence[Run]) -> tuple[float, str]:
    """Seconds of the unit that the longest run is shown in, and its name."""
    longest = max((float(np.nansum(run.log.column("step_seconds"))) for run in runs), default=0.0)
    sizes = ((3600.0, "hours in steps"), (60.0, "minutes in steps"), (1.0, "seconds in steps"))
    return next(unit for unit in sizes if longest >= 2 * unit[0] or unit[0] == 1)


def _time(size: float) -> Callable[[StepLog], Floats]:
    return lambda log: seconds_so_far(log) / size


def _loss(log: StepLog) -> Floats:
    return np.where(applied(log), log.column("loss"), np.nan)


def _idle(log: StepLog) -> Floats:
    return 100 * log.column("idle_share")


def _column(name: str) -> Callable[[StepLog], Floats]:
    return lambda log: log.column(name)


def _color(run: Run, number: int) -> int:
    """A run's color, none of the levels'."""
    return len(run.log.palette) + number


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
    """The runs' curves over tokens or `over`. zero: of what is a rate or share of time, which its smoothing weighs."""
    weight = "step_seconds" if zero else "trained_tokens"
    curves = [
        Curve(run.name, values(run.log), _color(run, at), run.log.column(weight), over(run.log))
        for at, run in enumerate(runs)
        if len(run.log)
    ]
    return Plot(title, unit, x_label, np.zeros(0), curves, zero=zero, log=log).figure()


def _validation(runs: Sequence[Run]) -> str:
    curves = [
        Curve(run.name, run.log.column("validation", "loss"), _color(run, at), None, tokens_so_far(run.log))
        for at, run in enumerate(runs)
        if len(run.log)
    ]
    return Plot("Validation loss", "nats per token", "tokens", np.zeros(0), [], extra=curves).figure()


SHOWN_STARTS = 5


def header(run: Run) -> str:
    """Name, state, key figures, facts and starts."""
    described = run.setting("job", "description")
    lead = f"<p>{text(described)}</p>" if described else ""
    told = "".join(missing(sentence) for sentence in run.missing)
    figures = cards(_key_figures(run)) if len(run.log) else ""
    return f"<header><h2>{text(run.name)}</h2>{lead}<p>{text(_state(run))}</p>{told}{figures}{_facts(run)}</header>"


def _state(run: Run) -> str:
    """How far the run is, in a sentence."""
    if not len(run.log):
        return "The run has not finished a step yet."
    steps = [f"{len(run.log):,} steps, up to step {int(run.log.steps[-1]):,}"]
    total = _planned_steps(run)
    if total and total >= int(run.log.steps[-1]):
        steps.append(f"of {total:,} planned")
    state = " ".join(steps)
    if run.exported:
        state += "; exported to hf/"
    elif total and int(run.log.steps[-1]) < total:
        state += "; it goes on or was stopped"
    if run.written:
        state += f"; last written {run.written:%Y-%m-%d %H:%M} UTC"
    return state + "."


def _planned_steps(run: Run) -> int | None:
    """Steps of the whole run as its settings and its plan of one epoch have it; None where they do not tell."""
    steps, epochs = run.setting("training", "steps"), run.setting("training", "epochs")
    if isinstance(steps, int) and steps > 0:
        return steps
    whole = [part.plan.num_steps for part in run.plans if not part.is_remainder]
    same_ranks = len({part.plan.world_size for part in run.plans}) == 1 and len(run.plans) == len(whole)
    return whole[0] * epochs if same_ranks and whole and epochs == len(whole) == 1 else None


def _key_figures(run: Run) -> list[tuple[str, str, str]]:
    log = run.log
    ends, all_steps = end_figures(log), totals(whole_steps(log))
    trained = np.nansum(log.column("trained_tokens"))
    found = [("loss", number(ends["loss"], 4), "last tenth of the steps")]
    if ends["validation loss"] is not None:
        found.append(("validation loss", number(ends["validation loss"], 4), "last validation"))
    found += [
        ("tokens", number(all_steps.tokens), f"{trained:,.0f} bear loss"),
        ("time in steps", text(duration(all_steps.seconds)), f"{all_steps.micro_batches:,} iterations"),
        ("tokens per second", number(ends["tokens per second"]), "all ranks, no padding"),
    ]
    if ends["MFU"] is not None:
        found.append(("MFU", percent(ends["MFU"], 1), "of the peak, mean over time"))
    found.append(("padding", percent(ends["padding"]), "of computed positions"))
    if ends["idle"] is not None:
        found.append(("idle", percent(ends["idle"], 1), "of the ranks' time"))
    if ends["memory"] is not None:
        found.append(("memory", f"{ends['memory']:.2f} GiB", "most of any rank"))
    work = np.array(total_seconds_by_rank(log))
    if len(work):
        found.append(
            ("slowest rank", str(int(work.argmax())), f"{work.max() / max(work.mean(), 1e-9):.3f}x the mean work")
        )
    if log.skipped:
        found.append(("skipped steps", number(len(log.skipped)), "not applied"))
    return found


def _facts(run: Run) -> str:
    """What the run is, from its newest start."""
    start = run.last_start
    if not start:
        return ""
    rows = [(name, text(value)) for name, value in _described(run) if value]
    facts = "".join(f"<div><dt>{text(name)}</dt><dd>{value}</dd></div>" for name, value in rows)
    packages = start.get("packages")
    versions = f"Python {start.get('python', '?')}" + (f", CUDA {start['cuda']}" if start.get("cuda") else "")
    if isinstance(packages, dict):
        versions += "".join(f", {name} {version}" for name, version in packages.items())
    more = folded("Versions and command", f"<p>{text(versions)}</p><pre>{text(_command(start))}</pre>")
    return f'<dl class="facts">{facts}</dl>{_starts(run)}{more if start.get("config") else ""}'


def _described(run: Run) -> list[tuple[str, str]]:
    start = run.last_start
    ranks = f"{start.get('world_size', '?')} x {start.get('device', '?')}"
    packing = f"{run.setting('packing', 'method')}, mix {run.setting('packing', 'level_order')}"
    optimizer = f"{run.setting('optimizer', 'name')}, lr {run.setting('optimizer', 'lr')}"
    batch = run.setting("training", "global_batch_tokens")
    return [
        ("model", _model(run)),
        ("ranks", ranks),
        ("levels", _levels(run)),
        ("packing", packing if run.setting("packing", "method") else ""),
        ("data", _data(run)),
        ("tokens per step", number(batch) if isinstance(batch, int) and batch else ""),
        ("optimizer", optimizer if run.setting("optimizer", "name") else ""),
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
    told = []
    for level in levels:
        if isinstance(level, dict):
            policy = level.get("ac_policy", "none")
            recomputed = "" if policy == "none" else f" {policy}"
            size = level.get("max_tokens")
            tokens = human_count(size, 1024) if isinstance(size, int) else "?"
            told.append(f"{tokens} at cp {level.get('cp_degree')}{recomputed}")
    return "; ".join(told)


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
    shown = ", ".join(named[:4]) + (f" and {len(named) - 4} more" if len(named) > 4 else "")
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
    """Every start of the run, where there are several."""
    if len(run.starts) < 2:
        return ""
    rows = []
    for count, start in enumerate(run.starts, start=1):
        when = str(start.get("started", "?"))[:16].replace("T", " ")
        cells = (when, start.get("first_step", "?"), start.get("world_size", "?"),
                 start.get("device", "?"), _code(start) or "?")  # fmt: skip
        rows.append([str(count), *map(text, cells)])
    heads = ("start", "when", "first step", "ranks", "device", "code")
    shown = table(heads, rows[-SHOWN_STARTS:])
    if len(rows) > SHOWN_STARTS:
        shown = folded(f"{len(rows) - SHOWN_STARTS} earlier starts", table(heads, rows[:-SHOWN_STARTS])) + shown
    return shown


def report_page(runs: Sequence[Run]) -> str:
    """The whole page as HTML."""
    # A share of nothing is NaN, which is shown as not there.
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return _page(runs)


def _page(runs: Sequence[Run]) -> str:
    title = "Run report: " + ", ".join(run.name for run in runs)
    body = [f'<article id="run-{number}">{_run(run)}</article>' for number, run in enumerate(runs)]
    if len(runs) > 1:
        links = "".join(f'<a href="#run-{number}">{text(run.name)}</a>' for number, run in enumerate(runs))
        body.insert(0, f"<h1>{len(runs)} runs</h1><nav>{links}</nav>{comparison(runs)}")
    allowed = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" '
        f'content="light dark"><title>{text(title)}</title><style>{PALETTE}{STYLE}</style></head><body><main>'
        f'{"".join(body)}</main><div id="tip" role="status" hidden></div><script>{SCRIPT}</script></body></html>\n'
    )


def _run(run: Run) -> str:
    if not len(run.log):
        return header(run) + plan_section(run)
    sections = (
        timeline_section,
        loss_section,
        groups_section,
        validation_section,
        speed_section,
        ranks_section,
        plan_section,
        memory_section,
        expert_section,
    )
    return header(run) + "".join(of(run) for of in sections)
