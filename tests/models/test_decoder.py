"""The decoder against transformers: logits and every gradient, document by document; and its own seams."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from hbp_titan.models.attention import VarlenAttention, varlen_attention
from hbp_titan.models.configs import ModelArgs
from hbp_titan.models.decoder import Decoder, init_parameter
from hbp_titan.models.documents import Documents, pack_documents
from hbp_titan.models.hf import to_hf_name
from hbp_titan.models.hf_config import args_to_hf_config

LENGTHS = (1, 23, 9, 40)
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    # Small enough that the eight frequencies of a 16-wide head fall in all three bands.
    "original_max_position_embeddings": 64,
}


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


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
    """Our model with every parameter random (norms and biases too) and the transformers model with the same weights."""
    ours = Decoder(args)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_(std=0.2, generator=generator)
    config = transformers.AutoConfig.for_model(**args_to_hf_config(args))
    theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    missing = theirs.load_state_dict({to_hf_name(k): v for k, v in ours.state_dict().items()}, strict=False)
    assert missing.missing_keys == []
    assert missing.unexpected_keys == []
    return ours, theirs.eval()


def make_pack(args: ModelArgs, seed: int, first_position: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed + 1)
    num_tokens = sum(LENGTHS)
    return {
        "input_ids_T": torch.randint(args.vocab_size, (num_tokens,), generator=generator),
        "position_ids_T": torch.cat([torch.arange(n) for n in LENGTHS]) + first_position,
        "documents": pack_documents(LENGTHS),
    }


def hf_logits(theirs: nn.Module, pack: dict[str, Any]) -> Tensor:
    """transformers, one document at a time: it never sees a pack."""
    documents = zip(pack["input_ids_T"].split(LENGTHS), pack["position_ids_T"].split(LENGTHS), strict=True)
    return torch.cat([theirs(input_ids=ids[None], position_ids=at[None]).logits[0] for ids, at in documents])


def largest_difference(ours: Decoder, theirs: nn.Module, pack: dict[str, Any]) -> float:
    """The largest relative error (2-norm) over the logits and the gradient of each parameter."""
    logits, expected = ours(**pack), hf_logits(theirs, pack)
    targets = pack["input_ids_T"].roll(-1)
    for model, scores in ((ours, logits), (theirs, expected)):
        model.zero_grad()
        F.cross_entropy(scores, targets).backward()
    pairs = [(logits, expected)]
    hf_parameters = dict(theirs.named_parameters())
    for fqn, parameter in ours.named_parameters():
        assert parameter.grad is not None
        pairs.append((parameter.grad, hf_parameters[to_hf_name(fqn)].grad))
    assert len(pairs) == 1 + len(hf_parameters)
    return max(((found - wanted).norm() / wanted.norm()).item() for found, wanted in pairs)


LAYOUTS = [("llama", 3, 1), ("llama", 6, 2), ("llama", 3, 3), ("qwen2", 6, 3), ("qwen2", 3, 1), ("qwen3", 4, 2)]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("hf_model_type", "heads", "kv_heads"), LAYOUTS)
def test_logits_and_gradients_equal_transformers_per_document(
    hf_model_type: str, heads: int, kv_heads: int, tied: bool
) -> None:
    args = tiny_args(hf_model_type, heads, kv_heads, tied=tied)
    for seed in (0, 1):
        ours, theirs = build_pair(args, seed)
        assert largest_difference(ours, theirs, make_pack(args, seed)) < 1e-5


@pytest.mark.parametrize(
    ("hf_model_type", "scaling"),
    [
        ("llama", LLAMA3_SCALING),
        ("llama", None),
        ("qwen2", YARN),
        ("qwen2", YARN | {"truncate": False, "beta_fast": 8.0, "beta_slow": 2.0}),
        ("qwen3", YARN | {"attention_factor": 1.3}),
        ("qwen3", YARN | {"mscale": 0.7, "mscale_all_dim": 1.1}),
    ],
)
def test_positions_far_out_rotate_as_in_transformers(hf_model_type: str, scaling: dict[str, Any] | None) -> None:
    heads, kv_heads = (4, 2) if hf_model_type == "qwen3" else (3, 1)
    args = tiny_args(hf_model_type, heads, kv_heads, tied=False, rope_scaling=scaling, max_position_embeddings=131072)
    ours, theirs = build_pair(args, 5)
    assert largest_difference(ours, theirs, make_pack(args, 5, first_position=130000)) < 1e-5


def test_a_mask_that_lets_documents_see_each_other_is_caught() -> None:
    args = tiny_args("llama", 3, 1, tied=False)
    ours, theirs = build_pair(args, 0)
    pack = make_pack(args, 0)
    pack["documents"] = pack_documents([sum(LENGTHS)])
    assert largest_difference(ours, theirs, pack) > 1e-2


@pytest.mark.parametrize(("hf_model_type", "scaling"), [("llama", LLAMA3_SCALING), ("qwen2", YARN)])
def test_rope_scaling_left_out_is_caught(hf_model_type: str, scaling: dict[str, Any]) -> None:
    ours, _ = build_pair(tiny_args(hf_model_type, 3, 1, tied=False, rope_scaling=None), 0)
    _, theirs = build_pair(tiny_args(hf_model_type, 3, 1, tied=False, rope_scaling=scaling), 0)
    assert largest_difference(ours, theirs, make_pack(ours.args, 0)) > 1e-4


def test_a_document_is_blind_to_its_neighbours() -> None:
    args = tiny_args("qwen3", 4, 2, tied=True)
    model = Decoder(args)
    model.init_weights(0)
    pack = make_pack(args, 0)
    before = model(**pack)
    pack["input_ids_T"] = pack["input_ids_T"].clone()
    pack["input_ids_T"][1:24] = (pack["input_ids_T"][1:24] + 1) % args.vocab_size  # the second document
    after = model(**pack)
    assert torch.equal(before[:1], after[:1])
    assert torch.equal(before[24:], after[24:])
    assert not torch.equal(before[1:24], after[1:24])


def test_head_fn_gets_the_normalized_states_and_the_output_matrix() -> None:
    args = tiny_args("llama", 3, 1, tied=True)
    model = Decoder(args)
    model.init_weights(0)
    pack = make_pack(args, 0)
    total, weight = model(**pack, head_fn=lambda hidden, weight: (F.linear(hidden, weight).sum(), weight))
    torch.testing.assert_close(total, model(**pack).sum())
    assert weight is model.tok_embeddings.weight


class _HalfCheckpointed(nn.Module):
    """A forward as activation checkpointing will set it: the halves recomputed, attention kept."""

    @staticmethod
    def forward(block: nn.Module, x: Tensor, cos: Tensor, sin: Tensor, documents: Documents) -> Tensor:
        from torch.utils.checkpoint import checkpoint

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
        block.forward = lambda *inputs, block=block: _HalfCheckpointed.forward(block, *inputs)
    pack = make_pack(args, 0)
    for model in (plain, wrapped):
        model(**pack).square().mean().backward()
    assert len(calls) == args.num_layers  # not called again in the backward
    for ours, theirs in zip(plain.parameters(), wrapped.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert torch.equal(ours.grad, theirs.grad)


def test_regions_before_and_behind_attention_compile_in_one_graph_each_for_all_packs() -> None:
    args = tiny_args("qwen3", 4, 2, tied=True)
    eager = Decoder(args)
    eager.init_weights(0)
    compiled = copy.deepcopy(eager)
    graphs = []

    def counting_backend(module: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(module)
        return module.forward

    torch._dynamo.reset()
    for block in compiled.layers:
        for region in ("pre_attention", "post_attention"):
            whole = torch.compile(getattr(block, region), fullgraph=True, dynamic=False, backend=counting_backend)
            setattr(block, region, whole)
    for seed, lengths in ((0, LENGTHS), (1, (50, 10, 13))):
        pack = make_pack(args, seed) | {"documents": pack_documents(lengths)}
        torch.testing.assert_close(compiled(**pack), eager(**pack))
    assert len(graphs) == 2


def test_parts_of_the_regions_are_the_regions() -> None:
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


def test_a_model_built_on_the_meta_device_runs_once_it_has_weights() -> None:
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
        ({"num_kv_heads": 4}, "num_kv_heads=4 does not divide num_heads=6"),
        ({"head_dim": 7}, "head_dim=7 is odd"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "longrope"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "no original_max_position_embeddings"),
        ({"rope_scaling": YARN | {"low_freq_factor": 1.0}}, "has low_freq_factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "no low_freq_factor"),
    ],
)
def test_architectures_that_cannot_be_built_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_args("llama", 6, 2, tied=False, **changes)
