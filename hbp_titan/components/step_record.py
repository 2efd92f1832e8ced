"""One line of metrics.jsonl from what a step planned and what it measured.

Owns the arithmetic of throughput, MFU, padding and tokens per source. Tokens and FLOPs come from the plan: padding does
no work that counts, and attention counts within documents only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hbp_titan.components.loss_means import LossMeans, NamedSources, finite
from hbp_titan.components.normalizer import weight_range
from hbp_titan.components.step_times import StepTimes
from hbp_titan.data.loader import SampleWeights
from hbp_titan.models.decoder import ModelArgs
from hbp_titan.models.registry import training_flops
from hbp_titan.packing import Plan
from hbp_titan.packing.level import level_name

# Dense bf16 FLOP/s by the vendors' data sheets (after torchtitan v0.2.2 tools/utils.py); the first match counts.
PEAK_FLOPS = {
    "A100": 312e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "H20": 148e12,
    "B200": 2250e12,
    "MI300X": 1300e12,
    "MI325X": 1300e12,
    "MI355X": 2500e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of the device, None where it is not known (a CPU, a new GPU)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for key, flops in PEAK_FLOPS.items() if key in name), None)


@dataclass(frozen=True)
class StepMeasurements:
    """What the trainer measured over all ranks. memory: the most of any rank by level, 0 for those that did not run;
    peak_memory: the most so far; both GiB."""

    means: LossMeans
    grad_norm: float
    lr: float
    times: StepTimes
    memory: Sequence[float]
    peak_memory: float


class StepRecorder:
    """Turns measurements into records (docs/metrics.md has their keys)."""

    def __init__(
        self,
        args: ModelArgs,
        world_size: int,
        device: torch.device,
        normalizer: SampleWeights,
        store: NamedSources,
        adapter_params: int = 0,
    ) -> None:
        self.args = args
        self.adapter_params = adapter_params
        self.store = store
        self.normalizer = normalizer
        self.world_peak_flops = (peak_flops(device) or 0.0) * world_size

    def record(
        self, plan: Plan, step_in_epoch: int, step: int, measured: StepMeasurements, skipped: str = ""
    ) -> dict[str, Any]:
        """The record of optimizer step `step` (1-based), step `step_in_epoch` (0-based) of `plan`.

        skipped: why it was not applied; such a step trained nothing. Numbers that are not finite become None.
        """
        first, last = int(plan.step_offsets[step_in_epoch]), int(plan.step_offsets[step_in_epoch + 1])
        samples = plan.samples_of(first, last)
        means, times = measured.means, measured.times
        names = {k: level_name(plan.levels[k]) for k in np.unique(plan.level_of_iteration[first:last]).tolist()}
        per_level = {name: self._of_level(plan, first, last, k, times) for k, name in names.items()}
        tokens, positions = (sum(of_level[key] for of_level in per_level.values()) for key in ("tokens", "positions"))
        return {
            "step": step,
            "epoch": plan.epoch,
            "level": next(iter(names)) if len(names) == 1 else None,
            "level_name": "+".join(names.values()),
            "iterations": last - first,
            "loss": finite(means.whole.loss),
            "loss_by_level": {name: _loss(means, k) for k, name in names.items()},
            "loss_by_length": {border: mean.as_dict() for border, mean in means.by_length.items()},
            "grad_norm": finite(measured.grad_norm),
            "lr": measured.lr,
            "tokens": tokens,
            "trained_tokens": 0 if skipped else means.whole.trained_tokens,
            "sources": {} if skipped else count_sources(plan, samples, self.store, means),
            "token_weights": weight_range(self.normalizer, plan, step_in_epoch),
            "tokens_per_second": tokens / times.whole,
            "mfu": self._mfu(plan, samples, times.whole),
            "padding": 100 * (1 - tokens / positions),
            "abr": attention_balance(plan, first, last),
            "time_imbalance": times.imbalance,
            "idle_share": times.idle_share,
            "data_wait_seconds": times.data_wait,
            "step_seconds": times.whole,
            "per_level": per_level,
            "memory_by_level": {name: measured.memory[k] for k, name in names.items()},
            "peak_memory_gib": measured.peak_memory,
            **({"skipped": skipped} if skipped else {}),
        }

    def _of_level(self, plan: Plan, first: int, last: int, level: int, times: StepTimes) -> dict[str, Any]:
        """What the iterations of one level did; positions: tokens with the padding."""
        chosen = plan.level_of_iteration[first:last] == level
        samples = np.concatenate([plan.samples_of(i, i + 1) for i in (first + np.flatnonzero(chosen)).tolist()])
        seconds, waiting = times.shares(chosen)
        packs = int(chosen.sum()) * plan.levels[level].dp_degree(plan.world_size)
        return {
            "iterations": int(chosen.sum()),
            "tokens": int(plan.lengths[samples].sum()),
            "positions": packs * plan.levels[level].max_tokens,
            "seconds": seconds,
            "waiting_seconds": waiting,
            "mfu": self._mfu(plan, samples, seconds),
        }

    def _mfu(self, plan: Plan, samples: NDArray[np.int64], seconds: float) -> float | None:
        """Percent of the world's peak that the documents' own FLOPs took; None where the peak is unknown."""
        if not self.world_peak_flops:
            return None
        lengths = plan.lengths[samples]
        flops = training_flops(self.args, int(lengths.sum()), int((lengths * lengths).sum()), self.adapter_params)
        return 100 * flops / (seconds * self.world_peak_flops)


def _loss(means: LossMeans, level: int) -> float | None:
    return finite(means.by_level[level].loss) if level in means.by_level else None


def attention_balance(plan: Plan, first: int, last: int) -> float:
    """ABR of iterations first to last - 1 (packing/metrics.py): how unequal their packs' attention is, 0 is best."""
    packs = plan.pack_sum_sq
    ratios = []
    for iteration in range(first, last):
        attention = packs[plan.pack_offsets[iteration] : plan.pack_offsets[iteration + 1]]
        ratios.append(1 - float(attention.mean() / attention.max()) if attention.any() else 0.0)
    return sum(ratios) / len(ratios)


def count_sources(
    plan: Plan, samples: NDArray[np.int64], store: NamedSources, means: LossMeans
) -> dict[str, dict[str, float | None]]:
    """Samples, tokens, trained tokens and mean loss of each source among `samples` (int64 [n], ids)."""
    sources, index = np.unique(store.sources[samples], return_inverse=True)
    counts = np.bincount(index), *(np.bincount(index, of[samples]) for of in (plan.lengths, plan.loss_tokens))
    table: dict[str, dict[str, float | None]] = {}
    for source, n, tokens, trained in zip(sources, *counts, strict=True):
        name = store.source_names[source]
        mean = means.by_source.get(name)
        loss = finite(mean.loss) if mean else None
        table[name] = {"samples": int(n), "tokens": int(tokens), "trained_tokens": int(trained), "loss": loss}
    return table
