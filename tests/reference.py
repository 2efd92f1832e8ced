"""The reference of runs on several ranks: a Hugging Face model trained in a plain loop, one sample at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hbp_titan.packing import Plan


def token_losses(model: nn.Module, tokens: np.ndarray, mask: np.ndarray) -> Tensor:
    """Return the losses of a sample's trained tokens; `model` is one of transformers."""
    ids, kept = torch.tensor(tokens.astype("int64")), torch.tensor(mask[1:], dtype=torch.bool)
    return F.cross_entropy(model(input_ids=ids[None]).logits[0, :-1][kept], ids[1:][kept], reduction="none")


def train_one_by_one(model: nn.Module, store: Any, plan: Plan, steps: int, factor: Callable[[int], float]) -> None:
    """Train parameters that require gradients with AdamW; only the choice of samples comes from the plan.

    factor: the learning rate of a step, relative to 1e-2.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, others = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-4)
    for step in range(steps):
        samples = plan.samples_of(*plan.step_offsets[step : step + 2].tolist()).tolist()
        torch.cat([token_losses(model, *store.sample(i)) for i in samples]).mean().backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * factor(step)
        optimizer.step()
        optimizer.zero_grad()
