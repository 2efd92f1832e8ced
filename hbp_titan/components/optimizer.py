"""AdamW, its learning-rate schedule and gradient clipping over the world.

Owns which parameters decay and the shape of the schedule (after torchtitan v0.2.2 components/lr_scheduler.py).

LRScheduler: the learning rate of every step of a run, also of one whose number of steps changes on the way.

Owns the place of a step on the schedule. The schedule (components/optimizer.py) is made once, for the number of steps
that the run has at its start, and each step is one of its steps. Where the number changes, because other ranks or
levels cut the rest of the data differently or because the run is to be longer, it goes on from the place that it has
reached, and the steps that are left share what is left of the schedule evenly: the rate does not jump, and the last
step has the last rate.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hbp_titan.job_config import LRScheduler as LRSchedulerConfig
from hbp_titan.job_config import Optimizer


def build_optimizer(model: nn.Module, config: Optimizer) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices only: norms and biases have one dim. Its state is there at once, all zeros.

    Stacks of experts are a group of their own, because a fused update takes tensors of one mesh.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim == 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim > 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )
    _make_state(optimizer)
    return optimizer


def _make_state(optimizer: torch.optim.Optimizer) -> None:
    """Allocate what the optimizer keeps, as before its first step.

    Else the first update would be the first to run out of memory, and a checkpoint before it would count as an update:
    torch's get_optimizer_state_dict makes a missing state by a step.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for state in optimizer.state.values():
        state["step"].zero_()


def lr_factor(config: LRSchedulerConfig, total_steps: int) -> Callable[[int], float]:
    """The factor on the peak learning rate for the 0-based optimizer step.

    Warm-up rises linearly and reaches 1 at its last step; the last step of all has `min_lr_factor`.
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


@torch.no_grad()
def square_norm(model: nn.Module) -> Tensor:
    """The squared norm of this rank's shards of the gradients, a float64 scalar on its device; waits for nothing.

    0 on ranks that hold another copy of the parameters than the first (dp_replicate): a sum over the world counts each
    gradient once.
    """
    square = torch.nn.utils.get_total_norm(_local_grads(model)).double().square()
    meshes = (p.device_mesh for p in model.parameters() if isinstance(p, DTensor))
    copies = next((mesh for mesh in meshes if "dp_replicate" in (mesh.mesh_dim_names or ())), None)
    if copies is not None and copies.get_local_rank("dp_replicate") > 0:
        return torch.zeros_like(square)
    return square


@torch.no_grad()
def scale_gradients(model: nn.Module, norm: Tensor, max_norm: float) -> None:
    """Clip the gradients, whose norm over the world is `norm` (a scalar on the device), to max_norm; 0: not at all."""
    if max_norm > 0:
        torch._foreach_mul_(_local_grads(model), (max_norm / (norm + 1e-6)).clamp(max=1.0))


def clip_grad_norm(model: nn.Module, max_norm: float) -> Tensor:
    """Clip the gradients by their norm over the whole world (0 turns clipping off); returns the norm before.

    As torch.nn.utils.clip_grad_norm_, which does not take tensors of several meshes.
    """
    square = square_norm(model)
    if dist.is_initialized():
        dist.all_reduce(square)
    norm = square.sqrt().float()
    scale_gradients(model, norm, max_norm)
    return norm


def step_unless(optimizer: torch.optim.Optimizer, skips: Tensor) -> None:
    """The optimizer's step, which the device leaves out where `skips` (float32 scalar on it) is 1; the host waits not.

    Parameters, moments and the count of steps are then as before.
    """
    # What torch.amp.GradScaler sets for a fused optimizer.
    optimizer.found_inf = skips  # type: ignore[attr-defined]
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf  # type: ignore[attr-defined]


def _local_grads(model: nn.Module) -> list[Tensor]:
    grads = (p.grad for p in model.parameters() if p.grad is not None)
    return [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]


@dataclass(frozen=True)
class LRScheduler:
    """scheduled: steps of the schedule. From step `first` (steps done), at the place `place` of it, to step `total`."""

    scheduled: int
    total: int
    first: int = 0
    place: float = 0.0

    def position_at(self, steps_done: int) -> float:
        """Steps of the schedule that are behind the run when it has done `steps_done` steps."""
        if self.total <= self.first:
            return self.place
        return self.place + (steps_done - self.first) * ((self.scheduled - self.place) / (self.total - self.first))

    def extend(self, steps_done: int, total: int) -> LRScheduler:
        """The course after `steps_done` steps of a run that now has `total` in all; itself where it had before."""
        if total == self.total:
            return self
        return dataclasses.replace(self, total=total, first=steps_done, place=self.position_at(steps_done))

    def factor(self, config: LRSchedulerConfig, steps_done: int) -> float:
        """The factor on the peak learning rate for the step after `steps_done`."""
        of_step = lr_factor(config, self.scheduled)
        at = self.position_at(steps_done + 1) - 1
        low = math.floor(at)
        # Between two steps of the schedule along the line that joins them.
        return of_step(low) if at == low else of_step(low) + (at - low) * (of_step(low + 1) - of_step(low))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Let the next update of every parameter have the rate `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr
