"""The equivalence check itself: verdicts on a tiny run, and controls that must be detected."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hbp_titan.config import load_config
from hbp_titan.data.prepare import prepare
from hbp_titan.data.token_store import TokenStore
from hbp_titan.models.registry import get_flavor
from hbp_titan.packing import Level
from hbp_titan.preflight import model_args
from hbp_titan.testing.equivalence import (
    BF16_CAUGHT_FACTOR,
    BF16_FACTOR,
    CAUGHT_FACTOR,
    GRAD_TOLERANCE,
    Case,
    Difference,
    Outcome,
    Result,
    Tolerance,
    build_cases,
    choose_samples,
    compare,
    judge,
    row,
    scaled_levels,
    shrunk,
    verify,
)
from tests.programs import run_python
from tests.tiny_run import write_tiny_run

ROOT = Path(__file__).resolve().parents[2]
CASE = Case("any", 1, (Level(8),))


def _result(loss: float, grad: float, **changes: str) -> Result:
    case = Case("any", 1, (Level(8),), **changes)  # type: ignore[arg-type]
    return judge(case, Difference(loss, {"weight": grad}), Tolerance.of_fp32(["weight"]))


def test_verdicts_in_float32() -> None:
    assert _result(1e-7, 1e-6).passed
    assert not _result(1e-3, 1e-6).passed
    assert not _result(1e-7, 1e-2).passed
    assert _result(1e-7, 1e-2, broken="positions not reset").passed
    assert not _result(1e-7, 1e-6, broken="positions not reset").passed
    assert not _result(1e-7, GRAD_TOLERANCE * CAUGHT_FACTOR / 2, broken="positions not reset").passed
    assert _result(1e-7, 1e-2, loss_normalization="token_mean").passed


def test_verdicts_in_bfloat16_depend_on_each_parameters_noise() -> None:
    tolerance = Tolerance.of_noise(Difference(1e-3, {"quiet": 1e-3, "noisy": 1e-1}))
    sound = judge(CASE, Difference(2e-3, {"quiet": 2e-3, "noisy": 2e-1}), tolerance)
    assert sound.passed
    beyond = judge(CASE, Difference(2e-3, {"quiet": 1.1e-3 * BF16_FACTOR, "noisy": 2e-1}), tolerance)
    assert not beyond.passed
    assert "DIFFERS (quiet)" in row(beyond)
    assert not judge(CASE, Difference(1.1e-3 * BF16_FACTOR, {"quiet": 0.0, "noisy": 0.0}), tolerance).passed

    control = Case("control", 1, (Level(8),), broken="positions not reset")
    limit = 1e-3 * BF16_FACTOR * BF16_CAUGHT_FACTOR
    assert judge(control, Difference(0.0, {"quiet": 1.1 * limit, "noisy": 0.0}), tolerance).passed
    missed = judge(control, Difference(0.0, {"quiet": 0.9 * limit, "noisy": 0.0}), tolerance)
    assert not missed.passed
    assert "NOT CAUGHT" in row(missed)


def test_comparison_reports_the_worst_gradient() -> None:
    expected = Outcome(2.0, {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([1.0, 0.0])})
    found = Outcome(2.2, {"a": torch.tensor([3.0, 4.5]), "b": torch.tensor([1.0, 0.2])})
    result = judge(CASE, compare(expected, found), Tolerance.of_fp32(["a", "b"]))
    assert (result.worst, result.grad_difference, result.loss_difference) == (
        "b",
        pytest.approx(0.2),
        pytest.approx(0.1),
    )


def test_bfloat16_cases_agree_within_their_noise_and_controls_are_caught(tmp_path: Path) -> None:
    config = load_config(write_tiny_run(tmp_path))
    args = model_args(config)
    samples = choose_samples(TokenStore.open(prepare(config)[0]), 30, 512)
    levels = (Level(128), Level(512, 2))
    configured = [case for case in build_cases(levels, (1, 2), args) if case.name.startswith(("configured", "CONTROL"))]
    chosen = [case for case in configured if case.dp_replicate == 1]
    results = [*verify(config, args, chosen, samples, dtype="bfloat16")]
    assert [case.world_size for case in chosen] == [1, 2, 2, 2, 2, 2]
    assert [row(result) for result in results if not result.passed] == []
    # Rounding shows: these are not fp32 runs.
    assert all(result.grad_difference > 10 * GRAD_TOLERANCE for result in results)


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


def test_levels_and_model_can_be_shrunk() -> None:
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
def test_script_on_a_tiny_run(tmp_path: Path) -> None:
    argv = [*write_tiny_run(tmp_path), "--compile.backend=aot_eager"]
    own = ["--world_sizes=1,2", "--max_tokens=512", "--num_samples=30"]
    result = run_python("scripts/verify_equivalence.py", *own, *argv, timeout=400)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = [line for line in result.stdout.splitlines() if line.endswith(("equal", "caught"))]
    assert sum(line.endswith("caught") for line in rows) == 4
    assert sum(line.endswith("equal") for line in rows) >= 10
    assert "every verdict is right" in result.stdout
