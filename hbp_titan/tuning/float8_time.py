"""Time of float8 products: what the layers that [float8] converts gain over bf16, and what their casts cost.

Owns the rates and the bytes of casts. The rates follow from published end-to-end figures, as shares of what bf16
products reach of their peak, so that a measured `linear_efficiency` carries over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hbp_titan.config import JobConfig
from hbp_titan.distributed.float8 import Float8Params, check_capability, fits_tokens, float8_params
from hbp_titan.models.configs import ModelArgs
from hbp_titan.packing import Level
from hbp_titan.tuning.hardware import Hardware

if TYPE_CHECKING:
    from hbp_titan.tuning.time_model import ModelDims

PLAIN_TOKENS = 8192
"""Tokens of a rank up to which a level without float8 products is a candidate too. With more, the products are large
enough to gain by the model and by torchao's table of sizes."""
# Products of the twice higher peak, as a share of bf16's efficiency. Llama-3.1-8B on 8 H100, 2 x 8192 tokens per rank,
# compiled: bf16 6,667 tokens/s per GPU, tensorwise with float8 all-gather 8,532 (torchtitan,
# benchmarks/llama3_h100_202412_torchtitan.md), 1.280x; rowwise 6,412 where bf16 has 5,760 (torchtitan commit 7a04053),
# 1.113x. With this model's times of bf16 and of the casts below, the products are 1.60 and 1.31 times as fast;
# tests/tuning/test_float8_time.py repeats it. Rowwise without fast accumulation scales its results in another kernel.
SHARE = {"tensorwise": 0.80, "rowwise": 0.655, "rowwise_with_gw_hp": 0.655}
CAST_BYTES = 5
"""Memory traffic of a cast per bf16 element: a pass for the largest value, then one that reads 2 bytes and writes 1."""
TRANSPOSE_BYTES = 2
"""Of a copy in the other layout: _scaled_mm multiplies rows with columns."""
_CAPABILITY = {"a100": (8, 0), "rtx4090": (8, 9), "h100": (9, 0), "h200": (9, 0), "b200": (10, 0)}


@dataclass(frozen=True)
class Float8Products:
    """The converted layers of a model under a recipe, on one machine."""

    recipe: str
    params: Float8Params
    hardware: Hardware

    @classmethod
    def of(cls, args: ModelArgs, config: JobConfig, hardware: Hardware) -> Float8Products | None:
        """Return those of a run; None without a recipe. Raises ValueError if the machine has no such products."""
        recipe = config.float8.recipe
        if not recipe:
            return None
        # Machines that are not in the table are taken to have them.
        check_capability(_CAPABILITY.get(hardware.name.split("-")[0], (9, 0)), recipe)
        return cls(recipe, float8_params(args, config.float8), hardware)

    def dims(self, dims: ModelDims) -> ModelDims:
        """Return `dims` with the converted layers alone."""
        p = self.params
        return replace(
            dims, active_body_params=p.body, first_params=p.first, last_params=p.last, adapter_params=0, expert_params=0
        )

    def saved_seconds(self, flops: float, recomputed: bool) -> float:
        """Return the seconds by which `flops` of converted products are faster than in bf16.

        recomputed: whether they are of a repeated forward; otherwise a third of them are for weights' gradients.
        """
        linear = self.hardware.linear_efficiency
        bf16 = self.hardware.peak_flops * linear
        float8 = self.hardware.fp8_peak_flops * linear * SHARE[self.recipe]
        if self.recipe == "rowwise_with_gw_hp" and not recomputed:
            flops *= 2 / 3
        return flops * (1 / bf16 - 1 / float8)

    def cast_seconds_per_token(self, recomputed: float) -> float:
        """Return the seconds of casts per token. recomputed: share of the layers that run their forward again."""
        p = self.params
        forward = CAST_BYTES * p.inputs * (1 + recomputed)
        if self.recipe == "rowwise_with_gw_hp":
            return (forward + CAST_BYTES * p.outputs) / self.hardware.memory_bandwidth
        # Inputs and gradients are cast again, or copied, in the layout of the weights' gradients.
        backward = CAST_BYTES * p.inputs + (CAST_BYTES + TRANSPOSE_BYTES) * p.outputs
        return (forward + backward) / self.hardware.memory_bandwidth

    def cast_seconds_of_weights(self, level: Level, recomputed: float) -> float:
        """Return the seconds of the casts of weights in a micro-batch, which do not depend on its tokens."""
        chunks = 1
        if level.mlp_chunk_tokens:
            chunks = -(-level.max_tokens // level.cp_degree // level.mlp_chunk_tokens)
        passes = 2 + recomputed
        bytes_each = TRANSPOSE_BYTES if self.params.gathered else CAST_BYTES * passes
        return chunks * bytes_each * self.params.body / self.hardware.memory_bandwidth


def with_plain_levels(levels: Sequence[Level], config: JobConfig) -> list[Level]:
    """Return candidate levels, with one without float8 products next to those that may not gain from them.

    Levels whose shards _scaled_mm cannot multiply have float8 = false. With float8.fsdp_all_gather all levels have
    float8 products.
    """
    if not config.float8.recipe or config.float8.fsdp_all_gather:
        return list(levels)
    found = []
    for level in levels:
        found += [level] if fits_tokens(level) else []
        if not found or found[-1] != level or level.max_tokens // level.cp_degree <= PLAIN_TOKENS:
            found.append(replace(level, float8=False))
    return found
