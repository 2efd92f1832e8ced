"""Named architectures. The figures are those of the published HF config.json files.

Of the base models where base and chat differ.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hbp_titan.models.configs import MLAArgs, ModelArgs, MoEArgs

_LLAMA3: dict[str, Any] = {
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "norm_eps": 1e-5,
}
_LLAMA3_2: dict[str, Any] = {
    **_LLAMA3,
    "rope_scaling": {**_LLAMA3["rope_scaling"], "factor": 32.0},
    "tie_embeddings": True,
}
_QWEN2_5: dict[str, Any] = {
    "hf_model_type": "qwen2",
    "vocab_size": 152064,
    "max_position_embeddings": 131072,
    "rope_theta": 1000000.0,
    "norm_eps": 1e-5,
    "qkv_bias": True,
}
_QWEN3: dict[str, Any] = {
    "hf_model_type": "qwen3",
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000.0,
    "qk_norm": True,
}
_DEEPSEEK_V2: dict[str, Any] = {
    "hf_model_type": "deepseek_v2",
    "vocab_size": 102400,
    "max_position_embeddings": 163840,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
    },
}
_DIMS = ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")


def _flavor(family: dict[str, Any], name: str, *dims: int, **other: Any) -> ModelArgs:
    return ModelArgs(name=name, **{**family, **dict(zip(_DIMS, dims, strict=True)), **other})


def _to_128k(args: ModelArgs) -> ModelArgs:
    """Return a Qwen2.5 with the YaRN that its model card prescribes for more than 32,768 tokens."""
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    return replace(args, name=f"{args.name}_128k", max_position_embeddings=131072, rope_scaling=scaling)


def _deepseek_experts(q_lora_rank: int | None, **moe: Any) -> dict[str, Any]:
    return {
        "mla": MLAArgs(
            q_lora_rank=q_lora_rank, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
        ),
        "moe": MoEArgs(num_experts_per_tok=6, n_shared_experts=2, first_k_dense_replace=1, aux_loss_alpha=0.001, **moe),
    }


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

_LONG_QWEN2_5 = (
    _flavor(_QWEN2_5, "qwen2_5_7b", 3584, 18944, 28, 28, 4, 128, norm_eps=1e-6),
    _flavor(_QWEN2_5, "qwen2_5_32b", 5120, 27648, 64, 40, 8, 128),
    _flavor(_QWEN2_5, "qwen2_5_72b", 8192, 29568, 80, 64, 8, 128),
)
_SHORT = {"vocab_size": 151936, "max_position_embeddings": 32768, "norm_eps": 1e-6, "tie_embeddings": True}
_EXPERTS_236B = _deepseek_experts(
    1536,
    n_routed_experts=160,
    moe_intermediate_size=1536,
    topk_method="group_limited_greedy",
    n_group=8,
    topk_group=3,
    routed_scaling_factor=16.0,
)
_EXPERTS_16B = _deepseek_experts(None, n_routed_experts=64, moe_intermediate_size=1408)

# Ours, in place of Llama 3.1's scaling.
_YARN = {"rope_type": "yarn", "factor": 128.0, "original_max_position_embeddings": 8192}
_1M = {"max_position_embeddings": 1 << 20, "rope_scaling": _YARN}

FLAVORS: dict[str, ModelArgs] = {
    args.name: args
    for args in (
        DEBUG,
        DEBUG_MOE,
        #                 name            hidden  ffn  layers heads kv_heads head_dim
        _flavor(_LLAMA3, "llama3_1_8b", 4096, 14336, 32, 32, 8, 128),
        _flavor(_LLAMA3, "llama3_1_8b_1m", 4096, 14336, 32, 32, 8, 128, **_1M),
        _flavor(_LLAMA3, "llama3_1_70b", 8192, 28672, 80, 64, 8, 128),
        _flavor(_LLAMA3, "llama3_3_70b", 8192, 28672, 80, 64, 8, 128),
        _flavor(_LLAMA3_2, "llama3_2_1b", 2048, 8192, 16, 32, 8, 64),
        _flavor(_LLAMA3_2, "llama3_2_3b", 3072, 8192, 28, 24, 8, 128),
        _flavor(_QWEN2_5, "qwen2_5_0_5b", 896, 4864, 24, 14, 2, 64, **_SHORT),
        *_LONG_QWEN2_5,
        *map(_to_128k, _LONG_QWEN2_5),
        _flavor(_QWEN3, "qwen3_4b", 2560, 9728, 36, 32, 8, 128, tie_embeddings=True),
        _flavor(_QWEN3, "qwen3_8b", 4096, 12288, 36, 32, 8, 128),
        _flavor(_QWEN3, "qwen3_32b", 5120, 25600, 64, 64, 8, 128),
        _flavor(_DEEPSEEK_V2, "deepseek_v2_236b", 5120, 12288, 60, 128, 128, 192, **_EXPERTS_236B),
        _flavor(_DEEPSEEK_V2, "deepseek_v2_lite_16b", 2048, 10944, 27, 16, 16, 192, **_EXPERTS_16B),
    )
}
