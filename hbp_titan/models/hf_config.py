"""HF config.json <-> ModelArgs.

Owns the keys that families share, the defaults of absent ones (transformers', else DeepSeek's own code's), and the
rejection of everything that would silently change the mathematics. hf_families.py has what differs between families.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hbp_titan.models.configs import ModelArgs
from hbp_titan.models.hf_files import describe_other_weights, read_json, require_folder
from hbp_titan.models.layers import ROPE_KEYS, attention_factor, check_scaling, yarn_mscale

if TYPE_CHECKING:
    from hbp_titan.models.hf_families import Family


TOKEN_ID_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")
_REQUIRED = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
    "max_position_embeddings",
)  # fmt: skip
# Optional keys by what their values must be.
_KINDS: dict[str, tuple[str, ...]] = {
    "a whole number above 0": (
        *_REQUIRED, "num_key_value_heads", "head_dim", "q_lora_rank", "n_group", "topk_group",
        "moe_layer_freq", "original_max_position_embeddings", "sliding_window", "num_experts", "num_local_experts",
        "num_experts_per_tok", "n_routed_experts", "n_shared_experts", "moe_intermediate_size", "kv_lora_rank",
        "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "no_rope_layer_interval", "query_pre_attn_scalar",
        "sliding_window_pattern",
    ),
    "a whole number of at least 0": ("first_k_dense_replace", "max_window_layers"),
    "a number above 0": (
        "rms_norm_eps", "rope_theta", "routed_scaling_factor", "rope_local_base_freq",
    ),
    "a number of at least 0": (
        "initializer_range", "aux_loss_alpha", "device_aux_loss_alpha", "comm_aux_loss_alpha",
        "router_aux_loss_coef",
    ),
    "true or false": (
        "tie_word_embeddings", "norm_topk_prob", "seq_aux", "use_sliding_window", "output_router_logits",
    ),
}  # fmt: skip
_ROPE_KINDS: dict[str, tuple[str, ...]] = {
    "a whole number above 0": ("original_max_position_embeddings",),
    "a number above 0": (
        "rope_theta", "factor", "attention_factor", "attn_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
        "low_freq_factor", "high_freq_factor",
    ),
    "true or false": ("truncate",),
}  # fmt: skip
# Keys whose other values would change the model; each defaults to the value given here.
_ONLY_SUPPORTED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}
_FIXES = {
    "quantization_config": "; convert the weights first (of DeepSeek-V3: its inference/fp8_cast_bf16.py), or take "
    "a bfloat16 copy, and remove the key",
    "attn_logit_softcapping": ": torch's attention kernels take no soft cap",
}
_DEFAULT_THETA = 10000.0


def args_from_hf(folder: str | Path, key: str = "folder", notes: list[str] | None = None) -> ModelArgs:
    """Return the architecture in `folder`/config.json, as transformers reads it; null counts as absent.

    key: what `folder` is the value of. notes: gets a line for keys that transformers ignores and others may not.
    Raises ValueError with `key` if there is no such folder, and with the file and its key for a model type, feature or
    value that is not supported.
    """
    from hbp_titan.models.hf_families import latent_args, more_fields

    require_folder(Path(folder), key)
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{key}: {folder} has no config.json{describe_other_weights(Path(folder))}")
    raw = read_json(path)
    family = _family(raw.get("model_type"), f"{path}: ", raw)
    absent = {key: value for key, value in family.defaults.items() if key not in raw and key != "rope_theta"}
    values = {name: value for name, value in raw.items() if value is not None} | absent
    _check_supported(values, family, path)
    if values.get("output_router_logits") and notes is not None:
        notes.append(
            f"{path}: output_router_logits, router_aux_loss_coef ignored: transformers' balance loss joins documents "
            "and layers; aux_loss_alpha sets one per document and layer (docs/models.md)"
        )
    num_heads = values["num_attention_heads"]
    theta, scaling = _rope(
        values, path, family.defaults.get("rope_theta", _DEFAULT_THETA), [] if notes is None else notes
    )
    try:
        layer_types, window = family.windows(values)
        mla = latent_args(values) if family.mla else None
        moe = None if family.moe is None else family.moe(values)
        more = more_fields(values, raw["model_type"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return ModelArgs(
        name=Path(folder).resolve().name,
        hf_model_type=raw["model_type"],
        hidden_size=values["hidden_size"],
        intermediate_size=values["intermediate_size"],
        num_layers=values["num_hidden_layers"],
        num_heads=num_heads,
        num_kv_heads=values.get("num_key_value_heads") or num_heads,
        head_dim=mla.qk_head_dim if mla else values.get("head_dim") or values["hidden_size"] // num_heads,
        vocab_size=values["vocab_size"],
        max_position_embeddings=_longest(values["max_position_embeddings"], scaling),
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=values.get("rms_norm_eps", 1e-6),
        tie_embeddings=values.get("tie_word_embeddings", False),
        initializer_range=values.get("initializer_range", 0.02),
        mla=mla,
        moe=moe,
        layer_types=layer_types,
        sliding_window=window,
        sliding_rope_theta=_sliding_theta(values, theta, path) if family.layer_rope else None,
        **family.implied,
        **more,
    )


def _family(model_type: Any, where: str, config: dict[str, Any] | None = None) -> Family:
    from hbp_titan.models.hf_families import FAMILIES

    if not isinstance(model_type, str) or model_type not in FAMILIES:
        from hbp_titan.models.transformers_probe import advice

        other = advice(config) if config else ""
        raise ValueError(f"{where}model_type {_short(model_type)} must be one of {', '.join(FAMILIES)}{other}")
    return FAMILIES[model_type]


def args_to_hf_config(args: ModelArgs) -> dict[str, Any]:
    """Return config.json for `args`. Raises ValueError if the family cannot express the architecture."""
    # RoPE is written for transformers 4.x and vLLM and again for 5.x, with equal values. Token ids are null, because
    # transformers' defaults (1 and 2) would be wrong for most tokenizers.
    from hbp_titan.models.hf_families import feature_fields

    if args.hf_config is not None:
        return dict(json.loads(args.hf_config))
    family = _family(args.hf_model_type, f"model {args.name}: ")
    if different := feature_fields(args):
        required = ", ".join(f"{name}={implied}, not {own}" for name, (own, implied) in different.items())
        raise ValueError(f"model {args.name}: {args.hf_model_type} requires {required}")
    rope_parameters: dict[str, Any]
    rope_parameters = {"rope_type": "default", **(args.rope_scaling or {}), "rope_theta": args.rope_theta}
    if family.layer_rope:
        sliding = {"rope_type": "default", "rope_theta": args.sliding_rope_theta}
        rope_parameters = {"full_attention": rope_parameters, "sliding_attention": sliding}
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
        **family.keys(args),
    }


def token_ids_from_hf(folder: str | Path) -> dict[str, Any]:
    """Return bos, eos and pad token ids of an HF folder: generation_config.json's, else config.json's.

    eos may be a list (chat models stop at several tokens). Raises ValueError for what is not an id.
    """
    found: dict[str, Any] = {}
    for name in ("config.json", "generation_config.json"):
        path = Path(folder) / name
        values = read_json(path) if path.is_file() else {}
        found.update(
            {key: ids for key in TOKEN_ID_KEYS if (ids := _ids(values.get(key), f"{path}: {key}")) is not None}
        )
    return found


def _ids(value: Any, where: str) -> int | list[int] | None:
    """Return the id or ids in `value`; None for null and -1, which older folders have for no token."""
    ids = value if isinstance(value, list) else [] if value in (None, -1) else [value]
    if any(isinstance(index, bool) or not isinstance(index, int) or index < 0 for index in ids):
        raise ValueError(f"{where} = {_short(value)} must be a token id or a list of token ids")
    return value if ids else None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."


def _check_kinds(values: Mapping[str, Any], kinds: Mapping[str, tuple[str, ...]], where: str) -> None:
    for kind, keys in kinds.items():
        for key in keys:
            value = values.get(key)
            if value is None:
                continue
            # A bool is an int in Python; JSON as Python reads it has NaN and infinity.
            fits = isinstance(value, bool) if kind == "true or false" else not isinstance(value, bool)
            if fits and "number" in kind:
                fits = isinstance(value, int if "whole" in kind else int | float) and 0 <= value < math.inf
                fits = fits and (value > 0 or "above" not in kind)
            if not fits:
                raise ValueError(f"{where}{key} = {_short(value)} must be {kind}")


def _check_supported(values: dict[str, Any], family: Family, path: Path) -> None:
    if missing := [key for key in (*_REQUIRED, *family.required) if key not in values]:
        raise ValueError(f"{path}: has no {', '.join(missing)}")
    _check_kinds(values, _KINDS, f"{path}: ")
    numbers = [key for kind, keys in _KINDS.items() if kind.startswith("a number") for key in keys if key in values]
    # transformers refuses 1 for 1.0 in what is written back.
    values |= {key: float(values[key]) for key in numbers}
    for key, supported in {**_ONLY_SUPPORTED, **family.only}.items():
        if values.get(key, supported) != supported:
            raise ValueError(f"{path}: {key} = {_short(values[key])} must be {supported!r}{_FIXES.get(key, '')}")


def _sliding_theta(values: dict[str, Any], theta: float, path: Path) -> float:
    """Return theta of the layers with a window: rope_parameters' (5.x), rope_local_base_freq (4.x), else `theta`."""
    nested = (values.get("rope_parameters") or {}).get("sliding_attention") or {}
    where = f"{path}: rope_parameters.sliding_attention"
    if not isinstance(nested, dict):
        raise ValueError(f"{where} = {_short(nested)} must be an object")
    _check_kinds(nested, _ROPE_KINDS, f"{where}.")
    if nested.get("rope_type", "default") != "default":
        raise ValueError(f"{where}.rope_type = {_short(nested['rope_type'])} must be 'default'")
    return float(nested.get("rope_theta") or values.get("rope_local_base_freq") or theta)


def _rope(values: dict[str, Any], path: Path, default: float, notes: list[str]) -> tuple[float, dict[str, Any] | None]:
    """Return theta and the scaling from rope_parameters (5.x), rope_theta and rope_scaling (4.x), or both if equal."""
    readings = {
        key: _rope_reading(values, values.get(key) or {}, f"{path}: {key}", default, notes)
        for key in ("rope_parameters", "rope_scaling")
        if values.get(key)
    } or {"rope_theta": _rope_reading(values, {}, f"{path}: rope_theta", default, notes)}
    theta, scaling = next(iter(readings.values()))
    if len(readings) == 2 and readings["rope_parameters"] != readings["rope_scaling"]:
        raise ValueError(f"{path}: rope_parameters and rope_scaling disagree: {readings}")
    if values.get("rope_theta") not in (None, theta):
        raise ValueError(f"{path}: rope_theta = {values['rope_theta']} but rope_parameters.rope_theta = {theta}")
    return theta, scaling


def _rope_reading(
    config: Mapping[str, Any], values: Any, where: str, default: float, notes: list[str]
) -> tuple[float, dict[str, Any] | None]:
    """Return theta and the scaling of one key of `config`, an object or one such object per layer type."""
    if isinstance(values, dict) and (nested := [key for key in values if key.endswith("_attention")]):
        where, values = f"{where}.full_attention", values.get("full_attention")
        if values is None:
            raise ValueError(f"{where} is missing: only {', '.join(nested)} has parameters")
    if not isinstance(values, dict):
        raise ValueError(f"{where} = {_short(values)} must be an object")
    # transformers reads null as false here, and as absent elsewhere.
    values = {key: value for key, value in values.items() if value is not None or key == "truncate"}
    _check_kinds(values, _ROPE_KINDS, f"{where}.")
    theta = float(values.pop("rope_theta", None) or config.get("rope_theta") or default)
    kind = values.pop("rope_type", None) or values.get("type") or "default"
    values.pop("type", None)
    if values.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"{where}: partial_rotary_factor must be 1.0")
    if kind not in ("default", *ROPE_KEYS):
        raise ValueError(f"{where}: rope_type {_short(kind)} must be one of default, {', '.join(ROPE_KEYS)}")
    if kind == "default":
        return theta, None
    required, optional = ROPE_KEYS[kind]
    if "original_max_position_embeddings" in required:
        # The order of transformers: a key of the whole config comes first.
        outer = config.get("original_max_position_embeddings")
        inner = values.get("original_max_position_embeddings", config["max_position_embeddings"])
        values["original_max_position_embeddings"] = outer or inner
    scaling = {"rope_type": kind, **{key: values.pop(key) for key in (*required, *optional) if key in values}}
    check_scaling(scaling, where)
    notes += _ignored_keys(values, scaling, where)
    return theta, scaling


def _ignored_keys(values: Mapping[str, Any], scaling: Mapping[str, Any], where: str) -> list[str]:
    """Return a line for the keys that transformers ignores."""
    lines = []
    others = [key for key in values if key not in ("finetuned", "attn_factor")]
    if others:
        lines.append(f"{where}: {', '.join(others)} ignored, as transformers does")
    if not agrees_with_vllm(values, scaling):
        own, theirs = attention_factor(dict(scaling)), yarn_mscale(scaling["factor"]) * values["attn_factor"]
        lines.append(
            f"{where}.attn_factor ignored, as transformers does: cosines and sines are multiplied by {own:.4g}, by "
            f"{theirs:.4g} in vLLM; the export leaves attn_factor out. To train with vLLM's, add "
            f'"attention_factor": {theirs:.4g}'
        )
    return lines


def agrees_with_vllm(published: Mapping[str, Any], scaling: Mapping[str, Any]) -> bool:
    """Return whether vLLM, which multiplies YaRN's temperature by attn_factor, reads what transformers reads."""
    if scaling["rope_type"] != "yarn" or published.get("attn_factor") is None:
        return True
    theirs = yarn_mscale(scaling["factor"]) * published["attn_factor"]
    return math.isclose(theirs, attention_factor(dict(scaling)), rel_tol=1e-3)


def _longest(max_position_embeddings: int, scaling: dict[str, Any] | None) -> int:
    # Qwen's instructions for 128K add YaRN to config.json and leave max_position_embeddings unchanged.
    if scaling is None or scaling["rope_type"] != "yarn":
        return max_position_embeddings
    return max(max_position_embeddings, int(scaling["factor"] * scaling["original_max_position_embeddings"]))
