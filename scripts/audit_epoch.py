"""Audit a run: was each sample of a finished epoch trained exactly once, and the current epoch as planned?

    python scripts/audit_epoch.py outputs/debug_model [--epoch 0]

Compares the samples that the ranks logged as they trained (sample_log/) with the plans (plan/) and the token store, for
every epoch that the run has reached; in the epoch in progress, up to the last step that was done. A run may be killed
and resumed any number of times, also on other ranks and levels; it may be running. Samples of skipped steps are counted
apart. Exit code 1 and one line per problem.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from hbp_titan.components.run_folder import LOCK_FILE
from hbp_titan.data.sample_log import MAX_PROBLEMS_SHOWN, EpochAudit, audit_run, read_starts
from hbp_titan.data.store_summary import check_totals
from hbp_titan.data.token_store import TokenStore
from hbp_titan.errors import exit_on_user_error
from hbp_titan.utils import first_n


def main(argv: list[str] | None = None) -> int:
    """Print the audit; return 0 if there is no problem."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_folder", type=Path, help="the run's job.dump_folder")
    parser.add_argument("--epoch", type=int, help="audit this epoch alone, counted from 0 [all]")
    options = parser.parse_args(argv)
    done = steps_done(options.run_folder / "metrics.jsonl")
    starts = read_starts(options.run_folder, done)
    store = TokenStore.open(starts[-1].store)
    # A start that resumes cuts metrics.jsonl some time before its own first step.
    running = (options.run_folder / LOCK_FILE).exists()
    audits, problems = audit_run(options.run_folder, done, starts, store, options.epoch, running)
    accounting, accounting_problems = check_totals(store.totals(), len(store))

    resumed = [f"{a.first_step - 1} on {a.world_size} rank{'s' * (a.world_size > 1)}" for a in starts[1:]]
    print(
        f"{options.run_folder}: {done} steps done" + (f", resumed after step {', '.join(resumed)}" if resumed else "")
    )
    print("\n".join(accounting))
    print(f"{'epoch':>5}{'steps':>16}{'micro-batches':>15}{'samples':>12}{'tokens':>15}{'trained':>15}  verdict")
    print("\n".join(row(found, len(store)) for found in audits))
    problems = [*problems, *(problem for found in audits for problem in found.problems), *accounting_problems]
    if problems:
        print("error: " + first_n(problems, MAX_PROBLEMS_SHOWN, "\nerror: "), file=sys.stderr)
    return 1 if problems else 0


def row(found: EpochAudit, samples: int) -> str:
    """Return one line of the table."""
    steps = f"{found.steps_done} of {found.num_steps}"
    left = samples - found.samples - found.skipped
    verdict = "each sample trained once" if found.finished else f"in progress, {left:,} samples left"
    if found.skipped:
        verdict += f"; {found.skipped:,} of skipped steps, not trained"
    return (
        f"{found.epoch:>5}{steps:>16}{found.micro_batches:>15,}{found.samples:>12,}{found.tokens:>15,}"
        f"{found.trained_tokens:>15,}  {'wrong' if found.problems else verdict}"
    )


def steps_done(metrics: Path) -> int:
    """Return the last step of metrics.jsonl, which is written after every rank has recorded the step."""
    step = 0
    for line in metrics.read_text(encoding="utf-8").splitlines():
        try:
            step = int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            continue  # the incomplete last line of a killed run
    return step


if __name__ == "__main__":
    raise SystemExit(exit_on_user_error(main))
