"""Train, or resume the run in the run folder: `python -m hbp_titan.launch -m hbp_titan.train --job.config_file X.toml`.

To be read from top to bottom. Trainer sets up in order (data, plan, model, optimizer, checkpoint), then runs optimizer
steps. Each step is one or more micro-batches, each of one level on all ranks (after torchtitan v0.2.2 train.py).
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hbp_titan.distributed.world as distributed
from hbp_titan import errors, preflight
from hbp_titan.components import oom, profiling, timing
from hbp_titan.components import optimizer as optim
from hbp_titan.components.checkpoint import Checkpointer
from hbp_titan.components.faults import NonFiniteGuard, Preempted, Preemption, Watchdog
from hbp_titan.components.metrics import MetricsLogger, describe_start, validation_lines, wrap
from hbp_titan.components.resume import TrainState, can_resume, check_starts_over, record_start, set_determinism
from hbp_titan.components.step_stats import StepStats
from hbp_titan.components.validation import Validator
from hbp_titan.config import JobConfig, help_text, load_config, to_toml
from hbp_titan.data.epoch import EpochPlans, describe_segments
from hbp_titan.data.loader import BatchShapes, PackLoader, PlanDataset
from hbp_titan.data.prepare import open_stores
from hbp_titan.data.sample_log import SampleLog, check_epoch
from hbp_titan.engine import Engine, warmup

if TYPE_CHECKING:
    from hbp_titan.data.batch import PackedBatch
    from hbp_titan.data.token_store import TokenStore
    from hbp_titan.packing import Plan


class Trainer:
    """A training run: everything it needs, built in the order of its dependencies, and its loop."""

    def __init__(self, config: JobConfig, world: distributed.World, watchdog: Watchdog | None = None) -> None:
        self.config = config
        self.watchdog = watchdog
        self.world = world
        self.device = world.device
        self.folder = config.dump_folder
        self.is_log_rank = world.rank == distributed.log_rank(world.size)
        set_determinism(config.seed_of("rng"), config.training.deterministic)
        self.notes: list[str] = []  # on what other programs may read otherwise in the model's folder
        self.args = preflight.model_args(config, self.notes)
        preflight.check(config, world.size, self.device, self.args)

        self._open_data()
        self._make_plans()
        self._build_model()
        self._build_state()
        with self.oom_advice, oom.out_of_memory_in(oom.SETTING_UP):
            self._resume()

    def _open_data(self) -> None:
        """Open the token stores. Ranks share the work of making those that are missing, on a shared file system."""
        config, world = self.config, self.world
        limit = preflight.max_sample_tokens(config, self.args)
        self.store, *self.held_out = open_stores(config, limit, distributed.worker_group(world))
        preflight.check_vocabulary(config, self.args, self.store.meta["vocab_size"])
        # Not at the top, because it is a chapter of its own; not at the end, because files may change during a run.
        from hbp_titan.components import export

        self.exporter, self.export_settings = export.export, export.export_settings(config, self.args, self.store)
        for line in [*self.notes, *export.turn_end_warnings(config, self.store)]:
            self._print(wrap(f"warning: {line}"))

    def _make_plans(self) -> None:
        """Choose the levels if they are to be measured, and plan the first epoch and the validation pass."""
        config, world, held_out = self.config, self.world, self.held_out
        self.oom_advice = oom.OOMAdvice(config, self.args, world)
        if config.measures_levels:
            # Not at the top: few runs measure their levels, and the search is a tool of its own.
            from hbp_titan.tuning.auto import resolve_levels

            resolve_levels(config, self.args, world, [self.store, *held_out], self._print)
            preflight.check(config, world.size, self.device, self.args)
        cost = preflight.planner_costs(config, self.args, world.size, self.store, self.device)
        self.plans = EpochPlans(config, self.store, world.size, cost)
        self.oom_advice.plan = self.plans.plan_for(0)
        self.shapes = BatchShapes.from_plan(self.plans.plan_for(0), self.args.num_kv_heads, self.args.sliding_window)
        self.validator = None
        if config.validation.enable and held_out:
            plan = EpochPlans(config, held_out[0], world.size, cost).plan_for(0)
            # One shape for training and validation: a compiled block meets no new one.
            self.shapes = self.shapes.enlarged_for(plan)
            loader = partial(self._make_loader, plan, held_out[0])
            self.validator = Validator(plan, held_out[0], loader, world)

    def _build_model(self) -> None:
        config, world = self.config, self.world
        with self.oom_advice, oom.out_of_memory_in(oom.SETTING_UP):
            # A checkpoint replaces the initial weights, so they are not read; with LoRA it has the adapters only.
            self.resumes = distributed.broadcast_value(can_resume(config))
            if config.parallelism.cpu_offload or any(level.offloads for level in config.levels):
                from hbp_titan.tuning.memory_plans import check_host_memory

                check_host_memory(config, self.args, world)
            self.engine = Engine(config, self.args, world, read_weights=not self.resumes or config.lora.rank > 0)
            self.model = self.engine.model
            self.optimizer = optim.build_optimizer(self.model, config.optimizer)
            if float8 := self.engine.runtime.float8_state:
                float8.track(self.optimizer, self.model)
                self._print(wrap(float8.description))

    def _build_state(self) -> None:
        """Build what a resumed run needs, what is measured, and what handles faults."""
        config, world = self.config, self.world
        # Position and schedule, tensors, and the samples that were trained.
        self.train_state = TrainState(config, self.args, self.plans, self.store.fingerprint)
        self.position = self.train_state.position
        self.adapter: dict[str, Any] | None = None
        if config.lora.rank:
            from hbp_titan.components.lora_checkpoint import describe_adapter

            self.adapter = describe_adapter(config, self.model)
        self.checkpointer = Checkpointer(
            self.folder / "checkpoint",
            self.model,
            self.optimizer,
            config.checkpoint,
            check=self._check_checkpoint,
            at=lambda phase: self._heartbeat(phase, distributed.SLOW_WORK_SECONDS),
        )
        self.sample_log = SampleLog(self.folder, world.rank, config.levels, distributed.broadcast_value)

        self.level_times = timing.load_level_times(self.folder, config.levels)
        self.timing = timing.TimingMonitor(self.model, world, self.level_times, config.metrics.timing_check_interval)
        self.stats = StepStats(config, self.args, world, self.store, self.model)
        self.nonfinite = NonFiniteGuard(config.training, self.folder, world, self.store.where)
        self.preemption = Preemption(self.folder, config.checkpoint.enable)
        self.at_start: dict[str, Any] = {}  # for the record of step 1
        self.signal = 0  # highest signal number received on any rank, agreed at the end of the last step
        self._write_metrics: Callable[[], None] | None = None  # writes the metrics of the last step

    @property
    def step(self) -> int:
        """Optimizer steps done since the start of the run."""
        return self.position.step

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.train_state.total_steps

    def train(self) -> None:
        """Train from the current step to the last, then export."""
        self._log_startup()
        if self.step >= self.total_steps:
            self._print(
                f"{self.folder} already finished at step {self.step}; pass a new --job.dump_folder to train again"
            )
            if not (self.folder / "hf").exists():
                self._export()
            return
        self.checkpointer.require_optimizer()
        trace = profiling.StepTrace(self.config.profiling, self.folder, self.world.rank)
        garbage = profiling.GarbageCollection(self.config.training.gc_interval)
        with MetricsLogger(self.config, self.is_log_rank, self.step, self.total_steps, self.world.size) as metrics:
            self._check_plan()
            self._warm_up()
            if self.is_log_rank:
                self.preemption.remove_marker()
            segments = describe_segments(self.position.segments)
            self.sample_log.start(
                self.step + 1, self.position.epoch, segments, self.store.fingerprint, self.store.folder
            )
            # Compilation and allocation are done: from here a collective that takes long is a hang.
            distributed.set_timeouts(self.config.parallelism.train_timeout_seconds)
            with self.preemption, self.checkpointer, trace, garbage:
                if self.watchdog:
                    self.watchdog.signal_received = self.preemption.poll_signal
                try:
                    if self.validator and self.step == 0 and self.config.validation.at_start:
                        means = self.validator.run("before step 1", self.engine.evaluate, self._heartbeat)
                        metrics.write(validation_lines(0, means))
                        self.at_start = {"validation_at_start": means}
                    while self.step < self.total_steps:
                        self._train_epoch(metrics, trace, garbage)
                finally:
                    self._write_pending_metrics()
        self.sample_log.close()
        self._print(metrics.totals.describe())
        if self.nonfinite.steps:
            self._print(self.nonfinite.describe())
        self._print(f"run folder   {self.folder}")
        self._export()
        if self.is_log_rank and self.config.metrics.report:
            # Not at the top: a tool, which needs nothing but the run folder.
            from hbp_titan.report.summary import write_report

            write_report(self.folder)

    def _train_epoch(
        self, metrics: MetricsLogger, trace: profiling.StepTrace, garbage: profiling.GarbageCollection
    ) -> None:
        """Train the rest of the current epoch, or as much of it as the run has steps left."""
        position, plan = self.position, self.position.plan
        if self.world.rank == 0:
            position.save_plan()
        self.shapes = self.shapes.enlarged_for(plan)
        first = int(plan.step_offsets[position.step_in_plan])
        normalizer = self.stats.normalizer
        batches = iter(self._make_loader(plan, self.store, sample_weights=normalizer, first_micro_batch=first))
        while not position.finished and self.step < self.total_steps:
            trace.before_step(self.step + 1)
            record = self.train_step(plan, position.step_in_plan, batches)
            position.step += 1
            trace.after_step(self.step)
            self._finish_step(record, metrics)
            garbage.after_step(self.step)
        if position.finished:
            self.sample_log.sync()
            self._check_trained_samples(metrics.write)
            if self.step < self.total_steps:
                position.next_epoch()
                self._check_plan()

    def train_step(self, plan: Plan, step: int, batches: Iterator[PackedBatch]) -> Callable[[], dict[str, Any]]:
        """Run one optimizer step: micro-batches, clipping, update. Returns a function that computes its metrics."""
        number = self.step + 1
        first, last = int(plan.step_offsets[step]), int(plan.step_offsets[step + 1])
        self.stats.start()
        for micro_batch in range(first, last):
            self._heartbeat(f"step {number}, data of micro-batch {micro_batch}", kind="data")
            asked = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - asked
            level = self.engine.level_names[batch.level]
            self._heartbeat(f"step {number}, micro-batch {micro_batch}, level {level}", kind=level)
            with self.timing.micro_batch(micro_batch):
                losses = self.engine.forward_backward(batch, last=micro_batch + 1 == last)
            # The files of the step before, written while the device is busy.
            self._write_pending_metrics()
            self.stats.add(batch, losses, waited)
            self.nonfinite.observe(micro_batch, batch, losses)
            self.sample_log.add(micro_batch, batch)

        # Its kind names the level: on a GPU this is where the host waits for the micro-batches.
        self._heartbeat(f"step {number}, clipping and update", kind=f"update {level}")
        norm, skip = self.stats.reduce(optim.square_norm(self.model))
        optim.scale_gradients(self.model, norm, self.config.training.max_norm)
        lr = self.train_state.learning_rate()
        optim.set_learning_rate(self.optimizer, lr)
        with oom.out_of_memory_in(oom.UPDATE):
            # Skipped on the device, by a value that all ranks share: a step that is not finite changes nothing.
            optim.step_unless(self.optimizer, skip)
            if rate := self.config.optimizer.router_bias_rate:
                self.model.move_router_biases(self.stats.tokens_per_expert(), rate * (1 - skip))
        self.optimizer.zero_grad()

        # The step's one wait for the device.
        result = self.stats.result(self.timing.pop(), [self.preemption.received, self.checkpointer.failed])
        signal, save_failed = result.flags
        skipped = ""
        if not result.finite:
            skipped = self.nonfinite.handle(plan, number, step, result.level_loss_sums, result.grad_norm)
        self.nonfinite.reset()
        self.sample_log.commit(number, plan.epoch, bool(skipped))
        if save_failed:
            self.checkpointer.wait()  # raises the error on every rank
        self.signal = int(signal)
        return partial(self.stats.record, result, plan, step, number, lr, skipped)

    def _finish_step(self, record: Callable[[], dict[str, Any]], metrics: MetricsLogger) -> None:
        """Do what is due after a step: validation, timing check, checkpoint, or the end of the run for a signal.

        If nothing is due, the step's metrics are written while the next step runs.
        """
        config, plan, last = self.config, self.position.plan, self.step == self.total_steps
        values, self.at_start = self.at_start, {}
        # A signal leaves only seconds: no validation then.
        if self.validator and not self.signal and (self.step % config.validation.interval == 0 or last):
            phase = f"after step {self.step}"
            values["validation"] = self.validator.run(phase, self.engine.evaluate, self._heartbeat)
        names = self.engine.level_names
        report = self.timing.report(plan, self.position.step_in_plan)
        if report:
            values["timing_check"] = report.as_dict(names)
        saves = config.checkpoint.enable and (self.step % config.checkpoint.interval == 0 or last or self.signal)
        self._heartbeat(f"checkpoint of step {self.step}", distributed.SLOW_WORK_SECONDS)
        values |= self.checkpointer.pop_write_seconds()
        if saves:
            values["checkpoint_blocked_seconds"] = self._stage_checkpoint()
        self._write_metrics = lambda: metrics.log({**record(), **values})
        if not values and not self.position.finished and not self.signal:
            return
        self._write_pending_metrics()
        for line in [report.line(names), *report.warnings(names)] if report else ():
            metrics.write(wrap(line))
        if saves:
            # Only now: a checkpoint must not contain a step that metrics.jsonl lacks.
            self.checkpointer.write()
        if self.signal and not last:
            self._exit_preempted()

    def _warm_up(self) -> None:
        """Run each level once, print the predicted time of the run, and discard the gradients."""
        position, steps = self.position, self.total_steps - self.step
        plan = position.plan
        self.shapes = self.shapes.enlarged_for(plan)
        batches = PlanDataset(plan, self.store, self.world.rank, self.shapes)
        heartbeat = partial(self._heartbeat, seconds=self.config.parallelism.init_timeout_seconds)
        seconds = warmup(self.engine, batches, self.validator is not None, heartbeat)
        self.optimizer.zero_grad()
        predicted = timing.predicted_time(
            self.config, self.args, plan, position.step_in_plan, steps, self.device, self.level_times, seconds
        )
        self._print(wrap(f"predicted time: {predicted}"))

    def _make_loader(self, plan: Plan, store: TokenStore, **options: Any) -> PackLoader:
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

    def _check_plan(self) -> None:
        """Raise ValueError unless all ranks have the same plan: it depends on each node's NumPy and CPU as well."""
        epoch = self.position.epoch
        self._heartbeat(f"comparison of the plans of epoch {epoch}")
        distributed.check_same(self.position.plan.fingerprint, f"the plan of epoch {epoch}")

    def _check_trained_samples(self, write: Callable[[str], None]) -> None:
        """Compare the sample log of a finished epoch with its plans and the store: each sample trained once."""
        distributed.barrier()
        if self.world.rank == 0:
            write(check_epoch(self.folder, self.position.segments, self.store))

    def _write_pending_metrics(self) -> None:
        write, self._write_metrics = self._write_metrics, None
        if write:
            write()

    def _stage_checkpoint(self) -> float:
        """Copy what the next checkpoint holds; return the seconds that training stood still."""
        self.sample_log.sync()
        state = {
            **self.train_state.state(),
            "nonfinite": self.nonfinite.state(),
            "model": dataclasses.asdict(self.args),
            **self.export_settings,
            **({"lora": self.adapter} if self.adapter else {}),
        }
        return self.checkpointer.stage(self.step, state, last=self.step == self.total_steps)

    def _check_checkpoint(self, state: dict[str, Any], path: Path) -> None:
        """Raise ValueError for a checkpoint of another run."""
        self.train_state.check(state, path)
        if self.adapter and "lora" in state:
            from hbp_titan.components.lora_checkpoint import check_adapter

            check_adapter(state["lora"], self.adapter, path)

    def _resume(self) -> None:
        check_starts_over(self.config)
        state = self.checkpointer.load() if self.config.checkpoint.enable else None
        if state is None:
            if self.resumes:
                raise ValueError(f"{self.checkpointer.folder}: the checkpoints were deleted during the start")
            return
        self.train_state.restore(state)
        self.nonfinite.restore(state["nonfinite"])
        if self.position.finished:
            # The stopped run may have ended before this check.
            self._check_trained_samples(self._print)
            if self.step < self.total_steps:
                self.position.next_epoch()

    def _exit_preempted(self) -> None:
        """End the run because of a signal, after its last step is saved."""
        self.checkpointer.wait()
        if self.is_log_rank:
            print(self.preemption.write_marker(self.signal, self.step), flush=True)
        raise Preempted

    def _export(self) -> None:
        if self.config.checkpoint.export_hf:
            # The other ranks wait for the one that writes.
            distributed.set_timeouts(distributed.SLOW_WORK_SECONDS)
            self._heartbeat("export", distributed.SLOW_WORK_SECONDS)
            self._print(self.exporter(self.model, self.args, self.config, self.export_settings))

    def _log_startup(self) -> None:
        """Print every derived number, on the log rank; write the resolved config.toml and run.json."""
        if not self.is_log_rank:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "config.toml").write_text(to_toml(self.config))
        record_start(self.config, self.step, self.world.size, self.device)
        plan, steps = self.position.plan, (self.total_steps, self.step)
        print(describe_start(self.config, self.args, self.model, self.plans, plan, *steps))
        if self.train_state.resumed:
            print(wrap(self.train_state.resumed), flush=True)

    def _heartbeat(self, where: str, seconds: float | None = None, kind: str = "") -> None:
        """Report progress to the watchdog. seconds: until it calls this a hang, by default a collective's timeout."""
        if self.watchdog:
            self.watchdog.heartbeat(where, seconds or self.config.parallelism.train_timeout_seconds, kind)

    def _print(self, text: str) -> None:
        if self.is_log_rank:
            print(text, flush=True)


def main(argv: list[str]) -> None:
    """Train as the command line says."""
    # Not at the top: other programs that train have folders of their own.
    from hbp_titan.components.run_folder import RunLock

    if {"-h", "--help"} & set(argv):
        print(__doc__.splitlines()[0], help_text(), sep="\n\n")
        return
    first = errors.claim_first_failure
    config = errors.exit_on_user_error(lambda: load_config(argv), first)
    timeout = config.parallelism.init_timeout_seconds
    world = errors.exit_on_user_error(lambda: distributed.init_world(timeout, config.dump_folder), first)
    watchdog = Watchdog(world.rank, world.size, errors.default_store())
    snapshot = profiling.memory_snapshot(config.profiling, config.dump_folder, world.rank)
    lock = RunLock(config.dump_folder, world)
    with watchdog, errors.report_first_error(world.rank, lambda: watchdog.where), lock, snapshot:
        if world.device.type == "cuda":
            # Only now: nothing in the folder is touched before the lock is held.
            (config.dump_folder / distributed.FLIGHT_RECORDER).mkdir(parents=True, exist_ok=True)
        trainer = errors.exit_on_user_error(lambda: Trainer(config, world, watchdog), first)
        with trainer.oom_advice:
            trainer.train()
    # Not after a failure: it would wait for ranks that are gone.
    distributed.close_world()


if __name__ == "__main__":
    main(sys.argv[1:])
