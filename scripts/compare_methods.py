"""Train the same samples with several packing methods; compare epoch time, idle share and loss.

    torchrun --nproc_per_node 2 scripts/compare_methods.py --job.config_file train_configs/debug_model.toml
    torchrun --nproc_per_node 2 scripts/compare_methods.py --job.config_file X.toml --select
    torchrun --nproc_per_node 2 scripts/compare_methods.py --job.config_file X.toml \\
        --runs "isf@8192:1;flat_sorted@8192:1;hbp_paper@1024:1,8192:2;hbp@1024:1,8192:2" --repeats 3 --json out.json

Each run trains one epoch from the same weights; speed-ups are relative to the first run of the same round, as median
(min-max). Without --runs: ISF and flat + sort at the configuration's largest level, hbp_paper and hbp on its levels;
with --select all four on the levels that a profile of this machine finds best for them (kept in the run folder, as by
scripts/select_levels.py). Further arguments are configuration overrides: data.max_samples shortens the epoch, and
training.global_batch_tokens gives all methods the same optimizer steps. Validation samples (validation.enable) give the
loss after the epoch. --json writes every micro-batch, for scripts/simulate.py --validate.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from hbp_titan.config import JobConfig, load_config
from hbp_titan.data.prepare import open_stores
from hbp_titan.distributed.world import World, close_world, init_world, worker_group
from hbp_titan.errors import exit_on_user_error
from hbp_titan.experiments.compare import Run, compare, parse_runs, table
from hbp_titan.preflight import check_device, cost_model, max_sample_tokens, model_args
from hbp_titan.tuning.auto import from_rank_0, measured_profile
from hbp_titan.tuning.search import Workload, baselines, select_search

METHODS = ("isf", "flat_sorted", "hbp_paper", "hbp")


def select_runs(config: JobConfig, world: World) -> tuple[Run, ...]:
    """Return each of METHODS on its best levels by measurement; hbp_paper gets those of hbp."""
    config.clear_levels()
    args = model_args(config)
    check_device(config, world.device)
    limit = max_sample_tokens(config, args)
    stores = open_stores(config, limit, worker_group(world))
    path = config.dump_folder / "profile.json"
    profile = measured_profile(config, args, world, stores, path, lambda text: print(text) if world.rank == 0 else None)

    def choose() -> tuple[Run, ...]:
        workload = Workload.of(config, world.size, cost_model(args), stores, profile.step_seconds)
        levels = select_search(profile.candidates, workload).levels
        flat = {name: selection.levels for name, selection in baselines(profile.candidates, workload).items()}
        return tuple(Run(method, flat.get(method, levels)) for method in METHODS)

    return from_rank_0(world, choose)


def main(argv: list[str] | None = None) -> None:
    """Train every run; rank 0 prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--runs", default="", help="method@levels, separated by semicolons; the first is the reference")
    parser.add_argument("--select", action="store_true", help="select the levels of each method by measurement first")
    parser.add_argument("--repeats", type=int, default=3, help="rounds [3]")
    parser.add_argument("--json", type=Path, help="write every outcome there")
    options, overrides = parser.parse_known_args(argv)
    config = load_config(overrides)
    if options.repeats < 1 or (options.runs and options.select):
        raise ValueError(f"--repeats {options.repeats}: must be at least 1; --runs and --select cannot be combined")
    levels = tuple(config.levels)
    runs = parse_runs(options.runs) if options.runs else tuple(Run(method, levels) for method in METHODS)
    world = init_world(config.parallelism.init_timeout_seconds)
    outcomes = []
    try:
        if options.select:
            runs = select_runs(config, world)
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
    raise SystemExit(exit_on_user_error(main))
