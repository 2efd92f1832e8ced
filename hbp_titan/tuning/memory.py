"""The memory of a level from the model's configuration, and how many layers to checkpoint for it to fit.

Owns the composition of an iteration's peak from its pieces (dry_run.py) and FSDP2's buffers, and the paper's
GreedyProfileCkpt. The peak is the highest of the moments at which one can lie: a block's forward, the head with its
loss, a block's backward, the reduction of its gradients.

Dry runs: the allocations of a piece of the model, from the real code on tensors without data.

Owns the counting of a block's and the head's forward and backward under torch's FakeTensorMode: every operator runs
for its shapes alone, and each storage counts from its making to its release. So whatever a policy, a context-parallel
style or a new model keeps is found without a formula, at any length, on a machine that need not have a GPU.

What stands in for what: collectives are their shapes; where experts are spread over ranks, all ranks have the same
load. Attention is the CPU's operator, which like the flash kernels keeps q, k, v, its output and a float32 logsumexp
per query and head; what a kernel allocates inside is not seen, and `_attention_workspaces` gives it. For a GPU the RMS
norm is one fused kernel; on a CPU it is made of several operators, which keep more. Compiled blocks keep less than this
says: the compiler fuses and recomputes.

Shape suffixes: S tokens of a rank's shard, H hidden size, D head width.
"""

from __future__ import annotations

import dataclasses
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
from hbp_titan.distributed.context_parallel import ContextParallelAttention, ContextParallelState
from hbp_titan.distributed.expert_parallel import ExpertExchange, Splits
from hbp_titan.distributed.parallelize import (
    DTYPES,
    ActivationCheckpointState,
    BlockForward,
    compute_dtype,
    stored_dtype,
)
from hbp_titan.models.decoder import DecoderBlock, Head, ModelArgs
from hbp_titan.models.documents import Documents, HeadTailShard, ShardPass, pack_documents
from hbp_titan.models.lora import apply_lora
from hbp_titan.models.moe import Experts, MixtureOfExperts
from hbp_titan.models.registry import build_model
from hbp_titan.packing import Level

Piece = TypeVar("Piece", bound=nn.Module)

_ATTENTION_FORWARD = torch.ops.hbp_titan.varlen_attention_cpu.default
_ATTENTION_BACKWARD = torch.ops.hbp_titan.varlen_attention_cpu_backward.default


@dataclass(frozen=True)
class PieceMemory:
    """Bytes above what is held when the piece begins: its input and its parameters do not count.

    forward: the most during forward. saved: held from forward to backward, the output not counted. backward: the most
    during backward, above what is held when it begins (the gradient of the output is held then); gradients of the
    piece's parameters are in it. output: of the output alone.
    """

    forward: int
    saved: int
    backward: int
    output: int


class AllocationTracker(TorchDispatchMode):
    """Counts the storages that operators make while it is active; those of `known` tensors do not count.

    workspaces: bytes that an operator allocates inside, beside its results.
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
    """One decoder block on a rank's share of a pack of `level`, under the checkpoint policy of `level`.

    dtype: of parameters and hidden states. device_type: "cpu" or "cuda"; neither needs to be there. expert_parallel:
    ranks that share the experts of a layer.
    """
    return _block_memory(_shape(args), dataclasses.replace(level, ac_layers=None), dtype, device_type, expert_parallel)


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
    """Final norm and loss over `tokens` hidden states, of which `loss_tokens` meet the vocabulary."""

    def run(count: int) -> PieceMemory:
        return _head_memory(_shape(args), tokens, count, chunk_tokens, dtype, device_type)

    # After a few chunks every size is linear in their number: a million tokens need no thousand chunks.
    few, more = 4 * chunk_tokens, 8 * chunk_tokens
    if loss_tokens <= more:
        return run(loss_tokens)
    sizes = zip(dataclasses.astuple(run(few)), dataclasses.astuple(run(more)), strict=True)
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
    """What of an architecture one piece's memory depends on: one entry in the cache for all depths."""
    # Of a mixture of experts the sparse layers, which are the most by far.
    moe = args.moe and dataclasses.replace(args.moe, first_k_dense_replace=0)
    return dataclasses.replace(args, name="", num_layers=1, rope_scaling=None, tie_embeddings=False, moe=moe)


def _block(args: ModelArgs, expert_parallel: int) -> DecoderBlock:
    """A block with the experts that one of so many ranks has, and their exchange without the others."""
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
    """A piece of the model with fake parameters, and what `device_type` computes otherwise put in its place."""
    with torch.device("meta"):
        module = piece()
    # nn.Module.to does not work on fake tensors.
    for part in list(module.modules()):
        for name, parameter in list(part.named_parameters(recurse=False)):
            setattr(part, name, nn.Parameter(torch.empty(parameter.shape, dtype=dtype)))
        if device_type == "cuda" and isinstance(part, nn.RMSNorm):
            part.forward = _fused_norm(part)  # type: ignore[method-assign, assignment]
    return module


def _fused_norm(norm: nn.RMSNorm) -> Callable[[Tensor], Tensor]:
    return lambda x: _FusedNorm.apply(x, norm.weight)


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
        # The engine drops the output of a block as soon as the next one has it.
        graph = torch.autograd.graph.get_gradient_edge(output)
        del output
        torch.autograd.backward([graph], [grad])
        backward_peak = tracker.peak - start
    return PieceMemory(forward_peak, saved, max(backward_peak, 0), output_bytes)


def _attention_workspaces(args: ModelArgs, level: Level, dtype: torch.dtype, device_type: str) -> dict[Any, int]:
    """Bytes that the attention kernels allocate inside, for one document that fills the pack.

    cpu (models/attention_cpu.py): a document's output, and its dq, dk and dv with keys repeated for each query head.
    cuda (flash-attn and torch's varlen, which is the same kernel): dq in float32, and with fewer kv than query heads
    dk and dv for each query head, which are then summed.
    """
    gather_degree, ulysses_degree = level.cp_shape(args.num_kv_heads)
    width = args.num_heads // ulysses_degree * args.head_dim
    keys = level.max_tokens
    # Where keys are gathered, each of two passes has half of the shard's queries.
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
    """One document that fills the pack; of a head-tail shard the last rank's, whose passes have the most keys."""
    gather_degree = level.cp_shape(args.num_kv_heads)[0]
    if gather_degree == 1:
        return pack_documents([level.max_tokens])
    queries = level.max_tokens // (2 * gather_degree)
    return HeadTailShard(
        *(
            ShardPass(pack_documents([queries], [chunks * queries]), torch.empty(chunks * queries, dtype=torch.int64))
            for chunks in (gather_degree, gather_degree + 1)
        )
    )


class _FusedNorm(torch.autograd.Function):
    """CUDA's RMS norm as its shapes: one kernel, which keeps a float32 per row beside its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


class _ExchangeWithoutRanks(ExpertExchange):
    """Expert parallelism in one process: each of `ranks` sends this one as many rows as every other."""

    def __init__(self, experts: Experts, ranks: int) -> None:
        group: Any = None
        super().__init__(experts, group)
        self.ranks = ranks

    def __call__(self, x_TH: Tensor, weights_TK: Tensor, order_S: Tensor, counts_E: Tensor) -> Tensor:
        rows, rest = divmod(len(order_S), self.ranks)
        self.sent_P = [rows + (rank < rest) for rank in range(self.ranks)]
        return super().__call__(x_TH, weights_TK, order_S, counts_E)

    def count(self, counts_E: Tensor) -> Splits:
        return Splits(counts_E.view(self.ranks, -1), self.sent_P, self.sent_P)

    def exchange(self, x: Tensor, received_P: list[int], sent_P: list[int]) -> Tensor:
        # A collective as its shapes: a new tensor in each direction.
        return torch.empty_like(x)


class _AttentionWithoutRanks(ContextParallelAttention):
    """Context parallelism in one process: its collectives are replaced by their shapes."""

    def __init__(self, inner: nn.Module, state: ContextParallelState, gather_degree: int) -> None:
        super().__init__(inner, state)
        self.gather_degree = gather_degree

    def all_to_all(self, x: Tensor) -> Tensor:
        return torch.empty_like(x)

    def all_gather(self, x: Tensor) -> Tensor:
        return x.new_empty(self.gather_degree * x.shape[0], *x.shape[1:])

    def reduce_scatter(self, x: Tensor) -> Tensor:
        return x.new_empty(x.shape[0] // self.gather_degree, *x.shape[1:])


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one rank. resident: parameters, gradients and optimizer state. saved: kept from forward to backward by
    all layers together. transient: the rest of what is held at the peak."""

    resident_bytes: int
    saved_bytes: int
    transient_bytes: int

    @property
    def peak_bytes(self) -> int:
        """The most held at one time."""
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
    """Memory of an iteration of `level` on each of `world_size` ranks.

    Experts that are spread over ranks are taken to have equal loads; one with twice its share needs as much more for
    the rows that it receives.
    device_type: "cpu" or "cuda", which need not be there. loss_tokens: trained tokens of a rank's shard; all of them
    unless given. One document is taken to fill the pack: the most that attention needs.
    """
    return _Composition(args, level, config, world_size, device_type, loss_tokens).estimate()


def estimate_evaluation(
    args: ModelArgs, level: Level, config: JobConfig, world_size: int, *, device_type: str
) -> MemoryEstimate:
    """The same for a forward without gradients, as validation runs it: nothing is kept for a backward."""
    # What a fully recomputed block does in its forward is what a block does without gradients.
    # It keeps no parameters either (levels/runtime.py).
    level = replace(level, ac_policy="full", ac_layers=None, reshard_after_forward=True)
    return _Composition(args, level, config, world_size, device_type, None).evaluation()


def fewest_layers(peak_all: float, peak_fewer: float, depth_all: int, depth_fewer: int, limit: float) -> int | None:
    """The fewest layers to checkpoint for a peak of at most `limit` bytes (the paper's GreedyProfileCkpt).

    peak_all, peak_fewer: peaks with depth_all and depth_fewer layers checkpointed, measured or estimated;
    depth_all is all layers. Each layer saves (peak_fewer - peak_all) / (depth_all - depth_fewer). None where not even
    all layers suffice.
    """
    if not 0 <= depth_fewer < depth_all:
        raise ValueError(f"depths {depth_all} and {depth_fewer}: the second must be below the first and not below 0")
    if peak_all > limit:
        return None
    saved_per_layer = (peak_fewer - peak_all) / (depth_all - depth_fewer)
    if saved_per_layer <= 0:
        return 0 if peak_fewer <= limit else depth_all
    return max(0, depth_all - math.floor((limit - peak_all) / saved_per_layer))


class _Composition:
    """Sizes of the pieces, and the moments of an iteration made of them."""

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
        self.shards = world_size // config.parallelism.dp_replicate
        spread = config.parallelism.expert_parallel_degree
        self.tied = args.tie_embeddings
        resharded = level.resharded(config.parallelism.reshard_after_forward)
        # What a block leaves after its forward: nothing, all of its parameters, or a share of them.
        self.kept_share = 0.0 if resharded is True else 1.0 if resharded is False else 1 / resharded
        tokens = level.max_tokens // level.cp_degree
        layers = args.num_layers if level.ac_layers is None else min(level.ac_layers, args.num_layers)
        policies = [level.ac_policy] * layers + ["none"] * (args.num_layers - layers)
        self.blocks: list[PieceMemory] = [
            block_memory(args, replace(level, ac_policy=policy), dtype, device_type, spread) for policy in policies
        ]
        loss_tokens = tokens if loss_tokens is None else min(loss_tokens, tokens)
        self.head = head_memory(args, tokens, loss_tokens, config.training.loss_chunk_tokens, dtype, device_type)
        self.hidden = tokens * args.hidden_size * dtype.itemsize
        # cos and sin, float32, of all layers.
        self.rope = 2 * tokens * args.rope_dim * 4
        sizes = _model_sizes(replace(args, rope_scaling=None), config.lora.rank, tuple(config.lora.target_modules))
        reduce_dtype = DTYPES[config.training.mixed_precision_reduce]
        self.block = _gathered_block(sizes, dtype, reduce_dtype, self.shards, spread)
        self.vocab = Gathered.of(sizes.head, dtype, reduce_dtype, self.shards)
        # AdamW: two moments beside a trained parameter and its gradient, in the parameter's dtype.
        trained = 4 * sizes.trained * DTYPES[config.training.dtype].itemsize
        frozen = (sizes.model - sizes.trained) * stored_dtype(config, torch.device(device_type)).itemsize
        self.resident = (trained + frozen) // self.shards

    def estimate(self) -> MemoryEstimate:
        saved = [block.saved + self.hidden for block in self.blocks]
        moments = [self._head_moment(saved), self._embedding_moment()]
        for i in range(len(self.blocks)):
            moments += [self._forward_moment(i, saved), self._backward_moment(i, saved), self._reduce_moment(i, saved)]
        return MemoryEstimate(self.resident, sum(saved), max(moments) - sum(saved))

    def evaluation(self) -> MemoryEstimate:
        nothing = [0] * len(self.blocks)
        moments = [self._head_moment(nothing), *(self._forward_moment(i, nothing) for i in range(len(self.blocks)))]
        return MemoryEstimate(self.resident, 0, max(moments))

    def _held(self, layers_kept: int, saved: list[int]) -> int:
        """Held while a block works: tied weights, cos and sin, what earlier layers saved, parameters not freed."""
        root = self.vocab.parameters if self.tied else 0
        kept = int(layers_kept * self.block.parameters * self.kept_share)
        return root + kept + self.rope + sum(saved)

    def _forward_moment(self, i: int, saved: list[int]) -> int:
        # Beside its parameters, its all-gather's buffer (or the next block's) is still held.
        parameters = self.block.parameters + self.block.all_gather
        return self._held(i, saved[:i]) + parameters + self.hidden + self.blocks[i].forward

    def _head_moment(self, saved: list[int]) -> int:
        parameters = 0 if self.tied else self.vocab.parameters + self.vocab.all_gather
        work = max(self.head.forward, self.head.saved + self.head.backward)
        return self._held(len(saved), saved) + parameters + self.hidden + work

    def _backward_moment(self, i: int, saved: list[int]) -> int:
        last = i + 1 == len(self.blocks)
        # The reduction of the block before, or of the head, holds its input meanwhile; the next parameters come.
        reduction = (0 if self.tied else self.vocab.reduce_input) if last else self.block.reduce_input
        prefetched = self.block.all_gather if i and self.kept_share < 1 else 0
        held = self._held(i, saved[: i + 1]) + self._root_gradient()
        return held + self.block.parameters + reduction + prefetched + self.hidden + self.blocks[i].backward

    def _reduce_moment(self, i: int, saved: list[int]) -> int:
        held = self._held(i, saved[:i]) + self._root_gradient() + self.hidden
        prefetched = self.block.all_gather if i and self.kept_share < 1 else 0
        return held + prefetched + 2 * self.block.parameters + self.block.reduction

    def _embedding_moment(self) -> int:
        """Gradient of the embedding; a tied one is added to that of the head. Then its reduction.

        Only a tied matrix is there whole meanwhile: the gradient of an embedding needs no weights.
        """
        whole = 3 if self.tied else 1
        return self.hidden + self.rope + whole * self.vocab.parameters + self.vocab.reduction

    def _root_gradient(self) -> int:
        # A tied matrix waits for the embedding's share before it is reduced.
        return self.vocab.parameters if self.tied else 0


@dataclass(frozen=True)
class Gathered:
    """Bytes that FSDP2 needs for one group of parameters while it is in use.

    parameters: whole, in the compute dtype (gradients take as much). all_gather: the collective's buffer, from which
    they are copied. reduce_input: whole gradients in the reduction's dtype. reduction: all of the reduce-scatter.
    """

    parameters: int
    all_gather: int
    reduce_input: int
    reduction: int

    @classmethod
    def of(cls, numel: int, dtype: torch.dtype, reduce_dtype: torch.dtype, shards: int) -> Gathered:
        parameters, reduce_input = numel * dtype.itemsize, numel * reduce_dtype.itemsize
        if shards == 1:
            # No collective: the parameters are copied, and the gradients twice more (FSDPParamGroup, foreach_reduce).
            return cls(parameters, 0, reduce_input, 3 * reduce_input)
        return cls(parameters, parameters, reduce_input, reduce_input + reduce_input // shards)

    def __add__(self, other: Gathered) -> Gathered:
        """Of both groups at one time."""
        return Gathered(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class _ModelSizes:
    """Elements of a model's parameters: all, the trained ones, the head's, its largest block's and of those experts."""

    model: int
    trained: int
    head: int
    block: int
    experts: int


@lru_cache(maxsize=64)
def _model_sizes(args: ModelArgs, lora_rank: int, target_modules: tuple[str, ...]) -> _ModelSizes:
    with torch.device("meta"):
        model = build_model(args)
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
    sizes: _ModelSizes, dtype: torch.dtype, reduce_dtype: torch.dtype, shards: int, spread: int
) -> Gathered:
    """A block's parameters; where its experts are spread over ranks they are a group of their own."""
    if spread == 1:
        return Gathered.of(sizes.block, dtype, reduce_dtype, shards)
    rest = Gathered.of(sizes.block - sizes.experts, dtype, reduce_dtype, shards)
    return rest + Gathered.of(sizes.experts // spread, dtype, reduce_dtype, shards // spread)


def num_elements(module: nn.Module) -> int:
    """Elements of all parameters of a module; a shared one counts once."""
    return sum(parameter.numel() for parameter in module.parameters())
