"""Experts: DeepSeek-V2 on two ranks against transformers on one, expert parallelism, and the exchanges of a layer."""

from __future__ import annotations

import dataclasses
import itertools
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from hbp_titan.config import load_config
from hbp_titan.data.batch import PackedBatch
from hbp_titan.data.loader import BatchShapes, PlanDataset
from hbp_titan.distributed.expert_parallel import ExpertExchange, apply_expert_parallel, check_experts, order_by_expert
from hbp_titan.distributed.fsdp import whole_tensor
from hbp_titan.distributed.world import World
from hbp_titan.engine import Engine
from hbp_titan.models.configs import ModelArgs
from hbp_titan.models.decoder import Decoder
from hbp_titan.models.documents import BalanceState
from hbp_titan.models.moe import MixtureOfExperts, sort_by_expert
from hbp_titan.models.registry import get_flavor
from hbp_titan.packing import Level, build_plan
from hbp_titan.packing.level import AC_POLICIES
from hbp_titan.testing.equivalence import Outcome, compare, reference, run_case
from hbp_titan.testing.equivalence_cases import Case
from hbp_titan.testing.local_ranks import run_distributed
from tests.models.deepseek_tiny import hf_model, in_hf_memory, tiny_args
from tests.reference import token_losses

SEED = 3
PLAIN = tiny_args(4)
BALANCED = tiny_args(4, moe={"aux_loss_alpha": 0.3, "device_aux_loss_alpha": 0.2, "comm_aux_loss_alpha": 0.1})
# 9 experts are not divisible by 2 ranks, so each rank has a half of every expert.
ODD = tiny_args(4, moe={"n_routed_experts": 9, "n_group": 3})
# A norm reads the experts' output in backward.
NORMED = dataclasses.replace(BALANCED, norm_placement="both")
UPPER = Level(256, 2, ac_policy="full")
GATHER = dataclasses.replace(UPPER, cp_style="allgather", ac_policy="keep_attention")
LEVELS = (
    Level(64, 1),
    Level(128, 2, ac_policy="full"),
    Level(256, 4, cp_style="hybrid", ac_policy="keep_attention", ac_layers=2),
)
# A level without chunks, and one in chunks of each policy, most of them of unequal size. The samples need all of them.
CHUNKED = (
    Level(32, 1, ac_policy="full"),
    Level(40, 1, mlp_chunk_tokens=24),
    Level(64, 2, "allgather", ac_policy="keep_attention", mlp_chunk_tokens=12),
    Level(128, 2, ac_policy="offload", mlp_chunk_tokens=20, attention_head_groups=2),
    Level(256, 2, ac_policy="offload_attention", offload_layers=2, ac_layers=3, mlp_chunk_tokens=128),
)
FULL_IN_CHUNKS = dataclasses.replace(UPPER, mlp_chunk_tokens=50)
# test_fsdp.py has the same model on 4 ranks without expert parallelism, with ep 2, and with ep 2 and two copies;
# verify_equivalence.py chunks with host memory.
CASES = [
    (PLAIN, Case("ulysses, full", 2, (Level(64, 1), UPPER))),
    (PLAIN, Case("allgather, keep_attention", 2, (Level(64, 2), GATHER))),
    (BALANCED, Case("ulysses, full, balance losses", 2, (Level(64, 1), UPPER))),
    (BALANCED, Case("allgather, several steps", 2, (Level(64, 1), GATHER), global_batch_tokens=300)),
    (BALANCED, Case("compiled, ep 2", 2, (UPPER,), compile=True, expert_parallel=2)),
    (ODD, Case("9 experts", 2, (Level(64, 1), UPPER))),
    (BALANCED, Case("ep 4", 4, LEVELS, expert_parallel=4)),
    (BALANCED, Case("ep 2, several steps", 4, LEVELS, global_batch_tokens=300, expert_parallel=2)),
    (BALANCED, Case("ep 2, chunks", 2, CHUNKED, global_batch_tokens=300, expert_parallel=2)),
    (BALANCED, Case("compiled, ep 2, full, chunks", 2, (FULL_IN_CHUNKS,), compile=True, expert_parallel=2)),
    (NORMED, Case("ep 2, chunks, norms after experts", 2, (FULL_IN_CHUNKS,), expert_parallel=2)),
    (BALANCED, Case("ep 4, chunks", 4, CHUNKED, expert_parallel=4)),
    (BALANCED, Case("ep 2, chunks, 2 copies", 4, CHUNKED, expert_parallel=2, dp_replicate=2)),
]


class RandomSamples:
    """Rows of random tokens; the second half of each is trained."""

    def __init__(self) -> None:
        generator = np.random.default_rng(0)
        sizes = [5, 40, 12, 200, 33, 7, 60, 110, 21, 3]
        self.rows = [(generator.integers(0, 97, n), np.arange(n) >= n // 2) for n in sizes]
        self.lengths = np.array(sizes)
        self.loss_tokens = np.array([int(mask[1:].sum()) for _, mask in self.rows])

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self.rows[index]


def _run(world: World, cases: list[tuple[ModelArgs, Case]], *argv: str) -> list[Outcome]:
    config = load_config(["--compile.backend=aot_eager", f"--training.seed={SEED}", *argv])
    return [run_case(world, config, args, case, RandomSamples()) for args, case in cases]  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def found() -> dict[str, Outcome]:
    outcomes = {}
    for world_size in (2, 4):
        cases = [(args, case) for args, case in CASES if case.world_size == world_size]
        results = run_distributed(_run, world_size, cases)[0]
        outcomes |= {case.name: result for (_, case), result in zip(cases, results, strict=True)}
    return outcomes


def _transformers() -> Outcome:
    ours = Decoder(PLAIN)
    ours.init_weights(SEED)
    theirs, samples = hf_model(ours), RandomSamples()
    loss = torch.cat([token_losses(theirs, *row) for row in samples.rows]).sum() / int(samples.loss_tokens.sum())
    loss.backward()
    return Outcome(loss.item(), {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None})


def _reference(args: ModelArgs) -> Outcome:
    return reference(args, SEED, RandomSamples(), torch.device("cpu"))[1]  # type: ignore[arg-type]


def _assert_equal(expected: Outcome, found: Outcome) -> None:
    difference = compare(expected, found)
    assert difference.loss < 1e-6
    assert max(difference.grads.values()) < 1e-5, difference.grads


@pytest.mark.parametrize("name", [case.name for args, case in CASES if args is PLAIN])
def test_gradients_equal_transformers(found: dict[str, Outcome], name: str) -> None:
    _assert_equal(_transformers(), Outcome(found[name].loss, in_hf_memory(found[name].grads, PLAIN)))


@pytest.mark.parametrize(("args", "case"), [pytest.param(a, c, id=c.name) for a, c in CASES if a is not PLAIN])
def test_gradients_equal_one_process(found: dict[str, Outcome], args: ModelArgs, case: Case) -> None:
    _assert_equal(_reference(args), found[case.name])


@pytest.mark.slow
@pytest.mark.parametrize("degree", [1, 2])
def test_compiled_level_switch_equals_one_process(degree: int) -> None:
    case = Case("compiled", 2, (Level(64, 1), UPPER), compile=True, expert_parallel=degree)
    (found,) = run_distributed(_run, 2, [(BALANCED, case)])[0]
    _assert_equal(_reference(BALANCED), found)


def test_missing_balance_losses_are_detected(found: dict[str, Outcome]) -> None:
    difference = compare(_reference(PLAIN), found["ulysses, full, balance losses"])
    assert math.isclose(difference.loss, 0, abs_tol=1e-6)
    assert max(difference.grads.values()) > 1e-2


def _send_all_to_one(world: World) -> list[float]:
    """Route all rows to the second rank; return the differences of output and gradients from unsharded experts."""
    torch.manual_seed(0)
    moe = dataclasses.replace(BALANCED.moe, num_experts_per_tok=2)
    together, sharded = (MixtureOfExperts(BALANCED.hidden_size, moe, BalanceState()) for _ in range(2))
    for parameter in together.parameters():
        torch.nn.init.normal_(parameter)
    sharded.load_state_dict(together.state_dict())
    block = SimpleNamespace(mlp=sharded, experts_mlp=sharded, mlp_output_norm=torch.nn.Identity())
    apply_expert_parallel(
        SimpleNamespace(blocks=lambda: [block]), init_device_mesh("cpu", (2,), mesh_dim_names=("ep",))
    )
    # Two copies of each of 4 tokens, for experts 5 and 7.
    order_S, counts_E = sort_by_expert(torch.tensor([[5, 7]] * 4), 8)
    x_TH, weights_TK = torch.randn(2, 4, BALANCED.hidden_size)[world.rank], torch.rand(4, 2)
    found = []
    for mixture in (together, sharded):
        inputs = [x_TH.clone().requires_grad_(), weights_TK.clone().requires_grad_()]
        y_TH = mixture.run_experts(*inputs, order_S, counts_E)
        y_TH.square().sum().backward()
        found.append([y_TH, *(x.grad for x in inputs)])
    return [float((a - b).norm() / a.norm()) for a, b in zip(*found, strict=True)]


def test_rank_without_rows_takes_part() -> None:
    for differences in run_distributed(_send_all_to_one, 2):
        assert max(differences) < 1e-5


def test_rows_are_sorted_by_expert_then_sender() -> None:
    # Rank 0 sends 1 row for expert 0 and 2 for expert 1, rank 1 sends 2 and 1.
    counts_PL = torch.tensor([[1, 2], [2, 1]], dtype=torch.int32)
    assert order_by_expert(counts_PL, 6).tolist() == [0, 3, 4, 1, 2, 5]


@pytest.mark.parametrize(
    ("args", "degree", "shards", "message"),
    [
        (get_flavor("debug"), 2, 4, "no experts"),
        (BALANCED, 3, 4, "4 ranks of one copy"),
        (BALANCED, 16, 16, "8 experts"),
        (BALANCED, 2, 64, "moe_intermediate_size"),
    ],
)
def test_degree_that_does_not_fit(args: ModelArgs, degree: int, shards: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_experts(args, degree, shards)
    check_experts(BALANCED, 8, 8)
    check_experts(dataclasses.replace(BALANCED, moe=None), 1, 4)


def _engine_and_batch(world: World, level: Level, *options: str) -> tuple[Engine, PackedBatch]:
    config = load_config(["--parallelism.expert_parallel_degree=2", f"--training.seed={SEED}", *options])
    config.levels = [level]
    engine = Engine(config, BALANCED, world)
    plan = build_plan(np.array([64, 60]), config.levels, world.size, loss_tokens=np.array([34, 30]))
    samples = SimpleNamespace(sample=lambda i: (np.arange(64)[: [64, 60][i]] % 97, np.arange([64, 60][i]) > 29))
    return engine, PlanDataset(plan, samples, world.rank, BatchShapes.from_plan(plan, BALANCED.num_kv_heads))[0]  # type: ignore[arg-type]


def _lora_grads(world: World) -> list[dict[str, Tensor]]:
    found = []
    for chunk_tokens in (0, 24):
        level = Level(64, 1, ac_policy="offload", mlp_chunk_tokens=chunk_tokens)
        engine, batch = _engine_and_batch(world, level, "--lora.rank=2", "--lora.target_modules=all-linear")
        trained = {name: p for name, p in engine.model.named_parameters() if p.requires_grad}
        torch.manual_seed(world.rank)
        for parameter in trained.values():
            # Half of the adapters start at zero, and then the gradients of the others are zero.
            parameter.data.to_local().normal_(std=0.1)
        engine.forward_backward(batch)
        found.append({name: whole_tensor(p.grad) for name, p in trained.items()})
    return found


def test_chunks_leave_the_gradients_of_lora_unchanged() -> None:
    plain, chunked = run_distributed(_lora_grads, 2)[0]
    assert max(float(grad.norm()) for grad in plain.values()) > 0.01
    for name, grad in plain.items():
        assert float((chunked[name] - grad).norm()) <= 2e-6 * float(grad.norm()), name


def _count_exchanges(world: World) -> list[tuple[list[str], list[str]]]:
    return [_count_with(world, Level(64, 1, ac_policy=policy, mlp_chunk_tokens=chunk)) for policy, chunk in PLANS]


def _count_with(world: World, level: Level) -> tuple[list[str], list[str]]:
    """Return the exchanges of a forward and of its backward."""
    engine, batch = _engine_and_batch(world, level)
    calls: list[str] = []
    exchange, count = ExpertExchange.exchange, ExpertExchange.count

    def recorded(name: str, call: Any) -> Any:
        return lambda *args: (calls.append(name), call(*args))[1]  # type: ignore[func-returns-value]

    ExpertExchange.exchange, ExpertExchange.count = recorded("rows", exchange), recorded("count", count)  # type: ignore
    try:
        objective, _ = engine.forward(batch)
        forward = calls.copy()
        objective.backward()
        # The next micro-batch does the same.
        kept = calls[len(forward) :]
        engine.forward_backward(batch)
        assert calls[len(forward) + len(kept) :] == [*forward, *kept]
    finally:
        ExpertExchange.exchange, ExpertExchange.count = exchange, count  # type: ignore[method-assign]
    return forward, kept


PLANS = [*itertools.product(AC_POLICIES, (0, 24)), ("none", 64)]


def test_exchanges_of_a_layer() -> None:
    sparse = sum(BALANCED.is_sparse(layer) for layer in range(BALANCED.num_layers))
    for (policy, chunk), (forward, backward) in zip(PLANS, run_distributed(_count_exchanges, 2)[0], strict=True):
        # One wait for the device, for all chunks.
        chunks = math.ceil(64 / (chunk or 64))
        assert forward == ["count", *["rows", "rows"] * chunks] * sparse
        # Gradients of both; a recomputation sends the rows to the experts again and stops before the outputs.
        assert backward == ["rows"] * (3 if chunk or policy != "none" else 2) * chunks * sparse, (policy, chunk)
