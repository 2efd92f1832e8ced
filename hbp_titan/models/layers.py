"""Building blocks of every model family: rotary position embedding, norm, feed-forward, random initial weights.

Owns the rotary formulas (Su et al. 2021, RoFormer), with the scalings of transformers' modeling_rope_utils (YaRN: Peng
et al. 2023, arXiv 2309.00071). The convention is HF's half rotation: element i pairs with i + D/2; DeepSeek's weights
pair 2i with 2i + 1.

Shape suffixes: T tokens, N heads, D rotated width, H hidden width, F intermediate width.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
ROPE_KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": (("factor",), ()),
    "llama3": (LLAMA3_KEYS, ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
}
"""Required and optional keys of each rope_type, apart from "default"."""
LORA_A, LORA_B = "lora_A.weight", "lora_B.weight"


def is_adapter(fqn: str) -> bool:
    """Return whether the parameter `fqn` belongs to an adapter (models/lora.py)."""
    return fqn.endswith((LORA_A, LORA_B))


def check_scaling(scaling: dict[str, Any], where: str) -> None:
    """Raise ValueError, prefixed with `where`, unless `scaling` is complete and of a supported rope_type."""
    kind = scaling.get("rope_type")
    if kind not in ROPE_KEYS:
        raise ValueError(f"{where}: rope_scaling.rope_type={kind!r} must be one of {', '.join(ROPE_KEYS)}")
    required, optional = ROPE_KEYS[kind]
    missing = [key for key in required if scaling.get(key) is None]
    if missing:
        raise ValueError(f"{where}: rope_scaling has no {', '.join(missing)}")
    unknown = sorted(set(scaling) - {"rope_type", *required, *optional})
    if unknown:
        raise ValueError(f"{where}: rope_scaling has {', '.join(unknown)}, which is not supported for {kind}")
    if kind == "llama3" and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        raise ValueError(f"{where}: rope_scaling.high_freq_factor must be above low_freq_factor")


def inverse_frequencies(dim: int, theta: float, scaling: dict[str, Any] | None) -> Tensor:
    """Return theta^(-2i/D), rescaled according to `scaling`, float32 [D / 2] on the CPU."""
    # Always on the CPU, so that every device rotates by the same angles: at position 100,000 one unit in the last place
    # of a frequency turns the pair by several thousandths of a radian. The model may be built on the meta device.
    exponents = torch.arange(0, dim, 2, dtype=torch.int64, device="cpu").float() / dim
    periods = theta**exponents
    if scaling is None:
        return 1.0 / periods
    if scaling["rope_type"] == "linear":
        return 1.0 / periods / scaling["factor"]
    return _llama3(1.0 / periods, scaling) if scaling["rope_type"] == "llama3" else _yarn(periods, theta, scaling)


def _llama3(frequencies: Tensor, scaling: dict[str, Any]) -> Tensor:
    factor, low, high, original = (scaling[key] for key in LLAMA3_KEYS)
    wavelengths = 2 * math.pi / frequencies
    # 0 for wavelengths beyond original / low (slowed down by factor), 1 below original / high (kept).
    keep = (original / wavelengths - low) / (high - low)
    blended = (1 - keep) * frequencies / factor + keep * frequencies
    slow = torch.where(wavelengths > original / low, frequencies / factor, blended)
    return torch.where(wavelengths < original / high, frequencies, slow)


def _yarn(periods: Tensor, theta: float, scaling: dict[str, Any]) -> Tensor:
    pairs = len(periods)
    factor, original = scaling["factor"], scaling["original_max_position_embeddings"]

    def pair_that_turns(rotations: float) -> float:
        """Return the (fractional) index of the pair with this many rotations over the original context."""
        return pairs * math.log(original / (rotations * 2 * math.pi)) / math.log(theta)

    low = pair_that_turns(scaling.get("beta_fast") or 32)
    high = pair_that_turns(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    # 1 for pairs that turn fast (kept), 0 for those that turn slowly (slowed down by factor).
    ramp = (torch.arange(pairs, dtype=torch.float32, device="cpu") - low) / ((high - low) or 0.001)
    keep = 1 - ramp.clamp(0, 1)
    return 1.0 / (factor * periods) * (1 - keep) + 1.0 / periods * keep


def yarn_mscale(factor: float, coefficient: float = 1.0) -> float:
    """Return YaRN's attention temperature for a context extended by `factor`."""
    return 1.0 if factor <= 1 else 0.1 * coefficient * math.log(factor) + 1.0


def attention_factor(scaling: dict[str, Any] | None) -> float:
    """Return YaRN's factor of cosines and sines, 1 for the other scalings."""
    if scaling is None or scaling["rope_type"] != "yarn":
        return 1.0
    if scaling.get("attention_factor") is not None:
        return scaling["attention_factor"]
    factor, mscale, all_dim = scaling["factor"], scaling.get("mscale"), scaling.get("mscale_all_dim")
    if mscale and all_dim:
        return yarn_mscale(factor, mscale) / yarn_mscale(factor, all_dim)
    return yarn_mscale(factor)


def rope_cos_sin(inverse_frequencies: Tensor, position_ids_T: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return cos_TD and sin_TD times `factor`, float32 on the positions' device; frequency i fills i and i + D/2."""
    # The copy from host memory is asynchronous: no synchronization in the step.
    frequencies = inverse_frequencies.to(position_ids_T.device, non_blocking=True)
    angles = position_ids_T.float()[:, None] * frequencies
    angles_TD = torch.cat((angles, angles), dim=-1)
    cos_TD, sin_TD = angles_TD.cos(), angles_TD.sin()
    return (cos_TD, sin_TD) if factor == 1.0 else (cos_TD * factor, sin_TD * factor)


def apply_rope(x_TND: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Return `x_TND` rotated by its positions, in its dtype; products are computed in float32 or better."""
    first, second = x_TND.chunk(2, dim=-1)
    rotated_TND = torch.cat((-second, first), dim=-1)
    return (x_TND * cos_TD[:, None] + rotated_TND * sin_TD[:, None]).to(x_TND.dtype)


def halves_from_pairs(x_TND: Tensor) -> Tensor:
    """Move the pairs (2i, 2i + 1) of DeepSeek's weights to (i, i + D/2), where apply_rope rotates them."""
    # Queries and keys are permuted alike, so their products do not change.
    return x_TND.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


class UnitOffsetRMSNorm(nn.RMSNorm):
    """RMS norm that multiplies by 1 + weight, computed in float32 (Gemma)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.normalized_shape, 1.0 + self.weight.float(), self.eps).to(x.dtype)


def rounded(value: float, dtype: torch.dtype) -> float:
    """Return `value` rounded to `dtype`, without a tensor."""
    fraction, exponent = math.frexp(value)
    steps = 2.0 / torch.finfo(dtype).eps
    return math.ldexp(round(fraction * steps) / steps, exponent)


class FeedForward(nn.Module):
    """Gated feed-forward network of width `intermediate_size`: SwiGLU, or with the activation gelu_tanh GeGLU."""

    def __init__(self, hidden_size: int, intermediate_size: int, activation: str = "silu") -> None:
        super().__init__()
        self.activation = F.silu if activation == "silu" else partial(F.gelu, approximate="tanh")
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x_TH: Tensor) -> Tensor:
        return self.down_proj(self.hidden(x_TH))

    def hidden(self, x_TH: Tensor) -> Tensor:
        """Return the input of down_proj, [T, F]."""
        return self.activation(self.gate_proj(x_TH)) * self.up_proj(x_TH)


Slices = tuple[slice, ...]
_AT_ONCE = {"cpu": 2**15, "cuda": 2**24}
"""Elements drawn at a time: as many as fit a core's cache, or fill a GPU with 0.5 GB of integers."""


def normal(seed: int, name: str, shape: Sequence[int], part: Slices, std: float, device: torch.device) -> Tensor:
    """Return `part` of a tensor of `shape` with normal elements of mean 0, fp32."""
    # The sum of two values from a table of 65536 equally likely normals: the extremes are 6 standard deviations out.
    table = _quantiles().to(device)

    def draw(bits: Tensor) -> Tensor:
        return (table[bits & 0xFFFF] + table[(bits >> 16) & 0xFFFF]) * (std * 0.5**0.5)

    return _draw(seed, name, shape, part, device, draw)


def uniform(seed: int, name: str, shape: Sequence[int], part: Slices, bound: float, device: torch.device) -> Tensor:
    """Return `part` of a tensor of `shape` with elements uniform in +-bound, fp32."""

    def draw(bits: Tensor) -> Tensor:
        # 24 bits, all that a float32 below 1 holds exactly.
        return ((bits & 0xFFFFFF).float() * 2.0**-23 - 1.0) * bound

    return _draw(seed, name, shape, part, device, draw)


@cache
def _quantiles() -> Tensor:
    """Return the middle quantile of each of 65536 equal shares of the normal distribution, fp32 on the CPU."""
    return torch.special.ndtri((torch.arange(2**16, dtype=torch.float64) + 0.5) / 2**16).float()


def _draw(
    seed: int,
    name: str,
    shape: Sequence[int],
    part: Slices,
    device: torch.device,
    values: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return values(32 random bits of each element of `part`), in a tensor of the part's shape.

    The bits of an element are a function of (seed, name, its position in the whole tensor) alone: SplitMix64's mixing
    function on a counter (Steele et al., OOPSLA 2014). So a shard is drawn without the rest of its tensor, and every
    sharding, world size and device gives the same bits.
    """
    # One index per row and per column, so that no tensor of all positions is allocated.
    *rows, columns = (torch.arange(size, device=device)[dim] for size, dim in zip(shape, part, strict=True))
    starts = torch.zeros(1, dtype=torch.int64, device=device)
    for size, index in zip(shape, rows, strict=False):
        starts = (starts[:, None] * size + index).flatten()
    result = torch.empty(len(starts), len(columns), device=device)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    key = int.from_bytes(digest[:8], "big", signed=True)
    step = max(1, _AT_ONCE[device.type] // max(1, len(columns)))
    for first in range(0, len(starts), step):
        positions = starts[first : first + step, None] * shape[-1] + columns
        result[first : first + step] = values(_mix(positions, key))
    return result.view([len(index) for index in (*rows, columns)])


def _mix(positions: Tensor, key: int) -> Tensor:
    """Replace positions (int64) with the upper 32 of 64 random bits for each, in place."""
    # Multiplications wrap around; >> extends the sign, so these bits are masked.
    bits = positions.mul_(-0x61C8864680B583EB).add_(key)
    bits = bits.bitwise_xor_((bits >> 30).bitwise_and_(2**34 - 1)).mul_(-0x40A7B892E31B1A47)
    bits = bits.bitwise_xor_((bits >> 27).bitwise_and_(2**37 - 1)).mul_(-0x6B2FB644ECCEEE15)
    bits = bits.bitwise_xor_((bits >> 31).bitwise_and_(2**33 - 1))
    return bits.bitwise_right_shift_(32).bitwise_and_(2**32 - 1)
