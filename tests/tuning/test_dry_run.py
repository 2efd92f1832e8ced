"""Dry runs: counts against literals and a real start, errors as one line, changes that fit, every preset."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from hbp_titan.config import load_config
from hbp_titan.data.loader import PlanDataset
from hbp_titan.distributed.world import World
from hbp_titan.errors import UserError, exit_on_user_error
from hbp_titan.packing import build_plan
from hbp_titan.testing.local_ranks import run_distributed
from hbp_titan.train import Trainer
from hbp_titan.tuning.dry_run import DryRun, describe, dry_run, main
from hbp_titan.tuning.hardware import get_hardware
from hbp_titan.tuning.simulate import tulu3_longcite_like
from tests.models.deepseek_tiny import tiny_args
from tests.programs import ROOT
from tests.tiny_run import ARGS, VOCAB_SIZE, write_tiny_run

CONFIGS = ROOT / "train_configs"
DEBUG = ["--data.train_files=absent.jsonl"]
LLAMA = ["--model.flavor=llama3_1_8b", *DEBUG]
FEW_SAMPLES = 20_000


@pytest.fixture
def few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hbp_titan.tuning.dry_run.SYNTHETIC_SAMPLES", FEW_SAMPLES)


pytestmark = pytest.mark.usefixtures("few_samples")


def _dry_run(words: Sequence[str], world_size: int = 8, gpu: str = "h100-80gb") -> DryRun:
    return dry_run(load_config(words), world_size, get_hardware(gpu))


def test_state_per_rank_is_16_bytes_per_parameter() -> None:
    # 8,030,261,248 parameters (tests/models/test_registry.py) on 8 ranks: 4 bytes each, the same for gradients, twice
    # that for AdamW's moments.
    words = [*LLAMA, "--levels=16384:1:ulysses:full,131072:8:ulysses:full"]
    found = _dry_run(words)
    state = found.rank_state
    assert found.num_params == 8_030_261_248
    own = 8_030_261_248 // 8
    assert (state.parameters, state.parameter_bytes, state.gradient_bytes) == (own, 4 * own, 4 * own)
    assert state.optimizer_bytes == 8 * own
    small = ["--optimizer.name=muon", "--optimizer.state_dtype=bfloat16", "--training.gradient_dtype=bfloat16"]
    state = _dry_run([*words, *small, "--parallelism.cpu_offload=true"]).rank_state
    # Embedding and output have two moments, and so have norms; matrices of the blocks have one.
    adamw = 2 * 128256 * 4096 + 65 * 4096
    assert (state.gradient_bytes, state.optimizer_bytes) == (2 * own, 2 * own + 2 * adamw // 8)
    assert (state.device_bytes, state.total_bytes) == (0, 8 * own + 2 * adamw // 8)
    assert not dist.is_initialized()
    assert _dry_run([*words, "--parallelism.dp_replicate=2"]).rank_state.parameters == 2 * own


def test_synthetic_data_are_planned_as_in_a_run() -> None:
    words = [*LLAMA, "--levels=8192:1:ulysses:full,32768:4:ulysses:full", "--training.global_batch_tokens=1048576"]
    found = _dry_run([*words, "--training.epochs=3", "--parallelism.reshard_after_forward=true"])
    lengths = tulu3_longcite_like(FEW_SAMPLES)
    held = lengths[lengths <= 32768]
    plan = build_plan(held, found.config.levels, 8, global_batch_tokens=1 << 20, cost=found.plan.costs[0], seed=42)
    assert found.plan.fingerprint == plan.fingerprint
    assert found.total_steps == pytest.approx(3 * plan.num_steps, rel=0.01)
    text = describe(found)
    for words in (f"{len(held):,} lengths", "--model.hf_path", "--checkpoint.initial_load_path"):
        assert words in text


def test_warnings() -> None:
    found = _dry_run([*LLAMA, "--levels=131072:16:hybrid:full"], world_size=16)
    assert len(found.warnings) == 1
    assert "warning: groups of cp_degree 16 cross nodes" in describe(found)
    # Most matrices of the debug model have 352 or 128 rows, so each of 300 ranks has two rows, one or none.
    (warning,) = _dry_run([*DEBUG, "--levels=131072:1"], world_size=300).warnings
    assert warning.startswith("rank 0 holds 1.7")
    # A curriculum that covers all samples of the lowest level.
    words = [*DEBUG, "--levels=16384:1,131072:2"]
    plan = _dry_run(words).plan
    short = plan.num_iterations - int(plan.level_of_iteration.sum())
    (warning,) = _dry_run([*words, "--packing.curriculum_steps=500"]).warnings
    assert warning.startswith(f"packing.curriculum_steps = 500 covers all {short} steps ")
    assert _dry_run([*words, f"--packing.curriculum_steps={short - 5}"]).warnings == []


# What does not fit, and what is proposed: checkpointing; one copy of the parameters; a higher cp degree; host memory.
UNFIT = [
    (["--levels=131072:8"], 8, r"set ac_policy = \"(keep|offload)_attention\", ac_layers = \d+$"),
    (["--levels=16384:1:ulysses:full", "--parallelism.dp_replicate=8"], 8, r"set parallelism.dp_replicate = 1$"),
    (["--levels=131072:1:ulysses:full"], 8, r"set cp_degree = 8, ac_policy = \"offload_attention\", ac_layers = \d+$"),
    (["--levels=16384:1:ulysses:full"], 1, r"and set parallelism.cpu_offload = true$"),
]


@pytest.mark.parametrize(("words", "world_size", "change"), UNFIT)
def test_level_that_does_not_fit_gets_a_change_that_fits(words: list[str], world_size: int, change: str) -> None:
    found = _dry_run([*LLAMA, *words], world_size)
    with pytest.raises(UserError, match=r"has 75\.1 GiB to use") as caught:
        found.check_memory()
    (line,) = caught.value.lines
    assert re.search(change, line), line
    level = found.levels[0].level
    changed = dict(re.findall(r"(cp_degree|cp_style|ac_policy|ac_layers|dp_replicate|cpu_offload) = \"?([\w]+)", line))
    settings = {"cp_degree": level.cp_degree, "cp_style": level.cp_style, "ac_policy": level.ac_policy, **changed}
    short = ":".join([str(level.max_tokens), *(str(settings[key]) for key in ("cp_degree", "cp_style", "ac_policy"))])
    if "ac_layers" in changed:
        short += f":{changed['ac_layers']}"
    states = [f"--parallelism.dp_replicate={changed.get('dp_replicate', 1)}"]
    states.append(f"--parallelism.cpu_offload={changed.get('cpu_offload', 'false')}")
    _dry_run([*LLAMA, f"--levels={short}", *states], world_size).check_memory()


@pytest.mark.parametrize(
    ("words", "world_size", "change"),
    [
        # The logits of 131,072 tokens and 128,256 entries are 34 GB in bfloat16, and there are several such tensors.
        (
            ["--model.flavor=llama3_2_1b", "--levels=131072:1:ulysses:full", "--training.loss_chunk_tokens=131072"],
            1,
            "training.loss_chunk_tokens = 256",
        ),
        pytest.param(
            ["--model.flavor=deepseek_v2_236b", "--levels=32768:1:ulysses:full"],
            256,
            "parallelism.expert_parallel_degree = 2",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_configuration_change_that_fits(words: list[str], world_size: int, change: str) -> None:
    words = [*DEBUG, *words]
    with pytest.raises(UserError, match=f"set {change}$"):
        _dry_run(words, world_size).check_memory()
    _dry_run([*words, f"--{change.replace(' ', '')}"], world_size).check_memory()


@pytest.mark.slow
def test_model_that_is_too_large_for_any_change() -> None:
    # 236 billion parameters of 16 bytes are 55 GiB on each of 64 ranks; the unsharded experts of a layer and their
    # gradients in float32 do not fit in addition.
    words = ["--model.flavor=deepseek_v2_236b", *DEBUG, "--levels=16384:1:ulysses:full"]
    with pytest.raises(UserError, match="even 64 ranks"):
        _dry_run(words, 1, "a100-80gb").check_memory()


# tests/test_bad_input.py has those that every start checks.
MISTAKES = [
    (["--world_size=12"], "cp_degree=8"),
    (["--world_size=0"], "world size 0"),
    (["--gpu=h100"], "did you mean h100-80gb?"),
    (["--checkpoint.initial_load_path=nowhere"], "nowhere"),
    (["--training.mixed_precision_param=float32"], "attention kernel"),
    (["--data.sources=[]"], "data.train_files"),
    (["--levels=131072:8"], "level 128K/cp8 needs 99.7 GiB"),
]


@pytest.mark.parametrize(("changed", "message"), MISTAKES)
def test_error_is_one_line(changed: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--job.config_file", str(CONFIGS / "llama3_1_8b_hbp.toml"), "--world_size=32", *changed]
    with pytest.raises(SystemExit, match="1"):
        exit_on_user_error(lambda: main(words))
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_automatic_levels_need_a_real_start() -> None:
    with pytest.raises(ValueError, match="auto_levels"):
        _dry_run([*LLAMA, "--packing.auto_levels=true"])


def test_tokenizer_larger_than_the_vocabulary(tmp_path: Path) -> None:
    write_tiny_run(tmp_path)
    folder = tmp_path / "model"
    words = [*DEBUG, f"--model.hf_path={folder}", "--levels=512:1"]
    # Only config.json and tokenizer are there, which is enough to plan.
    assert ["a start needs weights" in line for line in _dry_run(words).warnings] == [True]
    assert _dry_run([*words, "--checkpoint.initial_load_path=none"]).warnings == []
    with pytest.raises(ValueError, match="neither"):
        _dry_run([*words, f"--checkpoint.initial_load_path={folder}"])
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"vocab_size": 320', '"vocab_size": 300'))
    with pytest.raises(ValueError, match="319"):
        _dry_run(words)


@pytest.mark.slow
def test_run_script_starts_no_rank() -> None:
    environment = {**os.environ, "COMM_MODE": "fake", "NGPU": "4", "GPU": "h200-141gb", "PYTHON": sys.executable}
    command = ["bash", "run_train.sh", "--data.embedded=", "--model.tokenizer_path=", *DEBUG]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "dry run: 4 x h200-141gb" in result.stdout


# Against a real start


def _bytes(tensors: list[Tensor]) -> int:
    return sum((tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes for tensor in tensors)


def _start(world: World, argv: list[str]) -> dict[str, object]:
    """Return the bytes that this rank holds after one optimizer step, and its plan."""
    trainer = Trainer(load_config(argv), world)
    plan = trainer.plans.plan_for(0)
    trainer.engine.forward_backward(PlanDataset(plan, trainer.store, world.rank, trainer.shapes)[0])
    trainer.optimizer.step()
    parameters = list(trainer.model.parameters())
    state = [value for values in trainer.optimizer.state.values() for k, value in values.items() if k != "step"]
    return {
        "parameters": _bytes(parameters),
        "gradients": _bytes([p.grad for p in parameters if p.grad is not None]),
        "optimizer": _bytes([value for value in state if isinstance(value, Tensor)]),
        "plan": (plan.fingerprint, plan.num_iterations, plan.num_steps, trainer.total_steps),
    }


@pytest.mark.parametrize("experts", [pytest.param(False, marks=pytest.mark.slow), True])
def test_bytes_and_plan_equal_a_real_start(tmp_path: Path, experts: bool) -> None:
    flavor = ["--model.hf_path=", f"--model.tokenizer_path={tmp_path / 'model'}", "--model.flavor=debug"]
    args = dataclasses.replace(tiny_args(4), vocab_size=VOCAB_SIZE) if experts else ARGS
    argv = [
        *write_tiny_run(tmp_path, saves=False, args=args),
        *(["--parallelism.expert_parallel_degree=2"] if experts else flavor),
        "--training.global_batch_tokens=600",
        "--training.epochs=2",
    ]
    found = _dry_run(argv, 2)
    ranks = run_distributed(_start, 2, argv)
    state, plan = found.rank_state, found.plan
    assert ranks[0] == {
        "parameters": state.parameter_bytes,
        "gradients": state.gradient_bytes,
        "optimizer": state.optimizer_bytes,
        "plan": (plan.fingerprint, plan.num_iterations, plan.num_steps, found.total_steps),
    }
    # Rank 0 holds the most.
    assert ranks[1]["parameters"] <= state.parameter_bytes
    assert found.samples.origin == "your data: 60 samples"


def test_host_memory_is_reported_and_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # Nothing fits, so the search would try everything.
    monkeypatch.setattr(DryRun, "_advice", lambda found, index: "")
    words = [*LLAMA, "--levels=131072:1:ulysses:offload", "--parallelism.cpu_offload=true"]
    found = _dry_run(words)
    # Per rank 16 bytes of 8,030,261,248 parameters over 8 ranks, and 32 inputs of 1 GiB.
    host = found.host_bytes(found.levels[0].configured)
    # Pinned, shards of 28 MiB take 32, three per layer, and those of the vocabulary 256; gradients as well.
    rounding = 2 * (3 * 32 * 4 * 2**20 + 2 * (2**28 - 128_256 * 4096 * 4 // 8))
    assert host == 16 * 8_030_261_248 // 8 + rounding + 32 * 2**30
    assert f"host memory per node, GiB: {8 * host / 2**30:.2f} of 1676." in describe(found)
    found.check_memory()
    small = dataclasses.replace(found, hardware=dataclasses.replace(found.hardware, host_memory_bytes=10**11))
    with pytest.raises(UserError, match="host memory per rank"):
        small.check_memory()


# Presets

PRESETS = sorted(path.stem for path in CONFIGS.glob("*.toml"))
# The others are of the same families with other sizes.
QUICK = ("debug_model", "deepseek_v2_lite_hbp", "llama3_1_8b_hbp")
# Their epochs have fewer steps than the paper's 500.
CURRICULUM = {"deepseek_v2_236b_hbp": 100, "deepseek_v3_hbp": 100, "qwen3_235b_a22b_hbp": 100}
MAX_MEMORY_SHARE = 0.9
"""The estimate does not include fragmentation."""


@pytest.mark.parametrize("name", [p if p in QUICK else pytest.param(p, marks=pytest.mark.slow) for p in PRESETS])
def test_preset_fits_its_hardware(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # all synthetic samples: the curriculum depends on the length of the epoch
    monkeypatch.chdir(tmp_path)
    path = CONFIGS / f"{name}.toml"
    header = re.search(r"^# Hardware: (\d+) x (\S+) ", path.read_text(), re.MULTILINE)
    assert header, "the header names no hardware"
    found = _dry_run(["--job.config_file", str(path)], int(header[1]), header[2])
    for memory in found.levels:
        assert found.peak_bytes(memory.configured) <= MAX_MEMORY_SHARE * found.hardware.memory_bytes, memory.level
    found.check_memory()
    # Side by side, the longest documents are meant for the ranks of several nodes.
    expected = ["cross nodes"] if found.plan.level_order == "parallel" else []
    assert [word for warning in found.warnings for word in re.findall("cross nodes", warning) or [warning]] == expected
    assert found.plan.num_steps == found.total_steps > 100
    text = describe(found)
    assert f"dry run: {header[1]} x {header[2]}" in text
    assert "SYNTHETIC data, because" in text


@pytest.mark.parametrize("name", [name for name in PRESETS if name.endswith(("_hbp", "_isf"))])
def test_preset_trains_as_in_the_paper(name: str) -> None:
    config = load_config(["--job.config_file", str(CONFIGS / f"{name}.toml")])
    assert (config.optimizer.lr, config.optimizer.weight_decay) == (1e-5, 0.01)
    assert config.packing.curriculum_steps == CURRICULUM.get(name, 500)
    assert config.packing.method == name.rpartition("_")[2]
    assert config.training.loss_normalization == "ave_token"
