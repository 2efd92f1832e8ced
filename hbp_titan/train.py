"""The training loop: `torchrun -m hbp_titan.train --job.config_file X.toml`, readable from top to bottom.

Owns the order of things: world, data, plan, model, optimizer, checkpoint; then one optimizer step after another,
each of one or more iterations, each iteration of one level on all ranks (design after torchtitan v0.2.2 train.py).
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from hbp_titan.components.checkpoint import Checkpointer
from hbp_titan.components.faults import NonFiniteGuard, Preempted, Preemption, Watchdog
from hbp_titan.components.loss import NORMALIZERS
from hbp_titan.components.metrics import MetricsLogger, compare_methods, describe_start, fit
from hbp_titan.components.oom import SETTING_UP, UPDATE, out_of_memory_in
from hbp_titan.components.optimizer import build_optimizer, scale_gradients, set_learning_rate, square_norm, step_unless
from hbp_titan.components.profiling import GarbageCollection, StepTrace, memory_snapshot
from hbp_titan.components.resume import TrainState, record_start, set_determinism
from hbp_titan.components.step_stats import ExpertLoad, StepMeter, StepRecorder
from hbp_titan.components.timing import TimingMonitor
from hbp_titan.components.validation import Validator
from hbp_titan.components.weights import check_adapter, describe_adapter, export
from hbp_titan.config import JobConfig, help_text, load_config, to_toml
from hbp_titan.data.batch import PackedBatch
from hbp_titan.data.epoch import EpochPlans, describe_segments
from hbp_titan.data.loader import BatchShapes, PackLoader, PlanDataset
from hbp_titan.data.prepare import open_stores
from hbp_titan.data.sample_log import SampleLog, check_epoch
from hbp_titan.data.token_store import TokenStore
from hbp_titan.distributed.mesh import cross_node_warnings
from hbp_titan.distributed.world import (
    SLOW_WORK_SECONDS,
    World,
    barrier,
    broadcast_value,
    check_same,
    close_world,
    gather_values,
    init_world,
    log_rank,
    ranks_per_node,
    set_timeouts,
)
from hbp_titan.engine import Engine, warmup
from hbp_titan.errors import WorkerGroup, claim_first_failure, default_store, exit_on_user_error, report_first_error
from hbp_titan.packing import CostModel, Plan
from hbp_titan.packing.level import level_name
from hbp_titan.preflight import check, cost_model, max_sample_tokens, model_args, token_ids
from hbp_titan.tuning.auto import load_level_times, resolve_levels
from hbp_titan.tuning.oom_advice import OOMAdvisor
from hbp_titan.tuning.time_model import predicted_time


class Trainer:
    """Everything that a run needs, made in the order in which it depends on what came before."""

    def __init__(self, config: JobConfig, world: World, watchdog: Watchdog | None = None) -> None:
        self.config = config
        self.watchdog = watchdog
        self.world = world
        self.device = world.device
        self.folder = config.dump_folder
        self.prints = world.rank == log_rank(world.size)
        set_determinism(config.training.rng_seed, config.training.deterministic)

        # Data and plan: all ranks prepare, each its share, and find the others' on the shared file system.
        self.args = model_args(config)
        self.store, held_out = self._open_stores()
        check(config, world.size, self.device, self.args, self.store)
        self.memory = OOMAdvisor(config, self.args, world)
        cost = cost_model(self.args, frozen=config.lora.rank > 0)
        if config.auto_levels:
            resolve_levels(config, self.args, world, cost, [self.store, *filter(None, [held_out])], self._print)
            check(config, world.size, self.device, self.args, self.store)
        self.token_ids = token_ids(config, self.store)
        self.plans = self._make_plans(cost)
        self.shapes = BatchShapes.from_plan(self.plans.plan_for(0), self.args.num_kv_heads)
        self.validator = None
        if config.validation.enable and held_out:
            plan = EpochPlans(config, held_out, world.size, cost).plan_for(0)
            self.shapes = self.shapes.enlarged_for(plan)
            loader = partial(self._loader_of, plan, held_out)
            self.validator = Validator(plan, held_out, loader, world)

        self.memory.plan = self.plans.plan_for(0)
        with self.memory, out_of_memory_in(SETTING_UP):
            self.engine = Engine(config, self.args, world)
            self.optimizer = build_optimizer(self.engine.model, config.optimizer)
        self.model = self.engine.model

        # The whole of what a resumed run needs beside tensors.
        self.progress = TrainState(config, self.args, self.plans, self.store.fingerprint)
        self.position = self.progress.position
        self.adapter = describe_adapter(config, self.model)
        self.checkpointer = Checkpointer(
            self.folder / "checkpoint",
            self.model,
            self.optimizer,
            config.checkpoint,
            check=self._check_state,
            at=lambda where: self._at(where, SLOW_WORK_SECONDS),
        )
        self.level_times = load_level_times(self.folder, config.levels)
        self.timing_check = TimingMonitor(self.model, world, self.level_times, config.metrics.timing_check_interval)
        self.expert_load = ExpertLoad(
            self.model, config.parallelism.expert_parallel_degree, config.metrics.expert_load_interval
        )
        self.normalizer = NORMALIZERS[config.training.loss_normalization]
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        self.recorder = StepRecorder(
            self.args, world.size, self.device, self.normalizer, self.store, trained if self.adapter else 0
        )
        self.meter = StepMeter(world, self.store, len(config.levels))
        self.sample_log = SampleLog(self.folder, world.rank, config.levels, broadcast_value)
        self.nonfinite = NonFiniteGuard(config.training, self.folder, world, self.store.where)
        self.preemption = Preemption(self.folder, config.checkpoint.enable)
        self._unwritten: Callable[[], None] | None = None  # writes the metrics of the last step
        self.signal = 0  # the one that any rank had got when the last step ended
        with self.memory, out_of_memory_in(SETTING_UP):
            self._resume()

    @property
    def step(self) -> int:
        """Optimizer steps done since the start of the run."""
        return self.position.step

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.progress.total_steps

    def _make_plans(self, cost: CostModel) -> EpochPlans:
        """The plans of the training data."""
        return EpochPlans(self.config, self.store, self.world.size, cost)

    def _open_stores(self) -> tuple[TokenStore, TokenStore | None]:
        team = WorkerGroup(self.world.rank, self.world.size, gather_values)
        stores = open_stores(self.config, max_sample_tokens(self.config, self.args), team)
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
        trace = StepTrace(self.config.profiling, self.folder, self.world.rank)
        with MetricsLogger(self.config, self.prints, self.step, self.total_steps, self.world.size) as metrics:
            self._check_plan()
            self._probe_levels()
            if self.prints:
                self.preemption.remove_marker()
            segments = describe_segments(self.position.segments)
            self.sample_log.start(
                self.step + 1, self.position.epoch, segments, self.store.fingerprint, self.store.folder
            )
            set_timeouts(self.config.parallelism.train_timeout_seconds)
            with self.preemption, self.checkpointer, trace, GarbageCollection(self.config.training.gc_interval) as gc:
                if self.watchdog:
                    self.watchdog.signal_received = self.preemption.poll_signal
                try:
                    while self.step < self.total_steps:
                        self._train_epoch(metrics, trace, gc)
                finally:
                    self._write_last()
        self.sample_log.close()
        self._print(metrics.totals.describe())
        if self.nonfinite.steps:
            self._print(self.nonfinite.describe())
        self._print(f"run folder   {self.folder}")
        self._export()

    def _export(self) -> None:
        if self.config.checkpoint.export_hf:
            # Ranks wait for the one that writes.
            set_timeouts(SLOW_WORK_SECONDS)
            self._at("the export", SLOW_WORK_SECONDS)
            self._print(export(self.model, self.args, self.config, self.token_ids))

    def _train_epoch(self, metrics: MetricsLogger, trace: StepTrace, collection: GarbageCollection) -> None:
        """The rest of the current epoch, or as much of it as the steps that are left need."""
        position, plan = self.position, self.position.plan
        if self.world.rank == 0:
            position.save_plan()
        batches = iter(self._loader())
        while not position.finished and self.step < self.total_steps:
            trace.before_step(self.step + 1)
            record = self.train_step(plan, position.step_in_plan, batches)
            position.step += 1
            trace.after_step(self.step)
            self._finish_step(record, metrics)
            collection.after_step(self.step)
        if position.finished:
            self.sample_log.sync()
            self._confirm_epoch(metrics.write)
            if self.step < self.total_steps:
                position.next_epoch()
                self._check_plan()

    def _check_plan(self) -> None:
        """Raise ValueError unless all ranks have the same plan: a pure function, but of each node's NumPy and CPU."""
        epoch = self.position.epoch
        self._at(f"the comparison of the plans of epoch {epoch}")
        check_same(self.position.plan.fingerprint, f"the plan of epoch {epoch}")

    def _loader(self) -> PackLoader:
        """The batches of this rank from the current step on."""
        plan = self.position.plan
        self.shapes = self.shapes.enlarged_for(plan)
        first = int(plan.step_offsets[self.position.step_in_plan])
        return self._loader_of(plan, self.store, sample_weights=self.normalizer, first_iteration=first)

    def _loader_of(self, plan: Plan, store: TokenStore, **options: Any) -> PackLoader:
        return PackLoader(
            plan,
            store,
            self.world.rank,
            self.shapes,
            num_workers=self.config.data.num_workers,
            prefetch_factor=self.config.data.prefetch_factor,
            pin_memory=self.device.type == "cuda",
            **options,
        )

    def _finish_step(self, record: Callable[[], dict[str, Any]], metrics: MetricsLogger) -> None:
        """What is due after a step: validation, live check, its metrics, a checkpoint; or the end, for a signal.

        Where nothing else is due, the metrics are written while the next step runs (_write_last).
        """
        config, plan, last = self.config, self.position.plan, self.step == self.total_steps
        values: dict[str, Any] = {}
        # A signal leaves seconds: its step has no validation.
        if self.validator and not self.signal and (self.step % config.validation.interval == 0 or last):
            place = f"validation after step {self.step}"
            self._at(f"{place}, data")
            values["validation"] = self.validator.run(
                self.engine.evaluate, lambda where, level: self._at(f"{place}, {where}", kind=f"validation {level}")
            )
        names = [level_name(level) for level in plan.levels]
        report = self.timing_check.report(plan, self.position.step_in_plan)
        if report:
            values["timing_check"] = report.as_dict(names)
        saves = config.checkpoint.enable and (self.step % config.checkpoint.interval == 0 or last or self.signal)
        self._at(f"checkpoint of step {self.step}", SLOW_WORK_SECONDS)
        values |= self.checkpointer.pop_write_seconds()
        if saves:
            values["checkpoint_blocked_seconds"] = self._stage()
        self._unwritten = lambda: metrics.log({**record(), **values})
        if not values and not self.position.finished and not self.signal:
            return
        self._write_last()
        for line in [report.line(names), *report.warnings(names)] if report else ():
            metrics.write(fit(line))
        if saves:
            # Only now: no checkpoint knows of a step that metrics.jsonl lacks.
            self.checkpointer.write()
        if self.signal and not last:
            self._leave()

    def _write_last(self) -> None:
        """Write the metrics of the last step, unless they are written."""
        write, self._unwritten = self._unwritten, None
        if write:
            write()

    def _confirm_epoch(self, write: Callable[[str], None]) -> None:
        """Compare what was trained with the plans of the epoch and the store: each sample once."""
        barrier()
        if self.world.rank == 0:
            write(check_epoch(self.folder, self.position.segments, self.store))

    def _probe_levels(self) -> None:
        """Run each level once, tell the time that the run will take, and throw the gradients away."""
        position, steps = self.position, self.total_steps - self.step
        plan = position.plan
        self.shapes = self.shapes.enlarged_for(plan)
        batches = PlanDataset(plan, self.store, self.world.rank, self.shapes)
        at = partial(self._at, seconds=self.config.parallelism.init_timeout_seconds)
        passes = warmup(self.engine, batches, self.validator is not None, at)
        self.optimizer.zero_grad()
        time_left = predicted_time(
            self.config, self.args, plan, position.step_in_plan, steps, self.device, self.level_times, passes
        )
        self._print(fit(f"predicted time: {time_left}"))

    def train_step(self, plan: Plan, step: int, batches: Iterator[PackedBatch]) -> Callable[[], dict[str, Any]]:
        """One optimizer step: its iterations, clipping, update; returns what makes its metrics, until the next step."""
        self.meter.start()
        first, last = int(plan.step_offsets[step]), int(plan.step_offsets[step + 1])
        for iteration in range(first, last):
            self._at(f"step {self.step + 1}, data of iteration {iteration} of the plan", kind="data")
            asked = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - asked
            level = level_name(plan.levels[batch.level])
            self._at(f"step {self.step + 1}, iteration {iteration} of the plan, level {level}", kind=level)
            with self.timing_check.iteration(iteration):
                losses = self.engine.forward_backward(batch, last=iteration + 1 == last)
            # Files of the step before: the device has work meanwhile.
            self._write_last()
            self.meter.add(batch, losses, waited)
            self.nonfinite.observe(iteration, batch, losses)
            self.expert_load.add()
            self.sample_log.add(iteration, batch)
        # On a GPU this waits for the iterations before it: steps of other levels take other times.
        self._at(f"step {self.step + 1}, clipping and update", kind=f"update {level}")
        norm, skips = self.meter.sum_over_ranks(square_norm(self.model), self.expert_load.pop())
        scale_gradients(self.model, norm, self.config.training.max_norm)
        learning_rate = self.progress.learning_rate()
        set_learning_rate(self.optimizer, learning_rate)
        with out_of_memory_in(UPDATE):
            # Decided on the device, by what all ranks have alike: a step that is not finite changes nothing.
            step_unless(self.optimizer, skips)
        self.optimizer.zero_grad()
        # The step's one wait for the device.
        flags = [self.preemption.received, self.checkpointer.failed]
        signal, save_failed = self.meter.read(self.timing_check.pop(), flags)
        loss_sums, grad_norm, skipped = self.meter.loss_sums, self.meter.grad_norm, ""
        if not math.isfinite(sum(loss_sums) + grad_norm):
            skipped = self.nonfinite.handle(plan, self.step + 1, step, loss_sums, grad_norm)
        self.nonfinite.reset()
        self.sample_log.commit(self.step + 1, plan.epoch, bool(skipped))
        if save_failed:
            self.checkpointer.wait()
        self.signal = int(signal)
        number = self.step + 1

        def record() -> dict[str, Any]:
            measured = self.meter.measurements(plan, first, last, learning_rate)
            figures = self.expert_load.figures(self.meter.counts, number)
            return {**self.recorder.record(plan, step, number, measured, skipped), **figures}

        return record

    def _stage(self) -> float:
        """Take what the next checkpoint holds; returns the seconds that training stood still."""
        self.sample_log.sync()
        return self.checkpointer.stage(
            self.step,
            {
                **self.progress.state(),
                "nonfinite": self.nonfinite.state(),
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
            print(self.preemption.write_marker(self.signal, self.step), flush=True)
        raise Preempted

    def _resume(self) -> None:
        if not self.config.checkpoint.enable:
            return
        state = self.checkpointer.load()
        if state is None:
            return
        self.progress.restore(state)
        self.nonfinite.restore(state["nonfinite"])
        if self.position.finished:
            # Of the run that was stopped it is not known whether it came to this.
            self._confirm_epoch(self._print)
            if self.step < self.total_steps:
                self.position.next_epoch()

    def _check_state(self, state: dict[str, Any], path: Path) -> None:
        """Raise ValueError for a checkpoint that this run does not go on from."""
        self.progress.check(state, path)
        check_adapter(state.get("lora"), self.adapter, path)

    def _announce(self) -> None:
        """The table of methods and every derived number, on the rank that prints; the resolved TOML on disk."""
        if not self.prints:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "config.toml").write_text(to_toml(self.config))
        record_start(self.config, self.step, self.world.size, self.device)
        plan = self.position.plan
        if self.config.packing.print_comparison:
            print(compare_methods(self.plans))
        experts = self.config.parallelism.expert_parallel_degree
        warnings = cross_node_warnings(plan.levels, experts, ranks_per_node(self.world.size))
        print(describe_start(self.config, self.args, self.model, plan, self.total_steps, self.device, warnings))
        if self.progress.resumed:
            print(fit(self.progress.resumed), flush=True)

    def _at(self, where: str, seconds: float | None = None, kind: str = "") -> None:
        """Something begins that no rank should spend longer on: than a collective may take unless `seconds` says."""
        if self.watchdog:
            self.watchdog.heartbeat(where, seconds or self.config.parallelism.train_timeout_seconds, kind)

    def _print(self, text: str) -> None:
        if self.prints:
            print(text, flush=True)


def main(argv: list[str]) -> None:
    """Train as the command line asks."""
    if {"-h", "--help"} & set(argv):
        print(__doc__.splitlines()[0], help_text(), sep="\n\n")
        return
    config = exit_on_user_error(lambda: load_config(argv), claim_first_failure)
    world = exit_on_user_error(
        lambda: init_world(config.parallelism.init_timeout_seconds, config.dump_folder), claim_first_failure
    )
    watchdog = Watchdog(world.rank, world.size, default_store())
    snapshot = memory_snapshot(config.profiling, config.dump_folder, world.rank)
    with watchdog, report_first_error(world.rank, lambda: watchdog.where), snapshot:
        trainer = exit_on_user_error(lambda: Trainer(config, world, watchdog), claim_first_failure)
        with trainer.memory:
            trainer.train()
    # Not after a failure: it would wait for ranks that are gone.
    close_world()


if __name__ == "__main__":
    main(sys.argv[1:])
