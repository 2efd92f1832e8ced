"""Plan the packing of a data set without training: padding, balance and communication, by method.

    python scripts/plan_packing.py --lengths L.npy --world_size 32 --compare --json plan.json --html plan.html
    python scripts/plan_packing.py --store .data/cache/FOLDER --world_size 32
    python scripts/plan_packing.py --job.config_file train_configs/X.toml --world_size 32 [--section.key value]

--lengths needs no model, tokenizer or GPU. A token store (--store) also has the loss tokens; a TOML file gives the data
(prepared if necessary), levels, packing settings and the model's cost.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from hbp_titan.config import load_config
from hbp_titan.errors import exit_on_user_error
from hbp_titan.packing import METHODS, CostModel, Metrics, Plan, build_plan, comparison_table, measure, parse_levels
from hbp_titan.packing.plan import save_plan
from hbp_titan.report.methods import planned_by
from hbp_titan.report.plan_page import html_report


def arguments(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Return the options of this command and the configuration overrides."""
    methods = "\n".join(f"  {name:<12}{method.summary}" for name, method in METHODS.items())
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"methods:\n{methods}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--lengths", type=Path, help="NPY file: tokens of each sample, integers [num_samples]")
    parser.add_argument("--store", type=Path, help="token store folder: lengths.npy and loss_tokens.npy")
    parser.add_argument("--world_size", type=int, required=True, help="ranks")
    parser.add_argument("--levels", help="max_tokens:cp_degree, ascending [16384:1,131072:8, or the TOML's]")
    parser.add_argument("--method", help="one method [hbp, or the TOML's packing.method]")
    parser.add_argument("--compare", action="store_true", help="all methods")
    parser.add_argument("--overlong", choices=("error", "skip", "truncate"), default="error",
                        help="samples longer than the largest level [error]")  # fmt: skip
    parser.add_argument("--seed", type=int, help="seed [0, or packing.seed]")
    parser.add_argument("--epoch", type=int, default=0, help="epoch [0]")
    parser.add_argument("--level_order", help="alternate, interleave or parallel [alternate, or packing.level_order]")
    parser.add_argument("--global_batch_tokens", type=int, help="tokens of an optimizer step [0: one micro-batch]")
    parser.add_argument("--curriculum_steps", type=float, help="first steps on only the lowest level [0]")
    parser.add_argument("--beta", type=float, help="cost of a squared token relative to a token [2e-5, or the model's]")
    parser.add_argument("--json", type=Path, help="write the metrics there")
    parser.add_argument("--html", type=Path, help="write a page with charts there")
    parser.add_argument("--save_plan", type=Path, help="write the plan there (safetensors)")
    return parser.parse_known_args(argv)


def load_lengths(path: Path) -> np.ndarray:
    """Return an integer array from an NPY file as int64 [n]; ValueError for anything else."""
    try:
        values = np.load(path, allow_pickle=False)
    except (ValueError, EOFError):
        raise ValueError(f"{path}: not an NPY file of numbers") from None
    if not isinstance(values, np.ndarray) or values.ndim != 1 or not np.issubdtype(values.dtype, np.integer):
        raise ValueError(f"{path}: must be one-dimensional integers, the tokens of each sample")
    return values.astype(np.int64)


def default_levels(world_size: int) -> str:
    """Return the paper's two levels, with a context-parallel degree that divides the world size."""
    return f"16384:1,131072:{math.gcd(8, max(world_size, 1))}"


def inputs(options: argparse.Namespace, overrides: list[str]) -> tuple[np.ndarray, dict[str, Any]]:
    """Return lengths int64 [num_samples] and keyword arguments of build_plan, from files or a configuration."""
    settings: dict[str, Any] = {"levels": parse_levels(options.levels or default_levels(options.world_size))}
    if options.lengths or options.store:
        if overrides:
            raise ValueError(f"unknown argument {overrides[0]!r}: see --help")
        lengths = load_lengths(options.lengths or options.store / "lengths.npy")
        if options.store:
            settings["loss_tokens"] = load_lengths(options.store / "loss_tokens.npy")
    else:
        lengths, settings = from_config(options, overrides)
    for name in ("method", "seed", "level_order", "global_batch_tokens", "curriculum_steps"):
        if getattr(options, name) is not None:
            settings[name] = getattr(options, name)
    if options.beta is not None:
        first = np.atleast_1d(settings.get("cost", CostModel()))[0]
        settings["cost"] = replace(first, alpha=1.0, beta=options.beta)
    if options.overlong == "truncate":
        lengths = np.minimum(lengths, settings["levels"][-1].max_tokens)
        if "loss_tokens" in settings:
            # The positions of the loss tokens are not known here; at most all remaining tokens are trained.
            settings["loss_tokens"] = np.minimum(settings["loss_tokens"], lengths)
    settings["overlong"] = "skip" if options.overlong == "skip" else "error"
    return lengths, {**settings, "world_size": options.world_size, "epoch": options.epoch}


def from_config(options: argparse.Namespace, overrides: list[str]) -> tuple[np.ndarray, dict[str, Any]]:
    """Return what a training run of this configuration plans from."""
    if not any(word.startswith("--job.config_file") for word in overrides):
        raise ValueError("no data; pass --lengths, --store or --job.config_file")
    # Imported here: planning from lengths works without torch.
    from hbp_titan.data.prepare import prepare
    from hbp_titan.preflight import cost_model, model_args

    config = load_config([*overrides, *(("--levels", options.levels) if options.levels else ())])
    folder, _ = prepare(config)
    args, frozen = model_args(config), config.lora.rank > 0
    costs: CostModel | list[CostModel] = cost_model(args, frozen)
    if config.packing.level_order == "parallel":
        # As a start on a machine that the hardware table lacks.
        costs = [cost_model(args, frozen, level) for level in config.levels]
    return load_lengths(folder / "lengths.npy"), {
        "levels": config.levels,
        "loss_tokens": load_lengths(folder / "loss_tokens.npy"),
        "method": config.packing.method,
        "seed": config.seed_of("packing"),
        "level_order": config.packing.level_order,
        "global_batch_tokens": config.training.global_batch_tokens,
        "curriculum_steps": config.packing.curriculum_steps,
        "cost": costs,
    }


def as_json(plan: Plan, compared: dict[str, Metrics], seconds: dict[str, float]) -> dict[str, Any]:
    """Return the metrics of every method as plain values."""
    return {
        "world_size": plan.world_size,
        "levels": [{"max_tokens": level.max_tokens, "cp_degree": level.cp_degree} for level in plan.levels],
        "samples": len(plan.packs.ids),
        "tokens": int(plan.pack_tokens.sum()),
        "skipped": plan.skipped.tolist(),
        "seed": plan.seed,
        "epoch": plan.epoch,
        "fingerprint": plan.fingerprint,
        "methods": {name: {**asdict(m), "seconds": seconds[name]} for name, m in compared.items()},
    }


def main(argv: list[str] | None = None) -> None:
    options, overrides = arguments(argv)
    lengths, settings = inputs(options, overrides)
    chosen = settings.pop("method", "hbp")
    start = time.perf_counter()
    chosen_plan = build_plan(lengths, method=chosen, **settings)
    seconds = {chosen: time.perf_counter() - start}
    compared = {chosen: measure(chosen_plan)}
    for name in METHODS if options.compare else ():
        if name != chosen:
            start = time.perf_counter()
            plan = planned_by(chosen_plan, name)
            seconds[name] = time.perf_counter() - start
            compared[name] = measure(plan)
    levels = ", ".join(f"{level.max_tokens}:{level.cp_degree}" for level in chosen_plan.levels)
    print(
        f"{len(chosen_plan.packs.ids):,} samples, {int(chosen_plan.pack_tokens.sum()):,} tokens; "
        f"world size {chosen_plan.world_size}; levels {levels}"
    )
    if len(chosen_plan.skipped):
        print(f"skipped (longer than the largest level): {len(chosen_plan.skipped):,} samples")
    print(comparison_table(compared))
    print(f"{chosen}: {chosen_plan.num_steps:,} optimizer steps, planned in {seconds[chosen]:.2f} s")
    for path, text in (
        (options.json, lambda: json.dumps(as_json(chosen_plan, compared, seconds), indent=1) + "\n"),
        (options.html, lambda: html_report(chosen_plan, compared)),
    ):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text(), encoding="utf-8")
            print(f"wrote {path}")
    if options.save_plan:
        save_plan(chosen_plan, options.save_plan)
        print(f"wrote {options.save_plan}")


if __name__ == "__main__":
    raise SystemExit(exit_on_user_error(main))
