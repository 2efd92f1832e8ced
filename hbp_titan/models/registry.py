"""Named architectures (flavors), and the parameter and FLOP counts that cost models and logs need."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any, cast

import torch
from torch import nn

from hbp_titan.models.configs import ModelArgs
from hbp_titan.models.decoder import build_decoder
from hbp_titan.utils import did_you_mean


def get_flavor(name: str) -> ModelArgs:
    """Return the architecture called `name`. Raises ValueError with the closest name for an unknown one."""
    from hbp_titan.models.flavors import FLAVORS

    if name in FLAVORS:
        return FLAVORS[name]
    raise ValueError(f"model.flavor = {name!r} must be one of {', '.join(FLAVORS)}{did_you_mean(name, FLAVORS)}")


def num_params(args: ModelArgs) -> int:
    """Return the number of parameters; a tied embedding counts once."""
    return _counts(replace(args, rope_scaling=None))[0]


def linear_params(args: ModelArgs) -> int:
    """Return the parameters that multiply a token: all matrices, of the routed experts those that it is sent to."""
    _, dense, experts = _counts(replace(args, rope_scaling=None))
    return dense + (experts * args.moe.num_experts_per_tok // args.moe.n_routed_experts if args.moe else 0)


def expert_params(args: ModelArgs) -> int:
    """Return the number of parameters of all routed experts, which expert parallelism shards."""
    return _counts(replace(args, rope_scaling=None))[2]


@lru_cache(maxsize=64)
def _counts(args: ModelArgs) -> tuple[int, int, int]:
    """Return the numbers of all parameters, of those of linear layers and of those of routed experts.

    Kept, because every training step asks for them; not for arguments with rope_scaling, which have no hash.
    """
    with torch.device("meta"):
        model = build_decoder(args)
    linear = (m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    experts = (p.numel() for b in model.blocks() if b.has_experts for p in b.experts_mlp.experts.parameters())
    if args.hf_config is not None:
        return sum(p.numel() for p in model.parameters()), cast(Any, model).multiplied_params(), 0
    return sum(p.numel() for p in model.parameters()), sum(linear), sum(experts)


def last_params(args: ModelArgs) -> int:
    """Return the parameters of the down projections, the last product of every layer, that multiply a token."""
    if args.moe is None:
        return args.num_layers * args.intermediate_size * args.hidden_size
    sparse = sum(map(args.is_sparse, range(args.num_layers)))
    chosen = (args.moe.num_experts_per_tok + args.moe.n_shared_experts) * args.moe.moe_intermediate_size
    return args.hidden_size * ((args.num_layers - sparse) * args.intermediate_size + sparse * chosen)


def training_flops(args: ModelArgs, num_tokens: int, sum_squares: int, adapter_params: int = 0) -> int:
    """Return the floating-point operations of one forward and backward without recomputation.

    num_tokens: tokens of the batch. sum_squares: of its documents (CostModel.squares). adapter_params: of LoRA, if
    it is used; the model's own parameters are then frozen.
    """
    # Per token and parameter 2 in forward and 4 in backward, 2 if it is frozen.
    per_token = (4 if adapter_params else 6) * linear_params(args) + 6 * adapter_params
    # Causal attention has half of len^2 scores, each 2 products of the head width in forward (QK^T, PV) and twice that
    # in backward. Latent attention's zero padding of values, which a kernel multiplies too, does not count as work.
    value_dim = args.head_dim if args.mla is None else args.mla.v_head_dim
    width = args.num_heads * (args.head_dim + value_dim) // 2
    return per_token * num_tokens + 6 * args.num_layers * width * sum_squares
