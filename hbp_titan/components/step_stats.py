"""What an optimizer step measures, gathered on each rank and brought together over all of them.

Owns the two collectives of a step and its one wait for the device. Before the update a sum of what lies on the device:
squared gradient norm, losses, tokens per expert; the update depends on it, and the host does not wait for it. After the
update a gather of what the hosts measured, and one copy of both to the host.

One line of metrics.jsonl from what a step planned and what it measured.

Owns the arithmetic of throughput, MFU, padding and tokens per source. Tokens and FLOPs come from the plan: padding does
no work that counts, and attention counts within documents only.

How a step's time was lived: what its iterations took, and how much of that ranks spent waiting.

Owns the definitions of time imbalance and idle share from what the ranks measured (levels/work_clock.py).

Where the loss lies: mean losses per trained token by level, length band and source, over all ranks.

Owns the groups and the exact means over them: each trained token counts once, whatever rank, pack or iteration it was
in. Sums are float64; counts come from the plan, so that no rank asks another for them.

The most memory that iterations of each level hold, while training runs.

Owns the reading: the allocator's peak on a GPU, the process's resident set on a CPU (levels/memory.py measures to the
byte, and too slowly for training).

How evenly tokens are spread over experts: counted over an optimizer step on all ranks.

Owns the counting and the figures of it in metrics.jsonl; what a forward counts is models/moe.py's.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from hbp_titan.components.loss import weight_range
from hbp_titan.data.batch import PackedBatch
from hbp_titan.data.loader import SampleWeights
from hbp_titan.distributed.world import World
from hbp_titan.models.decoder import Decoder, ModelArgs
from hbp_titan.models.registry import training_flops
from hbp_titan.packing import Plan
from hbp_titan.packing.level import level_name
from hbp_titan.packing.metrics import band_of


@dataclass(frozen=True)
class StepTimes:
    """Seconds. wall, work: of each iteration, the mean of the ranks; slowest: the most work of any rank. They are empty
    where nothing was measured. data_wait: the longest wait of any rank for its batches. whole: of the step."""

    wall: Sequence[float]
    work: Sequence[float]
    slowest: Sequence[float]
    data_wait: float
    whole: float

    @property
    def measured(self) -> bool:
        """Whether the iterations were."""
        return len(self.wall) > 0

    @property
    def waiting(self) -> NDArray[np.float64]:
        """Seconds of each iteration that a rank waited for the slowest one, in the mean; 0 where nothing was measured.

        Ranks meet in every iteration, so all of them take as long as the one with the most work.
        """
        return np.array(self.wall) * (1 - np.array(self.work) / np.maximum(self.slowest, 1e-12))

    @property
    def imbalance(self) -> float | None:
        """Time imbalance as lived: share of the slowest ranks' work by which the mean rank had less; 0 is best."""
        return 1 - sum(self.work) / max(sum(self.slowest), 1e-12) if self.measured else None

    @property
    def idle_share(self) -> float | None:
        """Share of the ranks' time in which they waited, for a slower rank or for data."""
        return (float(self.waiting.sum()) + self.data_wait) / self.whole if self.measured else None

    def shares(self, of: NDArray[np.bool_]) -> tuple[float, float]:
        """(seconds, seconds of waiting) of the iterations `of`, bool [iterations]: their share of the whole step.

        What lies outside of iterations (data, clipping, update) is shared in proportion to their time, or to their
        number where nothing was measured.
        """
        if not self.measured:
            return self.whole * float(of.mean()), 0.0
        wall = np.array(self.wall)
        share = float(wall[of].sum() / wall.sum())
        return self.whole * share, float(self.waiting[of].sum()) + self.data_wait * share


_STATM = Path("/proc/self/statm")


class MemoryUse:
    """`add` after every iteration. peak: the most so far, GiB, as the last `take` saw it.

    On a GPU a level's figure is the peak of active memory during its iterations, and CUDA's peak statistics are reset;
    on a CPU it is the resident set after them.
    """

    def __init__(self, device: torch.device, num_levels: int) -> None:
        self.device = device
        self.peak = 0.0
        self._levels = [0.0] * num_levels

    def add(self, level: int) -> None:
        """An iteration of `level` has been launched. It may still run: a GPU allocates as work is launched."""
        held = self._read()
        self._levels[level] = max(self._levels[level], held)
        self.peak = max(self.peak, held)

    def pop(self) -> list[float]:
        """GiB by level since the last call, 0 for those that did not run."""
        self.peak = max(self.peak, self._read() if self.device.type == "cuda" else _peak_resident())
        levels, self._levels = self._levels, [0.0] * len(self._levels)
        return levels

    def _read(self) -> float:
        if self.device.type == "cuda":
            active = torch.cuda.memory_stats(self.device)["active_bytes.all.peak"]
            torch.cuda.reset_peak_memory_stats(self.device)
            return active / 2**30
        if not _STATM.exists():
            return _peak_resident()
        return int(_STATM.read_text().split()[1]) * resource.getpagesize() / 2**30


def _peak_resident() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20


class NamedSources(Protocol):
    """What is needed of a token store. lengths: int64 [N]; sources: uint16 [N], index into source_names."""

    @property
    def lengths(self) -> NDArray[np.int64]: ...

    @property
    def sources(self) -> NDArray[np.uint16]: ...

    @property
    def source_names(self) -> Sequence[str]: ...


@dataclass(frozen=True)
class Mean:
    """loss: per trained token, in nats."""

    loss: float
    trained_tokens: int

    def as_dict(self) -> dict[str, float | int | None]:
        """For metrics.jsonl; a loss that is not finite is None."""
        return {"loss": finite(self.loss), "trained_tokens": self.trained_tokens}


def finite(value: float) -> float | None:
    """`value`, or None where JSON has no number for it."""
    return value if math.isfinite(value) else None


@dataclass(frozen=True)
class LossMeans:
    """Groups that trained nothing are left out. by_level: by its index; by_length: by the upper border of the band."""

    whole: Mean
    by_level: dict[int, Mean]
    by_length: dict[int, Mean]
    by_source: dict[str, Mean]


class LossCollector:
    """`add` every iteration, `take` this rank's sums, reduce them over the ranks, and ask for their `means`."""

    def __init__(self, store: NamedSources, num_levels: int) -> None:
        self.source_names = store.source_names
        self.sources = store.sources
        self.num_levels = num_levels
        self.borders, bands = np.unique(band_of(store.lengths), return_inverse=True)
        self.bands = bands.astype(np.uint8)
        self._sums_G: Tensor | None = None

    def add(self, batch: PackedBatch, losses_S: Tensor) -> None:
        """Add an iteration; waits for nothing. losses_S: [S], what this rank has of each of batch.sample_ids."""
        ids = batch.sample_ids
        starts = np.cumsum([0, *self._sizes()[:-1]])
        groups = self._groups(np.full(len(ids), batch.level), ids)
        places = np.concatenate([group + start for group, start in zip(groups, starts, strict=True)])
        if self._sums_G is None:
            self._sums_G = torch.zeros(sum(self._sizes()), dtype=torch.float64, device=losses_S.device)
        index = torch.from_numpy(places).to(losses_S.device, non_blocking=True)
        self._sums_G.index_add_(0, index, losses_S.double().repeat(len(groups)))

    def pop(self) -> Tensor:
        """Sums since the last call by level, then by band, then by source: float64 on the device."""
        sums_G, self._sums_G = self._sums_G, None
        assert sums_G is not None, "add comes first"
        return sums_G

    def by_level(self, sums: Sequence[float]) -> list[float]:
        """The first part of such sums."""
        return list(sums[: self.num_levels])

    def means(self, sums: Sequence[float], plan: Plan, first: int, last: int) -> LossMeans:
        """The means of iterations first to last - 1 of `plan`; sums: as from `take`, over all ranks."""
        ids = plan.samples_of(first, last)
        counts = plan.loss_tokens[ids]
        per_pack = plan.packs.counts[plan.pack_offsets[first] : plan.pack_offsets[last]]
        levels = np.repeat(plan.pack_levels[plan.pack_offsets[first] : plan.pack_offsets[last]], per_pack)
        parts = np.split(np.array(sums), np.cumsum(self._sizes())[:-1])
        means = []
        for group, size, part in zip(self._groups(levels, ids), self._sizes(), parts, strict=True):
            trained = np.bincount(group, counts, size).astype(np.int64)
            pairs = enumerate(zip(part.tolist(), trained.tolist(), strict=True))
            means.append({k: Mean(loss / count, count) for k, (loss, count) in pairs if count})
        by_level, by_band, by_source = means
        trained_tokens = int(counts.sum())
        return LossMeans(
            whole=Mean(float(parts[0].sum()) / max(trained_tokens, 1), trained_tokens),
            by_level=by_level,
            by_length={int(self.borders[k]): mean for k, mean in by_band.items()},
            by_source={self.source_names[k]: mean for k, mean in by_source.items()},
        )

    def _groups(self, levels: NDArray[np.int64], ids: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """The level, band and source of each sample."""
        return [levels, self.bands[ids].astype(np.int64), self.sources[ids].astype(np.int64)]

    def _sizes(self) -> tuple[int, int, int]:
        return self.num_levels, len(self.borders), len(self.source_names)


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


class StepMeter:
    """`start`, then `add` every iteration, then `sum_over_ranks`, `read` and `measurements`, once a step.

    After `read`: grad_norm, before clipping; loss_sums by level over all ranks; counts, what sum_over_ranks was given.
    """

    def __init__(self, world: World, store: NamedSources, num_levels: int) -> None:
        self.world = world
        self.losses = LossCollector(store, num_levels)
        self.memory = MemoryUse(world.device, num_levels)
        self.start()

    def start(self) -> None:
        """A step begins."""
        self.started = time.perf_counter()
        self.data_wait = 0.0

    def add(self, batch: PackedBatch, losses_S: Tensor, data_wait: float) -> None:
        """An iteration has been launched. losses_S: of its samples; data_wait: seconds until its batch was there."""
        self.memory.add(batch.level)
        self.losses.add(batch, losses_S)
        self.data_wait += data_wait

    def sum_over_ranks(self, square: Tensor, counts: Tensor | None) -> tuple[Tensor, Tensor]:
        """The gradient's norm, and 1 where it or a loss is not finite, else 0: float32 scalars on the device.

        square: this rank's part of the squared norm, float64 scalar. counts: integers to be summed, of any shape.
        A collective; the host does not wait for it.
        """
        losses_G = self.losses.pop()
        parts = [square.view(1), losses_G, *([] if counts is None else [counts.flatten().double()])]
        self._num_sums, self._summed = len(losses_G), torch.cat(parts)
        dist.all_reduce(self._summed)
        norm = self._summed[0].sqrt()
        levels = self._summed[1 : 1 + self.losses.num_levels]
        return norm.float(), (norm + levels.sum()).isfinite().logical_not().float()

    def read(self, seconds: Sequence[tuple[float, float]], flags: Sequence[float]) -> list[float]:
        """The largest that any rank has of each of `flags`; ends the step's time. A collective that waits.

        seconds: (wall, work) of each iteration, or none of any.
        """
        memory = self.memory.pop()
        wall, work = [wall for wall, _ in seconds], [work for _, work in seconds]
        mine = [*flags, self.data_wait, self.memory.peak, *memory, *work, *wall]
        row = torch.tensor(mine, dtype=torch.float64, device=self.world.device)
        rows = torch.empty(self.world.size * len(mine), dtype=torch.float64, device=self.world.device)
        _gather(rows, row)
        values = torch.cat([self._summed, rows]).cpu().numpy()
        whole = time.perf_counter() - self.started
        self.grad_norm = float(np.sqrt(values[0]))
        self._sums = values[1 : 1 + self._num_sums].tolist()
        self.loss_sums = self.losses.by_level(self._sums)
        self.counts = values[1 + self._num_sums : len(self._summed)].astype(np.int64)
        ranks = values[len(self._summed) :].reshape(self.world.size, -1)
        most, mean = ranks.max(axis=0).tolist(), ranks.mean(axis=0).tolist()
        self.data_wait, self._peak, *rest = most[len(flags) :]
        self._memory, slowest = rest[: len(memory)], rest[len(memory) : len(memory) + len(work)]
        work_mean, wall_mean = np.split(np.array(mean[len(flags) + 2 + len(memory) :]), 2)
        self._times = StepTimes(wall_mean.tolist(), work_mean.tolist(), slowest, self.data_wait, whole)
        return most[: len(flags)]

    def measurements(self, plan: Plan, first: int, last: int, lr: float) -> StepMeasurements:
        """Of the step that trained iterations first to last - 1 of `plan`, until the next `read`."""
        means = self.losses.means(self._sums, plan, first, last)
        return StepMeasurements(means, self.grad_norm, lr, self._times, self._memory, self._peak)


def _gather(rows: Tensor, row: Tensor) -> None:
    """Every rank's `row`, one after the other. torch 2.13 has a new name for it."""
    getattr(dist, "all_gather_single", dist.all_gather_into_tensor)(rows, row)


class ExpertLoad:
    """Adds up the copies that each expert of each layer got; for a model without experts every call does nothing.

    expert_parallel: ranks that share a layer's experts. table_interval: steps between whole tables, 0 for none.
    """

    def __init__(self, model: Decoder, expert_parallel: int, table_interval: int) -> None:
        self.model = model
        self.expert_parallel = expert_parallel
        self.table_interval = table_interval
        self.layers: list[int] = []
        self.counts_LE: Tensor | None = None

    def add(self) -> None:
        """Count the last forward of this rank, without waiting for the device."""
        counts = self.model.tokens_per_expert()
        if not counts:
            return
        self.layers = list(counts)
        counts_LE = torch.stack(list(counts.values())).long()
        self.counts_LE = counts_LE if self.counts_LE is None else self.counts_LE + counts_LE

    def pop(self) -> Tensor | None:
        """What this rank added up since the last call, int64 [layers, experts] on its device; None without experts."""
        counts_LE, self.counts_LE = self.counts_LE, None
        return counts_LE

    def figures(self, counts: NDArray[np.int64], step: int) -> dict[str, Any]:
        """The figures of a step. counts: the sum over all ranks of what `take` returned, flat; empty without experts.

        expert_load: the most loaded expert as a multiple of its layer's mean, in the "worst" layer and in the "mean"
        of all; "idle", the experts of all layers without a token; "ranks", the most loaded rank as a multiple of the
        mean in the worst layer. tokens_per_expert: by layer, in every `table_interval`-th step. Padding counts: experts
        work on it as well.
        """
        if not len(counts):
            return {}
        table_LE = torch.from_numpy(counts).view(len(self.layers), -1)
        load = _over_mean(table_LE)
        figures = {
            "worst": load.max().item(),
            "mean": load.mean().item(),
            "idle": int((table_LE == 0).sum()),
            "ranks": _over_mean(table_LE.unflatten(1, (self.expert_parallel, -1)).sum(2)).max().item(),
        }
        record: dict[str, Any] = {"expert_load": figures}
        if self.table_interval and step % self.table_interval == 0:
            record["tokens_per_expert"] = dict(zip(self.layers, table_LE.tolist(), strict=True))
        return record


def _over_mean(counts_LN: Tensor) -> Tensor:
    return counts_LN.amax(1) / counts_LN.double().mean(1)
