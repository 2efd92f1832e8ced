"""Every model family on two ranks against transformers on one: context parallelism, recomputation, experts, windows."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from hbp_titan.models.configs import ModelArgs
from hbp_titan.models.decoder import Decoder
from hbp_titan.packing import Level
from hbp_titan.packing.level import CP_STYLES
from hbp_titan.testing.equivalence import Outcome, compare
from hbp_titan.testing.equivalence_cases import Case
from hbp_titan.testing.local_ranks import run_distributed
from tests.distributed.test_expert_parallel import SEED, RandomSamples, _assert_equal, _run
from tests.models.deepseek_tiny import hf_model, in_hf_memory
from tests.models.families import TINY
from tests.reference import token_losses

ULYSSES = Level(256, 2, ac_policy="full")
GATHER = Level(256, 2, ac_policy="keep_attention", mlp_chunk_tokens=48, cp_style="allgather")
CASES = {
    "ulysses, full": Case("ulysses, full", 2, (Level(64, 1), ULYSSES)),
    "allgather, chunks": Case("allgather, chunks", 2, (Level(64, 1), GATHER)),
    "ep 2": Case("ep 2", 2, (Level(64, 1), dataclasses.replace(ULYSSES, ac_policy="none")), expert_parallel=2),
}
CHUNKED = ("olmo2", "gemma3_text", "mistral, windows", "mixtral", "deepseek_v3")
"""Families that between them have every feature of a block."""
RUNS = [(family, "ulysses, full") for family in TINY]
RUNS += [(family, "allgather, chunks") for family in CHUNKED]
RUNS += [(family, "ep 2") for family, args in TINY.items() if args.moe is not None]


@pytest.fixture(scope="module")
def found() -> dict[tuple[str, str], Outcome]:
    results = run_distributed(_run, 2, [(TINY[family], CASES[name]) for family, name in RUNS], timeout=300)[0]
    return dict(zip(RUNS, results, strict=True))


@pytest.fixture(scope="module")
def expected() -> dict[str, Outcome]:
    return {family: _transformers(args) for family, args in TINY.items()}


def _transformers(args: ModelArgs) -> Outcome:
    ours = Decoder(args)
    ours.init_weights(SEED)
    theirs, samples = hf_model(ours), RandomSamples()
    loss = torch.cat([token_losses(theirs, *row) for row in samples.rows]).sum() / int(samples.loss_tokens.sum())
    loss.backward()
    return Outcome(loss.item(), {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None})


@pytest.mark.parametrize(("family", "name"), RUNS)
def test_loss_and_gradients_equal_transformers(
    found: dict[tuple[str, str], Outcome], expected: dict[str, Outcome], family: str, name: str
) -> None:
    ours = found[family, name]
    _assert_equal(expected[family], Outcome(ours.loss, in_hf_memory(ours.grads, TINY[family])))


@pytest.mark.parametrize("cp_backend", ["fused", pytest.param("dtensor", marks=pytest.mark.slow)])
def test_windows_equal_transformers_in_every_cp_style(expected: dict[str, Outcome], cp_backend: str) -> None:
    args = TINY["ministral"]
    cases = [Case(style, 4, (Level(64, 2, style), Level(256, 4, style))) for style in CP_STYLES]
    # Negative control: a window of another token.
    wrong = (dataclasses.replace(args, sliding_window=8), cases[-1])
    runs = [*((args, case) for case in cases), wrong]
    *found, control = run_distributed(_run, 4, runs, f"--parallelism.cp_backend={cp_backend}")[0]
    for outcome in found:
        _assert_equal(expected["ministral"], Outcome(outcome.loss, in_hf_memory(outcome.grads, args)))
    difference = compare(expected["ministral"], Outcome(control.loss, in_hf_memory(control.grads, args)))
    assert max(difference.grads.values()) > 1e-3
