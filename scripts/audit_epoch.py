"""Audit a run: was each sample of a finished epoch trained exactly once, and is the rest where the plan has it?

    python scripts/audit_epoch.py outputs/debug_model [--epoch 0]

Compares what the ranks recorded as they trained (consumed/) with the plans (plan/) and the token store, for every epoch
that the run has reached. Of the epoch in progress it asks for the plan's steps up to the last that was done. A run may
be killed and resumed any number of times, also on other ranks and levels; it may be running. Samples of steps that were
skipped are counted apart. Exit code 1 and a line each for what is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from hbp_titan.data.sample_log import EpochAudit, audit_run, read_attempts, shown
from hbp_titan.data.store_summary import check_totals
from hbp_titan.data.token_store import TokenStore
from hbp_titan.errors import exit_on_user_error


def main(argv: list[str] | None = None) -> int:
    """Print the audit; 0 where all is right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_folder", type=Path, help="the run's job.dump_folder")
    parser.add_argument("--epoch", type=int, help="audit this epoch alone, counted from 0 [all]")
    options = parser.parse_args(argv)
    done = steps_done(options.run_folder / "metrics.jsonl")
    attempts = read_attempts(options.run_folder, done)
    store = TokenStore.open(attempts[-1].store)
    audits, faults = audit_run(options.run_folder, done, attempts, store, options.epoch)
    accounting, accounting_faults = check_totals(store.totals(), len(store))

    resumed = [f"{a.first_step - 1} on {a.world_size} rank{'s' * (a.world_size > 1)}" for a in attempts[1:]]
    print(
        f"{options.run_folder}: {done} steps done" + (f", resumed after step {', '.join(resumed)}" if resumed else "")
    )
    print("\n".join(accounting))
    print(f"{'epoch':>5}{'steps':>16}{'iterations':>12}{'samples':>12}{'tokens':>15}{'trained':>15}  verdict")
    print("\n".join(row(found, len(store)) for found in audits))
    faults = [*faults, *(fault for found in audits for fault in found.faults), *accounting_faults]
    for line in shown(faults):
        print(f"error: {line}", file=sys.stderr)
    return 1 if faults else 0


def row(found: EpochAudit, samples: int) -> str:
    """One line of the table."""
    steps = f"{found.steps_done} of {found.num_steps}"
    left = samples - found.samples - found.skipped
    verdict = "each sample trained once" if found.finished else f"in progress, {left:,} samples left"
    if found.skipped:
        verdict += f"; {found.skipped:,} of skipped steps, not trained"
    return (
        f"{found.epoch:>5}{steps:>16}{found.iterations:>12,}{found.samples:>12,}{found.tokens:>15,}"
        f"{found.trained_tokens:>15,}  {'wrong' if found.faults else verdict}"
    )


def steps_done(metrics: Path) -> int:
    """The last step of metrics.jsonl, which is written when every rank has recorded the step."""
    step = 0
    for line in metrics.read_text(encoding="utf-8").splitlines():
        try:
            step = int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            continue  # the half-written last line of a killed run
    return step


if __name__ == "__main__":
    raise SystemExit(exit_on_user_error(main))
