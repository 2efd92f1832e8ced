"""hbp_titan as a peer: the real Trainer, started by hbp_titan.launch, with the recorder of the other peers.

    python -m hbp_titan.launch --nproc-per-node 2 -m hbp_titan.experiments.peers.ours REQUEST.json

Variants: method and levels as packing.method and --levels. A rank records its shard of every pack; with context
parallelism the shards of a pack are joined by document and position when they are compared.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hbp_titan import errors
from hbp_titan.config import JobConfig, load_config
from hbp_titan.data.batch import PackedBatch
from hbp_titan.distributed.fsdp import reshard
from hbp_titan.distributed.world import World, close_world, init_world
from hbp_titan.experiments.peers.runners.protocol import Request, Result, read_request, write_result
from hbp_titan.experiments.peers.runners.recording import PADDING, Recorder
from hbp_titan.packing import Plan
from hbp_titan.train import Trainer


def arguments(request: Request) -> list[str]:
    """Return the command line of the run."""
    return [
        f"--model.hf_path={request.model}",
        f"--data.train_files={request.train}",
        f"--data.cache_folder={request.folder.parent / 'cache'}",
        f"--job.dump_folder={request.folder / 'run'}",
        f"--levels={request.variant['levels']}",
        f"--packing.method={request.variant['method']}",
        f"--training.global_batch_tokens={request.global_batch_tokens}",
        f"--training.seed={request.seed}",
        f"--training.max_norm={request.max_norm}",
        *([f"--training.steps={request.steps}"] if request.steps else ["--training.epochs=1"]),
        f"--optimizer.lr={request.lr}",
        f"--optimizer.beta1={request.beta1}",
        f"--optimizer.beta2={request.beta2}",
        f"--optimizer.eps={request.eps}",
        f"--optimizer.weight_decay={request.weight_decay}",
        "--lr_scheduler.warmup_steps=0",
        "--lr_scheduler.decay=constant",
        f"--data.num_workers={0 if request.device == 'cpu' else 2}",
        "--checkpoint.enable=false",
        "--checkpoint.export_dtype=float32",
        "--metrics.enable_tensorboard=false",
        "--metrics.progress_bar=false",
        "--metrics.report=false",
        "--packing.print_comparison=false",
        *request.variant.get("overrides", []),
    ]


class RecordedTrainer(Trainer):
    """A Trainer that records what its model gets during optimizer steps; everything else is the trainer's own."""

    def __init__(self, config: JobConfig, world: World) -> None:
        super().__init__(config, world)
        self.recorder = Recorder(labels_shifted=True, spans_ranks=True)
        self.recorder.enabled = False  # the warm-up trains nothing
        self.probed: PackedBatch | None = None
        self._batch: PackedBatch | None = None
        self.model.register_forward_pre_hook(self._hook)
        forward_backward = self.engine.forward_backward

        def recorded(batch: PackedBatch, last: bool = True) -> Tensor:
            self._batch = batch
            return forward_backward(batch, last)

        self.engine.forward_backward = recorded  # type: ignore[method-assign]

    def train_step(self, plan: Plan, step: int, batches: Iterator[PackedBatch]) -> Callable[[], dict[str, Any]]:
        if not self.recorder.marks:
            self.recorder.start()
        self.recorder.enabled = True
        record = super().train_step(plan, step, batches)
        self.recorder.end_step()
        self.recorder.enabled = False
        return record

    def _hook(self, module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        """Record the arguments of the model, with the labels of their batch; the level names the cp group."""
        batch = self._batch
        if not self.recorder.enabled or batch is None:
            return
        ids_T, positions_T = args[:2]
        documents_T = documents_of(batch).to(ids_T.device)
        # Ranks of a cp group hold one pack: its row is the same on all of them.
        row = self.world.rank // self.engine.runtime.levels[batch.level].cp_degree
        parts = (ids_T, batch.labels.to(ids_T.device), documents_T, positions_T)
        ids_1T, labels_1T, documents_1T, positions_1T = (part[None] for part in parts)
        self.recorder.add(ids_1T, labels_1T, documents_1T, positions_1T, row=row)
        # By the level, which is the same on all ranks: the shortest one has the most documents.
        if not self.recorder.steps and (self.probed is None or batch.level < self.probed.level):
            self.probed = batch

    @torch.no_grad()
    def probe(self, probe_tokens: int) -> None:
        """Run the document probe of the recorder on a pack of the first step, each rank on its own. A collective."""
        assert self.probed is not None
        batch = self.probed.to(self.device)
        first_T = (documents_of(batch).to(self.device) == 0) & (batch.position_ids < probe_tokens)
        vocab_size = self.args.vocab_size
        changed_T = torch.where(first_T, (batch.input_ids + vocab_size // 2) % vocab_size, batch.input_ids)
        self.engine.runtime.activate(batch.level)
        before, after = (
            self.model(ids_T, batch.position_ids, batch.documents, lambda hidden_TH, weight_VH: hidden_TH @ weight_VH.T)
            for ids_T in (batch.input_ids, changed_T)
        )
        reshard(self.model)
        delta_T = (after.float() - before.float()).abs().amax(-1)
        ids_1T, documents_1T, positions_1T = batch.input_ids[None], documents_of(batch)[None], batch.position_ids[None]
        self.recorder.set_probe(delta_T[None], documents_1T, positions_1T, ids_1T)


def documents_of(batch: PackedBatch) -> Tensor:
    """Return the number of each token's document in its pack, int64 [S]; padding is PADDING."""
    documents_S = batch.document_ids
    return documents_S.masked_fill(documents_S >= len(batch.sample_ids), PADDING)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the steps in metrics.jsonl of a run folder."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if "loss" in row and "step" in row]


def main(argv: list[str]) -> None:
    """Train as the request says; write what the other runners write."""
    request = read_request(argv[0])
    config = load_config(arguments(request))
    world = init_world(config.parallelism.init_timeout_seconds, config.dump_folder)
    with errors.report_first_error(world.rank, lambda: "peers"):
        trainer = RecordedTrainer(config, world)
        trainer.train()
        trainer.probe(request.probe_tokens)
        trainer.recorder.save(request.folder, world.rank)
        if world.rank == 0:
            steps = read_metrics(config.dump_folder)
            write_result(
                request.folder,
                Result(
                    versions={name: importlib.metadata.version(name) for name in ("torch", "hbp-titan")},
                    settings={**request.variant, "levels": [dataclasses.asdict(level) for level in config.levels]},
                    losses=[step["loss"] for step in steps],
                    grad_norms=[step["grad_norm"] for step in steps],
                    lrs=[step["lr"] for step in steps],
                    world_size=world.size,
                    weights=str(config.dump_folder / "hf"),
                ),
            )
    close_world()


if __name__ == "__main__":
    main(sys.argv[1:])
