"""scripts/bench_train.py from the command line."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hbp_titan.distributed.world import World
from tests.programs import run_python

ROOT = Path(__file__).resolve().parents[2]


def _report(path: Path, *words: str, ranks: int = 0, gpu: str = "") -> tuple[str, dict[str, Any]]:
    """What the command prints and writes; gpu: the devices that it sees."""
    words = ("scripts/bench_train.py", *words, f"--json={path}")
    result = run_python(*words, ranks=ranks, env={"CUDA_VISIBLE_DEVICES": gpu})
    assert result.returncode == 0, result.stderr
    return result.stdout, json.loads(path.read_text())


@pytest.fixture(scope="module")
def script() -> Any:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("bench_train", ROOT / "scripts" / "bench_train.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_one_row_for_every_length_kind_of_documents_and_policy(tmp_path: Path) -> None:
    words = ("--lengths=64,128", "--documents=one,20", "--layers=1", "--repeats=1")
    printed, report = _report(tmp_path / "out.json", *words)
    rows = [line for line in printed.splitlines() if line.startswith("| debug ")]
    assert len(rows) == len(report["measurements"]) == 2 * 2 * 3
    assert [(m["max_tokens"], m["documents"], m["ac_policy"]) for m in report["measurements"][::5]] == [
        (64, "one", "none"),
        (64, "median 20", "keep_attention"),
        (128, "median 20", "full"),
    ]
    assert all(m["peak_bytes"] > 0 and m["seconds"][0] > 0 for m in report["measurements"])
    # Short documents need less attention.
    assert report["measurements"][9]["flops"] < report["measurements"][6]["flops"]
    assert "CPU" in report["device"]
    assert f"command: {report['command']}" in printed


def test_two_ranks_report_the_cost_of_a_swap(tmp_path: Path) -> None:
    words = ("--swap", "--lengths=64:1,128:2", "--policies=none,full:1", "--documents=20", "--layers=2")
    path = tmp_path / "out.json"
    printed, report = _report(path, *words, "--swap_iterations=1", "--repeats=2", ranks=2)
    assert "alternating / grouped" in printed
    assert printed.count("groups made 0") == 1  # one rank prints
    (found,) = report["measurements"]
    assert report["ranks"] == 2
    # Two lengths under two policies.
    assert (found["iterations"], found["swaps"], found["groups_made"], len(found["grouped"])) == (4, 3, 0, 2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--layers=0", "--layers '0' is neither all, auto nor a number of at least 1"),
        ("--repeats=0", "--repeats 0, --swap_iterations 4: at least 1 each"),
        ("--lora.rank=4", "lora.rank = 4: FLOPs are counted of whole weights; leave it at 0"),
        ("--lengths=64:2", "cp_degree=2 of the level with max_tokens=64 does not divide the world size 1"),
        ("--lengths=128,64", "levels must ascend"),
        ("--flavors=large", "'large' is none of"),
        ("--swap --lengths=64:2", "cp_degree=2 of the level with max_tokens=64 does not divide the world size 1"),
        ("--swap --layers=auto", "--layers auto does not go with --swap"),
        ("--swap --optimizer_step", "--optimizer_step does not go with --swap"),
        ("--repeat=3", "unknown key repeat"),
    ],
)
def test_mistakes_are_named_before_anything_is_built(script: Any, words: str, message: str) -> None:
    def measure() -> None:
        options, config = script.parse(words.split())
        command = script.swap if options.swap else script.bench
        command(options, config, World(0, 1, torch.device("cpu")), options.flavors)

    with pytest.raises(ValueError, match=message):
        measure()


@pytest.mark.gpu
def test_gpu_memory_falls_as_the_policies_say_in_bfloat16(tmp_path: Path) -> None:
    assert torch.cuda.is_available()
    words = ("--lengths=8192", "--documents=one,600", "--repeats=2")
    _, report = _report(tmp_path / "out.json", *words, gpu="0")
    assert report["computed in"] == "bfloat16"
    for start in (0, 3):
        none, full, keep_attention = report["measurements"][start : start + 3]
        assert none["peak_bytes"] > keep_attention["peak_bytes"] > full["peak_bytes"] > 0
        assert none["saved_bytes"] > keep_attention["saved_bytes"] > full["saved_bytes"]
        # A block's input: 128 values of 2 bytes a token.
        assert full["saved_bytes"] == pytest.approx(256, rel=0.02)
        assert len(none["seconds"]) == len(full["seconds"]) == len(keep_attention["seconds"]) == 2
