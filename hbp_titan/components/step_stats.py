"""Step statistics: what one optimizer step measured on all ranks, as one record of metrics.jsonl.

StepStats owns the step's two collectives and its only wait for the device:

    add      after each micro-batch: launches device work, waits for nothing
    reduce   before the update, which depends on it: one all-reduce, not waited for by the host
    result   after the update: one all-gather of what the hosts measured, then one copy of both to the host
    record   the metrics, computed while the device runs the next step

Tokens and FLOPs come from the plan: padding is no useful work, and attention counts within documents only.

Shape suffixes: S samples of a pack, G loss groups, L layers, E experts.
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

from hbp_titan.components.loss import NORMALIZERS, weight_range
from hbp_titan.data.batch import PackedBatch
from hbp_titan.distributed.world import World
from hbp_titan.job_config import JobConfig
from hbp_titan.models.configs import ModelArgs
from hbp_titan.models.decoder import Decoder
from hbp_titan.models.registry import training_flops
from hbp_titan.packing import Plan
from hbp_titan.packing.level import level_name
from hbp_titan.packing.metrics import length_bucket

# Dense bf16 FLOP/s from the vendors' data sheets (after torchtitan v0.2.2 tools/utils.py); the first match counts.
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
_STATM = Path("/proc/self/statm")


def peak_flops(device: torch.device) -> float | None:
    """Return the dense bf16 FLOP/s of the device, None if unknown (a CPU, a new GPU)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for key, flops in PEAK_FLOPS.items() if key in name), None)


def finite(value: float) -> float | None:
    """Return `value`, or None for NaN and infinities, which JSON cannot hold."""
    return value if math.isfinite(value) else None


class NamedSources(Protocol):
    """The part of a token store that statistics read.

    lengths: int64 [N]; sources: uint16 [N], index into source_names.
    """

    @property
    def lengths(self) -> NDArray[np.int64]: ...

    @property
    def sources(self) -> NDArray[np.uint16]: ...

    @property
    def source_names(self) -> Sequence[str]: ...


@dataclass(frozen=True)
class Mean:
    """Mean loss per trained token, in nats."""

    loss: float
    trained_tokens: int

    def as_dict(self) -> dict[str, float | int | None]:
        """Return the entry of metrics.jsonl; a loss that is not finite is None."""
        return {"loss": finite(self.loss), "trained_tokens": self.trained_tokens}


@dataclass(frozen=True)
class LossMeans:
    """Mean losses; groups without trained tokens are absent.

    by_level: by level index; by_length: by the upper end of the length band; by_source: by name.
    """

    whole: Mean
    by_level: dict[int, Mean]
    by_length: dict[int, Mean]
    by_source: dict[str, Mean]


class LossSums:
    """Sums of token losses by level, length band and source, accumulated on the device.

    Sums are float64 and counts come from the plan, so each trained token counts once whatever rank, pack or micro-batch
    held it, and no rank needs another's counts.
    """

    def __init__(self, store: NamedSources, num_levels: int) -> None:
        self.source_names = store.source_names
        self.sources = store.sources
        self.band_ends, bands = np.unique(length_bucket(store.lengths), return_inverse=True)
        # One byte per sample: the epoch's samples can be millions.
        self.bands = bands.astype(np.uint8)
        self.group_sizes = (num_levels, len(self.band_ends), len(self.source_names))
        self._sums_G: Tensor | None = None

    def add(self, batch: PackedBatch, losses_S: Tensor) -> None:
        """Add a micro-batch. losses_S: [S], this rank's sum of token losses of each of batch.sample_ids."""
        ids = batch.sample_ids
        starts = np.cumsum([0, *self.group_sizes[:-1]])
        groups = self._groups(np.full(len(ids), batch.level), ids)
        places = np.concatenate([group + start for group, start in zip(groups, starts, strict=True)])
        if self._sums_G is None:
            self._sums_G = torch.zeros(sum(self.group_sizes), dtype=torch.float64, device=losses_S.device)
        # One scatter for all three groupings: each is a slice of the same vector.
        index = torch.from_numpy(places).to(losses_S.device, non_blocking=True)
        self._sums_G.index_add_(0, index, losses_S.double().repeat(len(groups)))

    def pop(self) -> Tensor:
        """Return the sums since the last call, by level, then band, then source: float64 [G] on the device."""
        sums_G, self._sums_G = self._sums_G, None
        assert sums_G is not None, "add comes first"
        return sums_G

    def means(self, sums: Sequence[float], plan: Plan, first: int, last: int) -> LossMeans:
        """Return the means over micro-batches first to last - 1 of `plan`. sums: of `pop`, added over all ranks."""
        ids = plan.samples_of(first, last)
        counts = plan.loss_tokens[ids]
        of = slice(*plan.pack_offsets[[first, last]])
        levels = np.repeat(plan.pack_levels[of], plan.packs.counts[of])
        parts = np.split(np.array(sums), np.cumsum(self.group_sizes)[:-1])
        means = []
        for group, size, part in zip(self._groups(levels, ids), self.group_sizes, parts, strict=True):
            trained = np.bincount(group, counts, size).astype(np.int64)
            # A group without trained tokens has no mean; 0 / 0 would be a NaN that JSON cannot hold.
            pairs = enumerate(zip(part.tolist(), trained.tolist(), strict=True))
            means.append({k: Mean(loss / count, count) for k, (loss, count) in pairs if count})
        by_level, by_band, by_source = means
        trained_tokens = int(counts.sum())
        return LossMeans(
            whole=Mean(float(parts[0].sum()) / max(trained_tokens, 1), trained_tokens),
            by_level=by_level,
            by_length={int(self.band_ends[k]): mean for k, mean in by_band.items()},
            by_source={self.source_names[k]: mean for k, mean in by_source.items()},
        )

    def _groups(self, levels: NDArray[np.int64], ids: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Return the level, band and source of each sample, int64 [n] each."""
        return [levels, self.bands[ids].astype(np.int64), self.sources[ids].astype(np.int64)]


class PeakMemory:
    """Peak memory of each level's micro-batches, and of the run, in GiB.

    On a GPU the peak of active memory, whose statistics are reset; on a CPU the resident set after a micro-batch.
    """

    def __init__(self, device: torch.device, num_levels: int) -> None:
        self.device = device
        self.run_peak = 0.0
        self._levels = [0.0] * num_levels

    def add(self, level: int) -> None:
        """Note the memory after launching a micro-batch. It may still run: a GPU allocates as work is launched."""
        # Per micro-batch: a step may mix levels, and CUDA has one peak for all of them.
        held = self._read()
        self._levels[level] = max(self._levels[level], held)
        self.run_peak = max(self.run_peak, held)

    def pop(self) -> list[float]:
        """Return the peaks by level since the last call, 0 for levels that did not run."""
        self.run_peak = max(self.run_peak, self._read() if self.device.type == "cuda" else _peak_resident())
        levels, self._levels = self._levels, [0.0] * len(self._levels)
        return levels

    def _read(self) -> float:
        if self.device.type == "cuda":
            active = torch.cuda.memory_stats(self.device)["active_bytes.all.peak"]
            torch.cuda.reset_peak_memory_stats(self.device)
            return active / 2**30
        if not _STATM.exists():
            # macOS has no /proc; the peak of the run is the nearest figure.
            return _peak_resident()
        return int(_STATM.read_text().split()[1]) * resource.getpagesize() / 2**30


def _peak_resident() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Bytes on macOS, KiB elsewhere.
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20


class ExpertCounts:
    """Tokens per expert of each layer, padding included: experts work on it as well. Empty for a dense model.

    expert_parallel: ranks that share a layer's experts. table_interval: steps between whole tables, 0 for none.
    """

    def __init__(self, model: Decoder, expert_parallel: int, table_interval: int) -> None:
        self.model = model
        self.expert_parallel = expert_parallel
        self.table_interval = table_interval
        self.layers: list[int] = []
        self._counts_LE: Tensor | None = None

    def add(self) -> None:
        """Count the last forward of this rank, without waiting for the device."""
        counts = self.model.tokens_per_expert()
        if not counts:
            return
        # Not every layer has experts: DeepSeek's first layers are dense.
        self.layers = list(counts)
        counts_LE = torch.stack(list(counts.values())).long()
        self._counts_LE = counts_LE if self._counts_LE is None else self._counts_LE + counts_LE

    def pop(self) -> Tensor | None:
        """Return the counts since the last call, int64 [L, E] on the device; None without experts."""
        counts_LE, self._counts_LE = self._counts_LE, None
        return counts_LE

    def figures(self, counts: NDArray[np.int64], step: int) -> dict[str, Any]:
        """Return the metrics of a step. counts: of `pop`, added over all ranks, flat; empty without experts.

        expert_load: load of the most loaded expert as a multiple of its layer's mean, in the "worst" layer and as
        "mean" over layers; "ranks", the same for ranks in the worst layer; "idle", experts of all layers without a
        token.
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


@dataclass(frozen=True)
class StepTimes:
    """Seconds of a step.

    wall, work: per micro-batch, mean over ranks; slowest: per micro-batch, the most work of any rank. Empty if timing
    is off. data_wait: longest wait of any rank for its batches. whole: of the step.
    """

    wall: Sequence[float]
    work: Sequence[float]
    slowest: Sequence[float]
    data_wait: float
    whole: float

    @property
    def measured(self) -> bool:
        """Whether micro-batches were timed."""
        return len(self.wall) > 0

    @property
    def waiting(self) -> NDArray[np.float64]:
        """Mean seconds per micro-batch that a rank waited for the slowest one.

        Ranks synchronize in every micro-batch, so each takes as long as the one with the most work.
        """
        # 1e-12: a level of empty packs has no work at all.
        return np.array(self.wall) * (1 - np.array(self.work) / np.maximum(self.slowest, 1e-12))

    @property
    def imbalance(self) -> float | None:
        """Measured time imbalance: 1 - mean work / slowest rank's work; 0 is best."""
        return 1 - sum(self.work) / max(sum(self.slowest), 1e-12) if self.measured else None

    @property
    def idle_share(self) -> float | None:
        """Share of the ranks' time spent waiting, for a slower rank or for data."""
        return (float(self.waiting.sum()) + self.data_wait) / self.whole if self.measured else None

    def shares(self, chosen: NDArray[np.float64]) -> tuple[float, float]:
        """Return (seconds, seconds of waiting) in the whole step. chosen: share of each micro-batch, [micro-batches].

        Time outside micro-batches (data, clipping, update) is divided in proportion to their time, or to their number
        if they were not timed.
        """
        if not self.measured:
            return self.whole * float(chosen.mean()), 0.0
        wall = np.array(self.wall)
        share = float(wall @ chosen / wall.sum())
        return self.whole * share, float(self.waiting @ chosen) + self.data_wait * share


@dataclass(frozen=True)
class StepResult:
    """What all ranks measured in a step.

    loss_sums: [G], added over ranks. grad_norm: before clipping. flags: the largest of any rank. expert_counts: flat.
    memory: peak of any rank by level, 0 for levels that did not run; peak_memory: of the run so far; GiB.
    """

    loss_sums: list[float]
    num_levels: int
    grad_norm: float
    flags: list[float]
    times: StepTimes
    memory: list[float]
    peak_memory: float
    expert_counts: NDArray[np.int64]

    @property
    def level_loss_sums(self) -> list[float]:
        """Sum of token losses of each level."""
        return self.loss_sums[: self.num_levels]

    @property
    def finite(self) -> bool:
        """Whether the gradient norm and every loss are finite."""
        return math.isfinite(sum(self.level_loss_sums) + self.grad_norm)


class StepStats:
    """Statistics of optimizer steps; `start`, `add` per micro-batch, `reduce`, `result`, then `record`."""

    def __init__(self, config: JobConfig, args: ModelArgs, world: World, store: NamedSources, model: Decoder) -> None:
        self.args = args
        self.world = world
        self.store = store
        self.num_levels = num_levels = len(config.levels)
        self.normalizer = NORMALIZERS[config.training.loss_normalization]
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.adapter_params = trainable if config.lora.rank else 0
        self.world_peak_flops = (peak_flops(world.device) or 0.0) * world.size
        self.losses = LossSums(store, num_levels)
        self.memory = PeakMemory(world.device, num_levels)
        self.experts = ExpertCounts(
            model, config.parallelism.expert_parallel_degree, config.metrics.expert_load_interval
        )
        self.start()

    def start(self) -> None:
        """Begin a step."""
        self._started = time.perf_counter()
        self._data_wait = 0.0

    def add(self, batch: PackedBatch, losses_S: Tensor, data_wait: float) -> None:
        """Add a launched micro-batch. losses_S: sum of token losses of each sample; data_wait: seconds for its data."""
        self.memory.add(batch.level)
        self.losses.add(batch, losses_S)
        self.experts.add()
        self._data_wait += data_wait

    def reduce(self, square_norm: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradient norm, and 1 if it or a loss is not finite else 0: float32 scalars on the device.

        A collective that the host does not wait for. square_norm: this rank's part, float64 scalar.
        """
        losses_G, counts = self.losses.pop(), self.experts.pop()
        # One collective for everything: at 512 ranks each more costs a latency of its own.
        parts = [square_norm.view(1), losses_G, *([] if counts is None else [counts.flatten().double()])]
        self._num_losses, self._reduced = len(losses_G), torch.cat(parts)
        dist.all_reduce(self._reduced)
        # The levels' sums cover every loss: the bands and sources are other groupings of the same tokens.
        norm = self._reduced[0].sqrt()
        levels = self._reduced[1 : 1 + self.num_levels]
        return norm.float(), (norm + levels.sum()).isfinite().logical_not().float()

    def tokens_per_expert(self) -> Tensor:
        """Return the step's tokens per expert of all ranks, float64 [L, E] on the device, after `reduce`."""
        return self._reduced[1 + self._num_losses :].view(len(self.experts.layers), -1)

    def result(self, seconds: Sequence[tuple[float, float]], flags: Sequence[float]) -> StepResult:
        """Return the step's result on every rank and end its time. A collective that waits for the device.

        seconds: (wall, work) of each micro-batch, or empty. flags: numbers of which the largest of any rank is wanted.
        """
        memory = self.memory.pop()
        wall, work = [wall for wall, _ in seconds], [work for _, work in seconds]
        own = [*flags, self._data_wait, self.memory.run_peak, *memory, *work, *wall]
        # float64 for all: token counts beyond 2**24 would be rounded in fp32.
        row = torch.tensor(own, dtype=torch.float64, device=self.world.device)
        rows = torch.empty(self.world.size * len(own), dtype=torch.float64, device=self.world.device)
        # torch 2.13 renamed all_gather_into_tensor and warns about the old name.
        getattr(dist, "all_gather_single", dist.all_gather_into_tensor)(rows, row)
        # The step's one copy to the host.
        values = torch.cat([self._reduced, rows]).cpu().numpy()
        whole = time.perf_counter() - self._started
        losses_end = 1 + self._num_losses
        per_rank = values[len(self._reduced) :].reshape(self.world.size, -1)
        largest, mean = per_rank.max(axis=0).tolist(), per_rank.mean(axis=0).tolist()
        data_wait, peak_memory, *rest = largest[len(flags) :]
        slowest = rest[len(memory) : len(memory) + len(work)]
        # The mean of work, but the maximum of data waits and memory: those are what a step is limited by.
        work_mean, wall_mean = np.split(np.array(mean[len(flags) + 2 + len(memory) :]), 2)
        return StepResult(
            loss_sums=values[1:losses_end].tolist(),
            num_levels=self.num_levels,
            grad_norm=float(np.sqrt(values[0])),
            flags=largest[: len(flags)],
            times=StepTimes(wall_mean.tolist(), work_mean.tolist(), slowest, data_wait, whole),
            memory=rest[: len(memory)],
            peak_memory=peak_memory,
            expert_counts=values[losses_end : len(self._reduced)].astype(np.int64),
        )

    def record(
        self, result: StepResult, plan: Plan, step_in_epoch: int, step: int, lr: float, skipped: str = ""
    ) -> dict[str, Any]:
        """Return the metrics of optimizer step `step` (1-based), step `step_in_epoch` (0-based) of `plan`.

        skipped: why the step was not applied, "" if it was; such a step trained nothing. Keys: docs/metrics.md.
        """
        first, last = int(plan.step_offsets[step_in_epoch]), int(plan.step_offsets[step_in_epoch + 1])
        times, means = result.times, self.losses.means(result.loss_sums, plan, first, last)
        used = np.unique(plan.pack_levels[slice(*plan.pack_offsets[[first, last]])])
        names = {k: level_name(plan.levels[k]) for k in used.tolist()}
        per_level = {name: self._of_level(plan, first, last, k, times) for k, name in names.items()}
        tokens, positions = (sum(level[key] for level in per_level.values()) for key in ("tokens", "positions"))
        samples = plan.samples_of(first, last)
        return {
            "step": step,
            "epoch": plan.epoch,
            "level": next(iter(names)) if len(names) == 1 else None,
            "level_name": "+".join(names.values()) if len(names) < 4 else f"{len(names)} levels",
            "micro_batches": last - first,
            "loss": finite(means.whole.loss),
            "loss_by_level": {
                name: finite(means.by_level[k].loss) if k in means.by_level else None for k, name in names.items()
            },
            "loss_by_length": {end: mean.as_dict() for end, mean in means.by_length.items()},
            "grad_norm": finite(result.grad_norm),
            "lr": lr,
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
            "memory_by_level": {name: result.memory[k] for k, name in names.items()},
            "peak_memory_gib": result.peak_memory,
            **({"skipped": skipped} if skipped else {}),
            **self.experts.figures(result.expert_counts, step),
        }

    def _of_level(self, plan: Plan, first: int, last: int, level: int, times: StepTimes) -> dict[str, Any]:
        """Return the metrics of one level; positions: tokens including padding.

        Levels side by side divide the time of a micro-batch in proportion to their ranks.
        """
        packs = np.arange(*plan.pack_offsets[[first, last]])
        packs = packs[plan.pack_levels[packs] == level]
        samples = np.concatenate([plan.samples_of_pack(at) for at in packs.tolist()])
        ranks = np.bincount(plan.iteration_of_pack[packs] - first, plan.pack_degrees[packs], last - first)
        share = ranks / plan.world_size
        seconds, waiting = times.shares(share)
        return {
            "micro_batches": int(np.count_nonzero(ranks)),
            "tokens": int(plan.lengths[samples].sum()),
            "positions": len(packs) * plan.levels[level].max_tokens,
            "seconds": seconds,
            "waiting_seconds": waiting,
            # While its ranks train the level, the others train another one.
            "mfu": self._mfu(plan, samples, seconds),
        }

    def _mfu(self, plan: Plan, samples: NDArray[np.int64], seconds: float) -> float | None:
        """Return the documents' own FLOPs in percent of the world's peak; None if the peak is unknown."""
        if not self.world_peak_flops:
            return None
        lengths = plan.lengths[samples]
        # The documents' own squares, not the packed length's: attention does not cross documents.
        squares = plan.costs[0].squares(lengths)
        flops = training_flops(self.args, int(lengths.sum()), int(squares.sum()), self.adapter_params)
        return 100 * flops / (seconds * self.world_peak_flops)


def attention_balance(plan: Plan, first: int, last: int) -> float:
    """Return the attention balance ratio (ABR) of micro-batches first to last - 1 (packing/metrics.py); 0 is best."""
    of = slice(*plan.pack_offsets[[first, last]])
    starts = plan.pack_offsets[first:last] - of.start
    own = plan.pack_sum_sq[of] / plan.pack_degrees[of]
    mean = np.add.reduceat(own * plan.pack_degrees[of], starts) / plan.world_size
    most = np.maximum.reduceat(own, starts)
    # 1: a micro-batch of empty packs has no attention.
    return float(np.mean(np.where(most > 0, 1 - mean / np.maximum(most, 1), 0.0)))


def count_sources(
    plan: Plan, samples: NDArray[np.int64], store: NamedSources, means: LossMeans
) -> dict[str, dict[str, float | None]]:
    """Return samples, tokens, trained tokens and mean loss of each source among `samples` (ids, int64 [n])."""
    sources, index = np.unique(store.sources[samples], return_inverse=True)
    counts = np.bincount(index), *(np.bincount(index, of[samples]) for of in (plan.lengths, plan.loss_tokens))
    table: dict[str, dict[str, float | None]] = {}
    for source, n, tokens, trained in zip(sources, *counts, strict=True):
        name = store.source_names[source]
        mean = means.by_source.get(name)
        loss = finite(mean.loss) if mean else None
        table[name] = {"samples": int(n), "tokens": int(tokens), "trained_tokens": int(trained), "loss": loss}
    return table
