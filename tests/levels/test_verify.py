"""The proof of equivalence itself: right verdicts on a tiny run, and a comparison that can fail."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hbp_titan.levels.verify import Case, Result, build_cases, compare, scaled_levels, shrunk
from hbp_titan.models.registry import get_flavor
from hbp_titan.packing import Level
from tests.programs import run_python
from tests.tiny_run import write_tiny_run

ROOT = Path(__file__).resolve().parents[2]
CASE = Case("any", 1, (Level(8),))


def _result(loss: float, grad: float, **changes: str) -> Result:
    return Result(Case("any", 1, (Level(8),), **changes), loss, grad, "weight")  # type: ignore[arg-type]


def test_verdict_needs_equal_loss_and_gradients_and_a_control_that_is_seen() -> None:
    assert _result(1e-7, 1e-6).passed
    assert not _result(1e-3, 1e-6).passed
    assert not _result(1e-7, 1e-2).passed
    assert _result(1e-7, 1e-2, broken="positions not reset").passed
    assert not _result(1e-7, 1e-6, broken="positions not reset").passed
    assert _result(1e-7, 1e-2, normalizer="token_mean").passed


def test_comparison_names_the_worst_gradient() -> None:
    expected = (2.0, {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([1.0, 0.0])})
    found = (2.2, {"a": torch.tensor([3.0, 4.5]), "b": torch.tensor([1.0, 0.2])})
    result = compare(CASE, expected, found)
    assert (result.worst, result.grad_difference, result.loss_difference) == (
        "b",
        pytest.approx(0.2),
        pytest.approx(0.1),
    )


def test_cases_fit_the_heads_and_the_world() -> None:
    args = get_flavor("debug")  # 4 heads, 2 kv heads
    for case in build_cases((Level(64), Level(512, 8)), (1, 2, 4), args):
        for level in case.levels:
            assert case.world_size % level.cp_degree == 0
            assert level.cp_style != "ulysses" or args.num_heads % level.cp_degree == 0
    names = [case.name for case in build_cases((Level(64),), (1, 2, 4), args)]
    assert "one level, 4 ranks, ulysses cp 4" in names
    assert "one level, 2 ranks, ulysses cp 4" not in names
    assert {"one level, 2 ranks, allgather cp 2", "one level, 4 ranks, hybrid cp 4"} <= set(names)
    assert sum(name.startswith("CONTROL") for name in names) == 4


def test_levels_and_model_can_be_made_small() -> None:
    levels = scaled_levels((Level(16384), Level(131072, 8)), 1024)
    assert [(level.max_tokens, level.cp_degree) for level in levels] == [(128, 1), (1024, 8)]
    assert scaled_levels(levels, 0) == levels
    small = shrunk(get_flavor("llama3_1_8b"))
    assert (small.num_layers, small.num_heads, small.num_kv_heads, small.hidden_size) == (2, 32, 8, 512)
    sparse = shrunk(get_flavor("deepseek_v2_236b"))
    assert sparse.moe is not None
    assert [sparse.is_sparse(layer) for layer in range(2)] == [False, True]
    assert (sparse.num_heads, sparse.head_dim, sparse.moe.n_routed_experts, sparse.moe.topk_group) == (128, 16, 160, 3)


@pytest.mark.slow
def test_command_proves_a_tiny_run_and_its_controls(tmp_path: Path) -> None:
    argv = [*write_tiny_run(tmp_path), "--compile.backend=aot_eager"]
    own = ["--world_sizes=1,2", "--max_tokens=512", "--num_samples=30"]
    result = run_python("scripts/verify_equivalence.py", *own, *argv, timeout=400)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = [line for line in result.stdout.splitlines() if line.endswith(("equal", "caught"))]
    assert sum(line.endswith("caught") for line in rows) == 4
    assert sum(line.endswith("equal") for line in rows) >= 10
    assert "every verdict is right" in result.stdout
