"""LoRA (Hu et al., arXiv 2106.09685): frozen matrices, each with a trained product of two narrow matrices added.

Owns the adapted matrix, the choice of matrices, initial values and merging. Acts on a built model, before it is
parallelized. Base parameters keep their names; `q_proj.weight` gets `q_proj.lora_A.weight` and `q_proj.lora_B.weight`
as in PEFT.

Shape suffixes: T tokens, I inputs and O outputs of the matrix, R rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from hbp_titan.models.decoder import Decoder
from hbp_titan.models.layers import LORA_A, LORA_B, Slices, uniform

# No dropout: recomputation keeps no random state (a second forward would draw another mask than the first), and the
# ranks of a cp group would draw masks that no single process draws. Gradients would no longer be exact.
ALL_LINEAR = "all-linear"


class LoRALinear(nn.Linear):
    """`linear`, frozen, plus an adapter: y = linear(x) + alpha / rank * B A x. Reuses its weight and bias."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, dtype: torch.dtype | None = None) -> None:
        inputs, outputs, weight = linear.in_features, linear.out_features, linear.weight
        super().__init__(inputs, outputs, bias=linear.bias is not None, device="meta")
        self.weight, self.bias = weight, linear.bias
        self.requires_grad_(False)
        self.lora_A = nn.Linear(inputs, rank, bias=False, device=weight.device, dtype=dtype or weight.dtype)
        self.lora_B = nn.Linear(rank, outputs, bias=False, device=weight.device, dtype=dtype or weight.dtype)
        self.scaling = alpha / rank

    def forward(self, x_TI: Tensor) -> Tensor:
        # The narrow product is scaled: R elements per token instead of O. The frozen product comes last: it saves no
        # activation, so recomputation can stop before it.
        adapted_TO = self.lora_B(self.scaling * self.lora_A(x_TI))
        return adapted_TO + super().forward(x_TI)


def apply_lora(
    model: Decoder, rank: int, alpha: float, target_modules: Sequence[str], dtype: torch.dtype | None = None
) -> None:
    """Freeze `model` (usually on the meta device) and adapt the matrices in `target_modules`, in place.

    The adapters get the weights' device, `dtype` (default the weights'), and values only from init_lora_parameter.
    Raises ValueError as lora_targets does.
    """
    targets = lora_targets(model, target_modules)
    model.requires_grad_(False)
    for name in targets:
        parent, _, child = name.rpartition(".")
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        setattr(model.get_submodule(parent), child, LoRALinear(linear, rank, alpha, dtype))


def lora_targets(model: Decoder, target_modules: Sequence[str]) -> list[str]:
    """Return the matrices inside the blocks whose dotted name ends in one of `target_modules` (PEFT's rule).

    ["all-linear"] means all of them; in a mixture of experts only those of attention. Raises ValueError, with the known
    names, for a target that matches none.
    """
    prefix = model.layers_name
    linears = [f"{prefix}.{name}" for name, module in model.layers.named_modules() if isinstance(module, nn.Linear)]
    if any(parameter.ndim == 3 for parameter in model.layers.parameters()):
        # Fused experts: PEFT would take gate_proj, up_proj and down_proj as theirs, wherever else the names occur, and
        # a router's weight is used without calling its module, which would skip an adapter.
        linears = [name for name in linears if ".self_attn." in name]
    if list(target_modules) == [ALL_LINEAR]:
        return linears
    unknown = [target for target in target_modules if not any(f".{name}".endswith(f".{target}") for name in linears)]
    if unknown:
        known = dict.fromkeys(name.rpartition(".")[2] for name in linears)
        raise ValueError(
            f"lora.target_modules: model {model.args.name} has no {', '.join(map(repr, unknown))}; use any of "
            f"{', '.join(known)}, or {ALL_LINEAR} alone"
        )
    return [name for name in linears if any(f".{name}".endswith(f".{target}") for target in target_modules)]


def enable_input_require_grads(model: Decoder) -> None:
    """Make the first block's input require a gradient, as all others do; call it after sharding."""
    # With frozen embeddings it would not: the compiler would need another graph, and FSDP2 would reduce the block's
    # gradients only after the whole backward. Before sharding, FSDP2 would gather the embeddings for a backward that
    # they do not have.

    def start(module: nn.Module, inputs: tuple[Tensor, ...], hidden_TH: Tensor) -> Tensor:
        return hidden_TH.detach().requires_grad_() if torch.is_grad_enabled() else hidden_TH

    model.tok_embeddings.register_forward_hook(start)


def init_lora_parameter(
    fqn: str, shape: Sequence[int], seed: int, part: Slices | None = None, device: torch.device | str = "cpu"
) -> Tensor:
    """Return the initial value of an adapter's parameter, or of a part of it, fp32: a function of (seed, fqn) alone.

    As PEFT: A uniform in +-1/sqrt(I) (kaiming_uniform with a = sqrt(5)), B zero, so the model starts as its base.
    """
    part = part or tuple(slice(0, size) for size in shape)
    if fqn.endswith(LORA_B):
        return torch.zeros(
            [len(range(*dim.indices(size))) for dim, size in zip(part, shape, strict=True)], device=device
        )
    return uniform(seed, fqn, shape, part, shape[1] ** -0.5, torch.device(device))


def merged(
    base: Iterable[tuple[str, Tensor]], adapter: Mapping[str, Tensor], scaling: float
) -> Iterator[tuple[str, Tensor]]:
    """Yield the (name, whole tensor) pairs of `base`, each adapted W as W + scaling * B A in fp32."""
    for fqn, tensor in base:
        module = fqn.removesuffix("weight")
        if module + LORA_A in adapter:
            a_RI, b_OR = adapter[module + LORA_A].float(), adapter[module + LORA_B].float()
            tensor = tensor.float() + scaling * (b_OR @ a_RI)
        yield fqn, tensor
