"""Train with a kill every few minutes, then the same steps undisturbed; nothing may leak, differ or be lost.

    python scripts/soak.py --minutes 60 --job.config_file train_configs/debug_model.toml --training.epochs 40 \\
        --checkpoint.interval 10 --validation.enable false --packing.curriculum_steps 0

One rank or all are killed (SIGKILL), at any moment, during a save and in the first step after a load. A rank is started
again by torchrun, all by this command. Memory (resident, without mapped files) and open handles of torchrun and the
ranks are sampled; a process is flat where it peaks no higher in the last third of its time than before
(hbp_titan/experiments/soak.py says how nearly). At the end the epochs are audited, and the losses of every step and the
state of the last one are compared with the undisturbed run's, bit for bit. Choose as many epochs as the minutes cannot
hold: a run that is complete before is compared as it is. Exit code 1 and a line each for what is wrong. Needs /proc.
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
    """Soak; 0 where nothing is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--minutes", type=float, default=60, help="of training with kills [60]")
    parser.add_argument("--kill_every", type=float, default=180, help="mean seconds between two kills [180]")
    parser.add_argument("--seed", type=int, default=0, help="of moments, victims and delays [0]")
    parser.add_argument("--ranks", type=int, default=2, help="on this machine [2]")
    parser.add_argument("--judged_seconds", type=float, default=60, help="shorter lives are not asked to be flat [60]")
    parser.add_argument("--folder", type=Path, default=Path("outputs/soak"), help="of both runs [outputs/soak]")
    parser.add_argument("--json", type=Path, help="where the report goes [FOLDER/soak.json]")
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
