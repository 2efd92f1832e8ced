"""DeepSeek-V2 on two ranks against transformers on one; with balance losses, which transformers lacks, against ours."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from hbp_titan.config import load_config
from hbp_titan.distributed.world import World
from hbp_titan.models.configs import ModelArgs
from hbp_titan.models.decoder import Decoder
from hbp_titan.packing import Level
from hbp_titan.testing.equivalence import Case, Outcome, compare, reference, run_case
from hbp_titan.testing.local_ranks import run_distributed
from tests.models.deepseek_tiny import hf_model, in_hf_memory, tiny_args

SEED = 3
PLAIN = tiny_args(4)
BALANCED = tiny_args(4, moe={"aux_loss_alpha": 0.3, "device_aux_loss_alpha": 0.2, "comm_aux_loss_alpha": 0.1})
# 9 experts are not divisible by 2 ranks, so each rank has a half of every expert.
ODD = tiny_args(4, moe={"n_routed_experts": 9, "n_group": 3})
UPPER = Level(256, 2, ac_policy="full")
GATHER = dataclasses.replace(UPPER, cp_style="allgather", ac_policy="keep_attention")
CASES = [
    (PLAIN, Case("ulysses, full", 2, (Level(64, 1), UPPER))),
    (PLAIN, Case("allgather, keep_attention", 2, (Level(64, 2), GATHER))),
    (BALANCED, Case("ulysses, full, balance losses", 2, (Level(64, 1), UPPER))),
    (BALANCED, Case("allgather, several steps", 2, (Level(64, 1), GATHER), global_batch_tokens=300)),
    (BALANCED, Case("compiled, balance losses", 2, (Level(64, 1), UPPER), compile=True)),
    (BALANCED, Case("compiled, experts over 2 ranks", 2, (Level(64, 1), UPPER), compile=True, expert_parallel=2)),
    (ODD, Case("9 experts", 2, (Level(64, 1), UPPER))),
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


def _run(world: World, cases: list[tuple[ModelArgs, Case]]) -> list[Outcome]:
    config = load_config(["--compile.backend=aot_eager", f"--training.seed={SEED}"])
    return [run_case(world, config, args, case, RandomSamples()) for args, case in cases]  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def found() -> list[Outcome]:
    return run_distributed(_run, 2, CASES)[0]


def _transformers() -> Outcome:
    ours = Decoder(PLAIN)
    ours.init_weights(SEED)
    theirs, samples = hf_model(ours), RandomSamples()
    losses = []
    for tokens, mask in samples.rows:
        ids = torch.from_numpy(tokens)
        kept = torch.from_numpy(mask[1:])
        losses.append(F.cross_entropy(theirs(ids[None]).logits[0, :-1][kept], ids[1:][kept], reduction="sum"))
    loss = torch.stack(losses).sum() / int(samples.loss_tokens.sum())
    loss.backward()
    return Outcome(loss.item(), {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None})


def _reference(args: ModelArgs) -> Outcome:
    return reference(args, SEED, RandomSamples(), torch.device("cpu"))[1]  # type: ignore[arg-type]


@pytest.mark.parametrize("index", [0, 1])
def test_two_ranks_equal_transformers_on_one(found: list[Outcome], index: int) -> None:
    difference = compare(_transformers(), Outcome(found[index].loss, in_hf_memory(found[index].grads)))
    assert difference.loss < 1e-6
    assert max(difference.grads.values()) < 1e-5, difference.grads


@pytest.mark.parametrize("index", [2, 3, 4, 5, 6])
def test_gradients_are_independent_of_packs_ranks_and_steps(found: list[Outcome], index: int) -> None:
    difference = compare(_reference(CASES[index][0]), found[index])
    assert difference.loss < 1e-6
    assert max(difference.grads.values()) < 1e-5, difference.grads


def test_missing_balance_losses_are_detected(found: list[Outcome]) -> None:
    difference = compare(_reference(PLAIN), found[2])
    assert math.isclose(difference.loss, 0, abs_tol=1e-6)
    assert max(difference.grads.values()) > 1e-2
