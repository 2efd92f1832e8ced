"""Weights of a sharded model: from a seed, an HF folder or a checkpoint, and out into HF and PEFT folders.

Owns the way between whole tensors and FSDP2's shards, one tensor at a time: no rank holds the whole model, and of an
HF folder none reads more than its own shards.

What a run with LoRA keeps: its adapters, and what says which frozen weights they belong to.

Owns the description of an adapted model in state.json, its comparison on resume, and the way back from a checkpoint of
adapters alone to whole weights. Such a checkpoint is small, and resumes exactly as long as the base is the same: a
checksum of the frozen weights tells.
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
from hbp_titan.config import JobConfig
from hbp_titan.distributed.fsdp import sharded_parameters
from hbp_titan.distributed.mesh import fsdp_group
from hbp_titan.distributed.parallelize import DTYPES
from hbp_titan.distributed.world import barrier
from hbp_titan.job_config import LoRA
from hbp_titan.models.decoder import ModelArgs, init_parameter
from hbp_titan.models.hf import load_hf_tensors, save_hf_folder
from hbp_titan.models.lora import ALL_LINEAR, apply_lora, init_lora_parameter, is_adapter, merged, save_adapter_folder
from hbp_titan.models.registry import build_model

Slices = tuple[slice, ...]
_DTYPE_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def check_load_path(path: str, args: ModelArgs) -> None:
    """Raise ValueError unless `path` is empty, or an HF folder or checkpoint whose tensors fit `args`."""
    folder = Path(path)
    if not path:
        return
    if (folder / "state.json").is_file():
        if "lora" in read_state(folder):
            raise ValueError(
                f"checkpoint.initial_load_path = {path!r} holds LoRA adapters alone: merge them with "
                f"scripts/convert_to_hf.py {path} OUT and name OUT"
            )
        with torch.device("meta"):
            named = build_model(args).named_parameters(remove_duplicate=False)
        check_model_shapes(folder, {name: parameter.shape for name, parameter in named})
        return
    if not (folder / "config.json").is_file():
        raise ValueError(f"checkpoint.initial_load_path = {path!r} holds neither config.json nor state.json")
    load_hf_tensors(folder, args)


def initialize(model: nn.Module, args: ModelArgs, device: torch.device, seed: int, load_path: str) -> None:
    """Give the meta-device `model` storage on `device` and weights.

    load_path: an HF folder or a checkpoint; empty means new weights from `seed`, the same for every world size; each
        rank draws its own shards, on `device`. Adapters are new in any case.
    """
    model.to_empty(device=device)
    if load_path and (Path(load_path) / "state.json").is_file():
        base: dict[str, Any] = {
            name: value for name, value in get_model_state_dict(model).items() if not is_adapter(name)
        }
        load_model_shards(Path(load_path), base)
    elif load_path:
        tensors = load_hf_tensors(Path(load_path), args)
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


def describe_weights(load_path: str, args: ModelArgs, dtype: str) -> str:
    """Where the first weights come from, and what becomes of their dtype. dtype: that of the stored parameters."""
    if not load_path:
        return "new ones, from training.seed"
    if (Path(load_path) / "state.json").is_file():
        return f"{load_path}, a checkpoint, held in {dtype}"
    on_disk = ", ".join(_DTYPE_NAMES.get(name, name) for name in load_hf_tensors(load_path, args).dtypes)
    return f"{load_path}, {on_disk} on disk, held in {dtype}"


def _parameters(model: nn.Module, adapters: bool) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in sharded_parameters(model) if is_adapter(name) == adapters)


@torch.no_grad()
def _fill(parameters: Iterable[tuple[str, nn.Parameter]], read: Callable[[str, torch.Size, Slices], Tensor]) -> None:
    """Copy read(name, whole shape, slices of this rank) into each parameter."""
    for name, parameter in parameters:
        if not isinstance(parameter, DTensor):
            parameter.copy_(read(name, parameter.shape, tuple(slice(0, size) for size in parameter.shape)))
            continue
        # Of DCP's protocol: where this rank's elements lie in the whole.
        for chunk in parameter.__create_chunk_list__():
            dims = tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))
            if parameter.to_local().numel():
                parameter.to_local().copy_(read(name, parameter.shape, dims))


def export(model: nn.Module, args: ModelArgs, config: JobConfig, token_ids: dict[str, Any]) -> str:
    """hf/ of the run folder, with LoRA hf_adapter/ too; every rank calls it. Returns the lines that name them."""
    dtype, lora, folder = DTYPES[config.checkpoint.export_dtype], config.lora, config.dump_folder
    export_hf(model, args, folder / "hf", config.tokenizer_path, dtype, token_ids, lora)
    told = [f"HF weights   {folder / 'hf'}"]
    if lora.rank:
        export_adapter(model, lora, config.checkpoint.initial_load_path, folder / "hf_adapter", dtype)
        told.append(f"PEFT adapter {folder / 'hf_adapter'}")
    return "\n".join(told)


def export_hf(
    model: nn.Module,
    args: ModelArgs,
    out: Path,
    tokenizer_path: Path,
    dtype: torch.dtype,
    token_ids: dict[str, Any],
    lora: LoRA,
) -> None:
    """Write the sharded model as an HF folder, replacing one that is there; every rank calls it, rank 0 writes.

    Adapters are merged into their matrices, on the CPU in fp32, before these are rounded to `dtype`.
    """
    adapter = dict(_whole_tensors(model, adapters=True))
    tensors = _whole_tensors(model, adapters=False)
    if dist.get_rank() == 0:
        whole = merged(tensors, adapter, lora.alpha / lora.rank) if lora.rank else tensors
        save_hf_folder(
            args, whole, out, tokenizer_path=tokenizer_path, dtype=dtype, token_ids=token_ids, overwrite=True
        )
    else:
        for _ in tensors:
            pass
    barrier()


def export_adapter(model: nn.Module, lora: LoRA, base: str, out: Path, dtype: torch.dtype) -> None:
    """Write the adapters of the sharded model as a folder of PEFT's format; every rank calls it, rank 0 writes.

    base: checkpoint.initial_load_path; named in the folder where it is an HF folder.
    """
    adapter = dict(_whole_tensors(model, adapters=True))
    if dist.get_rank() == 0:
        save_adapter_folder(
            adapter,
            out,
            rank=lora.rank,
            alpha=lora.alpha,
            target_modules=_named_targets(lora, adapter),
            dtype=dtype,
            base=base if base and (Path(base) / "config.json").is_file() else None,
        )
    barrier()


def _named_targets(lora: LoRA, adapter: Iterable[str]) -> list[str]:
    # By their names: PEFT may count other matrices among all-linear.
    if lora.target_modules == [ALL_LINEAR]:
        return list(dict.fromkeys(name.split(".")[-3] for name in adapter))
    return lora.target_modules


@torch.no_grad()
def _whole_tensors(model: nn.Module, adapters: bool) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor) pairs, a collective for each; on the host on rank 0, of no use elsewhere."""
    for name, parameter in _parameters(model, adapters):
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        # A model of 70B takes 282 GB of a host in fp32: one copy of it, not one for each rank of a node.
        yield name, whole.cpu() if dist.get_rank() == 0 else whole


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
        group, device = group or fsdp_group([tensor]), local.device
        bits = local.contiguous().view({2: torch.int16, 4: torch.int32}[local.element_size()])
        factor = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") | 1
        total += factor * int(bits.sum(dtype=torch.int64))
    if group is not None:
        # As a signed number, whose sum wraps around as the unsigned one's does.
        part = torch.tensor((total + 2**63) % 2**64 - 2**63, dtype=torch.int64, device=device)
        dist.all_reduce(part, group=group)
        total = int(part)
    return f"{total % 2**64:016x}"
