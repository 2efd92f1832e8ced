"""Engine: the parallelized model and one iteration on it, at whatever level the batch names.

Owns the way from an architecture to a sharded, initialized model with its level runtime, and the forward and backward
of a batch. The trainer and the proof of equivalence (verify.py) run this same code, and the dry run its first half.

Shape suffixes: T tokens of this rank's shard, H hidden width, V vocabulary, L trained tokens, S samples of the pack.

LevelRuntime: what a level swap changes, and the swap itself.

Owns the states that the wrapped model reads (context parallelism, activation checkpointing, FSDP) and the mesh of each
level. A switch assigns a few attributes: no group is made, nothing is rebuilt (paper 3.3).

Each level's heaviest pack once, before the first step.

Owns the order of these passes and their times. Trouble with memory shows here, in the first minute, and compilation
ends here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
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
from hbp_titan.distributed.context_parallel import ContextParallelState
from hbp_titan.distributed.fsdp import ReshardState, reshard
from hbp_titan.distributed.mesh import LevelMeshes
from hbp_titan.distributed.parallelize import (
    DTYPES,
    ActivationCheckpointState,
    compute_dtype,
    parallelize,
    stored_dtype,
)
from hbp_titan.distributed.world import World, all_reduce_values
from hbp_titan.models.attention import choose_backend
from hbp_titan.models.decoder import Decoder, ModelArgs
from hbp_titan.models.lora import apply_lora
from hbp_titan.models.registry import build_model
from hbp_titan.packing.level import Level, level_name


class LevelRuntime:
    """Holds the active level; `activate` is called before each iteration.

    reshard_after_forward: the run's, for levels without their own.
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
        self.reshard_state = ReshardState({level.resharded(reshard_after_forward) for level in levels})
        self.active: int | None = None

    def activate(self, index: int) -> None:
        """Make level `index` the one that the next forward and backward run."""
        level = self.levels[index]
        self.cp_state.set_mesh(self.meshes[index])
        self.ac_state.policy = level.ac_policy
        self.ac_state.layers = self.num_layers if level.ac_layers is None else level.ac_layers
        # Without a backward nothing would free what a forward keeps, and the next level might need the memory.
        self.reshard_state.set_value(level.resharded(self.reshard_default) if torch.is_grad_enabled() else True)
        self.active = index


def level_meshes(
    config: JobConfig, args: ModelArgs, world: World, mesh_device: torch.device, levels: Sequence[Level]
) -> LevelMeshes:
    """The meshes of `levels` and of the parameters as `config` shards them, their process groups made and connected."""
    cp_shapes = [level.cp_shape(args.num_kv_heads) for level in levels]
    copies, experts = config.parallelism.dp_replicate, config.parallelism.expert_parallel_degree
    return LevelMeshes(mesh_device, world.size, cp_shapes, copies, experts)


def parallelized_on_meta(
    config: JobConfig, args: ModelArgs, world: World, mesh_device: torch.device
) -> tuple[Decoder, LevelRuntime]:
    """The model without storage, every parallel form applied to it, and the runtime with the mesh of each level.

    mesh_device: where the ranks meet: world.device, or the CPU where the world is a fake one of GPUs that are not here.
    """
    meshes = level_meshes(config, args, world, mesh_device, config.levels)
    reshard_after_forward = config.parallelism.reshard_after_forward
    runtime = LevelRuntime(config.levels, meshes, args.num_layers, args.num_kv_heads, reshard_after_forward)
    with torch.device("meta"):
        model = build_model(args).to(stored_dtype(config, world.device))
        if config.lora.rank:
            lora = config.lora
            apply_lora(model, lora.rank, lora.alpha, lora.target_modules, DTYPES[config.training.dtype])
    parallelize(model, config, world.device, meshes, runtime.cp_state, runtime.ac_state, runtime.reshard_state)
    return model, runtime


class Engine:
    """`model` is sharded over the world; `runtime` holds the active level."""

    def __init__(self, config: JobConfig, args: ModelArgs, world: World) -> None:
        self.device = world.device
        self.replicated = config.parallelism.dp_replicate > 1
        dtype = compute_dtype(config, world.device)
        choose_backend(config.model.attention_backend, world.device, args.head_dim, dtype)
        self.chunk_tokens = config.training.loss_chunk_tokens
        self.backend = config.compile.backend if config.compile.enable else ""
        self.model, self.runtime = parallelized_on_meta(config, args, world, world.device)
        # Given storage and weights shard by shard.
        initialize(self.model, args, world.device, config.training.seed, config.checkpoint.initial_load_path)

    def forward_backward(self, batch: PackedBatch, last: bool = True) -> Tensor:
        """One iteration on this rank: gradients of the weighted loss; returns the plain loss of each sample.

        last: whether it is the last of its optimizer step. Copies of the parameters (dp_replicate) add up their
        gradients only then; before it a parameter's `grad` lacks what was reduced within this copy.
        That is the sum of the token losses that this rank has of each of `batch.sample_ids`, float64 [S] on its device.
        Raises OutOfMemory, as evaluate does.
        """
        with out_of_memory_in(TRAINING, self.runtime.levels[batch.level]):
            objective, losses_S = self.forward(batch)
            if self.replicated:
                cast(FSDPModule, self.model).set_requires_all_reduce(last)
            objective.backward()
        return losses_S

    def forward(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """The weighted loss of this rank, to be differentiated, and the plain loss of each sample."""
        return self._run(batch, partial(linear_cross_entropy, chunk_tokens=self.chunk_tokens, backend=self.backend))

    def evaluate(self, batch: PackedBatch) -> Tensor:
        """The plain loss of each sample, as `forward_backward`, without gradients."""

        def plain(hidden: Tensor, weight: Tensor, labels: Tensor, _: Tensor) -> tuple[None, Tensor]:
            return None, linear_cross_entropy_losses(hidden, weight, labels, self.chunk_tokens)

        with torch.no_grad(), out_of_memory_in(VALIDATION, self.runtime.levels[batch.level]):
            losses_S = self._run(batch, plain)[1]
        # Without a backward the head and the root stay gathered: gigabytes, and copies where parameters are looked for.
        reshard(self.model)
        return losses_S

    def _run(self, batch: PackedBatch, loss: Callable[[Tensor, Tensor, Tensor, Tensor], Any]) -> Any:
        """The model at the batch's level, with `loss` in place of the logits; token losses become those of samples."""
        self.runtime.activate(batch.level)
        batch = batch.to(self.device)
        self.model.balance.use(batch.document_ids, batch.document_shares)
        index = batch.loss_index

        def loss_of(hidden_TH: Tensor, weight_VH: Tensor) -> Any:
            # Only trained tokens meet the vocabulary; a shard without any still takes part in every collective.
            hidden_LH = select_rows(hidden_TH, index)
            return loss(hidden_LH, weight_VH, batch.labels[index], batch.loss_weights[index])

        objective, losses_L = self.model(batch.input_ids, batch.position_ids, batch.documents, loss_of)
        # The documents behind the samples' are padding, and train nothing.
        losses_S = torch.zeros(len(batch.sample_ids), dtype=torch.float64, device=self.device)
        return objective, losses_S.index_add_(0, batch.document_ids[index], losses_L.double())


def warmup(engine: Engine, batches: PlanDataset, validates: bool, at: Callable[[str], None]) -> list[float]:
    """Seconds of each level's first pass, the slowest rank's, 0 for a level without iterations; a collective.

    Leaves gradients that are to be thrown away. batches: of this rank; validates: whether levels are evaluated as well;
    at: is told what begins.
    """
    plan = batches.plan
    seconds = [0.0] * len(plan.levels)
    for level in reversed(range(len(plan.levels))):
        iteration = plan.heaviest_iteration(level)
        if iteration is not None:
            at(f"the first pass of level {level_name(plan.levels[level])}")
            started = time.perf_counter()
            engine.forward_backward(batches[iteration]).cpu()
            seconds[level] = time.perf_counter() - started
            if validates:
                engine.evaluate(batches[iteration])
    return all_reduce_values(seconds, "max", engine.device)
