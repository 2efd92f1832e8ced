"""Time model: the seconds of a level's micro-batch, part by part, from a model's dimensions and the hardware table.

Owns the estimate that needs no GPU (matrix products, attention, recomputation, collectives of context and expert
parallelism, exposed FSDP traffic and copies to host memory, launches and fixed costs) and the candidates made from it.
One pack is one data-parallel rank's work in a micro-batch; its cp ranks share it evenly. Everything is linear in the
content of the pack, so that a level with its static length T has the form of a LevelTimeModel.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import NormalDist

import numpy as np
import torch
from torch import nn

from hbp_titan.components.timing import FloatArray, LevelTimeModel
from hbp_titan.config import JobConfig
from hbp_titan.distributed.parallelize import stored_dtype
from hbp_titan.models.configs import ModelArgs
from hbp_titan.models.decoder import Decoder
from hbp_titan.models.registry import expert_params, get_flavor, last_params, linear_params, num_params
from hbp_titan.packing import CostModel, Level
from hbp_titan.packing.ragged import IntArray, Ragged
from hbp_titan.tuning.float8_time import Float8Products
from hbp_titan.tuning.hardware import Hardware
from hbp_titan.tuning.memory import MemoryEstimate, adapter_params, estimate_memory
from hbp_titan.tuning.memory_plans import depth_choices, usable_bytes, usable_host_bytes
from hbp_titan.tuning.search import Candidate

PARTS = ("linear", "attention", "recompute", "sp", "experts", "fsdp", "host", "fixed")
"""Parts of a micro-batch's time: matrix products; attention; recomputation of both; collectives of context parallelism;
all-to-alls of expert parallelism, and the work of its most loaded rank beyond the mean; exposed FSDP traffic; exposed
copies between host and device; exposed launches and fixed costs."""
LAYER_KERNELS = 150
"""Kernels of one layer's forward and backward in eager mode without recomputation; about a third are in forward."""
_SQUARES_PER_DOCUMENT = 0.75


@dataclass(frozen=True)
class ModelDims:
    """The figures of an architecture that time and traffic depend on; parameters are counted over all layers.

    body_params: of the layers. active_body_params: those that multiply each token (with experts only the chosen ones).
    last_params: of the last product of every layer (the MLP's down projection; of the chosen experts), which
    recomputation skips. first_params: of the projections to queries, keys and values, which a chunked block that is
    recomputed runs twice again. head_params: of the output projection. embedding_params: 0 if tied. num_heads,
    num_kv_heads, head_dim, v_head_dim: as the attention kernel gets them (DeepSeek's MLA: after the up-projection,
    where all heads have keys and values). expert_params: part of body_params that expert parallelism shards.
    num_experts, experts_per_token: routed experts of a layer and of a token, 0 for a dense model. window, window_share:
    the sliding window, and the share of the layers that have it, or None. adapter_params: of LoRA, which freezes all
    others; 0 without it.
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
    first_params: int = 0
    window: int | None = None
    window_share: float | None = None
    num_experts: int = 0
    adapter_params: int = 0

    @property
    def params(self) -> int:
        """The number of the model's own parameters."""
        return self.body_params + self.head_params + self.embedding_params

    @property
    def trained_params(self) -> int:
        """The number of parameters that have gradients."""
        return self.adapter_params or self.params

    @property
    def products(self) -> int:
        """The products of a matrix: with its input, for the input's gradient, and for its own unless it is frozen."""
        return 2 if self.adapter_params else 3

    def squares(self, lengths: IntArray, packs: Ragged | None = None) -> IntArray:
        """Return the squares in which attention's work on documents or packs is counted (CostModel.squares)."""
        return CostModel(window=self.window, window_share=self.window_share).squares(lengths, packs)

    @classmethod
    def from_args(cls, args: ModelArgs) -> ModelDims:
        """Return the dimensions of an architecture."""
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
            first_params=_first_params(args),
            window=args.sliding_window if args.window_share else None,
            window_share=args.window_share or None,
            num_experts=args.moe.n_routed_experts if args.moe else 0,
        )


def _first_params(args: ModelArgs) -> int:
    if args.hf_config is not None:
        # A guess: names of projections differ between the architectures of transformers.
        return args.num_layers * args.hidden_size * args.head_dim * (args.num_heads + 2 * args.num_kv_heads)
    with torch.device("meta"):
        modules = Decoder(args).named_modules()
        return sum(
            module.weight.numel()
            for name, module in modules
            if isinstance(module, nn.Linear) and ".self_attn." in name and not name.endswith(".o_proj")
        )


def get_dims(name: str) -> ModelDims:
    """Return the dimensions of a flavor of models/flavors.py; raise ValueError if there is none."""
    return ModelDims.from_args(get_flavor(name))


@dataclass(frozen=True)
class Sharding:
    """How parameters are sharded, as in the [parallelism] section.

    param_bytes, reduce_bytes, stored_bytes: of a parameter in computation, of a reduced gradient, and of a trained
    parameter, its gradient or a moment between steps. frozen_bytes: of a parameter that LoRA freezes.
    expert_load_deviation: standard deviation of the experts' loads over their mean.
    """

    dp_replicate: int = 1
    reshard_after_forward: bool | int = True
    expert_parallel: int = 1
    param_bytes: int = 2
    reduce_bytes: int = 4
    stored_bytes: int = 4
    cpu_offload: bool = False
    expert_load_deviation: float = 0.0
    frozen_bytes: int = 2


@dataclass(frozen=True)
class TimeModel:
    """Predictor of the micro-batches of any level, from loads whose squares count the model's windows.

    fixed_seconds: of each micro-batch independent of its content (data, synchronization). overlaps: whether keys and
    values are exchanged while queries are projected (distributed/context_parallel.py). float8: of [float8], if any.
    """

    dims: ModelDims
    hardware: Hardware
    world_size: int
    sharding: Sharding = field(default_factory=Sharding)
    fixed_seconds: float = 0.0
    overlaps: bool = True
    float8: Float8Products | None = None

    def parts(self, level: Level, loads: FloatArray, tokens: FloatArray | None = None) -> dict[str, FloatArray]:
        """Return the seconds of each of PARTS for each pack, float64 [n].

        loads: as from pack_loads, [n, 4]. tokens: computed positions, [n]; by default the level's max_tokens.
        """
        if tokens is None:
            tokens = np.full(len(loads), float(level.max_tokens))
        trained, squares = loads[:, 1], self._launched_squares(loads, tokens)
        # Positions per rank: cp ranks share a pack evenly (head-tail shards).
        own = tokens / level.cp_degree
        plain, full = self._flops(Level(level.max_tokens)), self._flops(level)
        head = 2 * self.dims.products * self.dims.head_params * trained / level.cp_degree / self._linear_rate
        linear = plain.alpha * own / self._linear_rate
        recomputed = (full.alpha - plain.alpha) * own / self._linear_rate
        waits = self._expert_wait(linear + recomputed)
        if self.float8 is not None and level.float8 is not False:
            linear, recomputed = self._with_float8(level, own, linear, recomputed)
        square_rate = level.cp_degree * self.hardware.attention_rate(self.dims.head_dim)
        return {
            "linear": linear + head,
            "attention": plain.beta * squares / square_rate,
            "recompute": recomputed + (full.beta - plain.beta) * squares / square_rate,
            "sp": own * self.exchange_seconds_per_token(level) + self._exchange_latency(level) * (own > 0),
            "experts": own * self.expert_seconds_per_token(level) + waits,
            "fsdp": self._exposed_fsdp(level, linear, recomputed),
            "host": self._exposed_copies(level, own, linear, recomputed),
            "fixed": self._exposed_launches(linear + recomputed, level) + self.fixed_seconds,
        }

    def _with_float8(
        self, level: Level, own: FloatArray, linear: FloatArray, recomputed: FloatArray
    ) -> tuple[FloatArray, FloatArray]:
        """Return the seconds of products, and of those that are repeated, of a level with float8 products."""
        assert self.float8 is not None
        converted = dataclasses.replace(self, dims=self.float8.dims(self.dims))
        plain, full = (converted._flops(k).alpha for k in (Level(level.max_tokens), level))
        share = 1.0 if level.mlp_chunk_tokens else self._recomputed(level) / self.dims.num_layers
        casts = self.float8.cast_seconds_per_token(share) * own
        casts = casts + self.float8.cast_seconds_of_weights(level, share) * (own > 0)
        saved = self.float8.saved_seconds(plain, recomputed=False) * own
        return linear - saved + casts, recomputed - self.float8.saved_seconds(full - plain, recomputed=True) * own

    def level_time(self, level: Level) -> LevelTimeModel:
        """Return the same as a LevelTimeModel: the time of an empty pack, and of each trained or squared token."""
        base = sum(part[0] for part in self.parts(level, np.zeros((1, 4))).values())
        # With zero tokens only the varying parts remain, which avoids a difference of nearly equal sums.
        varying = self.parts(level, np.array([[0.0, 1, 1, 0]]), np.zeros(1))
        per_square = float(varying["attention"][0] + varying["recompute"][0])
        per_document = per_square * _SQUARES_PER_DOCUMENT * self.hardware.attention_block**2
        return LevelTimeModel(float(base), float(varying["linear"][0]), per_square, per_document)

    def step_seconds(self) -> float:
        """Return the seconds of AdamW on a rank's shard and of the sum of gradients over parameter copies."""
        # AdamW reads parameter, gradient and two moments and writes all but the gradient: 28 bytes in fp32.
        s, own = self.sharding, self.dims.trained_params / self._shards
        copies = 2 * own * s.reduce_bytes * (s.dp_replicate - 1) / s.dp_replicate
        bandwidth = self.hardware.host_bandwidth if s.cpu_offload else self.hardware.memory_bandwidth
        return 7 * s.stored_bytes * own / bandwidth + copies / self.hardware.inter_node_bandwidth

    def exchange_seconds_per_token(self, level: Level) -> float:
        """Return the exposed seconds of the collectives around attention per token of a rank's shard, over all layers.

        Keys and values travel while queries are projected, and their gradients while q's are.
        """
        d, rate = self.dims, self.hardware.exchange_efficiency
        gather, scatter = level.cp_shape(d.num_kv_heads)
        queries = self._scatter_seconds(self.query_bytes_per_token(), scatter) / rate
        groups = level.attention_head_groups
        kv_bytes = float(self.kv_bytes_per_token(scatter, groups))
        keys_values = self._scatter_seconds(kv_bytes, scatter) / rate
        forward = backward = queries
        # Seconds of q's projection per token in forward; backward takes as long for each of its products.
        projection = 2 * d.hidden_size * d.num_heads * d.head_dim / self._linear_rate if self.overlaps else 0.0
        if groups > 1:
            # Queries are projected before, and the other groups' keys and values travel during attention.
            projection, keys_values, kv_bytes = 0.0, keys_values / groups, kv_bytes / groups
        if gather == 1:
            forward += max(0.0, keys_values - projection)
            backward += max(0.0, keys_values - (d.products - 1) * projection)
        else:
            # Heads are scattered first, inside groups of `scatter` ranks; gradients are summed in fp32.
            bus = self.hardware.bus_bandwidth(gather, max(1, self.hardware.gpus_per_node // scatter))
            gathered = kv_bytes * (gather - 1) / bus / rate
            summed = gathered * 4 / self.sharding.param_bytes
            forward += keys_values + max(0.0, gathered - projection)
            backward += keys_values + max(0.0, summed - (d.products - 1) * projection)
        again = self._recomputed(level) if level.recomputes_attention else 0
        return d.num_layers * (forward + backward) + again * forward

    def _scatter_seconds(self, sent: float, degree: int) -> float:
        """Return the seconds of a Ulysses exchange in which each rank sends `sent` bytes, over the slower network."""
        inside = min(degree, self.hardware.gpus_per_node)
        intra = sent * (inside - 1) / degree / self.hardware.intra_node_bandwidth
        return max(intra, sent * (degree - inside) / degree / self.hardware.inter_node_bandwidth)

    def query_bytes_per_token(self) -> int:
        """Return the bytes of q and the output per token and layer in forward."""
        return self.sharding.param_bytes * self.dims.num_heads * (self.dims.head_dim + self.dims.v_head_dim)

    def kv_bytes_per_token(self, scatter: int, groups: int = 1) -> int:
        """Return the bytes of k and v per token and layer in forward.

        Heads are repeated for `scatter` ranks in each of `groups` groups of heads.
        """
        kv_heads = groups * max(-(-self.dims.num_kv_heads // groups), scatter)
        return self.sharding.param_bytes * kv_heads * (self.dims.head_dim + self.dims.v_head_dim)

    @property
    def expert_rank_load(self) -> float:
        """Tokens of the most loaded rank of an expert group as a multiple of their mean; 1 without such groups."""
        s = self.sharding
        return most_loaded_rank(self.dims.num_experts, s.expert_parallel, s.expert_load_deviation)

    def _expert_wait(self, products: FloatArray) -> FloatArray:
        """Return the seconds by which the products of the most loaded rank of an expert group exceed the mean's.

        Each layer's exchange waits for that rank, another one in each layer. products: seconds of matrix products.
        """
        d = self.dims
        routed = d.expert_params * d.experts_per_token / max(1, d.num_experts) / d.active_body_params
        return (self.expert_rank_load - 1) * routed * products

    def expert_seconds_per_token(self, level: Level) -> float:
        """Return the seconds of dispatch and combine per token of a rank's shard, over all layers."""
        degree = self.sharding.expert_parallel
        if degree == 1 or not self.dims.experts_per_token:
            return 0.0
        # An exchange takes as long as its most loaded rank.
        rows = self.dims.experts_per_token * self.expert_rank_load
        sent = 2 * self.sharding.param_bytes * rows * self.dims.hidden_size
        # Recomputation, which chunks have in every layer, sends tokens to their experts again, but not back.
        again = self.dims.num_layers if level.mlp_chunk_tokens else self._recomputed(level)
        passes = 2 * self.dims.num_layers + again / 2
        return self._scatter_seconds(sent, degree) * passes / self.hardware.exchange_efficiency

    def fsdp_seconds(self, level: Level) -> tuple[float, float]:
        """Return the seconds of FSDP's traffic in forward and in backward of a micro-batch, hidden or not.

        The exchange between parameter copies is part of the step (step_seconds).
        """
        s, d = self.sharding, self.dims
        node = self.hardware.gpus_per_node
        body = d.body_params + d.adapter_params - d.expert_params
        if self.float8 is not None:
            # A byte each. The gradients are reduced as before.
            gathered = body - self.float8.params.gathered * (1 - 1 / s.param_bytes)
        else:
            gathered = float(body)
        rest = self._ring(d.head_params + d.embedding_params, self._shards, node)
        dense, gathers = (self._ring(count, self._shards, node) for count in (body, gathered))
        # A layer's experts are on expert_parallel adjacent ranks, so their shards are that far apart.
        ep = s.expert_parallel
        experts = self._ring(d.expert_params / ep, max(1, self._shards // ep), max(1, node // ep))
        gather = (rest + gathers + experts) * s.param_bytes + self._fsdp_hops(self._shards)
        trained = self._ring(d.adapter_params, self._shards, node) if d.adapter_params else rest + dense + experts
        reduce = trained * s.reduce_bytes + self._fsdp_hops(self._shards)
        resharded = level.reshard_setting(s.reshard_after_forward)
        if resharded is False:
            return gather, reduce
        # The head stays gathered and the embedding's backward needs no weights, so only blocks are gathered twice.
        ranks = self._shards if resharded is True else resharded
        again = self._ring(gathered, ranks, min(node, ranks)) if ranks < self._shards else gathers
        if ep == 1 and ranks < self._shards:
            experts = self._ring(d.expert_params, ranks, min(node, ranks))
        return gather, reduce + (again + experts) * s.param_bytes + self._fsdp_hops(ranks)

    def _launched_squares(self, loads: FloatArray, tokens: FloatArray) -> FloatArray:
        """Return the squared tokens of whole tiles.

        A document of n = ceil(L / B) blocks has n (n + 1) / 2 tiles of B^2. Averaged over L mod B, n (n + 1) B^2 is
        L^2 + 2 B L + 3/4 B^2, which is linear in `loads`.
        """
        block = self.hardware.attention_block
        return loads[:, 2] + 2 * block * tokens + _SQUARES_PER_DOCUMENT * block**2 * loads[:, 3]

    @property
    def _linear_rate(self) -> float:
        return self.hardware.peak_flops * self.hardware.linear_efficiency

    @property
    def _shards(self) -> int:
        return self.world_size // self.sharding.dp_replicate

    def _flops(self, level: Level) -> CostModel:
        d = self.dims
        # The head runs on trained tokens only, so `parts` counts it separately.
        cost = CostModel.from_dims(
            num_layers=d.num_layers,
            layer_params=(d.active_body_params + d.adapter_params) // d.num_layers,
            head_params=0,
            num_heads=d.num_heads,
            head_dim=d.head_dim,
            v_head_dim=d.v_head_dim,
            ac_policy=level.ac_policy,
            ac_layers=level.ac_layers,
            last_params=d.last_params // d.num_layers,
            chunked=level.mlp_chunk_tokens > 0,
        )
        if d.adapter_params:
            cost = dataclasses.replace(cost, alpha=cost.alpha - 2 * d.active_body_params)
        if level.mlp_chunk_tokens and level.recomputes_attention:
            # Once for the recomputed attention, and once for the gradients of each chunk.
            first = 2 * d.first_params * self._recomputed(level) / d.num_layers
            cost = dataclasses.replace(cost, alpha=cost.alpha + first)
        return cost

    def _recomputed(self, level: Level) -> int:
        """Return the number of layers that are checkpointed."""
        if level.ac_policy == "none":
            return 0
        return self.dims.num_layers if level.ac_layers is None else min(level.ac_layers, self.dims.num_layers)

    def _offloaded(self, level: Level) -> int:
        """Return the number of layers that keep activations in host memory."""
        if not level.offloads:
            return 0
        layers = self._recomputed(level)
        return layers if level.offload_layers is None else min(level.offload_layers, layers)

    def kept_bytes_per_token(self, level: Level) -> int:
        """Return the bytes that a checkpointed layer keeps per token of a rank's shard."""
        d, size = self.dims, self.sharding.param_bytes
        if level.recomputes_attention:
            return size * d.hidden_size
        scatter = level.cp_shape(d.num_kv_heads)[1]
        # Attention's output is kept with its heads and, sent back, with its tokens; the logsumexp is in float32.
        twice = size * d.num_heads * d.v_head_dim if scatter > 1 else 0
        attention = self.query_bytes_per_token() + self.kv_bytes_per_token(scatter) + 4 * d.num_heads
        return size * d.hidden_size + attention + twice

    def _exchange_passes(self, level: Level) -> int:
        """Return the passes through exchanges: forward, backward, and recomputed forwards of attention."""
        return 2 * self.dims.num_layers + (self._recomputed(level) if level.recomputes_attention else 0)

    def _exchange_latency(self, level: Level) -> float:
        """Return the latency of the collectives: two for Ulysses (inputs, output), one for gathering (k and v)."""
        gather, scatter = level.cp_shape(self.dims.num_kv_heads)
        hops = (2 * np.log2(scatter) if scatter > 1 else 0.0) + (np.log2(gather) if gather > 1 else 0.0)
        return float(hops) * self.hardware.hop_seconds * self._exchange_passes(level) * level.attention_head_groups

    def _ring(self, params: float, ranks: int, ranks_per_node: int) -> float:
        """Return the seconds per byte of a parameter: each rank receives the (ranks - 1) / ranks that it lacks."""
        bus = self.hardware.bus_bandwidth(ranks, ranks_per_node) * self.hardware.gather_efficiency
        return params * (ranks - 1) / ranks / bus

    def _fsdp_hops(self, ranks: int) -> float:
        """Return the latency of one collective per layer among `ranks` ranks."""
        return float(self.dims.num_layers * self.hardware.hop_seconds * np.log2(max(2, ranks)) * (self._shards > 1))

    def _exposed_fsdp(self, level: Level, linear: FloatArray, recomputed: FloatArray) -> FloatArray:
        """Return the traffic that the matrix products of the same direction do not hide; attention hides nothing."""
        forward, backward = self.fsdp_seconds(level)
        linear_forward = linear / self.dims.products
        return np.maximum(0, forward - linear_forward) + np.maximum(
            0, backward - (linear - linear_forward) - recomputed
        )

    def _exposed_copies(self, level: Level, own: FloatArray, linear: FloatArray, recomputed: FloatArray) -> FloatArray:
        """Return the copies to and from host memory that the matrix products of the same direction do not hide."""
        s, d, layers = self.sharding, self.dims, self.dims.num_layers
        rate = self.hardware.pcie_bandwidth * self.hardware.pcie_efficiency
        activations = own * self._offloaded(level) * self.kept_bytes_per_token(level)
        # The link works in both directions at once. Parameters come back as stored, gradients leave as reduced.
        stored = d.trained_params * s.stored_bytes + (d.params * s.frozen_bytes if d.adapter_params else 0)
        shard = (own > 0) * stored / self._shards * s.cpu_offload
        gradients = (own > 0) * d.trained_params * s.reduce_bytes / self._shards * s.cpu_offload
        again = shard * (level.reshard_setting(s.reshard_after_forward) is not False)
        forward, backward = np.maximum(activations, shard) / rate, np.maximum(activations + again, gradients) / rate
        # The copies of the first block to run have nothing to hide behind.
        hidden = (layers - 1) / layers
        first = linear / d.products
        exposed = np.maximum(0, forward - hidden * first)
        return exposed + np.maximum(0, backward - hidden * (linear - first + recomputed))

    def _exposed_launches(self, matrix_seconds: FloatArray, level: Level) -> FloatArray:
        """Return the CPU's time for launches beyond the GPU's time for the matrix products."""
        layers = self.dims.num_layers + self._recomputed(level) / 3
        if level.mlp_chunk_tokens:
            layers = self.dims.num_layers * 4 / 3 * -(-level.max_tokens // level.cp_degree // level.mlp_chunk_tokens)
        return np.maximum(0, layers * LAYER_KERNELS * self.hardware.launch_seconds - matrix_seconds)


def most_loaded_rank(num_experts: int, ranks: int, deviation: float) -> float:
    """Return the expected tokens of the most loaded of `ranks` ranks with equal shares of the experts, over their mean.

    deviation: standard deviation of the experts' loads over their mean; the loads are taken as independent. The largest
    of n normal values is expected at the quantile (n - 3/8) / (n + 1/4) (Blom).
    """
    if ranks == 1 or num_experts == 0:
        return 1.0
    largest = NormalDist().inv_cdf((ranks - 0.375) / (ranks + 0.25))
    return 1 + deviation * math.sqrt(ranks / num_experts) * largest


def time_model(args: ModelArgs, config: JobConfig, hardware: Hardware, world_size: int) -> TimeModel:
    """Return the TimeModel of a run of this configuration."""
    # The configured kernel may be slower than the machine's best one.
    hardware = hardware.with_attention(config.model.attention_backend)
    dims = dataclasses.replace(ModelDims.from_args(args), adapter_params=adapter_params(args, config))
    float8 = Float8Products.of(args, config, hardware)
    return TimeModel(dims, hardware, world_size, sharding(config), float8=float8)


def sharding(config: JobConfig) -> Sharding:
    """Return the sharding of a run of this configuration."""
    # "auto" is bfloat16 on the GPUs that are modeled here.
    bytes_of = {"float32": 4, "bfloat16": 2, "auto": 2}
    return Sharding(
        dp_replicate=config.parallelism.dp_replicate,
        expert_parallel=config.parallelism.expert_parallel_degree,
        reshard_after_forward=config.parallelism.reshard_after_forward,
        param_bytes=bytes_of[config.training.mixed_precision_param],
        reduce_bytes=bytes_of[config.training.mixed_precision_reduce],
        stored_bytes=bytes_of[config.training.dtype],
        cpu_offload=config.parallelism.cpu_offload,
        expert_load_deviation=config.parallelism.expert_load_deviation,
        frozen_bytes=stored_dtype(config, torch.device("cuda")).itemsize,
    )


def estimate_candidates(
    args: ModelArgs,
    config: JobConfig,
    hardware: Hardware,
    world_size: int,
    levels: Sequence[Level],
    fixed_seconds: float = 0.0,
) -> list[Candidate]:
    """Return a candidate for each of `levels`, in order.

    Of a level with ac_layers=None the fastest of `depth_choices` is taken. A level that does not fit, on the GPU or on
    the host, has time None and the peak that it would need. fixed_seconds: of each micro-batch.
    """
    model = dataclasses.replace(time_model(args, config, hardware, world_size), fixed_seconds=fixed_seconds)
    limit, host_limit = usable_bytes(hardware), usable_host_bytes(hardware, world_size)
    candidates = []
    for level in levels:

        def estimate(at: Level) -> MemoryEstimate:
            return estimate_memory(args, at, config, world_size, device_type="cuda")

        def candidate(at: Level, peak_bytes: int) -> Candidate:
            fits = peak_bytes <= limit and estimate(at).host_bytes <= host_limit
            return Candidate(at, model.level_time(at) if fits else None, peak_bytes)

        choices = depth_choices(lambda at: estimate(at).peak_bytes, level, args.num_layers, limit)
        candidates.append(min((candidate(*choice) for choice in choices), key=full_pack_seconds))
    return candidates


def full_pack_seconds(candidate: Candidate) -> float:
    """Return the seconds of one document that fills the pack; infinite if it does not fit in memory."""
    tokens = float(candidate.level.max_tokens)
    return float(candidate.time.seconds(np.array([1.0, tokens, tokens**2, 1.0]))) if candidate.time else math.inf
