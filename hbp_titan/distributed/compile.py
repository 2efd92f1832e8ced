"""torch.compile of each block, inside activation checkpointing and FSDP2.

Owns the compiler's settings: static shapes (a level has one shape), whole graphs only, and room for one graph a
level and checkpointing policy before the compiler gives up.
"""

from __future__ import annotations

import torch

from hbp_titan.models.decoder import Decoder


def apply_compile(model: Decoder, backend: str, num_levels: int) -> None:
    """Compile every block and its two halves in place; the module tree and its names stay as they are."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * num_levels)
    for block in model.blocks():
        for name in ("forward", "pre_attention", "post_attention"):
            setattr(block, name, torch.compile(getattr(block, name), backend=backend, fullgraph=True, dynamic=False))
