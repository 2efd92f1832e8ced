"""One tiny architecture for each model_type of hf_families.FAMILIES, with the features that the model_type implies."""

from __future__ import annotations

import dataclasses
from typing import Any

from hbp_titan.models.configs import MLAArgs, ModelArgs, MoEArgs
from hbp_titan.models.hf_families import FAMILIES
from tests.models import deepseek_tiny

EXPERTS = MoEArgs(
    n_routed_experts=8, num_experts_per_tok=3, moe_intermediate_size=16, n_shared_experts=0, norm_topk_prob=True
)
V3_EXPERTS = MoEArgs(
    n_routed_experts=8,
    num_experts_per_tok=3,
    moe_intermediate_size=16,
    n_shared_experts=1,
    first_k_dense_replace=1,
    topk_method="noaux_tc",
    n_group=4,
    topk_group=2,
    norm_topk_prob=True,
    routed_scaling_factor=2.5,
)
V3_MLA = MLAArgs(q_lora_rank=28, kv_lora_rank=20, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12)

MIXED = ("sliding_attention", "full_attention", "sliding_attention")
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def dense(model_type: str, **changes: Any) -> ModelArgs:
    """Return three layers of a family without latent attention: 4 query heads, 2 key/value heads of width 16."""
    args = ModelArgs(
        name="tiny",
        hf_model_type=model_type,
        hidden_size=48,
        intermediate_size=80,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        # Families without the key divide the hidden size.
        head_dim=12 if model_type in ("olmo2", "olmo3", "phi3", "smollm3") else 16,
        vocab_size=97,
        max_position_embeddings=4096,
        rope_theta=10000.0,
        norm_eps=1e-5,
        **FAMILIES[model_type].implied,
    )
    return dataclasses.replace(args, **changes)


TINY: dict[str, ModelArgs] = {
    "mistral": dense("mistral"),
    "mistral, windows": dense("mistral", layer_types=("sliding_attention",) * 3, sliding_window=7),
    "ministral": dense("ministral", layer_types=MIXED, sliding_window=7),
    "olmo3": dense("olmo3", layer_types=MIXED, sliding_window=7, sliding_rope_theta=10000.0, rope_scaling=YARN),
    "gemma3_text": dense(
        "gemma3_text",
        layer_types=MIXED,
        sliding_window=7,
        sliding_rope_theta=100.0,
        query_scalar=24,
        tie_embeddings=True,
    ),
    "olmo2": dense("olmo2"),
    "smollm3": dense("smollm3", nope_layers=(1,), tie_embeddings=True),
    "phi3": dense("phi3"),
    "mixtral": dense("mixtral", intermediate_size=16, moe=EXPERTS),
    "qwen3_moe": dense("qwen3_moe", moe=EXPERTS),
    "qwen3_moe, first layer dense": dense(
        "qwen3_moe", moe=dataclasses.replace(EXPERTS, first_k_dense_replace=1, norm_topk_prob=False)
    ),
    "deepseek_v3": deepseek_tiny.tiny_args(4, hf_model_type="deepseek_v3", mla=vars(V3_MLA), moe=vars(V3_EXPERTS)),
}
