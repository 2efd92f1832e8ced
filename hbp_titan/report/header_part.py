"""The head of a run's report: what the run is, its key figures, its starts, and what could not be read.

Owns the choice of these facts.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hbp_titan.report.parts import cards, duration, folded, missing, number, percent, table, text
from hbp_titan.report.run_folder import Run
from hbp_titan.report.series import end_figures, total_seconds_by_rank, totals, whole_steps
from hbp_titan.utils import human_count

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
        ("time in steps", text(duration(all_steps.seconds)), f"{all_steps.iterations:,} iterations"),
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
    packing = f"{run.setting('packing', 'method')}, mix {run.setting('packing', 'mix')}"
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
