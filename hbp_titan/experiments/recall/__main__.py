"""Show that long range is learned: train the recall task on four ranks, sound and with faults, and draw the accuracy.

    python -m hbp_titan.experiments.recall                  # the sound run and one run per fault
    python -m hbp_titan.experiments.recall --faults sound   # the sound run alone

Each run trains a Llama of two layers on documents of up to 4,096 tokens, through levels of cp 1, 2 and 4 on real gloo
ranks of this machine; FOLDER/FAULT is its ordinary run folder. A finished run is not repeated. Prints Markdown tables;
writes tables.md and recall.svg to FOLDER. Further arguments are configuration overrides of all runs.
hbp_titan/experiments/recall.md explains the results.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from hbp_titan.errors import exit_on_user_error
from hbp_titan.experiments.recall.report import distance_table, draw, fault_table
from hbp_titan.experiments.recall.runs import FAULTS, train_and_score, write_run
from hbp_titan.utils import did_you_mean


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--faults", default=",".join(FAULTS), help="runs, comma-separated [%(default)s]")
    parser.add_argument("--ranks", type=int, default=4, help="gloo ranks on this machine [%(default)s]")
    parser.add_argument("--folder", type=Path, default=Path("outputs/recall"), help="of the runs [%(default)s]")
    options, overrides = parser.parse_known_args(argv)
    names = [word.strip() for word in options.faults.split(",")]
    for name in names:
        if name not in FAULTS:
            raise ValueError(f"--faults {name}: must be one of {', '.join(FAULTS)}{did_you_mean(name, FAULTS)}")
    if options.ranks < 1:
        raise ValueError(f"--ranks {options.ranks} must be at least 1")
    write_run(options.folder)
    outcomes = {name: train_and_score(options.folder, overrides, name, options.ranks) for name in names}
    tables = f"{distance_table(outcomes[names[0]])}\n\n{fault_table(outcomes)}"
    print(f"\n{tables}")
    (options.folder / "tables.md").write_text(tables + "\n", encoding="utf-8")
    (options.folder / "recall.svg").write_text(draw(outcomes), encoding="utf-8")
    print(f"\nwrote {options.folder}")


if __name__ == "__main__":
    raise SystemExit(exit_on_user_error(main))
