"""HF model folders: names and shapes of tensors, and lazy reading of safetensors. hf_export.py writes them.

Owns the mapping between HF's tensors and our parameters: the experts of a layer are one parameter here and one tensor
per expert on disk; everything else is one to one. config.json is read by hf_config.py.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hbp_titan.models.configs import ModelArgs
from hbp_titan.models.decoder import Decoder
from hbp_titan.models.hf_config import args_from_hf
from hbp_titan.models.hf_files import check_not_pointer, describe_other_weights, indexed_files
from hbp_titan.utils import first_n

TIED_OUTPUT = "head.output.weight"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
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
# Buffers that older Llama folders store; transformers ignores them as well.
_RECOMPUTED = re.compile(r".*rotary_emb\.(inv_freq|cos_cached|sin_cached)")
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
    disk, that of the most elements first. ignored: names of tensors that are recomputed. The constructor raises
    ValueError, before it reads any tensor, listing all missing, unknown and misshapen tensors.
    """

    def __init__(self, folder: str | Path, args: ModelArgs | None = None) -> None:
        self.folder = Path(folder)
        self.args = args_from_hf(folder) if args is None else args
        self._files: dict[str, Any] = {}
        self.ignored: list[str] = []
        shapes: dict[str, tuple[list[int], str]] = {}
        for path in _weight_files(self.folder):
            handle = _open(path)
            for name in handle.keys():  # noqa: SIM118 (safe_open is not a mapping)
                if _RECOMPUTED.fullmatch(name):
                    self.ignored.append(name)
                    continue
                if name in self._files:
                    raise ValueError(f"{path}: {name} is also in another file of the folder; restore the folder")
                header = handle.get_slice(name)
                self._files[name], shapes[name] = handle, (header.get_shape(), header.get_dtype())
        elements: Counter[str] = Counter()
        for shape, dtype in shapes.values():
            elements[dtype] += math.prod(shape)
        self.dtypes = [dtype for dtype, _ in elements.most_common()]
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

    def check_tied(self) -> None:
        """Raise ValueError if the folder has an output matrix that differs from embeddings that config.json ties."""
        if self.args.tie_embeddings and to_hf_name(TIED_OUTPUT) in self._files:
            self["tok_embeddings.weight"]

    def _read(self, name: str, dims: Sequence[slice]) -> Tensor:
        handle = self._files[name]
        return handle.get_slice(name)[tuple(dims)] if dims else handle.get_tensor(name)

    def _check_tied_output(self, name: str, embedding: Tensor, dims: Sequence[slice]) -> None:
        output_name = to_hf_name(TIED_OUTPUT)
        if output_name in self._files and not torch.equal(embedding, self._read(output_name, dims)):
            raise ValueError(
                f"{self.folder}: config.json ties the embeddings, but {name} and {output_name} differ; "
                "set tie_word_embeddings to false or remove one of them"
            )

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _weight_files(folder: Path) -> list[Path]:
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    index = folder / INDEX_FILE
    if not index.is_file():
        raise MissingWeights(
            f"{folder}: contains neither {SINGLE_FILE} nor {INDEX_FILE}{describe_other_weights(folder)}"
        )
    names = indexed_files(index)
    for name in names:
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
    if args.tie_embeddings and to_hf_name(TIED_OUTPUT) in found:
        expected[to_hf_name(TIED_OUTPUT)] = [args.vocab_size, args.hidden_size]
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
