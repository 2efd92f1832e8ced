"""Names and shapes of HF's tensors and of our parameters.

Owns the mapping of names. Experts are one parameter here and a tensor each on disk; everything else is one to one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from hbp_titan.models.args import ModelArgs
from hbp_titan.models.decoder import Decoder

# Ours, HF's. Everything behind the prefix has the same name.
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
    """HF's name of our parameter `fqn`. Raises ValueError for a name that no decoder has."""
    for ours, theirs in _PREFIXES:
        if fqn.startswith(ours):
            return theirs + fqn[len(ours) :]
    raise ValueError(f"{fqn!r} is no parameter of a decoder")


def from_hf_name(name: str) -> str:
    """Our name of HF's parameter `name`, the fused one for an expert's. ValueError for a name that no decoder has."""
    for ours, theirs in _PREFIXES:
        if name.startswith(theirs):
            return _OF_EXPERT.sub(r"\1.\2", ours + name[len(theirs) :])
    raise ValueError(f"{name!r} is no parameter of a Llama, Qwen2, Qwen3 or DeepSeek-V2 model")


def is_fused(fqn: str) -> bool:
    """Whether our parameter `fqn` holds a projection of all experts of a layer."""
    return _FUSED.fullmatch(fqn) is not None


def hf_names(fqn: str, shape: Sequence[int]) -> list[str]:
    """HF's names of the tensors that our parameter `fqn` is on disk: one, or one for each row of fused experts."""
    fused = _FUSED.fullmatch(fqn)
    if fused is None:
        return [to_hf_name(fqn)]
    experts, projection = to_hf_name(fused[1]), fused[2]
    return [f"{experts}.{expert}.{projection}.weight" for expert in range(shape[0])]


def hf_shapes(args: ModelArgs) -> dict[str, list[int]]:
    """Shape of every tensor on disk by HF's name; a tied output matrix is not listed."""
    shapes = {}
    for fqn, shape in parameter_shapes(args).items():
        of_one = shape[1:] if is_fused(fqn) else shape
        shapes.update({name: list(of_one) for name in hf_names(fqn, shape)})
    return shapes


def parameter_shapes(args: ModelArgs) -> dict[str, torch.Size]:
    """Shape of every parameter by our name; a tied output matrix is the embedding and not listed."""
    with torch.device("meta"):
        return {fqn: parameter.shape for fqn, parameter in Decoder(args).named_parameters()}
