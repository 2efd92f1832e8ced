"""Train a configuration without interruption and on 4, 2, 1 and 4 ranks in sequence, and plot both losses.

    python scripts/plot_elastic.py --job.config_file train_configs/debug_model.toml --svg elastic.svg \\
        --validation.interval 4 --validation.max_samples 60 --checkpoint.interval 5
    python scripts/plot_elastic.py --job.config_file X.toml --segments 8,4,8 --folder outputs/elastic

The second run gets SIGTERM when a segment has trained its share of the run's tokens, and resumes from its checkpoint on
the ranks of the next segment. Levels whose cp_degree does not divide the ranks get the largest one that does. Run
folders are FOLDER/whole and FOLDER/elastic; existing runs are only plotted. Further arguments are configuration
overrides.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hbp_titan.config import load_config
from hbp_titan.data.sample_log import read_starts
from hbp_titan.errors import exit_on_user_error
from hbp_titan.report.charts import Chart, side_by_side

NAMES = {"whole": "without interruption", "elastic": "stopped and resumed"}


def read_steps(folder: Path) -> list[dict[str, Any]]:
    """Return the complete lines of metrics.jsonl, none without that file."""
    path = folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def command(overrides: Sequence[str], folder: Path, ranks: int) -> list[str]:
    """Return the command of a run on `ranks` ranks of this machine."""
    config = load_config(overrides)
    fitted = [dataclasses.replace(level, cp_degree=math.gcd(level.cp_degree, ranks)) for level in config.levels]
    levels = ",".join(":".join(str(v) for v in dataclasses.astuple(level) if v is not None) for level in fitted)
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--rdzv-backend=c10d"]
    train = ["--rdzv-endpoint=localhost:0", "-m", "hbp_titan.train", *overrides]
    return [*launcher, *train, f"--levels={levels}", f"--job.dump_folder={folder}"]


def train(overrides: Sequence[str], folder: Path, ranks: int, until_tokens: float) -> None:
    """Train until `until_tokens` tokens of the run are trained, or to its end; RuntimeError if it fails."""
    process = subprocess.Popen(command(overrides, folder, ranks))
    while process.poll() is None:
        time.sleep(0.1)
        if sum(step["tokens"] for step in read_steps(folder)) >= until_tokens:
            process.terminate()
            process.wait()
            return
    if process.returncode:
        raise RuntimeError(f"{folder}: the run on {ranks} ranks failed with exit code {process.returncode}")


def smoothed(steps: Sequence[dict[str, Any]], window: float) -> list[tuple[float, float]]:
    """Return (tokens so far, mean loss per trained token of the last `window` tokens) after each step."""
    points = []
    done = 0.0
    for index, step in enumerate(steps):
        done += step["tokens"]
        loss = trained = tokens = 0.0
        for earlier in reversed(steps[: index + 1]):
            if earlier["loss"] is None:
                continue  # a skipped step
            loss += earlier["loss"] * earlier["trained_tokens"]
            trained += earlier["trained_tokens"]
            tokens += earlier["tokens"]
            if tokens >= window:
                break
        if tokens >= window:
            points.append((done, loss / trained))
    return points


def validated(steps: Sequence[dict[str, Any]]) -> list[tuple[float, float]]:
    """Return (tokens so far, loss per token of the validation samples) after each validation."""
    done = itertools.accumulate(step["tokens"] for step in steps)
    return [(at, step["validation"]["loss"]) for at, step in zip(done, steps, strict=True) if "validation" in step]


def draw(folder: Path) -> str:
    """Return the charts of both runs, training and validation, with a line where the ranks change."""
    runs = [read_steps(folder / name) for name in NAMES]
    total = sum(step["tokens"] for step in runs[0])
    curves = {"training": [smoothed(steps, total / 12) for steps in runs], "validation": [*map(validated, runs)]}
    charts = []
    for kind, pair in curves.items():
        losses = [loss for curve in pair for _, loss in curve] or [0.0, 1.0]
        low, high = math.floor(min(losses) * 5) / 5, math.ceil(max(losses) * 5) / 5
        chart = Chart(f"{kind} loss", "tokens trained", "loss", (0, total), (low, high))
        for color, (curve, name) in enumerate(zip(pair, NAMES.values(), strict=True)):
            chart.line(curve, color)
            chart.name(name, color)
        for start in read_starts(folder / "elastic", len(runs[1])):
            if start.counts:
                end = sum(step["tokens"] for step in runs[1][: start.last_step])
                chart.boundary(end, f"{start.world_size} rank{'s' if start.world_size > 1 else ''}")
        charts.append(chart)
    for number, name in enumerate(NAMES):
        ends = ", ".join(f"{kind} loss {pair[number][-1][1]:.4f}" for kind, pair in curves.items() if pair[number])
        print(f"{name}: {len(runs[number])} steps, {ends}")
    return side_by_side(charts)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--segments", default="4,2,1,4", help="ranks of each segment of the second run [4,2,1,4]")
    parser.add_argument("--folder", type=Path, default=Path("outputs/elastic"), help="of both runs [outputs/elastic]")
    parser.add_argument("--svg", type=Path, default=Path("elastic.svg"), help="file of the chart [elastic.svg]")
    options, overrides = parser.parse_known_args(argv)
    ranks = [int(word) for word in options.segments.split(",") if word.isdecimal() and int(word)]
    if len(ranks) != len(options.segments.split(",")):
        raise ValueError(f"--segments {options.segments}: must be numbers of ranks, comma-separated")
    whole, elastic = options.folder / "whole", options.folder / "elastic"
    if not whole.exists():
        train(overrides, whole, ranks[0], math.inf)
    total = sum(step["tokens"] for step in read_steps(whole))
    if not elastic.exists():
        for number, segment_ranks in enumerate(ranks, start=1):
            last = number == len(ranks)
            train(overrides, elastic, segment_ranks, math.inf if last else total * number / len(ranks))
    options.svg.write_text(draw(options.folder), encoding="utf-8")
    print(f"wrote {options.svg}")


if __name__ == "__main__":
    raise SystemExit(exit_on_user_error(main))
