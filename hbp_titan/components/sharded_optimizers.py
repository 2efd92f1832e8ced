"""AdamW with moments in bfloat16 or 8 bits, and Muon: optimizers that update each rank's shards in place.

torch's fused AdamW takes parameters, gradients and moments of one dtype only, and torch's Muon takes whole matrices
only. Here every update is computed in float32, by the same fused kernel, in pieces of at most CHUNK elements, so that
no float32 copy of a whole moment exists. A step is skipped on the device by `found_inf`, as with torch's fused
optimizers. `set_gradient_dtype` stores gradients in bfloat16.

Bytes of optimizer state per parameter: AdamW 8 in float32 and 4 in bfloat16, 2.03 in 8 bits; Muon 4 or 2.

Shape suffixes: N elements of a piece, B blocks of a piece, R rows and C columns of a matrix.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from hbp_titan.distributed.fsdp import param_groups, sharded_parameters

CHUNK = 1 << 24
"""Elements of a parameter that are updated at a time: 64 MiB in float32 for each moment."""
BLOCK = 256
"""Elements of a row that share the scale of their 8-bit codes."""
LEAST_QUANTIZED = 4096
"""Elements of the smallest parameter with moments in 8 bits (as in bitsandbytes and torchao)."""
CODES, SCALE = "_codes", "_scale"
"""Endings of the two states of a moment in 8 bits."""

State = dict[str, Tensor]


class ShardedAdamW(torch.optim.Optimizer):
    """AdamW with moments in `state_dtype`: float32, bfloat16, uint8 (blockwise 8-bit codes), None: the parameter's.

    Parameters and gradients may be in float32 or bfloat16. For 8 bits, a parameter is quantized if its rows are whole
    numbers of blocks; others (norms) have moments in float32. So have experts whose rows FSDP2 shards, because the
    ranks divide neither their number nor their rows (fsdp.even_placement): only such ranks can resume their checkpoint.

    Args:
        params: parameter groups, with "lr", "betas", "eps" and "weight_decay" of their own or from `defaults`.
    """

    found_inf: Tensor | None = None

    def __init__(self, params: Any, defaults: dict[str, Any], state_dtype: torch.dtype | None) -> None:
        super().__init__(params, defaults)
        self.state_dtype = state_dtype
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = self.new_state(parameter, group)

    def new_state(self, parameter: Tensor, group: dict[str, Any]) -> State:
        """Return the state of a parameter before the first step: all zeros."""
        state = {"step": torch.zeros((), dtype=torch.float32, device=parameter.device)}
        for name in ("exp_avg", "exp_avg_sq"):
            state |= self.new_moment(parameter, name)
        return state

    def new_moment(self, parameter: Tensor, name: str) -> State:
        """Return a moment of zeros in the dtype of the state."""
        if self.state_dtype != torch.uint8:
            return {name: torch.zeros_like(parameter, dtype=self.state_dtype, requires_grad=False)}
        if not is_quantized(parameter):
            return {name: torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False)}
        codes = torch.zeros_like(parameter, dtype=torch.uint8, requires_grad=False)
        # A scale of zero makes any code a zero.
        return {name + CODES: codes, name + SCALE: _zeros_per_block(parameter)}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter with a gradient, in place; nothing changes if `found_inf` is 1."""
        for group in self.param_groups:
            self.update(group, [p for p in group["params"] if p.grad is not None])

    def update(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        """Update the parameters of one group."""
        for parameter in parameters:
            self._update_adamw(group, parameter)

    def _update_adamw(self, group: dict[str, Any], parameter: Tensor) -> None:
        state, grad = self.state[parameter], parameter.grad
        assert grad is not None
        state["step"] += 1
        flat = [local(tensor).detach().view(-1) for tensor in (parameter, grad)]
        for start in range(0, flat[0].numel(), CHUNK):
            whole_N, grad_N = (tensor[start : start + CHUNK] for tensor in flat)
            moments = [_Moment(state, name, start) for name in ("exp_avg", "exp_avg_sq")]
            values = [moment.read() for moment in moments]
            # A view of a float32 parameter, which the kernel updates in place.
            new_N = whole_N.float()
            torch._fused_adamw_(
                [new_N], [grad_N.float()], [values[0]], [values[1]], [], [state["step"]],
                lr=group["lr"], beta1=group["betas"][0], beta2=group["betas"][1],
                weight_decay=group["weight_decay"], eps=group["eps"],
                amsgrad=False, maximize=False, grad_scale=None, found_inf=self.found_inf,
            )  # fmt: skip
            if new_N is not whole_N:
                whole_N.copy_(new_N)
            for moment, value in zip(moments, values, strict=True):
                moment.write(value, self.found_inf)
        if self.found_inf is not None:
            state["step"] -= self.found_inf


def local(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a DTensor, or any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_quantized(parameter: Tensor) -> bool:
    """Return whether a parameter's moments can have 8-bit codes: blocks lie inside of rows, and rows on one rank."""
    placements = parameter.placements if isinstance(parameter, DTensor) else ()
    rows_are_whole = not any(isinstance(p, Shard) and p.dim == parameter.ndim - 1 for p in placements)
    fits = parameter.ndim > 1 and parameter.shape[-1] % BLOCK == 0 and parameter.numel() >= LEAST_QUANTIZED
    return fits and rows_are_whole


def _zeros_per_block(parameter: Tensor) -> Tensor:
    """Return float32 zeros, one per block of a parameter, sharded like it."""
    # A slice stays on the shard's device; DTensor.from_local would move what is in host memory to the GPU.
    shape_of = parameter.detach().narrow(-1, 0, parameter.shape[-1] // BLOCK)
    return torch.zeros_like(shape_of, dtype=torch.float32, memory_format=torch.contiguous_format)


class _Moment:
    """A piece of at most CHUNK elements of a moment, from element `start` of the rank's shard."""

    def __init__(self, state: State, name: str, start: int) -> None:
        self.signed = name == "exp_avg"
        self.quantized = name + CODES in state
        self.values_N = local(state[name + CODES if self.quantized else name]).view(-1)[start : start + CHUNK]
        if self.quantized:
            self.scale_B = local(state[name + SCALE]).view(-1)[start // BLOCK : (start + CHUNK) // BLOCK]

    def read(self) -> Tensor:
        """Return the piece in float32, itself if it is stored so."""
        if self.quantized:
            return dequantize(self.values_N, self.scale_B, self.signed)
        return self.values_N.float()

    def write(self, new_N: Tensor, skip: Tensor | None) -> None:
        """Store the new values, float32 [N]; keep the old ones if `skip` is 1."""
        if not self.quantized:
            # A skipped kernel returns what it was given, which bfloat16 holds exactly.
            if new_N is not self.values_N:
                self.values_N.copy_(new_N)
            return
        codes_N, scale_B = quantize(new_N, self.signed)
        for old, new in ((self.values_N, codes_N), (self.scale_B, scale_B)):
            # Quantizing twice is not exact.
            old.copy_(new if skip is None else torch.where(skip.bool(), old, new))


def dequantize(codes_N: Tensor, scale_B: Tensor, signed: bool) -> Tensor:
    """Return the float32 values of 8-bit codes."""
    values_N = code_values(signed, codes_N.device).index_select(0, codes_N.int())
    return (values_N.view(-1, BLOCK) * scale_B[:, None]).view(-1)


def quantize(values_N: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Return codes_N (uint8), each the nearest, and scale_B (float32), the largest value of a block."""
    blocks_BN = values_N.view(-1, BLOCK)
    scale_B = blocks_BN.abs().amax(1).clamp(min=1e-12)
    # One pass, where torchao needs about 30 and thus a compiler.
    codes_BN = torch.bucketize(blocks_BN / scale_B[:, None], _boundaries(signed, values_N.device), right=True)
    return codes_BN.to(torch.uint8).view(-1), scale_B


@lru_cache
def code_values(signed: bool, device: torch.device) -> Tensor:
    """Return the 256 ascending values of the dynamic codes (arXiv 2110.02861, as in bitsandbytes and torchao)."""
    values = [0.0, 1.0]
    for exponent in range(7):
        # The larger the exponent, the more bits are left for the fraction.
        bounds = torch.linspace(0.1, 1, 2 ** (exponent if signed else exponent + 1) + 1)
        means = 10 ** (exponent - 6) * (bounds[:-1] + bounds[1:]) / 2
        values += means.tolist() + ((-means).tolist() if signed else [])
    return torch.tensor(sorted(values), device=device)


@lru_cache
def _boundaries(signed: bool, device: torch.device) -> Tensor:
    values = code_values(signed, device)
    return (values[:-1] + values[1:]) / 2


def set_gradient_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """Store the sharded gradients of `model` in `dtype`, after the reduction; before the first forward.

    Each micro-batch is then added in `dtype`, so a step should have one.
    """
    for module in model.modules():
        for group in param_groups(module):
            _cast_reduced(group, dtype)
    for _, parameter in sharded_parameters(model):
        if parameter.requires_grad:
            # Otherwise torch refuses a gradient of another dtype than the parameter's.
            parameter.grad_dtype = dtype


def _cast_reduced(group: Any, dtype: torch.dtype) -> None:
    """Make an FSDP2 group cast what it has reduced to `dtype`; torch has no setting for it (2.13)."""
    set_dtypes = group._init_mp_dtypes

    def set_own() -> None:
        set_dtypes()
        # None in a group without trained parameters.
        if group._orig_dtype is not None:
            group._orig_dtype = dtype

    group._init_mp_dtypes = set_own
