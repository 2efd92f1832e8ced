"""The engine: the parallelized model, the level switch, and the forward and backward of one micro-batch.

This is the idea of the project. Parameters are sharded once, by FSDP2 over all ranks. A level (max_tokens, cp_degree,
activation checkpointing, resharding) is a view of the same ranks: switching to it assigns a few attributes that the
wrapped blocks read. No process group is made, nothing is rebuilt or recompiled (paper section 3.3).

The trainer, the equivalence proof and the benchmarks run this code; the dry run runs its first half.

Shape suffixes: T tokens of this rank's shard, H hidden size, V vocabulary, L trained tokens, S samples of the pack.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from hbp_titan.components.loss import linear_cross_entropy, linear_cross_entropy_losses, select_rows
from hbp_titan.components.oom import TRAINING, VALIDATION, out_of_memory_in
from hbp_titan.components.weights import initialize
from hbp_titan.config import JobConfig
from hbp_titan.data.batch import PackedBatch
from hbp_titan.data.loader import PlanDataset
from hbp_titan.distributed.activation_checkpoint import ActivationCheckpointState
from hbp_titan.distributed.context_parallel import ContextParallelState
from hbp_titan.distributed.fsdp import MicroBatchOverlap, ReshardState, has_separate_reductions, reshard
from hbp_titan.distributed.mesh import LevelMeshes
from hbp_titan.distributed.parallelize import (
    DTYPES,
    compute_dtype,
    parallelize,
    stored_dtype,
)
from hbp_titan.distributed.world import World, all_reduce_values
from hbp_titan.models.attention import choose_backend
from hbp_titan.models.configs import ModelArgs
from hbp_titan.models.decoder import Decoder, build_decoder
from hbp_titan.packing.level import Level, level_name


class LevelRuntime:
    """The active level: the states that the wrapped model reads, and the mesh of each level.

    reshard_after_forward: the run's setting, for levels without their own.
    """

    def __init__(
        self,
        levels: Sequence[Level],
        meshes: LevelMeshes,
        num_layers: int,
        num_kv_heads: int,
        reshard_after_forward: bool | int = True,
    ) -> None:
        self.levels = tuple(levels)
        self.meshes = [meshes.mesh_for(level.cp_shape(num_kv_heads)) for level in levels]
        self.num_layers = num_layers
        self.cp_state = ContextParallelState()
        self.ac_state = ActivationCheckpointState()
        self.reshard_default = reshard_after_forward
        self.reshard_state = ReshardState({level.reshard_setting(reshard_after_forward) for level in levels})
        self.float8_state: Any = None  # Float8State with float8.recipe
        self.active: int | None = None

    def activate(self, index: int) -> None:
        """Switch to level `index` for the next forward and backward."""
        level = self.levels[index]
        self.cp_state.set_mesh(self.meshes[index])
        self.ac_state.set_level(level, self.num_layers)
        # Without a backward nothing frees what a forward keeps, and the next level may need that memory.
        self.reshard_state.set_value(level.reshard_setting(self.reshard_default) if torch.is_grad_enabled() else True)
        if self.float8_state:
            self.float8_state.active = level.float8 is not False
        self.active = index


def level_meshes(
    config: JobConfig, args: ModelArgs, world: World, mesh_device: torch.device, levels: Sequence[Level]
) -> LevelMeshes:
    """Return the meshes of `levels` and of the parameters, with their process groups made and connected."""
    # Levels of the same shape share a mesh and its communicators.
    cp_shapes = [level.cp_shape(args.num_kv_heads) for level in levels]
    copies, experts = config.parallelism.dp_replicate, config.parallelism.expert_parallel_degree
    return LevelMeshes(mesh_device, world.size, cp_shapes, copies, experts)


def parallelized_on_meta(
    config: JobConfig, args: ModelArgs, world: World, mesh_device: torch.device
) -> tuple[Decoder, LevelRuntime]:
    """Return the parallelized model on the meta device (no storage yet) and its level runtime.

    mesh_device: device of the process groups: world.device, or the CPU for a fake world of GPUs that are not here.
    """
    meshes = level_meshes(config, args, world, mesh_device, config.levels)
    reshard_after_forward = config.parallelism.reshard_after_forward
    runtime = LevelRuntime(config.levels, meshes, args.num_layers, args.num_kv_heads, reshard_after_forward)
    # On meta: FSDP shards the shapes first, then each rank allocates its own shard only.
    with torch.device("meta"):
        model = build_decoder(args).to(stored_dtype(config, world.device))
        if config.lora.rank:
            from hbp_titan.models.lora import apply_lora

            lora = config.lora
            apply_lora(model, lora.rank, lora.alpha, lora.target_modules, DTYPES[config.training.dtype])
        if config.float8.recipe:
            from hbp_titan.distributed.float8 import apply_float8

            runtime.float8_state = apply_float8(model, config.float8, config.compile)
    parallelize(model, config, world.device, meshes, runtime.cp_state, runtime.ac_state, runtime.reshard_state)
    return model, runtime


class Engine:
    """The sharded model and one micro-batch on it, at the level that the batch names."""

    overlap: MicroBatchOverlap | None = None
    """Of the micro-batches of an optimizer step, where reductions have a communicator of their own."""
    copies: torch.cuda.Stream | None = None
    """On a GPU: copies a batch while the micro-batch before it is computed."""

    def __init__(self, config: JobConfig, args: ModelArgs, world: World, read_weights: bool = True) -> None:
        """read_weights: false leaves the weights uninitialized, for a caller that loads a checkpoint."""
        self.device = world.device
        if world.device.type == "cuda":
            self.copies = torch.cuda.Stream(world.device)
        self.replicated = config.parallelism.dp_replicate > 1
        dtype = compute_dtype(config, world.device)
        choose_backend(config.model.attention_backend, world.device, args.head_dim, dtype)
        self.chunk_tokens = config.training.loss_chunk_tokens
        self.backend = config.compile.backend if config.compile.enable else ""
        self.model, self.runtime = parallelized_on_meta(config, args, world, world.device)
        if has_separate_reductions(config.parallelism, world.device) and not config.parallelism.cpu_offload:
            self.overlap = MicroBatchOverlap(self.model)
        # Storage and weights come shard by shard, so that no rank ever holds the whole model.
        storage = torch.device("cpu") if config.parallelism.cpu_offload else world.device
        if read_weights:
            initialize(self.model, args, storage, config.training.seed, config.weights_path)
        else:
            self.model.to_empty(device=storage)
        if config.training.gradient_dtype != "auto":
            from hbp_titan.components.sharded_optimizers import set_gradient_dtype

            set_gradient_dtype(self.model, DTYPES[config.training.gradient_dtype])

    @property
    def level_names(self) -> list[str]:
        """Name of each level: 8K/cp2."""
        return [level_name(level) for level in self.runtime.levels]

    def forward_backward(self, batch: PackedBatch, last: bool = True) -> Tensor:
        """Run one micro-batch and accumulate its gradients.

        last: whether it is the last of its optimizer step. Copies of the parameters (dp_replicate) all-reduce their
        gradients only then; until then `grad` holds the sum within this copy.
        Returns the sum of this rank's token losses of each of `batch.sample_ids`, float64 [S] on its device.
        Raises OutOfMemory.
        """
        overlap = self.overlap.micro_batch(last) if self.overlap else nullcontext()
        with out_of_memory_in(TRAINING, self.runtime.levels[batch.level]), overlap:
            objective, losses_S = self.forward(batch)
            if self.replicated:
                cast(FSDPModule, self.model).set_requires_all_reduce(last)
            objective.backward()
        return losses_S

    def forward(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """Return this rank's weighted loss, to differentiate, and the plain loss sum of each sample."""
        return self._run(batch, partial(linear_cross_entropy, chunk_tokens=self.chunk_tokens, backend=self.backend))

    def evaluate(self, batch: PackedBatch) -> Tensor:
        """Return the plain loss sum of each sample as `forward_backward`, without gradients. Raises OutOfMemory."""

        def plain(hidden: Tensor, weight: Tensor, labels: Tensor, _: Tensor) -> tuple[None, Tensor]:
            return None, linear_cross_entropy_losses(hidden, weight, labels, self.chunk_tokens)

        with torch.no_grad(), out_of_memory_in(VALIDATION, self.runtime.levels[batch.level]):
            losses_S = self._run(batch, plain)[1]
        # FSDP reshards the root and the head in backward, which does not run here: gigabytes would stay gathered.
        reshard(self.model)
        return losses_S

    def _run(self, batch: PackedBatch, loss: Callable[[Tensor, Tensor, Tensor, Tensor], Any]) -> Any:
        """Run the model at the batch's level with `loss` as its head; sum the token losses of each sample."""
        self.runtime.activate(batch.level)
        batch = batch.to(self.device, self.copies)
        self.model.balance.set_documents(batch.document_ids, batch.document_shares)
        index = batch.loss_index

        def head(hidden_TH: Tensor, weight_VH: Tensor) -> Any:
            # Only trained tokens meet the vocabulary. A shard without any still takes part in every collective.
            hidden_LH = select_rows(hidden_TH, index)
            return loss(hidden_LH, weight_VH, batch.labels[index], batch.loss_weights[index])

        objective, losses_L = self.model(batch.input_ids, batch.position_ids, batch.documents, head)
        # Documents after the samples' are padding and have no trained token.
        losses_S = torch.zeros(len(batch.sample_ids), dtype=torch.float64, device=self.device)
        return objective, losses_S.index_add_(0, batch.document_ids[index], losses_L.double())


def warmup(engine: Engine, batches: PlanDataset, validates: bool, heartbeat: Callable[[str], None]) -> list[float]:
    """Run each level's heaviest pack once, so that out of memory and compilation show in the first minute.

    The caller discards the gradients. A collective.

    batches: this rank's; validates: whether to evaluate each level as well; heartbeat: called with what begins.
    Returns the seconds of each level on the slowest rank, 0 for a level without micro-batches.
    """
    plan = batches.plan
    seconds = [0.0] * len(plan.levels)
    # The longest level first: it is the one that runs out of memory.
    for level in reversed(range(len(plan.levels))):
        micro_batch = plan.heaviest_iteration(level)
        if micro_batch is not None:
            heartbeat(f"warm-up of level {level_name(plan.levels[level])}")
            started = time.perf_counter()
            engine.forward_backward(batches[micro_batch]).cpu()
            seconds[level] = time.perf_counter() - started
            if validates:
                engine.evaluate(batches[micro_batch])
    return all_reduce_values(seconds, "max", engine.device)
