"""Training on several ranks against transformers on one process, and the equivalence check with its controls."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from hbp_titan.components.optimizer import lr_factor
from hbp_titan.config import JobConfig, load_config
from hbp_titan.data.epoch import EpochPlans
from hbp_titan.data.prepare import prepare
from hbp_titan.data.token_store import TokenStore
from hbp_titan.distributed.context_parallel import ContextParallelAttention
from hbp_titan.distributed.world import World
from hbp_titan.models.decoder import Decoder
from hbp_titan.models.hf import to_hf_name
from hbp_titan.models.hf_config import args_to_hf_config
from hbp_titan.models.registry import get_flavor
from hbp_titan.packing import Level
from hbp_titan.preflight import cost_model, model_args
from hbp_titan.testing.equivalence import (
    BF16_CAUGHT_FACTOR,
    BF16_FACTOR,
    CAUGHT_FACTOR,
    GRAD_TOLERANCE,
    Difference,
    Outcome,
    Result,
    Tolerance,
    compare,
    judge,
    row,
    verify,
)
from hbp_titan.testing.equivalence_cases import Case, build_cases, choose_samples, scaled_levels, shrunk
from hbp_titan.testing.local_ranks import run_distributed
from hbp_titan.train import Trainer
from tests.programs import run_python
from tests.reference import train_one_by_one
from tests.tiny_run import ARGS, write_tiny_run

LEVELS = {
    "ulysses": "64:1,128:2:ulysses:full,512:4:ulysses:keep_attention:1",
    "styles": "64:2,128:4:allgather:full,512:4:hybrid:keep_attention",
    "eight ranks": "64:1,128:8:allgather:full:1,512:8:hybrid:keep_attention",
}


@pytest.fixture(scope="module")
def argv_of(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Return the command line of a run for each set of levels."""
    folder = tmp_path_factory.mktemp("equivalence")
    arguments = write_tiny_run(folder, num_rows=30, levels="", saves=False)
    # With the usual 1e-8 Adam's first update is the sign of the gradient, also where that is rounding noise.
    arguments += ["--training.global_batch_tokens=350", "--optimizer.eps=1e-4"]
    return {name: [*arguments, f"--levels={levels}"] for name, levels in LEVELS.items()}


def _train(world: World, argv: list[str], without: str | None) -> tuple[dict[str, torch.Tensor], set[int]]:
    # Patched permanently: this process ends with the test.
    if without == "all-to-all":
        ContextParallelAttention.all_to_all = lambda attention, x: x  # type: ignore[method-assign]
    if without == "all-gather":
        ContextParallelAttention.all_gather = lambda attention, x: torch.cat([x] * attention.state.gather_group.size())  # type: ignore[method-assign]
    trainer = Trainer(load_config(argv), world)
    trained: set[int] = set()
    whole_step = trainer.train_step

    def counted(plan: Any, step: int, batches: Any) -> dict[str, Any]:
        trained.update(plan.level_of_iteration[plan.step_offsets[step] : plan.step_offsets[step + 1]].tolist())
        return whole_step(plan, step, batches)

    trainer.train_step = counted  # type: ignore[method-assign]
    trainer.train()
    return {name: p.full_tensor().detach() for name, p in trainer.model.named_parameters()}, trained  # type: ignore[attr-defined]


_references: dict[str, dict[str, torch.Tensor]] = {}


def _reference(config: JobConfig, world_size: int) -> dict[str, torch.Tensor]:
    """Train transformers' Llama in a plain loop, one sample at a time; only the order of samples is the plan's."""
    store = TokenStore.open(prepare(config)[0])
    plan = EpochPlans(config, store, world_size, cost_model(ARGS)).plan_for(0)
    if plan.fingerprint in _references:
        return _references[plan.fingerprint]
    # Not imported by the ranks.
    import transformers

    hf_config = transformers.AutoConfig.for_model(**args_to_hf_config(ARGS))
    model = transformers.AutoModelForCausalLM.from_config(hf_config, attn_implementation="eager", dtype=torch.float32)
    ours = Decoder(ARGS)
    ours.init_weights(config.training.seed)
    model.load_state_dict({to_hf_name(name): value for name, value in ours.state_dict().items()})
    train_one_by_one(model, store, plan, plan.num_steps, lr_factor(config.lr_scheduler, plan.num_steps))
    assert plan.num_steps >= 4
    _references[plan.fingerprint] = {name: p.detach() for name, p in model.named_parameters()}
    return _references[plan.fingerprint]


def _worst(trained: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> float:
    return max(
        float((value - reference[to_hf_name(name)]).norm() / reference[to_hf_name(name)].norm())
        for name, value in trained.items()
    )


@pytest.mark.parametrize(
    ("world_size", "levels", "options"),
    [
        pytest.param(4, "ulysses", ["--packing.level_order=alternate"], marks=pytest.mark.slow),
        pytest.param(4, "ulysses", ["--packing.level_order=interleave"], marks=pytest.mark.slow),
        (4, "ulysses", ["--packing.level_order=interleave", "--parallelism.dp_replicate=2"]),
        pytest.param(4, "styles", ["--packing.level_order=alternate"], marks=pytest.mark.slow),
        pytest.param(4, "styles", ["--parallelism.cp_backend=dtensor"], marks=pytest.mark.slow),
        pytest.param(8, "eight ranks", ["--parallelism.dp_replicate=2"], marks=pytest.mark.slow),
    ],
)
def test_ranks_with_three_levels_equal_transformers_on_one(
    argv_of: dict[str, list[str]], world_size: int, levels: str, options: list[str]
) -> None:
    argv = [*argv_of[levels], *options]
    parameters, trained = run_distributed(_train, world_size, argv, None)[0]
    assert trained == {0, 1, 2}
    error = _worst(parameters, _reference(load_config(argv), world_size))
    assert error < 1e-5


@pytest.mark.parametrize(("levels", "without"), [("ulysses", "all-to-all"), ("styles", "all-gather")])
def test_missing_collective_is_detected(argv_of: dict[str, list[str]], levels: str, without: str) -> None:
    parameters, _ = run_distributed(_train, 4, argv_of[levels], without)[0]
    error = _worst(parameters, _reference(load_config(argv_of[levels]), 4))
    assert error > 1e-3


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
    assert result.worst == "b"
    assert (result.grad_difference, result.loss_difference) == (pytest.approx(0.2), pytest.approx(0.1))


def test_bfloat16_cases_agree_within_their_noise_and_controls_are_caught(tmp_path: Path) -> None:
    config = load_config(write_tiny_run(tmp_path))
    args = model_args(config)
    samples = choose_samples(TokenStore.open(prepare(config)[0]), 30, 512)
    levels = (Level(128), Level(512, 2))
    configured = [case for case in build_cases(levels, (1, 2), args) if case.name.startswith(("configured", "CONTROL"))]
    chosen = [case for case in configured if case.dp_replicate == 1 and "side by side" not in case.name]
    results = [*verify(config, args, chosen, samples, dtype="bfloat16")]
    assert [case.world_size for case in chosen] == [1, 2, 2, 2, 2, 2]
    assert [row(result) for result in results if not result.passed] == []
    # Rounding shows: these are not fp32 runs.
    assert all(result.grad_difference > 10 * GRAD_TOLERANCE for result in results)


@pytest.mark.parametrize(
    ("flavor", "world_size", "names"),
    [
        ("debug", 2, "^offload.* in chunks and head groups"),
        pytest.param("debug", 4, "chunks|offload|groups", marks=pytest.mark.slow),
        pytest.param("debug_moe", 4, "chunks|offload|groups", marks=pytest.mark.slow),
    ],
)
def test_memory_plans_leave_loss_and_gradients_unchanged(
    flavor: str, world_size: int, names: str, tmp_path: Path
) -> None:
    config = load_config([*write_tiny_run(tmp_path), f"--model.flavor={flavor}", "--compile.backend=aot_eager"])
    args = get_flavor(flavor)
    samples = choose_samples(TokenStore.open(prepare(config)[0]), 12, 512)
    levels = (Level(128), Level(256, 4, "hybrid"), Level(512, 2))
    plans = [case for case in build_cases(levels, (world_size,), args) if re.search(names, case.name)]
    assert any(level.attention_head_groups == 2 for level in plans[-1].levels)
    results = [*verify(config, args, plans, samples)]
    assert len(results) == len(plans) >= 2
    assert [row(result) for result in results if not result.passed or result.grad_difference > 2e-6] == []


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
    assert sum(name.startswith("CONTROL") for name in names) == 6
    # Every divisor of the ranks, also those that do not divide the level; 3 does not divide the 4 heads.
    degrees = {(case.levels[0].cp_style, case.levels[0].cp_degree) for case in build_cases((Level(64),), (6, 12), args)}
    assert degrees >= {("allgather", degree) for degree in (2, 3, 4, 6, 12)} | {("hybrid", 3), ("ulysses", 4)}
    assert not degrees & {("ulysses", 3), ("ulysses", 6)}


def test_levels_side_by_side_leave_loss_and_gradients_unchanged(tmp_path: Path) -> None:
    config = load_config(write_tiny_run(tmp_path))
    args = model_args(config)
    samples = choose_samples(TokenStore.open(prepare(config)[0]), 20, 512)
    cases = [
        case for case in build_cases((Level(512),), (4,), args) if "side by side" in case.name and not case.compile
    ]
    assert {level.cp_degree for level in cases[0].levels} == {1, 2, 4}
    # Each level has another memory plan, so that ranks recompute different parts at the same time.
    assert len({(level.ac_policy, level.mlp_chunk_tokens > 0) for level in cases[1].levels}) == 3
    results = [*verify(config, args, cases, samples)]
    assert [result.control for result in results] == [False, False, True, True]
    assert [row(result) for result in results if not result.passed] == []


def test_levels_and_model_can_be_shrunk() -> None:
    levels = scaled_levels((Level(16384), Level(131072, 8)), 1024)
    assert [(level.max_tokens, level.cp_degree) for level in levels] == [(128, 1), (1024, 8)]
    assert scaled_levels(levels, 0) == levels
    assert scaled_levels((Level(16384), Level(131073, 3)), 1024)[1] == Level(1008, 3)
    small = shrunk(get_flavor("llama3_1_8b"), 500)
    assert (small.num_layers, small.num_heads, small.num_kv_heads, small.hidden_size) == (2, 32, 8, 512)
    assert small.vocab_size == 500
    # Both kinds of layers, and a window that samples exceed.
    windows = shrunk(get_flavor("gemma3_1b"), 500)
    assert [windows.window(layer) for layer in range(2)] == [24, None]
    sparse = shrunk(get_flavor("deepseek_v2_236b"), 500)
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
