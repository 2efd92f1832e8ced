"""Memory of a level from the model's configuration, and how many layers to checkpoint so that it fits.

Owns the composition of a micro-batch's peak from the memory of its pieces (pieces.py), FSDP2's buffers and the copies
of activations to and from host memory.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from dataclasses import astuple, dataclass, replace
from functools import lru_cache

import torch
from torch import nn

from hbp_titan.components.checkpoint import local_part
from hbp_titan.components.optimizer import build_optimizer
from hbp_titan.config import JobConfig
from hbp_titan.distributed.float8 import block_linears, selected_names
from hbp_titan.distributed.parallelize import DTYPES, compute_dtype, stored_dtype
from hbp_titan.job_config import Float8, Optimizer
from hbp_titan.models.configs import ModelArgs
from hbp_titan.models.decoder import Decoder
from hbp_titan.models.lora import apply_lora
from hbp_titan.models.moe import Experts
from hbp_titan.packing import Level
from hbp_titan.tuning.pieces import Adapters, HeadRun, PieceMemory, block_memory, head_memory


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes per rank, on its device unless stated otherwise.

    resident: parameters, gradients and optimizer state. saved: kept by all layers from forward to backward. transient:
    the rest of what is held at the peak. host: in host memory, which with parallelism.cpu_offload has what is resident
    otherwise, and host_activation of them for what levels with an offload policy keep.
    """

    resident_bytes: int
    saved_bytes: int
    transient_bytes: int
    host_bytes: int = 0
    host_activation_bytes: int = 0

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
    all of them. Raises ValueError for a model that transformers builds.
    """
    if args.hf_config is not None:
        raise ValueError('the memory of models with model.backend = "transformers" is not estimated')
    return _Composition(args, level, config, world_size, device_type, loss_tokens).estimate()


def estimate_evaluation(
    args: ModelArgs, level: Level, config: JobConfig, world_size: int, *, device_type: str
) -> MemoryEstimate:
    """Return the memory of a forward without gradients, as in validation."""
    # Without gradients a block does what a fully recomputed block does in its forward, and parameters are always freed
    # after it (LevelRuntime.activate).
    level = replace(with_policy(level, "full"), reshard_after_forward=True)
    return _Composition(args, level, config, world_size, device_type, None).evaluation()


def with_policy(level: Level, ac_policy: str, ac_layers: int | None = None) -> Level:
    """Return `level` with another policy, on the first ac_layers layers and with all of them offloaded, if any."""
    return replace(level, ac_policy=ac_policy, ac_layers=ac_layers, offload_layers=None)


def layer_policies(level: Level, num_layers: int) -> list[str]:
    """Return each layer's ac_policy; without host memory, that of the policy that keeps the same on the device."""
    layers = num_layers if level.ac_layers is None else min(level.ac_layers, num_layers)
    offloaded = layers if level.offload_layers is None else min(level.offload_layers, layers)
    on_device = {"offload": "full", "offload_attention": "keep_attention"}.get(level.ac_policy, level.ac_policy)
    return [level.ac_policy] * offloaded + [on_device] * (layers - offloaded) + ["none"] * (num_layers - layers)


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
        lora: Adapters = (config.lora.rank, tuple(config.lora.target_modules))
        policies = layer_policies(level, args.num_layers)
        of_policy = {
            policy: block_memory(args, with_policy(level, policy), dtype, device_type, expert_parallel, lora)
            for policy in set(policies)
        }
        self.blocks: list[PieceMemory] = [of_policy[policy] for policy in policies]
        # Number of first blocks that keep their activations in host memory.
        self.offloaded = sum(block.host > 0 for block in self.blocks)
        loss_tokens = tokens if loss_tokens is None else min(loss_tokens, tokens)
        chunk_tokens = config.training.loss_chunk_tokens
        head = HeadRun(tokens, loss_tokens, chunk_tokens, dtype, device_type, frozen=lora[0] > 0)
        self.head = head_memory(args, head)
        self.hidden = tokens * args.hidden_size * dtype.itemsize
        # cos and sin in float32, shared by all layers.
        self.rope = 2 * tokens * args.rope_dim * 4
        unscaled = replace(args, rope_scaling=None)
        sizes = _model_sizes(unscaled, lora)
        reduce_dtype = DTYPES[config.training.mixed_precision_reduce]
        self.block = _gathered_block(sizes, dtype, reduce_dtype, shards, expert_parallel)
        # Float8Linear keeps the same tensors for backward as a plain layer.
        self.casts = 0
        if config.float8.recipe:
            float8 = _float8_sizes(unscaled, config.float8)
            self.block = self.block.in_float8(float8.gathered, dtype)
            self.casts = float8.cast_bytes(level.mlp_chunk_tokens or tokens) if level.float8 is not False else 0
        self.vocab = Gathered.of(sizes.head, dtype, reduce_dtype, shards)
        dtypes = (config.training.dtype, config.training.gradient_dtype)
        optimizer = (config.optimizer.name, config.optimizer.state_dtype)
        trained = _trained_bytes(unscaled, lora, dtypes, optimizer)
        frozen = sizes.model.frozen * stored_dtype(config, torch.device(device_type)).itemsize
        self.resident, self.host = (trained + frozen) // shards, 0
        if config.parallelism.cpu_offload:
            self.resident, self.host = 0, self.resident
            if device_type == "cuda":
                stored = (dtypes[0], stored_dtype(config, torch.device(device_type)))
                self.host += _pinned_rounding(unscaled, lora, stored, dtypes[1], shards, pinned_max_round())
            if config.parallelism.dp_replicate > 1:
                # Each copy's sum over the micro-batches of a step stays on the device until the copies are summed.
                self.resident = sizes.model.trained * reduce_dtype.itemsize // shards

    def estimate(self) -> MemoryEstimate:
        # The input of a block is on the device, or in host memory with the rest of what it keeps.
        saved = [block.saved + (0 if block.host else self.hidden) for block in self.blocks]
        moments = [self._head_moment(saved), self._embedding_moment()]
        for i in range(len(self.blocks)):
            moments += [self._forward_moment(i, saved), self._backward_moment(i, saved), self._reduce_moment(i, saved)]
        activations = sum(block.host for block in self.blocks)
        transient = max(moments) - sum(saved)
        return MemoryEstimate(self.resident, sum(saved), transient, self.host + activations, activations)

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
        work = self.hidden + self.blocks[i].forward + self.casts
        return self._held(i, saved[:i]) + parameters + work + self._copied(i)

    def _copied(self, i: int) -> int:
        """Return the bytes that an earlier block holds while block i runs, until their copy to the host has ended."""
        before = min(i, self.offloaded)
        return self.blocks[before - 1].offloaded if before else 0

    def _fetched(self, i: int) -> int:
        """Return the bytes of earlier blocks on the device after block i's backward has begun."""
        if i >= self.offloaded:
            return self._copied(i)
        # Those of the next block in backward order are copied back at the same time.
        return self.blocks[i - 1].offloaded if i else 0

    def _head_moment(self, saved: list[int]) -> int:
        parameters = 0 if self.tied else self.vocab.parameters + self.vocab.all_gather
        work = max(self.head.forward, self.head.saved + self.head.backward)
        return self._held(len(saved), saved) + parameters + self.hidden + work + self._copied(len(saved))

    def _backward_moment(self, i: int, saved: list[int]) -> int:
        last = i + 1 == len(self.blocks)
        # At the same time the reduction of the following block, or of the head, holds its input, and the parameters of
        # the next block in backward order are gathered.
        reduction = (0 if self.tied else self.vocab.reduce_input) if last else self.block.reduce_input
        prefetched = self.block.all_gather if i and self.kept_share < 1 else 0
        held = self._held(i, saved[: i + 1]) + self._root_gradient() + self._fetched(i)
        work = self.hidden + self.blocks[i].backward + self.casts
        return held + self.block.parameters + reduction + prefetched + work

    def _reduce_moment(self, i: int, saved: list[int]) -> int:
        held = self._held(i, saved[:i]) + self._root_gradient() + self.hidden + self._fetched(i)
        prefetched = self.block.all_gather if i and self.kept_share < 1 else 0
        return held + prefetched + self.block.parameters + self.block.gradients + self.block.reduction

    def _embedding_moment(self) -> int:
        """Return the bytes during the gradient of the embedding and its reduction."""
        # The gradient of an embedding needs no weights, so only a tied matrix is gathered, and its gradient is added to
        # the head's.
        tied = self.vocab.parameters + self.vocab.gradients if self.tied else 0
        return self.hidden + self.rope + tied + self.vocab.gradients + self.vocab.reduction

    def _root_gradient(self) -> int:
        # The gradient of a tied matrix is not reduced before the embedding's share is added.
        return self.vocab.gradients if self.tied else 0


@dataclass(frozen=True)
class Gathered:
    """Bytes that FSDP2 needs for one group of parameters while it is in use.

    parameters, gradients: unsharded, in the compute dtype. all_gather: the buffer that parameters are copied from.
    reduce_input: unsharded gradients in the reduction's dtype. reduction: the whole reduce-scatter.
    """

    parameters: int
    gradients: int
    all_gather: int
    reduce_input: int
    reduction: int

    @classmethod
    def of(cls, count: Count, dtype: torch.dtype, reduce_dtype: torch.dtype, shards: int) -> Gathered:
        parameters, gradients = count.total * dtype.itemsize, count.trained * dtype.itemsize
        reduce_input = count.trained * reduce_dtype.itemsize
        if shards == 1:
            # There is no collective, but the gradients are copied twice (FSDPParamGroup, foreach_reduce).
            return cls(parameters, gradients, 0, reduce_input, 3 * reduce_input)
        return cls(parameters, gradients, parameters, reduce_input, reduce_input + reduce_input // shards)

    def in_float8(self, count: int, dtype: torch.dtype) -> Gathered:
        """Return the bytes if `count` of the parameters, in `dtype`, are gathered with one byte each."""
        saved = count * (dtype.itemsize - 1)
        return replace(self, parameters=self.parameters - saved, all_gather=max(self.all_gather - saved, 0))

    def __add__(self, other: Gathered) -> Gathered:
        """Return the bytes of both groups at the same time."""
        return Gathered(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class Count:
    """Elements of parameters, and how many of them are trained."""

    total: int
    trained: int

    @property
    def frozen(self) -> int:
        return self.total - self.trained

    @classmethod
    def of(cls, *modules: nn.Module) -> Count:
        """Count the parameters of modules; a shared one counts once."""
        parameters = {id(parameter): parameter for module in modules for parameter in module.parameters()}.values()
        return cls(sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad))

    def __sub__(self, other: Count) -> Count:
        return Count(self.total - other.total, self.trained - other.trained)

    def __floordiv__(self, ranks: int) -> Count:
        return Count(self.total // ranks, self.trained // ranks)


@dataclass(frozen=True)
class _ModelSizes:
    """Parameters of the model, of the head, of the largest block, and of that block's experts."""

    model: Count
    head: Count
    block: Count
    experts: Count


@dataclass(frozen=True)
class _Float8Sizes:
    """Converted layers of the block with most of them.

    gathered: parameters that FSDP2 gathers in float8. inputs, outputs: widths of the largest layer.
    """

    gathered: int
    inputs: int
    outputs: int

    def cast_bytes(self, tokens: int) -> int:
        """Return the bytes of float8 copies at one time: of a layer's input, weight and gradient, in one layout."""
        return tokens * (self.inputs + self.outputs) + self.inputs * self.outputs


def _float8_sizes(args: ModelArgs, config: Float8) -> _Float8Sizes:
    return _cached_float8_sizes(args, config.recipe, config.fsdp_all_gather, tuple(config.filter_fqns))


@lru_cache(maxsize=64)
def _cached_float8_sizes(args: ModelArgs, recipe: str, gathers: bool, filter_fqns: tuple[str, ...]) -> _Float8Sizes:
    model = _meta_model(args, (0, ()))
    linears = block_linears(model)
    chosen = selected_names(model, Float8(recipe, gathers, list(filter_fqns)))
    sums: Counter[str] = Counter()
    for name in chosen:
        sums[".".join(name.split(".")[:2])] += linears[name].weight.numel()
    largest = max((linears[name] for name in chosen), key=lambda linear: linear.weight.numel())
    return _Float8Sizes(max(sums.values()) if gathers else 0, largest.in_features, largest.out_features)


@lru_cache(maxsize=64)
def _model_sizes(args: ModelArgs, adapters: Adapters) -> _ModelSizes:
    model = _meta_model(args, adapters)
    block = max(model.layers, key=lambda block: Count.of(block).total)
    experts = [module for module in block.modules() if isinstance(module, Experts)]
    return _ModelSizes(Count.of(model), Count.of(model.head), Count.of(block), Count.of(*experts))


def adapter_params(args: ModelArgs, config: JobConfig) -> int:
    """Return the number of LoRA's parameters, 0 without it."""
    adapters: Adapters = (config.lora.rank, tuple(config.lora.target_modules))
    return _model_sizes(replace(args, rope_scaling=None), adapters).model.trained if adapters[0] else 0


def _meta_model(args: ModelArgs, adapters: Adapters) -> Decoder:
    with torch.device("meta"):
        model = Decoder(args)
        if adapters[0]:
            apply_lora(model, adapters[0], 1.0, adapters[1])
    return model


@lru_cache(maxsize=64)
def _trained_bytes(args: ModelArgs, adapters: Adapters, dtypes: tuple[str, str], optimizer: tuple[str, str]) -> int:
    """Return the bytes of trained parameters, their gradients and the optimizer's state.

    dtypes: training.dtype and gradient_dtype. optimizer: optimizer.name and state_dtype.
    """
    dtype = DTYPES[dtypes[0]]
    gradient_dtype = DTYPES.get(dtypes[1], dtype)
    model = _meta_model(args, adapters).to(dtype)
    for parameter in model.parameters():
        parameter.grad_dtype = gradient_dtype
    bytes_each = dtype.itemsize + gradient_dtype.itemsize
    return Count.of(model).trained * bytes_each + optimizer_bytes(model, Optimizer(*optimizer))


@lru_cache(maxsize=64)
def _pinned_rounding(
    args: ModelArgs,
    adapters: Adapters,
    dtypes: tuple[str, torch.dtype],
    gradient_dtype: str,
    shards: int,
    largest: float,
) -> int:
    """Return the bytes that pinned memory takes in addition to the shards of parameters and gradients.

    dtypes: of trained and of frozen parameters. largest: of `pinned_max_round`, so that a change of it is noticed.
    """
    trained, total = DTYPES[dtypes[0]], 0
    for parameter in _meta_model(args, adapters).parameters():
        own = -(-parameter.numel() // shards)
        kinds = [trained, DTYPES.get(gradient_dtype, trained)] if parameter.requires_grad else [dtypes[1]]
        total += sum(pinned_bytes(own * dtype.itemsize, largest) - own * dtype.itemsize for dtype in kinds)
    return total


def pinned_bytes(nbytes: int, largest: float) -> int:
    """Return the bytes that torch takes for a pinned tensor: the next power of two, above `largest` its own size.

    As at::CachingHostAllocator of torch 2.11 to 2.13, which has all blocks of FSDP2's parameters and gradients.
    """
    return 1 << (nbytes - 1).bit_length() if 0 < nbytes <= largest else nbytes


def pinned_max_round() -> float:
    """Return the largest tensor, in bytes, whose pinned memory is rounded up.

    All of them by default; torch 2.13 has a setting, which older versions refuse.
    """
    settings = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
    found = re.search(r"pinned_max_round_threshold_mb:(\d+)", settings)
    return int(found[1]) * 2**20 if found else math.inf


def optimizer_bytes(model: nn.Module, config: Optimizer) -> int:
    """Return the bytes of this rank's optimizer state, without step counts. model: on the meta device, also sharded."""
    states = build_optimizer(model, config).state.values()
    return sum(local_part(value).nbytes for state in states for key, value in state.items() if key != "step")


def _gathered_block(
    sizes: _ModelSizes, dtype: torch.dtype, reduce_dtype: torch.dtype, shards: int, expert_parallel: int
) -> Gathered:
    """Return the buffers of a block; with expert parallelism its experts are a separate group."""
    if expert_parallel == 1:
        return Gathered.of(sizes.block, dtype, reduce_dtype, shards)
    rest = Gathered.of(sizes.block - sizes.experts, dtype, reduce_dtype, shards)
    return rest + Gathered.of(sizes.experts // expert_parallel, dtype, reduce_dtype, shards // expert_parallel)
