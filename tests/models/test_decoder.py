"""The decoder against transformers (logits and every gradient, document by document), and its own interfaces."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hbp_titan.models.attention import VarlenAttention, varlen_attention
from hbp_titan.models.configs import ModelArgs
from hbp_titan.models.decoder import Decoder, init_parameter
from hbp_titan.models.documents import Documents, pack_documents
from tests.models import deepseek_tiny, families
from tests.models.deepseek_tiny import hf_model, in_hf_memory, random_model

LENGTHS = (1, 23, 9, 40)
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    # Small enough that the eight frequencies of a 16-wide head cover all three ranges.
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
WINDOWS: dict[str, Any] = {
    "layer_types": ("sliding_attention", "full_attention", "sliding_attention"),
    "sliding_window": 10,
}


def tiny_args(hf_model_type: str, heads: int, kv_heads: int, *, tied: bool, **changes: Any) -> ModelArgs:
    args = ModelArgs(
        name="tiny",
        hf_model_type=hf_model_type,
        hidden_size=48,
        intermediate_size=80,
        num_layers=3,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=16 if hf_model_type == "qwen3" else 48 // heads,
        vocab_size=97,
        max_position_embeddings=4096,
        rope_theta=10000.0,
        rope_scaling=LLAMA3_SCALING if hf_model_type == "llama" else None,
        norm_eps=1e-5,
        qkv_bias=hf_model_type == "qwen2",
        qk_norm=hf_model_type == "qwen3",
        tie_embeddings=tied,
    )
    return dataclasses.replace(args, **changes)


def build_pair(args: ModelArgs, seed: int) -> tuple[Decoder, nn.Module]:
    """Return our model with every parameter random and the transformers model with the same weights."""
    ours = random_model(args, seed)
    return ours, hf_model(ours)


def make_pack(args: ModelArgs, seed: int, first_position: int = 0) -> dict[str, Any]:
    return deepseek_tiny.make_pack(args, LENGTHS, seed, first_position)


def hf_logits(theirs: nn.Module, pack: dict[str, Any]) -> Tensor:
    """Return the logits of transformers, run one document at a time."""
    documents = zip(pack["input_ids_T"].split(LENGTHS), pack["position_ids_T"].split(LENGTHS), strict=True)
    return torch.cat([theirs(input_ids=ids[None], position_ids=at[None]).logits[0] for ids, at in documents])


def largest_difference(ours: Decoder, theirs: nn.Module, pack: dict[str, Any]) -> float:
    """Return the largest relative error (2-norm) over the logits and the gradient of each parameter."""
    logits, expected = ours(**pack), hf_logits(theirs, pack)
    targets = pack["input_ids_T"].roll(-1)
    for model, scores in ((ours, logits), (theirs, expected)):
        model.zero_grad()
        F.cross_entropy(scores, targets).backward()
    wanted = {"logits": expected.detach(), **_grads(theirs)}
    found = {"logits": logits.detach(), **in_hf_memory(_grads(ours), ours.args)}
    assert found.keys() == wanted.keys()
    return max(((found[name] - grad).norm() / grad.norm()).item() for name, grad in wanted.items())


def _grads(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


deepseek = deepseek_tiny.tiny_args
GREEDY = {"topk_method": "greedy", "n_group": 1, "topk_group": 1}
LAYOUTS = {
    "llama mqa": tiny_args("llama", 3, 1, tied=False),
    "llama gqa tied": tiny_args("llama", 6, 2, tied=True),
    "llama mha": tiny_args("llama", 3, 3, tied=False),
    "qwen2 gqa": tiny_args("qwen2", 6, 3, tied=False),
    "qwen2 mqa tied": tiny_args("qwen2", 3, 1, tied=True),
    "qwen3": tiny_args("qwen3", 4, 2, tied=False),
    "qwen3 tied": tiny_args("qwen3", 4, 2, tied=True),
    "windows shorter than two documents": tiny_args("qwen2", 6, 3, tied=False, **WINDOWS),
    "windows of two tokens": tiny_args("qwen3", 4, 2, tied=False, **WINDOWS | {"sliding_window": 2}),
    "deepseek": deepseek(),
    "one group of four": deepseek(moe={"topk_group": 1, "num_experts_per_tok": 2}),
    "greedy, queries without latent": deepseek(4, mla={"q_lora_rank": None}, moe=GREEDY),
    "one expert per token": deepseek(moe=GREEDY | {"num_experts_per_tok": 1, "routed_scaling_factor": 16.0}),
    "every expert": deepseek(moe=GREEDY | {"num_experts_per_tok": 8}),
    "two dense layers, tied": deepseek(moe={"first_k_dense_replace": 2}, tie_embeddings=True),
    "no dense layer, one shared expert": deepseek(moe={"first_k_dense_replace": 0, "n_shared_experts": 1}),
    "values as wide as keys": deepseek(2, mla={"v_head_dim": 24}),
    "one head, plain rope": deepseek(1, rope_scaling=None),
    **families.TINY,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_and_gradients_equal_transformers_per_document(layout: str) -> None:
    for seed in (0, 1):
        assert largest_difference(*build_pair(LAYOUTS[layout], seed), make_pack(LAYOUTS[layout], seed)) < 1e-5


@pytest.mark.parametrize(
    "args",
    [
        *(tiny_args("llama", 3, 1, tied=False, rope_scaling=scaling) for scaling in (LLAMA3_SCALING, None)),
        tiny_args("qwen2", 3, 1, tied=False, rope_scaling=YARN),
        tiny_args(
            "qwen2", 3, 1, tied=False, rope_scaling=YARN | {"truncate": False, "beta_fast": 8.0, "beta_slow": 2.0}
        ),
        tiny_args("qwen3", 4, 2, tied=False, rope_scaling=YARN | {"attention_factor": 1.3}),
        tiny_args("qwen3", 4, 2, tied=False, rope_scaling=YARN, **WINDOWS),
        tiny_args("qwen3", 4, 2, tied=False, rope_scaling=YARN | {"mscale": 0.7, "mscale_all_dim": 1.1}),
        deepseek(),
        deepseek(rope_scaling=deepseek_tiny.YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}),
        deepseek(rope_scaling=YARN | {"factor": 40.0}),
        deepseek(rope_scaling=None),
    ],
    ids=str,
)
def test_distant_positions_rotate_as_in_transformers(args: ModelArgs) -> None:
    args = dataclasses.replace(args, max_position_embeddings=131072)
    assert largest_difference(*build_pair(args, 5), make_pack(args, 5, first_position=130000)) < 1e-5


LLAMA, DEEPSEEK = tiny_args("llama", 3, 1, tied=False), deepseek()
WINDOWED = tiny_args("qwen2", 3, 1, tied=False, **WINDOWS)


@pytest.mark.parametrize(
    ("args", "other"),
    [
        (LLAMA, dataclasses.replace(LLAMA, rope_scaling=None)),
        (tiny_args("qwen2", 3, 1, tied=False, rope_scaling=YARN), tiny_args("qwen2", 3, 1, tied=False)),
        *((WINDOWED, dataclasses.replace(WINDOWED, sliding_window=window)) for window in (9, 11, 40)),
        (WINDOWED, dataclasses.replace(WINDOWED, layer_types=WINDOWED.layer_types[1:] + WINDOWED.layer_types[:1])),
        (DEEPSEEK, deepseek(rope_scaling=None)),
        (DEEPSEEK, deepseek(rope_scaling=deepseek_tiny.YARN | {"mscale": 1.0, "mscale_all_dim": 1.0})),
        (DEEPSEEK, deepseek(moe={"topk_group": 3})),
        (DEEPSEEK, deepseek(moe={"routed_scaling_factor": 1.0})),
    ],
)
def test_the_comparison_detects_another_architecture_with_the_same_weights(args: ModelArgs, other: ModelArgs) -> None:
    theirs = hf_model(random_model(args, 0))
    assert largest_difference(random_model(other, 0), theirs, make_pack(args, 0)) > 1e-4


def test_a_pad_token_inside_documents_learns_here_but_not_in_transformers() -> None:
    # Where pad is the end token, transformers' padding_idx drops the gradient of its row in the lookup.
    args = LAYOUTS["llama gqa tied"]
    ours, theirs = build_pair(args, 0)
    pack = make_pack(args, 0)
    pad = int(pack["input_ids_T"][3])
    assert largest_difference(ours, theirs, pack) < 1e-5
    theirs.model.embed_tokens.padding_idx = pad
    assert largest_difference(ours, theirs, pack) > 1e-3
    found, expected = in_hf_memory(_grads(ours), ours.args), _grads(theirs)
    rows = (found["model.embed_tokens.weight"] - expected["model.embed_tokens.weight"]).norm(dim=1)
    assert rows.argmax() == pad
    assert rows.sum() - rows[pad] < 1e-4 * rows[pad]


def test_the_comparison_detects_attention_across_documents() -> None:
    pack = make_pack(LLAMA, 0) | {"documents": pack_documents([sum(LENGTHS)])}
    assert largest_difference(*build_pair(LLAMA, 0), pack) > 1e-2


def test_head_fn_receives_normalized_states_and_the_output_matrix() -> None:
    args = tiny_args("llama", 3, 1, tied=True)
    model = random_model(args, 0)
    pack = make_pack(args, 0)
    total, weight = model(**pack, head_fn=lambda hidden, weight: (F.linear(hidden, weight).sum(), weight))
    torch.testing.assert_close(total, model(**pack).sum())
    assert weight is model.tok_embeddings.weight


def _half_checkpointed(block: nn.Module, x: Tensor, cos: Tensor, sin: Tensor, documents: Documents) -> Tensor:
    """A forward as activation checkpointing sets it: the halves recomputed, attention kept."""
    q, k, v = checkpoint(block.pre_attention, x, cos, sin, use_reentrant=False)
    o = block.inner_attention(q, k, v, documents)
    return checkpoint(block.post_attention, x, o, use_reentrant=False)


def test_replacing_block_forward_and_inner_attention_from_outside_changes_nothing() -> None:
    args = tiny_args("qwen2", 6, 3, tied=False)
    plain = Decoder(args)
    plain.init_weights(0)
    wrapped = copy.deepcopy(plain)
    calls = []

    class Counting(VarlenAttention):
        def forward(self, *inputs: Any) -> Tensor:
            calls.append(inputs[0].shape)
            return varlen_attention(*inputs)

    for block in wrapped.layers:
        block.inner_attention = Counting()
        block.forward = lambda *inputs, block=block: _half_checkpointed(block, *inputs)
    pack = make_pack(args, 0)
    for model in (plain, wrapped):
        model(**pack).square().mean().backward()
    assert len(calls) == args.num_layers  # not called again in the backward
    for ours, theirs in zip(plain.parameters(), wrapped.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert torch.equal(ours.grad, theirs.grad)


def test_regions_around_attention_compile_in_one_graph_each_for_all_packs() -> None:
    # Dense and sparse layers are two kinds of post_attention, each with its own graph.
    args = deepseek(moe={"aux_loss_alpha": 0.1})
    models = random_model(args, 0), random_model(args, 0)
    graphs = []

    def counting_backend(module: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(module)
        return module.forward

    torch._dynamo.reset()
    for block in models[1].layers:
        for region in ("pre_attention", "post_attention"):
            whole = torch.compile(getattr(block, region), fullgraph=True, dynamic=False, backend=counting_backend)
            setattr(block, region, whole)
    for seed, lengths in ((0, LENGTHS), (1, (50, 10, 12, 1))):
        pack = deepseek_tiny.make_pack(args, lengths, seed)
        documents = torch.arange(4).repeat_interleave(torch.tensor(lengths))
        for model in models:
            model.zero_grad()
            model.balance.set_documents(documents, torch.tensor([0.1, 0.2, 0.3, 0.4]))
            model(**pack).square().mean().backward()
        for eager, compiled in zip(*(model.parameters() for model in models), strict=True):
            torch.testing.assert_close(compiled.grad, eager.grad, rtol=1e-4, atol=1e-6)
        assert torch.equal(*[torch.stack(list(model.tokens_per_expert().values())) for model in models])
    assert len(graphs) == 1 + 2


def test_the_parts_of_a_region_equal_the_region() -> None:
    block = Decoder(tiny_args("qwen3", 4, 2, tied=True)).layers[0]
    x, o = torch.randn(5, block.input_layernorm.weight.numel()), torch.randn(5, 4, 16)
    cos, sin = torch.randn(5, 16), torch.randn(5, 16)
    parts = (block.pre_queries(x, cos, sin), *block.pre_keys_values(x, cos, sin))
    assert all(torch.equal(part, whole) for part, whole in zip(parts, block.pre_attention(x, cos, sin), strict=True))
    assert torch.equal(block.last_product(*block.post_hidden(x, o)), block.post_attention(x, o))


def test_initial_weights_depend_on_seed_and_name_alone() -> None:
    args = tiny_args("qwen2", 6, 3, tied=False)
    first, second = Decoder(args), Decoder(args)
    first.init_weights(7)
    torch.manual_seed(123)
    second.init_weights(7)
    for (fqn, parameter), other in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(parameter, other)
        assert torch.equal(parameter, init_parameter(args, fqn, parameter.shape, 7))
    weights = dict(first.named_parameters())
    assert torch.equal(weights["layers.0.input_layernorm.weight"], torch.ones(48))
    assert torch.equal(weights["head.norm.weight"], torch.ones(48))
    assert torch.equal(weights["layers.1.self_attn.k_proj.bias"], torch.zeros(24))
    up, down = weights["layers.0.mlp.up_proj.weight"], weights["layers.0.mlp.down_proj.weight"]
    assert not torch.equal(up, weights["layers.1.mlp.up_proj.weight"])
    assert up.std().item() == pytest.approx(0.02, rel=0.05)
    assert down.std().item() == pytest.approx(0.02 / 6**0.5, rel=0.05)
    assert not torch.equal(up, init_parameter(args, "layers.0.mlp.up_proj.weight", up.shape, 8))


def test_a_model_built_on_the_meta_device_equals_one_built_directly() -> None:
    args = tiny_args("llama", 3, 1, tied=True)
    direct = Decoder(args)
    direct.init_weights(0)
    with torch.device("meta"):
        late = Decoder(args)
    late.to_empty(device="cpu")
    late.init_weights(0)
    assert late.head.output.weight is late.tok_embeddings.weight
    pack = make_pack(args, 0)
    assert torch.equal(late(**pack), direct(**pack))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_heads": 4}, "num_kv_heads=4"),
        ({"head_dim": 7}, "head_dim=7"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "longrope"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "no original_max_position_embeddings"),
        ({"rope_scaling": YARN | {"low_freq_factor": 1.0}}, "has low_freq_factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "no low_freq_factor"),
        ({"layer_types": ("full_attention",) * 2}, "layer_types has 2 entries for 3 layers"),
        ({"layer_types": ("full_attention", "mamba", "full_attention")}, "mamba"),
        ({"layer_types": ("sliding_attention",) * 3}, "sliding_window=None"),
    ],
)
def test_unsupported_architectures_raise(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_args("llama", 6, 2, tied=False, **changes)
