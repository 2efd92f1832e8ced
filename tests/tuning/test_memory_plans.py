"""Which memory plans are tried, and what fits a machine."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from hbp_titan.config import load_config
from hbp_titan.distributed.world import World
from hbp_titan.models.flavors import DEBUG
from hbp_titan.models.registry import get_flavor
from hbp_titan.packing import Level
from hbp_titan.tuning.hardware import get_hardware
from hbp_titan.tuning.memory import MemoryEstimate, with_policy
from hbp_titan.tuning.memory_plans import (
    CHUNK_TOKENS,
    check_host_memory,
    depth_choices,
    fits_hardware,
    memory_plans,
    needed_plans,
)

LLAMA = get_flavor("llama3_1_8b")
DEVICE = ["none", "full", "keep_attention"]


def _names(levels: list[Level]) -> list[str]:
    chunks = {0: "", CHUNK_TOKENS: "/chunks"}
    groups = {1: "", 4: "/groups"}
    return [k.ac_policy + chunks[k.mlp_chunk_tokens] + groups[k.attention_head_groups] for k in levels]


@pytest.mark.parametrize(
    ("fits", "tried"),
    [
        # Nothing has to be recomputed, or only what is outside of attention.
        (lambda level: True, DEVICE),
        (lambda level: level.ac_policy == "keep_attention", DEVICE),
        # Attention would be recomputed, which host memory may avoid.
        (lambda level: level.ac_policy == "full", [*DEVICE, "offload", "offload_attention"]),
        (lambda level: level.offloads, [*DEVICE, "offload", "offload_attention"]),
        (
            lambda level: level.mlp_chunk_tokens > 0,
            [*DEVICE, "offload", "offload_attention"]
            + [f"{name}/chunks" for name in ("full", "keep_attention", "offload", "offload_attention")],
        ),
    ],
)
def test_slower_plans_are_tried_where_faster_ones_do_not_fit(fits: Callable[[Level], bool], tried: list[str]) -> None:
    form = Level(131072, 8)
    assert _names(needed_plans([form], LLAMA, fits)) == tried
    # Each form is tried once, regardless of its own plan.
    assert len(needed_plans([form, with_policy(form, "full")], LLAMA, fits)) == len(tried)


@pytest.mark.parametrize(
    ("limit", "choices"),
    [
        # Each of 8 layers keeps 10 bytes, 3 once it is checkpointed, none in host memory, next to 20 for all of them.
        (100, [(0, None), (8, 0)]),
        (70, [(3, None), (8, 0)]),
        (43, [(6, 5), (8, 1)]),
        (21, [(8, None), (8, None)]),
        (19, [(8, None), (8, None)]),
    ],
)
def test_fewest_layers_in_host_memory(limit: int, choices: list[tuple[int, int | None]]) -> None:
    def peak(level: Level) -> int:
        layers = 8 if level.ac_layers is None else level.ac_layers
        offloaded = layers if level.offload_layers is None else level.offload_layers
        return 20 + 10 * (8 - layers) + 3 * (layers - offloaded)

    found = [level for level, _ in depth_choices(peak, Level(64, ac_policy="offload"), 8, limit)]
    assert [(level.ac_layers, level.offload_layers) for level in found] == choices
    assert [level.offload_layers for level, _ in depth_choices(peak, Level(64, ac_policy="full"), 8, limit)] == [None]
    chosen = Level(64, ac_policy="offload", ac_layers=3, offload_layers=2)
    assert [level for level, _ in depth_choices(peak, chosen, 8, limit)] == [chosen]


def test_heads_that_cannot_be_grouped() -> None:
    # 8 ranks and 4 groups share 32 heads, but not the debug model's 4.
    assert [len(stage) for stage in memory_plans(Level(131072, 8), LLAMA)] == [3, 2, 4, 4]
    assert [len(stage) for stage in memory_plans(Level(4096, 2), DEBUG)] == [3, 2, 4]


def test_memory_of_the_node_is_shared_by_its_ranks() -> None:
    h100 = get_hardware("h100-80gb")
    estimate = MemoryEstimate(0, 0, 70 * 2**30, host_bytes=230 * 10**9)
    assert [fits_hardware(estimate, h100, ranks) for ranks in (1, 7, 8, 64)] == [True, True, False, False]
    assert not fits_hardware(dataclasses.replace(estimate, transient_bytes=76 * 2**30), h100, 1)


def test_start_that_needs_more_host_memory_than_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    args, world = dataclasses.replace(LLAMA, num_layers=2), World(0, 1, torch.device("cuda"))
    words = ["--model.flavor=llama3_1_8b", "--data.train_files=absent.jsonl"]
    offloading = load_config([*words, "--levels=65536:1:ulysses:offload"])
    monkeypatch.setattr("hbp_titan.tuning.memory_plans.device_memory", lambda device, ranks: 2**30)
    # Two layers of 65,536 tokens with 4096 numbers of two bytes are 1 GiB.
    check_host_memory(offloading, args, world)
    offloading.levels[0] = dataclasses.replace(offloading.levels[0], max_tokens=65536 + 1)
    with pytest.raises(ValueError, match="offload_layers"):
        check_host_memory(offloading, args, world)
    check_host_memory(load_config([*words, "--levels=131072:1:ulysses:full"]), args, world)
