"""Measure the data path: tokens/s from token store to batch, and from text to token store.

    python scripts/bench_data.py --job.config_file train_configs/debug_model.toml [--world_size 2] [--json OUT]
    python scripts/bench_data.py --job.config_file X.toml --only preparation --data.num_proc 8

Loader: the batches of rank 0 of --world_size in the order of its plan, next to a plain copy of the same samples' tokens
and masks (5 bytes per token) out of the memory map. A batch is larger: ids, positions, labels, loss weights, documents
and loss positions are 36 to 44 bytes per token, which workers pass in shared memory.
Preparation: the configured training data into an empty cache with data.num_proc processes (0: one per core), next to
`tokenizers.encode_batch` on the same rendered texts with as many threads. Numbers are medians of --rounds (min-max);
methods alternate. Further arguments are configuration overrides.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import sys
from pathlib import Path

from hbp_titan.config import JobConfig, load_config, validate
from hbp_titan.data.epoch import EpochPlans
from hbp_titan.data.loader import BatchShapes
from hbp_titan.data.prepare import open_stores
from hbp_titan.errors import exit_on_user_error
from hbp_titan.experiments.bench_data import Speed, loader_speeds, preparation_speeds, table
from hbp_titan.preflight import cost_model, max_sample_tokens, model_args

PARTS = ("loader", "preparation")


def main(argv: list[str] | None = None) -> None:
    """Print a table per part."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--only", choices=PARTS, help="measure only this part [both]")
    parser.add_argument("--world_size", type=int, default=2, help="ranks of the plan [2]")
    parser.add_argument("--workers", default="0,1,2", help="numbers of loader workers, comma-separated [0,1,2]")
    parser.add_argument("--rounds", type=int, default=5, help="rounds [5]")
    parser.add_argument("--json", type=Path, help="write every measurement there")
    options, overrides = parser.parse_known_args(argv)
    if options.rounds < 1:
        raise ValueError(f"--rounds {options.rounds} must be at least 1")
    config = load_config(overrides)
    validate(config, options.world_size)
    cores = config.data.num_proc or len(os.sched_getaffinity(0))
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores; {' '.join(sys.argv)}")
    report: dict[str, list[Speed]] = {}
    if options.only in (None, "loader"):
        workers = [int(word) for word in options.workers.split(",")]
        report["loader"] = loader(config, options.world_size, workers, options.rounds)
    if options.only in (None, "preparation"):
        report["preparation"] = preparation_speeds(config, cores, options.rounds)
    for part, speeds in report.items():
        print(f"\n{part}:\n{table(speeds)}")
    if options.json:
        plain = {part: [dataclasses.asdict(speed) for speed in speeds] for part, speeds in report.items()}
        options.json.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")


def loader(config: JobConfig, world_size: int, workers: list[int], rounds: int) -> list[Speed]:
    """Measure the loader on the configured data and levels."""
    args = model_args(config)
    store = open_stores(config, max_sample_tokens(config, args))[0]
    plan = EpochPlans(config, store, world_size, cost_model(args)).plan_for(0)
    return loader_speeds(
        plan, store, BatchShapes.from_plan(plan, args.num_kv_heads, args.sliding_window), workers, rounds
    )


if __name__ == "__main__":
    raise SystemExit(exit_on_user_error(main))
