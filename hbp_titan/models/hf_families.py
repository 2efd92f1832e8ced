"""What each model_type of config.json implies: features, defaults, its own keys, and the names of its tensors.

Everything that the families share is read by hf_config.py and hf.py. The oracle is transformers 5: its configurations
give the defaults of absent keys, its models the features without a key.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from types import MappingProxyType
from typing import Any, NamedTuple

from hbp_titan.models.configs import MLAArgs, ModelArgs, MoEArgs

Values = Mapping[str, Any]
Windows = tuple[tuple[str, ...], int | None]
"""ModelArgs.layer_types and sliding_window."""

_NOTHING: Mapping[str, Any] = MappingProxyType({})
FULL, SLIDING = "full_attention", "sliding_attention"


def _no_windows(values: Values) -> Windows:
    layers = values.get("layer_types", [])
    if not isinstance(layers, list) or any(layer != FULL for layer in layers):
        raise ValueError(f"layer_types = {layers!r:.60} must list {FULL} only")
    if values.get("use_sliding_window", False):
        raise ValueError("use_sliding_window = True must be False")
    return (), None


def _every_layer(values: Values) -> Windows:
    layers, window = values["num_hidden_layers"], values.get("sliding_window")
    types = [SLIDING if window else FULL] * layers
    # transformers ignores the list of these families; other programs may not.
    if values.get("layer_types", types) != types:
        raise ValueError(f"layer_types = {values['layer_types']!r:.60} must be {types[0]} for each of {layers} layers")
    return (tuple(types), window) if window else ((), None)


def _typed(values: Values, default: Callable[[int], bool]) -> Windows:
    """Read layer_types; absent, layer i has a window if default(i)."""
    layers, window = values["num_hidden_layers"], values.get("sliding_window")
    types = values.get("layer_types") or [SLIDING if window and default(i) else FULL for i in range(layers)]
    if not isinstance(types, list) or len(types) != layers or any(kind not in (FULL, SLIDING) for kind in types):
        raise ValueError(f"layer_types = {types!r:.60} must list {FULL} or {SLIDING} for each of {layers} layers")
    if SLIDING not in types:
        return (), None
    if not window:
        raise ValueError(f"layer_types has {SLIDING}: set sliding_window, and set use_sliding_window to true")
    return tuple(types), window


def _qwen_windows(values: Values) -> Windows:
    window = values.get("sliding_window") if values.get("use_sliding_window") else None
    first = values.get("max_window_layers", 28)
    return _typed({**values, "sliding_window": window}, lambda layer: layer >= first)


def _smollm3_windows(values: Values) -> Windows:
    window = values.get("sliding_window") if values.get("use_sliding_window") else None
    nope = _nope_layers(values)
    return _typed({**values, "sliding_window": window}, lambda layer: layer in nope)


def _nope_layers(values: Values) -> tuple[int, ...]:
    # The key says 1 for layers with rotary embedding.
    interval, layers = values.get("no_rope_layer_interval", 4), values["num_hidden_layers"]
    rotated = values.get("no_rope_layers") or [(layer + 1) % interval != 0 for layer in range(layers)]
    if not isinstance(rotated, list) or len(rotated) != layers or any(value not in (0, 1) for value in rotated):
        raise ValueError(f"no_rope_layers = {rotated!r:.60} must list 0 or 1 for each of {layers} layers")
    return tuple(layer for layer, value in enumerate(rotated) if not value)


# The fields of MLAArgs and MoEArgs have the names of DeepSeek's keys.
_LATENT = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_EXPERTS = ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "n_shared_experts")


def _deepseek_moe(values: Values) -> MoEArgs:
    if values.get("scoring_func", "softmax") != "softmax" or values.get("topk_method") == "noaux_tc":
        raise ValueError(
            f"scoring_func = {values.get('scoring_func')!r} must be 'softmax', and topk_method = "
            f"{values.get('topk_method')!r} not 'noaux_tc' (DeepSeek-V3)"
        )
    return MoEArgs(**_named(MoEArgs, values))


def _deepseek_v3_moe(values: Values) -> MoEArgs:
    for key, only in (("scoring_func", "sigmoid"), ("topk_method", "noaux_tc")):
        if values.get(key, only) != only:
            raise ValueError(f"{key} = {values[key]!r} must be {only!r}")
    # The coefficients of a balance loss in published folders have no effect, in DeepSeek's code and transformers.
    losses = dict.fromkeys(("aux_loss_alpha", "device_aux_loss_alpha", "comm_aux_loss_alpha"), 0.0)
    return MoEArgs(**{**_named(MoEArgs, values), "topk_method": "noaux_tc", **losses})


def _named(kind: type, values: Values) -> dict[str, Any]:
    return {item.name: values[item.name] for item in fields(kind) if item.name in values}


def _qwen3_moe(values: Values) -> MoEArgs:
    dense = values.get("mlp_only_layers") or []
    if (
        dense not in [list(range(k)) for k in range(values["num_hidden_layers"])]
        or values.get("decoder_sparse_step", 1) != 1
    ):
        raise ValueError(
            f"mlp_only_layers = {dense!r:.60} must be the first layers, and decoder_sparse_step = "
            f"{values.get('decoder_sparse_step', 1)} must be 1"
        )
    # transformers 5 writes the second name.
    num_experts = values.get("num_experts") or values.get("num_local_experts")
    if num_experts is None:
        raise ValueError("has no num_experts")
    if values.get("norm_topk_prob"):
        _check_normalized(values)
    return MoEArgs(
        n_routed_experts=num_experts,
        num_experts_per_tok=values["num_experts_per_tok"],
        moe_intermediate_size=values["moe_intermediate_size"],
        n_shared_experts=0,
        first_k_dense_replace=len(dense),
        norm_topk_prob=values.get("norm_topk_prob", False),
        aux_loss_alpha=values.get("aux_loss_alpha", 0.0),
    )


def _check_normalized(values: Values) -> None:
    # DeepSeek's code, which MoEArgs follows, does not normalize a single score; transformers makes it 1.
    if values["num_experts_per_tok"] == 1:
        raise ValueError("num_experts_per_tok = 1 must be at least 2: a normalized weight of 1 trains no router")


def _mixtral(values: Values) -> MoEArgs:
    _check_normalized(values)
    return MoEArgs(
        n_routed_experts=values["num_local_experts"],
        num_experts_per_tok=values["num_experts_per_tok"],
        moe_intermediate_size=values["intermediate_size"],
        n_shared_experts=0,
        norm_topk_prob=True,
        aux_loss_alpha=values.get("aux_loss_alpha", 0.0),
    )


# Keys of the export that only some families have.


def _llama_keys(args: ModelArgs) -> dict[str, Any]:
    return {"mlp_bias": False, "attention_bias": False}


def _qwen_keys(args: ModelArgs) -> dict[str, Any]:
    windows = SLIDING in args.layer_types
    keys: dict[str, Any] = {"use_sliding_window": windows, "sliding_window": args.sliding_window}
    if windows:
        keys |= {"layer_types": list(args.layer_types), "max_window_layers": args.layer_types.index(SLIDING)}
    return keys if args.hf_model_type == "qwen2" else {**keys, "attention_bias": False}


def _window_key(args: ModelArgs) -> dict[str, Any]:
    return {"sliding_window": args.sliding_window}


def _layer_keys(args: ModelArgs) -> dict[str, Any]:
    types = list(args.layer_types) or [FULL] * args.num_layers
    return {"layer_types": types, "sliding_window": args.sliding_window}


def _smollm3_keys(args: ModelArgs) -> dict[str, Any]:
    rotated = [int(layer not in args.nope_layers) for layer in range(args.num_layers)]
    windows = {"use_sliding_window": SLIDING in args.layer_types, **_layer_keys(args)}
    return {**_llama_keys(args), **windows, "no_rope_layers": rotated}


def _gemma3_keys(args: ModelArgs) -> dict[str, Any]:
    return {
        **_layer_keys(args),
        "attention_bias": False,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": args.query_scalar,
        "rope_local_base_freq": args.sliding_rope_theta,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "use_bidirectional_attention": False,
    }


def _deepseek_keys(args: ModelArgs) -> dict[str, Any]:
    assert args.mla is not None
    assert args.moe is not None
    # transformers' head_dim is the width of rotary embedding.
    keys = {**_llama_keys(args), **asdict(args.mla), **asdict(args.moe), "head_dim": args.rope_dim, "ep_size": 1}
    if args.hf_model_type == "deepseek_v2":
        return {**keys, "scoring_func": "softmax"}
    # The layers of multi-token prediction are not exported.
    unused = ("aux_loss_alpha", "device_aux_loss_alpha", "comm_aux_loss_alpha")
    return {k: v for k, v in keys.items() if k not in unused} | {
        "scoring_func": "sigmoid",
        "num_nextn_predict_layers": 0,
    }


def _expert_keys(args: ModelArgs, number: str) -> dict[str, Any]:
    assert args.moe is not None
    alpha = args.moe.aux_loss_alpha
    keys = {number: args.moe.n_routed_experts, "num_experts_per_tok": args.moe.num_experts_per_tok}
    return {**keys, **({"aux_loss_alpha": alpha} if alpha else {})}


def _qwen3_moe_keys(args: ModelArgs) -> dict[str, Any]:
    assert args.moe is not None
    return {
        **_expert_keys(args, "num_experts"),
        **_qwen_keys(args),
        "moe_intermediate_size": args.moe.moe_intermediate_size,
        "norm_topk_prob": args.moe.norm_topk_prob,
        "mlp_only_layers": list(range(args.moe.first_k_dense_replace)),
        "decoder_sparse_step": 1,
    }


def _mixtral_keys(args: ModelArgs) -> dict[str, Any]:
    return {**_expert_keys(args, "num_local_experts"), **_window_key(args), "router_jitter_noise": 0.0}


class Family(NamedTuple):
    """One model_type.

    architecture: of config.json. implied: fields of ModelArgs that the model_type implies. defaults: of absent keys.
    only: keys whose other values would change the model, with the value that is supported. required: keys.
    windows: reads ModelArgs.layer_types and sliding_window. moe: reads the experts. mla: whether attention is latent.
    layer_rope: whether sliding_attention layers have a rotary embedding of their own. keys: of the export.

    names: of modules in a layer, ours and HF's, where they differ. projections: HF's names of an expert's gate, up and
    down projections. fused: HF's matrices that hold several of ours, one after another in their rows.
    """

    architecture: str
    implied: Values = _NOTHING
    defaults: Values = _NOTHING
    only: Values = _NOTHING
    required: tuple[str, ...] = ()
    windows: Callable[[Values], Windows] = _no_windows
    moe: Callable[[Values], MoEArgs] | None = None
    mla: bool = False
    layer_rope: bool = False
    keys: Callable[[ModelArgs], dict[str, Any]] = _llama_keys
    names: Values = _NOTHING
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    fused: Mapping[str, tuple[str, ...]] = _NOTHING


_AFTER = {"attention_output_norm": "post_attention_layernorm", "mlp_output_norm": "post_feedforward_layernorm"}
_OLMO2 = {"qk_norm": True, "qk_norm_all_heads": True, "norm_placement": "after"}
_GEMMA3 = {
    "qk_norm": True,
    "norm_placement": "both",
    "unit_offset_norms": True,
    "activation": "gelu_tanh",
    "scale_embeddings": True,
}
_CAPS = {
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "use_bidirectional_attention": False,
}
_MISTRAL = {"num_key_value_heads": 8, "sliding_window": 4096}

FAMILIES = {
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family("MistralForCausalLM", defaults=_MISTRAL, windows=_every_layer, keys=_window_key),
    "ministral": Family(
        "MinistralForCausalLM",
        defaults=_MISTRAL,
        windows=lambda values: _typed(values, lambda layer: True),
        keys=_layer_keys,
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM", {"qkv_bias": True}, {"sliding_window": 4096}, windows=_qwen_windows, keys=_qwen_keys
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        {"qk_norm": True},
        {"head_dim": 128, "sliding_window": 4096},
        windows=_qwen_windows,
        keys=_qwen_keys,
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        _OLMO2,
        {"rms_norm_eps": 1e-5},
        keys=lambda args: {"attention_bias": False},
        names=_AFTER,
    ),
    "olmo3": Family(
        "Olmo3ForCausalLM",
        _OLMO2,
        {"rms_norm_eps": 1e-5, "sliding_window": 4096},
        windows=lambda values: _typed(values, lambda layer: (layer + 1) % 4 != 0),
        layer_rope=True,
        keys=lambda args: {"attention_bias": False, **_layer_keys(args)},
        names=_AFTER,
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        defaults={"num_key_value_heads": 4, "tie_word_embeddings": True, "rope_theta": 2e6},
        windows=_smollm3_windows,
        keys=_smollm3_keys,
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        defaults={"rms_norm_eps": 1e-5},
        only={"resid_pdrop": 0.0, "embd_pdrop": 0.0},
        windows=_every_layer,
        keys=lambda args: {**_window_key(args), "resid_pdrop": 0.0, "embd_pdrop": 0.0},
        fused={
            "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
        },
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        _GEMMA3,
        {
            "num_key_value_heads": 4,
            "head_dim": 256,
            "sliding_window": 4096,
            "tie_word_embeddings": True,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "query_pre_attn_scalar": 256,
        },
        _CAPS,
        windows=lambda values: _typed(values, lambda layer: (layer + 1) % values.get("sliding_window_pattern", 6) != 0),
        layer_rope=True,
        keys=_gemma3_keys,
        names={**_AFTER, "post_attention_layernorm": "pre_feedforward_layernorm"},
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        defaults={"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "num_experts_per_tok": 2, "rope_theta": 1e6},
        only={"router_jitter_noise": 0.0},
        required=("num_local_experts",),
        windows=_every_layer,
        moe=_mixtral,
        keys=_mixtral_keys,
        names={"mlp": "block_sparse_moe"},
        projections=("w1", "w3", "w2"),
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        {"qk_norm": True},
        {"num_key_value_heads": 4},
        required=("num_experts_per_tok", "moe_intermediate_size"),
        moe=_qwen3_moe,
        keys=_qwen3_moe_keys,
    ),
    "deepseek_v2": Family(
        "DeepseekV2ForCausalLM", required=(*_LATENT, *_EXPERTS), moe=_deepseek_moe, mla=True, keys=_deepseek_keys
    ),
    "deepseek_v3": Family(
        "DeepseekV3ForCausalLM",
        defaults={"routed_scaling_factor": 2.5, "norm_topk_prob": True, "first_k_dense_replace": 3},
        only={"rope_interleave": True, "moe_layer_freq": 1},
        required=(*_LATENT, *_EXPERTS, "n_group", "topk_group"),
        moe=_deepseek_v3_moe,
        mla=True,
        keys=_deepseek_keys,
    ),
}
"""Model types that models/decoder.py builds."""


def latent_args(values: Values) -> MLAArgs:
    """Return latent attention's widths in config.json."""
    return MLAArgs(**_named(MLAArgs, values))


def feature_fields(args: ModelArgs) -> dict[str, tuple[Any, Any]]:
    """Return the fields of `args` that its model_type implies otherwise, as (own value, implied value)."""
    family = FAMILIES[args.hf_model_type]
    defaults = {item.name: item.default for item in fields(ModelArgs)}
    names = {name for other in FAMILIES.values() for name in other.implied}
    implied = {name: family.implied.get(name, defaults[name]) for name in sorted(names)}
    own = {name: getattr(args, name) for name in implied}
    if family.windows is _no_windows:
        implied["layer_types"], own["layer_types"] = (), args.layer_types
    implied |= {"mla": family.mla, "moe": family.moe is not None}
    own |= {"mla": args.mla is not None, "moe": args.moe is not None}
    return {name: (own[name], implied[name]) for name in implied if own[name] != implied[name]}


def more_fields(values: Values, model_type: str) -> dict[str, Any]:
    """Return fields of ModelArgs that only some families read from a key."""
    if model_type == "smollm3":
        return {"nope_layers": _nope_layers(values)}
    return {"query_scalar": values["query_pre_attn_scalar"]} if model_type == "gemma3_text" else {}
