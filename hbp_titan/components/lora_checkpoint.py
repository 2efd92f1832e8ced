"""LoRA checkpoints: the adapters only, with a description of the frozen base that they belong to.

Owns that description (the `lora` entry of state.json) and its checksum, which identifies the base when a run resumes or
a checkpoint is converted to whole weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hbp_titan.components.checkpoint import load_model_tensors
from hbp_titan.components.weights import is_checkpoint, named_shards
from hbp_titan.config import JobConfig
from hbp_titan.distributed.mesh import fsdp_group
from hbp_titan.distributed.parallelize import DTYPES
from hbp_titan.models.configs import ModelArgs
from hbp_titan.models.decoder import build_decoder, init_parameter
from hbp_titan.models.hf import HFTensors
from hbp_titan.models.lora import apply_lora, merged


def describe_adapter(config: JobConfig, model: nn.Module) -> dict[str, Any]:
    """Return the `lora` entry of state.json: the settings and the frozen base. A collective."""
    path = config.weights_path
    return {
        "rank": config.lora.rank,
        "alpha": config.lora.alpha,
        "target_modules": config.lora.target_modules,
        "base": {
            "path": str(Path(path).resolve()) if path else "",
            "seed": config.training.seed,
            "dtype": str(next(p.dtype for p in model.parameters() if not p.requires_grad)).removeprefix("torch."),
            "checksum": checksum((name, p.detach()) for name, p in named_shards(model, adapters=False)),
        },
    }


def check_adapter(saved: Mapping[str, Any], own: Mapping[str, Any], path: Path) -> None:
    """Raise ValueError if the adapters at `path` (its `lora` entry: `saved`) need another base than this run's (`own`).

    The settings in [lora] are among those that must stay (components/resume.py).
    """
    dtype, own_dtype = saved["base"]["dtype"], own["base"]["dtype"]
    if dtype != own_dtype:
        raise ValueError(
            f"cannot resume: frozen weights are in {dtype} in {path} but in {own_dtype} in this run; "
            f"set lora.base_dtype = {dtype}"
        )
    if saved["base"]["checksum"] != own["base"]["checksum"]:
        raise ValueError(
            f"cannot resume: the adapters in {path} belong to other frozen weights: {_origin(saved['base'])}, not "
            f"checksum {own['base']['checksum']}; restore the initial weights"
        )


def whole_tensors(step_folder: Path, state: Mapping[str, Any], args: ModelArgs) -> Iterator[tuple[str, Tensor]]:
    """Return the weights of a checkpoint as whole tensors by name, adapters merged. Needs no process group.

    Raises ValueError if the base is missing or is not the one that was trained on.
    """
    with torch.device("meta"):
        model = build_decoder(args)
    lora = state.get("lora")
    if lora is None:
        return iter(load_model_tensors(step_folder, model).items())
    base = _base_tensors(lora["base"], args, model)
    found = checksum(base.items())
    if found != lora["base"]["checksum"]:
        raise ValueError(
            f"{step_folder}: its adapters belong to {_origin(lora['base'])}, but the base now has {found}; restore it"
        )
    # After the base was read, whose names are those of the model without adapters.
    apply_lora(model, lora["rank"], lora["alpha"], lora["target_modules"])
    return merged(base.items(), load_model_tensors(step_folder, model), lora["alpha"] / lora["rank"])


def _base_tensors(base: Mapping[str, Any], args: ModelArgs, model: nn.Module) -> dict[str, Tensor]:
    """Return the frozen weights in the run's dtype. base: of state.json. model: on meta, without adapters."""
    tensors: Mapping[str, Tensor]
    if not base["path"]:
        tensors = {name: init_parameter(args, name, p.shape, base["seed"]) for name, p in model.named_parameters()}
    elif is_checkpoint(base["path"]):
        tensors = load_model_tensors(Path(base["path"]), model)
    else:
        tensors = HFTensors(Path(base["path"]), args)
    return {name: tensors[name].to(DTYPES[base["dtype"]]) for name, _ in model.named_parameters()}


def _origin(base: Mapping[str, Any]) -> str:
    return f"{base['path'] or 'seed ' + str(base['seed'])} with checksum {base['checksum']}"


@torch.no_grad()
def checksum(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return 16 hex digits of the bits of named tensors, the same for any sharding and device.

    The elements of each tensor are summed as integers, times an odd number derived from its name, modulo 2^64. A
    collective on DTensors.
    """
    total, replicated, group, device = 0, 0, None, "cpu"
    for name, tensor in tensors:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if isinstance(tensor, DTensor):
            # The group's device, which the shards are not on with parallelism.cpu_offload.
            group, device = group or fsdp_group([tensor]), tensor.device_mesh.device_type
        bits = local.contiguous().view({2: torch.int16, 4: torch.int32}[local.element_size()])
        factor = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") | 1
        value = factor * int(bits.sum(dtype=torch.int64))
        total, replicated = (total + value, replicated) if isinstance(tensor, DTensor) else (total, replicated + value)
    if group is not None:
        # torch has no sum of uint64; a signed sum wraps around in the same way.
        part = torch.tensor((total + 2**63) % 2**64 - 2**63, dtype=torch.int64, device=device)
        dist.all_reduce(part, group=group)
        total = int(part)
    return f"{(total + replicated) % 2**64:016x}"
