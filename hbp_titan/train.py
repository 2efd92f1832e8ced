"""The training loop: `torchrun -m hbp_titan.train --job.config_file X.toml`, readable from top to bottom.

Owns the order of things: world, data, plan, model, optimizer, checkpoint; then one optimizer step after another,
each of one or more iterations, each iteration of one level on all ranks (design after torchtitan v0.2.2 train.py).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record

from hbp_titan.cli import guarded
from hbp_titan.components.checkpoint import Checkpointer
from hbp_titan.components.loss import linear_cross_entropy_sum
from hbp_titan.components.metrics import MetricsLogger, peak_flops, peak_memory_gib
from hbp_titan.components.model_state import export_hf, initialize
from hbp_titan.components.optimizer import build_lr_scheduler, build_optimizer, clip_grad_norm
from hbp_titan.components.report import Reporter
from hbp_titan.config import JobConfig, help_text, load_config, to_toml, validate
from hbp_titan.data.batch import PackedBatch
from hbp_titan.data.loader import PackLoader
from hbp_titan.data.planning import EpochPlans
from hbp_titan.data.prepare import prepare
from hbp_titan.data.token_store import TokenStore
from hbp_titan.distributed.context_parallel import check_heads
from hbp_titan.distributed.mesh import LevelMeshes
from hbp_titan.distributed.parallelize import DTYPES, parallelize
from hbp_titan.distributed.world import World, all_reduce_values, close_world, init_world, set_timeouts
from hbp_titan.levels.runtime import LevelRuntime
from hbp_titan.models.registry import build_model, model_args_of


class Trainer:
    """Everything that a run needs, made in the order in which it depends on what came before."""

    def __init__(self, config: JobConfig, world: World) -> None:
        validate(config, world.size)
        self.config = config
        self.world = world
        self.device = world.device
        torch.manual_seed(config.training.seed)
        torch.use_deterministic_algorithms(config.training.deterministic)
