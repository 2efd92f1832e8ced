"""The parts of a micro-batch's time by hand on a toy machine, and candidates estimated from a configuration."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from hbp_titan.components.step_stats import peak_flops
from hbp_titan.components.timing import pack_loads
from hbp_titan.config import load_config
from hbp_titan.job_config import JobConfig
from hbp_titan.models.registry import get_flavor, training_flops
from hbp_titan.packing import Level, build_plan
from hbp_titan.packing.level import AC_POLICIES
from hbp_titan.preflight import cost_model
from hbp_titan.tuning.hardware import HARDWARE, get_hardware
from hbp_titan.tuning.time_model import (
    PARTS,
    ModelDims,
    Sharding,
    TimeModel,
    estimate_candidates,
    get_dims,
    most_loaded_rank,
    time_model,
)
from tests.tuning.toy import MACHINE, TOY


def pack(trained: float, squares: float) -> np.ndarray:
    return np.array([[1.0, trained, squares, 1]])


def test_computation_by_hand() -> None:
    level = Level(16, 1, ac_policy="full")
    parts = TimeModel(TOY, MACHINE, 1).parts(level, pack(10, 100))
    # 6 FLOPs x 100 parameters x 16 tokens, and 6 x 50 of the head for 10 trained ones, at 1000 FLOP/s
    assert parts["linear"][0] == pytest.approx(9.6 + 3.0)
    # (QK^T + PV) x 4 heads x 2 wide x 100 squares = 1600, thrice (backward twice), in 2 layers, at 750 FLOP/s
    assert parts["attention"][0] == pytest.approx(9.6 / 0.75)
    # forward again: 2 x (100 - 20 of the last product) x 16 tokens = 2560, and 1600 in 2 layers
    assert parts["recompute"][0] == pytest.approx(2.56 + 3.2 / 0.75)
    assert [parts[name][0] for name in ("sp", "experts", "fsdp", "host", "fixed")] == [0] * 5
    # All but attention in one of the layers.
    one = TimeModel(TOY, MACHINE, 1).parts(Level(16, 1, ac_policy="keep_attention", ac_layers=1), pack(0, 100))
    assert one["recompute"][0] == pytest.approx(1.28)


@pytest.mark.parametrize(
    ("policy", "seconds"),
    [
        # 2 x 100 x 16 tokens; "full" also 2 x 20 of the first projections again and 1600 squares in 2 layers.
        ("none", 3.2),
        ("keep_attention", 3.2),
        ("offload_attention", 3.2),
        ("full", 3.2 + 0.64 + 3.2 / 0.75),
        ("offload", 3.2 + 0.64 + 3.2 / 0.75),
    ],
)
def test_chunks_are_recomputed_to_their_end(policy: str, seconds: float) -> None:
    model = TimeModel(dataclasses.replace(TOY, first_params=20), MACHINE, 1)
    level = Level(16, ac_policy=policy, mlp_chunk_tokens=4)
    assert model.parts(level, pack(0, 100))["recompute"][0] == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("policy", "layers", "sharding", "seconds"),
    [
        # 16 tokens x 16 bytes of input in 2 layers at 100 byte/s take 5.12 s in each direction. Half of the products
        # hide them: 3.2 s forward, 6.4 backward and 2.56 of recomputation.
        ("offload", None, Sharding(), (5.12 - 1.6) + (5.12 - 4.48)),
        ("offload", 1, Sharding(), 2.56 - 1.6),
        # 80 bytes: the input, 32 of q and o, 16 of k and v, 16 of the logsumexp.
        ("offload_attention", None, Sharding(), (25.6 - 1.6) + (25.6 - 4.48)),
        ("full", None, Sharding(), 0.0),
        # 200 parameters come twice and their gradients leave, 800 bytes each.
        ("none", None, Sharding(cpu_offload=True), (8 - 1.6) + (8 - 3.2)),
        ("offload", None, Sharding(cpu_offload=True), (8 - 1.6) + (5.12 + 8 - 4.48)),
    ],
)
def test_copies_to_and_from_the_host_that_products_do_not_hide(
    policy: str, layers: int | None, sharding: Sharding, seconds: float
) -> None:
    machine = dataclasses.replace(MACHINE, pcie_bandwidth=200.0, pcie_efficiency=0.5, host_bandwidth=700.0)
    model = TimeModel(TOY, machine, 1, sharding)
    level = Level(16, ac_policy=policy, offload_layers=layers)
    assert model.parts(level, pack(0, 0))["host"][0] == pytest.approx(seconds)
    assert model.step_seconds() == pytest.approx(200 * 28 / (700 if sharding.cpu_offload else 1400))


def test_adapters_leave_out_what_is_frozen() -> None:
    machine = dataclasses.replace(MACHINE, pcie_bandwidth=200.0, pcie_efficiency=0.5, host_bandwidth=700.0)
    model = TimeModel(dataclasses.replace(TOY, adapter_params=10), machine, 1, Sharding(cpu_offload=True))
    parts = model.parts(Level(16, ac_policy="full"), pack(10, 0))
    # 4 FLOPs x 100 frozen parameters and 6 x 10 of adapters for 16 tokens, 4 x 50 of the head for 10 tokens.
    assert parts["linear"][0] == pytest.approx(7.36 + 2.0)
    assert parts["recompute"][0] == pytest.approx(2 * (100 + 10 - 20) * 16 / 1000)
    # 200 parameters of 2 bytes and 10 of 4 come twice, 4.4 s each; half of 3.68 s of products hide the first.
    assert parts["host"][0] == pytest.approx((4.4 - 1.84) + max(0, 4.4 - (3.68 + 2.88) / 2))
    assert model.step_seconds() == pytest.approx(10 * 28 / 700)
    sharded = TimeModel(model.dims, MACHINE, 4)
    # Gradients of 10 parameters of 4 bytes, instead of 200; all parameters are gathered again.
    forward, backward = sharded.fsdp_seconds(Level(16, reshard_after_forward=False))
    assert backward * 210 == pytest.approx(forward * 10 * 2)
    config = load_config(["--lora.rank=16", "--model.flavor=llama3_1_8b", "--data.train_files=absent.jsonl"])
    # Rank 16 on all seven matrices of each of 32 layers: 16 x (4096 + 4096) for q and o, and so on.
    widths = [8192, 8192, 5120, 5120, 18432, 18432, 18432]
    assert time_model(get_flavor("llama3_1_8b"), config, MACHINE, 1).dims.adapter_params == 32 * 16 * sum(widths)


def test_head_groups_send_keys_and_values_of_every_group() -> None:
    # 2 groups with a kv head each, repeated for 2 ranks: 4 heads instead of 2, and half of the exchange is hidden.
    model = TimeModel(TOY, MACHINE, 4)
    assert (model.kv_bytes_per_token(2, 1), model.kv_bytes_per_token(2, 2)) == (16, 32)
    grouped = model.exchange_seconds_per_token(Level(16, 2, attention_head_groups=2))
    assert grouped == pytest.approx(2 * 2 * (32 + 16) / 2 / 100)


def test_attention_is_charged_by_whole_tiles() -> None:
    machine = dataclasses.replace(MACHINE, attention_block=4)
    plain, tiled = (TimeModel(TOY, m, 1).parts(Level(16), pack(0, 100))["attention"][0] for m in (MACHINE, machine))
    # One document: 100 squares and 2 x 4 x 16 tokens and 3/4 of a tile of 16.
    assert tiled / plain == pytest.approx((100 + 128 + 12) / 100)
    # Over all lengths of up to 32 blocks the form has the mean of what is launched.
    lengths = np.arange(1, 129)
    blocks = -(-lengths // 4)
    launched, form = blocks * (blocks + 1) * 16, lengths**2 + 8 * lengths + 12
    assert form.mean() == pytest.approx(launched.mean(), rel=0.02)


def test_bytes_of_an_all_to_all() -> None:
    model = TimeModel(TOY, MACHINE, 4)
    # bf16: q 4 heads, k and v 2 heads each, output 4 heads, all 2 wide; 4 ranks repeat the kv heads to 4.
    assert model.query_bytes_per_token() == 2 * (8 + 8)
    assert (model.kv_bytes_per_token(2), model.kv_bytes_per_token(4)) == (2 * (4 + 4), 2 * (8 + 8))


@pytest.mark.parametrize(
    ("cp", "style", "scattered", "gathered"),
    [
        (2, "ulysses", 48 * 1 / 2 / 100, 0),  # half of it stays on the rank, half goes to the other GPU of the node
        (4, "ulysses", 64 * 2 / 4 / 10, 0),  # half goes to the other node, at 10 byte/s
        (2, "allgather", 0, 16 * 1 / 100),  # k and v of the other rank
        (4, "allgather", 0, 16 * 3 / 20),  # of three others; two adapters bring them into a node
        (4, "hybrid", 48 * 1 / 2 / 100, 16 * 1 / 10),  # heads inside the node, k and v of the other node
    ],
)
def test_exchange_by_style_and_node(cp: int, style: str, scattered: float, gathered: float) -> None:
    level = Level(16, cp, style)
    model = TimeModel(TOY, MACHINE, 4, overlaps=False)
    # Forward and backward in two layers; gathered gradients return in fp32, twice as many bytes.
    seconds = 2 * (2 * scattered + gathered + 2 * gathered)
    assert model.exchange_seconds_per_token(level) == pytest.approx(seconds)
    assert model.parts(level, pack(0, 0))["sp"][0] == pytest.approx(16 / cp * seconds)
    # Recomputing a layer exchanges once more, unless its attention is kept.
    full = dataclasses.replace(level, ac_policy="full", ac_layers=1)
    kept = dataclasses.replace(level, ac_policy="keep_attention")
    assert model.exchange_seconds_per_token(full) == pytest.approx(seconds + scattered + gathered)
    assert model.exchange_seconds_per_token(kept) == pytest.approx(seconds)


def test_exchange_overlaps_with_the_projection_of_queries() -> None:
    level, fast = Level(16, 2), dataclasses.replace(MACHINE, linear_efficiency=2.0)
    # k and v: 16 bytes, half to the other GPU at 100 byte/s, 0.08 s. The projection: 2 x 8 x 8 FLOPs at 2000 FLOP/s,
    # 0.064 s forward and twice that backward: 0.016 s of the exchange shows in each of two layers' forward.
    shows, hidden = (TimeModel(TOY, fast, 4, overlaps=o).exchange_seconds_per_token(level) for o in (False, True))
    assert shows == pytest.approx(2 * 2 * 48 / 2 / 100)
    assert hidden == pytest.approx(shows - 2 * (0.064 + 0.08))


def test_fsdp_traffic_and_the_part_hidden_by_computation() -> None:
    # 200 parameters; each rank lacks half: gathered as 2 bytes at 100 byte/s, reduced as 4; backward gathers the 100 of
    # the layers again.
    level, kept = Level(16), Sharding(reshard_after_forward=False)
    assert TimeModel(TOY, MACHINE, 2).fsdp_seconds(level) == pytest.approx((2.0, 4.0 + 1.0))
    assert TimeModel(TOY, MACHINE, 2, kept).fsdp_seconds(level) == pytest.approx((2.0, 4.0))
    # A level's own setting counts.
    for resharded, again in ((True, 1.0), (False, 0.0)):
        own = dataclasses.replace(level, reshard_after_forward=resharded)
        assert TimeModel(TOY, MACHINE, 2, kept).fsdp_seconds(own) == pytest.approx((2.0, 4.0 + again))
    # Two nodes: three quarters, at the 20 byte/s of a node's adapters; or again from the other rank of the node.
    assert TimeModel(TOY, MACHINE, 4).fsdp_seconds(level) == pytest.approx((15.0, 30.0 + 7.5))
    in_node = dataclasses.replace(level, reshard_after_forward=2)
    assert TimeModel(TOY, MACHINE, 4).fsdp_seconds(in_node) == pytest.approx((15.0, 30.0 + 1.0))
    # Copies on two nodes: gathered inside the node. Once a step each rank's half of the gradients, 400 bytes, crosses
    # twice x 1/2.
    copies, one = TimeModel(TOY, MACHINE, 4, Sharding(dp_replicate=2)), TimeModel(TOY, MACHINE, 2)
    assert copies.fsdp_seconds(level) == pytest.approx((2.0, 4.0 + 1.0))
    assert copies.step_seconds() - one.step_seconds() == pytest.approx(40.0)
    # Matrix products of 16 tokens: 3.2 s forward, 6.4 backward; of 8 tokens: 1.6 and 3.2.
    model = TimeModel(TOY, MACHINE, 2)
    assert model.parts(Level(16), pack(0, 0))["fsdp"][0] == 0
    assert model.parts(Level(8), pack(0, 0))["fsdp"][0] == pytest.approx(0.4 + 1.8)


def test_launches_are_exposed_only_if_longer_than_the_matrix_products() -> None:
    machine = dataclasses.replace(MACHINE, launch_seconds=0.01)
    model = TimeModel(TOY, machine, 1, fixed_seconds=0.5)
    # 2 layers x 150 kernels x 0.01 s = 3 s; one token takes 0.6 s.
    assert model.parts(Level(1), pack(0, 0))["fixed"][0] == pytest.approx(2.4 + 0.5)
    assert model.parts(Level(16), pack(0, 0))["fixed"][0] == 0.5


def test_gathers_and_exchange_of_experts() -> None:
    moe = dataclasses.replace(TOY, body_params=500, expert_params=400, experts_per_token=1)
    # 200 dense parameters over 4 ranks on two nodes as above; each rank gathers half of the experts, 200, from one
    # other rank, alone on its node: half of 200 x 2 bytes at 10 byte/s.
    model = TimeModel(moe, MACHINE, 4, Sharding(expert_parallel=2))
    assert model.fsdp_seconds(Level(16))[0] == pytest.approx(15.0 + 20.0)
    # To and fro, 8 wide, bf16: 32 bytes, half to the other rank of the node, forward and backward in two layers.
    assert model.parts(Level(16), pack(0, 0))["experts"][0] == pytest.approx(16 * 32 / 2 / 100 * 4)
    # Chunks and recomputation send rows to the experts once more, not back.
    for level in (Level(16, mlp_chunk_tokens=4), Level(16, ac_policy="full")):
        assert model.parts(level, pack(0, 0))["experts"][0] == pytest.approx(16 * 32 / 2 / 100 * 5)


def test_a_layer_waits_for_the_most_loaded_rank_of_the_expert_group() -> None:
    # A token uses 1 of 4 experts of 100 parameters.
    moe = dataclasses.replace(
        TOY, body_params=500, active_body_params=200, expert_params=400, experts_per_token=1, num_experts=4
    )
    even, uneven = (TimeModel(moe, MACHINE, 4, Sharding(expert_parallel=2, expert_load_deviation=d)) for d in (0, 0.5))
    parts, more = (model.parts(Level(16, ac_policy="full"), pack(0, 0)) for model in (even, uneven))
    # Two ranks of two experts each: the larger of two normal values is at 0.59.
    assert uneven.expert_rank_load == pytest.approx(1 + 0.5 * 0.5**0.5 * 0.59, abs=1e-3)
    products = parts["linear"][0] + parts["recompute"][0]
    excess = uneven.expert_rank_load - 1
    assert more.pop("experts")[0] == pytest.approx(parts.pop("experts")[0] * (1 + excess) + excess * products / 2)
    assert more == parts
    assert dataclasses.replace(uneven, sharding=Sharding(expert_load_deviation=0.5)).expert_rank_load == 1


@pytest.mark.parametrize(("experts", "ranks"), [(160, 2), (160, 8), (256, 32), (64, 64)])
def test_load_of_the_most_loaded_rank_is_that_of_random_experts(experts: int, ranks: int) -> None:
    loads = np.random.default_rng(0).normal(1, 0.25, (20000, ranks, experts // ranks)).mean(2)
    assert most_loaded_rank(experts, ranks, 0.25) == pytest.approx(loads.max(1).mean(), abs=0.005)


@pytest.mark.parametrize("policy", AC_POLICIES)
@pytest.mark.parametrize(("cp", "style"), [(1, "ulysses"), (8, "ulysses"), (16, "hybrid")])
def test_level_time_is_the_sum_of_the_parts(policy: str, cp: int, style: str) -> None:
    model = TimeModel(get_dims("llama3_1_8b"), get_hardware("h100-80gb"), 32, fixed_seconds=0.01)
    level = Level(131072, cp, style, ac_policy=policy, ac_layers=20)
    rng = np.random.default_rng(0)
    loads = np.stack([np.ones(50), *rng.integers(0, 10**9, (3, 50))], axis=1).astype(float)
    parts = model.parts(level, loads)
    assert tuple(parts) == PARTS
    np.testing.assert_allclose(model.level_time(level).seconds(loads), sum(parts.values()), rtol=1e-12)


@pytest.mark.parametrize("adapters", [0, 41_943_040])
def test_flops_equal_those_of_the_metrics(adapters: int) -> None:
    args = get_flavor("llama3_1_8b")
    machine = dataclasses.replace(get_hardware("h100-80gb"), linear_efficiency=1.0)
    machine = dataclasses.replace(machine, attention_efficiency=1.0, attention_block=0)
    dims = dataclasses.replace(ModelDims.from_args(args), adapter_params=adapters)
    parts = TimeModel(dims, machine, 1).parts(Level(1000), pack(1000, 300_000))
    seconds = parts["linear"][0] + parts["attention"][0]
    assert seconds * 989e12 == pytest.approx(training_flops(args, 1000, 300_000, adapters))


def test_windows_shorten_attention_alone() -> None:
    windows = {"layer_types": (("full_attention",) + ("sliding_attention",) * 3) * 8, "sliding_window": 4096}
    args = get_flavor("llama3_1_8b")
    plain, windowed = args, dataclasses.replace(args, **windows)
    found = {}
    for model in (plain, windowed):
        plan = build_plan([131072], [Level(131072)], 1, cost=cost_model(model))
        time = TimeModel(ModelDims.from_args(model), get_hardware("h100-80gb"), 8)
        assert time.dims.squares(np.array([131072])) == plan.pack_sum_sq
        found[model.sliding_window] = time.parts(Level(131072), pack_loads(plan))
    # Three of four layers attend to 4096 tokens of up to 131072: 1/4 + 3/4 * (1 - (31/32)^2).
    share = found[4096]["attention"] / found[None]["attention"]
    assert share == pytest.approx(1 / 4 + 3 / 4 * (1 - (31 / 32) ** 2), rel=0.01)
    assert found[4096]["linear"] == found[None]["linear"]


def test_published_parameter_counts() -> None:
    dims = get_dims("deepseek_v2_236b")
    assert round(dims.params / 1e9) == 236
    # 21B active: the layers' and the head's, with the embedding.
    assert round((dims.active_body_params + 2 * dims.head_params) / 1e9) == 21
    assert get_dims("llama3_1_8b").params == 8_030_261_248
    with pytest.raises(ValueError, match="did you mean llama3_1_8b"):
        get_dims("llama3_1_8")


def test_lookup_ignores_case_and_suggests_names() -> None:
    assert get_hardware(" H100-80GB").peak_flops == 989e12
    assert peak_flops(torch.device("cpu")) is None
    with pytest.raises(ValueError, match="did you mean h100-80gb"):
        get_hardware("h100-80")


def test_memory_is_slightly_below_the_nominal_size() -> None:
    for name, hardware in HARDWARE.items():
        named = int(name.split("-")[1].removesuffix("gb"))
        assert 0.98 * named < hardware.memory_bytes / 2**30 < named


def test_ring_across_nodes_is_limited_by_the_adapters() -> None:
    h100 = get_hardware("h100-80gb")
    assert h100.bus_bandwidth(8, 8) == 450e9
    assert h100.bus_bandwidth(32, 8) == 400e9
    assert h100.bus_bandwidth(4, 1) == 50e9


ARGS = get_flavor("llama3_1_8b")
H100 = get_hardware("h100-80gb")
LIMIT = int(H100.memory_bytes * 0.95)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """10 GiB, and 4 GiB for each layer that is not checkpointed: 16 layers and 10 GiB fit into 75.1 GiB."""

    def estimate_memory(args: Any, level: Level, config: JobConfig, world_size: int, **_: Any) -> SimpleNamespace:
        layers = args.num_layers if level.ac_layers is None else level.ac_layers
        kept = args.num_layers - (0 if level.ac_policy == "none" else layers)
        host = 1 << 40 if level.offloads else 0
        return SimpleNamespace(peak_bytes=(10 + 4 * kept) * 2**30, host_bytes=host)

    monkeypatch.setattr("hbp_titan.tuning.time_model.estimate_memory", estimate_memory)


@pytest.mark.usefixtures("memory")
def test_open_depth_becomes_the_fewest_layers_that_fit_and_a_given_one_is_unchanged() -> None:
    full, keep = Level(16384, 1, ac_policy="full"), Level(131072, 8, ac_policy="keep_attention")
    given = [Level(16384), dataclasses.replace(full, ac_layers=3), dataclasses.replace(keep, ac_layers=20)]
    found = estimate_candidates(ARGS, JobConfig(), H100, 32, [full, keep, *given])
    assert [c.level for c in found] == [*(dataclasses.replace(level, ac_layers=16) for level in (full, keep)), *given]
    assert [c.fits for c in found] == [True, True, False, False, True]
    assert [c.peak_bytes for c in found[:3]] == [74 * 2**30, 74 * 2**30, 138 * 2**30]
    assert found[0].time == time_model(ARGS, JobConfig(), H100, 32).level_time(found[0].level)
    assert found[2].time is None
    # 1 TiB in host memory fits a rank alone on its node, not 8 of them.
    offload = dataclasses.replace(full, ac_policy="offload")
    assert [estimate_candidates(ARGS, JobConfig(), H100, n, [offload])[0].fits for n in (1, 8)] == [True, False]
    # No depth fits: all layers are checkpointed.
    tiny = dataclasses.replace(H100, memory_bytes=2**30)
    (candidate,) = estimate_candidates(ARGS, JobConfig(), tiny, 32, [full])
    assert (candidate.fits, candidate.level.ac_layers, candidate.peak_bytes) == (False, 32, 10 * 2**30)


def test_sharding_follows_the_configuration() -> None:
    config = JobConfig()
    config.parallelism.reshard_after_forward = False
    config.training.mixed_precision_reduce = "bfloat16"
    sharding = time_model(ARGS, config, H100, 32).sharding
    assert (sharding.reshard_after_forward, sharding.param_bytes, sharding.reduce_bytes) == (False, 2, 2)
