"""A tiny DeepSeek-V2, and pairs of our models and transformers' with the same weights, of any family."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hbp_titan.models.configs import MLAArgs, ModelArgs, MoEArgs
from hbp_titan.models.decoder import Decoder
from hbp_titan.models.documents import pack_documents
from hbp_titan.models.hf import parts_of_matrix, to_hf_name
from hbp_titan.models.hf_config import args_to_hf_config

YARN = {
    "rope_type": "yarn",
    "factor": 40.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}
MLA = MLAArgs(q_lora_rank=28, kv_lora_rank=20, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12)
MOE = MoEArgs(
    n_routed_experts=8,
    num_experts_per_tok=3,
    moe_intermediate_size=16,
    n_shared_experts=2,
    first_k_dense_replace=1,
    topk_method="group_limited_greedy",
    n_group=4,
    topk_group=2,
    routed_scaling_factor=2.5,
)


def tiny_args(
    heads: int = 3, *, mla: Mapping[str, Any] | None = None, moe: Mapping[str, Any] | None = None, **changes: Any
) -> ModelArgs:
    """Return an architecture of three layers, the first dense. mla, moe: changes of MLAArgs and MoEArgs."""
    latent = dataclasses.replace(MLA, **(mla or {}))
    args = ModelArgs(
        name="tiny",
        hf_model_type="deepseek_v2",
        hidden_size=48,
        intermediate_size=80,
        num_layers=3,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=latent.qk_head_dim,
        vocab_size=97,
        max_position_embeddings=2560,
        rope_theta=10000.0,
        rope_scaling=YARN,
        norm_eps=1e-5,
        mla=latent,
        moe=dataclasses.replace(MOE, **(moe or {})),
    )
    return dataclasses.replace(args, **changes)


def random_model(args: ModelArgs, seed: int) -> Decoder:
    """Return a model with random parameters, including norms and biases."""
    model = Decoder(args)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2, generator=generator)
    return model


def hf_model(model: Decoder) -> nn.Module:
    """Return transformers' model with the weights of ours."""
    # Ranks that only need our model do not import it.
    import transformers

    config = transformers.AutoConfig.for_model(**args_to_hf_config(model.args))
    theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    keys = theirs.load_state_dict(in_hf_memory(model.state_dict(), model.args), strict=False)
    assert keys.missing_keys == []
    assert keys.unexpected_keys == []
    return theirs.eval()


def in_hf_memory(tensors: Mapping[str, Tensor], args: ModelArgs) -> dict[str, Tensor]:
    """Return weights or gradients by the names of transformers' parameters, given ours."""
    # In memory, transformers keeps the gate and up projections of all experts in one tensor, in a module `mlp`.
    model_type = "llama" if args.hf_model_type == "mixtral" else args.hf_model_type
    result = {}
    for name, tensor in tensors.items():
        layer, fused, projection = name.rpartition(".experts.")
        if matrix := parts_of_matrix(name, model_type):
            result[to_hf_name(matrix[0])] = torch.cat([tensors[part] for part in matrix[1]])
        elif not fused or projection == "down_proj":
            result[to_hf_name(name, model_type)] = tensor
        elif projection == "gate_proj":
            both = torch.cat([tensor, tensors[f"{layer}.experts.up_proj"]], dim=1)
            result[to_hf_name(f"{layer}.experts.gate_up_proj")] = both
    return result


def make_pack(args: ModelArgs, lengths: tuple[int, ...], seed: int, first_position: int = 0) -> dict[str, Any]:
    """Return random documents as the arguments of Decoder.forward."""
    generator = torch.Generator().manual_seed(seed + 1)
    total = sum(lengths)
    return {
        "input_ids_T": torch.randint(args.vocab_size, (total,), generator=generator),
        "position_ids_T": torch.cat([torch.arange(n) for n in lengths]) + first_position,
        "documents": pack_documents(lengths),
    }
