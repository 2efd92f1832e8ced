"""bfloat16 parameters in forward and backward; fp32 parameters, gradients and optimizer state; and the GPU run."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hbp_titan.config import load_config
from hbp_titan.distributed.world import World
from hbp_titan.testing.local_ranks import run_distributed
from hbp_titan.train import Trainer
from tests.models.deepseek_tiny import tiny_args
from tests.runs import ROOT, read_metrics
from tests.tiny_run import ARGS, VOCAB_SIZE, write_tiny_run


def _losses(folder: Path) -> list[float]:
    return [step["loss"] for step in read_metrics(folder)]


def _dtypes_each(world: World, runs: list[list[str]]) -> list[tuple[set[str], set[str]]]:
    """Return, per run, the dtypes of the first block's output and those of parameters and optimizer state."""
    found = []
    for argv in runs:
        computed: set[str] = set()
        trainer = Trainer(load_config(argv), world)
        trainer.model.layers[0].register_forward_hook(
            lambda module, inputs, output, computed=computed: computed.add(str(output.dtype))
        )
        trainer.train()
        stored = {str(p.dtype) for p in trainer.model.parameters()}
        for state in trainer.optimizer.state.values():
            stored |= {str(value.dtype) for key, value in state.items() if key != "step"}
        found.append((computed, stored))
    return found


def test_bfloat16_compute_keeps_fp32_state_and_follows_the_fp32_run(tmp_path: Path) -> None:
    argv = write_tiny_run(tmp_path, num_rows=30, saves=False)
    names = ("float32", "bfloat16")
    runs = [[*argv, f"--training.mixed_precision_param={n}", f"--job.dump_folder={tmp_path / n}"] for n in names]
    dtypes = run_distributed(_dtypes_each, 2, runs)[0]
    assert dtypes == [({f"torch.{name}"}, {"torch.float32"}) for name in names]
    expected, found = (_losses(tmp_path / name) for name in names)
    assert found != expected
    assert found == pytest.approx(expected, rel=0.02)
    assert found[-1] < found[0] - 1


def test_gradients_and_moments_in_bfloat16_follow_the_fp32_run(tmp_path: Path) -> None:
    argv = [*write_tiny_run(tmp_path, num_rows=30, saves=False), "--training.mixed_precision_param=float32"]
    narrow = ["--optimizer.state_dtype=bfloat16", "--training.gradient_dtype=bfloat16"]
    words: dict[str, list[str]] = {"plain": [], "narrow": narrow, "muon": [*narrow, "--optimizer.name=muon"]}
    runs = [[*argv, *more, f"--job.dump_folder={tmp_path / name}"] for name, more in words.items()]
    stored = [dtypes for _, dtypes in run_distributed(_dtypes_each, 2, runs)[0]]
    assert stored == [{"torch.float32"}, *[{"torch.float32", "torch.bfloat16"}] * 2]
    plain, found, muon = (_losses(tmp_path / name) for name in words)
    assert found != plain
    assert found == pytest.approx(plain, rel=0.02)
    assert muon[-1] < muon[0] - 1


@pytest.mark.gpu
@pytest.mark.parametrize("words", [[], ["--parallelism.cpu_offload=true"]], ids=["", "cpu_offload"])
@pytest.mark.parametrize("experts", [False, True])
def test_gpu_run_follows_the_cpu_run(tmp_path: Path, experts: bool, words: list[str]) -> None:
    assert torch.cuda.is_available()
    args = dataclasses.replace(tiny_args(4), vocab_size=VOCAB_SIZE) if experts else ARGS
    argv = write_tiny_run(tmp_path, levels="128:1,512:1", args=args)
    for name, visible in (("cpu", ""), ("gpu", "0")):
        command = [sys.executable, "-m", "hbp_titan.train", *argv, *words, f"--job.dump_folder={tmp_path / name}"]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": visible}
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr
        assert f"on {'cuda' if visible else 'cpu'}" in result.stdout
    assert _losses(tmp_path / "gpu") == pytest.approx(_losses(tmp_path / "cpu"), rel=0.03)
