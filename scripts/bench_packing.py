"""Benchmark the planner against packers of other projects, on the same lengths: samples/s and padding ratio.

    python scripts/bench_packing.py [--num_samples 1000000] [--capacity 16384] [--lengths L.npy] [--json OUT]

Rows: our packers for one length (bfd, lpt, isf), those of other projects that are installed (`pip install trl datasets
llamafactory seqpacker lightbinpack binpacking`, any of them), and whole plans at world size 32 (levels, fill, balance,
schedule). Packers get the samples of at most --capacity tokens. Each runs on a tenth of them first; one that might need
more than --limit seconds for all is reported for the tenth. Times are the best of --repeat runs.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from hbp_titan.errors import exit_on_user_error
from hbp_titan.packing import PACKERS, build_plan, measure, parse_levels
from hbp_titan.packing.ragged import IntArray
from hbp_titan.tuning.simulate import tulu3_longcite_like

WORLD_SIZE = 32
LEVELS = "16384:1,131072:8"

# (lengths, capacity) -> a function that packs them and returns the number of packs; only that function is timed.
Prepare = Callable[[IntArray, int], Callable[[], int]]


def ours(name: str) -> Prepare:
    return lambda lengths, capacity: lambda: PACKERS[name].pack(lengths, capacity, (0,)).num_rows


def trl(lengths: IntArray, capacity: int) -> Callable[[], int]:
    """TRL packs tokens, not lengths: it gets one-byte tokens, so that little besides its packing is timed."""
    datasets, pyarrow, data_utils = map(importlib.import_module, ("datasets", "pyarrow", "trl.data_utils"))
    datasets.disable_progress_bars()
    datasets.disable_caching()
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = pyarrow.LargeListArray.from_arrays(offsets, np.zeros(offsets[-1], np.int8))
    rows = datasets.Dataset(pyarrow.table({"input_ids": tokens}))
    return lambda: len(data_utils.pack_dataset(rows, capacity, "bfd", {"batch_size": len(lengths)}))


def llamafactory(lengths: IntArray, capacity: int) -> Callable[[], int]:
    """LLaMA-Factory: only the file with its knapsack is imported, because the package needs many libraries."""
    package = importlib.util.find_spec("llamafactory")
    if package is None or package.submodule_search_locations is None:
        raise ImportError("llamafactory")
    file = Path(package.submodule_search_locations[0]) / "data" / "processor" / "processor_utils.py"
    spec = importlib.util.spec_from_file_location("processor_utils", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    listed = lengths.tolist()
    return lambda: len(module.greedy_knapsack(list(listed), capacity))


def seqpacker(lengths: IntArray, capacity: int) -> Callable[[], int]:
    packer = importlib.import_module("seqpacker").Packer(capacity, "obfd")
    return lambda: packer.pack(lengths).num_bins


def lightbinpack(lengths: IntArray, capacity: int) -> Callable[[], int]:
    bfd = importlib.import_module("lightbinpack").bfd
    listed = lengths.tolist()
    return lambda: len(bfd(listed, capacity))


def binpacking(lengths: IntArray, capacity: int) -> Callable[[], int]:
    to_constant_volume = importlib.import_module("binpacking").to_constant_volume
    listed = lengths.tolist()
    return lambda: len(to_constant_volume(listed, capacity))


# Row name -> (distribution, None for ours; preparation).
PACKERS_COMPARED: dict[str, tuple[str | None, Prepare]] = {
    "ours bfd": (None, ours("bfd")),
    "ours lpt": (None, ours("lpt")),
    "ours isf": (None, ours("isf")),
    "TRL bfd": ("trl", trl),
    "LLaMA-Factory knapsack": ("llamafactory", llamafactory),
    "seqpacker obfd": ("seqpacker", seqpacker),
    "lightbinpack bfd": ("lightbinpack", lightbinpack),
    "binpacking": ("binpacking", binpacking),
}


def best_time(function: Callable[[], int], repeat: int) -> tuple[float, int]:
    """Return the seconds of the fastest run and its result."""
    best, result = float("inf"), 0
    for _ in range(repeat):
        start = time.perf_counter()
        result = function()
        best = min(best, time.perf_counter() - start)
    return best, result


def bench_packer(prepare: Prepare, lengths: IntArray, capacity: int, limit: float, repeat: int) -> dict[str, Any]:
    """Return samples, seconds, samples/s, packs and padding ratio of one packer."""
    tenth = lengths[: max(1, len(lengths) // 10)]
    seconds, packs = best_time(prepare(tenth, capacity), 1)
    used = tenth
    # Some packers take quadratic time: ten times the samples may take a hundred times as long.
    if seconds * 100 <= limit:
        used = lengths
        seconds, packs = best_time(prepare(lengths, capacity), repeat)
    return row(len(used), seconds, packs, 1 - int(used.sum()) / (packs * capacity))


def bench_plan(lengths: IntArray, method: str, repeat: int) -> dict[str, Any]:
    """Return the same for a whole plan, and the peak memory of building it."""
    levels = parse_levels(LEVELS)
    seconds, _ = best_time(lambda: build_plan(lengths, levels, WORLD_SIZE, method).num_iterations, repeat)
    tracemalloc.start()
    plan = build_plan(lengths, levels, WORLD_SIZE, method)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    result = row(len(lengths), seconds, plan.packs.num_rows, measure(plan).pr)
    return {**result, "bytes_per_sample": peak / len(lengths)}


def row(samples: int, seconds: float, packs: int, padding: float) -> dict[str, Any]:
    return {
        "samples": samples,
        "seconds": seconds,
        "samples_per_second": samples / seconds,
        "packs": packs,
        "pr": padding,
    }


def show(name: str, result: dict[str, Any]) -> None:
    memory = f"{result['bytes_per_sample']:>7.0f} B" if "bytes_per_sample" in result else ""
    print(
        f"{name:<30}{result['samples']:>11,}{result['seconds']:>10.3f}{result['samples_per_second']:>13,.0f}"
        f"{result['pr']:>9.5f}{memory}",
        flush=True,
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_samples", type=int, default=1_000_000, help="synthetic samples [1000000]")
    parser.add_argument("--lengths", type=Path, help="NPY file with lengths, instead of synthetic ones")
    parser.add_argument("--capacity", type=int, default=16384, help="tokens of a pack [16384]")
    parser.add_argument("--limit", type=float, default=60, help="maximum seconds of one run [60]")
    parser.add_argument("--repeat", type=int, default=3, help="runs, of which the best counts [3]")
    parser.add_argument("--json", type=Path, help="write the results there")
    options = parser.parse_args(argv)
    lengths = np.load(options.lengths, allow_pickle=False) if options.lengths else None
    if lengths is None:
        lengths = tulu3_longcite_like(options.num_samples)
    lengths = lengths.astype(np.int64)
    short = lengths[lengths <= options.capacity]

    print(f"{'packer':<30}{'samples':>11}{'seconds':>10}{'samples/s':>13}{'PR':>9}")
    results: dict[str, Any] = {}
    for name, (distribution, prepare) in PACKERS_COMPARED.items():
        try:
            if distribution is not None:
                name = f"{name} {importlib.metadata.version(distribution)}"
            results[name] = bench_packer(prepare, short, options.capacity, options.limit, options.repeat)
        except ImportError as error:
            print(f"{name:<30}not run: {error}".rstrip())
            continue
        show(name, results[name])
    print(f"whole plans, world {WORLD_SIZE}, levels {LEVELS}:")
    for method in ("hbp", "flat_sorted", "hbp_paper"):
        results[f"plan {method}"] = bench_plan(lengths, method, options.repeat)
        show(f"plan {method}", results[f"plan {method}"])
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(exit_on_user_error(main))
