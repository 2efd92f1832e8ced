"""torch.compile of each block, inside activation checkpointing and FSDP2.

Owns the compiler's settings: static shapes (a level has one shape), whole graphs only, and room for one graph a
level and checkpointing policy before the compiler gives up. A block whose experts are spread over ranks is compiled
in pieces around the exchange, whose sizes only the data decide.
"""

from __future__ import annotations

from functools import partial

import torch

from hbp_titan.distributed.expert_parallel import ExpertExchange
from hbp_titan.models.decoder import Decoder
from hbp_titan.models.moe import MixtureOfExperts


def apply_compile(model: Decoder, backend: str, num_levels: int) -> None:
    """Compile every block and its two halves in place; the module tree and its names stay as they are."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * num_levels)
    compiled = partial(torch.compile, backend=backend, fullgraph=True, dynamic=False)
    for block in model.blocks():
        if isinstance(block.mlp, MixtureOfExperts) and isinstance(block.mlp.run_experts, ExpertExchange):
            block.pre_attention = compiled(block.pre_attention)  # type: ignore[method-assign]
            block.mlp.send = compiled(block.mlp.send)  # type: ignore[method-assign]
            block.mlp.receive = compiled(block.mlp.receive)  # type: ignore[method-assign]
            experts = block.mlp.experts
            experts.activation = compiled(experts.activation, dynamic=True)  # type: ignore[method-assign]
            continue
        for name in ("forward", "pre_attention", "post_attention"):
            setattr(block, name, compiled(getattr(block, name)))
