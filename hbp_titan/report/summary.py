"""What a run gained, at its end: held-out loss before and after, the plan next to the baselines, and report.html.

Made from the run folder alone, so `scripts/report.py FOLDER --summary` prints the same of any run. Tables have at most
80 columns.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from hbp_titan.report.gains import held_out
from hbp_titan.report.methods import Compared
from hbp_titan.report.page import report_page
from hbp_titan.report.run import Run, StepLog, read_runs
from hbp_titan.utils import atomic_write, human_count


def write_report(folder: Path) -> None:
    """Print the summary of the run in `folder`, write its report.html and print its path last.

    Never raises: a finished run must not fail because of its report. A failure is one line on stderr.
    """
    path = folder / "report.html"
    try:
        runs = read_runs([folder])
        if gained := summary(runs[0]):
            print(gained)
        atomic_write(path, report_page(runs))
    # Whatever it is: the run is done, and its files can be read again later.
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        print(f"warning: no report ({reason}); try python scripts/report.py {folder}", file=sys.stderr, flush=True)
    else:
        print(f"report       {path}", flush=True)


def summary(run: Run) -> str:
    """Return tables of held-out losses and of the plan next to the baselines, "" if the run has neither."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return "\n".join([*_held_out_lines(run.log), *_plan_lines(run.compared())])


def _held_out_lines(log: StepLog) -> list[str]:
    rows = [of for of in held_out(log) if of.group != "source"]
    if not rows:
        return []
    title = "held-out loss (nats per token)"
    lines = [f"{title:<30}{'before':>9}{'after':>9}{'change':>9}{'perplexity':>15}{'tokens':>8}"]
    for of in rows:
        before = "-" if of.before is None else f"{of.before:.4f}"
        change = "-" if of.change is None else f"{of.change:+.4f}"
        perplexity = " -> ".join(f"{np.exp(loss):.4g}" for loss in (of.before, of.after) if loss is not None)
        name = of.name if of.group == "all" else f"  {of.name}" + " tokens" * (of.group == "length")
        count = human_count(of.tokens)
        lines.append(f"{name:<30}{before:>9}{of.after:>9.4f}{change:>9}{perplexity:>15}{count:>8}")
    return lines


def _plan_lines(compared: list[Compared]) -> list[str]:
    if not compared:
        return []
    lines = [f"{'plan of the same samples':<32}{'padding':>10}{'idle':>10}{'shared':>10}{'batches':>10}"]
    for of in compared:
        name, m = f"  {of.label}" + ", this run" * of.own, of.metrics
        lines.append(f"{name:<32}{m.pr:>10.2%}{m.time_imbalance:>10.2%}{m.cr:>10.1%}{m.iterations:>10,}")
    return [*lines, "  idle: wait for the slowest rank, by model; shared: tokens in packs of >1 rank"]
