"""Soak test: train with a kill every few minutes, then the same steps undisturbed, and compare.

    python scripts/soak.py --minutes 60 --job.config_file train_configs/debug_model.toml --training.epochs 40 \\
        --checkpoint.interval 10 --validation.enable false --packing.curriculum_steps 0

One rank or all are killed (SIGKILL), at any moment, during a save and in the first step after a load. torchrun restarts
a rank, this command all of them. Resident memory (without mapped files) and open file handles of torchrun and the ranks
are sampled and checked for leaks (hbp_titan/experiments/soak.py). At the end the epochs are audited, and the losses of
every step and the state of the last one are compared with the undisturbed run bit for bit. Set more epochs than fit in
the minutes. Exit code 1 and one line per problem. Needs /proc.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

from hbp_titan.config import load_config
from hbp_titan.errors import exit_on_user_error
from hbp_titan.experiments.soak import Settings, soak, table, timed_kills


def main(argv: list[str] | None = None) -> int:
    """Run the soak test; return 0 if there is no problem."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--minutes", type=float, default=60, help="minutes of training with kills [60]")
    parser.add_argument("--kill_every", type=float, default=180, help="mean seconds between two kills [180]")
    parser.add_argument("--seed", type=int, default=0, help="seed of the kills [0]")
    parser.add_argument("--ranks", type=int, default=2, help="ranks on this machine [2]")
    parser.add_argument(
        "--judged_seconds",
        type=float,
        default=60,
        help="minimum of a process to check for leaks [60]",
    )
    parser.add_argument("--folder", type=Path, default=Path("outputs/soak"), help="of both runs [outputs/soak]")
    parser.add_argument("--json", type=Path, help="file of the report [FOLDER/soak.json]")
    options, overrides = parser.parse_known_args(argv)
    load_config(overrides)
    settings = Settings(
        overrides,
        options.folder,
        options.ranks,
        seconds=60 * options.minutes,
        judged_seconds=options.judged_seconds,
    )
    report = soak(settings, partial(timed_kills, every_seconds=options.kill_every), options.seed)
    path = options.json or options.folder / "soak.json"
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"{table(report)}\nwrote {path}")
    return 1 if report["faults"] else 0


if __name__ == "__main__":
    raise SystemExit(exit_on_user_error(main))
