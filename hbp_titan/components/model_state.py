"""Weights of a sharded model: from a seed, from an HF folder, and out into one.

Owns the way between whole tensors and FSDP2's shards, one tensor at a time: no rank holds the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from hbp_titan.models.decoder import ModelArgs, init_parameter
from hbp_titan.models.hf import load_hf_tensors, save_hf_folder


def initialize(model: nn.Module, args: ModelArgs, device: torch.device, seed: int, hf_path: str) -> None:
    """Give the meta-device `model` storage on `device` and weights: from `hf_path` where given, else from `seed`.

    The same weights result for every world size: each whole tensor is made or read alike on every rank.
    """
    model.to_empty(device=device)
    if hf_path:
        tensors = load_hf_tensors(Path(hf_path), args)
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


def export_hf(model: nn.Module, args: ModelArgs, out: Path, tokenizer_path: Path, dtype: torch.dtype) -> None:
    """Write the sharded model as an HF folder; every rank calls it, rank 0 writes."""
    tensors = _whole_tensors(model)
    if dist.get_rank() == 0:
        save_hf_folder(args, tensors, out, tokenizer_path=tokenizer_path, dtype=dtype)
    else:
        for _ in tensors:
            pass
    dist.barrier()


@torch.no_grad()
def _whole_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        yield name, (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).cpu()
