"""Simulate a training epoch without a GPU: memory, time and idle share of each level and packing method.

    python scripts/simulate.py --estimate h100-80gb --world_size 32 --flavor llama3_1_8b --levels 16384:1,131072:8
    python scripts/simulate.py --job.config_file train_configs/X.toml --lengths L.npy --world_size 32 --methods isf,hbp
    python scripts/simulate.py --calibrate measured.json [--lengths L.npy]
    python scripts/simulate.py --validate compared.json --profile profile.json | --fit "isf@8192:1;hbp@1024:1,8192:2"
    python scripts/simulate.py --paper | --scale | --sensitivity | --efficiencies | --speed

Only the input of --calibrate and --validate and the seconds of --speed are measured. Without --lengths the data is a
synthetic mixture like the paper's (Tulu3 with LongCite). The file of --calibrate is JSON: {"levels": [{"max_tokens":
1024, "cp_degree": 1}], "step_seconds": 0.1, "iterations": [{"level": 0, "seconds": 0.8, "loads": [[1, trained tokens,
squared tokens, documents], one row per data-parallel rank]}]}. --validate reads the epochs that
scripts/compare_methods.py --json measured, and predicts them from the profile.json of scripts/select_levels.py or from
the micro-batches of some of the runs.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from hbp_titan.components.timing import predict_epoch
from hbp_titan.config import JobConfig, load_config
from hbp_titan.distributed.context_parallel import check_heads
from hbp_titan.errors import exit_on_user_error
from hbp_titan.experiments.paper.calibrate import (
    calibrate,
    check_fit,
    check_profile,
    check_table,
    load_measured,
    load_outcomes,
)
from hbp_titan.experiments.paper.figures import (
    fit_table,
    fit_trade_offs,
    models_table,
    predict_methods,
    predict_models,
    prediction_table,
)
from hbp_titan.experiments.paper.methods import (
    DEFAULT_METHODS,
    EXTRA_METHODS,
    MemoryChoice,
    check_methods,
    memory_choice,
    method_plan,
    replay_methods,
)
from hbp_titan.experiments.paper.scale import MODELS, scale_svg, scale_table, simulate_scale
from hbp_titan.experiments.paper.sensitivity import sensitivity, sensitivity_table
from hbp_titan.models.registry import get_flavor
from hbp_titan.packing import METHODS, Level, build_plan, check_levels, parse_levels
from hbp_titan.packing.level import AC_POLICIES
from hbp_titan.preflight import cost_model, model_args
from hbp_titan.report.timeline import panels_of, timeline_document
from hbp_titan.tuning.hardware import HARDWARE, get_hardware
from hbp_titan.tuning.memory import with_policy
from hbp_titan.tuning.memory_plans import MEMORY_MARGIN
from hbp_titan.tuning.profile_file import read_profile
from hbp_titan.tuning.published import efficiency_tables
from hbp_titan.tuning.simulate import pack_seconds, replay, replay_table, tulu3_longcite_like
from hbp_titan.tuning.time_model import TimeModel, estimate_candidates, get_dims, time_model

PAPER_SAMPLES = 941_344


def arguments(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Return the options of this command and the configuration overrides."""
    named = {**{name: method.summary for name, method in METHODS.items()}, **EXTRA_METHODS}
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="methods:\n" + "\n".join(f"  {name:<18}{text}" for name, text in named.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--estimate", metavar="MACHINE", help=f"memory and time of each level on {', '.join(HARDWARE)}")
    parser.add_argument("--hardware", default="h100-80gb", help="machine of the other modes [h100-80gb]")
    parser.add_argument("--world_size", type=int, default=32, help="ranks [32]")
    parser.add_argument("--flavor", help="model [llama3_1_8b, or the TOML's]")
    parser.add_argument("--levels", help="max_tokens:cp_degree, ascending [16384:1,131072:8, or the TOML's]")
    parser.add_argument(
        "--ac_policy",
        default="full",
        help=f"checkpointing of --levels: {', '.join(AC_POLICIES)}, or best: for each method the fastest memory plans "
        "that fit [full]",
    )
    parser.add_argument("--ac_layers", type=int, help="recomputed layers [the fewest that fit in memory]")
    parser.add_argument("--config", help="a TOML file, as --job.config_file")
    parser.add_argument("--methods", help=f"comma-separated [{','.join(DEFAULT_METHODS)}]")
    parser.add_argument("--lengths", type=Path, help="NPY file: tokens of each sample, integers [num_samples]")
    parser.add_argument("--num_samples", type=int, default=PAPER_SAMPLES, help=f"synthetic samples [{PAPER_SAMPLES}]")
    parser.add_argument("--seed", type=int, default=0, help="seed of data and plans [0]")
    parser.add_argument("--calibrate", type=Path, help="fit to measured micro-batches; print every residual")
    parser.add_argument("--validate", type=Path, help="compare measured epochs with predicted ones")
    parser.add_argument("--profile", type=Path, help="with --validate: predict from this profile.json")
    parser.add_argument("--fit", default="", help="with --validate: predict from these runs, separated by semicolons")
    parser.add_argument("--paper", action="store_true", help="fit to the paper's trade-off, and predict its comparison")
    parser.add_argument("--scale", action="store_true", help="8 to 4096 GPUs, 128K to 1M, 8B to 236B")
    parser.add_argument("--float8", default="", help="with --scale: FP8 products of all methods, as float8.recipe")
    parser.add_argument("--svg", type=Path, help="with --scale: write the chart there")
    parser.add_argument("--timeline", type=Path, help="write a picture of the ranks over time, ISF and hbp (SVG)")
    parser.add_argument("--sensitivity", action="store_true", help="ratios over the range of each assumed figure")
    parser.add_argument("--efficiencies", action="store_true", help="published figures that efficiencies come from")
    parser.add_argument("--speed", action="store_true", help="time planner and simulator: 10M samples, 4096 ranks")
    return parser.parse_known_args(argv)


def load_lengths(options: argparse.Namespace) -> np.ndarray:
    """Return the lengths of the file, else synthetic ones, int64 [num_samples]."""
    if options.lengths is None:
        return tulu3_longcite_like(options.num_samples, options.seed)
    values = np.load(options.lengths, allow_pickle=False)
    if values.ndim != 1 or not len(values) or not np.issubdtype(values.dtype, np.integer):
        raise ValueError(f"{options.lengths}: must be one-dimensional integers, the tokens of each sample")
    return values.astype(np.int64)


def configuration(options: argparse.Namespace, overrides: list[str]) -> JobConfig:
    """Return the configuration of the TOML file, if any; --flavor and --levels override it."""
    words = [*(("--job.config_file", options.config) if options.config else ()), *overrides]
    config = load_config(words)
    if options.flavor or not words:
        config.model.hf_path, config.model.flavor = "", options.flavor or "llama3_1_8b"
    if options.levels or not config.levels:
        levels = parse_levels(options.levels or "16384:1,131072:8")
        policy = "none" if options.ac_policy == "best" else options.ac_policy
        config.levels = [
            with_policy(level, policy, None if policy == "none" else options.ac_layers) for level in levels
        ]
    return config


def estimated(config: JobConfig, machine: str, world_size: int) -> tuple[list[Level], TimeModel]:
    """Print time and memory of each level; return the levels that fit, with their recomputation, and the time model."""
    args, hardware = model_args(config), get_hardware(machine)
    check_levels(config.levels, world_size)
    check_heads(config.levels, args.num_heads, args.num_kv_heads)
    model = time_model(args, config, hardware, world_size)
    candidates = estimate_candidates(args, config, hardware, world_size, config.levels)
    print(
        f"{args.name} on {world_size} x {hardware.name} (estimated, not measured); memory "
        f"{hardware.memory_bytes / 2**30:.1f} GiB less {MEMORY_MARGIN:.0%}; seconds of a micro-batch with documents of "
        "1000 tokens (short), and with one document (long)"
    )
    print(f"{'level':<18}{'recomputed':<22}{'peak GiB':>9}{'fits':>6}{'short':>9}{'long':>9}{'tokens/s/GPU':>14}")
    for candidate in candidates:
        level, peak = candidate.level, (candidate.peak_bytes or 0) / 2**30
        layers = "all" if level.ac_layers is None else level.ac_layers
        recomputed = "none" if level.ac_policy == "none" else f"{level.ac_policy}, {layers} of {args.num_layers}"
        name, fits = f"{level.max_tokens}:{level.cp_degree}", "yes" if candidate.fits else "NO"
        line = f"{name:<18}{recomputed:<22}{peak:>9.1f}{fits:>6}"
        if candidate.time is not None:
            trained = level.max_tokens
            of_short, of_long = model.dims.squares(np.array([1000, trained])).tolist()
            documents = trained / 1000
            loads = np.array([[1, trained, documents * of_short, documents], [1, trained, of_long, 1.0]])
            short, long = candidate.time.seconds(loads)
            line += f"{short:>9.3f}{long:>9.3f}{trained / level.cp_degree / short:>14,.0f}"
        print(line)
    return [candidate.level for candidate in candidates if candidate.fits], model


def compare(options: argparse.Namespace, levels: list[Level], model: TimeModel, choice: MemoryChoice | None) -> None:
    """Simulate the methods and print the table."""
    names = options.methods.split(",") if options.methods else list(DEFAULT_METHODS)
    check_methods(names)
    lengths = load_lengths(options)
    print(
        f"{len(lengths):,} samples, {lengths.sum():,} tokens, one epoch; simulated, speed-up per token over {names[0]}"
    )
    replays = replay_methods(lengths, levels, model, names, options.seed, choice)
    print(replay_table(replays))
    if absent := [name for name in names if name not in replays]:
        print(f"not simulated, because they do not fit or do not support the model: {', '.join(absent)}")
    if options.timeline:
        isf, hbp = (method_plan(lengths, levels, model, name, options.seed, choice) for name in ("isf", "hbp"))
        machine, data = model.hardware.name, "" if options.lengths else ", synthetic lengths like the paper's"
        text = f"seconds, estimated for {model.world_size} x {machine}{data}"
        panels = panels_of(hbp, isf, lambda plan: np.sum([*pack_seconds(plan, model, True).values()], axis=0))
        options.timeline.write_text(timeline_document(panels, text), encoding="utf-8")
        print(f"wrote {options.timeline}")


def compare_best(options: argparse.Namespace, config: JobConfig) -> None:
    """Simulate the methods, each with the fastest memory plan of each level that fits."""
    args, hardware = model_args(config), get_hardware(options.estimate or options.hardware)
    check_levels(config.levels, options.world_size)
    check_heads(config.levels, args.num_heads, args.num_kv_heads)
    choice = memory_choice(args, hardware, options.world_size, config.levels)
    if choice is None:
        raise ValueError("levels: not every level fits; use a larger world size or cp_degree")
    print(
        f"{args.name} on {options.world_size} x {hardware.name}, fastest memory plans that fit; simulated, not measured"
    )
    compare(options, config.levels, choice.model, choice)


def report_calibration(options: argparse.Namespace) -> None:
    """Print coefficients, residuals and verdict of a fit; with --lengths also the epochs of the methods."""
    measured = load_measured(options.calibrate)
    result = calibrate(measured)
    for level, fitted in zip(measured.levels, result.times, strict=True):
        print(
            f"level {level.max_tokens}:{level.cp_degree}: {fitted.base:.4g} s + {fitted.per_loss_token:.3g} per "
            f"trained token + {fitted.per_square:.3g} per squared token + {fitted.per_document:.3g} per document"
        )
    print(f"{'micro-batch':<12}{'level':>8}{'measured s':>12}{'predicted s':>13}{'residual':>10}")
    for number, row in enumerate(measured.micro_batches):
        note = "  held out" if result.held_out[number] else ""
        print(
            f"{number:<12}{measured.levels[row.level].max_tokens:>8}{row.seconds:>12.4f}{result.predicted[number]:>13.4f}"
            f"{result.residuals[number]:>10.1%}{note}"
        )
    print(result.verdict())
    if options.lengths:
        lengths = load_lengths(options)
        for name in (options.methods or "isf,flat_sorted,hbp_paper,hbp").split(","):
            plan = build_plan(lengths, measured.levels, options.world_size, name, options.seed)
            epoch = predict_epoch(plan, result.times, measured.step_seconds)
            print(f"{name:<16}{epoch.seconds:>12.1f} s per epoch, idle {epoch.idle:.1%}")


def report_validation(options: argparse.Namespace) -> None:
    """Print each measured epoch and its prediction."""
    if (options.profile is None) == (not options.fit):
        raise ValueError("--validate needs either --profile profile.json or --fit RUNS")
    outcomes = load_outcomes(options.validate)
    if options.fit:
        checks = check_fit(outcomes, [run.strip() for run in options.fit.split(";")])
    else:
        checks = check_profile(outcomes, read_profile(options.profile))
    print(check_table(checks))


def report_paper(options: argparse.Namespace) -> None:
    """Print the fit to the trade-off and the prediction of the comparison with every residual."""
    lengths = load_lengths(options)
    fit = fit_trade_offs(lengths)
    print(fit_table(fit), end="\n\n")
    print(prediction_table(dict(predict_methods(lengths, fit.model, options.seed))), end="\n\n")
    print(models_table(predict_models(lengths, fit.model, options.seed)))


def report_scale(options: argparse.Namespace) -> None:
    hardware, float8 = get_hardware(options.hardware), options.float8
    # Without the models that have no FP8 products of experts.
    models = [name for name in MODELS if not float8 or not get_dims(name).expert_params]
    scenarios = list(simulate_scale(hardware, models, float8=float8))
    print(f"simulated on {options.hardware}, not measured\n\n{scale_table(scenarios)}")
    if options.svg:
        options.svg.write_text(scale_svg(scenarios), encoding="utf-8")
        print(f"wrote {options.svg}")


def report_sensitivity(options: argparse.Namespace) -> None:
    """Print ours over each baseline, one figure of the hardware table at a time at both ends of its range."""
    config, hardware = configuration(options, []), get_hardware(options.hardware)
    levels = [with_policy(level, "none") for level in config.levels]
    rows = sensitivity(config.model.flavor, levels, options.world_size, hardware, load_lengths(options), options.seed)
    print(f"{config.model.flavor} on {options.world_size} x {hardware.name}; simulated, not measured\n")
    print(sensitivity_table(list(rows)))


def report_speed(options: argparse.Namespace) -> None:
    """Print the seconds that planner and simulator take."""
    lengths = tulu3_longcite_like(10_000_000, options.seed)
    config = configuration(options, [])
    args = get_flavor(config.model.flavor)
    model = time_model(args, config, get_hardware(options.hardware), 4096)
    for name in ("isf", "flat_sorted", "hbp_paper", "hbp"):
        start = time.perf_counter()
        plan = build_plan(lengths, config.levels, 4096, name, options.seed, cost=cost_model(args))
        planned = time.perf_counter()
        replay(plan, model)
        print(f"{name:<12} planned in {planned - start:.1f} s, simulated in {time.perf_counter() - planned:.1f} s")


def main(argv: list[str] | None = None) -> None:
    options, overrides = arguments(argv)
    if options.calibrate:
        return report_calibration(options)
    if options.validate:
        return report_validation(options)
    if options.paper:
        return report_paper(options)
    if options.scale:
        return report_scale(options)
    if options.sensitivity:
        return report_sensitivity(options)
    if options.efficiencies:
        return print(efficiency_tables())
    if options.speed:
        return report_speed(options)
    config = configuration(options, overrides)
    if options.ac_policy == "best":
        return compare_best(options, config)
    levels, model = estimated(config, options.estimate or options.hardware, options.world_size)
    if len(levels) < len(config.levels):
        raise ValueError("not every level fits; use a larger world size or cp_degree, or recompute more layers")
    if options.methods or options.lengths or options.timeline or not options.estimate:
        compare(options, levels, model, None)
    return None


if __name__ == "__main__":
    raise SystemExit(exit_on_user_error(main))
