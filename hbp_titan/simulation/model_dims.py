"""ModelDims: the few figures of an architecture that time and traffic follow from.

Owns their derivation from ModelArgs, and DeepSeek-V2 236B by its published figures, which is simulated only.
"""

from __future__ import annotations

from dataclasses import dataclass

from hbp_titan.models.decoder import ModelArgs
from hbp_titan.models.registry import FLAVORS, get_flavor, linear_params, num_params


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
        """Of a dense decoder."""
        head = args.vocab_size * args.hidden_size
        body = num_params(args) - head * (1 if args.tie_embeddings else 2)
        return cls(
            name=args.name,
            num_layers=args.num_layers,
            hidden_size=args.hidden_size,
            body_params=body,
            active_body_params=linear_params(args) - head,
            last_params=args.num_layers * args.intermediate_size * args.hidden_size,
            head_params=head,
            embedding_params=0 if args.tie_embeddings else head,
            num_heads=args.num_heads,
            num_kv_heads=args.num_kv_heads,
            head_dim=args.head_dim,
            v_head_dim=args.head_dim,
        )


def deepseek_v2_236b() -> ModelDims:
    """DeepSeek-V2 (arXiv 2405.04434, section 3.1.2, and its published config.json): 236B parameters, 21B active.

    60 layers of width 5120, the first dense (12288), 59 with 160 routed experts of 1536, of which 6 are chosen, and 2
    shared ones; MLA with 128 heads of 128 + 64 (values 128), query rank 1536, key-value rank 512; vocabulary 102400.
    """
    layers, hidden, heads, nope, rope, value = 60, 5120, 128, 128, 64, 128
    q_rank, kv_rank, vocab = 1536, 512, 102400
    queries = hidden * q_rank + q_rank * heads * (nope + rope)
    keys_values = hidden * (kv_rank + rope) + kv_rank * heads * (nope + value)
    attention = queries + keys_values + heads * value * hidden
    expert, routed, chosen, shared, sparse = 3 * hidden * 1536, 160, 6, 2, layers - 1
    dense_layer, router = 3 * hidden * 12288, hidden * routed
    always = layers * attention + dense_layer + sparse * (shared * expert + router)
    return ModelDims(
        name="deepseek_v2_236b",
        num_layers=layers,
        hidden_size=hidden,
        body_params=always + sparse * routed * expert,
        active_body_params=always + sparse * chosen * expert,
        last_params=(dense_layer + sparse * (shared + chosen) * expert) // 3,
        head_params=vocab * hidden,
        embedding_params=vocab * hidden,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=nope + rope,
        v_head_dim=value,
        expert_params=sparse * routed * expert,
        experts_per_token=chosen,
    )


def get_dims(name: str) -> ModelDims:
    """Of a flavor of models/registry.py, or deepseek_v2_236b; ValueError that names the nearest one otherwise."""
    if name not in FLAVORS and name == "deepseek_v2_236b":
        return deepseek_v2_236b()
    return ModelDims.from_args(get_flavor(name))
