"""DeepSeek-V2's part of config.json <-> MLAArgs and MoEArgs.

Owns the defaults of absent keys, which are transformers' (and DeepSeek's own code's where transformers has no such
key), and the refusal of what is not built. The fields of both records have the names of the keys.
"""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from hbp_titan.models.args import MLAArgs, ModelArgs, MoEArgs

_SIZES = (
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "n_routed_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "n_shared_experts",
)
_OPTIONAL_SIZES = ("q_lora_rank", "n_group", "topk_group", "moe_layer_freq")


def mla_and_moe_from_hf(values: dict[str, Any], path: Path) -> tuple[MLAArgs, MoEArgs]:
    """Both records of a config.json. Raises ValueError naming the file and the key for what is not supported."""
    present = [key for key in _OPTIONAL_SIZES if values.get(key) is not None]
    wrong = [key for key in (*_SIZES, *present) if not isinstance(values.get(key), int) or values[key] < 1]
    if wrong:
        raise ValueError(f"{path}: needs a whole number above 0 for {', '.join(wrong)}")
    scoring = values.get("scoring_func", "softmax")
    if scoring != "softmax":
        raise ValueError(f"{path}: scoring_func = {scoring!r} is not supported, only 'softmax' is")
    known = {key: value for key, value in values.items() if value is not None}
    try:
        mla = MLAArgs(**{item.name: known[item.name] for item in fields(MLAArgs) if item.name in known})
        moe = MoEArgs(**{item.name: known[item.name] for item in fields(MoEArgs) if item.name in known})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return mla, moe


def mla_and_moe_to_hf(args: ModelArgs) -> dict[str, Any]:
    """The keys of config.json that hold both records."""
    assert args.mla is not None
    assert args.moe is not None
    # transformers' head_dim is what rotary embedding sees.
    return {**asdict(args.mla), **asdict(args.moe), "head_dim": args.rope_dim, "scoring_func": "softmax", "ep_size": 1}
