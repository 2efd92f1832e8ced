"""Steps of the GPU check on the machine and whole commands: environment, equivalence, a training run, the GPU tests.

Owns the facts about the machine that all figures of the report depend on, and the steps that run what users run.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from hbp_titan.components.resume import code_version
from hbp_titan.components.step_stats import peak_flops
from hbp_titan.config import JobConfig
from hbp_titan.data.tokenizer import train_tokenizer
from hbp_titan.experiments.bench_train import RandomSamples
from hbp_titan.models.attention import choose_backend, missing
from hbp_titan.models.configs import ModelArgs
from hbp_titan.models.hf_config import args_to_hf_config
from hbp_titan.models.registry import get_flavor
from hbp_titan.packing import Level
from hbp_titan.testing.equivalence import verify
from hbp_titan.testing.equivalence_cases import Samples, build_cases
from hbp_titan.testing.gpu_check.runner import ROOT, Found, Settings, Table, end_group
from hbp_titan.testing.machine_checks import nvidia_smi
from hbp_titan.tuning.hardware import hardware_of

PACKAGES = ("torch", "triton", "transformers", "torchdata", "numpy", "safetensors", "tokenizers", "pytest")


def environment(settings: Settings) -> Found:
    """Report versions, device, memory, clocks and installed attention kernels."""
    rows = [["python", platform.python_version()], ["code", _commit()]]
    rows += [[name, _version(name)] for name in PACKAGES]
    problems = []
    if settings.device_type == "cuda":
        if not torch.cuda.is_available():
            reason = "torch is built without CUDA" if torch.version.cuda is None else "no usable device or driver"
            return Found(problems=[f"torch.cuda.is_available() is False: {reason}"], tables=[_facts(rows)])
        rows += _gpu_rows()
        summary = f"{torch.cuda.get_device_name(0)} x {torch.cuda.device_count()}, torch {torch.__version__}"
        if shutil.which("gcc") is None and shutil.which("cc") is None:
            problems.append("no C compiler, which triton needs to build its launchers; install gcc")
    else:
        pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        rows += [["device", f"{platform.machine()} CPU, {os.cpu_count()} cores, {pages / 2**30:.0f} GiB"]]
        summary = f"CPU, torch {torch.__version__}"
    backend = choose_backend("auto", torch.device(settings.device_type), head_dim=128)
    rows += [[f"kernel {name}", missing(name) or "installed"] for name in ("fa2", "fa3", "fa4")]
    rows += [["kernel selected by auto", backend]]
    return Found(f"{summary}, attention {backend}", [_facts(rows)], dict(rows), problems)


def _commit() -> str:
    version = code_version(ROOT)
    return ", ".join(f"{key} {value}" for key, value in version.items()) if version else "not a checkout"


def _facts(rows: list[list[str]]) -> Table:
    return Table("versions and device", ["what", "value"], rows)


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _gpu_rows() -> list[list[str]]:
    free, total = torch.cuda.mem_get_info(0)
    peak, hardware = peak_flops(torch.device("cuda", 0)), hardware_of(torch.device("cuda", 0))
    capability = ".".join(map(str, torch.cuda.get_device_capability(0)))
    rows = [
        ["GPU", f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}, SM {capability}"],
        ["memory", f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"],
        ["CUDA of torch", str(torch.version.cuda)],
        ["NCCL", ".".join(map(str, torch.cuda.nccl.version()))],
        ["peak for MFU", f"{peak / 1e12:.0f} TFLOP/s" if peak else "unknown, no MFU"],
        ["hardware table", hardware.name if hardware else "unknown, no comparison of times"],
        ["C compiler", shutil.which("gcc") or shutil.which("cc") or "none"],
    ]
    query = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "persistence_mode")
    return [*rows, *([name, value] for name, value in zip(query, _nvidia_smi(query), strict=True))]


def _nvidia_smi(query: tuple[str, ...]) -> list[str]:
    try:
        return nvidia_smi(query, "--id=0")[0]
    except (OSError, subprocess.SubprocessError) as error:
        return [f"unknown ({type(error).__name__})"] * len(query)


def gpu_tests(settings: Settings) -> Found:
    """Run `pytest -m gpu` on the files that have such tests."""
    if settings.device_type != "cuda":
        return Found(skipped="tests marked gpu need a GPU")
    folder = ROOT / "tests"
    if not folder.is_dir() or importlib.util.find_spec("pytest") is None:
        return Found(skipped="needs a checkout with tests/, and pytest")
    # Importing every test file would take longer than the tests.
    files = [str(path) for path in sorted(folder.rglob("test_*.py")) if "mark.gpu" in path.read_text(encoding="utf-8")]
    report = settings.folder / "gpu_tests.xml"
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    code = subprocess.run([*command, *files], cwd=ROOT).returncode
    if not report.exists():
        return Found(problems=[f"pytest ended with exit code {code} and no report"])
    return _test_report(report.read_text(encoding="utf-8"), code)


def _test_report(xml: str, code: int) -> Found:
    """Return the result of pytest's junit file, one row per test."""
    # Safe to parse: our own pytest wrote it.
    from xml.etree import ElementTree

    rows, failed = [], []
    for case in ElementTree.fromstring(xml).iter("testcase"):
        name = f"{case.get('classname', '')}::{case.get('name', '')}"
        outcome = next((tag for tag in ("failure", "error", "skipped") if case.find(tag) is not None), "passed")
        rows.append([name, outcome, f"{float(case.get('time', '0')):.1f}"])
        failed += [name] if outcome in ("failure", "error") else []
    passed = sum(row[1] == "passed" for row in rows)
    problems = [f"failed: {name}" for name in failed] or ([f"pytest's exit code is {code}"] if code else [])
    table = Table("tests", ["test", "outcome", "seconds"], rows)
    return Found(f"{passed} of {len(rows)} tests passed", [table], problems=problems)


def equivalence(settings: Settings) -> Found:
    """Run the equivalence check in bfloat16 with controls, on one rank and on all GPUs."""
    on_gpu = settings.device_type == "cuda"
    # On a GPU the head width of real models, so that their kernels run, but few parameters.
    heads = {"head_dim": 128, "num_heads": 8, "num_kv_heads": 2, "hidden_size": 512} if on_gpu else {}
    args = dataclasses.replace(get_flavor("debug"), num_layers=2, **heads)  # type: ignore[arg-type]
    levels = (Level(64), Level(256, 8)) if settings.tiny else (Level(512), Level(4096, 8))
    rng = np.random.default_rng(0)
    longest = levels[-1].max_tokens
    lengths = np.append(np.clip(rng.lognormal(np.log(longest / 16), 1.0, 15).astype(int), 8, longest), longest)
    samples = Samples(RandomSamples(lengths, args.vocab_size, seed=0), range(len(lengths)))
    config = JobConfig()
    # On a CPU inductor takes longer than all cases together, and aot_eager traces the same code.
    config.compile.backend = "inductor" if on_gpu else "aot_eager"
    sizes = sorted({1, torch.cuda.device_count()}) if on_gpu else [1]
    results = [*verify(config, args, build_cases(levels, sizes, args), samples, settings.device_type, "bfloat16")]
    rows, problems = [], []
    for found in results:
        verdict = ("caught" if found.passed else "NOT CAUGHT") if found.control else str(found.passed)
        figures = [f"{x:.1e}" for x in (found.loss_difference, found.grad_difference, found.grad_allowed)]
        rows.append([found.case.name, *figures, verdict.replace("True", "equal").replace("False", "DIFFERS")])
        problems += [] if found.passed else [f"{found.case.name}: {rows[-1][-1]} ({found.worst})"]
    controls = sum(found.control for found in results)
    summary = f"{len(results) - controls} cases and {controls} controls on {sizes[-1]} rank(s), bfloat16 against fp32"
    table = Table("relative differences", ["case", "loss", "gradient", "limit", "verdict"], rows)
    return Found(summary, [table], problems=problems)


@dataclasses.dataclass(frozen=True)
class _Shape:
    """Shape of the training run.

    lengths: max_tokens of the two levels. rows: of the training file. words: median per row, and maximum.
    """

    flavor: str
    layers: int
    lengths: tuple[int, int]
    rows: int
    words: tuple[int, int]


RUN_STEPS = 20
SAVE_EVERY = 8
_WORDS = ["the", "level", "pack", "rank", "token", "length", "short", "long", "cost", "mesh", "head", "loss", "plan"]


def training_run(settings: Settings) -> Found:
    """Train under torchrun on all GPUs: 20 steps over two levels, killed after a save, resumed and exported."""
    deadline = time.monotonic() + settings.seconds - 5
    shape = _Shape("debug", 2, (64, 256), 160, (5, 40))
    if not settings.tiny:
        # Few layers, because a checkpoint with AdamW's state is 6 GB instead of 15.
        shape = _Shape("llama3_2_1b", 4, (4096, 16384), 800, (100, 1200))
    ranks = torch.cuda.device_count() if settings.device_type == "cuda" else 2
    folder = settings.folder / "training_run"
    shutil.rmtree(folder, ignore_errors=True)
    args = get_flavor(shape.flavor).with_layers(shape.layers)
    command = _training_command(folder, args, shape, ranks, settings)
    saved = folder / "run" / "checkpoint" / f"step-{SAVE_EVERY}"

    started = time.monotonic()
    first = _start(command, folder / "first.log")
    try:
        reached = _wait_for(lambda: saved.is_dir() and _steps(folder) > SAVE_EVERY, first, deadline)
    finally:
        # As when a node loses power: no process can clean up.
        end_group(first)
    killed_at, first_seconds = _steps(folder), time.monotonic() - started
    if not reached:
        return Found(problems=[f"no checkpoint of step {SAVE_EVERY}: {_tail(folder / 'first.log')}"])
    started = time.monotonic()
    second = _start(command, folder / "second.log")
    try:
        ended = _wait_for(lambda: second.poll() is not None, second, deadline)
    finally:
        end_group(second)
    if not ended or second.returncode:
        return Found(problems=[f"the resumed run failed: {_tail(folder / 'second.log')}"])
    found = _judge_run(folder, args, killed_at)
    found.tables[0].rows += [
        ["seconds until the kill, from the start", f"{first_seconds:.1f}"],
        ["seconds of the resumed run", f"{time.monotonic() - started:.1f}"],
    ]
    # Many gigabytes that are not needed any more.
    shutil.rmtree(folder / "run" / "checkpoint", ignore_errors=True)
    shutil.rmtree(folder / "run" / "hf", ignore_errors=True)
    return found


def _training_command(folder: Path, args: ModelArgs, shape: _Shape, ranks: int, settings: Settings) -> list[str]:
    """Write rows, tokenizer and model configuration; return the command that trains on them."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    counts = np.clip(rng.lognormal(np.log(shape.words[0] * 2), 1.0, shape.rows).astype(int), 4, shape.words[1])
    # Some samples that only the larger level can hold.
    counts[::20] = int(shape.lengths[1] * 0.4)
    texts = [" ".join(rng.choice(_WORDS, size=count)) for count in counts]
    rows = [{"messages": [{"role": "user", "content": "go on"}, {"role": "assistant", "content": t}]} for t in texts]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    train_tokenizer(texts, folder / "model", vocab_size=320)
    (folder / "model" / "config.json").write_text(json.dumps(args_to_hf_config(args)), encoding="utf-8")
    low, high = shape.lengths
    on_gpu = settings.device_type == "cuda"
    keys = {
        "model.hf_path": folder / "model",
        "checkpoint.initial_load_path": "none",
        "data.train_files": folder / "train.jsonl",
        "data.cache_folder": folder / "cache",
        "job.dump_folder": folder / "run",
        "levels": ",".join(
            f"{length}:{degree}:ulysses:keep_attention"
            # Powers of two divide the heads of these models.
            for length, degree in ((low, 1), (high, min(ranks, 8) if ranks & (ranks - 1) == 0 else 1))
        ),
        "compile.enable": str(on_gpu).lower(),
        "training.steps": RUN_STEPS,
        "optimizer.lr": 1e-3,
        "checkpoint.interval": SAVE_EVERY,
        "checkpoint.keep_latest_k": 1,
        "packing.print_comparison": "false",
        "metrics.progress_bar": "false",
        "metrics.enable_tensorboard": "false",
    }
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [*launcher, "-m", "hbp_titan.train", *(f"--{key}={value}" for key, value in keys.items())]


def _start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as output:
        return subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)


def _wait_for(done: Any, process: subprocess.Popen[bytes], deadline: float) -> bool:
    """Return whether `done()` became true before the process ended or the deadline passed."""
    while time.monotonic() < deadline:
        if done():
            return True
        if process.poll() is not None:
            # It may have become true just before the process ended.
            return bool(done())
        time.sleep(0.02)
    return False


def _metrics(folder: Path) -> list[dict[str, Any]]:
    path = folder / "run" / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    # A killed run may leave half a line.
    return [json.loads(line) for line in lines if line.endswith("}")]


def _steps(folder: Path) -> int:
    return max((row["step"] for row in _metrics(folder)), default=0)


def _tail(log: Path) -> str:
    return " / ".join(log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:])[-600:]


def _judge_run(folder: Path, args: ModelArgs, killed_at: int) -> Found:
    """Return the result of the whole run from metrics.jsonl and the exported folder."""
    rows = {row["step"]: row for row in _metrics(folder) if "loss" in row}
    losses = [float(rows[step]["loss"]) for step in sorted(rows)]
    levels = sorted({str(row["level"]) for row in rows.values()})
    resumed = "resumed" in (folder / "second.log").read_text(encoding="utf-8", errors="replace")
    with safe_open(next((folder / "run" / "hf").glob("*.safetensors")), framework="pt") as weights:
        # The smallest tensor, and its initial values are ones.
        norm = weights.get_tensor("model.norm.weight")
    problems = [
        message
        for message, wrong in (
            (f"steps {sorted(rows)} instead of 1 to {RUN_STEPS}", sorted(rows) != list(range(1, RUN_STEPS + 1))),
            (f"only level {levels} was trained", len(levels) < 2),
            (f"losses {losses} are not finite", not np.isfinite(losses).all()),
            (f"the loss did not fall: {losses[:1]} to {losses[-1:]}", losses[-1] >= losses[0]),
            ("the second start did not resume", not resumed),
            ("the exported norm is wrong", norm.shape != (args.hidden_size,) or not bool(norm.isfinite().all())),
            ("the exported weights are the initial ones", bool((norm == 1).all())),
        )
        if wrong
    ]
    facts = [
        ["model", f"{args.name}, {args.num_layers} layers"],
        ["killed at step", f"{killed_at}, saved at {SAVE_EVERY}"],
        ["loss, first and last step", f"{losses[0]:.3f}, {losses[-1]:.3f}"],
        ["tokens/s of the last steps", ", ".join(f"{rows[s]['tokens_per_second']:,.0f}" for s in sorted(rows)[-3:])],
    ]
    summary = f"{len(rows)} steps on {len(levels)} levels, killed at {killed_at}, resumed from {SAVE_EVERY}, exported"
    return Found(summary, [Table("run", ["what", "value"], facts)], {"losses": losses}, problems)
