"""Memory of a level from the model's configuration, and how many layers to checkpoint so that it fits.

Owns two things: the allocations of a block and of the head, counted by running the real code under FakeTensorMode (so
any policy, cp style or new model is covered without a formula, at any length, without a GPU), and the composition of a
micro-batch's peak from these pieces and FSDP2's buffers.

Not simulated: collectives are only their shapes; with expert parallelism all ranks have equal loads; attention is the
CPU operator, which like the flash kernels keeps q, k, v, its output and a float32 logsumexp per query and head, plus
`_attention_workspaces` for what a kernel allocates inside. Compiled blocks keep less than estimated: the compiler fuses
and recomputes.

Shape suffixes: S tokens of a rank's shard, H hidden size, D head width.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hbp_titan.components.loss import linear_cross_entropy, select_rows
from hbp_titan.config import JobConfig
from hbp_titan.distributed.activation_checkpoint import ActivationCheckpointState, BlockForward
from hbp_titan.distributed.context_parallel import ContextParallelAttention, ContextParallelState
from hbp_titan.distributed.expert_parallel import ExpertExchange, Splits
from hbp_titan.distributed.parallelize import DTYPES, compute_dtype, stored_dtype
from hbp_titan.models.configs import ModelArgs
from hbp_titan.models.decoder import Decoder, DecoderBlock, Head
from hbp_titan.models.documents import Documents, HeadTailShard, ShardPass, pack_documents
from hbp_titan.models.lora import apply_lora
from hbp_titan.models.moe import Experts, MixtureOfExperts
from hbp_titan.packing import Level

Piece = TypeVar("Piece", bound=nn.Module)

_ATTENTION_FORWARD = torch.ops.hbp_titan.varlen_attention_cpu.default
_ATTENTION_BACKWARD = torch.ops.hbp_titan.varlen_attention_cpu_backward.default


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes per rank, on its device unless stated otherwise.

    resident: parameters, gradients and optimizer state. saved: kept by all layers from forward to backward. transient:
    the rest of what is held at the peak. host: in host memory, which with parallelism.cpu_offload has what is resident
    otherwise.
    """

    resident_bytes: int
    saved_bytes: int
    transient_bytes: int
    host_bytes: int = 0

    @property
    def peak_bytes(self) -> int:
        """The most bytes held on the device at one time."""
        return self.resident_bytes + self.saved_bytes + self.transient_bytes


def estimate_memory(
    args: ModelArgs,
    level: Level,
    config: JobConfig,
    world_size: int,
    *,
    device_type: str,
    loss_tokens: int | None = None,
) -> MemoryEstimate:
    """Return the memory of a micro-batch of `level` on each of `world_size` ranks.

    Assumes that one document fills the pack, the most that attention needs, and equal loads of expert-parallel ranks.
    device_type: "cpu" or "cuda", which need not exist here. loss_tokens: trained tokens of a rank's shard; by default
    all of them.
    """
    return _Composition(args, level, config, world_size, device_type, loss_tokens).estimate()


def estimate_evaluation(
    args: ModelArgs, level: Level, config: JobConfig, world_size: int, *, device_type: str
) -> MemoryEstimate:
    """Return the memory of a forward without gradients, as in validation."""
    # Without gradients a block does what a fully recomputed block does in its forward, and parameters are always freed
    # after it (LevelRuntime.activate).
    level = replace(level, ac_policy="full", ac_layers=None, reshard_after_forward=True)
    return _Composition(args, level, config, world_size, device_type, None).evaluation()


def fewest_layers(peak_all: float, peak_fewer: float, depth_all: int, depth_fewer: int, limit: float) -> int | None:
    """Return the fewest layers to checkpoint for a peak of at most `limit` bytes (the paper's GreedyProfileCkpt).

    peak_all, peak_fewer: peaks with depth_all (all layers) and depth_fewer layers checkpointed, measured or estimated;
    the peak is linear in the depth. Returns None if all layers are not enough.
    """
    if not 0 <= depth_fewer < depth_all:
        raise ValueError(f"depths {depth_all} and {depth_fewer}: the second must be at least 0 and below the first")
    if peak_all > limit:
        return None
    saved_per_layer = (peak_fewer - peak_all) / (depth_all - depth_fewer)
    if saved_per_layer <= 0:
        return 0 if peak_fewer <= limit else depth_all
    return max(0, depth_all - math.floor((limit - peak_all) / saved_per_layer))


class _Composition:
    """Sizes of the pieces, and the moments of a micro-batch at which memory can peak."""

    def __init__(
        self,
        args: ModelArgs,
        level: Level,
        config: JobConfig,
        world_size: int,
        device_type: str,
        loss_tokens: int | None,
    ) -> None:
        dtype = compute_dtype(config, torch.device(device_type))
        shards = world_size // config.parallelism.dp_replicate
        expert_parallel = config.parallelism.expert_parallel_degree
        self.tied = args.tie_embeddings
        resharded = level.reshard_setting(config.parallelism.reshard_after_forward)
        # Share of a block's gathered parameters that stays after its forward.
        self.kept_share = 0.0 if resharded is True else 1.0 if resharded is False else 1 / resharded
        tokens = level.max_tokens // level.cp_degree
        layers = args.num_layers if level.ac_layers is None else min(level.ac_layers, args.num_layers)
        policies = [level.ac_policy] * layers + ["none"] * (args.num_layers - layers)
        self.blocks: list[PieceMemory] = [
            block_memory(args, replace(level, ac_policy=policy), dtype, device_type, expert_parallel)
            for policy in policies
        ]
        loss_tokens = tokens if loss_tokens is None else min(loss_tokens, tokens)
        self.head = head_memory(args, tokens, loss_tokens, config.training.loss_chunk_tokens, dtype, device_type)
        self.hidden = tokens * args.hidden_size * dtype.itemsize
        # cos and sin in float32, shared by all layers.
        self.rope = 2 * tokens * args.rope_dim * 4
        sizes = _model_sizes(replace(args, rope_scaling=None), config.lora.rank, tuple(config.lora.target_modules))
        reduce_dtype = DTYPES[config.training.mixed_precision_reduce]
        self.block = _gathered_block(sizes, dtype, reduce_dtype, shards, expert_parallel)
        self.vocab = Gathered.of(sizes.head, dtype, reduce_dtype, shards)
        # AdamW: a trained parameter, its gradient and two moments, all in the parameter's dtype.
        trained = 4 * sizes.trained * DTYPES[config.training.dtype].itemsize
        frozen = (sizes.model - sizes.trained) * stored_dtype(config, torch.device(device_type)).itemsize
        self.resident, self.host = (trained + frozen) // shards, 0
        if config.parallelism.cpu_offload:
            self.resident, self.host = 0, self.resident
            if config.parallelism.dp_replicate > 1:
                # Each copy's sum over the micro-batches of a step stays on the device until the copies are summed.
                self.resident = sizes.trained * reduce_dtype.itemsize // shards

    def estimate(self) -> MemoryEstimate:
        saved = [block.saved + self.hidden for block in self.blocks]
        moments = [self._head_moment(saved), self._embedding_moment()]
        for i in range(len(self.blocks)):
            moments += [self._forward_moment(i, saved), self._backward_moment(i, saved), self._reduce_moment(i, saved)]
        return MemoryEstimate(self.resident, sum(saved), max(moments) - sum(saved), self.host)

    def evaluation(self) -> MemoryEstimate:
        nothing = [0] * len(self.blocks)
        moments = [self._head_moment(nothing), *(self._forward_moment(i, nothing) for i in range(len(self.blocks)))]
        return MemoryEstimate(self.resident, 0, max(moments), self.host)

    def _held(self, layers_kept: int, saved: list[int]) -> int:
        """Return what is held while a block runs: tied weights, cos and sin, saved tensors, parameters not freed."""
        root = self.vocab.parameters if self.tied else 0
        kept = int(layers_kept * self.block.parameters * self.kept_share)
        return root + kept + self.rope + sum(saved)

    def _forward_moment(self, i: int, saved: list[int]) -> int:
        # The buffer of its all-gather, or of the next block's, is still held.
        parameters = self.block.parameters + self.block.all_gather
        return self._held(i, saved[:i]) + parameters + self.hidden + self.blocks[i].forward

    def _head_moment(self, saved: list[int]) -> int:
        parameters = 0 if self.tied else self.vocab.parameters + self.vocab.all_gather
        work = max(self.head.forward, self.head.saved + self.head.backward)
        return self._held(len(saved), saved) + parameters + self.hidden + work

    def _backward_moment(self, i: int, saved: list[int]) -> int:
        last = i + 1 == len(self.blocks)
        # Meanwhile the reduction of the following block, or of the head, holds its input, and the parameters of the
        # next block in backward order arrive.
        reduction = (0 if self.tied else self.vocab.reduce_input) if last else self.block.reduce_input
        prefetched = self.block.all_gather if i and self.kept_share < 1 else 0
        held = self._held(i, saved[: i + 1]) + self._root_gradient()
        return held + self.block.parameters + reduction + prefetched + self.hidden + self.blocks[i].backward

    def _reduce_moment(self, i: int, saved: list[int]) -> int:
        held = self._held(i, saved[:i]) + self._root_gradient() + self.hidden
        prefetched = self.block.all_gather if i and self.kept_share < 1 else 0
        return held + prefetched + 2 * self.block.parameters + self.block.reduction

    def _embedding_moment(self) -> int:
        """Return the bytes during the gradient of the embedding and its reduction."""
        # The gradient of an embedding needs no weights, so only a tied matrix is gathered, and its gradient is added to
        # the head's.
        whole = 3 if self.tied else 1
        return self.hidden + self.rope + whole * self.vocab.parameters + self.vocab.reduction

    def _root_gradient(self) -> int:
        # The gradient of a tied matrix is not reduced before the embedding's share is added.
        return self.vocab.parameters if self.tied else 0


@dataclass(frozen=True)
class Gathered:
    """Bytes that FSDP2 needs for one group of parameters while it is in use.

    parameters: unsharded, in the compute dtype (gradients take the same). all_gather: the buffer that they are copied
    from. reduce_input: unsharded gradients in the reduction's dtype. reduction: the whole reduce-scatter.
    """

    parameters: int
    all_gather: int
    reduce_input: int
    reduction: int

    @classmethod
    def of(cls, numel: int, dtype: torch.dtype, reduce_dtype: torch.dtype, shards: int) -> Gathered:
        parameters, reduce_input = numel * dtype.itemsize, numel * reduce_dtype.itemsize
        if shards == 1:
            # No collective, but the gradients are copied twice (FSDPParamGroup, foreach_reduce).
            return cls(parameters, 0, reduce_input, 3 * reduce_input)
        return cls(parameters, parameters, reduce_input, reduce_input + reduce_input // shards)

    def __add__(self, other: Gathered) -> Gathered:
        """Return the bytes of both groups at the same time."""
        return Gathered(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class _ModelSizes:
    """Parameter counts: all, trained, of the head, of the largest block, and of that block's experts."""

    model: int
    trained: int
    head: int
    block: int
    experts: int


@lru_cache(maxsize=64)
def _model_sizes(args: ModelArgs, lora_rank: int, target_modules: tuple[str, ...]) -> _ModelSizes:
    with torch.device("meta"):
        model = Decoder(args)
        if lora_rank:
            apply_lora(model, lora_rank, 1.0, list(target_modules))
    block = max(model.layers, key=num_elements)
    return _ModelSizes(
        model=num_elements(model),
        trained=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        head=num_elements(model.head),
        block=num_elements(block),
        experts=sum(num_elements(module) for module in block.modules() if isinstance(module, Experts)),
    )


def _gathered_block(
    sizes: _ModelSizes, dtype: torch.dtype, reduce_dtype: torch.dtype, shards: int, expert_parallel: int
) -> Gathered:
    """Return the buffers of a block; with expert parallelism its experts are a separate group."""
    if expert_parallel == 1:
        return Gathered.of(sizes.block, dtype, reduce_dtype, shards)
    rest = Gathered.of(sizes.block - sizes.experts, dtype, reduce_dtype, shards)
    return rest + Gathered.of(sizes.experts // expert_parallel, dtype, reduce_dtype, shards // expert_parallel)


def num_elements(module: nn.Module) -> int:
    """Return the elements of all parameters of a module; a shared one counts once."""
    return sum(parameter.numel() for parameter in module.parameters())


@dataclass(frozen=True)
class PieceMemory:
    """Bytes of a block or of the head, in addition to its input and parameters.

    forward: peak during forward. saved: held from forward to backward, without the output. backward: peak during
    backward above what is held when it begins (including the output's gradient), with the gradients of the parameters.
    output: of the output alone.
    """

    forward: int
    saved: int
    backward: int
    output: int


class AllocationTracker(TorchDispatchMode):
    """Counter of the live bytes that operators allocate while it is active, except storages of `known` tensors.

    workspaces: bytes that an operator allocates internally.
    """

    def __init__(self, known: list[Tensor], workspaces: dict[Any, int]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.workspaces = workspaces
        self._sizes: dict[int, int] = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        self.peak = max(self.peak, self.live + self.workspaces.get(func, 0))
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.live += storage.nbytes()
        weakref.finalize(storage, self._release, key)

    def _release(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


def block_memory(
    args: ModelArgs, level: Level, dtype: torch.dtype, device_type: str, expert_parallel: int = 1
) -> PieceMemory:
    """Return the memory of one decoder block on a rank's share of a pack of `level`, under its checkpoint policy.

    dtype: of parameters and hidden states. device_type: "cpu" or "cuda", which need not exist here. expert_parallel:
    ranks that share the experts of a layer.
    """
    return _block_memory(_shape(args), replace(level, ac_layers=None), dtype, device_type, expert_parallel)


@lru_cache(maxsize=1024)
def _block_memory(
    args: ModelArgs, level: Level, dtype: torch.dtype, device_type: str, expert_parallel: int
) -> PieceMemory:
    gather_degree = level.cp_shape(args.num_kv_heads)[0]
    with FakeTensorMode():
        block = _make(lambda: _block(args, expert_parallel), dtype, device_type)
        block.inner_attention = _AttentionWithoutRanks(block.inner_attention, _cp_state(args, level), gather_degree)
        forward = BlockForward(block, 0, ActivationCheckpointState(level.ac_policy, 1))
        size = level.max_tokens // level.cp_degree
        x_SH = torch.empty(size, args.hidden_size, dtype=dtype, requires_grad=True)
        rope_SD = [torch.empty(size, args.rope_dim) for _ in range(2)]
        documents = _documents(level, args)
        inputs = (x_SH, *rope_SD, documents)
        return _measure(block, forward, inputs, _attention_workspaces(args, level, dtype, device_type))


def head_memory(
    args: ModelArgs, tokens: int, loss_tokens: int, chunk_tokens: int, dtype: torch.dtype, device_type: str
) -> PieceMemory:
    """Return the memory of the final norm and the loss over `tokens` hidden states, `loss_tokens` of them trained."""

    def run(count: int) -> PieceMemory:
        return _head_memory(_shape(args), tokens, count, chunk_tokens, dtype, device_type)

    # Beyond a few chunks every size is linear in their number, so long losses are extrapolated.
    few, more = 4 * chunk_tokens, 8 * chunk_tokens
    if loss_tokens <= more:
        return run(loss_tokens)
    sizes = zip(astuple(run(few)), astuple(run(more)), strict=True)
    return PieceMemory(*(low + (high - low) * (loss_tokens - few) // (more - few) for low, high in sizes))


@lru_cache(maxsize=1024)
def _head_memory(
    args: ModelArgs, tokens: int, loss_tokens: int, chunk_tokens: int, dtype: torch.dtype, device_type: str
) -> PieceMemory:
    with FakeTensorMode():
        head = _make(lambda: Head(args), dtype, device_type)
        index = torch.empty(loss_tokens, dtype=torch.int64)
        weights = torch.empty(loss_tokens)

        def loss(hidden_SH: Tensor, weight_VH: Tensor) -> Tensor:
            return linear_cross_entropy(select_rows(hidden_SH, index), weight_VH, index, weights, chunk_tokens)[0]

        x_SH = torch.empty(tokens, args.hidden_size, dtype=dtype, requires_grad=True)
        return _measure(head, head, (x_SH, loss))


def _shape(args: ModelArgs) -> ModelArgs:
    """Return `args` without what one piece's memory does not depend on, so that all depths share a cache entry."""
    # With experts all layers count as sparse, as almost all are.
    moe = args.moe and replace(args.moe, first_k_dense_replace=0)
    return replace(args, name="", num_layers=1, rope_scaling=None, tie_embeddings=False, moe=moe)


def _block(args: ModelArgs, expert_parallel: int) -> DecoderBlock:
    """Return a block with the experts of one of `expert_parallel` ranks, and an exchange without the other ranks."""
    block = DecoderBlock(args)
    if expert_parallel > 1:
        assert args.moe is not None
        assert isinstance(block.mlp, MixtureOfExperts)
        own = args.moe.n_routed_experts // expert_parallel
        block.mlp.experts = Experts(args.hidden_size, args.moe.moe_intermediate_size, own)
        exchange = _ExchangeWithoutRanks(block.mlp.experts, expert_parallel)
        block.mlp.run_experts = exchange  # type: ignore[method-assign]
    return block


def _make(piece: Callable[[], Piece], dtype: torch.dtype, device_type: str) -> Piece:
    """Return a piece of the model with fake parameters and the norm that `device_type` would run."""
    with torch.device("meta"):
        module = piece()
    # nn.Module.to does not work on fake tensors.
    for part in list(module.modules()):
        for name, parameter in list(part.named_parameters(recurse=False)):
            setattr(part, name, nn.Parameter(torch.empty(parameter.shape, dtype=dtype)))
        if device_type == "cuda" and isinstance(part, nn.RMSNorm):
            # On a GPU the norm is one fused kernel; the CPU's is made of several operators, which keep more.
            part.forward = lambda x, norm=part: _FusedNorm.apply(x, norm.weight)  # type: ignore[method-assign, misc]
    return module


def _measure(
    module: nn.Module, forward: Any, inputs: tuple[Any, ...], workspaces: dict[Any, int] | None = None
) -> PieceMemory:
    known = [*module.parameters(), *(leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor))]
    with AllocationTracker(known, workspaces or {}) as tracker:
        output = forward(*inputs)
        output_bytes = output.untyped_storage().nbytes()
        saved = tracker.live - output_bytes
        forward_peak = tracker.peak
        grad = torch.empty_like(output)
        tracker.peak = start = tracker.live
        # The engine drops the output of a block once the next block has it, so only its graph may stay alive here.
        graph = torch.autograd.graph.get_gradient_edge(output)
        del output
        torch.autograd.backward([graph], [grad])
        backward_peak = tracker.peak - start
    return PieceMemory(forward_peak, saved, max(backward_peak, 0), output_bytes)


def _attention_workspaces(args: ModelArgs, level: Level, dtype: torch.dtype, device_type: str) -> dict[Any, int]:
    """Return the bytes that the attention kernels allocate internally, for one document that fills the pack.

    CPU (models/attention_cpu.py): a document's output, and its dq, dk and dv with keys repeated per query head. CUDA
    (flash-attn, and torch's varlen attention, which is the same kernel): dq in float32, and with fewer kv than query
    heads dk and dv per query head, which are then summed.
    """
    gather_degree, ulysses_degree = level.cp_shape(args.num_kv_heads)
    width = args.num_heads // ulysses_degree * args.head_dim
    keys = level.max_tokens
    # With gathered keys, each of two passes has half of the shard's queries.
    queries = keys if gather_degree == 1 else -(-keys // (2 * gather_degree))
    if device_type == "cuda":
        repeated = 2 * keys * width * dtype.itemsize if args.num_heads > args.num_kv_heads else 0
        return {_ATTENTION_BACKWARD: 4 * queries * width + repeated}
    return {
        _ATTENTION_FORWARD: queries * width * dtype.itemsize,
        _ATTENTION_BACKWARD: (queries + 2 * keys) * width * dtype.itemsize,
    }


def _cp_state(args: ModelArgs, level: Level) -> ContextParallelState:
    gather_degree, ulysses_degree = level.cp_shape(args.num_kv_heads)
    group: Any = object()
    return ContextParallelState(
        ulysses_degree, group if ulysses_degree > 1 else None, group if gather_degree > 1 else None
    )


def _documents(level: Level, args: ModelArgs) -> Documents | HeadTailShard:
    """Return one document that fills the pack; as a head-tail shard that of the last rank, which has the most keys."""
    gather_degree = level.cp_shape(args.num_kv_heads)[0]
    if gather_degree == 1:
        return pack_documents([level.max_tokens])
    # As `head_tail_shard` cuts it; a shard may be odd.
    heads = -(-level.max_tokens // (2 * gather_degree))
    tails = level.max_tokens // gather_degree - heads
    passes = ((heads, gather_degree * heads), (tails, gather_degree * heads + tails))
    return HeadTailShard(
        *(ShardPass(pack_documents([own], [keys]), torch.empty(keys, dtype=torch.int64)) for own, keys in passes)
    )


class _FusedNorm(torch.autograd.Function):
    """Shapes of CUDA's RMS norm: one kernel, which keeps its input and a float32 per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


class _ExchangeWithoutRanks(ExpertExchange):
    """Expert parallelism in one process: each of `ranks` sends this one the same number of rows."""

    def __init__(self, experts: Experts, ranks: int) -> None:
        group: Any = None
        super().__init__(experts, group)
        self.ranks = ranks

    def __call__(self, x_TH: Tensor, weights_TK: Tensor, order_S: Tensor, counts_E: Tensor) -> Tensor:
        # Equal loads: an expert with twice its share would need as much more for the rows that it receives.
        rows, rest = divmod(len(order_S), self.ranks)
        self.sent_P = [rows + (rank < rest) for rank in range(self.ranks)]
        return super().__call__(x_TH, weights_TK, order_S, counts_E)

    def count(self, counts_E: Tensor) -> Splits:
        return Splits(counts_E.view(self.ranks, -1), self.sent_P, self.sent_P)

    def exchange(self, x: Tensor, received_P: list[int], sent_P: list[int]) -> Tensor:
        # As many rows arrive as are sent.
        return torch.empty_like(x)


class _AttentionWithoutRanks(ContextParallelAttention):
    """Context parallelism in one process: collectives are only their shapes."""

    def __init__(self, inner: nn.Module, state: ContextParallelState, gather_degree: int) -> None:
        super().__init__(inner, state)
        self.gather_degree = gather_degree

    def all_to_all(self, x: Tensor) -> Tensor:
        return torch.empty_like(x)

    def all_gather(self, x: Tensor) -> Tensor:
        return x.new_empty(self.gather_degree * x.shape[0], *x.shape[1:])

    def reduce_scatter(self, x: Tensor) -> Tensor:
        return x.new_empty(x.shape[0] // self.gather_degree, *x.shape[1:])
