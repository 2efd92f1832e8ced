"""One line of metrics.jsonl from what a step planned and what it measured, and the totals per level of the run.

Owns the arithmetic of throughput, MFU, padding, loss per level and tokens per source. Tokens and FLOPs come from the
plan: padding does no work that counts, and attention counts within documents only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from hbp_titan.components.metrics import peak_memory_gib
from hbp_titan.components.normalizer import weight_range
from hbp_titan.components.summary import LevelTotals, level_name
from hbp_titan.data.loader import SampleWeights
from hbp_titan.distributed.hardware import peak_flops
from hbp_titan.models.decoder import ModelArgs
from hbp_titan.models.registry import training_flops
from hbp_titan.packing import Plan


@dataclass(frozen=True)
class StepMeasurements:
    """What the trainer measured: losses are sums of token losses per level over all ranks, times in seconds."""

    losses: list[float]
    grad_norm: float
    lr: float
    data_wait_seconds: float
    step_seconds: float


class NamedSources(Protocol):
    """What the records need of a token store. sources: uint16 [num_samples], index into source_names."""

    @property
    def sources(self) -> NDArray[np.uint16]: ...

    @property
    def source_names(self) -> Sequence[str]: ...


class StepRecorder:
    """Turns measurements into records. `totals` has one entry a level; the seconds are those of all recorded steps."""

    def __init__(
        self,
        args: ModelArgs,
        plan: Plan,
        device: torch.device,
        normalizer: SampleWeights,
        store: NamedSources,
        adapter_params: int = 0,
    ) -> None:
        self.args = args
        self.adapter_params = adapter_params
        self.store = store
        self.normalizer = normalizer
        self.device = device
        self.world_peak_flops = (peak_flops(device) or 0.0) * plan.world_size
        self.totals = [LevelTotals(level) for level in plan.levels]
        self.seconds = self.data_wait_seconds = 0.0

    def record(
        self, plan: Plan, step_in_epoch: int, step: int, measured: StepMeasurements, skipped: str = ""
    ) -> dict[str, Any]:
        """The record of optimizer step `step` (1-based), step `step_in_epoch` (0-based) of `plan`.

        skipped: why it was not applied; such a step trained nothing. Numbers that are not finite become None.
        """
        first, last = int(plan.step_offsets[step_in_epoch]), int(plan.step_offsets[step_in_epoch + 1])
        samples = plan.samples_of(first, last)
        lengths = plan.lengths[samples]
        tokens, trained = int(lengths.sum()), int(plan.step_loss_tokens[step_in_epoch])
        seconds = measured.step_seconds
        self.seconds += seconds
        self.data_wait_seconds += measured.data_wait_seconds
        iteration_levels = plan.level_of_iteration[first:last]
        loss_by_level = {}
        for k in np.unique(iteration_levels).tolist():
            of_level = first + np.flatnonzero(iteration_levels == k)
            ids = np.concatenate([plan.samples_of(i, i + 1) for i in of_level.tolist()])
            loss_by_level[k] = measured.losses[k] / max(int(plan.loss_tokens[ids].sum()), 1)
            share = seconds * len(of_level) / len(iteration_levels)
            if not skipped:
                self.totals[k].add(len(of_level), int(plan.lengths[ids].sum()), share, loss_by_level[k])
        capacity = sum(plan.levels[k].max_tokens * plan.levels[k].dp_degree(plan.world_size) for k in iteration_levels)
        flops = training_flops(self.args, tokens, int((lengths * lengths).sum()), self.adapter_params)
        return {
            "step": step,
            "epoch": plan.epoch,
            "level": next(iter(loss_by_level)) if len(loss_by_level) == 1 else None,
            "level_name": "+".join(level_name(plan.levels[k]) for k in loss_by_level),
            "iterations": len(iteration_levels),
            "loss": _finite(sum(measured.losses) / max(trained, 1)),
            "loss_by_level": {k: _finite(loss) for k, loss in loss_by_level.items()},
            "grad_norm": _finite(measured.grad_norm),
            "lr": measured.lr,
            "tokens": tokens,
            "trained_tokens": 0 if skipped else trained,
            "sources": {} if skipped else count_sources(plan, samples, self.store),
            "token_weights": weight_range(self.normalizer, plan, step_in_epoch),
            "tokens_per_second": tokens / seconds,
            "mfu": 100 * flops / (seconds * self.world_peak_flops) if self.world_peak_flops else None,
            "padding": 100 * (1 - tokens / capacity),
            "data_wait_seconds": measured.data_wait_seconds,
            "step_seconds": seconds,
            "peak_memory_gib": peak_memory_gib(self.device),
            **({"skipped": skipped} if skipped else {}),
        }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def count_sources(plan: Plan, samples: NDArray[np.int64], store: NamedSources) -> dict[str, dict[str, int]]:
    """Samples, tokens and trained tokens of each source among `samples` (int64 [n], ids)."""
    sources, index = np.unique(store.sources[samples], return_inverse=True)
    counts = np.bincount(index), *(np.bincount(index, of[samples]) for of in (plan.lengths, plan.loss_tokens))
    return {
        store.source_names[source]: {"samples": int(n), "tokens": int(tokens), "trained_tokens": int(trained)}
        for source, n, tokens, trained in zip(sources, *counts, strict=True)
    }
