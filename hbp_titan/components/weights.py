"""Weights of a sharded model: in from a seed, an HF folder or a checkpoint, and out as whole tensors.

Owns the conversion between whole tensors and FSDP2's shards, one tensor at a time: no rank holds the whole model, and
from an HF folder each rank reads its own shards only.

Owns what a LoRA checkpoint needs in addition: it contains the adapters only, so state.json describes the frozen base
with a checksum. That identifies the base when the run resumes or the checkpoint is converted to whole weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.tensor import DTensor

from hbp_titan.components.checkpoint import check_model_shapes, load_model_shards, load_model_tensors, read_state
from hbp_titan.components.dcp_storage import STATE, TORCH_DTYPES
from hbp_titan.config import JobConfig
from hbp_titan.distributed.fsdp import sharded_parameters, whole_tensor
from hbp_titan.distributed.mesh import fsdp_group
from hbp_titan.distributed.parallelize import DTYPES
from hbp_titan.job_config import NEW_WEIGHTS
from hbp_titan.models.configs import ModelArgs
from hbp_titan.models.decoder import build_decoder, init_parameter
from hbp_titan.models.hf import HFTensors, MissingWeights
from hbp_titan.models.hf_files import require_folder
from hbp_titan.models.lora import apply_lora, init_lora_parameter, is_adapter, merged

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
        _fill(_parameters(model, adapters=False), lambda name, shape, dims: tensors.part(name, dims))
    else:
        _fill(
            _parameters(model, adapters=False),
            lambda name, shape, dims: init_parameter(args, name, shape, seed, dims, device),
        )
    _fill(
        _parameters(model, adapters=True),
        lambda name, shape, dims: init_lora_parameter(name, shape, seed, dims, device),
    )


def _parameters(model: nn.Module, adapters: bool) -> Iterator[tuple[str, nn.Parameter]]:
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
    for name, parameter in _parameters(model, adapters):
        whole = whole_tensor(parameter)
        # A 70B model takes 282 GB of host memory in fp32: one copy per node fits, one per rank does not.
        yield name, whole.cpu() if dist.get_rank() == 0 else whole


def describe_adapter(config: JobConfig, model: nn.Module) -> dict[str, Any] | None:
    """Return the `lora` entry of state.json: the settings and the frozen base; None without LoRA. A collective."""
    if not config.lora.rank:
        return None
    path = config.weights_path
    return {
        "rank": config.lora.rank,
        "alpha": config.lora.alpha,
        "target_modules": config.lora.target_modules,
        "base": {
            "path": str(Path(path).resolve()) if path else "",
            "seed": config.training.seed,
            "dtype": str(next(p.dtype for p in model.parameters() if not p.requires_grad)).removeprefix("torch."),
            "checksum": checksum((name, p.detach()) for name, p in _parameters(model, adapters=False)),
        },
    }


def check_adapter(saved: Mapping[str, Any] | None, own: Mapping[str, Any] | None, path: Path) -> None:
    """Raise ValueError if the adapters at `path` (its `lora` entry: `saved`) need another base than this run's (`own`).

    The settings in [lora] are among those that must stay (components/resume.py).
    """
    if saved is None or own is None:
        return
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
