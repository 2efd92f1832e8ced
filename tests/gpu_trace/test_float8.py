"""FP8 products on a GPU rank, traced: full graphs, a graph per setting, and each product once as in bf16."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from hbp_titan.distributed import float8
from hbp_titan.packing import Level
from tests.gpu_trace.harness import Recorder, TracedEngine
from tests.gpu_trace.test_trace import PACKS, differentiates, graphs_by_region, run_all_levels

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.skipif(
        not float8.torchao_version(),
        reason="needs torchao; run: .venv/bin/pip install --no-deps torchao==0.18.0 && scripts/run_tests.sh",
    ),
]
# Shards of 16K tokens; the last level is without float8.
LEVELS = (
    Level(16384, 1, ac_policy="full"),
    Level(131072, 8, "allgather", "keep_attention"),
    Level(65536, 4, ac_policy="none"),
    Level(65536 * 2, 8, ac_policy="full", float8=False),
)


def _products(recorder: Recorder, vocabulary: int) -> dict[str, int]:
    """Return the number of products outside of the head by operator."""
    return {"mm": recorder.products(vocabulary), "_scaled_mm": recorder.count("_scaled_mm")}


@differentiates
@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_all_policies_and_cp_styles_share_a_graph_and_recompute_no_last_product(recipe: str) -> None:
    with TracedEngine("llama3_1_8b_hbp", [f"--float8.recipe={recipe}"], levels=LEVELS, backend="fa2") as engine:
        recorders = run_all_levels(engine)
        # Keys and values of 1024 outputs are not converted; post_attention only runs with float8.
        assert graphs_by_region(engine) == {
            **dict.fromkeys(("pre_attention", "pre_keys_values", "post_attention"), 1),
            **dict.fromkeys(("pre_queries", "post_hidden"), 2),
        }
        # Both layers share those of the last product.
        assert engine.graphs_of(*float8._product_steps()) == 2
        found = [_products(recorder, engine.args.vocab_size) for recorder in recorders]
    # Of a layer: 7 products and 14 of their gradients, and 6 again; 2, 4 and 2 of them are of keys and values.
    recomputed = {"mm": 2 * (6 + 2), "_scaled_mm": 2 * (15 + 4)}
    without = {"mm": 2 * (21 + 6), "_scaled_mm": 0}
    assert found == [recomputed, recomputed, {"mm": 2 * 6, "_scaled_mm": 2 * 15}, without]


@differentiates
def test_a_switch_adds_one_graph_and_no_product() -> None:
    levels = (LEVELS[0], replace(LEVELS[0], float8=False))
    argv = ["--float8.recipe=tensorwise"]
    with TracedEngine("llama3_1_8b_hbp", argv, levels=levels, backend="fa2", layers=1) as engine:
        found = [_products(recorder, engine.args.vocab_size) for recorder in run_all_levels(engine)]
        assert graphs_by_region(engine) == {"pre_attention": 2, "post_hidden": 2}
    assert found == [{"mm": 6 + 2, "_scaled_mm": 15 + 4}, {"mm": 21 + 6, "_scaled_mm": 0}]


@differentiates
def test_float8_all_gather_moves_one_byte_of_a_converted_parameter() -> None:
    argv = ["--float8.recipe=tensorwise", "--float8.fsdp_all_gather=true"]
    with TracedEngine("llama3_1_8b_hbp", argv, levels=LEVELS[:1], backend="fa2", layers=1) as engine:
        (recorder,) = run_all_levels(engine, PACKS[:1])
        block = engine.engine.model.layers[0]
        sizes: Counter[int] = Counter()
        for name, parameter in block.named_parameters():
            linear = block.get_submodule(name.rpartition(".")[0])
            sizes[1 if hasattr(linear, "float8_state") else 2] += parameter.numel()
        # Mixed dtypes are gathered as bytes, others as elements; in forward and again in backward.
        moved = recorder.fsdp_collectives()
        assert moved["gathered"][1] == moved["gathered"][3] == sizes[1] + 2 * sizes[2]
        assert moved["reduced"][1] == sizes.total()
