"""Random numbers by position: any part of a tensor on its own, the same on every device.

Owns the initial values' source. An element is a function of (seed, name, its position in the whole tensor) alone, by
integer arithmetic (SplitMix64's mixing function on a counter, Steele et al., OOPSLA 2014) and one table. So a shard
is drawn without the rest of its tensor, where it lives, and any sharding, world size and device gives the same bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

Slices = tuple[slice, ...]
_AT_ONCE = {"cpu": 2**15, "cuda": 2**24}
"""Elements drawn at one time: what fits a core's cache, and what fills a GPU for 0.5 GB of integers."""


def normal(seed: int, name: str, shape: Sequence[int], part: Slices, std: float, device: torch.device) -> Tensor:
    """The `part` of a tensor of `shape` with normal elements of mean 0, fp32.

    Each is the sum of two normals out of 65536 equally likely ones: the farthest lie 6 standard deviations out.
    """
    table = _quantiles().to(device)

    def draw(bits: Tensor) -> Tensor:
        return (table[bits & 0xFFFF] + table[(bits >> 16) & 0xFFFF]) * (std * 0.5**0.5)

    return _draw(seed, name, shape, part, device, draw)


def uniform(seed: int, name: str, shape: Sequence[int], part: Slices, bound: float, device: torch.device) -> Tensor:
    """The `part` of a tensor of `shape` with elements uniform in +-bound, fp32."""

    def draw(bits: Tensor) -> Tensor:
        # 24 bits: all that a float32 below 1 holds exactly.
        return ((bits & 0xFFFFFF).float() * 2.0**-23 - 1.0) * bound

    return _draw(seed, name, shape, part, device, draw)


@cache
def _quantiles() -> Tensor:
    """The middle quantile of each of 65536 equal shares of the normal distribution, fp32 on the CPU."""
    return torch.special.ndtri((torch.arange(2**16, dtype=torch.float64) + 0.5) / 2**16).float()


def _draw(
    seed: int,
    name: str,
    shape: Sequence[int],
    part: Slices,
    device: torch.device,
    values: Callable[[Tensor], Tensor],
) -> Tensor:
    """values(32 random bits of each element of `part`), in a tensor of the part's shape."""
    # Positions of whole rows: one per row and one per column, so that no tensor of positions is kept.
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
    """The upper 32 of 64 random bits for each position, in place of the positions (int64)."""
    # Multiplications wrap around; >> keeps the sign, so the bits that it repeats are masked.
    bits = positions.mul_(-0x61C8864680B583EB).add_(key)
    bits = bits.bitwise_xor_((bits >> 30).bitwise_and_(2**34 - 1)).mul_(-0x40A7B892E31B1A47)
    bits = bits.bitwise_xor_((bits >> 27).bitwise_and_(2**37 - 1)).mul_(-0x6B2FB644ECCEEE15)
    bits = bits.bitwise_xor_((bits >> 31).bitwise_and_(2**33 - 1))
    return bits.bitwise_right_shift_(32).bitwise_and_(2**32 - 1)
