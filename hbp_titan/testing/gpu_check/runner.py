"""GPU check: steps in separate processes with time limits, and their report.

    python scripts/gpu_check.py --out gpu_check                      one GPU or more, at most 8 minutes
    python scripts/gpu_check.py --device cpu --tiny --out gpu_check  the same steps on a CPU with tiny shapes

Prints each step when it ends and writes report.md, report.json and the output of each step (NAME.log) into the folder,
again after every step, so that an interrupted check leaves its results. A step that fails, crashes or exceeds its limit
is FAIL and the others run: a CUDA error cannot spread over processes. A step without remaining time, or that does not
apply to this machine, is SKIP with its reason. The exit code is 1 if any step is FAIL.

No network is used. Missing packages come from a folder of wheels, filled by scripts/fill_wheels.sh on another machine:

    scripts/fill_wheels.sh wheels 3.12                               torchdata, for Python 3.12 on Linux x86-64
    pip install --no-index --no-deps --target site wheels/*.whl      on the machine with the GPU
    PYTHONPATH=.:site python scripts/gpu_check.py --out gpu_check
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hbp_titan.experiments.soak import kill_tree
from hbp_titan.utils import atomic_write

ROOT = Path(__file__).resolve().parents[3]
MIN_STEP_SECONDS = 5.0
"""A step is not started with less time left."""


@dataclass(frozen=True)
class Settings:
    """Input of a step.

    tiny: use shapes that a CPU runs in a second. folder: of the report; steps write into it. seconds: the time limit,
    by which a step with many measurements plans.
    """

    device_type: str
    tiny: bool
    folder: Path
    seconds: float


@dataclass
class Table:
    """A table of the report; all cells are text."""

    title: str
    columns: list[str]
    rows: list[list[str]]


@dataclass
class Found:
    """Result of a step's function.

    summary: one line. details: for report.json. problems: any makes the step FAIL. skipped: the reason, makes it SKIP.
    """

    summary: str = ""
    tables: list[Table] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    skipped: str = ""

    @property
    def verdict(self) -> str:
        """PASS, FAIL or SKIP."""
        return "FAIL" if self.problems else "SKIP" if self.skipped else "PASS"


@dataclass(frozen=True)
class Step:
    """One step.

    function: "module:name" below hbp_titan.testing.gpu_check, imported only in the step's own process. phase: 1 looks
    for errors and may run concurrently; 2 measures and on a GPU has the machine to itself; 3 reads measurements.
    """

    name: str
    title: str
    function: str
    limit_seconds: float
    phase: int = 1


# By importance within each phase: the least important steps are skipped when time runs out.
STEPS = (
    Step("environment", "Environment", "machine:environment", 60),
    Step("blocks", "Compiled blocks against an fp32 reference", "blocks:compiled_blocks", 150),
    Step("run", "A run with save, kill, resume and export", "machine:training_run", 180),
    Step("equivalence", "Equivalence with one fp32 process", "machine:equivalence", 120),
    Step("synchronizations", "Synchronizations of a step", "blocks:synchronizations", 90),
    Step("deterministic", "Deterministic mode, twice", "blocks:deterministic", 90),
    Step("gpu_tests", "pytest -m gpu", "machine:gpu_tests", 180),
    Step("varlen", "Attention by the arguments of its calls", "speed:varlen", 45, 2),
    Step("throughput", "Tokens/s, MFU and peak memory", "speed:throughput", 170, 2),
    Step("float8", "FP8 products against bf16", "float8:float8", 120, 2),
    Step("transformers", "Side by side with transformers", "speed:side_by_side", 90, 2),
    Step("kernels", "Liger's kernels next to compiled ones", "kernels:fused_kernels", 60, 2),
    Step("estimates", "Measured against estimated memory and time", "speed:estimates", 45, 3),
)


@dataclass
class Result:
    """One step of the report."""

    step: Step
    found: Found
    seconds: float


def run_step(step: Step, settings: Settings, fails: bool = False) -> Result:
    """Run one step in a separate process; a crash or a timeout becomes a Found with that problem."""
    log, out = settings.folder / f"{step.name}.log", settings.folder / f"{step.name}.json"
    # A crash must not leave an earlier check's result in place.
    out.unlink(missing_ok=True)
    words = ["--step", step.name, "--json", str(out), "--device", settings.device_type, "--out", str(settings.folder)]
    words += ["--seconds", str(settings.seconds), *["--tiny"] * settings.tiny, *["--fail", step.name] * fails]
    started = time.monotonic()
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "hbp_titan.testing.gpu_check", *words],
            cwd=ROOT,
            env=step_environment(settings.device_type),
            stdout=output,
            stderr=subprocess.STDOUT,
            # A separate process group, so that the step's own processes can be ended with it.
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(settings.seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end_group(process)
    seconds = time.monotonic() - started
    if code == 0 and out.exists():
        return Result(step, _found_of(json.loads(out.read_text(encoding="utf-8"))), seconds)
    return Result(step, Found(problems=[_reason(code, settings.seconds, log)]), seconds)


def step_environment(device_type: str) -> dict[str, str]:
    """Return the environment of a step: this code on the path, and run_train.sh's allocator settings."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    defaults = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    if device_type == "cpu":
        # Steps share the cores, and GPUs are hidden.
        defaults["OMP_NUM_THREADS"] = "1"
        return {**defaults, **os.environ, "PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": ""}
    return {**defaults, **os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def parallel_steps(phase: int, device_type: str) -> int:
    """Return how many steps of a phase run concurrently; imports and compilation need cores more than the GPU."""
    cores = os.cpu_count() or 1
    if device_type == "cpu":
        return min(2, cores)
    return max(1, min(3, cores // 4)) if phase == 1 else 1


def end_group(process: subprocess.Popen[Any]) -> None:
    """Kill the process and everything that it started, and wait for it."""
    # torchrun starts each rank in its own session, which a signal to the group does not reach.
    kill_tree(process.pid)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _reason(code: int | None, limit: float, log: Path) -> str:
    """Return why a step left no result."""
    if code is None:
        return f"ran longer than its limit of {limit:.3g} s (see {log.name})"
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    ended = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return f"{lines[-1][:300] if lines else 'no output'} ({ended}, see {log.name})"


def _found_of(values: dict[str, Any]) -> Found:
    return Found(**{**values, "tables": [Table(**table) for table in values["tables"]]})


def _print(line: str) -> None:
    print(line, flush=True)


def run_steps(
    steps: Sequence[Step], settings: Settings, minutes: float, failing: str = "", say: Callable[[str], None] = _print
) -> list[Result]:
    """Run the steps phase by phase within `minutes`, write the report after each, and return results in order.

    settings.seconds is ignored. failing: name of a step that is made to fail.
    """
    deadline = time.monotonic() + 60 * minutes
    results: dict[str, Result] = {}
    lock = threading.Lock()

    def work(step: Step) -> None:
        left = deadline - time.monotonic()
        if left < MIN_STEP_SECONDS:
            result = Result(step, Found(skipped=f"no time left in {minutes:g} minutes"), 0.0)
        else:
            # A step plans its measurements by this time, so it gets no more than is left of the whole check.
            limit = min(step.limit_seconds, left)
            result = run_step(step, dataclasses.replace(settings, seconds=limit), step.name == failing)
        # Steps of a phase run concurrently and write one report.
        with lock:
            results[step.name] = result
            say(f"{result.found.verdict:4}  {result.seconds:6.1f} s  {step.name}: {_words(result.found)}")
            write_report([results[s.name] for s in steps if s.name in results], settings)

    for phase in sorted({step.phase for step in steps}):
        with ThreadPoolExecutor(parallel_steps(phase, settings.device_type)) as pool:
            # list() raises exceptions of the threads here.
            list(pool.map(work, [step for step in steps if step.phase == phase]))
    return [results[step.name] for step in steps]


def _words(found: Found) -> str:
    return "; ".join([*found.problems, found.skipped, found.summary][: len(found.problems) + 2]).strip("; ")


def write_report(results: Sequence[Result], settings: Settings) -> None:
    """Write report.json and report.md of the steps that have ended."""
    steps = [
        {
            "name": result.step.name,
            "title": result.step.title,
            "verdict": result.found.verdict,
            "seconds": round(result.seconds, 1),
            **dataclasses.asdict(result.found),
        }
        for result in results
    ]
    values = {"device": settings.device_type, "tiny": settings.tiny, "steps": steps}
    atomic_write(settings.folder / "report.json", json.dumps(values, indent=1) + "\n")
    atomic_write(settings.folder / "report.md", markdown(results))


def markdown(results: Sequence[Result]) -> str:
    """Return the report as Markdown: one row per step, then the tables of each."""
    rows = [
        [result.step.title, result.found.verdict, f"{result.seconds:.1f}", _words(result.found)] for result in results
    ]
    parts = ["# GPU check", "", *_table(["step", "verdict", "seconds", "found"], rows)]
    for result in results:
        for table in result.found.tables:
            parts += ["", f"## {result.step.title}: {table.title}", "", *_table(table.columns, table.rows)]
    return "\n".join(parts) + "\n"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"

    return [line(columns), "|" + "---|" * len(columns), *(line(row) for row in rows)]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the check, or one step of it, from the command line; return the exit code."""
    options = parse(argv)
    settings = Settings(options.device, options.tiny, options.out.absolute(), options.seconds)
    settings.folder.mkdir(parents=True, exist_ok=True)
    if options.step:
        return _run_here(_named(options.step), settings, options.json, options.fail == options.step)
    steps = [_named(name) for name in options.steps.split(",")] if options.steps else list(STEPS)
    results = run_steps(steps, settings, options.minutes, options.fail)
    failed = [result.step.name for result in results if result.found.verdict == "FAIL"]
    print(f"{settings.folder / 'report.md'}: " + (f"{', '.join(failed)} failed" if failed else "no step failed"))
    return int(bool(failed))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the parsed command line; raise ValueError for an unknown step."""
    parser = argparse.ArgumentParser(
        prog="gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, default=Path("gpu_check"), help="folder of the report [gpu_check]")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="[cuda]")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, for a CPU or to test the check itself")
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="limit of the whole check; other steps are skipped [8]"
    )
    parser.add_argument("--steps", default="", help=f"only these, by commas [{','.join(s.name for s in STEPS)}]")
    parser.add_argument("--fail", default="", metavar="STEP", help="make this step fail, to test the report")
    parser.add_argument("--step", default="", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=600.0, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    for name in filter(None, [*options.steps.split(","), options.fail, options.step]):
        _named(name)
    return options


def _named(name: str) -> Step:
    for step in STEPS:
        if step.name == name:
            return step
    raise ValueError(f"step {name!r} must be one of {', '.join(step.name for step in STEPS)}")


def _run_here(step: Step, settings: Settings, out: Path, fails: bool) -> int:
    """Run one step in this process and write its result; exceptions end the process."""
    if fails:
        # Before the imports, so that it fails at once.
        raise RuntimeError(f"{step.name} was made to fail (--fail)")
    module, _, name = step.function.partition(":")
    found: Found = getattr(importlib.import_module(f"hbp_titan.testing.gpu_check.{module}"), name)(settings)
    atomic_write(out, json.dumps(dataclasses.asdict(found)) + "\n")
    return 0
