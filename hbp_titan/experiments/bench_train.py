"""Benchmark of the trainer's engine: time and memory per level and checkpointing policy, cost of a level switch.

Owns the packs (documents of random lengths and tokens, the same lengths on every rank), the measurements and the table.
The policies of one length are levels of one engine that differ in nothing else, and their micro-batches are timed round
robin, so that drift of the machine affects all of them equally. Memory is measured in separate micro-batches, because
recording it takes time.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median

import numpy as np
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed import distributed_c10d

from hbp_titan.config import JobConfig
from hbp_titan.data.batch import PackedBatch, make_batch, shard_batch
from hbp_titan.distributed.offload import HostActivations
from hbp_titan.distributed.world import World
from hbp_titan.engine import Engine
from hbp_titan.models.configs import ModelArgs
from hbp_titan.models.registry import last_params, linear_params, training_flops
from hbp_titan.packing import CostModel, Level
from hbp_titan.packing.level import AC_POLICIES
from hbp_titan.packing.ragged import IntArray
from hbp_titan.preflight import cost_model
from hbp_titan.tuning.measured_engine import MeasuredEngine
from hbp_titan.tuning.memory import with_policy

SIGMA = 1.0
"""Of the lognormal lengths; sources of the Tulu3 mixture are between 0.3 and 1.1 (tuning/simulate.py)."""
DEPTHS = (2, 3)
"""Layers of the two models whose difference is what one layer saves for backward."""

COLUMNS = (
    ("model", 12),
    ("layers", 6),
    ("length", 7),
    ("cp", 2),
    ("documents", 11),
    ("compile", 7),
    ("policy", 16),
    ("tokens/s", 9),
    ("TFLOP/s", 7),
    ("MFU", 6),
    ("peak GiB", 8),
    ("B/token/layer", 13),
    ("host", 6),
    ("seconds", 8),
    ("time / none", 18),
    ("FLOPs / none", 12),
)


@dataclass(frozen=True)
class Documents:
    """Lognormal document lengths with this median; median 0: one document fills the pack."""

    median: int

    def __str__(self) -> str:
        return f"median {self.median}" if self.median else "one"

    def lengths(self, max_tokens: int, seed: int) -> IntArray:
        """Return the document lengths of a pack, int64; they sum to `max_tokens`, the last one is cut."""
        if not self.median:
            return np.array([max_tokens])
        rng = np.random.default_rng(seed)
        lengths: list[int] = []
        remaining = max_tokens
        while remaining:
            # A document of one token has nothing to predict.
            drawn = max(2, round(self.median * float(np.exp(SIGMA * rng.standard_normal()))))
            lengths.append(min(drawn, remaining))
            remaining -= lengths[-1]
        return np.array(lengths)


def parse_documents(text: str) -> tuple[Documents, ...]:
    """Return the kinds of documents in "one,600": one that fills the pack, lognormal with median 600."""
    words = [word.strip() for word in text.split(",")]
    for word in words:
        if word != "one" and not (word.isdecimal() and int(word)):
            raise ValueError(f"--documents {text!r}: {word!r} must be 'one' or a median number of tokens")
    return tuple(Documents(0 if word == "one" else int(word)) for word in words)


class RandomSamples:
    """Sample source with the given lengths and random tokens, all of them trained."""

    def __init__(self, lengths: IntArray, vocab_size: int, seed: int) -> None:
        self.ends = np.cumsum(lengths)
        self.tokens = np.random.default_rng(seed).integers(0, vocab_size, int(self.ends[-1]))

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens [len] and the loss mask [len] of one document."""
        tokens = self.tokens[self.ends[index - 1] if index else 0 : self.ends[index]]
        return tokens, np.ones(len(tokens), dtype=bool)


def random_batches(
    packs: Sequence[IntArray], args: ModelArgs, level: Level, level_index: int, rank: int
) -> list[PackedBatch]:
    """Return this rank's shard of each pack of document lengths, with the static shapes of one level.

    The loss of a pack is the mean over its trained tokens.
    """
    dp_rank, cp_rank = divmod(rank, level.cp_degree)
    max_documents = max(len(lengths) for lengths in packs)
    batches = []
    for number, lengths in enumerate(packs):
        # Tokens differ between dp ranks; lengths must not, or a rank would wait for another's heavier pack.
        source = RandomSamples(lengths, args.vocab_size, seed=dp_rank * len(packs) + number)
        weights = np.full(len(lengths), 1.0 / max(int((lengths - 1).sum()), 1))
        batch = make_batch(source, range(len(lengths)), level, level_index, max_documents, weights)
        gather_degree = level.cp_shape(args.num_kv_heads)[0]
        batches.append(shard_batch(batch, cp_rank, level.cp_degree, gather_degree, args.sliding_window))
    return batches


Policy = tuple[str, int | None, int]


@dataclass(frozen=True)
class Settings:
    """What is measured: every length under every policy, with every kind of documents.

    Args:
        lengths: ascending; their own policy is ignored.
        policies: (ac_policy, ac_layers, mlp_chunk_tokens), as in Level.
        layers: of the model; 0 starts with all and halves them until every policy fits.
        repeats: timed micro-batches of each.
        optimizer_step: whether AdamW's state is allocated and its step is part of every micro-batch.
    """

    lengths: tuple[Level, ...]
    policies: tuple[Policy, ...]
    documents: tuple[Documents, ...]
    layers: int = 0
    repeats: int = 5
    optimizer_step: bool = False


def parse_policies(text: str) -> tuple[Policy, ...]:
    """Return the policies in "none,full,keep_attention:8,offload::4096": name:layers [all]:chunk tokens [0]."""
    policies = []
    for word in text.split(","):
        name, *numbers = word.strip().split(":")
        layers, chunk_tokens, *more = [*numbers, "", ""]
        wrong = len(more) > 2 or word.endswith(":") or not all(n.isdecimal() or n == "" for n in numbers)
        if name not in AC_POLICIES or wrong:
            raise ValueError(
                f"--policies {text!r}: {word!r} must be policy:layers:chunk_tokens, with a policy of "
                f"{', '.join(AC_POLICIES)}"
            )
        policies.append((name, int(layers) if layers else None, int(chunk_tokens or 0)))
    return tuple(policies)


def under_policy(level: Level, policy: Policy) -> Level:
    """Return `level` under a policy."""
    name, layers, chunk_tokens = policy
    return dataclasses.replace(with_policy(level, name, layers), mlp_chunk_tokens=chunk_tokens)


@dataclass
class Measurement:
    """One level under one policy; out of memory leaves `seconds` and `peak_bytes` empty.

    tokens: of one micro-batch, all ranks. flops: per micro-batch and rank, without recomputation, attention within
    documents. flops_ratio: FLOPs with / without recomputation. seconds: of each timed micro-batch, slowest rank.
    peak_bytes: maximum over the ranks, including parameters (and optimizer state); on a CPU with several ranks an upper
    bound, because memory that gloo's threads free is not recorded. saved_bytes, host_bytes: what a layer keeps for
    backward on the device and in host memory, per token of a rank's shard.
    """

    model: str
    layers: int
    max_tokens: int
    cp_degree: int
    documents: str
    ac_policy: str
    ac_layers: int | None
    compile: bool
    optimizer_step: bool
    tokens: int
    flops: float
    flops_ratio: float
    mlp_chunk_tokens: int = 0
    saved_bytes: float | None = None
    host_bytes: float | None = None
    peak_bytes: int | None = None
    seconds: list[float] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        """Return whether the level fits in memory."""
        return bool(self.seconds)


class Bench:
    """Benchmark of one model."""

    def __init__(self, config: JobConfig, args: ModelArgs, world: World, settings: Settings) -> None:
        self.settings = settings
        self.args = args
        self.world = world
        self.levels = [under_policy(length, policy) for length in settings.lengths for policy in settings.policies]
        self.config = config
        self.measured = MeasuredEngine(config, args, world, self.levels, optimizer_step=settings.optimizer_step)
        self.measured.set_layers(settings.layers or args.num_layers)
        self.out_of_memory: set[tuple[str, int | None, int, int]] = set()

    def run(self) -> Iterator[list[Measurement]]:
        """Yield the measurements of one length and kind of documents at a time, shortest first."""
        saved = self._saved_bytes()
        for index, length in enumerate(self.settings.lengths):
            for documents in self.settings.documents:
                lengths = documents.lengths(length.max_tokens, seed=0)
                batches = self._batches(index, documents)
                peaks = self._peaks(batches)
                seconds = self._seconds([b for b in batches if peaks[b.level]])
                group = [self._describe(batch.level, documents, lengths) for batch in batches]
                for batch, found in zip(batches, group, strict=True):
                    found.saved_bytes, found.host_bytes = saved[batch.level] or (None, None)
                    found.seconds = seconds.get(batch.level, [])
                    found.peak_bytes = peaks[batch.level] if found.fits else None
                yield group
        self.measured.clear()

    def measure(self, index: int, documents: Documents, repeats: int) -> Measurement:
        """Measure only self.levels[index]: a warm-up, the peak, then `repeats` timed micro-batches.

        For a few rows within a time budget; saved_bytes stays None.
        """
        first, policy = divmod(index, len(self.settings.policies))
        batch = self._batches(first, documents)[policy]
        peak = self._peak(batch)
        seconds = [self.measured.seconds([batch]) for _ in range(repeats if peak else 0)]
        found = self._describe(index, documents, documents.lengths(self.levels[index].max_tokens, seed=0))
        found.seconds = [] if None in seconds else [taken for taken in seconds if taken is not None]
        found.peak_bytes = peak if found.fits else None
        return found

    def _batches(self, index: int, documents: Documents) -> list[PackedBatch]:
        """Return a batch of length `index` for each policy: the same one, assigned to another level."""
        first = index * len(self.settings.policies)
        level = self.levels[first]
        lengths = documents.lengths(level.max_tokens, seed=0)
        (batch,) = random_batches([lengths], self.args, level, first, self.world.rank)
        if self.world.device.type == "cuda":
            # As the trainer's loader does, or the copy to the GPU would block.
            batch = batch.pin_memory()
        return [dataclasses.replace(batch, level=first + k) for k in range(len(self.settings.policies))]

    def _saved_bytes(self) -> list[tuple[float, float] | None]:
        """Return what one layer under the policy of each level keeps per token: the difference of two depths.

        On the device, and in host memory; None if out of memory.
        The difference excludes embedding, head and loss.
        """
        # Before the whole model is built, which may leave no memory for this.
        config = copy.deepcopy(self.config)
        # Otherwise the gathered parameters of a layer count as saved.
        config.parallelism.reshard_after_forward = True
        levels = [dataclasses.replace(level, ac_layers=None) for level in self.levels]
        saved: list[list[tuple[int, int] | None]] = []
        for depth in DEPTHS:
            measured = MeasuredEngine(config, self.args.with_layers(depth), self.world, levels)
            batches = [
                b for k in range(len(self.settings.lengths)) for b in self._batches(k, self.settings.documents[0])
            ]
            saved.append([measured.attempt(partial(_saved_for_backward, batch=batch)) for batch in batches])
            measured.clear()
        sizes = [level.max_tokens // level.cp_degree * (DEPTHS[1] - DEPTHS[0]) for level in self.levels]
        return [
            None if shallow is None or deep is None else ((deep[0] - shallow[0]) / size, (deep[1] - shallow[1]) / size)
            for shallow, deep, size in zip(*saved, sizes, strict=True)
        ]

    def _peaks(self, batches: Sequence[PackedBatch]) -> dict[int, int | None]:
        """Return the peak memory by level, None if out of memory; with layers = 0 for as many layers as fit."""
        while True:
            peaks = {batch.level: self._peak(batch) for batch in batches}
            layers = self.measured.args.num_layers
            if self.settings.layers != 0 or None not in peaks.values() or layers == 1:
                return peaks
            self.measured.set_layers(layers // 2)

    def _peak(self, batch: PackedBatch) -> int | None:
        level = self.levels[batch.level]
        # Without the length: what did not fit at a shorter one does not fit now.
        key = (level.ac_policy, level.ac_layers, level.mlp_chunk_tokens, self.measured.args.num_layers)
        if key in self.out_of_memory:
            return None  # already at a shorter length
        peak = self.measured.peak_bytes(batch)
        if peak is None:
            self.out_of_memory.add(key)
            return None
        host = self.measured.engine.runtime.ac_state.host
        # On a CPU they are counted with the rest, and stay for the other policies.
        return peak - (host.buffer_bytes if host and self.world.device.type == "cpu" else 0)

    def _seconds(self, batches: list[PackedBatch]) -> dict[int, list[float]]:
        """Return the seconds of each timed micro-batch by level, round robin after a warm-up round.

        A level that runs out of memory is dropped, so that the rounds of the others stay comparable.
        """
        seconds: dict[int, list[float]] = {batch.level: [] for batch in batches}
        for number in range(self.settings.repeats + 1):
            timed = [batch for batch in batches if batch.level in seconds]
            # Another policy is first in each round: the first one may find a cooler or a busier machine.
            start = number % max(len(timed), 1)
            for batch in timed[start:] + timed[:start]:
                taken = self.measured.seconds([batch])
                if taken is None:
                    del seconds[batch.level]
                elif number:
                    seconds[batch.level].append(taken)
        return seconds

    def _describe(self, index: int, documents: Documents, lengths: np.ndarray) -> Measurement:
        level, args = self.levels[index], self.measured.args
        dp_degree = level.dp_degree(self.world.size)
        sum_squared = int(cost_model(args).squares(lengths).sum())
        return Measurement(
            model=args.name,
            layers=args.num_layers,
            max_tokens=level.max_tokens,
            cp_degree=level.cp_degree,
            documents=str(documents),
            ac_policy=level.ac_policy,
            ac_layers=level.ac_layers,
            compile=self.config.compile.enable,
            optimizer_step=self.settings.optimizer_step,
            tokens=level.max_tokens * dp_degree,
            flops=training_flops(args, level.max_tokens, sum_squared) / level.cp_degree,
            mlp_chunk_tokens=level.mlp_chunk_tokens,
            flops_ratio=_flops(args, level, sum_squared) / _flops(args, Level(level.max_tokens), sum_squared),
        )


def _saved_for_backward(engine: Engine, batch: PackedBatch) -> tuple[int, int]:
    """Return the bytes that are kept for backward on the device and in host memory; each storage counts once.

    Counted by autograd's hooks, because allocation records on a CPU miss what gloo's threads free.
    """
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    if engine.runtime.ac_state.host is not None:
        # Without the buffers of other levels. What goes there does not pass through `keep`.
        engine.runtime.ac_state.host = HostActivations(engine.device)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        objective, _ = engine.forward(batch)
    sizes = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in saved}
    # Release the tensors before backward, which would otherwise run with them held.
    saved.clear()
    objective.backward()
    engine.model.zero_grad()
    host = engine.runtime.ac_state.host
    return sum(sizes.values()), 0 if host is None else host.buffer_bytes


def _flops(args: ModelArgs, level: Level, sum_squared: int) -> float:
    head_params = args.vocab_size * args.hidden_size
    cost = CostModel.from_dims(
        num_layers=args.num_layers,
        layer_params=(linear_params(args) - head_params) // args.num_layers,
        head_params=head_params,
        num_heads=args.num_heads,
        head_dim=args.head_dim,
        ac_policy=level.ac_policy,
        ac_layers=level.ac_layers,
        last_params=last_params(args) // args.num_layers,
        chunked=level.mlp_chunk_tokens > 0,
    )
    return float(cost.cost(np.array(level.max_tokens), np.array(sum_squared)))


def header() -> str:
    """Return the two lines above the rows."""
    rule = "|".join("-" * (width + 2) for _, width in COLUMNS)
    return f"{_line([name for name, _ in COLUMNS])}\n|{rule}|"


def rows(group: Sequence[Measurement], peak_flops: float | None) -> list[str]:
    """Return one line per policy of a level. peak_flops: FLOP/s of a rank's device, None if unknown."""
    base = next((m for m in group if m.ac_policy == "none" and not m.mlp_chunk_tokens), None)
    return [_line(_cells(m, base, peak_flops)) for m in group]


def relative_times(found: Measurement, base: Measurement | None) -> tuple[float, float, float] | None:
    """Return (median, min, max) over the rounds of the time of `found` / `base`, None if one did not fit."""
    if base is None or not found.fits or not base.fits:
        return None
    ratios = [a / b for a, b in zip(found.seconds, base.seconds, strict=True)]
    return median(ratios), min(ratios), max(ratios)


def _cells(found: Measurement, base: Measurement | None, peak_flops: float | None) -> list[str]:
    layers, chunks = found.ac_layers, found.mlp_chunk_tokens
    policy = f"{found.ac_policy}:{'' if layers is None else layers}:{chunks or ''}".rstrip(":")
    level = [found.model, str(found.layers), str(found.max_tokens), str(found.cp_degree), found.documents]
    level += ["on" if found.compile else "off", policy]
    kept = ["-" if size is None else f"{size:,.0f}" for size in (found.saved_bytes, found.host_bytes)]
    flops_ratio = f"{found.flops_ratio:.2f}"
    if found.peak_bytes is None or not found.fits:
        return [*level, "out of memory", "", "", "", *kept, "", "", flops_ratio]
    seconds = median(found.seconds)
    achieved = found.flops / seconds
    relative = relative_times(found, base)
    return [
        *level,
        f"{found.tokens / seconds:,.0f}",
        f"{achieved / 1e12:.3g}",
        f"{achieved / peak_flops:.1%}" if peak_flops else "-",
        f"{found.peak_bytes / 2**30:.3g}",
        *kept,
        f"{seconds:.4g}",
        "-" if relative is None else "{:.2f} ({:.2f}-{:.2f})".format(*relative),
        flops_ratio,
    ]


def _line(cells: Sequence[str]) -> str:
    padded = (cell.ljust(width) for cell, (_, width) in zip(cells, COLUMNS, strict=True))
    return f"| {' | '.join(padded)} |"


@dataclass
class SwitchCost:
    """Seconds of each round in each order.

    again: the grouped order a second time. micro_batches: of one round. switches: level switches in alternating order.
    new_groups: process groups created after the first round began.
    """

    alternating: list[float]
    grouped: list[float]
    again: list[float]
    micro_batches: int
    switches: int
    new_groups: int

    def ratios(self, control: bool = False) -> list[float]:
        """Return alternating / grouped of each round, with `control` grouped / grouped."""
        return [a / b for a, b in zip(self.again if control else self.alternating, self.grouped, strict=True)]

    def __str__(self) -> str:
        texts = [f"{median(r):.3f} ({min(r):.3f}-{max(r):.3f})" for r in (self.ratios(), self.ratios(control=True))]
        return (
            f"{self.micro_batches} micro-batches, {self.switches} level switches, {len(self.grouped)} rounds: "
            f"alternating / grouped {texts[0]}, grouped / grouped {texts[1]}; new process groups {self.new_groups}"
        )


def measure_switch(
    config: JobConfig,
    args: ModelArgs,
    world: World,
    levels: Sequence[Level],
    documents: Documents,
    packs: int,
    repeats: int,
) -> SwitchCost:
    """Time `packs` packs of each level in both orders, `repeats` rounds after a warm-up round."""
    measured = MeasuredEngine(config, args, world, levels)
    by_level = []
    for index, level in enumerate(levels):
        lengths = [documents.lengths(level.max_tokens, seed) for seed in range(packs)]
        batches = random_batches(lengths, args, level, index, world.rank)
        by_level.append([b.pin_memory() for b in batches] if world.device.type == "cuda" else batches)
    grouped = list(itertools.chain.from_iterable(by_level))
    alternating = list(itertools.chain.from_iterable(zip(*by_level, strict=True)))
    orders = {"grouped": grouped, "alternating": alternating, "again": grouped}
    seconds: dict[str, list[float]] = {name: [] for name in orders}
    # Builds the engine: its process groups exist before the count.
    measured.attempt(lambda engine: None)
    groups = len(distributed_c10d._world.pg_map)
    for number in range(repeats + 1):
        # Rotate the orders, so that drift of the machine does not favor one of them.
        names = list(orders)[number % 3 :] + list(orders)[: number % 3]
        for name in names:
            taken = measured.seconds(orders[name])
            if taken is None:
                raise ValueError("--switch: out of memory; use smaller --lengths or fewer --layers, or recompute more")
            if number:
                seconds[name].append(taken)
    return SwitchCost(
        **seconds,
        micro_batches=len(grouped),
        switches=sum(a.level != b.level for a, b in itertools.pairwise(alternating)),
        new_groups=len(distributed_c10d._world.pg_map) - groups,
    )
