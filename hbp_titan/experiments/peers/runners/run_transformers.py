"""A plain training loop around a transformers model: DDP and AdamW.

Variants: rows "padded" (right-padded micro-batches in random order) or "packed" (whole samples, first-fit decreasing,
position_ids that restart, no mask: transformers builds the block mask). normalization "tokens" (mean over the trained
tokens of the optimizer step, by num_items_in_batch) or "micro_batches" (mean of the micro-batches' means, the loop of
many tutorials).
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, AutoTokenizer

from .hf_trainer import versions
from .protocol import IGNORE_INDEX, Request, Result, read_request, write_result
from .recording import Recorder

MicroBatch = list[int]
"""Numbers of its samples."""


def steps_of(request: Request, lengths: Sequence[int], world_size: int) -> list[list[list[MicroBatch]]]:
    """Return the micro-batches of one epoch, [steps][ranks][micro-batches]; each sample once, at least one per rank."""
    rng = np.random.default_rng(request.seed)
    if request.variant["rows"] == "packed":
        groups = first_fit_decreasing(lengths, request.max_tokens)
        groups = [groups[i] for i in rng.permutation(len(groups))]
        per_step = request.packs_per_step(world_size) * world_size
    else:
        order, rows = rng.permutation(len(lengths)).tolist(), request.micro_batch_rows
        groups = [order[i : i + rows] for i in range(0, len(order), rows)]
        per_step = request.micro_batches_per_step(world_size) * world_size
    starts = list(range(0, len(groups), per_step))
    # A last step with fewer micro-batches than ranks joins the one before it.
    if len(starts) > 1 and len(groups) - starts[-1] < world_size:
        del starts[-1]
    if len(groups) < world_size:
        raise ValueError(f"{request.train}: {len(groups)} micro-batches for {world_size} ranks; use more samples")
    steps = [groups[a:b] for a, b in zip(starts, [*starts[1:], len(groups)], strict=True)]
    return [[step[rank::world_size] for rank in range(world_size)] for step in steps]


def first_fit_decreasing(lengths: Sequence[int], max_tokens: int) -> list[MicroBatch]:
    """Return packs of at most `max_tokens` tokens, the longest samples first."""
    packs: list[MicroBatch] = []
    free: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = next((k for k, room in enumerate(free) if room >= lengths[number]), None)
        if place is None:
            packs.append([])
            free.append(max_tokens)
            place = len(packs) - 1
        packs[place].append(number)
        free[place] -= lengths[number]
    return packs


def tensors(samples: Sequence[dict[str, Any]], packed: bool, pad_id: int, device: torch.device) -> dict[str, Tensor]:
    """Return the arguments of the model for one micro-batch: [1, T] packed or [B, T] right-padded."""
    ids = [torch.tensor(sample["input_ids"]) for sample in samples]
    labels = [torch.tensor(sample["labels"]) for sample in samples]
    if packed:
        for row in labels:
            # The model predicts it from the last token of the sample before.
            row[0] = IGNORE_INDEX
        positions = torch.cat([torch.arange(len(row)) for row in ids])
        batch = {"input_ids": torch.cat(ids), "labels": torch.cat(labels), "position_ids": positions}
        return {name: row[None].to(device) for name, row in batch.items()}
    pad = nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(ids, batch_first=True, padding_value=pad_id).to(device),
        "labels": pad(labels, batch_first=True, padding_value=IGNORE_INDEX).to(device),
        "attention_mask": pad([torch.ones_like(row) for row in ids], batch_first=True).to(device),
    }


class Loop:
    """The model, its optimizer, and one optimizer step."""

    def __init__(self, request: Request, device: torch.device, world_size: int) -> None:
        self.request, self.device, self.world_size = request, device, world_size
        attention = request.variant.get("attention", "sdpa")
        model: Any = AutoModelForCausalLM.from_pretrained(
            request.model, dtype=torch.float32, attn_implementation=attention
        )
        self.model = model.to(device)
        self.model.train()
        self.wrapped = DistributedDataParallel(self.model) if world_size > 1 else self.model
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        vectors = [p for p in self.model.parameters() if p.ndim <= 1]
        groups = [
            {"params": matrices, "weight_decay": request.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        betas = (request.beta1, request.beta2)
        self.optimizer = torch.optim.AdamW(groups, lr=request.lr, betas=betas, eps=request.eps, fused=True)
        self.pad_id = getattr(self.model.config, "pad_token_id", None) or 0

    def step(self, samples: Sequence[dict[str, Any]], micro_batches: Sequence[MicroBatch]) -> tuple[float, float]:
        """Train one optimizer step; return the loss, the mean over the ranks, and the gradient norm."""
        by_tokens = self.request.variant["normalization"] == "tokens"
        batches = [
            tensors([samples[i] for i in numbers], self.request.variant["rows"] == "packed", self.pad_id, self.device)
            for numbers in micro_batches
        ]
        # Only labels with a token before them are trained.
        count = torch.tensor(sum(int((batch["labels"][:, 1:] != IGNORE_INDEX).sum()) for batch in batches)).to(
            self.device
        )
        if self.world_size > 1:
            dist.all_reduce(count)
        total = torch.zeros((), device=self.device)
        for number, batch in enumerate(batches):
            # DDP averages over the ranks, so each of them divides by its share of the tokens.
            scale = {"num_items_in_batch": count / self.world_size} if by_tokens else {}
            last = number + 1 == len(batches)
            with contextlib.nullcontext() if last or self.world_size == 1 else self.wrapped.no_sync():
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.request.dtype == "bfloat16"):
                    loss = self.wrapped(**batch, **scale, use_cache=False).loss
                loss = loss if by_tokens else loss / len(batches)
                loss.backward()
            total += loss.detach()
        if self.world_size > 1:
            dist.all_reduce(total)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.request.max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(total) / self.world_size, float(norm)

    def logits(self, arguments: dict[str, Any]) -> Tensor:
        """Return the logits [B, T, V] for the arguments of a recorded forward."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.request.dtype == "bfloat16"):
            return self.model(**arguments).logits


def main(request: Request) -> None:
    """Train as the request says."""
    world_size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    device = torch.device(request.device, *([int(os.environ["LOCAL_RANK"])] if request.device == "cuda" else []))
    if world_size > 1:
        dist.init_process_group("nccl" if request.device == "cuda" else "gloo")
    samples = request.samples()
    steps = steps_of(request, [len(sample["input_ids"]) for sample in samples], world_size)
    total = request.steps or len(steps)
    loop, recorder = Loop(request, device, world_size), Recorder()
    recorder.attach(loop.model)
    result = Result(versions=versions(), settings=dict(request.variant), world_size=world_size)
    recorder.start()
    for number in range(total):
        # More steps than an epoch has: the next one, in the same order.
        loss, norm = loop.step(samples, steps[number % len(steps)][rank])
        recorder.end_step()
        result.losses.append(loss)
        result.grad_norms.append(norm)
        result.lrs.append(request.lr)
    recorder.enabled = False
    recorder.probe(loop.logits, request.probe_tokens, loop.model.config.vocab_size)
    recorder.save(request.folder, rank)
    if rank == 0:
        result.weights = str(request.folder / "model")
        loop.model.save_pretrained(result.weights)
        AutoTokenizer.from_pretrained(request.model).save_pretrained(result.weights)
        write_result(request.folder, result)
    if world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(read_request(sys.argv[1]))
