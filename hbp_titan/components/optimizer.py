"""The optimizer, gradient clipping over the world, and the learning rate of each step.

Owns which parameters decay and which ones Muon trains, the shape of the schedule (after torchtitan v0.2.2
components/lr_scheduler.py) and how a run whose number of steps changes moves along it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hbp_titan.distributed.fsdp import compute_device
from hbp_titan.job_config import LRScheduler as LRSchedulerConfig
from hbp_titan.job_config import Optimizer

BLOCKS = "layers."
"""Start of the names of the blocks' parameters, whose matrices Muon trains."""
STATE_DTYPES = {"auto": None, "bfloat16": torch.bfloat16}
"""Dtypes of optimizer.state_dtype; None is the parameter's."""


def build_optimizer(model: nn.Module, config: Optimizer) -> torch.optim.Optimizer:
    """Return the optimizer of optimizer.name, its state allocated; only matrices and stacks of matrices decay.

    model: a Decoder, whose parameters may be sharded or on the meta device.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    kinds: dict[tuple[bool, int], list[nn.Parameter]] = {}
    for name, parameter in trained:
        # Expert stacks are a group of their own: a fused update takes tensors of one device mesh only.
        dims = min(parameter.ndim, 3)
        muon = config.name == "muon" and dims > 1 and name.startswith(BLOCKS)
        kinds.setdefault((muon, max(dims, 1)), []).append(parameter)
    groups: list[dict[str, Any]] = []
    for (muon, dims), parameters in sorted(kinds.items(), key=lambda kind: (kind[0][0], kind[0][1] == 1, kind[0][1])):
        group = {"params": parameters, "weight_decay": config.weight_decay if dims > 1 else 0.0}
        groups.append({**group, "momentum": config.momentum} if muon else group)
    settings = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps}
    same_dtypes = config.state_dtype == "auto" and all(p.grad_dtype in (p.dtype, None) for _, p in trained)
    if config.name == "adamw" and same_dtypes:
        optimizer = torch.optim.AdamW(groups, **settings, fused=True)  # type: ignore[arg-type]
        _allocate_state(optimizer)
        return optimizer
    # Not at the top: most runs use torch's AdamW.
    from hbp_titan.components.muon import Muon
    from hbp_titan.components.sharded_optimizers import ShardedAdamW

    state_dtype = torch.uint8 if config.name == "adamw8bit" else STATE_DTYPES[config.state_dtype]
    kind = Muon if config.name == "muon" else ShardedAdamW
    return kind(groups, {**settings, "weight_decay": 0.0}, state_dtype)


def _allocate_state(optimizer: torch.optim.Optimizer) -> None:
    """Allocate the state of a fused AdamW as it is before the first step: all zeros."""
    # Otherwise the first update could be the first to run out of memory. And torch's get_optimizer_state_dict creates
    # missing state by taking a step, so a checkpoint before the first update would count as an update.
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
            }


@torch.no_grad()
def square_norm(model: nn.Module) -> Tensor:
    """Return the squared norm of this rank's gradient shards, a float64 scalar on the device, without synchronizing.

    A sum over the world counts each gradient once: the result is 0 on all but the first replica (dp_replicate).
    """
    # float64, like the other sums with which it is reduced over the ranks in one collective. With cpu_offload the
    # gradients are in host memory, which NCCL does not reduce.
    # The norms of gradients in bfloat16 would be rounded to it.
    norms = torch._foreach_norm(_local_grads(model), 2.0, dtype=torch.float32)
    square = torch.linalg.vector_norm(torch.stack(norms)).double().square().to(compute_device(model))
    meshes = (p.device_mesh for p in model.parameters() if isinstance(p, DTensor))
    replicated = next((mesh for mesh in meshes if "dp_replicate" in (mesh.mesh_dim_names or ())), None)
    if replicated is not None and replicated.get_local_rank("dp_replicate") > 0:
        return torch.zeros_like(square)
    return square


@torch.no_grad()
def scale_gradients(model: nn.Module, norm: Tensor, max_norm: float) -> None:
    """Clip the gradients to `max_norm` (0 turns clipping off), given their norm over the world, a scalar on the device.

    Unlike torch.nn.utils.clip_grad_norm_ this takes tensors of several meshes.
    """
    if max_norm > 0 and (grads := _local_grads(model)):
        # Gradients in host memory (cpu_offload) make the host wait for the norm.
        torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp(max=1.0).to(grads[0].device))


def clip_grad_norm(model: nn.Module, max_norm: float) -> Tensor:
    """Clip the gradients by their norm over the whole world; return the norm before clipping."""
    square = square_norm(model)
    if dist.is_initialized():
        dist.all_reduce(square)
    norm = square.sqrt().float()
    scale_gradients(model, norm, max_norm)
    return norm


def _local_grads(model: nn.Module) -> list[Tensor]:
    grads = (p.grad for p in model.parameters() if p.grad is not None)
    return [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]


def step_unless(optimizer: torch.optim.Optimizer, skips: Tensor) -> None:
    """Take an optimizer step, which is skipped if `skips` (a float32 scalar on the device) is 1.

    A skipped step leaves parameters, moments and step count unchanged. The host waits for `skips` only if it computes
    the step itself (cpu_offload).
    """
    # The attribute that torch.amp.GradScaler sets for a fused optimizer.
    optimizer.found_inf = skips.to(optimizer.param_groups[0]["params"][0].device)  # type: ignore[attr-defined]
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf  # type: ignore[attr-defined]


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


@dataclass(frozen=True)
class LRScheduler:
    """The position of each step of a run on its learning-rate schedule.

    The schedule is fixed at the start of the run, for `schedule_steps` steps. If the number of steps changes (other
    ranks or levels pack the remaining data differently, or training.steps is raised), the remaining steps share the
    rest of the schedule evenly: the rate does not jump, and the last step has the last rate.

    After `start_step` steps the run is at `start_position` on the schedule; it reaches the end at step `total`.
    """

    schedule_steps: int
    total: int
    start_step: int = 0
    start_position: float = 0.0

    @property
    def used_up(self) -> bool:
        """Whether the steps after `start_step` all have the last rate: the run was at its end when it got more."""
        # Positions are sums of fractions.
        return self.total > self.start_step and self.start_position > self.schedule_steps - 1e-6

    def position_at(self, steps_done: int) -> float:
        """Return how many steps of the schedule are used up after `steps_done` steps of the run."""
        if self.total <= self.start_step:
            return self.start_position
        pace = (self.schedule_steps - self.start_position) / (self.total - self.start_step)
        return self.start_position + (steps_done - self.start_step) * pace

    def extend(self, steps_done: int, total: int) -> LRScheduler:
        """Return the scheduler of a run that has done `steps_done` steps and now has `total` steps in all."""
        if total == self.total:
            return self
        position = self.position_at(steps_done)
        return dataclasses.replace(self, total=total, start_step=steps_done, start_position=position)

    def factor(self, config: LRSchedulerConfig, steps_done: int) -> float:
        """Return the factor on the peak learning rate for the step after `steps_done`."""
        factor_at = lr_factor(config, self.schedule_steps)
        position = self.position_at(steps_done + 1) - 1
        low = math.floor(position)
        if position == low:
            return factor_at(low)
        # Linear interpolation between two steps of the schedule.
        return factor_at(low) + (position - low) * (factor_at(low + 1) - factor_at(low))


def lr_factor(config: LRSchedulerConfig, total_steps: int) -> Callable[[int], float]:
    """Return the function from a 0-based optimizer step to the factor on the peak learning rate.

    Warm-up rises linearly and reaches 1 at its last step; the last step of the run has `min_lr_factor`.
    """
    warmup = config.warmup_steps * total_steps if config.warmup_steps < 1 else config.warmup_steps
    warmup_steps = min(math.ceil(warmup), total_steps)
    decay_steps = max(total_steps - warmup_steps, 1)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = min((step - warmup_steps + 1) / decay_steps, 1.0)
        shape = {
            "constant": 1.0,
            "linear": 1.0 - progress,
            "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
        }[config.decay]
        return config.min_lr_factor + (1.0 - config.min_lr_factor) * shape

    return factor
