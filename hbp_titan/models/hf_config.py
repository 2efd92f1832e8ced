"""HF config.json <-> ModelArgs.

Owns the supported model types and features, the defaults of absent keys (transformers', else DeepSeek's own code's),
and the rejection of everything that would silently change the mathematics.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

from hbp_titan.models.configs import MLAArgs, ModelArgs, MoEArgs
from hbp_titan.models.hf_files import check_not_pointer, require_folder
from hbp_titan.models.layers import ROPE_TYPES, check_scaling


class Family(NamedTuple):
    """Features that a model_type implies without a key in its config."""

    architecture: str
    qkv_bias: bool = False
    qk_norm: bool = False
    latent_experts: bool = False
    """Latent attention and experts (DeepSeek-V2)."""


FAMILIES = {
    "llama": Family("LlamaForCausalLM"),
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True),
    "qwen3": Family("Qwen3ForCausalLM", qk_norm=True),
    "deepseek_v2": Family("DeepseekV2ForCausalLM", latent_experts=True),
}
TOKEN_ID_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")
# DeepSeek-V2's keys; the fields of MLAArgs and MoEArgs have their names.
_LATENT_SIZES = (
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "n_routed_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "n_shared_experts",
)
_OPTIONAL_LATENT_SIZES = ("q_lora_rank", "n_group", "topk_group", "moe_layer_freq")
_REQUIRED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
)
# Keys whose other values would change the model; each defaults to the value given here.
_ONLY_SUPPORTED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "use_sliding_window": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}
_DEFAULT_THETA = 10000.0


def args_from_hf(folder: str | Path, key: str = "folder") -> ModelArgs:
    """Return the architecture in `folder`/config.json, as written by transformers 4.x or 5.x.

    key: what `folder` is the value of. Raises ValueError with it if there is no such folder, and with the file and its
    key for a model type, feature or value that is not supported.
    """
    require_folder(Path(folder), key)
    path = Path(folder) / "config.json"
    values = read_json(path)
    model_type = values.get("model_type")
    if model_type not in FAMILIES:
        raise ValueError(f"{path}: model_type {model_type!r} must be one of {', '.join(FAMILIES)}")
    _check_supported(values, path)
    num_heads = values["num_attention_heads"]
    family = FAMILIES[model_type]
    theta, scaling = _rope(values, path)
    # If it is absent, transformers uses 128 for Qwen3 and hidden_size // num_heads for the others.
    head_dim = values.get("head_dim") or (128 if model_type == "qwen3" else values["hidden_size"] // num_heads)
    mla, moe = _mla_and_moe(values, path) if family.latent_experts else (None, None)
    return ModelArgs(
        name=Path(folder).resolve().name,
        hf_model_type=model_type,
        hidden_size=values["hidden_size"],
        intermediate_size=values["intermediate_size"],
        num_layers=values["num_hidden_layers"],
        num_heads=num_heads,
        num_kv_heads=values.get("num_key_value_heads") or num_heads,
        head_dim=head_dim if mla is None else mla.qk_head_dim,
        vocab_size=values["vocab_size"],
        max_position_embeddings=_longest(values["max_position_embeddings"], scaling),
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=values.get("rms_norm_eps", 1e-6),
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        tie_embeddings=values.get("tie_word_embeddings", False),
        initializer_range=values.get("initializer_range", 0.02),
        mla=mla,
        moe=moe,
    )


def args_to_hf_config(args: ModelArgs) -> dict[str, Any]:
    """Return config.json for `args`. Raises ValueError if the family cannot express the architecture."""
    # RoPE is written for transformers 4.x and vLLM and again for 5.x, with equal values. Token ids are null, because
    # transformers' defaults (1 and 2) would be wrong for most tokenizers.
    family = FAMILIES.get(args.hf_model_type)
    if family is None:
        raise ValueError(
            f"model {args.name}: hf_model_type {args.hf_model_type!r} must be one of {', '.join(FAMILIES)}"
        )
    if (args.qkv_bias, args.qk_norm) != (family.qkv_bias, family.qk_norm):
        raise ValueError(
            f"model {args.name}: {args.hf_model_type} requires qkv_bias={family.qkv_bias}, qk_norm={family.qk_norm}, "
            f"not {args.qkv_bias}, {args.qk_norm}"
        )
    if {args.mla is not None, args.moe is not None} != {family.latent_experts}:
        raise ValueError(
            f"model {args.name}: {args.hf_model_type} requires {'' if family.latent_experts else 'no '}mla and moe"
        )
    rope_parameters = {"rope_type": "default", **(args.rope_scaling or {}), "rope_theta": args.rope_theta}
    return {
        "architectures": [family.architecture],
        "model_type": args.hf_model_type,
        "hidden_size": args.hidden_size,
        "intermediate_size": args.intermediate_size,
        "num_hidden_layers": args.num_layers,
        "num_attention_heads": args.num_heads,
        "num_key_value_heads": args.num_kv_heads,
        "head_dim": args.head_dim,
        "vocab_size": args.vocab_size,
        "max_position_embeddings": args.max_position_embeddings,
        "rope_theta": args.rope_theta,
        "rope_scaling": None if args.rope_scaling is None else dict(args.rope_scaling),
        "rope_parameters": rope_parameters,
        "rms_norm_eps": args.norm_eps,
        "tie_word_embeddings": args.tie_embeddings,
        "initializer_range": args.initializer_range,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "use_cache": True,
        **dict.fromkeys(TOKEN_ID_KEYS),
        **(
            {"use_sliding_window": False, "sliding_window": None}
            if args.hf_model_type.startswith("qwen")
            else {"mlp_bias": False}
        ),
        **({} if args.hf_model_type == "qwen2" else {"attention_bias": False}),
        **(asdict(args.mla) if args.mla is not None else {}),
        **(asdict(args.moe) if args.moe is not None else {}),
        # transformers' head_dim is the width of rotary embedding.
        **({"head_dim": args.rope_dim, "scoring_func": "softmax", "ep_size": 1} if family.latent_experts else {}),
    }


def token_ids_from_hf(folder: str | Path) -> dict[str, Any]:
    """Return bos, eos and pad token ids of an HF folder: generation_config.json's, else config.json's.

    eos may be a list (chat models stop at several tokens).
    """
    found: dict[str, Any] = {}
    for name in ("config.json", "generation_config.json"):
        path = Path(folder) / name
        values = read_json(path) if path.is_file() else {}
        found.update({key: values[key] for key in TOKEN_ID_KEYS if values.get(key) is not None})
    return found


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`. Raises ValueError with the file name for anything else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        check_not_pointer(path)
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: not a JSON object")
    return values


def _check_sizes(values: dict[str, Any], required: Sequence[str], optional: Sequence[str], path: Path) -> None:
    present = [key for key in optional if values.get(key) is not None]
    wrong = [key for key in (*required, *present) if not isinstance(values.get(key), int) or values[key] < 1]
    if wrong:
        raise ValueError(f"{path}: {', '.join(wrong)} must be a whole number above 0")


def _check_supported(values: dict[str, Any], path: Path) -> None:
    _check_sizes(values, _REQUIRED, ("num_key_value_heads", "head_dim"), path)
    for key, supported in _ONLY_SUPPORTED.items():
        value = values.get(key)
        if value is not None and value != supported:
            raise ValueError(f"{path}: {key} = {value!r} must be {supported!r}")
    other_layers = sorted(set(values.get("layer_types") or ()) - {"full_attention"})
    if other_layers:
        raise ValueError(f"{path}: layer_types has {', '.join(other_layers)}, must be full_attention")


def _rope(values: dict[str, Any], path: Path) -> tuple[float, dict[str, Any] | None]:
    """Return theta and the scaling from rope_parameters (5.x), rope_theta and rope_scaling (4.x), or both if equal."""
    readings = {}
    if values.get("rope_parameters"):
        readings["rope_parameters"] = _rope_reading(values["rope_parameters"], values.get("rope_theta"), path)
    if values.get("rope_scaling") or not readings:
        readings["rope_scaling"] = _rope_reading(values.get("rope_scaling") or {}, values.get("rope_theta"), path)
    theta, scaling = next(iter(readings.values()))
    if len(readings) == 2 and readings["rope_parameters"] != readings["rope_scaling"]:
        raise ValueError(f"{path}: rope_parameters and rope_scaling disagree: {readings}")
    if values.get("rope_theta") not in (None, theta):
        raise ValueError(f"{path}: rope_theta = {values['rope_theta']} but rope_parameters.rope_theta = {theta}")
    return theta, scaling


def _rope_reading(values: dict[str, Any], outer_theta: float | None, path: Path) -> tuple[float, dict[str, Any] | None]:
    values = dict(values)
    theta = float(values.pop("rope_theta", None) or outer_theta or _DEFAULT_THETA)
    kind = values.pop("rope_type", None) or values.get("type") or "default"
    values.pop("type", None)
    if values.pop("partial_rotary_factor", None) not in (None, 1.0):
        raise ValueError(f"{path}: partial_rotary_factor must be 1.0")
    if kind not in ("default", *ROPE_TYPES):
        raise ValueError(f"{path}: rope_type {kind!r} must be one of default, {', '.join(ROPE_TYPES)}")
    if kind == "default":
        return theta, None
    scaling = {"rope_type": kind, **values}
    check_scaling(scaling, str(path))
    return theta, scaling


def _mla_and_moe(values: dict[str, Any], path: Path) -> tuple[MLAArgs, MoEArgs]:
    _check_sizes(values, _LATENT_SIZES, _OPTIONAL_LATENT_SIZES, path)
    scoring = values.get("scoring_func", "softmax")
    if scoring != "softmax":
        raise ValueError(f"{path}: scoring_func = {scoring!r} must be 'softmax'")
    known = {key: value for key, value in values.items() if value is not None}
    try:
        mla = MLAArgs(**{item.name: known[item.name] for item in fields(MLAArgs) if item.name in known})
        moe = MoEArgs(**{item.name: known[item.name] for item in fields(MoEArgs) if item.name in known})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return mla, moe


def _longest(max_position_embeddings: int, scaling: dict[str, Any] | None) -> int:
    # Qwen's instructions for 128K add YaRN to config.json and leave max_position_embeddings unchanged.
    if scaling is None or scaling["rope_type"] != "yarn":
        return max_position_embeddings
    return max(max_position_embeddings, int(scaling["factor"] * scaling["original_max_position_embeddings"]))
