"""Train a configuration twice, without a break and on 4, 2, 1 and 4 ranks in turn, and draw both losses.

    python scripts/plot_elastic.py --job.config_file train_configs/debug_model.toml --svg docs/elastic.svg
    python scripts/plot_elastic.py --job.config_file X.toml --stretches 8,4,8 --folder outputs/elastic

The second run is killed (SIGTERM) when each stretch has trained its share of the run's tokens, and goes on from its
newest checkpoint on the ranks of the next one; what it trained after that checkpoint is trained again. Levels whose
cp_degree does not divide the ranks get the largest that does. Run folders are FOLDER/whole and FOLDER/elastic; runs
that are there are drawn, not trained. Every key of the configuration can be given too: data.max_samples shortens it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hbp_titan.cli import guarded
from hbp_titan.config import load_config
from hbp_titan.data.consumed import read_attempts
from hbp_titan.packing.svg import HEIGHT, WIDTH, Chart

_STYLE = (
    "<style>svg{--ink:#1c2430;--grid:#e3e7ed;--c0:#2f6fb7;--c1:#e08a2e;"
    "font:11px system-ui,sans-serif;fill:var(--ink)}.title{font-weight:600;font-size:13px}</style>"
)


def read_steps(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl; none where there is no such file."""
    path = folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def command(overrides: Sequence[str], folder: Path, ranks: int) -> list[str]:
    """What starts a run on so many ranks of this machine."""
    config = load_config(overrides)
    fitted = [dataclasses.replace(level, cp_degree=math.gcd(level.cp_degree, ranks)) for level in config.levels]
    levels = ",".join(":".join(str(v) for v in dataclasses.astuple(level) if v is not None) for level in fitted)
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--rdzv-backend=c10d"]
    train = ["--rdzv-endpoint=localhost:0", "-m", "hbp_titan.train", *overrides]
    return [*launcher, *train, f"--levels={levels}", f"--job.dump_folder={folder}"]


def train(overrides: Sequence[str], folder: Path, ranks: int, until_tokens: float) -> None:
    """Train until so many tokens of the run are trained, or to its end; RuntimeError where it fails."""
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
    """(tokens so far, mean loss per trained token over the last `window` tokens) after each step."""
    points = []
    done = 0.0
    for index, step in enumerate(steps):
        done += step["tokens"]
        loss = trained = tokens = 0.0
        for earlier in reversed(steps[: index + 1]):
            loss += earlier["loss"] * earlier["trained_tokens"]
            trained += earlier["trained_tokens"]
            tokens += earlier["tokens"]
            if tokens >= window:
                break
        if tokens >= window:
            points.append((done, loss / trained))
    return points


def draw(folder: Path) -> str:
    """The chart of the two runs in `folder`, and a line a run on the console."""
    runs = {name: read_steps(folder / name) for name in ("whole", "elastic")}
    total = sum(step["tokens"] for step in runs["whole"])
    curves = {name: smoothed(steps, total / 25) for name, steps in runs.items()}
    losses = [loss for curve in curves.values() for _, loss in curve]
    low, high = math.floor(min(losses) * 10) / 10, math.ceil(max(losses) * 10) / 10
    chart = Chart("loss over the last 4% of the tokens", "tokens trained", "loss", (0, total), (low, high))
    names = ("without a break", "stopped and gone on")
    for color, (curve, name) in enumerate(zip(curves.values(), names, strict=True)):
        chart.line(curve, color)
        chart.name(name, color)
    steps = runs["elastic"]
    attempts = [a for a in read_attempts(folder / "elastic", len(steps)) if a.first_step <= a.last_step]
    for attempt in attempts:
        end = sum(step["tokens"] for step in steps[: attempt.last_step])
        chart.border(end, f"{attempt.world_size} rank{'s' if attempt.world_size > 1 else ''}")
    for name, steps in runs.items():
        validation = [step["validation"]["loss"] for step in steps if "validation" in step]
        last = f", validation {validation[-1]:.4f}" if validation else ""
        print(f"{name}: {len(steps)} steps, loss at the end {curves[name][-1][1]:.4f}{last}")
    chart_svg = chart.svg().replace("<svg ", f'<svg width="{WIDTH}" height="{HEIGHT}" ', 1)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}">'
        f'{_STYLE}<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>{chart_svg}</svg>\n'
    )


def main(argv: list[str]) -> None:
    """Train what is not there, then draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--stretches", default="4,2,1,4", help="ranks of each stretch of the second run [4,2,1,4]")
    parser.add_argument("--folder", type=Path, default=Path("outputs/elastic"), help="of both runs [outputs/elastic]")
    parser.add_argument("--svg", type=Path, default=Path("elastic.svg"), help="where the chart goes [elastic.svg]")
    options, overrides = parser.parse_known_args(argv)
    ranks = [int(word) for word in options.stretches.split(",") if word.isdecimal() and int(word)]
    if len(ranks) != len(options.stretches.split(",")):
        raise ValueError(f"--stretches {options.stretches}: not numbers of ranks, parted by commas")
    whole, elastic = options.folder / "whole", options.folder / "elastic"
    if not whole.exists():
        train(overrides, whole, ranks[0], math.inf)
    total = sum(step["tokens"] for step in read_steps(whole))
    if not elastic.exists():
        for number, of_stretch in enumerate(ranks, start=1):
            last = number == len(ranks)
            train(overrides, elastic, of_stretch, math.inf if last else total * number / len(ranks))
    options.svg.write_text(draw(options.folder), encoding="utf-8")
    print(f"wrote {options.svg}")


if __name__ == "__main__":
    guarded(lambda: main(sys.argv[1:]))
