"""ModelDims: the few figures of an architecture that time and traffic follow from.

Owns their derivation from ModelArgs.
"""

from __future__ import annotations

from dataclasses import dataclass

from hbp_titan.models.decoder import ModelArgs
from hbp_titan.models.registry import expert_params, get_flavor, last_params, linear_params, num_params


@dataclass(frozen=True)
class ModelDims:
    """Parameters are counted over all layers, matrices and norms alike where the difference does not matter.

    body_params: of the layers. active_body_params: those that multiply each token (mixture of experts: the chosen
    experts alone). last_params: of the last product of every layer (the MLP's down projection; of the chosen experts),
    which recomputation leaves out. head_params: of the output projection. embedding_params: 0 where tied.
    num_heads, num_kv_heads, head_dim, v_head_dim: attention as its kernel sees it (DeepSeek's MLA: after the
    up-projection, all heads have keys and values). expert_params: part of body_params that expert parallelism
    spreads. experts_per_token: routed experts that a token is sent to, 0 for a dense model.
    """

    name: str
    num_layers: int
    hidden_size: int
    body_params: int
    active_body_params: int
    last_params: int
    head_params: int
    embedding_params: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    expert_params: int = 0
    experts_per_token: int = 0

    @property
    def params(self) -> int:
        """All parameters."""
        return self.body_params + self.head_params + self.embedding_params

    @classmethod
    def from_args(cls, args: ModelArgs) -> ModelDims:
        """Of an architecture."""
        head = args.vocab_size * args.hidden_size
        body = num_params(args) - head * (1 if args.tie_embeddings else 2)
        return cls(
            name=args.name,
            num_layers=args.num_layers,
            hidden_size=args.hidden_size,
            body_params=body,
            active_body_params=linear_params(args) - head,
            last_params=last_params(args),
            head_params=head,
            embedding_params=0 if args.tie_embeddings else head,
            num_heads=args.num_heads,
            num_kv_heads=args.num_kv_heads,
            head_dim=args.head_dim,
            v_head_dim=args.head_dim if args.mla is None else args.mla.v_head_dim,
            expert_params=expert_params(args),
            experts_per_token=args.moe.num_experts_per_tok if args.moe else 0,
        )


def get_dims(name: str) -> ModelDims:
    """Of a flavor of models/registry.py; ValueError that names the nearest one otherwise."""
    return ModelDims.from_args(get_flavor(name))
