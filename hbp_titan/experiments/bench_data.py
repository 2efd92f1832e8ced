"""Speed of the data path: from token store to batches, and from text to token store, each next to a lower bound.

Owns the two measurements. The lower bound of the loader is a plain copy of the same samples' tokens and masks out of
the memory map; that of the preparation is `tokenizers.encode_batch` on the same rendered texts and cores.
"""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from hbp_titan.config import JobConfig
from hbp_titan.data.batch import SampleSource
from hbp_titan.data.loader import BatchShapes, PackLoader, PlanDataset
from hbp_titan.data.prepare import prepare
from hbp_titan.data.token_store import TokenStore
from hbp_titan.data.tokenizer import read_tokenizer_folder
from hbp_titan.packing import Plan

TEXTS_AT_A_TIME = 1000
"""Texts per encode_batch: enough for every core, with encodings that stay small in memory."""

PREFETCH_FACTOR = 4


@dataclass(frozen=True)
class Speed:
    """Tokens of one round, and the seconds of each round."""

    name: str
    tokens: int
    seconds: list[float]

    @property
    def tokens_per_second(self) -> float:
        """Return the tokens per second of the median round."""
        return self.tokens / median(self.seconds)


def loader_speeds(
    plan: Plan, store: SampleSource, shapes: BatchShapes, workers: Sequence[int], rounds: int
) -> list[Speed]:
    """Measure rank 0 over the whole plan: the copy, batches in process, and the loader; methods alternate.

    The time of a loader with workers begins when its prefetched batches are used up: that is its sustained speed.
    """
    dataset = PlanDataset(plan, store, 0, shapes)
    tokens = [int(plan.lengths[plan.pack(i, 0)].sum()) for i in range(plan.num_iterations)]
    # At most half of the plan, so that the timed part is not empty.
    ready = {count: min(count * PREFETCH_FACTOR, plan.num_iterations // 2) for count in workers}

    def copy() -> float:
        start = time.perf_counter()
        for micro_batch in range(plan.num_iterations):
            for index in plan.pack(micro_batch, 0).tolist():
                for array in store.sample(index):
                    # A copy: the sample itself is a view of the memory map.
                    np.array(array)
        return time.perf_counter() - start

    def batches() -> float:
        start = time.perf_counter()
        for micro_batch in range(plan.num_iterations):
            dataset[micro_batch]
        return time.perf_counter() - start

    def load(count: int) -> float:
        loader = iter(PackLoader(plan, store, 0, shapes, num_workers=count, prefetch_factor=PREFETCH_FACTOR))
        for _ in itertools.islice(loader, ready[count]):
            pass
        start = time.perf_counter()
        for _ in loader:
            pass
        return time.perf_counter() - start

    methods: dict[str, tuple[int, Callable[[], float]]] = {
        "plain copy of tokens and masks": (sum(tokens), copy),
        "batches, in process": (sum(tokens), batches),
    }
    for count in workers:
        name = f"loader, {count} worker{'' if count == 1 else 's'}"
        methods[name] = sum(tokens[ready[count] :]), lambda count=count: load(count)  # type: ignore[misc]
    copy()  # reads the pages of the store into memory
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(rounds):
        for name, (_, run) in methods.items():
            seconds[name].append(run())
    return [Speed(name, methods[name][0], taken) for name, taken in seconds.items()]


def preparation_speeds(config: JobConfig, cores: int, rounds: int) -> list[Speed]:
    """Measure encode_batch on the rendered texts, and the preparation of the training data into an empty cache.

    Samples of any length are kept, also those that training would skip.
    """
    with tempfile.TemporaryDirectory() as folder:
        seconds = []
        for number in range(rounds):
            cache = Path(folder) / str(number)
            data = dataclasses.replace(
                config.data, cache_folder=str(cache), num_proc=cores, validation_files=[], validation_sources=[]
            )
            start = time.perf_counter()
            store, _ = prepare(dataclasses.replace(config, data=data), progress=False, max_sample_tokens=1 << 40)
            seconds.append(time.perf_counter() - start)
        tokens = int(TokenStore.open(store).lengths.sum())
        # In a new process: the number of threads is fixed when a process first encodes.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            bare = pool.submit(_encode_texts, store, config.tokenizer_path, cores, rounds).result()
    return [bare, Speed("preparation, whole", tokens, seconds)]


def _encode_texts(store_folder: Path, tokenizer_path: Path, cores: int, rounds: int) -> Speed:
    # The tokenizers library reads both at its first encoding.
    os.environ["RAYON_NUM_THREADS"] = str(cores)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    tokenizer = read_tokenizer_folder(tokenizer_path).load()
    store = TokenStore.open(store_folder)
    texts = [
        # The rendered texts are not stored, but their tokens decode to them.
        tokenizer.decode(store.sample(index)[0].tolist(), skip_special_tokens=False)
        for index in range(len(store))
    ]
    seconds = []
    for _ in range(rounds):
        tokens = 0
        start = time.perf_counter()
        for first in range(0, len(texts), TEXTS_AT_A_TIME):
            encodings = tokenizer.encode_batch(texts[first : first + TEXTS_AT_A_TIME], add_special_tokens=False)
            tokens += sum(map(len, encodings))
        seconds.append(time.perf_counter() - start)
    return Speed("encode_batch on the same texts", tokens, seconds)


def table(speeds: Sequence[Speed]) -> str:
    """Return Markdown rows; the first is the lower bound that the others are compared with."""
    columns = ("", "tokens", "seconds", "tokens/s", "share of the first")
    rows = [
        (
            speed.name,
            f"{speed.tokens:,}",
            f"{median(speed.seconds):.4g} ({min(speed.seconds):.4g}-{max(speed.seconds):.4g})",
            f"{speed.tokens_per_second:,.0f}",
            f"{speed.tokens_per_second / speeds[0].tokens_per_second:.2g}",
        )
        for speed in speeds
    ]
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    rule = tuple("-" * width for width in widths)
    return "\n".join(
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))} |"
        for cells in (columns, rule, *rows)
    )
