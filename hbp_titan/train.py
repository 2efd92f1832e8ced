"""The training loop: `torchrun -m hbp_titan.train --job.config_file X.toml`, readable from top to bottom.

Owns the order of things: world, data, plan, model, optimizer, checkpoint; then one optimizer step after another,
each of one or more iterations, each iteration of one level on all ranks (design after torchtitan v0.2.2 train.py).
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

from hbp_titan.cli import guarded
from hbp_titan.components.adapter import check_adapter, describe_adapter
from hbp_titan.components.checkpoint import Checkpointer
from hbp_titan.components.metrics import MetricsLogger
from hbp_titan.components.model_state import export_adapter, export_hf
from hbp_titan.components.normalizer import NORMALIZERS
from hbp_titan.components.optimizer import build_lr_scheduler, build_optimizer, clip_grad_norm
from hbp_titan.components.preemption import Preempted, Preemption
from hbp_titan.components.profiling import profiled_step
from hbp_titan.components.step_record import StepMeasurements, StepRecorder
from hbp_titan.components.summary import (
    compare_methods,
    describe_lora,
    describe_plan,
    describe_totals,
    describe_wait,
    level_name,
)
from hbp_titan.components.validation import Validator
from hbp_titan.config import JobConfig, help_text, load_config, to_toml
from hbp_titan.data.audit import confirm_epoch, plan_path
from hbp_titan.data.batch import PackedBatch
from hbp_titan.data.consumed import ConsumedRecord, attempt_folders
from hbp_titan.data.loader import BatchShapes, PackLoader, PlanDataset
from hbp_titan.data.planning import EpochPlans
from hbp_titan.data.store.prepare import open_stores
from hbp_titan.data.store.team import Team
from hbp_titan.data.store.token_store import TokenStore
from hbp_titan.distributed.mesh import nodes_crossed
from hbp_titan.distributed.parallelize import DTYPES, compute_dtype
from hbp_titan.distributed.world import (
    World,
    all_reduce_values,
    close_world,
    gather_values,
    init_world,
    ranks_per_node,
    set_timeouts,
)
from hbp_titan.levels.engine import Engine
from hbp_titan.levels.live_check import LiveCheck
from hbp_titan.models.attention import selected_backend
from hbp_titan.models.registry import num_params
from hbp_titan.packing import Plan
from hbp_titan.packing.plan_file import load_plan, save_plan
from hbp_titan.preflight import check, cost_model, model_args, most_tokens, token_ids
from hbp_titan.selection.auto import load_level_times, resolve_levels


class Trainer:
    """Everything that a run needs, made in the order in which it depends on what came before."""

    def __init__(self, config: JobConfig, world: World) -> None:
        self.config = config
        self.world = world
        self.device = world.device
        self.folder = config.dump_folder
        self.prints = world.rank == int(os.environ.get("LOG_RANK", "0"))
        torch.manual_seed(config.training.seed)
        torch.use_deterministic_algorithms(config.training.deterministic)

        # Data and plan: all ranks prepare, each its share, and find the others' on the shared file system.
        self.args = model_args(config)
        self.store, held_out = self._open_stores()
        check(config, world.size, self.device, self.args, self.store)
        cost = cost_model(self.args, frozen=config.lora.rank > 0)
        if config.selects_levels:
            resolve_levels(config, self.args, world, cost, [self.store, *filter(None, [held_out])], self._print)
            check(config, world.size, self.device, self.args, self.store)
        self.token_ids = token_ids(config, self.store)
        self.plans = EpochPlans(config, self.store, world.size, cost)
        self.total_steps = self.plans.total_steps()
        self.shapes = BatchShapes.of(self.plans.of(0), self.args.num_kv_heads)
        self.validator = None
        if config.validation.enable and held_out:
            plan = EpochPlans(config, held_out, world.size, cost).of(0)
            self.shapes = self.shapes.covering(plan)
            self.validator = Validator(PlanDataset(plan, held_out, world.rank, self.shapes), world)

        self.engine = Engine(config, self.args, world)
        self.model = self.engine.model
        self.optimizer = build_optimizer(self.model, config.optimizer)
        self.lr_scheduler = build_lr_scheduler(self.optimizer, config.lr_scheduler, self.total_steps)

        # Position: the whole of what a resumed run needs beside tensors.
        self.step = 0
        self.epoch = 0
        self.step_in_epoch = 0
        self.adapter = describe_adapter(config, self.model)
        self.checkpointer = Checkpointer(
            self.folder / "checkpoint",
            self.model,
            self.optimizer,
            config.checkpoint,
            check=lambda state, path: check_adapter(state.get("lora"), self.adapter, path),
        )
        times = load_level_times(self.folder, config.levels)
        self.live_check = LiveCheck(self.model, world, times, config.metrics.live_check_interval)
        self.normalizer = NORMALIZERS[config.training.normalizer]
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        self.recorder = StepRecorder(
            self.args, self.plans.of(0), self.device, self.normalizer, self.store, trained if self.adapter else 0
        )
        self.consumed = ConsumedRecord(self.folder, world.rank, config.levels)
        self.preemption = Preemption(self.folder, config.checkpoint.enable)
        self.signal = 0  # the one that any rank had got when the last step ended
        self._resume()

    def _open_stores(self) -> tuple[TokenStore, TokenStore | None]:
        team = Team(self.world.rank, self.world.size, gather_values)
        stores = open_stores(self.config, most_tokens(self.config, self.args), team)
        return stores[0], stores[1] if len(stores) == 2 else None

    def train(self) -> None:
        """Run from the current step to the last; then export."""
        self._announce()
        if self.step >= self.total_steps:
            self._print(f"{self.folder} is complete at step {self.step}; another --job.dump_folder trains anew")
            if not (self.folder / "hf").exists():
                self._export()
            return
        self.checkpointer.require_optimizer()
        metrics_config = self.config.metrics
        with MetricsLogger(
            self.folder,
            self.prints,
            self.step,
            self.total_steps,
            log_interval=metrics_config.log_interval,
            tensorboard=metrics_config.enable_tensorboard,
            progress_bar=metrics_config.progress_bar,
        ) as metrics:
            self._probe_levels()
            if self.prints:
                self.preemption.clear()
            self.consumed.start(self.step + 1, self.epoch, self.store.fingerprint, self.store.folder)
            set_timeouts(self.config.parallelism.train_timeout_seconds)
            with self.preemption, self.checkpointer:
                while self.step < self.total_steps:
                    self._train_epoch(metrics)
        self.consumed.close()
        self._print(describe_totals(self.recorder.totals, metrics.sources))
        self._print(describe_wait(self.recorder.data_wait_seconds, self.recorder.seconds))
        self._print(f"run folder   {self.folder}")
        self._export()

    def _export(self) -> None:
        if not self.config.checkpoint.export_hf:
            return
        dtype = DTYPES[self.config.checkpoint.export_dtype]
        lora, tokenizer = self.config.lora, self.config.tokenizer_path
        export_hf(self.model, self.args, self.folder / "hf", tokenizer, dtype, self.token_ids, lora)
        self._print(f"HF weights   {self.folder / 'hf'}")
        if lora.rank:
            base = self.config.checkpoint.initial_load_path
            export_adapter(self.model, lora, base, self.folder / "hf_adapter", dtype)
            self._print(f"PEFT adapter {self.folder / 'hf_adapter'}")

    def _train_epoch(self, metrics: MetricsLogger) -> None:
        """The rest of the current epoch, or as much of it as the steps that are left need."""
        plan = self.plans.of(self.epoch)
        if self.world.rank == 0:
            save_plan(plan, plan_path(self.folder, self.epoch), inputs={"data": self.store.fingerprint})
        data = self.config.data
        self.shapes = self.shapes.covering(plan)
        loader = PackLoader(
            plan,
            self.store,
            self.world.rank,
            self.shapes,
            sample_weights=self.normalizer,
            first_iteration=int(plan.step_offsets[self.step_in_epoch]),
            num_workers=data.num_workers,
            prefetch_factor=data.prefetch_factor,
            pin_memory=self.device.type == "cuda",
        )
        batches = iter(loader)
        names = [level_name(level) for level in plan.levels]
        while self.step_in_epoch < plan.num_steps and self.step < self.total_steps:
            with profiled_step(self.config.profiling, self.step + 1, self.folder):
                values = self.train_step(plan, self.step_in_epoch, batches)
            self.step += 1
            self.step_in_epoch += 1
            last = self.step == self.total_steps
            # A signal leaves seconds: its step has no validation.
            if self.validator and not self.signal and (self.step % self.config.validation.interval == 0 or last):
                values["validation"] = self.validator.run(self.engine.evaluate)
            report = self.live_check.report(plan, self.step_in_epoch)
            if report:
                values["live_check"] = report.as_dict(names)
            saves = self.config.checkpoint.enable and (
                self.step % self.config.checkpoint.interval == 0 or last or self.signal
            )
            values |= self.checkpointer.take_measured()
            if saves:
                values["checkpoint_blocked_seconds"] = self._stage()
            metrics.log(values)
            for line in [report.line(names), *report.warnings(names)] if report else ():
                metrics.write(line)
            if saves:
                # Only now: no checkpoint knows of a step that metrics.jsonl lacks.
                self.checkpointer.write()
            if self.signal and not last:
                self._leave()
        if self.step_in_epoch == plan.num_steps:
            self._confirm_epoch(plan, metrics)
            self.epoch += 1
            self.step_in_epoch = 0

    def _confirm_epoch(self, plan: Plan, metrics: MetricsLogger) -> None:
        """Compare what was trained with the plan and the store: each sample once."""
        self.consumed.sync()
        dist.barrier()
        if self.world.rank == 0:
            metrics.write(confirm_epoch(self.folder, plan, self.step, self.store))

    def _probe_levels(self) -> None:
        """Each level's heaviest pack once, its gradients thrown away: trouble with memory shows in the first minute,
        and compilation ends here."""
        plan = self.plans.of(self.epoch)
        self.shapes = self.shapes.covering(plan)
        batches = PlanDataset(plan, self.store, self.world.rank, self.shapes)
        for level in reversed(range(len(plan.levels))):
            iteration = plan.heaviest_iteration(level)
            if iteration is not None:
                self.engine.forward_backward(batches[iteration])
                if self.validator:
                    self.engine.evaluate(batches[iteration])
        self.optimizer.zero_grad()

    def train_step(self, plan: Plan, step: int, batches: Iterator[PackedBatch]) -> dict[str, Any]:
        """One optimizer step: its iterations, clipping, update; returns the step's metrics."""
        started = time.perf_counter()
        waited = 0.0
        loss_by_level = torch.zeros(len(plan.levels), dtype=torch.float64, device=self.device)
        iterations = range(int(plan.step_offsets[step]), int(plan.step_offsets[step + 1]))
        for iteration in iterations:
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            with self.live_check.iteration(iteration):
                loss_by_level[batch.level] += self.engine.forward_backward(batch)
            self.consumed.add(iteration, batch)
        grad_norm = float(clip_grad_norm(self.model, self.config.training.max_norm))
        learning_rate = float(self.lr_scheduler.get_last_lr()[0])
        losses = all_reduce_values([*loss_by_level.tolist()], "sum", self.device)
        if not math.isfinite(sum(losses) + grad_norm):
            names = ", ".join(sorted({level_name(plan.levels[plan.level_of_iteration[i]]) for i in iterations}))
            raise RuntimeError(
                f"step {self.step + 1}, level {names}: sum of losses {sum(losses)}, gradient norm {grad_norm}; "
                "the parameters were not updated"
            )
        self.optimizer.step()
        self.consumed.commit(self.step + 1, self.epoch)
        self.lr_scheduler.step()
        self.optimizer.zero_grad()
        told = [waited, float(self.preemption.received), float(self.checkpointer.failed)]
        waited, signal, save_failed = all_reduce_values(told, "max", self.device)
        if save_failed:
            self.checkpointer.wait()
        self.signal = int(signal)
        measured = StepMeasurements(losses, grad_norm, learning_rate, waited, time.perf_counter() - started)
        return self.recorder.record(plan, step, self.step + 1, measured)

    def _stage(self) -> float:
        """Take what the next checkpoint holds; returns the seconds that training stood still."""
        plan = self.plans.of(self.epoch)
        self.consumed.sync()
        return self.checkpointer.stage(
            self.step,
            {
                "step": self.step,
                "loader": {
                    "epoch": self.epoch,
                    "iteration": int(plan.step_offsets[self.step_in_epoch]),
                    "plan": plan.fingerprint,
                },
                "lr_scheduler": self.lr_scheduler.state_dict(),
                "model": dataclasses.asdict(self.args),
                "tokenizer_path": str(self.config.tokenizer_path),
                "token_ids": self.token_ids,
                **({"lora": self.adapter} if self.adapter else {}),
            },
            last=self.step == self.total_steps,
        )

    def _leave(self) -> None:
        """End the run for a signal, its last step saved."""
        self.checkpointer.wait()
        if self.prints:
            print(self.preemption.leave(self.signal, self.step), flush=True)
        raise Preempted

    def _resume(self) -> None:
        if not self.config.checkpoint.enable:
            return
        state = self.checkpointer.load()
        if state is None:
            return
        self.step = state["step"]
        self.epoch = state["loader"]["epoch"]
        self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        plan = self.plans.of(self.epoch)
        saved = plan_path(self.folder, self.epoch)
        mend = "restore that, or name another --job.dump_folder"
        try:
            # Compares settings and data; its message names every difference.
            load_plan(saved, expect={**plan.settings(), "data": self.store.fingerprint})
        except ValueError as error:
            raise ValueError(f"cannot resume: {error}; {mend}") from None
        if state["loader"]["plan"] != plan.fingerprint:
            raise ValueError(
                f"cannot resume: {saved} is not the plan of the checkpoint; name another --job.dump_folder"
            )
        if not attempt_folders(self.consumed.folder):
            raise ValueError(
                f"cannot resume: {self.consumed.folder} does not say what steps 1 to {self.step} trained; {mend}"
            )
        offsets = plan.step_offsets.tolist()
        self.step_in_epoch = offsets.index(state["loader"]["iteration"])

    def _announce(self) -> None:
        """The table of methods and every derived number, on the rank that prints; the resolved TOML on disk."""
        if not self.prints:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "config.toml").write_text(to_toml(self.config))
        plan = self.plans.of(self.epoch)
        if self.config.packing.print_comparison:
            print(compare_methods(self.plans))
        print(f"model: {self.args.name}, {num_params(self.args):,} parameters, {self.config.training.dtype}, ", end="")
        print(f"computed in {str(compute_dtype(self.config, self.device)).removeprefix('torch.')}, ", end="")
        print(f"attention {selected_backend(self.device)}")
        print(f"weights: {self.config.checkpoint.initial_load_path or 'new ones, from training.seed'}")
        if self.config.lora.rank:
            print(describe_lora(self.config.lora, self.model))
        print(f"ranks: {self.world.size} on {self.device.type}; data: {len(self.store):,} samples")
        crossed = nodes_crossed([level.cp_degree for level in plan.levels], ranks_per_node(self.world.size))
        if crossed:
            print(f"warning: groups of cp_degree {', '.join(map(str, crossed))} cross nodes: their exchange is slow")
        print(describe_plan(plan, self.total_steps, self.config.parallelism.cp_collectives))
        if self.step:
            print(f"resumed from step {self.step}", flush=True)

    def _print(self, text: str) -> None:
        if self.prints:
            print(text, flush=True)


@record
def main(argv: list[str]) -> None:
    """Train as the command line asks."""
    if {"-h", "--help"} & set(argv):
        print(__doc__.splitlines()[0], help_text(), sep="\n\n")
        return
    config = guarded(lambda: load_config(argv))
    world = init_world(config.parallelism.init_timeout_seconds)
    try:
        trainer = guarded(lambda: Trainer(config, world))
        guarded(trainer.train)
    finally:
        close_world()


if __name__ == "__main__":
    main(sys.argv[1:])
