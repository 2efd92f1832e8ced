"""Weights of a sharded model: from a seed, an HF folder or a checkpoint, and out into an HF folder.

Owns the way between whole tensors and FSDP2's shards, one tensor at a time: no rank holds the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.tensor import DTensor, distribute_tensor

from hbp_titan.models.decoder import ModelArgs, init_parameter
from hbp_titan.models.hf import load_hf_tensors, save_hf_folder


def check_load_path(path: str, args: ModelArgs) -> None:
    """Raise ValueError unless `path` is empty, or an HF folder or checkpoint whose tensors fit `args`."""
    folder = Path(path)
    if not path or (folder / "state.json").is_file():
        return
    if not (folder / "config.json").is_file():
        raise ValueError(f"checkpoint.initial_load_path = {path!r} holds neither config.json nor state.json")
    load_hf_tensors(folder, args)


def initialize(model: nn.Module, args: ModelArgs, device: torch.device, seed: int, load_path: str) -> None:
    """Give the meta-device `model` storage on `device` and weights.

    load_path: an HF folder or a checkpoint; empty means new weights from `seed`, the same for every world size.
    """
    model.to_empty(device=device)
    if load_path and (Path(load_path) / "state.json").is_file():
        dcp.load({"model": get_model_state_dict(model)}, checkpoint_id=load_path)
    elif load_path:
        tensors = load_hf_tensors(Path(load_path), args)
        _fill(model, lambda name, shape: tensors[name])
    else:
        _fill(model, lambda name, shape: init_parameter(args, name, shape, seed))


@torch.no_grad()
def _fill(model: nn.Module, whole: Callable[[str, torch.Size], Tensor]) -> None:
    for name, parameter in model.named_parameters():
        value = whole(name, parameter.shape).to(device=parameter.device, dtype=parameter.dtype)
        if isinstance(parameter, DTensor):
            # Each rank keeps its own slice; src_data_rank=None sends nothing.
            value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.copy_(value)


def export_hf(
    model: nn.Module, args: ModelArgs, out: Path, tokenizer_path: Path, dtype: torch.dtype, token_ids: dict[str, Any]
) -> None:
    """Write the sharded model as an HF folder, replacing one that is there; every rank calls it, rank 0 writes."""
    tensors = _whole_tensors(model)
    if dist.get_rank() == 0:
        save_hf_folder(
            args, tensors, out, tokenizer_path=tokenizer_path, dtype=dtype, token_ids=token_ids, overwrite=True
        )
    else:
        for _ in tensors:
            pass
    dist.barrier()


@torch.no_grad()
def _whole_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        yield name, (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).cpu()
