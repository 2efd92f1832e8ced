"""Select the packing levels of a run, measured on its machines or estimated without a GPU.

    torchrun --nproc-per-node 8 scripts/select_levels.py --job.config_file train_configs/X.toml --output levels.toml
    python scripts/select_levels.py --job.config_file X.toml --estimate h100-80gb --world_size 32

Measures (or estimates) time and memory of a micro-batch for candidates of length, context parallelism and memory plan
(checkpointing; where that is not enough host memory, chunks and groups of heads), predicts the epoch of this data for
sets of them, and prints the best set, that of the paper's two stages, and packing to one length, then what each choice
of the selection contributes. The levels of the TOML file are ignored. Further arguments are configuration overrides.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from hbp_titan.config import JobConfig, load_config, validate
from hbp_titan.data.prepare import open_stores
from hbp_titan.distributed.float8 import check_float8
from hbp_titan.distributed.world import World, close_world, init_world, worker_group
from hbp_titan.errors import exit_on_user_error
from hbp_titan.models.configs import ModelArgs
from hbp_titan.packing import Level, check_levels, parse_levels
from hbp_titan.preflight import check_device, cost_model, max_sample_tokens, model_args
from hbp_titan.tuning.auto import (
    candidate_forms,
    from_rank_0,
    levels_block,
    measured_profile,
    replace_levels,
    select_all,
)
from hbp_titan.tuning.contributions import contributions
from hbp_titan.tuning.float8_time import with_plain_levels
from hbp_titan.tuning.hardware import HARDWARE, Hardware, get_hardware, hardware_of
from hbp_titan.tuning.memory import estimate_memory
from hbp_titan.tuning.memory_plans import fits_hardware, needed_plans
from hbp_titan.tuning.parallel_levels import propose
from hbp_titan.tuning.profile import cp_styles
from hbp_titan.tuning.search import Candidate, Workload, baselines, describe_level, shortest_holding
from hbp_titan.tuning.time_model import TimeModel, estimate_candidates, time_model


def arguments(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Return the options of this command and the configuration overrides."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--method",
        choices=("search", "paper", "parallel"),
        default="search",
        help="selection to write: lowest predicted time, the paper's two stages, or levels that train side by side "
        "(only with --estimate) [search]",
    )
    parser.add_argument(
        "--estimate", metavar="HARDWARE", help=f"estimate, do not measure: one of {', '.join(HARDWARE)}"
    )
    parser.add_argument("--world_size", type=int, help="ranks of the run; only with --estimate")
    parser.add_argument("--candidates", help="max_tokens:cp_degree,... to consider, each with every memory plan")
    parser.add_argument("--output", type=Path, help="write the TOML file with its new [[levels]] there [print them]")
    parser.add_argument("--profile_cache", type=Path, help="file of the measurements [run folder/profile.json]")
    return parser.parse_known_args(argv)


def named_forms(text: str | None, args: ModelArgs, world_size: int) -> list[Level]:
    """Return a level for every max_tokens:cp_degree in `text`."""
    levels = []
    for named in parse_levels(text) if text else ():
        check_levels([named], world_size)
        style = cp_styles(named.cp_degree, args)[0]
        levels.append(Level(named.max_tokens, named.cp_degree, style))
    return levels


def estimated(options: argparse.Namespace, config: JobConfig, args: ModelArgs) -> tuple[list[Candidate], Workload]:
    """Return candidates and workload, estimated."""
    validate(config, options.world_size)
    hardware = get_hardware(options.estimate)
    stores = open_stores(config, max_sample_tokens(config, args))
    workload = Workload.of(config, options.world_size, cost_model(args), stores)
    world_size = options.world_size
    forms = named_forms(options.candidates, args, world_size)
    forms = forms or candidate_forms(workload.lengths, workload.max_sample_tokens, world_size, args)

    def candidates(config: JobConfig) -> list[Candidate]:
        def fits(level: Level) -> bool:
            estimate = estimate_memory(args, level, config, world_size, device_type="cuda")
            return fits_hardware(estimate, hardware, world_size)

        levels = with_plain_levels(needed_plans(forms, args, fits), config)
        return estimate_candidates(args, config, hardware, world_size, levels)

    found, longest = candidates(config), workload.max_sample_tokens
    try:
        shortest_holding(found, longest)
    except ValueError as error:
        if config.parallelism.cpu_offload:
            raise
        # Only proposed, because it is a setting of the whole run.
        offloaded = replace(config, parallelism=replace(config.parallelism, cpu_offload=True))
        fitting = [candidate for candidate in candidates(offloaded) if candidate.fits]
        holding = [candidate.level for candidate in fitting if candidate.level.max_tokens >= longest]
        if not holding:
            raise
        model = time_model(args, offloaded, hardware, world_size)
        raise ValueError(
            f"{error}, or set parallelism.cpu_offload = true: {copies_over_pcie(model, holding)}"
        ) from None
    return found, workload


def copies_over_pcie(model: TimeModel, levels: Sequence[Level]) -> str:
    """Return the fastest of `levels` on a pack of one document, and what keeping parameters on the host costs there."""

    def parts(level: Level) -> dict[str, float]:
        tokens = float(level.max_tokens)
        found = model.parts(level, np.array([[1.0, tokens, tokens**2, 1.0]]))
        return {name: float(seconds[0]) for name, seconds in found.items()}

    fastest = min(levels, key=lambda level: sum(parts(level).values()))
    share = parts(fastest)["host"] / sum(parts(fastest).values())
    return (
        f"{describe_level(fastest)} then fits, waits for copies over PCIe {share:.0%} of the time, and an optimizer "
        f"step takes {model.step_seconds():.2g} s"
    )


def measured_here(
    options: argparse.Namespace, config: JobConfig, args: ModelArgs, world: World
) -> tuple[Sequence[Candidate], Workload]:
    """Return candidates and workload, measured on this world."""
    validate(config, world.size)
    check_device(config, world.device)
    if config.float8.recipe:
        check_float8(config, world.size, world.device, args)
    limit = max_sample_tokens(config, args)
    stores = open_stores(config, limit, worker_group(world))
    forms = named_forms(options.candidates, args, world.size)
    path = options.profile_cache or config.dump_folder / "profile.json"

    def log(text: str) -> None:
        if world.rank == 0:
            print(text, flush=True)

    profile = measured_profile(config, args, world, stores, path, log, forms)
    return profile.candidates, Workload.of(config, world.size, cost_model(args), stores, profile.step_seconds)


def report(
    options: argparse.Namespace,
    config: JobConfig,
    args: ModelArgs,
    hardware: Hardware | None,
    candidates: Sequence[Candidate],
    workload: Workload,
) -> None:
    """Print both selections, the baselines, and what each choice contributes; write or print the requested blocks."""
    side_by_side, method = options.method == "parallel", options.method.replace("parallel", "search")
    selections, text = select_all(candidates, workload)
    print(
        f"{len(workload.lengths):,} samples, {workload.lengths.sum():,} tokens, the longest has "
        f"{workload.max_sample_tokens:,}; world size {workload.world_size}\n{text}\n"
    )
    if hardware is None:
        print("what each choice contributes: not in the hardware table; use --estimate HARDWARE\n")
    else:
        compared = baselines(candidates, workload)
        found = contributions(selections[method], compared, workload, config, args, hardware)
        print(found.describe(hardware.name) + "\n")
    levels = selections[method].levels
    if side_by_side:
        assert hardware is not None
        proposal = propose(replace(config, levels=[levels[0]]), args, hardware, workload)
        levels = proposal.levels
        print(f"{proposal.describe(selections[method].predicted.seconds)}\n")
    if options.output is None:
        print(levels_block(levels), end="")
        return
    source = config.job.config_file
    before = Path(source).read_text(encoding="utf-8") if source else ""
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(replace_levels(before, levels, source), encoding="utf-8")
    print(f"wrote {options.output}")


def main(argv: list[str] | None = None) -> None:
    options, overrides = arguments(argv)
    if (options.estimate is None) != (options.world_size is None):
        raise ValueError("--estimate HARDWARE needs --world_size N; without it torchrun sets the number of ranks")
    if options.method == "parallel" and not options.estimate:
        raise ValueError("--method parallel compares levels by the time model; add --estimate HARDWARE --world_size N")
    config = load_config(overrides)
    config.clear_levels()
    if config.packing.level_order == "parallel":
        # The search is for levels that train one at a time, of which side by side takes the lowest.
        config.packing.level_order = "interleave"
    args = model_args(config)
    if options.estimate:
        report(options, config, args, get_hardware(options.estimate), *estimated(options, config, args))
        return
    world = init_world(config.parallelism.init_timeout_seconds)
    try:
        candidates, workload = measured_here(options, config, args, world)
        # All ranks end with the same message if no level can be selected.
        from_rank_0(world, lambda: report(options, config, args, hardware_of(world.device), candidates, workload))
    finally:
        close_world()


if __name__ == "__main__":
    raise SystemExit(exit_on_user_error(main))
