"""Train the same samples by several packing methods and compare epoch time, idle share and loss, in one run.

    torchrun --nproc_per_node 2 scripts/compare_methods.py --job.config_file train_configs/debug_model.toml
    torchrun --nproc_per_node 2 scripts/compare_methods.py --job.config_file X.toml \\
        --runs "isf@8192:1;flat_sorted@8192:1;hbp_paper@1024:1,8192:2;hbp@1024:1,8192:2" --repeats 3 --json out.json

Each run trains one epoch from the same weights; speed-ups are over the first run of the same round, as their median
with the least and the greatest. Without --runs: ISF and flat + sort at the configuration's largest level, HBP as
printed and ours on its levels. Every key of the configuration can be given too: data.max_samples shortens it, and
training.global_batch_tokens gives methods with large iterations and small ones the same steps. Validation samples
(validation.enable) give the loss after the epoch. --json keeps every iteration, for scripts/simulate.py --calibrate.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from hbp_titan.cli import guarded
from hbp_titan.compare import Run, compare, parse_runs, table
from hbp_titan.config import load_config
from hbp_titan.distributed.world import close_world, init_world

METHODS = ("isf", "flat_sorted", "hbp_paper", "hbp")


def main() -> None:
    """Parse the command line, train every run, print the table on rank 0."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--runs", default="", help="method@levels, several by semicolons; the first is the base")
    parser.add_argument("--repeats", type=int, default=3, help="rounds [3]")
    parser.add_argument("--json", type=Path, help="write every outcome there")
    options, overrides = parser.parse_known_args()
    config = load_config(overrides)
    levels = tuple(config.levels)
    if options.repeats < 1:
        raise ValueError(f"--repeats {options.repeats}: at least 1")
    runs = parse_runs(options.runs) if options.runs else tuple(Run(method, levels) for method in METHODS)
    world = init_world(config.parallelism.init_timeout_seconds)
    outcomes = []
    try:
        for outcome in compare(config, world, runs, options.repeats):
            outcomes.append(outcome)
            if world.rank == 0:
                idle = " ".join(f"{share:.1%}" for share in outcome.idle)
                print(f"{outcome.run}: {outcome.seconds:.1f} s, idle {idle}, loss {outcome.loss}", flush=True)
    finally:
        close_world()
    if world.rank == 0:
        threads = torch.get_num_threads()
        print(f"\n{world.size} ranks on {world.device.type}, {threads} threads each, {options.repeats} rounds")
        print(table(outcomes, runs))
        if options.json:
            options.json.write_text(json.dumps([outcome.as_dict() for outcome in outcomes]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    guarded(main)
