"""Rotary position embedding: frequencies (plain or llama3-scaled), their cosines and sines, and their use.

Owns the formulas; the convention is HF's half rotation (element i pairs with i + D/2), the one that HF weights
expect. Sources: Su et al. 2021 (RoFormer); the llama3 scaling as in transformers' modeling_rope_utils.

Shape suffixes: T tokens, N heads, D head width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def inverse_frequencies(head_dim: int, theta: float, scaling: dict[str, Any] | None) -> Tensor:
    """float32 [D / 2] on the CPU: theta^(-2i/D), rescaled where `scaling` is of rope_type llama3.

    Always computed on the CPU, so that every device rotates by the same angles: at position 100,000 one unit in
    the last place of a frequency already turns the pair by several thousandths of a radian.
    """
    # "cpu" by name: the model may be under construction on the meta device.
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device="cpu").float() / head_dim
    frequencies = 1.0 / theta**exponents
    if scaling is None:
        return frequencies
    factor, low, high, original = (scaling[key] for key in LLAMA3_KEYS)
    wavelengths = 2 * math.pi / frequencies
    # 0 for wavelengths beyond original / low (slowed down by factor), 1 below original / high (kept).
    keep = (original / wavelengths - low) / (high - low)
    blended = (1 - keep) * frequencies / factor + keep * frequencies
    slow = torch.where(wavelengths > original / low, frequencies / factor, blended)
    return torch.where(wavelengths < original / high, frequencies, slow)


def rope_cos_sin(inverse_frequencies: Tensor, position_ids_T: Tensor) -> tuple[Tensor, Tensor]:
    """cos_TD and sin_TD, float32 on the device of the positions; each frequency fills i and i + D/2."""
    # The copy from host memory is asynchronous: no synchronization in the step.
    frequencies = inverse_frequencies.to(position_ids_T.device, non_blocking=True)
    angles = position_ids_T.float()[:, None] * frequencies
    angles_TD = torch.cat((angles, angles), dim=-1)
    return angles_TD.cos(), angles_TD.sin()


def apply_rope(x_TND: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """`x_TND` rotated by its positions, in its own dtype; the products are taken in float32 or better."""
    first, second = x_TND.chunk(2, dim=-1)
    rotated_TND = torch.cat((-second, first), dim=-1)
    return (x_TND * cos_TD[:, None] + rotated_TND * sin_TD[:, None]).to(x_TND.dtype)
