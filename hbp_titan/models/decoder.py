"""The decoder of all model families on packed sequences.

Owns Decoder, its attention projections and the initialization of weights. Single-device code: sharding, context
parallelism, recomputation and compilation act on it from outside, through three seams: every block holds its attention
kernel as the submodule `inner_attention`; a block is `pre_attention`, attention, `post_attention`, each of which also
comes in two parts; the head takes the function that turns hidden states and the output matrix into logits or a loss.
Parameter names are HF's with other prefixes (hf.py).

Shape suffixes: T tokens of the pack, H hidden width, N query heads, K key/value heads, D head width, F width of
the feed-forward layer, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hbp_titan.models.attention import VarlenAttention
from hbp_titan.models.configs import ModelArgs
from hbp_titan.models.documents import BalanceState, Documents
from hbp_titan.models.layers import (
    FeedForward,
    Slices,
    UnitOffsetRMSNorm,
    apply_rope,
    attention_factor,
    inverse_frequencies,
    normal,
    rope_cos_sin,
    rounded,
)

if TYPE_CHECKING:
    from hbp_titan.models.latent_attention import LatentAttention
    from hbp_titan.models.moe import MixtureOfExperts

HeadFn = Callable[[Tensor, Tensor], Any]
"""(normed_TH, output_weight_VH) -> what the head returns."""


class Attention(nn.Module):
    """The projections around attention: hidden states to rotated q, k and v, and heads back to hidden states."""

    def __init__(self, args: ModelArgs, layer: int) -> None:
        super().__init__()
        self.head_dim = args.head_dim
        self.rotates = layer not in args.nope_layers
        self.norms_all_heads = args.qk_norm_all_heads
        q_width, kv_width = args.num_heads * args.head_dim, args.num_kv_heads * args.head_dim
        self.q_proj = nn.Linear(args.hidden_size, q_width, bias=args.qkv_bias)
        self.k_proj = nn.Linear(args.hidden_size, kv_width, bias=args.qkv_bias)
        self.v_proj = nn.Linear(args.hidden_size, kv_width, bias=args.qkv_bias)
        self.o_proj = nn.Linear(q_width, args.hidden_size, bias=False)
        q_normed, k_normed = (q_width, kv_width) if args.qk_norm_all_heads else (args.head_dim, args.head_dim)
        self.q_norm = rms_norm(args, q_normed) if args.qk_norm else nn.Identity()
        self.k_norm = rms_norm(args, k_normed) if args.qk_norm else nn.Identity()

    def queries(self, x_TH: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
        return self._rotated(self.q_norm, self.q_proj(x_TH), cos_TD, sin_TD)

    def keys_values(self, x_TH: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> tuple[Tensor, Tensor]:
        v_TKD = self.v_proj(x_TH).unflatten(-1, (-1, self.head_dim))
        return self._rotated(self.k_norm, self.k_proj(x_TH), cos_TD, sin_TD), v_TKD

    def _rotated(self, norm: nn.Module, x_TM: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
        if self.norms_all_heads:
            x_TM = norm(x_TM)
        x_TND = x_TM.unflatten(-1, (-1, self.head_dim))
        if not self.norms_all_heads:
            x_TND = norm(x_TND)
        return apply_rope(x_TND, cos_TD, sin_TD) if self.rotates else x_TND

    def output(self, o_TND: Tensor) -> Tensor:
        return self.o_proj(o_TND.flatten(-2))


def rms_norm(args: ModelArgs, width: int) -> nn.RMSNorm:
    """Return the architecture's norm of `width` elements."""
    return (UnitOffsetRMSNorm if args.unit_offset_norms else nn.RMSNorm)(width, eps=args.norm_eps)


def _attention(args: ModelArgs, layer: int) -> Attention | LatentAttention:
    if args.mla is None:
        return Attention(args, layer)
    from hbp_titan.models.latent_attention import LatentAttention

    return LatentAttention(args, args.mla)


class DecoderBlock(nn.Module):
    """Layer `layer`, whose two halves around `inner_attention` may be recomputed or compiled.

    Norms that the architecture does not have are identities.

    balance: the pack's documents, for layers with experts (BalanceState).
    """

    def __init__(self, args: ModelArgs, layer: int = 0, balance: BalanceState | None = None) -> None:
        super().__init__()
        before, after = args.norm_placement != "after", args.norm_placement != "before"

        def norm(present: bool) -> nn.Module:
            return rms_norm(args, args.hidden_size) if present else nn.Identity()

        self.input_layernorm = norm(before)
        self.self_attn = _attention(args, layer)
        self.inner_attention: nn.Module = VarlenAttention(args.softmax_scale, args.window(layer))
        self.attention_output_norm = norm(after)
        self.post_attention_layernorm = norm(before)
        self.mlp: nn.Module
        if args.moe is not None and args.is_sparse(layer):
            from hbp_titan.models.moe import MixtureOfExperts

            self.mlp = MixtureOfExperts(args.hidden_size, args.moe, balance or BalanceState())
        else:
            self.mlp = FeedForward(args.hidden_size, args.intermediate_size, args.activation)
        self.mlp_output_norm = norm(after)

    @property
    def has_experts(self) -> bool:
        """Whether `mlp` is a mixture of experts."""
        return not isinstance(self.mlp, FeedForward)

    @property
    def experts_mlp(self) -> MixtureOfExperts:
        """`mlp` of a block with experts."""
        assert self.has_experts
        return cast("MixtureOfExperts", self.mlp)

    def forward(self, x_TH: Tensor, cos_TD: Tensor, sin_TD: Tensor, documents: Documents) -> Tensor:
        q_TND, k_TKD, v_TKD = self.pre_attention(x_TH, cos_TD, sin_TD)
        return self.post_attention(x_TH, self.inner_attention(q_TND, k_TKD, v_TKD, documents))

    def pre_attention(self, x_TH: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q_TND, k_TKD and v_TKD of the normalized input, q and k rotated."""
        normed_TH = self.input_layernorm(x_TH)
        return (
            self.self_attn.queries(normed_TH, cos_TD, sin_TD),
            *self.self_attn.keys_values(normed_TH, cos_TD, sin_TD),
        )

    def pre_queries(self, x_TH: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
        """Return only q_TND of pre_attention."""
        return self.self_attn.queries(self.input_layernorm(x_TH), cos_TD, sin_TD)

    def pre_keys_values(self, x_TH: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Return only k_TKD and v_TKD of pre_attention."""
        return self.self_attn.keys_values(self.input_layernorm(x_TH), cos_TD, sin_TD)

    def post_attention(self, x_TH: Tensor, o_TND: Tensor) -> Tensor:
        """Return the block's output, given its input and the output of attention."""
        x_TH = self._add_attention(x_TH, o_TND)
        return x_TH + self.mlp_output_norm(self.mlp(self.post_attention_layernorm(x_TH)))

    def post_hidden(self, x_TH: Tensor, o_TND: Tensor) -> tuple[Tensor, Tensor]:
        """Return the arguments of `last_product`, [T, H] and [T, F]: post_attention of a dense block in two parts."""
        assert isinstance(self.mlp, FeedForward)
        x_TH = self._add_attention(x_TH, o_TND)
        return x_TH, self.mlp.hidden(self.post_attention_layernorm(x_TH))

    def last_product(self, x_TH: Tensor, hidden_TF: Tensor) -> Tensor:
        """Return the block's output, given post_hidden's."""
        assert isinstance(self.mlp, FeedForward)
        return x_TH + self.mlp_output_norm(self.mlp.down_proj(hidden_TF))

    def post_scores(self, x_TH: Tensor, o_TND: Tensor) -> tuple[Tensor, Tensor]:
        """Return the input of the experts' half, x_TH, and its scores_TE: the first part of a block with experts."""
        x_TH = self._add_attention(x_TH, o_TND)
        return x_TH, self.experts_mlp.scores(self.post_attention_layernorm(x_TH))

    def post_experts(self, x_TH: Tensor, weights_TK: Tensor, experts_TK: Tensor, *split: Any) -> Tensor:
        """Return a chunk of the block's output, given post_scores' x_TH, and `choose` and `split_chunks` of the mlp."""
        normed_TH = self.post_attention_layernorm(x_TH)
        return x_TH + self.mlp_output_norm(self.experts_mlp.chosen_experts(normed_TH, weights_TK, experts_TK, *split))

    def _add_attention(self, x_TH: Tensor, o_TND: Tensor) -> Tensor:
        return x_TH + self.attention_output_norm(self.self_attn.output(o_TND))


class Head(nn.Module):
    """Final norm and output matrix."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.norm = rms_norm(args, args.hidden_size)
        self.output = nn.Linear(args.hidden_size, args.vocab_size, bias=False)

    def forward(self, hidden_TH: Tensor, head_fn: HeadFn | None = None) -> Any:
        """Return head_fn(normed_TH, output_weight_VH), by default logits_TV."""
        # The weight is passed inside forward because FSDP2 gathers it only there.
        return (head_fn or F.linear)(self.norm(hidden_TH), self.output.weight)


class Decoder(nn.Module):
    """Token ids of a pack to logits, or to what `head_fn` makes of the last hidden states."""

    layers_name = "layers"

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args = args
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.hidden_size)
        self.balance = BalanceState()
        self.layers = nn.ModuleList(DecoderBlock(args, layer, self.balance) for layer in range(args.num_layers))
        self.head = Head(args)
        if args.tie_embeddings:
            self.head.output.weight = self.tok_embeddings.weight
        # A plain attribute with data even if the parameters are on the meta device; to_empty does not touch it.
        self.inverse_frequencies = inverse_frequencies(args.rope_dim, args.rope_theta, args.rope_scaling)
        if args.sliding_rope_theta is not None:
            self.sliding_inverse_frequencies = inverse_frequencies(args.rope_dim, args.sliding_rope_theta, None)

    def forward(
        self,
        input_ids_T: Tensor,
        position_ids_T: Tensor,
        documents: Documents,
        head_fn: HeadFn | None = None,
    ) -> Any:
        """Return logits_TV, or head_fn's value.

        input_ids_T, position_ids_T: int64 [T], positions counted from each document's start.
        documents: passed through to inner_attention, so a wrapper of that may take another description.
        """
        factor = attention_factor(self.args.rope_scaling)
        full = sliding = rope_cos_sin(self.inverse_frequencies, position_ids_T, factor)
        if self.args.sliding_rope_theta is not None:
            sliding = rope_cos_sin(self.sliding_inverse_frequencies, position_ids_T)
        x_TH = self.tok_embeddings(input_ids_T)
        if self.args.scale_embeddings:
            # Rounded, as in Gemma.
            x_TH = x_TH * rounded(self.args.hidden_size**0.5, x_TH.dtype)
        for layer, block in enumerate(self.layers):
            x_TH = block(x_TH, *(full if self.args.window(layer) is None else sliding), documents)
        return self.head(x_TH, head_fn)

    def blocks(self) -> Iterator[DecoderBlock]:
        """Yield the layers with their type, which nn.ModuleList does not keep."""
        for layer in self.layers:
            assert isinstance(layer, DecoderBlock)
            yield layer

    def tokens_per_expert(self) -> dict[int, Tensor]:
        """Return the tokens of each expert in the last forward, by layer, int32 [experts]; empty before a forward.

        Of this rank, on its device, padding included; reading the values synchronizes.
        """
        blocks = enumerate(self.blocks())
        counts = {i: block.experts_mlp.tokens_per_expert for i, block in blocks if block.has_experts}
        return {i: counts_E for i, counts_E in counts.items() if counts_E is not None}

    @torch.no_grad()
    def move_router_biases(self, counts_LE: Tensor, step: Tensor) -> None:
        """Move each bias by `step`, up for experts with fewer tokens than their layer's mean, down for others.

        DeepSeek-V3, arXiv 2412.19437, section 2.1.2. counts_LE: rows as in tokens_per_expert, of all ranks. step:
        scalar on the device.
        """
        routers = [block.experts_mlp.gate for block in self.blocks() if block.has_experts]
        for router, counts_E in zip(routers, counts_LE, strict=True):
            bias_E = router.e_score_correction_bias
            assert bias_E is not None
            bias_E.add_(((counts_E.mean() - counts_E).sign().float() * step).to(bias_E.device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Decoder:
        # to_empty makes a new Parameter for each module that holds a shared one, so they are tied again.
        super()._apply(fn, recurse)
        if self.args.tie_embeddings:
            self.head.output.weight = self.tok_embeddings.weight
        return self

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fill every unsharded parameter with `init_parameter`."""
        for fqn, parameter in self.named_parameters():
            parameter.copy_(init_parameter(self.args, fqn, parameter.shape, seed, device=parameter.device))


def build_decoder(args: ModelArgs) -> Decoder:
    """Return the model of `args`, which transformers builds if it has an hf_config."""
    if args.hf_config is None:
        return Decoder(args)
    from hbp_titan.models.transformers_backend import TransformersDecoder

    return TransformersDecoder(args)


def init_parameter(
    args: ModelArgs,
    fqn: str,
    shape: Sequence[int],
    seed: int,
    part: Slices | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return the initial value of the parameter `fqn` of `shape`, or of a part of it, fp32.

    A function of (seed, fqn) alone: it does not depend on the order of parameters, their sharding, the world size or
    the device, and a shard costs no more than its own elements. Matrices are normal with std initializer_range, divided
    by sqrt(2 * num_layers) if they write to the residual stream (GPT-2); norms multiply by 1, biases are 0.
    """
    part = part or tuple(slice(0, size) for size in shape)
    size = [len(range(*dim.indices(length))) for dim, length in zip(part, shape, strict=True)]
    if fqn.endswith("bias"):
        return torch.zeros(size, device=device)
    if "norm" in fqn.rpartition(".")[0].rpartition(".")[2]:
        return torch.full(size, 0.0 if args.unit_offset_norms else 1.0, device=device)
    std = args.initializer_range
    if fqn.removesuffix(".weight").endswith(("o_proj", "down_proj")):
        std /= (2 * args.num_layers) ** 0.5
    return normal(seed, fqn, shape, part, std, torch.device(device))
