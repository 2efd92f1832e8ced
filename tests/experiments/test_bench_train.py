"""The training benchmark: packs, measurements by hand, out of memory, level switches, the table, the command."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hbp_titan.config import load_config
from hbp_titan.data.batch import IGNORE_INDEX, PackedBatch
from hbp_titan.distributed.world import World
from hbp_titan.engine import Engine, LevelRuntime
from hbp_titan.experiments.bench_train import (
    COLUMNS,
    Bench,
    Documents,
    Measurement,
    Settings,
    SwitchCost,
    header,
    measure_switch,
    parse_documents,
    parse_policies,
    random_batches,
    relative_times,
    rows,
)
from hbp_titan.models.registry import get_flavor, num_params
from hbp_titan.packing import Level
from hbp_titan.packing.level import parse_levels
from hbp_titan.testing.local_ranks import run_distributed
from scripts import bench_train
from tests.programs import run_python
from tests.tiny_run import ARGS


def test_documents_fill_a_pack_with_the_given_median() -> None:
    assert Documents(0).lengths(8192, seed=3).tolist() == [8192]
    lengths = Documents(600).lengths(1_000_000, seed=0)
    assert lengths.sum() == 1_000_000
    assert lengths.min() >= 1
    assert np.median(lengths) == pytest.approx(600, rel=0.1)
    # Lognormal with sigma 1: 84% are below e times the median.
    assert (lengths < 600 * np.e).mean() == pytest.approx(0.84, abs=0.03)
    assert Documents(600).lengths(5000, seed=1).tolist() != Documents(600).lengths(5000, seed=2).tolist()


def test_documents_and_policies_are_parsed() -> None:
    assert parse_documents("one, 600") == (Documents(0), Documents(600))
    assert parse_policies("none, full:8, offload::64") == (("none", None, 0), ("full", 8, 0), ("offload", None, 64))
    for parse, texts in (
        (parse_documents, ("one,0", "-1", "x", "")),
        (parse_policies, ("none,all", "full:", "full:x", "full:1:2:3", "")),
    ):
        for text in texts:
            with pytest.raises(ValueError, match=r"--(documents|policies)"):
                parse(text)


def test_cp_shards_join_to_the_pack_and_dp_ranks_differ_only_in_tokens() -> None:
    level, packs = Level(64, cp_degree=2), [np.array([40, 24]), np.array([64])]
    ranks = [random_batches(packs, get_flavor("debug"), level, 5, rank) for rank in range(4)]
    wholes = [random_batches(packs, get_flavor("debug"), Level(64), 5, dp_rank) for dp_rank in range(2)]
    for dp_rank in range(2):
        for number, whole in enumerate(wholes[dp_rank]):
            shards = [ranks[2 * dp_rank + cp_rank][number] for cp_rank in range(2)]
            for name in ("input_ids", "position_ids", "labels", "loss_weights"):
                joined = torch.cat([getattr(shard, name) for shard in shards])
                assert joined.equal(getattr(whole, name)), name
            assert {shard.level for shard in shards} == {5}
    first, second = wholes[0][0], wholes[1][0]
    assert first.lengths.tolist() == second.lengths.tolist() == [40, 24]
    assert not first.input_ids.equal(second.input_ids)
    # Every token but each document's first is trained; the loss is their mean.
    assert int((first.labels != IGNORE_INDEX).sum()) == 62
    assert float(first.loss_weights.sum()) == pytest.approx(1)
    # Static shapes: one graph per level.
    assert first.document_shares.shape == wholes[0][1].document_shares.shape


DEBUG = get_flavor("debug")  # hidden 128, 4 heads and 2 kv heads of width 32, feed-forward 352, vocabulary 4096
POLICIES = parse_policies("none,full,keep_attention")
ONE = (Documents(0),)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield World(0, 1, torch.device("cpu"))
    dist.destroy_process_group()


@pytest.fixture
def without_saved_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the two extra models of `saved_bytes`, to save time."""
    monkeypatch.setattr(Bench, "_saved_bytes", lambda bench: [None] * len(bench.levels))


def _bench(world: World, lengths: str, **settings: object) -> Bench:
    settings = {"policies": POLICIES, "documents": ONE, "repeats": 1, "layers": 2, **settings}
    return Bench(load_config([]), DEBUG, world, Settings(parse_levels(lengths), **settings))  # type: ignore[arg-type]


def _measure_all(bench: Bench) -> list[Measurement]:
    return [measurement for group in bench.run() for measurement in group]


def _run_out_of_memory(monkeypatch: pytest.MonkeyPatch, when: Callable[[str, int, int], bool]) -> None:
    """Let Engine.forward run out of memory where when(ac_policy, tokens, layers of the model) is true."""
    forward = Engine.forward

    def limited(engine: Engine, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        level = engine.runtime.levels[batch.level]
        if when(level.ac_policy, len(batch.input_ids), engine.runtime.num_layers):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(engine, batch)

    monkeypatch.setattr(Engine, "forward", limited)


def test_saved_bytes_of_each_policy_by_hand(world: World) -> None:
    policies = (*POLICIES, *parse_policies("full:1,offload,offload_attention::100"))
    measured = _measure_all(_bench(world, "256", policies=policies))
    none, full, keep_attention, full_on_one, offload, offload_attention = measured
    assert {m.host_bytes for m in measured[:4]} == {0}
    assert [(m.saved_bytes, m.host_bytes) for m in (offload, offload_attention)] == [(0, 512), (0, 512 + 1552)]
    # Bytes per token in fp32. A block's input: 128 * 4.
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


def test_flops_of_documents_and_recomputation_by_hand(world: World) -> None:
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


@pytest.mark.usefixtures("without_saved_bytes")
def test_optimizer_state_and_step_are_included(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: (steps.append(1), step(self)))
    plain, stepped = (
        _measure_all(_bench(world, "64", policies=POLICIES[:1], optimizer_step=optimizer_step))[0]
        for optimizer_step in (False, True)
    )
    # Two fp32 moments per parameter.
    moments = 2 * 4 * num_params(dataclasses.replace(DEBUG, num_layers=2))
    assert (stepped.peak_bytes or 0) >= (plain.peak_bytes or 0) + moments
    # Warm-up, peak, a warm-up round and a timed one.
    assert len(steps) == 4


@pytest.mark.slow
def test_out_of_memory_is_a_row_and_not_tried_again_at_greater_lengths(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def when(policy: str, tokens: int, layers: int) -> bool:
        tried.append((policy, tokens, layers))
        return policy == "none" and tokens >= 128

    _run_out_of_memory(monkeypatch, when)
    rows = _measure_all(_bench(world, "64,128,256", layers=1))
    assert [(m.max_tokens, m.ac_policy) for m in rows if not m.fits] == [(128, "none"), (256, "none")]
    for m in rows:
        assert (m.peak_bytes is None, m.saved_bytes is None, m.seconds == []) == (not m.fits,) * 3
    # On the whole model; saved_bytes is measured on two smaller ones before.
    assert tried.count(("none", 128, 1)) == 1
    assert tried.count(("none", 256, 1)) == 0


@pytest.mark.slow
def test_auto_halves_the_layers_until_every_policy_fits(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    _run_out_of_memory(monkeypatch, lambda policy, tokens, layers: policy == "none" and tokens * layers > 200)
    rows = _measure_all(_bench(world, "32,64,128,256", layers=0))
    # 3 layers of 64 tokens would fit.
    assert [m.layers for m in rows] == [4] * 3 + [2] * 3 + [1] * 6
    # At 256 tokens one layer cannot be halved.
    assert [m.fits for m in rows] == [True] * 9 + [False, True, True]


NONE = Measurement(
    model="debug",
    layers=4,
    max_tokens=8192,
    cp_degree=2,
    documents="one",
    ac_policy="none",
    ac_layers=None,
    compile=False,
    optimizer_step=False,
    tokens=8192,
    flops=3e12,
    flops_ratio=1.0,
    saved_bytes=10264.0,
    peak_bytes=3 << 30,
    seconds=[2.0, 4.0, 2.0],
)
FULL = dataclasses.replace(
    NONE, ac_policy="full", ac_layers=3, flops_ratio=1.2, host_bytes=0.0, seconds=[3.0, 4.0, 2.5]
)


def _row_cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_row_has_throughput_mfu_memory_and_ratio() -> None:
    assert relative_times(FULL, NONE) == (1.25, 1.0, 1.5)  # 3 / 2, 4 / 4, 2.5 / 2
    names, *found = (_row_cells(line) for line in (header().splitlines()[0], *rows([NONE, FULL], peak_flops=6e12)))
    assert names == [name for name, _ in COLUMNS]
    level = ["debug", "4", "8192", "2", "one", "off"]
    # Medians of 2 and 3 seconds.
    assert found[0] == [*level, "none", "4,096", "1.5", "25.0%", "3", "10,264", "-", "2", "1.00 (1.00-1.00)", "1.00"]
    assert found[1] == [*level, "full:3", "2,731", "1", "16.7%", "3", "10,264", "0", "3", "1.25 (1.00-1.50)", "1.20"]
    lost = dataclasses.replace(NONE, seconds=[], peak_bytes=None, saved_bytes=None)
    (row,) = rows([lost], peak_flops=None)
    assert _row_cells(row)[7:] == ["out of memory", "", "", "", "-", "-", "", "", "1.00"]


LEVELS = (Level(64), Level(128, cp_degree=2, ac_policy="full"))


_ACTIVATE = LevelRuntime.activate


def _activate_with_a_new_group(runtime: LevelRuntime, index: int) -> None:
    dist.new_group()
    _ACTIVATE(runtime, index)


def _measure_both(world: World) -> list[SwitchCost]:
    """Return the cost of a level switch, and that of one that creates a process group."""
    found = measure_switch(load_config([]), ARGS, world, LEVELS, Documents(0), packs=2, repeats=2)
    LevelRuntime.activate = _activate_with_a_new_group  # type: ignore[method-assign]
    return [found, measure_switch(load_config([]), ARGS, world, LEVELS, Documents(20), packs=1, repeats=1)]


def test_level_switches_are_timed_and_create_no_process_group() -> None:
    for found, broken in run_distributed(_measure_both, 2):
        assert (found.micro_batches, found.switches, found.new_groups) == (4, 3, 0)
        assert [len(times) for times in (found.alternating, found.grouped, found.again)] == [2, 2, 2]
        assert all(ratio > 0 for ratio in found.ratios() + found.ratios(control=True))
        # Two rounds, three orders, two micro-batches.
        assert broken.new_groups == 12


def test_ratios_are_per_round() -> None:
    cost = SwitchCost([2.0, 3.3, 1.0], [2.0, 3.0, 2.0], [2.0, 2.4, 2.0], micro_batches=8, switches=7, new_groups=0)
    assert cost.ratios() == pytest.approx([1.0, 1.1, 0.5])
    assert cost.ratios(control=True) == pytest.approx([1.0, 0.8, 1.0])
    assert "alternating / grouped 1.000 (0.500-1.100), grouped / grouped 1.000 (0.800-1.000)" in str(cost)


def _report(path: Path, *words: str, ranks: int = 0, gpu: str = "") -> tuple[str, dict[str, Any]]:
    """Return what the command prints and writes. gpu: CUDA_VISIBLE_DEVICES."""
    result = run_python(
        "scripts/bench_train.py", *words, f"--json={path}", ranks=ranks, env={"CUDA_VISIBLE_DEVICES": gpu}
    )
    assert result.returncode == 0, result.stderr
    return result.stdout, json.loads(path.read_text())


def test_one_row_per_length_documents_and_policy(tmp_path: Path) -> None:
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
    # Short documents have less attention.
    assert report["measurements"][9]["flops"] < report["measurements"][6]["flops"]
    assert "CPU" in report["device"]
    assert f"command: {report['command']}" in printed


@pytest.mark.slow
def test_two_ranks_report_the_cost_of_a_level_switch(tmp_path: Path) -> None:
    words = ("--switch", "--lengths=64:1,128:2", "--policies=none,full:1", "--documents=20", "--layers=2")
    path = tmp_path / "out.json"
    printed, report = _report(path, *words, "--switch_packs=1", "--repeats=2", ranks=2)
    assert "alternating / grouped" in printed
    assert printed.count("new process groups 0") == 1  # one rank prints
    (found,) = report["measurements"]
    assert report["ranks"] == 2
    # Two lengths under two policies.
    assert (found["micro_batches"], found["switches"], found["new_groups"], len(found["grouped"])) == (4, 3, 0, 2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--layers=0", "--layers"),
        ("--repeats=0", "--repeats"),
        ("--lora.rank=4", "lora.rank"),
        ("--lengths=64:2", "cp_degree=2"),
        ("--lengths=128,64", "levels must ascend"),
        ("--flavors=large", "large"),
        ("--switch --lengths=64:2", "cp_degree=2"),
        ("--switch --layers=auto", "--layers auto"),
        ("--switch --optimizer_step", "--optimizer_step"),
        ("--repeat=3", "unknown key repeat"),
    ],
)
def test_mistakes_raise_before_anything_is_built(words: str, message: str) -> None:
    def measure() -> None:
        options, config = bench_train.parse(words.split())
        command = bench_train.switch if options.switch else bench_train.bench
        command(options, config, World(0, 1, torch.device("cpu")), options.flavors)

    with pytest.raises(ValueError, match=message):
        measure()


@pytest.mark.gpu
def test_gpu_memory_by_policy_in_bfloat16(tmp_path: Path) -> None:
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
