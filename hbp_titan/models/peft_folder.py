"""An adapter as a folder of HF PEFT's format: adapter_config.json and adapter_model.safetensors.

Owns the names and the keys of that format (peft 0.21 reads it; older ones, vLLM and SGLang know the same keys).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from hbp_titan.models.hf import to_hf_name

_PREFIX = "base_model.model."


def save_adapter_folder(
    adapter: Mapping[str, Tensor],
    out: Path,
    *,
    rank: int,
    alpha: float,
    target_modules: Sequence[str],
    dtype: torch.dtype,
    base: str | None,
) -> None:
    """Write `adapter` (whole tensors by our names) into `out`, replacing what is there; complete or not at all.

    target_modules: names of the adapted matrices, by their last part. base: the HF folder that the adapter belongs to,
    None where the base is none.
    """
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        # An int in PEFT; vLLM refuses 16.0.
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "target_modules": list(target_modules),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }
    tensors = {_PREFIX + to_hf_name(fqn): t.detach().to("cpu", dtype).contiguous() for fqn, t in adapter.items()}
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file(tensors, temporary / "adapter_model.safetensors", metadata={"format": "pt"})
    (temporary / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    temporary.rename(out)
