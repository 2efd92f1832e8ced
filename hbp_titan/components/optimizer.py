"""AdamW, its learning-rate schedule and gradient clipping over the world.

Owns which parameters decay and the shape of the schedule (after torchtitan v0.2.2 components/lr_scheduler.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hbp_titan.distributed.mesh import shard_group
from hbp_titan.job_config import LRScheduler, Optimizer


def build_optimizer(model: nn.Module, config: Optimizer) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices only: norms and biases have one dim.

    Stacks of experts are a group of their own, because a fused update takes tensors of one mesh.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim == 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim > 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


def lr_factor(config: LRScheduler, total_steps: int) -> Callable[[int], float]:
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
def clip_grad_norm(model: nn.Module, max_norm: float) -> Tensor:
    """Clip the gradients by their norm over the whole world (0 turns clipping off); returns the norm before.

    As torch.nn.utils.clip_grad_norm_, which does not take tensors of several meshes.
    """
    grads = [
        p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad for p in model.parameters() if p.grad is not None
    ]
    square = torch.nn.utils.get_total_norm(grads).square()
    group = shard_group(model.parameters())
    if group is not None:
        dist.all_reduce(square, group=group)
    norm = square.sqrt()
    if max_norm > 0:
        torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm
