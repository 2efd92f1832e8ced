"""Weights of a sharded model: in from a seed, an HF folder or a checkpoint, and out as whole tensors.

Owns the conversion between whole tensors and FSDP2's shards, one tensor at a time: no rank holds the whole model, and
from an HF folder each rank reads its own shards only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.tensor import DTensor

from hbp_titan.components.checkpoint import check_model_shapes, load_model_shards, read_state
from hbp_titan.components.dcp_storage import STATE, TORCH_DTYPES
from hbp_titan.distributed.fsdp import sharded_parameters, whole_tensor
from hbp_titan.job_config import NEW_WEIGHTS
from hbp_titan.models.configs import ModelArgs
from hbp_titan.models.decoder import build_decoder, init_parameter
from hbp_titan.models.hf import HFTensors, MissingWeights
from hbp_titan.models.hf_files import require_folder
from hbp_titan.models.layers import is_adapter

Slices = tuple[slice, ...]


def check_load_path(path: str, args: ModelArgs, key: str = "checkpoint.initial_load_path") -> None:
    """Raise ValueError unless `path`, the value of `key`, is empty, or an HF folder or checkpoint that fits `args`."""
    folder = Path(path)
    if not path:
        return
    require_folder(folder, key)
    if is_checkpoint(path):
        if "lora" in read_state(folder):
            raise ValueError(
                f"{key} = {path!r}: the checkpoint contains LoRA adapters only; merge them with "
                f"scripts/convert_to_hf.py {path} OUT and pass OUT"
            )
        with torch.device("meta"):
            named = build_decoder(args).named_parameters(remove_duplicate=False)
        check_model_shapes(folder, {name: parameter.shape for name, parameter in named})
        return
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{key} = {path!r}: contains neither config.json nor {STATE}; pass an HF folder or a checkpoint"
        )
    try:
        HFTensors(folder, args).check_tied()
    except MissingWeights as error:
        # transformers' decoders cannot be drawn.
        new = "" if args.hf_config else f'; to train new weights, set checkpoint.initial_load_path = "{NEW_WEIGHTS}"'
        raise MissingWeights(f"{key}: {error}{new}") from None


def is_checkpoint(path: str) -> bool:
    """Return whether `path` is a checkpoint."""
    return bool(path) and (Path(path) / STATE).is_file()


def initialize(model: nn.Module, args: ModelArgs, device: torch.device, seed: int, load_path: str) -> None:
    """Allocate the meta-device `model` on `device` and set its weights.

    load_path: an HF folder or a checkpoint; if empty, weights are drawn from `seed`, the same for every world size,
        each rank its own shards on `device`. Adapters are always drawn.
    """
    model.to_empty(device=device)
    if is_checkpoint(load_path):
        # A checkpoint to start from has no adapters (check_load_path).
        base: dict[str, Any] = {n: value for n, value in get_model_state_dict(model).items() if not is_adapter(n)}
        load_model_shards(Path(load_path), base)
    elif load_path:
        tensors = HFTensors(Path(load_path), args)
        _fill(named_shards(model, adapters=False), lambda name, shape, dims: tensors.part(name, dims))
    else:
        _fill(
            named_shards(model, adapters=False),
            lambda name, shape, dims: init_parameter(args, name, shape, seed, dims, device),
        )
    if adapters := list(named_shards(model, adapters=True)):
        from hbp_titan.models.lora import init_lora_parameter

        _fill(adapters, lambda name, shape, dims: init_lora_parameter(name, shape, seed, dims, device))


def named_shards(model: nn.Module, adapters: bool) -> Iterator[tuple[str, nn.Parameter]]:
    """Return the (name, sharded parameter) pairs of the adapters of `model`, or those of all others."""
    return ((name, p) for name, p in sharded_parameters(model) if is_adapter(name) == adapters)


@torch.no_grad()
def _fill(parameters: Iterable[tuple[str, nn.Parameter]], read: Callable[[str, torch.Size, Slices], Tensor]) -> None:
    """Copy read(name, whole shape, slices of this rank) into each parameter."""
    for name, parameter in parameters:
        if not isinstance(parameter, DTensor):
            parameter.copy_(read(name, parameter.shape, tuple(slice(0, size) for size in parameter.shape)))
            continue
        # DCP's protocol: the place of this rank's elements in the whole tensor, for any placement.
        for chunk in parameter.__create_chunk_list__():
            dims = tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))
            if parameter.to_local().numel():
                parameter.to_local().copy_(read(name, parameter.shape, dims))


def describe_weights(load_path: str, args: ModelArgs, dtype: str) -> str:
    """Return where the initial weights come from and their dtype. dtype: of the parameters in memory."""
    if not load_path:
        return "NEW, drawn from training.seed"
    if is_checkpoint(load_path):
        return f"{load_path}, a checkpoint, held in {dtype}"
    found = HFTensors(load_path, args)
    names = ", ".join(str(TORCH_DTYPES.get(name, name)).removeprefix("torch.") for name in found.dtypes)
    ignored = f"; {len(found.ignored)} rotary_emb buffers ignored: they are computed" if found.ignored else ""
    layers = len({name.split(".")[2] for name in found.dropped})
    dropped = f"; {layers} layer(s) that predict further tokens dropped" if layers else ""
    return f"{load_path}, {names} on disk, held in {dtype}{ignored}{dropped}"


@torch.no_grad()
def whole_model_tensors(model: nn.Module, adapters: bool) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, whole tensor) pairs, each by a collective; on the host on rank 0, to be ignored elsewhere."""
    for name, parameter in named_shards(model, adapters):
        whole = whole_tensor(parameter)
        # A 70B model takes 282 GB of host memory in fp32: one copy per node fits, one per rank does not.
        yield name, whole.cpu() if dist.get_rank() == 0 else whole
