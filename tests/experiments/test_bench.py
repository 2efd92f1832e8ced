"""What a benchmark measures: memory by hand, want of memory as a row, rounds that compare like with like."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hbp_titan.config import load_config
from hbp_titan.data.batch import PackedBatch
from hbp_titan.distributed.world import World
from hbp_titan.engine import Engine
from hbp_titan.experiments.bench_train import Bench, Documents, Measurement, Settings, parse_policies
from hbp_titan.models.registry import get_flavor, num_params
from hbp_titan.packing.level import parse_levels
from hbp_titan.tuning.measured_engine import MeasuredEngine

DEBUG = get_flavor("debug")  # hidden 128, 4 heads and 2 kv heads of width 32, feed-forward 352, vocabulary 4096
POLICIES = (("none", None), ("full", None), ("keep_attention", None))
ONE = (Documents(0),)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield World(0, 1, torch.device("cpu"))
    dist.destroy_process_group()


def _bench(world: World, lengths: str, **settings: object) -> Bench:
    settings = {"policies": POLICIES, "documents": ONE, "repeats": 1, "layers": 2, **settings}
    return Bench(load_config([]), DEBUG, world, Settings(parse_levels(lengths), **settings))  # type: ignore[arg-type]


def _rows(bench: Bench) -> list[Measurement]:
    return [measurement for group in bench.run() for measurement in group]


def _run_out_of_memory(monkeypatch: pytest.MonkeyPatch, when: Callable[[str, int, int], bool]) -> None:
    """Engine.forward fails as CUDA does where `when` (ac_policy, tokens, layers of the model) says so."""
    forward = Engine.forward

    def limited(engine: Engine, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        level = engine.runtime.levels[batch.level]
        if when(level.ac_policy, len(batch.input_ids), engine.runtime.num_layers):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(engine, batch)

    monkeypatch.setattr(Engine, "forward", limited)


def test_a_layer_keeps_what_its_policy_says_and_the_peak_follows(world: World) -> None:
    policies = (*POLICIES, ("full", 1))
    none, full, keep_attention, full_on_one = _rows(_bench(world, "256", policies=policies))
    # Bytes a token in fp32. A block's input: 128 * 4.
    assert full.saved_bytes == full_on_one.saved_bytes == 512
    # And attention's q, k, v, its output and the logsumexp of 4 heads: 512 + 256 + 256 + 512 + 16.
    assert keep_attention.saved_bytes == 512 + 1552
    # And two reciprocal norms (4 each), their outputs, the residual stream in between, and the gate, its SiLU, up and
    # their product (352 * 4 each); where torch's RMSNorm is not one kernel, also both norms before their weight.
    fused = 512 + 1552 + 2 * 4 + 2 * 512 + 512 + 4 * 1408
    assert none.saved_bytes in (fused, fused + 2 * 512)
    peaks = [m.peak_bytes or 0 for m in (none, full_on_one, keep_attention, full)]
    assert peaks[0] > peaks[1] > peaks[3]
    assert peaks[0] > peaks[2] > peaks[3]
    # Parameters and their gradients are part of every peak.
    assert peaks[3] > 2 * 4 * num_params(dataclasses.replace(DEBUG, num_layers=2))


def test_flops_are_those_of_the_documents_and_recomputation_adds_its_share(world: World) -> None:
    bench = _bench(world, "256", layers=4)
    none, full, keep_attention = (bench._describe(k, Documents(0), Documents(0).lengths(256, 0)) for k in range(3))
    # A layer has 2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 352 = 184,320 parameters, the head 128 * 4096 = 524,288.
    linear = 6 * 256 * (4 * 184_320 + 524_288)
    attention = 6 * 4 * 128 * 256**2
    assert none.flops == full.flops == linear + attention
    assert none.tokens == 256
    # Again in backward: all matrices but the last (352 * 128); with "full" attention's forward, a third of it all, too.
    again = 2 * 256 * 4 * (184_320 - 45_056)
    assert none.flops_ratio == 1
    assert keep_attention.flops_ratio == pytest.approx(1 + again / none.flops)
    assert full.flops_ratio == pytest.approx(1 + (again + attention / 3) / none.flops)


def test_optimizer_state_is_held_and_its_step_belongs_to_the_iteration(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: (steps.append(1), step(self)))
    plain, stepped = (
        _rows(_bench(world, "64", policies=POLICIES[:1], optimizer_step=optimizer_step))[0]
        for optimizer_step in (False, True)
    )
    # Two fp32 moments a parameter.
    moments = 2 * 4 * num_params(dataclasses.replace(DEBUG, num_layers=2))
    assert (stepped.peak_bytes or 0) >= (plain.peak_bytes or 0) + moments
    # Making the state, warm-up, peak, a round that does not count and one that does.
    assert len(steps) == 5


@pytest.mark.slow
def test_want_of_memory_is_a_row_and_is_not_tried_again_at_greater_lengths(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def when(policy: str, tokens: int, layers: int) -> bool:
        tried.append((policy, tokens, layers))
        return policy == "none" and tokens >= 128

    _run_out_of_memory(monkeypatch, when)
    rows = _rows(_bench(world, "64,128,256", layers=1))
    assert [(m.max_tokens, m.ac_policy) for m in rows if not m.fits] == [(128, "none"), (256, "none")]
    for m in rows:
        assert (m.peak_bytes is None, m.saved_bytes is None, m.seconds == []) == (not m.fits,) * 3
    # On the whole model; what a layer keeps is tried on two small ones before.
    assert tried.count(("none", 128, 1)) == 1
    assert tried.count(("none", 256, 1)) == 0


@pytest.mark.slow
def test_auto_halves_the_layers_until_every_policy_fits(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    _run_out_of_memory(monkeypatch, lambda policy, tokens, layers: policy == "none" and tokens * layers > 200)
    rows = _rows(_bench(world, "32,64,128,256", layers=0))
    # 3 layers of 64 tokens would fit.
    assert [m.layers for m in rows] == [4] * 3 + [2] * 3 + [1] * 6
    # One layer is the least: at 256 tokens nothing is left to halve.
    assert [m.fits for m in rows] == [True] * 9 + [False, True, True]


def test_a_policy_that_fails_while_it_is_timed_leaves_the_others_their_rounds(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two depths, warm-up, peak, a round that does not count, one that does; then it fails.
    calls = iter(range(100))
    _run_out_of_memory(monkeypatch, lambda policy, tokens, layers: policy == "full" and next(calls) == 6)
    none, full, keep_attention = _rows(_bench(world, "64", repeats=3))
    assert (full.seconds, full.peak_bytes) == ([], None)
    assert len(none.seconds) == len(keep_attention.seconds) == 3


def test_policies_take_turns_at_being_first(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[int] = []

    def seconds(_: MeasuredEngine, batches: list[PackedBatch]) -> float:
        order.extend(batch.level for batch in batches)
        return 1.0

    monkeypatch.setattr(MeasuredEngine, "seconds", seconds)
    rows = _rows(_bench(world, "64", repeats=3))
    assert order == [0, 1, 2, 1, 2, 0, 2, 0, 1, 0, 1, 2]
    assert [m.seconds for m in rows] == [[1.0] * 3] * 3


def test_only_out_of_memory_is_caught(world: World) -> None:
    def fail(error: Exception) -> None:
        raise error

    args = dataclasses.replace(DEBUG, num_layers=1)
    measured = MeasuredEngine(load_config([]), args, world, parse_levels("64"))
    assert measured.attempt(lambda _: fail(torch.OutOfMemoryError("out of memory"))) is None
    assert measured._engine is None  # its state is undefined after that
    with pytest.raises(RuntimeError, match="a bug"):
        measured.attempt(lambda _: fail(RuntimeError("a bug")))


def test_policies_are_parsed_and_mistakes_named() -> None:
    assert parse_policies("none, full:8,keep_attention") == (("none", None), ("full", 8), ("keep_attention", None))
    for text, word in (("none,all", "all"), ("full:", "full:"), ("full:x", "full:x"), ("", "")):
        with pytest.raises(
            ValueError, match=f"'{word}' is not of the form policy:layers, of none, full, keep_attention"
        ):
            parse_policies(text)
