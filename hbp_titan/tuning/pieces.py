"""Memory of one decoder block and of the head, counted by running the real code on meta tensors.

Owns the count of live bytes on the device and in host memory, and what replaces ranks, kernels and copies to the host
in that run. So any policy, cp style or new model is covered without a formula, at any length, without a GPU.

Not simulated: collectives are only their shapes; with expert parallelism all ranks have equal loads; attention is the
CPU operator, which like the flash kernels keeps q, k, v, its output and a float32 logsumexp per query and head, plus
`_attention_workspaces` for what a kernel allocates inside. Compiled blocks keep less than estimated: the compiler fuses
and recomputes.

Shape suffixes: S tokens of a rank's shard, H hidden size, D head width.
"""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hbp_titan.components.loss import linear_cross_entropy, select_rows
from hbp_titan.distributed import chunks
from hbp_titan.distributed.activation_checkpoint import ActivationCheckpointState, BlockForward
from hbp_titan.distributed.context_parallel import ContextParallelAttention, ContextParallelState
from hbp_titan.distributed.expert_parallel import ExpertExchange, Splits
from hbp_titan.distributed.offload import HostActivations
from hbp_titan.models.configs import ModelArgs
from hbp_titan.models.decoder import Decoder, DecoderBlock, Head
from hbp_titan.models.documents import Documents, HeadTailShard, ShardPass, pack_documents
from hbp_titan.models.lora import apply_lora
from hbp_titan.models.moe import Experts, MixtureOfExperts
from hbp_titan.packing import Level

Piece = TypeVar("Piece", bound=nn.Module)
Adapters = tuple[int, tuple[str, ...]]
"""lora.rank and lora.target_modules; rank 0: every parameter is trained."""

_ATTENTION_FORWARD = torch.ops.hbp_titan.varlen_attention_cpu.default
_ATTENTION_BACKWARD = torch.ops.hbp_titan.varlen_attention_cpu_backward.default


@dataclass(frozen=True)
class PieceMemory:
    """Bytes of a block or of the head, in addition to its input and parameters.

    forward: peak during forward. saved: held from forward to backward, without the output. backward: peak during
    backward above what is held when it begins (including the output's gradient), with the gradients of the parameters.
    output: of the output alone.
    offloaded: on the device, of what the block keeps in host memory, its input included; part of `backward` and,
    without the input, of `forward`. host: of the buffers that hold it there.
    """

    forward: int
    saved: int
    backward: int
    output: int
    offloaded: int = 0
    host: int = 0


class AllocationTracker(TorchDispatchMode):
    """Counter of the live bytes that operators allocate on the device while it is active.

    workspaces: bytes that an operator allocates internally.
    """

    def __init__(self, workspaces: dict[Any, int] | None = None) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.workspaces = workspaces or {}
        self._sizes: dict[int, int] = {}
        self._ignoring = False

    def ignore(self, tensors: list[Tensor]) -> None:
        """Do not count the storages of `tensors`."""
        self._sizes |= {tensor.untyped_storage()._cdata: 0 for tensor in tensors}

    @contextmanager
    def ignoring(self) -> Iterator[None]:
        """Do not count what is allocated in this context."""
        self._ignoring = True
        yield
        self._ignoring = False

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
        self._sizes[key] = 0 if self._ignoring else storage.nbytes()
        self.live += self._sizes[key]
        weakref.finalize(storage, self._release, key)

    def _release(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


def block_memory(
    args: ModelArgs,
    level: Level,
    dtype: torch.dtype,
    device_type: str,
    expert_parallel: int = 1,
    adapters: Adapters = (0, ()),
) -> PieceMemory:
    """Return the memory of one decoder block on a rank's share of a pack of `level`, under its checkpoint policy.

    dtype: of parameters and hidden states. device_type: "cpu" or "cuda", which need not exist here. expert_parallel:
    ranks that share the experts of a layer.
    """
    # Fields that only select layers are cleared, so that all layers with the same plan share a cache entry.
    level = replace(level, ac_layers=None, offload_layers=None, reshard_after_forward=None, float8=None)
    return _block_memory(_shape(args), level, dtype, device_type, expert_parallel, adapters)


@lru_cache(maxsize=1024)
def _block_memory(
    args: ModelArgs, level: Level, dtype: torch.dtype, device_type: str, expert_parallel: int, adapters: Adapters
) -> PieceMemory:
    gather_degree = level.cp_shape(args.num_kv_heads)[0]
    tracker = AllocationTracker(_attention_workspaces(args, level, dtype, device_type))
    with torch.device("meta"):
        block = _make(lambda: _block(args, expert_parallel, adapters), dtype, device_type)
        block.inner_attention = _AttentionWithoutRanks(block.inner_attention, _cp_state(args, level), gather_degree)
        host = _HostWithoutDevice(tracker, pinned=device_type == "cuda") if level.offloads else None
        state = ActivationCheckpointState(host=host)
        state.set_level(level, 1)
        forward = BlockForward(block, 0, state)
        size = level.max_tokens // level.cp_degree
        x_SH = torch.empty(size, args.hidden_size, dtype=dtype, requires_grad=True)
        rope_SD = [torch.empty(size, args.rope_dim) for _ in range(2)]
        documents = _documents(level, args)
        with _few_chunks():
            return _measure(block, forward, (x_SH, *rope_SD, documents), tracker, host)


@dataclass(frozen=True)
class HeadRun:
    """How the head runs: over `tokens` hidden states, `loss_tokens` of them trained, `chunk_tokens` logits at a time.

    dtype, device_type: as of block_memory. frozen: whether its weights have no gradients.
    """

    tokens: int
    loss_tokens: int
    chunk_tokens: int
    dtype: torch.dtype
    device_type: str
    frozen: bool = False


def head_memory(args: ModelArgs, run: HeadRun) -> PieceMemory:
    """Return the memory of the final norm and the loss."""
    shape = _shape(args)
    # Beyond a few chunks every size is linear in their number, so long losses are extrapolated.
    few, more = 4 * run.chunk_tokens, 8 * run.chunk_tokens
    if run.loss_tokens <= more:
        return _head_memory(shape, run)
    lows, highs = (astuple(_head_memory(shape, replace(run, loss_tokens=count))) for count in (few, more))
    sizes = zip(lows, highs, strict=True)
    return PieceMemory(*(low + (high - low) * (run.loss_tokens - few) // (more - few) for low, high in sizes))


@lru_cache(maxsize=1024)
def _head_memory(args: ModelArgs, run: HeadRun) -> PieceMemory:
    with torch.device("meta"):
        head = _make(lambda: Head(args).requires_grad_(not run.frozen), run.dtype, run.device_type)
        index = torch.empty(run.loss_tokens, dtype=torch.int64)
        weights = torch.empty(run.loss_tokens)

        def loss(hidden_SH: Tensor, weight_VH: Tensor) -> Tensor:
            trained_SH = select_rows(hidden_SH, index)
            return linear_cross_entropy(trained_SH, weight_VH, index, weights, run.chunk_tokens)[0]

        x_SH = torch.empty(run.tokens, args.hidden_size, dtype=run.dtype, requires_grad=True)
        return _measure(head, head, (x_SH, loss), AllocationTracker())


def _shape(args: ModelArgs) -> ModelArgs:
    """Return `args` without fields that do not affect one piece, so that models of any depth share a cache entry."""
    # In a model with experts every layer is taken to have them; few do not. A window saves work, not activations.
    moe = args.moe and replace(args.moe, first_k_dense_replace=0)
    return replace(
        args,
        name="",
        num_layers=1,
        rope_scaling=None,
        tie_embeddings=False,
        moe=moe,
        layer_types=(),
        sliding_window=None,
        nope_layers=(),
    )


def _block(args: ModelArgs, expert_parallel: int, adapters: Adapters) -> DecoderBlock:
    """Return a block with the experts of one of `expert_parallel` ranks, and an exchange without the other ranks."""
    model = Decoder(args)
    rank, target_modules = adapters
    if rank:
        apply_lora(model, rank, 1.0, target_modules)
    block = next(model.blocks())
    if expert_parallel > 1:
        assert args.moe is not None
        assert isinstance(block.mlp, MixtureOfExperts)
        own = args.moe.n_routed_experts // expert_parallel
        trained = next(block.mlp.experts.parameters()).requires_grad
        block.mlp.experts = Experts(args.hidden_size, args.moe.moe_intermediate_size, own).requires_grad_(trained)
        _ExchangeWithoutRanks(block.mlp.experts, expert_parallel).attach(block)
    return block


def _make(piece: Callable[[], Piece], dtype: torch.dtype, device_type: str) -> Piece:
    """Return a piece of the model on the current device with the norm that `device_type` would run."""
    module = piece().to(dtype)
    for part in list(module.modules()):
        if device_type == "cuda" and isinstance(part, nn.RMSNorm):
            # On a GPU the norm is one fused kernel. On the CPU it is several operators, which keep more.
            part.forward = lambda x, norm=part: _FusedNorm.apply(x, norm.weight)  # type: ignore[method-assign, misc]
    return module


def _measure(
    module: nn.Module,
    forward: Any,
    inputs: tuple[Any, ...],
    tracker: AllocationTracker,
    host: _HostWithoutDevice | None = None,
) -> PieceMemory:
    tracker.ignore([*module.parameters(), *(leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor))])
    with tracker:
        output = forward(*inputs)
        forward_peak = tracker.peak
        if host is not None:
            host.end_copies()
        output_bytes = output.untyped_storage().nbytes()
        saved = tracker.live - output_bytes
        grad = torch.empty_like(output)
        # In a run nothing holds the output of a block after the next block has run, so only its graph is kept here.
        graph = torch.autograd.graph.get_gradient_edge(output)
        del output
        tracker.peak = start = tracker.live
        torch.autograd.backward([graph], [grad])
        backward_peak = tracker.peak - start
    offloaded, on_host = (0, 0) if host is None else (host.buffer_bytes, host.allocated_bytes)
    return PieceMemory(forward_peak, saved, max(backward_peak, 0), output_bytes, offloaded, on_host)


def _attention_workspaces(args: ModelArgs, level: Level, dtype: torch.dtype, device_type: str) -> dict[Any, int]:
    """Return the bytes that the attention kernels allocate internally, for one document that fills the pack.

    CPU (models/attention_cpu.py): a document's output, and its dq, dk and dv with keys repeated per query head. CUDA
    (flash-attn, and torch's varlen attention, which is the same kernel): dq in float32, and with fewer kv than query
    heads dk and dv per query head, which are then summed.
    """
    gather_degree, ulysses_degree = level.cp_shape(args.num_kv_heads)
    heads = args.num_heads // level.attention_head_groups // ulysses_degree
    kv_heads = max(1, args.num_kv_heads // level.attention_head_groups // ulysses_degree)
    width = heads * args.head_dim
    keys = level.max_tokens
    # With gathered keys, each of two passes has half of the shard's queries.
    queries = keys if gather_degree == 1 else -(-keys // (2 * gather_degree))
    if device_type == "cuda":
        repeated = 2 * keys * width * dtype.itemsize if heads > kv_heads else 0
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
    """Return one document that fills the pack; with gathered keys the last rank's shard, which has the most keys."""
    gather_degree = level.cp_shape(args.num_kv_heads)[0]
    if gather_degree == 1:
        return pack_documents([level.max_tokens])
    # As in `head_tail_shard`; the tokens of a shard may be odd.
    heads = -(-level.max_tokens // (2 * gather_degree))
    tails = level.max_tokens // gather_degree - heads

    def chunk(own: int, keys: int) -> ShardPass:
        return ShardPass(pack_documents([own], [keys]), torch.empty(keys, dtype=torch.int64))

    return HeadTailShard(chunk(heads, gather_degree * heads), chunk(tails, gather_degree * heads + tails))


@contextmanager
def _few_chunks() -> Iterator[None]:
    """Run only the first three chunks of a region: the others allocate and free the same sizes."""
    every = chunks.chunk_slices
    chunks.chunk_slices = lambda tokens, chunk_tokens: every(tokens, chunk_tokens)[:3]
    try:
        yield
    finally:
        chunks.chunk_slices = every


class _HostWithoutDevice(HostActivations):
    """Activations in host memory, not counted by `tracker`; what is copied stays on the device until `end_copies`."""

    def __init__(self, tracker: AllocationTracker, pinned: bool) -> None:
        super().__init__(torch.device("meta"))
        self.tracker, self.pinned = tracker, pinned

    @property
    def allocated_bytes(self) -> int:
        """Bytes of host memory that the allocator takes for the buffers."""
        sizes = [buffer.nbytes for buffer in self._buffers.values()]
        # Pinned buffers have whole pages (offload.host_memory).
        return sum(-(-size // mmap.PAGESIZE) * mmap.PAGESIZE for size in sizes) if self.pinned else sum(sizes)

    def end_copies(self) -> None:
        for block in self._blocks:
            self._free_sources(block)

    def _allocate(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device="meta")

    def _buffer(self, key: tuple[int, int], tensor: Tensor) -> Tensor:
        with self.tracker.ignoring():
            return super()._buffer(key, tensor)


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
        self.sent_P: list[int] = []

    def __call__(
        self, x_TH: Tensor, weights_TK: Tensor, order_S: Tensor, counts_E: Tensor, chunk: Splits | None = None
    ) -> Tensor:
        # Loads are taken to be equal. A rank that receives twice as many rows needs twice the memory for them.
        rows, rest = divmod(len(order_S), self.ranks)
        self.sent_P = [rows + (rank < rest) for rank in range(self.ranks)]
        if chunk is not None:
            (chunk,) = self.count(counts_E[None])
        return super().__call__(x_TH, weights_TK, order_S, counts_E, chunk)

    def count(self, counts_CE: Tensor) -> list[Splits]:
        return [Splits(counts_E.view(self.ranks, -1), self.sent_P, self.sent_P) for counts_E in counts_CE]

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
