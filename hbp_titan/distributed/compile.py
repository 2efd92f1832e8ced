"""torch.compile of the regions of each block before and behind attention, inside checkpointing and FSDP2.

Owns the compiler's settings: static shapes (levels of equal shard length share a graph), whole graphs only, and room
for the graphs of each level before the compiler gives up. Attention and the exchanges between ranks run eagerly
between the regions: a graph never sees a kernel's package, a process group or the lengths of documents. A block whose
experts are spread over ranks is compiled in pieces around their exchange, whose sizes only the data decide.
"""

from __future__ import annotations

from functools import partial

import torch

from hbp_titan.distributed.expert_parallel import ExpertExchange
from hbp_titan.models.decoder import Decoder
from hbp_titan.models.moe import MixtureOfExperts

BEFORE_ATTENTION = ("pre_attention", "pre_keys_values", "pre_queries")
"""Regions of DecoderBlock: whole, and in two parts where keys and values are exchanged while queries are projected."""
BEHIND_ATTENTION = ("post_attention", "post_hidden")
"""Whole, and without the last product where the block is recomputed."""


def apply_compile(model: Decoder, backend: str, num_levels: int) -> None:
    """Compile the regions of every block in place; the module tree and its names stay as they are."""
    # Of one region: a graph for each level's shape, with gradients and without.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * num_levels)
    compiled = partial(torch.compile, backend=backend, fullgraph=True, dynamic=False)
    for block in model.blocks():
        regions: tuple[str, ...] = BEFORE_ATTENTION + BEHIND_ATTENTION
        if isinstance(block.mlp, MixtureOfExperts) and isinstance(block.mlp.run_experts, ExpertExchange):
            regions = BEFORE_ATTENTION
            block.mlp.send = compiled(block.mlp.send)  # type: ignore[method-assign]
            block.mlp.receive = compiled(block.mlp.receive)  # type: ignore[method-assign]
            experts = block.mlp.experts
            experts.activation = compiled(experts.activation, dynamic=True)  # type: ignore[method-assign]
        for name in regions:
            setattr(block, name, compiled(getattr(block, name)))
