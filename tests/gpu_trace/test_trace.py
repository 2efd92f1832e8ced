"""What a GPU rank runs, traced without a GPU: full graphs without recompilation, and correct kernel calls.

docs/benchmarks.md explains how to run these with other versions of torch and on CUDA tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from hbp_titan.distributed.parallelize import AFTER_ATTENTION, BEFORE_ATTENTION
from hbp_titan.models.decoder import DecoderBlock
from hbp_titan.models.documents import Documents
from hbp_titan.packing import Level
from hbp_titan.tuning.memory import with_policy
from tests.gpu_trace import kernels
from tests.gpu_trace.harness import CAN_DIFFERENTIATE, PRESETS, Recorder, TracedEngine

BACKENDS = ("torch", "fa2", "fa3", "fa4")
TORCH = tuple(map(int, torch.__version__.split(".")[:2]))
REGIONS = BEFORE_ATTENTION + AFTER_ATTENTION
# Packs of every level: a long document with short ones, and one that nearly fills the lowest level.
PACKS = ((700, 9000, 60, 3000, 1), (15000, 200, 130))

differentiates = pytest.mark.skipif(
    not CAN_DIFFERENTIATE, reason="needs a GPU; run: HBP_TRACE_DEVICE=cuda scripts/trace_all_torch.sh"
)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def graphs_by_region(engine: TracedEngine) -> dict[str, int]:
    counted = {name: engine.graphs_of(getattr(DecoderBlock, name)) for name in REGIONS}
    return {name: number for name, number in counted.items() if number}


def run_all_levels(engine: TracedEngine, packs: Sequence[Sequence[int]] = PACKS) -> list[Recorder]:
    """Run each level with each pack, switching levels, check what always holds, and return the last round."""
    rounds: list[list[Recorder]] = []
    for lengths in packs:
        graphs = len(engine.backend.graphs)
        rounds.append([engine.run(level, lengths) for level in range(len(engine.config.levels))])
        assert len(rounds) == 1 or len(engine.backend.graphs) == graphs, (
            "new documents or a level switch caused a recompilation"
        )
    assert not counters["graph_break"]
    scale = engine.args.softmax_scale or engine.args.head_dim**-0.5
    for recorder in rounds[-1]:
        assert not recorder.races, "a collective's result is read before it is waited for"
        assert not recorder.unfinished
        assert recorder.count("_local_scalar_dense") == 0
        calls = engine.kernel_calls(recorder)
        assert {call.backward for call in calls} == ({False, True} if CAN_DIFFERENTIATE else {False})
        for call in calls:
            call.check(scale, engine.args.sliding_window)
    check_regions(engine)
    return rounds[-1]


def check_regions(engine: TracedEngine) -> None:
    """Assert that no graph contains a kernel or an exchange."""
    foreign = {name for name in engine.backend.operators() if "attn" in name or "flash" in name or "c10d" in name}
    if engine.args.moe is not None:
        # The balance losses sum tokens per document and expert over cp ranks, inside the region of the router.
        foreign -= {"_c10d_functional.all_reduce.default", "_c10d_functional.wait_tensor.default"}
    assert not foreign, "kernels and exchanges belong between the compiled regions"


# Every policy without cp ranks, then every cp style with one of them: all have shards of 16K tokens.
ALL_FORMS = (
    Level(16384, 1, "ulysses", "none"),
    Level(16384, 1, "ulysses", "full"),
    Level(16384, 1, "ulysses", "keep_attention"),
    Level(131072, 8, "ulysses", "full"),
    Level(131072, 8, "allgather", "keep_attention"),
    # 8 kv heads: two groups of 8 ranks gather from each other.
    Level(262144, 16, "hybrid", "full"),
)


def test_all_policies_and_cp_styles_share_one_graph_per_region() -> None:
    with TracedEngine("llama3_1_8b_hbp", levels=ALL_FORMS, backend="fa2", layers=1) as engine:
        recorders = run_all_levels(engine)
        assert graphs_by_region(engine) == dict.fromkeys(REGIONS, 1)
        if not CAN_DIFFERENTIATE:
            return

        # Validation runs without gradients, which adds one graph per region.
        for level in range(len(ALL_FORMS)):
            engine.run(level, PACKS[0], grad=False)
        assert graphs_by_region(engine) == dict.fromkeys(REGIONS, 2)

        none, full, keep, ulysses, allgather, hybrid = recorders
        # Seven products per block in forward, twice as many in backward. Recomputation repeats all but the last one.
        vocabulary = engine.args.vocab_size
        assert [recorder.products(vocabulary) for recorder in recorders] == [21, *[21 + 6] * 5]

        # Only `full` repeats attention and the exchanges around it.
        for recorder, times in zip(recorders, (1, 2, 1, 2, 1, 2), strict=True):
            calls = engine.kernel_calls(recorder)
            backward = sum(call.backward for call in calls)
            assert len(calls) == (times + 1) * backward
            assert backward <= (6 if recorder in (allgather, hybrid) else 3)
        for recorder in (none, full, keep):
            assert not recorder.collectives()
        # Keys with values, queries, and the output; the same in backward.
        assert ulysses.collectives() == {"all_to_all_single": 3 * 3}
        assert allgather.collectives() == {"all_gather_into_tensor": 1, "reduce_scatter_tensor": 1}
        assert hybrid.collectives() == {
            "all_to_all_single": 3 * 3,
            "all_gather_into_tensor": 2,
            "reduce_scatter_tensor": 1,
        }
        # Keys and values travel while queries are projected, their gradients during the two products of q's.
        forward = "product product scatter product scatter wait wait attention"
        assert forward in ulysses.order()
        assert "scatter scatter wait product product wait" in ulysses.order()
        assert "product product gather product wait attention" in allgather.order()
        assert "attention sum product product product wait" in allgather.order()
        assert "scatter wait gather product scatter wait wait attention" in hybrid.order()
        assert "attention sum scatter wait product product wait scatter wait product" in hybrid.order()
        assert {call.tensors[0].shape[1:] for call in engine.kernel_calls(ulysses)} == {(4, 128)}
        assert {call.tensors[1].shape[1:] for call in engine.kernel_calls(hybrid)} == {(1, 128)}


@pytest.mark.parametrize("backend", ["fa2", pytest.param("torch", marks=pytest.mark.slow)])
def test_windows_on_some_layers_share_the_graphs_and_reach_every_kernel(backend: str) -> None:
    levels = (ALL_FORMS[2], ALL_FORMS[4])
    window = {"layer_types": ("full_attention", "sliding_attention"), "sliding_window": 1024}
    with TracedEngine("llama3_1_8b_hbp", levels=levels, backend=backend, model=window) as engine:
        recorders = run_all_levels(engine, PACKS[:1])
        assert set(graphs_by_region(engine).values()) == {1}
        for recorder in recorders:
            calls = engine.kernel_calls(recorder)
            bounds = {call.window[0] for call in calls if max(call.lengths_k) > 1024}
            assert bounds == {-1, 1023}
        # Gathered keys that no query of a pass attends to are left out.
        windowed = [call for recorder in recorders[1:] for call in engine.kernel_calls(recorder) if call.window[0] > 0]
        assert all(k < q + 1024 for call in windowed for q, k in zip(call.lengths_q, call.lengths_k, strict=True))


WORLD_SIZES = {
    "debug_model": 2,
    "deepseek_v2_236b_hbp": 256,
    "deepseek_v2_lite_hbp": 8,
    "deepseek_v3_hbp": 256,
    "llama3_1_8b_parallel": 512,
    "mistral_small_24b_hbp": 8,
    "olmo2_32b_hbp": 16,
    "qwen3_235b_a22b_hbp": 128,
    "qwen3_30b_a3b_hbp": 8,
}
"""Number of ranks in the presets' headers, if not 32."""


def traced(preset: str, *argv: str, **options: Any) -> TracedEngine:
    return TracedEngine(preset, argv, world_size=WORLD_SIZES.get(preset, 32), **options)


@pytest.mark.slow
def test_expert_parallelism_traces_with_its_exchanges() -> None:
    preset = traced("deepseek_v2_236b_hbp").config.levels
    chunked = replace(preset[0], mlp_chunk_tokens=preset[0].max_tokens // preset[0].cp_degree // 2)
    with traced("deepseek_v2_236b_hbp", levels=(*preset, chunked), backend="torch") as engine:
        short, long, in_chunks = run_all_levels(engine)
        # Whole shards; chunks with gradients and without.
        assert max(graphs_by_region(engine).values()) == 3
        if not CAN_DIFFERENTIATE:
            return
        # A dense layer and one with experts. Rows with their weights, and outputs, in forward and backward; rows again
        # because the preset recomputes blocks. The exchange of the row counts is not traced.
        assert short.collectives() == {"all_to_all_single": 5}
        # Each of two chunks does the same, and FSDP2 gathers the experts and reduces their gradients once for both.
        assert in_chunks.collectives() == {"all_to_all_single": 2 * 5}
        assert in_chunks.fsdp_collectives() == short.fsdp_collectives()
        # Keys with values, queries, and the output of two layers; tokens per expert of one.
        assert long.collectives() == {"all_to_all_single": 5 + 2 * 9, "all_reduce": 2}


@differentiates
def test_adapters_trace_and_reduce_no_gradient_of_the_base() -> None:
    with traced("qwen2_5_32b_hbp", "--lora.rank=8", backend="fa3", layers=1) as engine:
        recorders = run_all_levels(engine, PACKS[:1])
        assert set(graphs_by_region(engine).values()) == {1}
        trained = [p for p in engine.engine.model.parameters() if p.requires_grad]
        # FSDP2 shards whole rows: 8 rows of a narrow matrix over 32 ranks are padded to 32.
        padded = sum(-(-len(p) // 32) * 32 * p.numel() // len(p) for p in trained)
        for recorder in recorders:
            assert recorder.fsdp_collectives()["reduced"] == [padded]


@differentiates
def test_fsdp_gathers_each_block_once_per_pass_and_reduces_each_group_once() -> None:
    with traced("llama3_1_8b_hbp", backend="torch", layers=2) as engine:
        recorders = run_all_levels(engine, PACKS[:1])
        model = engine.engine.model
        block, embeddings, head = (
            sum(parameter.numel() for parameter in module.parameters())
            for module in (model.layers[0], model.tok_embeddings, model.head)
        )
        for recorder in recorders:
            moved = recorder.fsdp_collectives()
            # Forward, then backward: the head keeps its parameters, and an embedding's backward needs none.
            assert moved["gathered"] == [embeddings, block, block, head, block, block]
            assert moved["reduced"] == [head, block, block, embeddings]


POLICIES = ("none", "full", "keep_attention")


def all_forms(levels: Sequence[Level]) -> list[Level]:
    """Return each level under each policy, the longest also in the other cp styles."""
    longest = levels[-1]
    styled = [replace(longest, cp_style=style) for style in ("allgather", "hybrid")] if longest.cp_degree > 1 else []
    return [with_policy(level, policy) for level in (*levels, *styled) for policy in POLICIES]


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_traces_with_every_kernel_policy_and_cp_style(preset: str, backend: str) -> None:
    levels = traced(preset).config.levels
    # A dense layer and one with experts, if the model has both.
    layers = 2 if traced(preset).args.moe else 1
    with traced(preset, levels=all_forms(levels), backend=backend, layers=layers) as engine:
        capacity = levels[0].max_tokens
        packs = [[length * capacity // 16384 + 1 for length in lengths] for lengths in PACKS]
        run_all_levels(engine, packs)
        shards = {level.max_tokens // level.cp_degree for level in levels if not level.mlp_chunk_tokens}
        # A chunk runs without gradients in forward, and with them in backward.
        chunks = {level.mlp_chunk_tokens for level in levels if level.mlp_chunk_tokens}
        # A model with experts has two kinds of blocks, and a graph of the router for each cp group that sums counts.
        cp_shapes = {level.cp_shape(engine.args.num_kv_heads) for level in engine.config.levels}
        kinds = 1 if engine.args.moe is None else 1 + len(cp_shapes)
        assert max(graphs_by_region(engine).values()) <= (len(shards) + 2 * len(chunks)) * kinds


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_traces_with_adapters(preset: str) -> None:
    argv = ("--lora.rank=8", "--lora.target_modules=all-linear")
    with traced(preset, *argv, backend="fa2") as engine:
        capacity = engine.config.levels[0].max_tokens
        run_all_levels(engine, [[length * capacity // 16384 + 1 for length in lengths] for lengths in PACKS])


def _whole_block(engine: TracedEngine) -> None:
    """Compile every block including its attention, as before attention was moved out of the compiled regions."""
    for block in engine.engine.model.blocks():
        compiled = torch.compile(DecoderBlock.forward, backend=engine.backend, fullgraph=True, dynamic=False)
        block.forward = partial(compiled, block)


@differentiates
def test_the_trace_detects_attention_inside_a_compiled_region() -> None:
    """Negative control: what failed on every GPU before attention ran between the regions fails here too."""
    levels = (Level(16384, 1),)
    with traced("llama3_1_8b_hbp", "--compile.enable=false", levels=levels, backend="fa2", layers=1) as engine:
        _whole_block(engine)
        with kernels.installed("none"), pytest.raises(torch._dynamo.exc.Unsupported, match="flash_attn"):
            engine.run(0, PACKS[0])
        torch._dynamo.reset()

        # One tensor for the lengths of queries and keys, as in the old attention.
        batch = engine.batch(0, PACKS[0])
        group = batch.documents.whole._replace(cu_seqlens_k=batch.documents.whole.cu_seqlens_q)
        batch = replace(batch, documents=Documents((group,), group))
        if TORCH >= (2, 13):
            with pytest.raises(torch._dynamo.exc.Unsupported, match="duplicate tensor"):
                engine.run_batch(batch)
        else:
            engine.run_batch(batch)
            with pytest.raises(AssertionError, match="between the compiled regions"):
                check_regions(engine)


# The presets' 128K level over 8 ranks: shards of 16K tokens. One kv head per rank, so groups share its query heads.
MEMORY_PLANS = (
    Level(131072, 8, ac_policy="full"),
    Level(131072, 8, ac_policy="offload"),
    Level(131072, 8, ac_policy="offload_attention"),
    Level(131072, 8, ac_policy="offload", mlp_chunk_tokens=4096),
    Level(131072, 8, "allgather", "full", attention_head_groups=8),
)


@differentiates
@pytest.mark.slow
def test_memory_plans_add_no_gather_and_repeat_only_what_they_say() -> None:
    with TracedEngine("llama3_1_8b_hbp", levels=MEMORY_PLANS, backend="fa2", layers=1) as engine:
        recorders = run_all_levels(engine, PACKS[:1])
        # Whole shards, and chunks of a quarter.
        assert max(graphs_by_region(engine).values()) == 3
        full, offload, attention, chunks, groups = recorders
        moved = full.fsdp_collectives()
        for recorder in recorders:
            assert recorder.fsdp_collectives() == moved
        # Three groups of documents, in forward, recomputation and backward; gathered keys take two passes.
        assert [len(engine.kernel_calls(recorder)) for recorder in recorders] == [9, 9, 6, 9, 2 * 9 * 8]
        assert offload.collectives() == chunks.collectives() == full.collectives() == {"all_to_all_single": 3 * 3}
        assert attention.collectives() == {"all_to_all_single": 3 * 2}
        # One per group of heads, each with an eighth of the keys and values.
        assert groups.collectives() == {"all_gather_into_tensor": 8 * 2, "reduce_scatter_tensor": 8}
        # Products of one block: a chunk is recomputed to its end, and q, k and v also with the whole block.
        vocabulary = engine.args.vocab_size
        assert [r.products(vocabulary) for r in (full, offload, chunks)] == [27, 27, 4 * (7 + 3 + 7 + 2 * 7)]
