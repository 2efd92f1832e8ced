"""HF model folders: names and shapes of tensors, lazy reading of safetensors, and atomic writing.

Owns the mapping between HF's tensors and our parameters: the experts of a layer are one parameter here and one tensor
per expert on disk; everything else is one to one. config.json is read and written by hf_config.py.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hbp_titan.models.configs import ModelArgs
from hbp_titan.models.decoder import Decoder
from hbp_titan.models.hf_config import TOKEN_ID_KEYS, args_from_hf, args_to_hf_config, read_json
from hbp_titan.models.hf_files import check_not_pointer, copy_tokenizer, tokenizer_files
from hbp_titan.utils import first_n

_TIED_OUTPUT = "head.output.weight"
_SINGLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
_GENERATION_FILE = "generation_config.json"
_FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
MAX_LISTED = 20  # names in a message

# Ours, HF's. Everything after the prefix has the same name.
_PREFIXES = (
    ("tok_embeddings.", "model.embed_tokens."),
    ("layers.", "model.layers."),
    ("head.norm.", "model.norm."),
    ("head.output.", "lm_head."),
)
# layers.3.mlp.experts.up_proj <-> model.layers.3.mlp.experts.0.up_proj.weight, ...1...
_FUSED = re.compile(r"(.*\.mlp\.experts)\.(gate_proj|up_proj|down_proj)")
_OF_EXPERT = re.compile(r"(.*\.mlp\.experts)\.\d+\.(gate_proj|up_proj|down_proj)\.weight")


def to_hf_name(fqn: str) -> str:
    """Return HF's name of our parameter `fqn`. Raises ValueError for a name that no decoder has."""
    for ours, theirs in _PREFIXES:
        if fqn.startswith(ours):
            return theirs + fqn[len(ours) :]
    raise ValueError(f"{fqn!r} is not a parameter of a decoder")


def from_hf_name(name: str) -> str:
    """Return our name of HF's parameter `name`, the fused one for an expert's. Raises ValueError for other names."""
    for ours, theirs in _PREFIXES:
        if name.startswith(theirs):
            return _OF_EXPERT.sub(r"\1.\2", ours + name[len(theirs) :])
    raise ValueError(f"{name!r} is not a parameter of a Llama, Qwen2, Qwen3 or DeepSeek-V2 model")


def is_fused(fqn: str) -> bool:
    """Return whether our parameter `fqn` holds a projection of all experts of a layer."""
    return _FUSED.fullmatch(fqn) is not None


def hf_names(fqn: str, shape: Sequence[int]) -> list[str]:
    """Return HF's names of the tensors of our parameter `fqn`: one, or one per row of fused experts."""
    fused = _FUSED.fullmatch(fqn)
    if fused is None:
        return [to_hf_name(fqn)]
    experts, projection = to_hf_name(fused[1]), fused[2]
    return [f"{experts}.{expert}.{projection}.weight" for expert in range(shape[0])]


def hf_shapes(args: ModelArgs) -> dict[str, list[int]]:
    """Return the shape of every tensor on disk by HF's name, without a tied output matrix."""
    shapes = {}
    for fqn, shape in parameter_shapes(args).items():
        of_one = shape[1:] if is_fused(fqn) else shape
        shapes.update({name: list(of_one) for name in hf_names(fqn, shape)})
    return shapes


def parameter_shapes(args: ModelArgs) -> dict[str, torch.Size]:
    """Return the shape of every parameter by our name, without a tied output matrix."""
    with torch.device("meta"):
        return {fqn: parameter.shape for fqn, parameter in Decoder(args).named_parameters()}


class MissingWeights(ValueError):
    """A folder has no weights that are read."""


class HFTensors(Mapping[str, Tensor]):
    """The weights of an HF folder by our names, each read on access (memory-mapped, on the CPU).

    args: the architecture to compare with, default that of config.json. dtypes: safetensors' names of the dtypes on
    disk. The constructor raises ValueError, before it reads any tensor, listing all missing, unknown and misshapen
    tensors.
    """

    def __init__(self, folder: str | Path, args: ModelArgs | None = None) -> None:
        self.folder = Path(folder)
        self.args = args_from_hf(folder) if args is None else args
        self._files: dict[str, Any] = {}
        shapes: dict[str, tuple[list[int], str]] = {}
        for path in _weight_files(self.folder):
            handle = _open(path)
            for name in handle.keys():  # noqa: SIM118 (safe_open is not a mapping)
                if name in self._files:
                    raise ValueError(f"{path}: {name} is also in another file of the folder; restore the folder")
                header = handle.get_slice(name)
                self._files[name], shapes[name] = handle, (header.get_shape(), header.get_dtype())
        self.dtypes = sorted({dtype for _, dtype in shapes.values()})
        _compare(self.folder, shapes, self.args)

    @cached_property
    def _names(self) -> dict[str, list[str]]:
        return {fqn: hf_names(fqn, shape) for fqn, shape in parameter_shapes(self.args).items()}

    def __getitem__(self, fqn: str) -> Tensor:
        return self.part(fqn, ())

    def part(self, fqn: str, dims: Sequence[slice]) -> Tensor:
        """Read the part of parameter `fqn` in these slices of its first dims, and nothing else."""
        names = self._names[fqn]
        if is_fused(fqn):
            experts, inside = (dims[0], dims[1:]) if dims else (slice(None), ())
            read = [self._read(name, inside) for name in names[experts]]
            return torch.stack(read) if read else torch.empty(0)
        tensor = self._read(names[0], dims)
        if self.args.tie_embeddings and fqn == "tok_embeddings.weight":
            self._check_tied_output(names[0], tensor, dims)
        return tensor

    def _read(self, name: str, dims: Sequence[slice]) -> Tensor:
        handle = self._files[name]
        return handle.get_slice(name)[tuple(dims)] if dims else handle.get_tensor(name)

    def _check_tied_output(self, name: str, embedding: Tensor, dims: Sequence[slice]) -> None:
        output_name = to_hf_name(_TIED_OUTPUT)
        if output_name in self._files and not torch.equal(embedding, self._read(output_name, dims)):
            raise ValueError(
                f"{self.folder}: config.json ties the embeddings, but {name} and {output_name} differ; "
                "set tie_word_embeddings to false or remove one of them"
            )

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def save_hf_folder(
    args: ModelArgs,
    tensors: Iterable[tuple[str, Tensor]],
    out: str | Path,
    *,
    dtype: torch.dtype,
    tokenizer_path: str | Path | None = None,
    token_ids: Mapping[str, Any] | None = None,
    max_shard_bytes: float = 5e9,
    overwrite: bool = False,
    chat_template: str = "",
) -> None:
    """Write a folder that transformers and vLLM load, atomically: configs, weights, tokenizer files.

    tensors: (our name, whole tensor) pairs, each parameter once, in any order, consumed one at a time and stored in
        `dtype`; the output matrix of a tied model is skipped.
    tokenizer_path: folder from which tokenizer, chat template and sampling settings are copied.
    token_ids: bos_token_id, eos_token_id, pad_token_id for config.json; null if absent.
    max_shard_bytes: maximum size of a weight file.
    overwrite: replace `out` if it exists and is not empty; otherwise that is a ValueError.
    chat_template: source of the template that takes the place of the tokenizer's own.

    Raises ValueError for unknown, repeated, missing or misshapen tensors and for unknown token_ids.
    """
    out = Path(out)
    unknown = set(token_ids or {}) - set(TOKEN_ID_KEYS)
    if unknown:
        raise ValueError(f"token_ids has {', '.join(sorted(unknown))}; use {', '.join(TOKEN_ID_KEYS)}")
    if not overwrite and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: exists and is not empty; pass another folder or remove it")
    source = None if tokenizer_path is None else Path(tokenizer_path)
    for file in [source / name for name in tokenizer_files(source, carried=True)] if source else ():
        check_not_pointer(file)
    dtype_name = str(dtype).removeprefix("torch.")
    # transformers before 4.56 and vLLM read torch_dtype, later versions dtype.
    config = {**args_to_hf_config(args), **(token_ids or {}), "dtype": dtype_name, "torch_dtype": dtype_name}
    temporary = out.with_name(f".{out.name}.tmp-{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        _write_json(temporary / "config.json", config)
        _write_json(temporary / _GENERATION_FILE, _generation_config(tokenizer_path, config))
        _write_weights(temporary, _checked(args, tensors, dtype), max_shard_bytes)
        if source:
            copy_tokenizer(source, temporary, chat_template)
        _replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _generation_config(source: str | Path | None, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the generation config of the folder `source`, with the token ids that `config` has."""
    path = Path(source) / _GENERATION_FILE if source is not None else None
    carried = read_json(path) if path is not None and path.is_file() else {}
    named = {key: config[key] for key in TOKEN_ID_KEYS if config[key] is not None}
    return {**dict.fromkeys(TOKEN_ID_KEYS), **carried, **named}


def _checked(
    args: ModelArgs, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    expected = parameter_shapes(args)
    for fqn, tensor in tensors:
        if args.tie_embeddings and fqn == _TIED_OUTPUT:
            continue
        shape = expected.pop(fqn, None)
        if shape is None:
            raise ValueError(f"model {args.name}: tensor {fqn} is unknown or repeated")
        if tensor.shape != shape:
            raise ValueError(f"model {args.name}: tensor {fqn} is of shape {list(tensor.shape)}, not {list(shape)}")
        tensor = tensor.detach().to("cpu", dtype)
        if is_fused(fqn):
            # Cloned, because safetensors rejects tensors that share memory.
            yield from ((name, part.clone()) for name, part in zip(hf_names(fqn, shape), tensor, strict=True))
        else:
            yield to_hf_name(fqn), tensor.contiguous()
    if expected:
        raise ValueError(f"model {args.name}: missing tensors {first_n(list(expected), MAX_LISTED)}")


def _write_weights(folder: Path, tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: float) -> None:
    shards: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    shard_bytes = total_bytes = 0

    def close_shard() -> None:
        nonlocal shard, shard_bytes
        shards.append(list(shard))
        save_file(shard, folder / f"shard-{len(shards)}", metadata={"format": "pt"})
        shard, shard_bytes = {}, 0

    for name, tensor in tensors:
        if shard and shard_bytes + tensor.nbytes > max_shard_bytes:
            close_shard()
        shard[name] = tensor
        shard_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
    close_shard()
    # Renamed at the end, because file names contain the number of files.
    if len(shards) == 1:
        (folder / "shard-1").rename(folder / _SINGLE_FILE)
        return
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{number}").rename(folder / file_name)
        weight_map.update(dict.fromkeys(names, file_name))
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(folder / _INDEX_FILE, index)


def _weight_files(folder: Path) -> list[Path]:
    if (folder / _SINGLE_FILE).is_file():
        return [folder / _SINGLE_FILE]
    index = folder / _INDEX_FILE
    if not index.is_file():
        # Not at the top: few folders lack their weights.
        from hbp_titan.models.hf_missing import describe_other_weights

        raise MissingWeights(
            f"{folder}: contains neither {_SINGLE_FILE} nor {_INDEX_FILE}{describe_other_weights(folder)}"
        )
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{index}: weight_map is not an object of file names")
    names = sorted(set(weight_map.values()))
    for name in names:
        # The index is untrusted input: a path could name files outside the folder.
        if "/" in name or "\\" in name or not name.endswith(".safetensors"):
            raise ValueError(f"{index}: {name!r} is not the name of a safetensors file in this folder")
        if not (folder / name).is_file():
            raise ValueError(f"{index}: {name} is missing from the folder")
    return [folder / name for name in names]


def _open(path: Path) -> Any:
    check_not_pointer(path)
    try:
        return safe_open(path, framework="pt", device="cpu")
    except SafetensorError as error:
        raise ValueError(f"{path}: truncated or corrupt safetensors file: {error}") from None


def _compare(folder: Path, found: Mapping[str, tuple[list[int], str]], args: ModelArgs) -> None:
    expected = hf_shapes(args)
    if args.tie_embeddings and to_hf_name(_TIED_OUTPUT) in found:
        expected[to_hf_name(_TIED_OUTPUT)] = [args.vocab_size, args.hidden_size]
    missing = [name for name in expected if name not in found]
    unknown = [name for name in found if name not in expected]
    both = [name for name in expected if name in found]
    misshapen = [f"{n} {found[n][0]} instead of {expected[n]}" for n in both if found[n][0] != expected[n]]
    not_float = [f"{n} of type {found[n][1]}" for n in both if found[n][1] not in _FLOAT_DTYPES]
    kinds = {"missing": missing, "unknown": unknown, "misshapen": misshapen, "not floating point": not_float}
    problems = [f"{kind}: {first_n(names, MAX_LISTED)}" for kind, names in kinds.items() if names]
    if problems:
        raise ValueError(
            f"{folder}: the weights do not match {args.hf_model_type} config.json; restore the folder; "
            + "; ".join(problems)
        )


def _replace(temporary: Path, out: Path) -> None:
    # A folder cannot be renamed over a non-empty one; the old one moves aside first.
    if not out.exists():
        temporary.rename(out)
        return
    old = temporary.with_name(f"{temporary.name}.old")
    out.rename(old)
    temporary.rename(out)
    shutil.rmtree(old)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
