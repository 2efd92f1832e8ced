"""What a run with LoRA keeps: its adapters, and what says which frozen weights they belong to.

Owns the description of an adapted model in state.json, its comparison on resume, and the way back from a checkpoint of
adapters alone to whole weights. Such a checkpoint is small, and resumes exactly as long as the base is the same: a
checksum of the frozen weights tells.
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

from hbp_titan.components.checkpoint_tensors import load_model_tensors
from hbp_titan.config import JobConfig
from hbp_titan.distributed.fsdp import sharded_parameters
from hbp_titan.distributed.mesh import shard_group
from hbp_titan.models.decoder import ModelArgs, init_parameter
from hbp_titan.models.hf import load_hf_tensors
from hbp_titan.models.lora import apply_lora, is_adapter, merged
from hbp_titan.models.registry import build_model

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def describe_adapter(config: JobConfig, model: nn.Module) -> dict[str, Any] | None:
    """What state.json holds as `lora`: the settings, and where the base comes from; None without LoRA.

    A collective: every rank calls it.
    """
    if not config.lora.rank:
        return None
    path = config.checkpoint.initial_load_path
    return {
        "rank": config.lora.rank,
        "alpha": config.lora.alpha,
        "target_modules": config.lora.target_modules,
        "base": {
            "path": str(Path(path).resolve()) if path else "",
            "seed": config.training.seed,
            "dtype": str(next(p.dtype for p in model.parameters() if not p.requires_grad)).removeprefix("torch."),
            "checksum": checksum((name, p.detach()) for name, p in sharded_parameters(model) if not is_adapter(name)),
        },
    }


def check_adapter(saved: Mapping[str, Any] | None, own: Mapping[str, Any] | None, path: Path) -> None:
    """Raise ValueError where the checkpoint at `path` holds something else than this run trains."""
    mend = "set it back, or name another --job.dump_folder"
    if (saved is None) != (own is None):
        held, trained = ("whole weights", "adapters") if saved is None else ("adapters", "whole weights")
        raise ValueError(f"cannot resume: {path} holds {held}, [lora] asks for {trained}: {mend}")
    if saved is None or own is None:
        return
    for key in ("rank", "alpha", "target_modules"):
        if saved[key] != own[key]:
            raise ValueError(f"cannot resume: lora.{key} is {saved[key]} in {path} but {own[key]} here: {mend}")
    dtype, own_dtype = saved["base"]["dtype"], own["base"]["dtype"]
    if dtype != own_dtype:
        raise ValueError(
            f"cannot resume: frozen weights are held in {dtype} in {path} but in {own_dtype} here; "
            f"set lora.base_dtype = {dtype}"
        )
    if saved["base"]["checksum"] != own["base"]["checksum"]:
        raise ValueError(
            f"cannot resume: {path} holds adapters of other frozen weights: those of {_origin(saved['base'])} with "
            f"checksum {saved['base']['checksum']}, not {own['base']['checksum']}: restore checkpoint.initial_load_path"
        )


def whole_tensors(step_folder: Path, state: Mapping[str, Any], args: ModelArgs) -> Iterator[tuple[str, Tensor]]:
    """The weights of a checkpoint as whole tensors by name, adapters merged into their base. Needs no process group.

    Raises ValueError where the base is gone or is not the one that was trained on.
    """
    with torch.device("meta"):
        model = build_model(args)
    lora = state.get("lora")
    if lora is None:
        return iter(load_model_tensors(step_folder, model).items())
    base = dict(_base_tensors(lora["base"], args))
    found = checksum(base.items())
    if found != lora["base"]["checksum"]:
        raise ValueError(
            f"{step_folder}: its adapters belong to {_origin(lora['base'])} with checksum {lora['base']['checksum']}, "
            f"which now has {found}: restore it"
        )
    apply_lora(model, lora["rank"], lora["alpha"], lora["target_modules"])
    return merged(base.items(), load_model_tensors(step_folder, model), lora["alpha"] / lora["rank"])


def _base_tensors(base: Mapping[str, Any], args: ModelArgs) -> Iterator[tuple[str, Tensor]]:
    """The frozen weights as the run had them: in its dtype."""
    path, dtype = Path(base["path"]), _DTYPES[base["dtype"]]
    with torch.device("meta"):
        model = build_model(args)
    tensors: Mapping[str, Tensor]
    if not base["path"]:
        tensors = {name: init_parameter(args, name, p.shape, base["seed"]) for name, p in model.named_parameters()}
    elif (path / "state.json").is_file():
        tensors = load_model_tensors(path, model)
    else:
        tensors = load_hf_tensors(path, args)
    for name, _ in model.named_parameters():
        yield name, tensors[name].to(dtype)


def _origin(base: Mapping[str, Any]) -> str:
    return base["path"] or f"seed {base['seed']}"


@torch.no_grad()
def checksum(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """16 hex digits of the bits of named tensors, whole or sharded: the same for any sharding and device.

    Each tensor's elements are summed as integers, times an odd number from its name, modulo 2^64. With DTensors a
    collective.
    """
    total, group, device = 0, None, torch.device("cpu")
    for name, tensor in tensors:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        group, device = group or shard_group([tensor]), local.device
        bits = local.contiguous().view({2: torch.int16, 4: torch.int32}[local.element_size()])
        factor = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") | 1
        total += factor * int(bits.sum(dtype=torch.int64))
    if group is not None:
        # As a signed number, whose sum wraps around as the unsigned one's does.
        part = torch.tensor((total + 2**63) % 2**64 - 2**63, dtype=torch.int64, device=device)
        dist.all_reduce(part, group=group)
        total = int(part)
    return f"{total % 2**64:016x}"
