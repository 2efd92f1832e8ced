"""ModelArgs: the architecture of a decoder, with optional latent attention and experts.

Owns the fields, the quantities derived from them, and the rejection of architectures that this code does not build.
The fields of MLAArgs and MoEArgs have the names of DeepSeek's config.json.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from hbp_titan.models.layers import check_scaling, yarn_mscale

TOPK_METHODS = ("greedy", "group_limited_greedy", "noaux_tc")
NORM_PLACEMENTS = ("before", "after", "both")
ACTIVATIONS = ("silu", "gelu_tanh")
TRANSFORMERS = "transformers"
"""In place of the model type if transformers builds the model: parameters have its names."""
LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclass(frozen=True, kw_only=True)
class MLAArgs:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

    q_lora_rank, kv_lora_rank: widths of the latents from which queries, and keys with values, are expanded; None
        computes queries directly from the hidden state.
    qk_nope_head_dim, qk_rope_head_dim: the parts of a query's and a key's head without and with rotary position; all
        heads share the rotated key (decoupled RoPE). v_head_dim: width of a value's head.
    """

    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None = None

    @property
    def qk_head_dim(self) -> int:
        """Width of a query's and a key's head."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim


@dataclass(frozen=True, kw_only=True)
class MoEArgs:
    """Mixture of experts (DeepSeek-V2, arXiv 2405.04434, section 2.2; V3, arXiv 2412.19437, section 2.1.2).

    n_routed_experts, num_experts_per_tok, moe_intermediate_size: experts of a layer, experts per token, and the width
        of each. n_shared_experts: experts of every token, computed as one wide expert; may be 0.
    first_k_dense_replace, moe_layer_freq: layer i has experts if i is at least the first and a multiple of the second;
        the other layers are dense.
    topk_method: greedy, or group_limited_greedy: experts form n_group groups (the paper's devices), and a token chooses
        from the topk_group groups with the best experts; noaux_tc (V3): as the second, but scores are sigmoids, experts
        are chosen by score plus a bias that no gradient trains, and groups by the sum of their two best.
    norm_topk_prob: normalize the chosen scores to a sum of 1. Only noaux_tc then multiplies by routed_scaling_factor,
        as DeepSeek's own code does (transformers ignores the key in V2); without it, all do.
    aux_loss_alpha, device_aux_loss_alpha, comm_aux_loss_alpha: coefficients of the balance losses of experts, devices
        and communication (moe.balance_loss); 0 is off. seq_aux: losses per document, the only kind supported.

    Raises ValueError for unsupported values.
    """

    n_routed_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    n_shared_experts: int
    first_k_dense_replace: int = 0
    moe_layer_freq: int = 1
    topk_method: str = "greedy"
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = False
    routed_scaling_factor: float = 1.0
    aux_loss_alpha: float = 0.0
    device_aux_loss_alpha: float = 0.0
    comm_aux_loss_alpha: float = 0.0
    seq_aux: bool = True

    def __post_init__(self) -> None:
        experts, group_size = self.n_routed_experts, self.n_routed_experts // self.n_group
        if self.topk_method not in TOPK_METHODS:
            raise ValueError(f"topk_method={self.topk_method!r} must be one of {', '.join(TOPK_METHODS)}")
        if experts % self.n_group or not 1 <= self.topk_group <= self.n_group:
            raise ValueError(
                f"n_group={self.n_group} must divide n_routed_experts={experts} and be at least "
                f"topk_group={self.topk_group}"
            )
        candidates = experts if self.topk_method == "greedy" else self.topk_group * group_size
        if not 1 <= self.num_experts_per_tok <= candidates:
            raise ValueError(f"num_experts_per_tok={self.num_experts_per_tok} must be from 1 to {candidates}")
        if self.has_router_bias and (self.balances or group_size < 2):
            raise ValueError(
                f"topk_method='noaux_tc' needs groups of at least 2 experts, not {group_size}, and balances by its "
                "bias: aux_loss_alpha, device_aux_loss_alpha and comm_aux_loss_alpha must be 0"
            )
        if self.balances and not self.seq_aux:
            raise ValueError(
                "seq_aux=false would make the balance loss depend on the packing; set seq_aux to true or the "
                "coefficient (aux_loss_alpha) to 0"
            )

    @property
    def balances(self) -> bool:
        """Whether any balance loss is enabled."""
        return any((self.aux_loss_alpha, self.device_aux_loss_alpha, self.comm_aux_loss_alpha))

    @property
    def has_router_bias(self) -> bool:
        """Whether experts are chosen by their scores plus a bias."""
        return self.topk_method == "noaux_tc"

    def is_sparse(self, layer: int) -> bool:
        """Return whether layer `layer` has experts."""
        return layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0


@dataclass(frozen=True, kw_only=True)
class ModelArgs:
    """A decoder's architecture. Raises ValueError for one that this code does not build.

    hf_model_type: a key of hf_families.FAMILIES, for the exported config.json; TRANSFORMERS with hf_config.
    intermediate_size: width of the feed-forward network; with `moe`, of the dense layers.
    head_dim: width of queries and keys in attention; with `mla` its qk_head_dim, and num_kv_heads is num_heads.
    qkv_bias: biases on the q, k and v projections (Qwen2); no other layer has one.
    qk_norm: RMS norm of q and k, over the width of a head (Qwen3), with qk_norm_all_heads over all heads (OLMo 2).
    norm_placement: where RMS norms of attention and of the feed-forward network are: before (on their inputs), after
        (on their outputs, OLMo 2) or both (Gemma 3). unit_offset_norms: norms multiply by 1 + weight (Gemma).
    nope_layers: layers without rotary embedding (SmolLM3).
    activation: of the feed-forward network, silu or gelu_tanh. scale_embeddings: by sqrt(hidden_size) (Gemma).
    query_scalar: attention logits are divided by its square root, default head_dim.
    rope_scaling: None, or {"rope_type": "llama3" or "yarn", ...}, see layers.check_scaling.
    max_position_embeddings: tokens of the longest document; it bounds the data and allocates nothing.
    layer_types: full_attention or sliding_attention for each layer; () means full attention in all.
    sliding_window: tokens that a query of a sliding_attention layer attends to, itself included.
    sliding_rope_theta: if set, sliding_attention layers rotate with this theta and without rope_scaling.
    hf_config: text of config.json if transformers builds the model (model.backend); the other fields only describe it.
    """

    name: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rope_theta: float
    rope_scaling: dict[str, Any] | None = None
    norm_eps: float = 1e-6
    qkv_bias: bool = False
    qk_norm: bool = False
    qk_norm_all_heads: bool = False
    norm_placement: str = "before"
    unit_offset_norms: bool = False
    nope_layers: tuple[int, ...] = ()
    activation: str = "silu"
    scale_embeddings: bool = False
    query_scalar: int | None = None
    tie_embeddings: bool = False
    hf_model_type: str = "llama"
    initializer_range: float = 0.02
    mla: MLAArgs | None = None
    moe: MoEArgs | None = None
    layer_types: tuple[str, ...] = ()
    sliding_window: int | None = None
    sliding_rope_theta: float | None = None
    hf_config: str | None = None

    def __post_init__(self) -> None:
        if self.hf_config is not None:
            return
        self._check_windows()
        for name, choices in (("norm_placement", NORM_PLACEMENTS), ("activation", ACTIVATIONS)):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"model {self.name}: {name}={getattr(self, name)!r} must be one of {', '.join(choices)}"
                )
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model {self.name}: num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}"
            )
        if self.rope_dim % 2:
            width = "head_dim" if self.mla is None else "qk_rope_head_dim"
            raise ValueError(f"model {self.name}: {width}={self.rope_dim} is odd; rotary embedding needs pairs")
        if self.mla is not None:
            self._check_mla(self.mla)
        if self.rope_scaling is not None:
            check_scaling(self.rope_scaling, f"model {self.name}")

    def _check_windows(self) -> None:
        if self.layer_types and len(self.layer_types) != self.num_layers:
            raise ValueError(
                f"model {self.name}: layer_types has {len(self.layer_types)} entries for {self.num_layers} layers"
            )
        if unknown := sorted(set(self.layer_types) - set(LAYER_TYPES)):
            raise ValueError(
                f"model {self.name}: layer_types has {', '.join(unknown)}; each must be one of {', '.join(LAYER_TYPES)}"
            )
        if "sliding_attention" in self.layer_types and (self.sliding_window or 0) < 1:
            raise ValueError(
                f"model {self.name}: sliding_window={self.sliding_window} must be at least 1, as layer_types has "
                "sliding_attention"
            )

    def _check_mla(self, mla: MLAArgs) -> None:
        if self.num_kv_heads != self.num_heads:
            raise ValueError(
                f"model {self.name}: num_kv_heads={self.num_kv_heads} must be num_heads={self.num_heads} with mla"
            )
        if self.head_dim != mla.qk_head_dim:
            raise ValueError(
                f"model {self.name}: head_dim={self.head_dim} must be qk_nope_head_dim + qk_rope_head_dim = "
                f"{mla.qk_head_dim}"
            )
        if mla.v_head_dim > mla.qk_head_dim:
            raise ValueError(
                f"model {self.name}: v_head_dim={mla.v_head_dim} must be at most qk_nope_head_dim + qk_rope_head_dim = "
                f"{mla.qk_head_dim}"
            )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelArgs:
        """Return the inverse of dataclasses.asdict, the form in checkpoints."""
        parts = {"mla": MLAArgs, "moe": MoEArgs}
        made = {key: kind(**values[key]) for key, kind in parts.items() if values.get(key) is not None}
        # JSON has no tuples.
        tuples = {key: tuple(values.get(key, ())) for key in ("layer_types", "nope_layers")}
        return cls(**{**values, **made, **tuples})

    @property
    def rope_dim(self) -> int:
        """Rotated width of a head."""
        return self.head_dim if self.mla is None else self.mla.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """Factor of the attention logits: 1 / sqrt(head_dim), with DeepSeek's YaRN times the square of its mscale."""
        scale = (self.query_scalar or self.head_dim) ** -0.5
        if self.mla is None or self.rope_scaling is None:
            return scale
        all_dim = self.rope_scaling.get("mscale_all_dim")
        return scale * yarn_mscale(self.rope_scaling["factor"], all_dim) ** 2 if all_dim else scale

    def is_sparse(self, layer: int) -> bool:
        """Return whether layer `layer` has experts instead of a dense feed-forward network."""
        return self.moe is not None and self.moe.is_sparse(layer)

    def window(self, layer: int) -> int | None:
        """Return the tokens that a query of layer `layer` attends to, itself included; None means all before it."""
        return self.sliding_window if self.layer_types and self.layer_types[layer] == "sliding_attention" else None

    @property
    def window_share(self) -> float:
        """Share of the layers that have a sliding window."""
        return self.layer_types.count("sliding_attention") / max(self.num_layers, 1)

    def with_layers(self, layers: int) -> ModelArgs:
        """Return the architecture with `layers` layers, the first ones (or, if there are fewer, these repeated)."""
        nope = tuple(layer for layer in range(layers) if layer % self.num_layers in self.nope_layers)
        return replace(self, num_layers=layers, layer_types=(self.layer_types * layers)[:layers], nope_layers=nope)
