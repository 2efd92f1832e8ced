"""Named architectures, the model they build, and the counts that cost models and logs need.

Owns the table of flavors, with the figures of the published HF config.json files (of the base models, where base
and chat differ), and the counts derived from an architecture.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from hbp_titan.models.configs import MLAArgs, ModelArgs, MoEArgs
from hbp_titan.models.decoder import Decoder
from hbp_titan.models.moe import Experts
from hbp_titan.utils import did_you_mean


def _llama3(name: str, hidden: int, ffn: int, layers: int, heads: int, head_dim: int, factor: float) -> ModelArgs:
    return ModelArgs(
        name=name,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=8,
        head_dim=head_dim,
        vocab_size=128256,
        max_position_embeddings=131072,
        rope_theta=500000.0,
        rope_scaling={
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        norm_eps=1e-5,
        # The small models of 3.2 are tied; they are also those that stretch the context by 32 instead of 8.
        tie_embeddings=factor == 32.0,
        hf_model_type="llama",
    )


def _qwen2_5(
    name: str,
    hidden: int,
    ffn: int,
    layers: int,
    heads: int,
    kv_heads: int,
    *,
    vocab: int = 152064,
    context: int = 131072,
    eps: float = 1e-5,
    tied: bool = False,
) -> ModelArgs:
    return ModelArgs(
        name=name,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=hidden // heads,
        vocab_size=vocab,
        max_position_embeddings=context,
        rope_theta=1000000.0,
        norm_eps=eps,
        qkv_bias=True,
        tie_embeddings=tied,
        hf_model_type="qwen2",
    )


def _qwen3(name: str, hidden: int, ffn: int, layers: int, heads: int, *, tied: bool = False) -> ModelArgs:
    return ModelArgs(
        name=name,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=151936,
        max_position_embeddings=40960,
        rope_theta=1000000.0,
        norm_eps=1e-6,
        qk_norm=True,
        tie_embeddings=tied,
        hf_model_type="qwen3",
    )


def _to_128k(args: ModelArgs) -> ModelArgs:
    """A Qwen2.5 with the YaRN that its model card prescribes for more than 32,768 tokens."""
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    return replace(args, name=f"{args.name}_128k", max_position_embeddings=131072, rope_scaling=scaling)


def _deepseek_v2(
    name: str, hidden: int, ffn: int, layers: int, heads: int, q_rank: int | None, **moe: Any
) -> ModelArgs:
    mscale = 0.707
    return ModelArgs(
        name=name,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=192,
        vocab_size=102400,
        max_position_embeddings=163840,
        rope_theta=10000.0,
        rope_scaling={
            "rope_type": "yarn",
            "factor": 40.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": mscale,
            "mscale_all_dim": mscale,
        },
        norm_eps=1e-6,
        hf_model_type="deepseek_v2",
        mla=MLAArgs(q_lora_rank=q_rank, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128),
        moe=MoEArgs(num_experts_per_tok=6, n_shared_experts=2, first_k_dense_replace=1, aux_loss_alpha=0.001, **moe),
    )


DEBUG = ModelArgs(
    name="debug",
    hidden_size=128,
    intermediate_size=352,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    vocab_size=4096,
    max_position_embeddings=131072,
    rope_theta=10000.0,
    norm_eps=1e-5,
    tie_embeddings=True,
)

DEBUG_MOE = replace(
    DEBUG,
    name="debug_moe",
    num_kv_heads=4,
    head_dim=48,
    hf_model_type="deepseek_v2",
    mla=MLAArgs(q_lora_rank=None, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32),
    moe=MoEArgs(
        n_routed_experts=16,
        num_experts_per_tok=4,
        moe_intermediate_size=64,
        n_shared_experts=1,
        first_k_dense_replace=1,
        aux_loss_alpha=0.001,
    ),
)

_QWEN2_5 = (
    #        name           hidden ffn  layers heads kv_heads
    _qwen2_5("qwen2_5_7b", 3584, 18944, 28, 28, 4, eps=1e-6),
    _qwen2_5("qwen2_5_32b", 5120, 27648, 64, 40, 8),
    _qwen2_5("qwen2_5_72b", 8192, 29568, 80, 64, 8),
)

FLAVORS: dict[str, ModelArgs] = {
    args.name: args
    for args in (
        DEBUG,
        DEBUG_MOE,
        #       name           hidden  ffn   layers heads head_dim rope factor
        _llama3("llama3_1_8b", 4096, 14336, 32, 32, 128, 8.0),
        _llama3("llama3_1_70b", 8192, 28672, 80, 64, 128, 8.0),
        _llama3("llama3_3_70b", 8192, 28672, 80, 64, 128, 8.0),
        _llama3("llama3_2_1b", 2048, 8192, 16, 32, 64, 32.0),
        _llama3("llama3_2_3b", 3072, 8192, 28, 24, 128, 32.0),
        _qwen2_5("qwen2_5_0_5b", 896, 4864, 24, 14, 2, vocab=151936, context=32768, eps=1e-6, tied=True),
        *_QWEN2_5,
        *map(_to_128k, _QWEN2_5),
        #      name      hidden ffn  layers heads
        _qwen3("qwen3_4b", 2560, 9728, 36, 32, tied=True),
        _qwen3("qwen3_8b", 4096, 12288, 36, 32),
        _qwen3("qwen3_32b", 5120, 25600, 64, 64),
        #            name                hidden ffn  layers heads q_rank
        _deepseek_v2(
            "deepseek_v2_236b",
            *(5120, 12288, 60, 128, 1536),
            n_routed_experts=160,
            moe_intermediate_size=1536,
            topk_method="group_limited_greedy",
            n_group=8,
            topk_group=3,
            routed_scaling_factor=16.0,
        ),
        _deepseek_v2(
            "deepseek_v2_lite_16b",
            *(2048, 10944, 27, 16, None),
            n_routed_experts=64,
            moe_intermediate_size=1408,
        ),
    )
}


def get_flavor(name: str) -> ModelArgs:
    """The architecture called `name`; ValueError that names the nearest one otherwise."""
    if name in FLAVORS:
        return FLAVORS[name]
    hint = did_you_mean(name, FLAVORS)
    raise ValueError(f"model.flavor = {name!r} is none of {', '.join(FLAVORS)}{hint}")


def build_model(args: ModelArgs) -> Decoder:
    """The model, with weights not yet meaningful; under `torch.device("meta")` it allocates nothing."""
    return Decoder(args)


def num_params(args: ModelArgs) -> int:
    """Parameters; a tied embedding counts once."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build_model(args).parameters())


def linear_params(args: ModelArgs) -> int:
    """Parameters that a token is multiplied with: all matrices with the head, of routed experts those it is sent to.

    Without the embedding lookup.
    """
    with torch.device("meta"):
        modules = build_model(args).modules()
        dense = sum(module.weight.numel() for module in modules if isinstance(module, nn.Linear))
    moe = args.moe
    return dense + (expert_params(args) * moe.num_experts_per_tok // moe.n_routed_experts if moe else 0)


def expert_params(args: ModelArgs) -> int:
    """Parameters of all routed experts: what expert parallelism spreads."""
    with torch.device("meta"):
        modules = build_model(args).modules()
        return sum(p.numel() for module in modules if isinstance(module, Experts) for p in module.parameters())


def last_params(args: ModelArgs) -> int:
    """Parameters of the last product of every layer that a token is multiplied with: the down projections."""
    if args.moe is None:
        return args.num_layers * args.intermediate_size * args.hidden_size
    sparse = sum(map(args.is_sparse, range(args.num_layers)))
    chosen = (args.moe.num_experts_per_tok + args.moe.n_shared_experts) * args.moe.moe_intermediate_size
    return args.hidden_size * ((args.num_layers - sparse) * args.intermediate_size + sparse * chosen)


def attention_dims(args: ModelArgs) -> tuple[int, int]:
    """(layers, width of all query heads of one layer): what the cost of attention scales with.

    With latent attention the mean of the widths of keys and values. The zeros that fill up its values, which a kernel
    multiplies all the same, are no work of the model.
    """
    value_dim = args.head_dim if args.mla is None else args.mla.v_head_dim
    return args.num_layers, args.num_heads * (args.head_dim + value_dim) // 2


def training_flops(args: ModelArgs, num_tokens: int, sum_squared_lengths: int, adapter_params: int = 0) -> int:
    """Floating-point operations of one forward and backward without recomputation.

    num_tokens: tokens of the batch. sum_squared_lengths: sum over its documents of len^2. A multiplied parameter
    costs 2 forward and 4 backward per token; causal attention has half of len^2 scores, each of 2 products of the
    head width in the forward (QK^T, PV) and twice that in the backward. adapter_params: of LoRA, where there is any;
    the model's own parameters are frozen then and cost 2 backward.
    """
    num_layers, width = attention_dims(args)
    per_token = (4 if adapter_params else 6) * linear_params(args) + 6 * adapter_params
    return per_token * num_tokens + 6 * num_layers * width * sum_squared_lengths
