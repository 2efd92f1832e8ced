"""bfloat16 parameters in forward and backward, fp32 parameters, gradients and optimizer state; and the GPU run."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hbp_titan.config import load_config
from hbp_titan.distributed.world import World
from hbp_titan.models.hf import args_to_hf_config
from hbp_titan.testing.local_ranks import run_distributed
from hbp_titan.train import Trainer
from tests.models.deepseek_tiny import tiny_args
from tests.tiny_run import VOCAB_SIZE, write_tiny_run

ROOT = Path(__file__).resolve().parents[1]


def _losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _train(world: World, argv: list[str]) -> tuple[set[str], set[str]]:
    computed: set[str] = set()
    trainer = Trainer(load_config(argv), world)
    block = trainer.model.layers[0]
    block.register_forward_hook(lambda module, inputs, output: computed.add(str(output.dtype)))
    trainer.train()
    stored = {str(p.dtype) for p in trainer.model.parameters()}
    for state in trainer.optimizer.state.values():
        stored |= {str(state[key].dtype) for key in ("exp_avg", "exp_avg_sq")}
    return computed, stored


def test_bfloat16_compute_keeps_fp32_state_and_follows_the_fp32_run(tmp_path: Path) -> None:
    argv = [*write_tiny_run(tmp_path), "--checkpoint.enable=false", "--checkpoint.export_hf=false"]
    dtypes = {}
    for name in ("float32", "bfloat16"):
        changed = [*argv, f"--training.mixed_precision_param={name}", f"--job.dump_folder={tmp_path / name}"]
        dtypes[name] = run_distributed(_train, 2, changed)[0]
    assert dtypes["bfloat16"] == ({"torch.bfloat16"}, {"torch.float32"})
    assert dtypes["float32"] == ({"torch.float32"}, {"torch.float32"})
    expected, found = (_losses(tmp_path / name) for name in ("float32", "bfloat16"))
    assert found != expected
    assert found == pytest.approx(expected, rel=0.02)
    assert found[-1] < found[0] - 1


@pytest.mark.gpu
@pytest.mark.parametrize("experts", [False, True])
def test_gpu_run_follows_the_cpu_run(tmp_path: Path, experts: bool) -> None:
    assert torch.cuda.is_available()
    argv = [*write_tiny_run(tmp_path), "--levels=128:1,512:1"]
    if experts:
        config = args_to_hf_config(dataclasses.replace(tiny_args(4), vocab_size=VOCAB_SIZE))
        (tmp_path / "model" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for name, visible in (("cpu", ""), ("gpu", "0")):
        command = [sys.executable, "-m", "hbp_titan.train", *argv, f"--job.dump_folder={tmp_path / name}"]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": visible}
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr
        assert f"on {'cuda' if visible else 'cpu'}" in result.stdout
    assert _losses(tmp_path / "gpu") == pytest.approx(_losses(tmp_path / "cpu"), rel=0.03)
