"""The planner in transformers' Trainer: each micro-batch is one balanced pack, its documents apart by position_ids.

    python -m hbp_titan.experiments.examples.transformers_trainer
    torchrun --nproc_per_node 2 -m hbp_titan.experiments.examples.transformers_trainer

Trains a tiny Llama on random tokens. Copy PackedTrainer and SetEpoch; the rest stands for your model and data.
Trainer divides by the trained tokens of all ranks in the optimizer step, so the loss does not depend on the packs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import DataCollatorWithFlattening, LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback
from transformers import TrainingArguments as Arguments

from hbp_titan.packing.sampler import HBPBatchSampler


class PackedTrainer(Trainer):
    """A Trainer that trains the packs of a sampler for its rank."""

    def __init__(self, *, sampler: HBPBatchSampler, **options: Any) -> None:
        # With FlashAttention: return_flash_attn_kwargs=True. Other kernels get a mask of [T, T].
        super().__init__(data_collator=DataCollatorWithFlattening(), callbacks=[SetEpoch(sampler)], **options)
        self.sampler = sampler

    def get_train_dataloader(self) -> DataLoader[Any]:
        # Not prepared by accelerate, which would distribute this rank's packs over all ranks once more.
        rows: Any = self.train_dataset
        workers = self.args.dataloader_num_workers
        return DataLoader(rows, batch_sampler=self.sampler, collate_fn=self.data_collator, num_workers=workers)


class SetEpoch(TrainerCallback):
    """Plans the epoch that begins, or in which training resumes: Trainer then skips the packs that were trained."""

    def __init__(self, sampler: HBPBatchSampler) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.sampler.set_epoch(int(state.epoch))


def main() -> None:
    """Train one epoch."""
    # Without use_cpu, ranks without a GPU would not find each other, and each would train everything.
    args = Arguments("outputs/planner_example", num_train_epochs=1, gradient_accumulation_steps=4, logging_steps=1,
                     use_cpu=not torch.cuda.is_available(), report_to=[], save_strategy="no")  # fmt: skip
    rng = np.random.default_rng(0)
    rows = [{"input_ids": rng.integers(0, 256, size).tolist()} for size in rng.integers(8, 400, size=400)]
    lengths = [len(row["input_ids"]) for row in rows]
    sampler = HBPBatchSampler(lengths, "1024", rank=args.process_index, world_size=args.world_size,
                              micro_batches_per_step=args.gradient_accumulation_steps)  # fmt: skip
    sizes: dict[str, Any] = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4))
    PackedTrainer(model=model, args=args, train_dataset=rows, sampler=sampler).train()


if __name__ == "__main__":
    main()
