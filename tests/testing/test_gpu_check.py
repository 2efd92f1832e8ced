"""The GPU check on a CPU with tiny shapes: its steps, time limits and report."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import time
import warnings
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from hbp_titan.distributed.world import World
from hbp_titan.models.registry import get_flavor
from hbp_titan.packing import Level
from hbp_titan.testing.gpu_check import blocks, float8, kernels, machine, runner, speed
from hbp_titan.testing.gpu_check.runner import STEPS, Found, Settings, Step, Table
from hbp_titan.tuning.hardware import HARDWARE
from tests.programs import run_python

ROOT = Path(__file__).resolve().parents[2]


def _check(out: Path, *words: str) -> tuple[int, dict[str, dict], str]:
    """Run the command on a CPU; return exit code, steps of report.json by name, report.md."""
    words = ("scripts/gpu_check.py", "--device", "cpu", "--tiny", "--out", str(out), *words)
    result = run_python(*words, timeout=600)
    steps = json.loads((out / "report.json").read_text())["steps"]
    printed = [line.split()[3].rstrip(":") for line in result.stdout.splitlines()[:-1]]
    assert sorted(printed) == sorted(step["name"] for step in steps)
    return result.returncode, {step["name"]: step for step in steps}, (out / "report.md").read_text()


@pytest.mark.slow
def test_a_failing_step_is_reported_and_the_others_run(tmp_path: Path) -> None:
    code, steps, report = _check(tmp_path, "--steps=environment,synchronizations,gpu_tests", "--fail=synchronizations")
    assert code == 1
    assert [step["verdict"] for step in steps.values()] == ["PASS", "FAIL", "SKIP"]
    assert "made to fail" in steps["synchronizations"]["problems"][0]
    assert "need a GPU" in steps["gpu_tests"]["skipped"]
    assert f"torch {torch.__version__}" in steps["environment"]["summary"]
    assert report.count("| FAIL |") == report.count("| SKIP |") == report.count("| PASS |") == 1


def _step(name: str, folder: Path) -> Found:
    """Return the result of one step in a separate process."""
    out = folder / f"{name}.json"
    words = ["--device=cpu", "--tiny", f"--out={folder}", f"--step={name}", f"--json={out}"]
    result = run_python("-m", "hbp_titan.testing.gpu_check", *words, env=runner.step_environment("cpu"))
    assert result.returncode == 0, result.stderr
    values = json.loads(out.read_text())
    return Found(**{**values, "tables": [Table(**table) for table in values["tables"]]})


def test_compiled_blocks_equal_the_reference_under_every_policy(tmp_path: Path) -> None:
    found = _step("blocks", tmp_path)
    assert found.verdict == "PASS", found.problems
    assert [row[:2] for row in found.tables[0].rows[:3]] == [["cpu", p] for p in ("none", "full", "keep_attention")]
    # Before and after attention, and after it without the last product; each with and without gradients.
    assert found.details["graphs"] == 6


def test_attention_is_equal_for_all_forms_of_arguments(tmp_path: Path) -> None:
    found = _step("varlen", tmp_path)
    assert found.verdict == "PASS", found.problems
    rows = {row[1]: row for row in found.tables[0].rows}
    assert int(rows["capacity"][3]) > 5 * int(rows["grouped"][3])


def test_steps_are_deterministic(tmp_path: Path) -> None:
    assert "only with a GPU" in _step("synchronizations", tmp_path).skipped
    found = _step("deterministic", tmp_path)
    assert found.verdict == "PASS", found.problems


class _Liger(torch.autograd.Function):
    """One of Liger's functions, as the step calls it; the loss has a wrong gradient."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        tensors = [x for x in inputs if isinstance(x, torch.Tensor)]
        with torch.enable_grad():
            ctx.inputs = [x.detach().requires_grad_(x.is_floating_point()) for x in tensors]
            outputs, ctx.factor = _liger(inputs, ctx.inputs)
        ctx.outputs, ctx.number = outputs, len(inputs)
        return tuple(x.detach() for x in outputs) if len(outputs) > 1 else outputs[0].detach()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        found = torch.autograd.grad(ctx.outputs, ctx.inputs[:2], grads[: len(ctx.outputs)])
        return (*(ctx.factor * x for x in found), *[None] * (ctx.number - 2))


def _liger(inputs: Any, x: list[torch.Tensor]) -> tuple[list[torch.Tensor], float]:
    if len(inputs) == 2:
        return [F.silu(x[0]) * x[1]], 1.0
    if len(inputs) == 4:
        halves = [torch.cat((-b, a), -1) for a, b in (part.chunk(2, -1) for part in x[:2])]
        return [part * x[2][:, None] + half * x[3][:, None] for part, half in zip(x[:2], halves, strict=True)], 1.0
    if len(inputs) == 6:
        return [F.rms_norm(x[0], x[1].shape, x[1], inputs[2])], 1.0
    loss = F.cross_entropy(x[0] @ x[1].T, x[2], reduction=inputs[8])
    return [loss, loss.detach().clone().requires_grad_()], 1.1


def test_ligers_kernels_are_compared_where_they_are_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings("cpu", True, tmp_path, 60)
    found = kernels.fused_kernels(settings)
    assert found.verdict == "PASS"
    assert "not installed" in found.summary
    package = ModuleType("liger_kernel")
    package.__spec__ = ModuleSpec("liger_kernel", None)
    names = ("RMSNorm", "Rope", "SiLUMul", "FusedLinearCrossEntropy")
    package.ops = SimpleNamespace(**{f"Liger{name}Function": _Liger for name in names})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", package.ops)
    found = kernels.fused_kernels(settings)
    (problem,) = found.problems
    assert problem.startswith("linear cross entropy")
    assert all(row[4] != "-" for row in found.tables[0].rows)


@pytest.mark.slow
def test_every_step_passes_or_has_a_reason_to_be_skipped(tmp_path: Path) -> None:
    code, steps, report = _check(tmp_path)
    assert {name: step["problems"] for name, step in steps.items() if step["problems"]} == {}
    assert code == 0
    skipped = {name for name, step in steps.items() if step["verdict"] == "SKIP"}
    assert skipped == {"synchronizations", "gpu_tests"}
    assert all(steps[name]["skipped"] for name in skipped)
    assert [*steps] == [step.name for step in STEPS]
    assert all(step.title in report for step in STEPS)
    controls = [row for row in steps["equivalence"]["tables"][0]["rows"] if row[0].startswith("CONTROL")]
    assert [row[-1] for row in controls] == ["caught"] * 4
    assert len(steps["run"]["details"]["losses"]) == machine.RUN_STEPS
    names = [row[0] for row in steps["transformers"]["tables"][0]["rows"]]
    assert sum(name.startswith("transformers") for name in names) == 2


def test_time_limits_and_crashes_are_failures(tmp_path: Path) -> None:
    settings = Settings("cpu", True, tmp_path, 600)
    quick = Step("environment", "Environment", "machine:environment", 0.2)
    started = time.monotonic()
    (found,) = runner.run_steps([quick], settings, minutes=1)
    assert "limit of 0.2 s" in found.found.problems[0]
    assert time.monotonic() - started < 20
    (found,) = runner.run_steps([STEPS[0]], settings, minutes=0.01)
    assert "no time left" in found.found.skipped
    log = tmp_path / "log"
    log.write_text("first\nCUDA error: an illegal memory access\n\n")
    assert runner._reason(-signal.SIGSEGV, 5, log).startswith("CUDA error: an illegal memory access (killed by SIGSEGV")


def test_step_beyond_its_limit_leaves_no_process(tmp_path: Path) -> None:
    code = (
        "import os, subprocess, sys; print(subprocess.Popen(['sleep', '99'], start_new_session=True).pid, flush=True)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", f"{code}; __import__('time').sleep(99)"], stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    child = int(process.stdout.readline())
    runner.end_group(process)
    for _ in range(200):
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            break
        time.sleep(0.01)
    else:
        pytest.fail("the grandchild is alive")


def test_unknown_step() -> None:
    with pytest.raises(ValueError, match="speed"):
        runner.parse(["--steps", "environment,speed"])


def test_layers_are_limited_by_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "hardware_of", lambda device: HARDWARE["h100-80gb"])
    settings = Settings("cuda", False, Path(), 600)
    world = World(0, 1, torch.device("cuda"))
    assert speed.fitting_layers("llama3_2_1b", settings, world) == 16
    layers = speed.fitting_layers("llama3_1_8b", settings, world)
    assert 4 <= layers < 32
    args = dataclasses.replace(get_flavor("llama3_1_8b"), num_layers=layers)
    assert speed.estimated_peak(args, Level(131072, ac_policy="keep_attention"), settings) < 75 * 2**30


def test_synchronizations_are_recorded_with_our_line(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with blocks._recorded_synchronizations() as places:
        warnings.warn("called a synchronizing CUDA operation", UserWarning)
        warnings.warn("something else", UserWarning)
    assert modes == ["warn", "default"]
    (place,) = places
    assert place.startswith(f"{Path(__file__).relative_to(ROOT)}:")


def test_pytest_report_lists_failures() -> None:
    xml = (
        '<testsuites><testsuite><testcase classname="a" name="x" time="1.5"/>'
        '<testcase classname="a" name="y" time="0.5"><failure message="m"/></testcase></testsuite></testsuites>'
    )
    found = machine._test_report(xml, 1)
    assert found.problems == ["failed: a::y"]
    assert found.summary == "1 of 2 tests passed"
    assert machine._test_report(xml.replace('<failure message="m"/>', ""), 0).verdict == "PASS"


@pytest.mark.parametrize(
    ("losses", "norm", "seconds", "word"),
    [
        ([4.01, 3.99], 1.1, 0.7, ""),
        ([4.0, 4.0], 1.0, 0.7, "bit for bit"),
        ([4.01, float("nan")], 1.0, 0.7, "losses"),
        ([4.01, 3.99], 1.3, 0.7, "norm"),
        ([4.01, 3.99], 1.0, 1.1, "1.10 times"),
    ],
)
def test_float8_is_compared_with_bf16(
    tmp_path: Path, losses: list[float], norm: float, seconds: float, word: str
) -> None:
    plain, run = float8._Run([4.0, 4.0], [1.0], [1.0], 6), float8._Run(losses, [norm], [seconds], 9)
    problems = float8._problems(run, plain, "tensorwise", Settings("cuda", False, tmp_path, 60))
    assert len(problems) == bool(word)
    assert word in "".join(problems)


@pytest.mark.slow
def test_float8_step_trains_with_every_recipe(tmp_path: Path) -> None:
    found = _step("float8", tmp_path)
    assert found.verdict == "PASS", found.problems
    assert [row[0] for row in found.tables[0].rows] == [*float8.RECIPES]
