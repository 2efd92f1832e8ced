"""HF model folders: names and shapes of tensors, and lazy reading of safetensors. hf_export.py writes them.

Owns the mapping between HF's tensors and our parameters. The experts of a layer are one parameter here and one tensor
per expert on disk; several of our matrices may be one on disk (hf_families.py); the rest
is one to one. config.json is read by hf_config.py.
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

from hbp_titan.models.configs import TRANSFORMERS, ModelArgs
from hbp_titan.models.decoder import build_decoder
from hbp_titan.models.hf_config import args_from_hf
from hbp_titan.models.hf_files import check_not_pointer, describe_other_weights, indexed_files
from hbp_titan.utils import first_n

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
_LAYER = re.compile(r"(layers\.\d+\.)(.*)")
# Buffers that older Llama folders store; transformers ignores them as well.
_RECOMPUTED = re.compile(r".*rotary_emb\.(inv_freq|cos_cached|sin_cached)")
_KEPT_IN_FP32 = "e_score_correction_bias"


def to_hf_name(fqn: str, model_type: str = "llama") -> str:
    """Return HF's name of our parameter `fqn`. Raises ValueError for a name that no decoder has."""
    if model_type == TRANSFORMERS:
        return fqn
    from hbp_titan.models.hf_families import FAMILIES

    if layer := _LAYER.fullmatch(fqn):
        inside = layer[2]
        for ours, theirs in FAMILIES[model_type].names.items():
            if inside.startswith(f"{ours}."):
                fqn = f"{layer[1]}{theirs}{inside[len(ours) :]}"
    for ours, theirs in _PREFIXES:
        if fqn.startswith(ours):
            return theirs + fqn[len(ours) :]
    raise ValueError(f"{fqn!r} is not a parameter of a decoder")


def is_fused(fqn: str) -> bool:
    """Return whether our parameter `fqn` holds a projection of all experts of a layer."""
    return _FUSED.fullmatch(fqn) is not None


def parts_of_matrix(fqn: str, model_type: str) -> tuple[str, list[str]] | None:
    """Return HF's matrix that holds `fqn` among others, and the names of all that it holds in order; None for others.

    The name of the matrix is HF's but for its prefix.
    """
    from hbp_titan.models.hf_families import FAMILIES

    layer = _LAYER.fullmatch(fqn)
    for theirs, parts in FAMILIES[model_type].fused.items() if layer else ():
        assert layer is not None
        module, _, leaf = layer[2].rpartition(".")
        if module in parts:
            return f"{layer[1]}{theirs}.{leaf}", [f"{layer[1]}{part}.{leaf}" for part in parts]
    return None


def hf_names(fqn: str, shape: Sequence[int], model_type: str = "llama") -> list[str]:
    """Return HF's names of the tensors that hold our parameter `fqn`: one, or one per row of fused experts."""
    from hbp_titan.models.hf_families import FAMILIES

    fused = _FUSED.fullmatch(fqn)
    if fused is None:
        matrix = parts_of_matrix(fqn, model_type)
        return [to_hf_name(matrix[0] if matrix else fqn, model_type)]
    ours = ("gate_proj", "up_proj", "down_proj")
    experts = to_hf_name(fused[1], model_type)
    projection = FAMILIES[model_type].projections[ours.index(fused[2])]
    return [f"{experts}.{expert}.{projection}.weight" for expert in range(shape[0])]


def export_dtype(fqn: str, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of our parameter `fqn` in a folder of `dtype`; transformers keeps routers' biases in float32."""
    return torch.float32 if fqn.endswith(_KEPT_IN_FP32) else dtype


def hf_shapes(args: ModelArgs) -> dict[str, list[int]]:
    """Return the shape of every tensor on disk by HF's name, without a tied output matrix."""
    if layout := _disk_layout(args):
        return dict(layout.shapes)
    shapes: dict[str, list[int]] = {}
    for fqn, shape in parameter_shapes(args).items():
        of_one = shape[1:] if is_fused(fqn) else shape
        for name in hf_names(fqn, shape, args.hf_model_type):
            # The parts of a matrix lie one after another in its rows.
            before = shapes.get(name, [0])[0]
            shapes[name] = [before + of_one[0], *of_one[1:]]
    return shapes


def parameter_shapes(args: ModelArgs) -> dict[str, torch.Size]:
    """Return the shape of every parameter by our name, without a tied output matrix."""
    with torch.device("meta"):
        return {fqn: parameter.shape for fqn, parameter in build_decoder(args).named_parameters()}


def _disk_layout(args: ModelArgs) -> Any:
    """Return the layout of the tensors on disk of a model that transformers builds, None for others."""
    if args.hf_config is None:
        return None
    from hbp_titan.models.transformers_weights import disk_layout

    return disk_layout(args.hf_config)


def tied_names(args: ModelArgs) -> list[str]:
    """Return our names of tied embeddings and of the output matrix that is the same parameter; [] if it is not."""
    if not args.tie_embeddings:
        return []
    with torch.device("meta"):
        model = build_decoder(args)
    shared = model.head.output.weight
    return [name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter is shared]


class MissingWeights(ValueError):
    """A folder has no weights that are read."""


class HFTensors(Mapping[str, Tensor]):
    """The weights of an HF folder by our names, each read on access (memory-mapped, on the CPU).

    args: the architecture to compare with, default that of config.json. dtypes: safetensors' names of the dtypes on
    disk, that of the most elements first. ignored: names of tensors that are recomputed. dropped: names of tensors of
    layers that predict further tokens (DeepSeek-V3), which are not trained. The constructor raises ValueError, before
    it reads any tensor, listing all missing, unknown and misshapen tensors.
    """

    def __init__(self, folder: str | Path, args: ModelArgs | None = None) -> None:
        self.folder = Path(folder)
        self.args = args_from_hf(folder) if args is None else args
        self._tied, self._layout = tied_names(self.args), _disk_layout(self.args)
        self._files: dict[str, Any] = {}
        self._stored: dict[str, str] = {}  # name on disk, if it is an older one
        self.ignored: list[str] = []
        self.dropped: list[str] = []
        shapes: dict[str, tuple[list[int], str]] = {}
        for path in _weight_files(self.folder):
            handle = _open(path)
            for stored in handle.keys():  # noqa: SIM118 (safe_open is not a mapping)
                name = self._layout.read_name(stored) if self._layout else stored
                if name is None or _RECOMPUTED.fullmatch(name):
                    self.ignored.append(stored)
                    continue
                if self._predicts_further(name):
                    self.dropped.append(name)
                    continue
                if name in self._files:
                    raise ValueError(f"{path}: {name} is also in another file of the folder; restore the folder")
                header = handle.get_slice(stored)
                self._stored[name] = stored
                self._files[name], shapes[name] = handle, (header.get_shape(), header.get_dtype())
        elements: Counter[str] = Counter()
        for shape, dtype in shapes.values():
            elements[dtype] += math.prod(shape)
        self.dtypes = [dtype for dtype, _ in elements.most_common()]
        _compare(self.folder, shapes, self.args)

    @cached_property
    def _names(self) -> dict[str, list[str]]:
        if self._layout:
            return dict(self._layout.names)
        return {fqn: hf_names(fqn, shape, self.args.hf_model_type) for fqn, shape in self._shapes.items()}

    @cached_property
    def _shapes(self) -> dict[str, torch.Size]:
        return parameter_shapes(self.args)

    def _predicts_further(self, name: str) -> bool:
        # transformers ignores them, too.
        layer = re.match(r"model\.layers\.(\d+)\.", name) if self.args.hf_model_type == "deepseek_v3" else None
        return layer is not None and int(layer[1]) >= self.args.num_layers

    def __getitem__(self, fqn: str) -> Tensor:
        return self.part(fqn, ())

    def part(self, fqn: str, dims: Sequence[slice]) -> Tensor:
        """Read the part of parameter `fqn` in these slices of its first dims, and nothing else."""
        names = self._names[fqn]
        if len(names) > 1 and self._layout:
            experts_EFH: Tensor = self._layout.part(fqn, dims, self._read)
            return experts_EFH
        if is_fused(fqn) and not self._layout:
            experts, inside = (dims[0], dims[1:]) if dims else (slice(None), ())
            read = [self._read(name, inside) for name in names[experts]]
            return torch.stack(read) if read else torch.empty(0)
        if matrix := parts_of_matrix(fqn, self.args.hf_model_type):
            start = sum(self._shapes[part][0] for part in matrix[1][: matrix[1].index(fqn)])
            rows = range(*(dims[0] if dims else slice(None)).indices(self._shapes[fqn][0]))
            dims = (slice(start + rows.start, start + rows.stop), *dims[1:])
        tensor = self._read(names[0], dims)
        if fqn in self._tied[:1]:
            self._check_tied_output(names[0], tensor, dims)
        return tensor

    def check_tied(self) -> None:
        """Raise ValueError if the folder has an output matrix that differs from embeddings that config.json ties."""
        if self._tied and to_hf_name(self._tied[1], self.args.hf_model_type) in self._files:
            self[self._tied[0]]

    def _read(self, name: str, dims: Sequence[slice]) -> Tensor:
        handle, name = self._files[name], self._stored[name]
        return handle.get_slice(name)[tuple(dims)] if dims else handle.get_tensor(name)

    def _check_tied_output(self, name: str, embedding: Tensor, dims: Sequence[slice]) -> None:
        output_name = to_hf_name(self._tied[1], self.args.hf_model_type)
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
    for name in {to_hf_name(fqn, args.hf_model_type) for fqn in tied_names(args)} & found.keys():
        expected[name] = [args.vocab_size, args.hidden_size]
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
