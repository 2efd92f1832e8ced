"""The planner in other trainers: examples of docs/planner.md with the real trainers, against losses without packs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hbp_titan.distributed.world import World
from hbp_titan.packing.sampler import HBPBatchSampler
from hbp_titan.testing.local_ranks import run_distributed

ROWS = [
    # The first token names the row.
    {"input_ids": [number, *np.random.default_rng(number).integers(0, 64, size - 1).tolist()]}
    for number, size in enumerate(np.random.default_rng(0).integers(4, 60, size=40).tolist())
]
EPOCHS, STEP = 2, 3


def _train(folder: Path, resume: bool = False, **options: Any) -> tuple[list[list[int]], list[float], Any]:
    """Train with PackedTrainer; return the rows of each micro-batch of this rank, the loss of each step, the model."""
    from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

    from hbp_titan.experiments.examples.transformers_trainer import PackedTrainer

    options |= {"gradient_accumulation_steps": STEP, "lr_scheduler_type": "constant", "logging_steps": 1}
    args = TrainingArguments(str(folder), num_train_epochs=EPOCHS, report_to=[], use_cpu=True, **options)
    lengths = [len(row["input_ids"]) for row in ROWS]
    ranks = {"rank": args.process_index, "world_size": args.world_size}
    sampler = HBPBatchSampler(lengths, "64,128", **ranks, micro_batches_per_step=STEP)
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))
    trainer = PackedTrainer(model=model, args=args, train_dataset=ROWS, sampler=sampler)
    seen: list[list[int]] = []
    collate = trainer.data_collator

    def recorded(rows: list[dict[str, Any]]) -> dict[str, Any]:
        seen.append([row["input_ids"][0] for row in rows])
        return collate(rows)

    trainer.data_collator = recorded
    trainer.train(resume_from_checkpoint=resume)
    return seen, [row["loss"] for row in trainer.state.log_history if "loss" in row], trainer.model


def _rank(world: World, folder: str) -> tuple[list[list[int]], list[float]]:
    # accelerate demands an address, although the processes have found each other.
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    # lr 0 keeps the model, so that the losses of all steps can be compared.
    return _train(Path(folder), learning_rate=0.0, save_strategy="no")[:2]


def _steps(ranks: list[list[list[int]]]) -> Iterator[list[int]]:
    """Yield the rows of each optimizer step: STEP micro-batches of every rank, fewer at the end of an epoch."""
    per_epoch = len(ranks[0]) // EPOCHS
    for epoch in range(EPOCHS):
        for start in range(0, per_epoch, STEP):
            places = range(epoch * per_epoch + start, epoch * per_epoch + min(start + STEP, per_epoch))
            yield [row for seen in ranks for place in places for row in seen[place]]


def _check(ranks: list[list[list[int]]], losses: list[float], model: Any) -> None:
    per_epoch = len(ranks[0]) // EPOCHS
    epochs = [[pack for seen in ranks for pack in seen[e * per_epoch : (e + 1) * per_epoch]] for e in range(EPOCHS)]
    for packs in epochs:
        assert sorted(row for pack in packs for row in pack) == list(range(len(ROWS)))
    assert epochs[0] != epochs[1]
    alone = []
    for row in ROWS:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            alone.append((model(input_ids=ids, labels=ids).loss.item() * (ids.numel() - 1), ids.numel() - 1))
    expected = [np.sum([alone[row] for row in rows], axis=0) for rows in _steps(ranks)]
    np.testing.assert_allclose(losses, [total / count for total, count in expected], rtol=1e-4)


@pytest.mark.slow
def test_trainer_trains_each_row_once_per_epoch_with_the_loss_of_single_rows(tmp_path: Path) -> None:
    seen, losses, model = _train(tmp_path, learning_rate=0.0, save_strategy="no")
    _check([seen], losses, model)
    ranks = run_distributed(_rank, 2, str(tmp_path))
    assert ranks[0][1] == ranks[1][1]
    _check([seen for seen, _ in ranks], ranks[0][1], model)


@pytest.mark.slow
def test_trainer_resumes_in_the_middle_of_the_second_epoch(tmp_path: Path) -> None:
    whole, losses, _ = _train(tmp_path / "whole", save_strategy="no")
    per_epoch = len(whole) // EPOCHS
    steps = -(-per_epoch // STEP)
    _train(tmp_path / "run", max_steps=steps + 2, save_strategy="steps", save_steps=steps + 2)
    again, resumed, _ = _train(tmp_path / "run", resume=True, save_strategy="no")
    assert again == whole[per_epoch + 2 * STEP :]
    assert resumed[-len(losses[steps + 2 :]) :] == pytest.approx(losses[steps + 2 :], rel=1e-5)


def test_torchtitan_dataloader_loops_over_epochs_and_resumes_within_one() -> None:
    pytest.importorskip(
        "torchtitan",
        reason="needs torchtitan; run: .venv/bin/pip install torchtitan && scripts/run_tests.sh tests/experiments",
    )
    from hbp_titan.experiments.examples.torchtitan_dataloader import PackedDataLoader

    lengths = [len(row["input_ids"]) for row in ROWS]
    samples = [
        (row["input_ids"], [number] * size) for (number, row), size in zip(enumerate(ROWS), lengths, strict=True)
    ]

    def loader(rank: int, num_workers: int = 0) -> Any:
        config = PackedDataLoader.Config(samples=lambda tokenizer: samples, levels="64,128", num_workers=num_workers)
        return config.build(dp_world_size=2, dp_rank=rank, tokenizer=None, seq_len=128, local_batch_size=1)

    for num_workers in (0, 1):
        loaders = [loader(rank, num_workers) for rank in range(2)]
        batches = [batch for own in loaders for batch, _ in zip(iter(own), range(len(own)), strict=False)]
        for inputs, labels in batches:
            assert inputs["input"].shape == inputs["positions"].shape == labels.shape
            assert labels.shape[1] in (64, 128)
            # One document per sample, then padding.
            documents = torch.tensor_split(labels[0], torch.nonzero(inputs["positions"][0] == 0).flatten()[1:].tolist())
            assert all(len(own.unique()) == 1 for own in documents)
        trained = torch.cat([labels[labels >= 0] for _, labels in batches])
        assert torch.bincount(trained).tolist() == lengths
    first = iter(own := loader(0))
    for _ in range(len(own) + 3):
        next(first)
    state = own.state_dict()
    (second := loader(0)).load_state_dict(state)
    for (_, labels), (_, again), _ in zip(first, second, range(len(own)), strict=False):
        assert labels.tolist() == again.tolist()
    with pytest.raises(ValueError, match="local_batch_size"):
        PackedDataLoader.Config(samples=lambda tokenizer: samples).build(
            dp_world_size=1, dp_rank=0, tokenizer=None, seq_len=128, local_batch_size=2
        )
