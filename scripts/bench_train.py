"""Benchmark training per level and checkpointing policy: tokens/s, MFU, peak memory, bytes that a layer saves.

    python scripts/bench_train.py --flavors llama3_2_1b --lengths 16384,32768,65536,131072
    torchrun --nproc_per_node 8 scripts/bench_train.py --flavors llama3_1_8b --lengths 16384:1,131072:8 --compile on
    python scripts/bench_train.py --flavors debug --lengths 1024,8192 --switch

Random weights and tokens; one full pack per data-parallel rank, all tokens trained. The engine is the trainer's, on the
GPU if there is one. A micro-batch is forward and backward, with --optimizer_step also AdamW's step and its state.
TFLOP/s and MFU are per rank and count what the documents need: no recomputation, attention within documents.
B/token/layer is what a layer under the policy saves for backward. Policies are timed round robin: "time / none" is the
median over the rounds (min-max), "FLOPs / none" counts recomputation. If a row is "out of memory", use fewer --layers,
or auto. Further arguments are configuration overrides, such as --training.dtype bfloat16.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from hbp_titan.components.step_stats import peak_flops
from hbp_titan.config import JobConfig, load_config
from hbp_titan.distributed.context_parallel import check_heads
from hbp_titan.distributed.parallelize import compute_dtype
from hbp_titan.distributed.world import World, close_world, init_world
from hbp_titan.errors import exit_on_user_error
from hbp_titan.experiments.bench_train import (
    Bench,
    Settings,
    header,
    measure_switch,
    parse_documents,
    parse_policies,
    rows,
    under_policy,
)
from hbp_titan.models.attention import selected_backend
from hbp_titan.models.registry import get_flavor
from hbp_titan.packing.level import check_levels, parse_levels


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, JobConfig]:
    """Return the options of the benchmark and the configuration of the other arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--flavors", default="debug", help="models of models/registry.py, comma-separated [debug]")
    parser.add_argument("--layers", default="all", help="all, a number, or auto: halved until all policies fit [all]")
    parser.add_argument("--lengths", default="1024,8192", help="pack lengths, ascending, with :cp_degree [1024,8192]")
    parser.add_argument(
        "--policies",
        default="none,full,keep_attention",
        help="each with :layers:chunk_tokens [none,full,keep_attention]",
    )
    parser.add_argument("--documents", default="one,600", help="per pack: one document, or a median length [one,600]")
    parser.add_argument("--compile", default="off", choices=("off", "on", "both"), help="torch.compile of blocks [off]")
    parser.add_argument("--optimizer_step", action="store_true", help="include AdamW in every micro-batch")
    parser.add_argument("--repeats", type=int, default=5, help="timed micro-batches per row, rounds of --switch [5]")
    parser.add_argument("--switch", action="store_true", help="measure level switches instead")
    parser.add_argument("--switch_packs", type=int, default=4, help="packs per level in a round of --switch [4]")
    parser.add_argument("--json", type=Path, help="write every measurement there")
    options, overrides = parser.parse_known_args(argv)
    if options.repeats < 1 or options.switch_packs < 1:
        raise ValueError(f"--repeats {options.repeats}, --switch_packs {options.switch_packs}: at least 1 each")
    config = load_config(overrides)
    if config.lora.rank:
        raise ValueError(f"lora.rank = {config.lora.rank}: not supported here, FLOPs are of full training; set it to 0")
    return options, config


def main(argv: list[str] | None = None) -> None:
    """Measure every model; rank 0 prints and writes."""
    options, config = parse(argv)
    world = init_world(config.parallelism.init_timeout_seconds)
    try:
        report: dict[str, Any] = {**describe(config, world), "command": " ".join(sys.argv)}
        log(world, "\n".join(f"{key}: {value}" for key, value in report.items()))
        if not options.switch:
            log(world, "\n" + header())
        report["measurements"] = []
        for flavor in options.flavors.split(","):
            for enable in {"off": (False,), "on": (True,), "both": (False, True)}[options.compile]:
                config.compile.enable = enable
                report["measurements"] += (switch if options.switch else bench)(options, config, world, flavor)
        if options.json and world.rank == 0:
            options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    finally:
        close_world()


def bench(options: argparse.Namespace, config: JobConfig, world: World, flavor: str) -> list[dict[str, Any]]:
    """Print the table of one model."""
    args = get_flavor(flavor)
    settings = Settings(
        lengths=parse_levels(options.lengths),
        policies=parse_policies(options.policies),
        documents=parse_documents(options.documents),
        layers=parse_layers(options.layers, args.num_layers),
        repeats=options.repeats,
        optimizer_step=options.optimizer_step,
    )
    check_levels(settings.lengths, world.size)
    check_heads(settings.lengths, args.num_heads, args.num_kv_heads)
    found = []
    for group in Bench(config, args, world, settings).run():
        log(world, "\n".join(rows(group, peak_flops(world.device))))
        found += group
    return [dataclasses.asdict(measurement) for measurement in found]


def switch(options: argparse.Namespace, config: JobConfig, world: World, flavor: str) -> list[dict[str, Any]]:
    """Measure level switches between all lengths and policies of one model, for each kind of documents."""
    args = get_flavor(flavor)
    layers = parse_layers(options.layers, args.num_layers)
    if not layers:
        raise ValueError("--layers auto cannot be combined with --switch; use a number")
    if options.optimizer_step:
        raise ValueError("--optimizer_step cannot be combined with --switch, which is within an optimizer step")
    args = args.with_layers(layers)
    lengths = parse_levels(options.lengths)
    check_levels(lengths, world.size)
    check_heads(lengths, args.num_heads, args.num_kv_heads)
    policies = parse_policies(options.policies)
    levels = [under_policy(level, policy) for level in lengths for policy in policies]
    found = []
    for documents in parse_documents(options.documents):
        cost = measure_switch(config, args, world, levels, documents, options.switch_packs, options.repeats)
        log(world, f"{flavor}, compile {'on' if config.compile.enable else 'off'}, documents {documents}: {cost}")
        setting = {"model": flavor, "layers": layers, "compile": config.compile.enable, "documents": str(documents)}
        found.append({**setting, **dataclasses.asdict(cost)})
    return found


def parse_layers(text: str, num_layers: int) -> int:
    """Return the number of layers, 0 for "auto"."""
    if text in ("all", "auto"):
        return num_layers if text == "all" else 0
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"--layers {text!r} must be all, auto or a number of at least 1")
    return int(text)


def describe(config: JobConfig, world: World) -> dict[str, Any]:
    """Return the environment of the measurements."""
    on_gpu = world.device.type == "cuda"
    cpu = f"{platform.machine()} CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads per rank"
    return {
        "device": torch.cuda.get_device_name(world.device) if on_gpu else cpu,
        "ranks": world.size,
        "torch": torch.__version__,
        "attention": selected_backend(world.device),
        "parameters": config.training.dtype,
        "computed in": str(compute_dtype(config, world.device)).removeprefix("torch."),
    }


def log(world: World, text: str) -> None:
    if world.rank == 0:
        print(text, flush=True)


if __name__ == "__main__":
    raise SystemExit(exit_on_user_error(main))
