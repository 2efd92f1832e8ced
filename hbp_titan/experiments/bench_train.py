"""The cost of training at each level under each activation-checkpoint policy: time, memory, what is kept for backward.

Owns the measurement; the iterations are the engine's that trains. Policies of one length are levels of one engine that
differ in nothing else (a swap costs nothing), and their iterations are timed round robin, so that drift of the machine
meets each alike. Memory is measured in iterations of their own, because watching it takes time.

Batches for benchmarks: packs of documents with drawn lengths and random tokens.

Owns how a benchmark's pack is filled. The batch itself is the trainer's (data/batch.py). Every rank of a level gets a
pack with the same document lengths: a benchmark measures a level, and packs that run side by side cost the same.

The table of a benchmark: one Markdown row a measurement.

Owns the columns and how a measurement is compared with the same level without recomputation.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median

import numpy as np
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from hbp_titan.config import JobConfig
from hbp_titan.data.batch import PackedBatch, make_batch, shard_batch
from hbp_titan.distributed.world import World
from hbp_titan.engine import Engine
from hbp_titan.models.decoder import ModelArgs
from hbp_titan.models.registry import last_params, linear_params, training_flops
from hbp_titan.packing import CostModel, Level
from hbp_titan.packing.level import AC_POLICIES
from hbp_titan.packing.ragged import IntArray
from hbp_titan.tuning.measured_engine import MeasuredEngine

SIGMA = 1.0
"""Spread of the lognormal lengths; sources of the Tulu3 mixture lie between 0.3 and 1.1 (packing/synthetic.py)."""


@dataclass(frozen=True)
class Documents:
    """median: tokens of the median document, lengths are lognormal; 0: one document fills the pack."""

    median: int

    def __str__(self) -> str:
        return f"median {self.median}" if self.median else "one"

    def lengths(self, max_tokens: int, seed: int) -> IntArray:
        """Lengths of a pack's documents, int64; they sum to `max_tokens`, the last is cut."""
        if not self.median:
            return np.array([max_tokens])
        rng = np.random.default_rng(seed)
        lengths: list[int] = []
        left = max_tokens
        while left:
            drawn = max(2, round(self.median * float(np.exp(SIGMA * rng.standard_normal()))))
            lengths.append(min(drawn, left))
            left -= lengths[-1]
        return np.array(lengths)


def parse_documents(text: str) -> tuple[Documents, ...]:
    """From "one,600": one document that fills the pack, lognormal lengths with a median of 600."""
    words = [word.strip() for word in text.split(",")]
    for word in words:
        if word != "one" and not (word.isdecimal() and int(word)):
            raise ValueError(f"documents {text!r}: {word!r} is neither 'one' nor a median number of tokens")
    return tuple(Documents(0 if word == "one" else int(word)) for word in words)


class RandomSamples:
    """A source of documents with the given lengths and random tokens, all of them trained."""

    def __init__(self, lengths: IntArray, vocab_size: int, seed: int) -> None:
        self.ends = np.cumsum(lengths)
        self.tokens = np.random.default_rng(seed).integers(0, vocab_size, int(self.ends[-1]))

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [len] and loss mask [len] of one document."""
        tokens = self.tokens[self.ends[index - 1] if index else 0 : self.ends[index]]
        return tokens, np.ones(len(tokens), dtype=bool)


def random_batches(
    packs: Sequence[IntArray], args: ModelArgs, level: Level, level_index: int, rank: int
) -> list[PackedBatch]:
    """This rank's shard of each pack of document lengths; all have the static shapes of one level.

    The loss of a pack is the mean over its trained tokens.
    """
    dp_rank, cp_rank = divmod(rank, level.cp_degree)
    max_documents = max(len(lengths) for lengths in packs)
    batches = []
    for number, lengths in enumerate(packs):
        source = RandomSamples(lengths, args.vocab_size, seed=dp_rank * len(packs) + number)
        weights = np.full(len(lengths), 1.0 / max(int((lengths - 1).sum()), 1))
        batch = make_batch(source, range(len(lengths)), level, level_index, max_documents, weights)
        gather_degree = level.cp_shape(args.num_kv_heads)[0]
        batches.append(shard_batch(batch, cp_rank, level.cp_degree, gather_degree))
    return batches


DEPTHS = (2, 3)
"""Layers of the two models whose difference is what one layer keeps."""


@dataclass(frozen=True)
class Settings:
    """What is measured: every length under every policy, filled with each kind of documents.

    lengths: ascending; their own policy does not count. policies: (ac_policy, ac_layers), as in Level. layers: of the
    model; 0 begins with all and halves them until every policy fits. repeats: timed iterations of each.
    optimizer_step: AdamW's state is held and its step belongs to every iteration.
    """

    lengths: tuple[Level, ...]
    policies: tuple[tuple[str, int | None], ...]
    documents: tuple[Documents, ...]
    layers: int = 0
    repeats: int = 5
    optimizer_step: bool = False


def parse_policies(text: str) -> tuple[tuple[str, int | None], ...]:
    """From "none,full,keep_attention:8": policies, each with the number of layers that it covers (all of them)."""
    policies = []
    for word in text.split(","):
        name, colon, layers = word.strip().partition(":")
        if name not in AC_POLICIES or (colon and not layers.isdecimal()):
            raise ValueError(
                f"policies {text!r}: {word!r} is not of the form policy:layers, of {', '.join(AC_POLICIES)}"
            )
        policies.append((name, int(layers) if colon else None))
    return tuple(policies)


@dataclass
class Measurement:
    """One level under one policy. Nothing but the description is set where memory did not suffice.

    tokens: of one iteration over all ranks. flops: of one iteration and rank, without recomputation, attention within
    documents. flops_ratio: FLOPs with recomputation / without. seconds: of each timed iteration, the slowest rank.
    peak_bytes: the most that a rank holds during an iteration, parameters (and optimizer state) with it; on a CPU with
    several ranks a bound from above, because what the threads of gloo release is not seen.
    saved_bytes: what a layer under the policy keeps from forward to backward for each token of a rank's shard.
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
    saved_bytes: float | None = None
    peak_bytes: int | None = None
    seconds: list[float] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        """Whether memory sufficed."""
        return bool(self.seconds)


class Bench:
    """Measures one model. `run` yields the policies of one length and kind of documents at a time."""

    def __init__(self, config: JobConfig, args: ModelArgs, world: World, settings: Settings) -> None:
        self.settings = settings
        self.args = args
        self.world = world
        self.levels = [
            dataclasses.replace(length, ac_policy=policy, ac_layers=layers)
            for length in settings.lengths
            for policy, layers in settings.policies
        ]
        self.config = config
        self.measured = MeasuredEngine(config, args, world, self.levels, optimizer_step=settings.optimizer_step)
        self.measured.set_layers(settings.layers or args.num_layers)
        self.too_big: set[tuple[str, int | None, int]] = set()

    def run(self) -> Iterator[list[Measurement]]:
        """All measurements, shortest length first."""
        saved = self._saved_bytes()
        for index, length in enumerate(self.settings.lengths):
            for documents in self.settings.documents:
                lengths = documents.lengths(length.max_tokens, seed=0)
                batches = self._batches(index, documents)
                peaks = self._peaks(batches)
                seconds = self._seconds([b for b in batches if peaks[b.level]])
                group = [self._describe(batch.level, documents, lengths) for batch in batches]
                for batch, found in zip(batches, group, strict=True):
                    found.saved_bytes = saved[batch.level]
                    found.seconds = seconds.get(batch.level, [])
                    found.peak_bytes = peaks[batch.level] if found.fits else None
                yield group
        self.measured.clear()

    def measure(self, index: int, documents: Documents, repeats: int) -> Measurement:
        """One level, self.levels[index], alone: a warm-up, the peak, then `repeats` timed iterations.

        For a choice of rows under a time budget: policies do not take turns, and saved_bytes stays None.
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
        """One batch of length `index` for each policy: the same one at another level."""
        first = index * len(self.settings.policies)
        level = self.levels[first]
        lengths = documents.lengths(level.max_tokens, seed=0)
        (batch,) = random_batches([lengths], self.args, level, first, self.world.rank)
        if self.world.device.type == "cuda":
            batch = batch.pin_memory()
        return [dataclasses.replace(batch, level=first + k) for k in range(len(self.settings.policies))]

    def _saved_bytes(self) -> list[float | None]:
        """For each level what one layer under its policy keeps per token: the difference between two depths.

        Embedding, head and loss drop out of it. Measured before the whole model is built, which may leave no room.
        """
        config = copy.deepcopy(self.config)
        # Gathered parameters of a layer would count as what it keeps.
        config.parallelism.reshard_after_forward = True
        levels = [dataclasses.replace(level, ac_layers=None) for level in self.levels]
        held: list[list[int | None]] = []
        for depth in DEPTHS:
            measured = MeasuredEngine(config, dataclasses.replace(self.args, num_layers=depth), self.world, levels)
            batches = [
                b for k in range(len(self.settings.lengths)) for b in self._batches(k, self.settings.documents[0])
            ]
            held.append([measured.attempt(partial(_saved_for_backward, batch=batch)) for batch in batches])
            measured.clear()
        sizes = [level.max_tokens // level.cp_degree * (DEPTHS[1] - DEPTHS[0]) for level in self.levels]
        return [
            None if few is None or more is None else (more - few) / size
            for few, more, size in zip(*held, sizes, strict=True)
        ]

    def _peaks(self, batches: Sequence[PackedBatch]) -> dict[int, int | None]:
        """Peak memory by level, None where it does not suffice; with layers = 0 on as many layers as fit."""
        while True:
            peaks = {batch.level: self._peak(batch) for batch in batches}
            layers = self.measured.args.num_layers
            if self.settings.layers != 0 or None not in peaks.values() or layers == 1:
                return peaks
            self.measured.set_layers(layers // 2)

    def _peak(self, batch: PackedBatch) -> int | None:
        level = self.levels[batch.level]
        key = (level.ac_policy, level.ac_layers, self.measured.args.num_layers)
        if key in self.too_big:
            return None  # it did not fit at a shorter length
        peak = self.measured.peak_bytes(batch)
        if peak is None:
            self.too_big.add(key)
        return peak

    def _seconds(self, batches: list[PackedBatch]) -> dict[int, list[float]]:
        """Seconds of each timed iteration by level, round robin; the first round does not count.

        A level whose memory does not suffice after all is left out, so that the others' rounds stay comparable.
        """
        seconds: dict[int, list[float]] = {batch.level: [] for batch in batches}
        for number in range(self.settings.repeats + 1):
            timed = [batch for batch in batches if batch.level in seconds]
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
        sum_squared = int((lengths * lengths).sum())
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
            flops_ratio=_flops(args, level, sum_squared) / _flops(args, Level(level.max_tokens), sum_squared),
        )


def _saved_for_backward(engine: Engine, batch: PackedBatch) -> int:
    """Bytes that autograd keeps from a forward for its backward; a storage counts once, a freed one not at all.

    Counted by autograd's own hooks, because a CPU's allocation records miss what the threads of gloo release.
    """
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        objective, _ = engine.forward(batch)
    sizes = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in saved}
    saved.clear()
    objective.backward()
    engine.model.zero_grad()
    return sum(sizes.values())


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
    )
    return float(cost.cost(np.array(level.max_tokens), np.array(sum_squared)))


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
    ("seconds", 8),
    ("time / none", 18),
    ("FLOPs / none", 12),
)


def header() -> str:
    """The two lines above the rows."""
    rule = "|".join("-" * (width + 2) for _, width in COLUMNS)
    return f"{_line([name for name, _ in COLUMNS])}\n|{rule}|"


def rows(group: Sequence[Measurement], peak_flops: float | None) -> list[str]:
    """One line for each policy of a level. peak_flops: FLOP/s of a rank's device, None where it is not known."""
    base = next((m for m in group if m.ac_policy == "none"), None)
    return [_line(_cells(m, base, peak_flops)) for m in group]


def relative_times(found: Measurement, base: Measurement | None) -> tuple[float, float, float] | None:
    """(median, least, greatest) over the rounds of the time of `found` / `base`; None where one did not fit."""
    if base is None or not found.fits or not base.fits:
        return None
    ratios = [a / b for a, b in zip(found.seconds, base.seconds, strict=True)]
    return median(ratios), min(ratios), max(ratios)


def _cells(found: Measurement, base: Measurement | None, peak_flops: float | None) -> list[str]:
    policy = found.ac_policy if found.ac_layers is None else f"{found.ac_policy}:{found.ac_layers}"
    level = [found.model, str(found.layers), str(found.max_tokens), str(found.cp_degree), found.documents]
    level += ["on" if found.compile else "off", policy]
    saved = "-" if found.saved_bytes is None else f"{found.saved_bytes:,.0f}"
    flops_ratio = f"{found.flops_ratio:.2f}"
    if found.peak_bytes is None or not found.fits:
        return [*level, "out of memory", "", "", "", saved, "", "", flops_ratio]
    seconds = median(found.seconds)
    achieved = found.flops / seconds
    relative = relative_times(found, base)
    return [
        *level,
        f"{found.tokens / seconds:,.0f}",
        f"{achieved / 1e12:.3g}",
        f"{achieved / peak_flops:.1%}" if peak_flops else "-",
        f"{found.peak_bytes / 2**30:.3g}",
        saved,
        f"{seconds:.4g}",
        "-" if relative is None else "{:.2f} ({:.2f}-{:.2f})".format(*relative),
        flops_ratio,
    ]


def _line(cells: Sequence[str]) -> str:
    padded = (cell.ljust(width) for cell, (_, width) in zip(cells, COLUMNS, strict=True))
    return f"| {' | '.join(padded)} |"
