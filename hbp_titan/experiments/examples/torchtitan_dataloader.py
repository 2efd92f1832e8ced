"""The planner as torchtitan's dataloader: each batch is one balanced pack, padded to the length of its level.

    dataloader=PackedDataLoader.Config(samples=my_samples, levels="16384,131072")     in a torchtitan Trainer.Config

my_samples(tokenizer) returns (tokens, labels) of each sample. training.local_batch_size is 1, training.seq_len the
largest level, and the model has FlexAttention or varlen attention, whose masks follow the positions. Epochs follow each
other. Ranks of a context-parallel group have one dp_rank, hence one pack. torchtitan divides by the valid tokens of all
ranks in the optimizer step, so the loss does not depend on the packs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch.utils.data import Dataset
from torchtitan.components.dataloader import ParallelAwareDataloader
from torchtitan.components.loss import IGNORE_INDEX

from hbp_titan.packing.sampler import HBPBatchSampler, PackIndices

Samples = Sequence[tuple[Sequence[int], Sequence[int]]]
"""Tokens [n] and labels [n] of each sample; labels[i] is what tokens[i] predicts, or IGNORE_INDEX."""
Batch = tuple[dict[str, torch.Tensor], torch.Tensor]


class Packs(Dataset[Batch]):
    """Packs by their sample ids: input, positions and labels, int64 [1, max_tokens of the level]."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __getitems__(self, pack: PackIndices) -> list[Batch]:
        samples = [self.samples[index] for index in pack]
        padding = pack.max_tokens - sum(len(tokens) for tokens, _ in samples)
        tokens = [token for own, _ in samples for token in own] + [0] * padding
        labels = [label for _, own in samples for label in own] + [IGNORE_INDEX] * padding
        # Padding is cut into documents as well: attention within one long document would cost more.
        lengths = [torch.arange(len(own)) for own, _ in samples] + [torch.arange(padding) % 1024]
        inputs = {"input": torch.tensor(tokens)[None], "positions": torch.cat(lengths)[None]}
        return [(inputs, torch.tensor(labels)[None])]


class PackedDataLoader(ParallelAwareDataloader):
    """Dataloader of a torchtitan Trainer. Its checkpoint has the position in the epoch."""

    @dataclass(kw_only=True, slots=True)
    class Config(ParallelAwareDataloader.Config):
        samples: Callable[[Any], Samples]
        levels: str = ""
        seed: int = 0

    def __init__(self, config: Config, *, dp_world_size: int, dp_rank: int, tokenizer: Any, seq_len: int,
                 local_batch_size: int, snapshot_every_n_steps: int | None = 1) -> None:  # fmt: skip
        if local_batch_size != 1:
            raise ValueError(f"training.local_batch_size={local_batch_size} must be 1: a batch is one pack")
        samples = config.samples(tokenizer)
        sampler = HBPBatchSampler([len(tokens) for tokens, _ in samples], config.levels or str(seq_len), rank=dp_rank,
                                  world_size=dp_world_size, seed=config.seed)  # fmt: skip
        options = {name: getattr(config, name) for name in ("num_workers", "persistent_workers", "pin_memory",
                                                            "prefetch_factor")}  # fmt: skip
        super().__init__(Packs(samples), dp_rank, dp_world_size, batch_sampler=sampler, collate_fn=itemgetter(0),
                         snapshot_every_n_steps=snapshot_every_n_steps, **options)  # fmt: skip

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield from super().__iter__()
            self.batch_sampler.set_epoch(self.batch_sampler.epoch + 1)
