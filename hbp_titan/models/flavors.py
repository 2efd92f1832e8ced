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
_QWEN3_MOE: dict[str, Any] = {**_QWEN3, "hf_model_type": "qwen3_moe"}
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
_DEEPSEEK_V3: dict[str, Any] = {
    **_DEEPSEEK_V2,
    "hf_model_type": "deepseek_v3",
    "vocab_size": 129280,
    "rope_scaling": {**_DEEPSEEK_V2["rope_scaling"], "mscale": 1.0, "mscale_all_dim": 1.0},
    "mla": MLAArgs(q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128),
    "moe": MoEArgs(
        n_routed_experts=256,
        num_experts_per_tok=8,
        moe_intermediate_size=2048,
        n_shared_experts=1,
        first_k_dense_replace=3,
        topk_method="noaux_tc",
        n_group=8,
        topk_group=4,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
    ),
}
_MISTRAL: dict[str, Any] = {
    "hf_model_type": "mistral",
    "vocab_size": 32768,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "norm_eps": 1e-5,
}
_MIXTRAL: dict[str, Any] = {**_MISTRAL, "hf_model_type": "mixtral", "vocab_size": 32000}
_OLMO2: dict[str, Any] = {
    "hf_model_type": "olmo2",
    "vocab_size": 100352,
    "max_position_embeddings": 4096,
    "rope_theta": 500000.0,
    "qk_norm": True,
    "qk_norm_all_heads": True,
    "norm_placement": "after",
}
_SMOLLM3: dict[str, Any] = {
    "hf_model_type": "smollm3",
    "vocab_size": 128256,
    "max_position_embeddings": 65536,
    "rope_theta": 5000000.0,
    "nope_layers": tuple(range(3, 36, 4)),
    "tie_embeddings": True,
}
_SMOLLM2: dict[str, Any] = {
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rope_theta": 100000.0,
    "norm_eps": 1e-5,
    "tie_embeddings": True,
}
_PHI4: dict[str, Any] = {
    "hf_model_type": "phi3",
    "vocab_size": 100352,
    "max_position_embeddings": 16384,
    "rope_theta": 250000.0,
    "norm_eps": 1e-5,
}
_GEMMA3: dict[str, Any] = {
    "hf_model_type": "gemma3_text",
    "vocab_size": 262144,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "sliding_rope_theta": 10000.0,
    "sliding_window": 512,
    "layer_types": tuple("full_attention" if layer % 6 == 5 else "sliding_attention" for layer in range(26)),
    "qk_norm": True,
    "norm_placement": "both",
    "unit_offset_norms": True,
    "activation": "gelu_tanh",
    "scale_embeddings": True,
    "query_scalar": 256,
    "tie_embeddings": True,
}
_DIMS = ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")


def _flavor(family: dict[str, Any], name: str, *dims: int, **other: Any) -> ModelArgs:
    return ModelArgs(name=name, **{**family, **dict(zip(_DIMS, dims, strict=True)), **other})


def _to_128k(args: ModelArgs) -> ModelArgs:
    """Return a Qwen2.5 with the YaRN that its model card prescribes for more than 32,768 tokens."""
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    return replace(args, name=f"{args.name}_128k", max_position_embeddings=131072, rope_scaling=scaling)


def _experts(number: int, per_token: int, width: int) -> dict[str, Any]:
    """Return experts whose chosen scores are normalized, without shared ones (Mixtral, Qwen3-MoE)."""
    sizes: dict[str, Any] = {
        "n_routed_experts": number,
        "num_experts_per_tok": per_token,
        "moe_intermediate_size": width,
    }
    return {"moe": MoEArgs(**sizes, n_shared_experts=0, norm_topk_prob=True)}


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
        _flavor(_QWEN3_MOE, "qwen3_30b_a3b", 2048, 6144, 48, 32, 4, 128, **_experts(128, 8, 768)),
        _flavor(_QWEN3_MOE, "qwen3_235b_a22b", 4096, 12288, 94, 64, 4, 128, **_experts(128, 8, 1536)),
        _flavor(_MISTRAL, "mistral_7b", 4096, 14336, 32, 32, 8, 128),
        _flavor(_MISTRAL, "mistral_small_24b", 5120, 32768, 40, 32, 8, 128, vocab_size=131072, rope_theta=100000000.0),
        _flavor(_MIXTRAL, "mixtral_8x7b", 4096, 14336, 32, 32, 8, 128, **_experts(8, 2, 14336)),
        _flavor(_OLMO2, "olmo2_7b", 4096, 11008, 32, 32, 32, 128),
        _flavor(_OLMO2, "olmo2_32b", 5120, 27648, 64, 40, 8, 128),
        _flavor(_SMOLLM2, "smollm2_135m", 576, 1536, 30, 9, 3, 64),
        _flavor(_SMOLLM3, "smollm3_3b", 2048, 11008, 36, 16, 4, 128),
        _flavor(_PHI4, "phi4_14b", 5120, 17920, 40, 40, 10, 128),
        _flavor(_GEMMA3, "gemma3_1b", 1152, 6912, 26, 4, 1, 256),
        _flavor(_DEEPSEEK_V2, "deepseek_v2_236b", 5120, 12288, 60, 128, 128, 192, **_EXPERTS_236B),
        _flavor(_DEEPSEEK_V2, "deepseek_v2_lite_16b", 2048, 10944, 27, 16, 16, 192, **_EXPERTS_16B),
        _flavor(_DEEPSEEK_V3, "deepseek_v3_671b", 7168, 18432, 61, 128, 128, 192),
    )
}
