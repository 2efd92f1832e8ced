"""Advice when memory runs out: the fastest change that saves enough, as text that can be copied."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
import torch
import torch.distributed as dist

from hbp_titan.components.oom import (
    TRAINING,
    UPDATE,
    VALIDATION,
    OOMAdvice,
    OutOfMemory,
    TorchFigures,
    is_out_of_memory,
    out_of_memory_in,
)
from hbp_titan.config import load_config
from hbp_titan.distributed.world import World
from hbp_titan.errors import UserError
from hbp_titan.packing import Level
from hbp_titan.packing.level import AC_POLICIES
from hbp_titan.preflight import model_args
from hbp_titan.tuning.hardware import HARDWARE, hardware_like
from hbp_titan.tuning.memory import estimate_evaluation, estimate_memory
from hbp_titan.tuning.oom_advice import OOMContext
from hbp_titan.tuning.time_model import time_model

GIB = 2**30
H100 = HARDWARE["h100-80gb"]
WORDS = ["--model.flavor=llama3_1_8b", "--data.train_files=absent.jsonl", "--levels=16384:1,131072:8"]


def _context(world_size: int = 32, gib: float = 75.0, words: tuple[str, ...] = ()) -> OOMContext:
    config = load_config([*WORDS, *words])
    return OOMContext(config, model_args(config), world_size, H100, "cuda", int(gib * GIB))


def _error(
    context: OOMContext, index: int = 1, figures: TorchFigures | None = None, work: str = TRAINING
) -> OutOfMemory:
    return OutOfMemory(work, context.config.levels[index], figures or TorchFigures())


def test_figures_are_parsed_from_the_allocators_message() -> None:
    message = (
        "CUDA out of memory. Tried to allocate 3.50 GiB. GPU 0 has a total capacity of 79.10 GiB of which 2.25 GiB is "
        "free. Including non-PyTorch memory, this process has 76.84 GiB memory in use. Of the allocated memory 70.25 "
        "GiB is allocated by PyTorch, and 512.00 MiB is reserved by PyTorch but unallocated."
    )
    assert TorchFigures.of(message) == TorchFigures(int(3.5 * GIB), int(70.25 * GIB), GIB // 2)
    assert TorchFigures.of("CUDA out of memory.") == TorchFigures()


def test_out_of_memory_is_recognized() -> None:
    message = "out of memory in validation at the level with max_tokens=64, cp_degree=1"
    with pytest.raises(OutOfMemory, match=message) as caught, out_of_memory_in(VALIDATION, Level(64)):
        torch.empty(1 << 60, dtype=torch.uint8)
    assert caught.value.figures.tried == 1 << 60
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    nccl = (
        "NCCL error in: NCCLUtils.cpp:76, unhandled cuda error, NCCL version 2.27.5\n"
        "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\n"
    )
    assert is_out_of_memory(dist.DistBackendError(f"{nccl}Failed to CUDA calloc async 608 bytes"))
    assert is_out_of_memory(dist.DistBackendError(f"{nccl}Cuda failure 2 'out of memory'"))
    assert not is_out_of_memory(dist.DistBackendError(f"{nccl}Cuda failure 700 'an illegal memory access'"))
    assert not is_out_of_memory(ValueError("Failed to CUDA calloc"))
    with pytest.raises(RuntimeError, match="shapes"), out_of_memory_in(UPDATE):
        raise RuntimeError("shapes do not match")


def test_advice_is_the_fastest_change_that_fits() -> None:
    gib = 40.0
    context = _context(gib=gib)
    search, bias = context.search(_error(context))
    found = search.cheapest()
    assert found is not None
    assert bias == 0
    # Brute force: every policy at every depth and every cp degree that 32 ranks and 32 heads allow.
    level, model = context.config.levels[1], time_model(context.args, context.config, H100, 32)
    load = np.array([1.0, 131072, 131072.0**2, 1])
    best = float("inf")
    for cp_degree in (8, 16, 32):
        for policy in AC_POLICIES:
            for layers in range(33):
                variant = Level(131072, cp_degree, "ulysses", policy, layers)
                peak = estimate_memory(context.args, variant, context.config, 32, device_type="cuda").peak_bytes
                if peak <= gib * GIB:
                    best = min(best, float(model.level_time(variant).seconds(load)) * cp_degree)
    seconds = float(model.level_time(found.level).seconds(load)) * found.level.cp_degree
    assert seconds == pytest.approx(best, rel=1e-6)
    assert estimate_memory(context.args, found.level, context.config, 32, device_type="cuda").peak_bytes <= gib * GIB
    assert found.slowdown == pytest.approx(seconds / (float(model.level_time(level).seconds(load)) * 8))


def test_advice_can_be_copied_and_fits() -> None:
    context = _context()
    head, change = context.lines(_error(context, figures=TorchFigures(2 * GIB, 74 * GIB)))
    # 8,030,261,248 parameters of 16 bytes on 32 ranks are 3.74 GiB.
    assert "training at level 128K/cp8" in head
    for figure in ("2.0", "74.0", "75.0", "99.7", "3.7", "90.1", "5.9"):
        assert f" {figure} GiB" in head
    parsed = re.fullmatch(
        r"cheapest change that fits: in the \[\[levels\]\] block of max_tokens = 131072 set (.*); as overrides: "
        r"--levels=16384:1:ulysses:none,(\S+) \(predicted peak (\S+) GiB, predicted \d+% slower\)",
        change,
    )
    assert parsed, change
    config = load_config([*WORDS, f"--levels=16384:1,{parsed[2]}"])
    estimate = estimate_memory(context.args, config.levels[1], config, 32, device_type="cuda")
    assert estimate.peak_bytes <= 75 * GIB
    assert f"{estimate.peak_bytes / GIB:.1f}" == parsed[3]


def test_change_saves_more_than_was_missing_if_the_estimate_is_low() -> None:
    # The estimate has room, torch had not: 10 GiB more than there was are wanted, so 10 GiB have to be saved.
    context = _context(gib=75.0, words=("--levels=16384:1,131072:8:ulysses:keep_attention",))
    level = context.config.levels[1]
    estimated = context.estimate(level).peak_bytes
    assert estimated < 40 * GIB
    search, bias = context.search(_error(context, figures=TorchFigures(10 * GIB, 75 * GIB)))
    assert bias == 85 * GIB - estimated
    found = search.cheapest()
    assert found is not None
    assert found.peak_bytes <= estimated - 10 * GIB
    # Fragmentation: neither is above the limit, and the tensor that did not fit has to be saved.
    search, bias = context.search(_error(context, figures=TorchFigures(6 * GIB, 20 * GIB)))
    assert (search.limit, bias) == (estimated - 6 * GIB, 0)


@pytest.mark.parametrize(
    ("world_size", "gib", "words", "setting"),
    [
        # bfloat16 parameters of all layers are 13 GiB.
        (
            *(8, 32.0, ("--levels=8192:8:ulysses:full", "--parallelism.reshard_after_forward=false")),
            "parallelism.reshard_after_forward = true",
        ),
        (
            *(1, 75.0, ("--model.flavor=llama3_2_1b", "--levels=65536:1:ulysses:offload_attention")),
            "training.loss_chunk_tokens = 256",
        ),
    ],
)
def test_advice_outside_of_the_level(world_size: int, gib: float, words: tuple[str, ...], setting: str) -> None:
    context = _context(world_size, gib, (*words, "--training.loss_chunk_tokens=65536"))
    _, change = context.lines(_error(context, 0))
    assert f"set {setting}" in change
    assert f" --{setting.replace(' ', '')}" in change


def test_state_that_does_not_fit() -> None:
    context = _context(1)
    # 8,030,261,248 x 16 bytes are 119.7 GiB; two ranks hold 59.8 each.
    for error in (_error(context, 0), OutOfMemory(UPDATE, None, TorchFigures(GIB))):
        head, way = context.lines(error)
        assert "parameters, gradients and optimizer state 119.7 GiB" in head
        assert "use 2 ranks" in way
        assert "lora.rank = 16" in way
        assert "cpu_offload = true (125.8 GiB of host memory" in way
        # AdamW reads and writes 28 bytes per parameter, at 75 GB/s instead of 3,350.
        assert "each optimizer step 3 s instead of 0.067" in way


def test_shorter_level_only_if_nothing_else_fits() -> None:
    # A validation keeps nothing, so neither checkpointing nor host memory helps.
    context = _context(2, 66.5, ("--levels=4096:2:ulysses:full,131072:2:ulysses:full",))
    _, shorter, more, _ = context.lines(_error(context, work=VALIDATION))
    assert re.match(
        r"only a shorter level fits: in the \[\[levels\]\] block of max_tokens = 131072 set max_tokens = ", shorter
    )
    assert "data.max_length_policy" in shorter
    assert re.match(r"or use 4 ranks", more)


def test_validation_gets_a_higher_cp_degree_instead_of_checkpointing() -> None:
    context = _context(8, 22.0, ("--levels=131072:1:ulysses:full",))
    level = context.config.levels[0]
    training, evaluating = context.estimate(level), context.estimate(level, evaluating=True)
    assert evaluating.saved_bytes == 0
    assert evaluating.peak_bytes < training.peak_bytes
    _, change, off = context.lines(_error(context, 0, work=VALIDATION))
    degree = int(re.search(r"set cp_degree = (\d+)", change)[1])  # type: ignore[index]
    assert "ac_policy =" not in change
    wider = dataclasses.replace(level, cp_degree=degree)
    assert estimate_evaluation(context.args, wider, context.config, 8, device_type="cuda").peak_bytes < 22 * GIB
    assert "validation.enable = false" in off


def test_overrides_replace_automatic_levels() -> None:
    context = _context()
    _, change = context.lines(_error(context), measures_levels=True)
    assert "as overrides: --packing.auto_levels=false --levels=16384:1:ulysses:none,131072:" in change


def test_device_uses_the_matching_entry_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    found = hardware_like(torch.device("cuda"), 40 * GIB, 4)
    assert found == dataclasses.replace(HARDWARE["a100-80gb"], memory_bytes=40 * GIB, gpus_per_node=4)
    assert hardware_like(torch.device("cpu"), GIB, 2).peak_flops == H100.peak_flops


def test_gpu_advice_reports_other_processes_and_fragmentation(monkeypatch: pytest.MonkeyPatch) -> None:
    # 79 GiB, of which other processes hold 20; this rank's tensors 50, and 9 are held back in pieces.
    properties = type("Properties", (), {"total_memory": 79 * GIB})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 79 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 59 * GIB)
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    context = _context()
    advisor = OOMAdvice(context.config, context.args, World(5, 32, torch.device("cuda", 0)))
    words = (
        "CUDA out of memory. Tried to allocate 2.00 GiB. 50.00 GiB is allocated by PyTorch, and 9.00 GiB is reserved "
        "by PyTorch but unallocated."
    )
    with pytest.raises(UserError) as caught, advisor, out_of_memory_in(TRAINING, context.config.levels[1]):
        raise torch.OutOfMemoryError(words)
    head, change, others, pieces = caught.value.lines
    assert head.startswith("rank 5: out of memory in training at level 128K/cp8 ")
    for figure in ("2.0", "50.0", "59.0"):
        assert f" {figure} GiB" in head
    assert float(re.search(r"predicted peak (\S+) GiB", change)[1]) < 59  # type: ignore[index]
    assert "20.0 GiB of the device's 79.0 GiB" in others
    assert pieces.startswith("9.0 GiB")
    assert "PYTORCH_ALLOC_CONF=expandable_segments:True" in pieces


def test_other_errors_pass_through() -> None:
    context = _context()
    advisor = OOMAdvice(context.config, context.args, World(0, 32, torch.device("cpu")))
    with pytest.raises(KeyError, match="another"), advisor:
        raise KeyError("another")
