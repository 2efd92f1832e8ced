"""The memory of a level from the model's configuration, and how many layers to checkpoint for it to fit.

Owns the composition of an iteration's peak from its pieces (dry_run.py) and FSDP2's buffers, and the paper's
GreedyProfileCkpt. The peak is the highest of the moments at which one can lie: a block's forward, the head with its
loss, a block's backward, the reduction of its gradients.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass, replace
from functools import lru_cache

import torch
from torch import nn

from hbp_titan.config import JobConfig
from hbp_titan.distributed.parallelize import DTYPES, compute_dtype, stored_dtype
from hbp_titan.models.decoder import ModelArgs
from hbp_titan.models.lora import apply_lora
from hbp_titan.models.moe import Experts
from hbp_titan.models.registry import build_model
from hbp_titan.packing import Level
from hbp_titan.selection.dry_run import PieceMemory, block_memory, head_memory


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
