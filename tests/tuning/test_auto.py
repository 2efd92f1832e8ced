"""packing.auto_levels: one decision for all ranks, kept by a resumed run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from hbp_titan.components.timing import LEVEL_TIMES, LevelTimeModel, load_level_times
from hbp_titan.config import load_config
from hbp_titan.data.prepare import prepare
from hbp_titan.data.token_store import TokenStore
from hbp_titan.distributed.world import World, all_reduce_values
from hbp_titan.packing import CostModel, Level
from hbp_titan.testing.local_ranks import run_distributed
from hbp_titan.train import Trainer
from hbp_titan.tuning import auto, measured_engine
from hbp_titan.tuning.auto import save_level_times
from hbp_titan.tuning.profile_file import Profile, profile_key
from hbp_titan.tuning.search import Candidate, Workload, selected
from tests.tiny_run import ARGS, write_tiny_run

SHORT, LONG, LONG_ALONE = Level(128), Level(1024, 2, ac_policy="full"), Level(1024)


def _auto_run(folder: Path) -> list[str]:
    named = [word for word in write_tiny_run(folder, num_rows=30) if not word.startswith("--levels")]
    return [
        *named,
        "--packing.auto_levels=true",
        "--training.epochs=2",
        "--checkpoint.interval=2",
        "--training.steps=4",
    ]


def _profile(slow: Level | None, fits: bool = True) -> Profile:
    """Microseconds a token and rank: 1 at SHORT, 2 at LONG, 100 at `slow`; nothing else fits, or nothing at all."""
    candidates = []
    for level in (SHORT, LONG, LONG_ALONE):
        seconds = level.max_tokens / level.cp_degree * (1e-4 if level == slow else 1e-6 if level == SHORT else 2e-6)
        candidates.append(Candidate(level, LevelTimeModel(seconds) if fits and level != LONG_ALONE else None))
    return Profile({}, 10**9, 10**6, 0.0, [], candidates)


def _run(world: World, argv: list[str], slow: list[Level | None], fits: bool = True, steps: int = 4) -> dict[str, Any]:
    """Train with the times that this rank is said to have measured; what it chose and what it printed."""
    measured = []

    def profile_levels(*_: Any, **__: Any) -> Profile:
        measured.append(world.rank)
        return _profile(slow[world.rank], fits)

    auto.profile_levels = profile_levels  # type: ignore[assignment]
    config = load_config([*argv, f"--training.steps={steps}"])
    try:
        trainer = Trainer(config, world)
    except ValueError as error:
        return {"error": str(error)}
    first = trainer.step
    trainer.train()
    chosen = [(level.max_tokens, level.cp_degree, level.ac_policy) for level in trainer.plans.plan_for(0).levels]
    return {"levels": chosen, "measured": len(measured), "first": first, "plan": trainer.plans.plan_for(0).fingerprint}


def test_every_rank_trains_the_levels_that_rank_0_chose_and_so_does_a_resumed_run(tmp_path: Path) -> None:
    argv = _auto_run(tmp_path)
    # On rank 1's times alone the short level would not pay.
    first = run_distributed(_run, 2, argv, [None, SHORT], True, 2)
    assert first[0]["levels"] == first[1]["levels"] == [(128, 1, "none"), (1024, 2, "full")]
    assert first[0]["plan"] == first[1]["plan"]
    assert [result["measured"] for result in first] == [1, 1]
    written = load_config(["--job.config_file", str(tmp_path / "run" / "config.toml")])
    assert (written.levels, written.packing.auto_levels) == ([SHORT, LONG], False)
    times = load_level_times(tmp_path / "run", written.levels)
    assert times == (LevelTimeModel(128e-6), LevelTimeModel(1024e-6))

    # The kept profile is gone and the machine has changed: a resumed run neither measures nor chooses.
    (tmp_path / "run" / "profile.json").unlink(missing_ok=True)
    second = run_distributed(_run, 2, argv, [SHORT, SHORT])
    assert [(r["measured"], r["first"], r["levels"], r["plan"]) for r in second] == [
        (0, 2, first[0]["levels"], first[0]["plan"])
    ] * 2


def _measure_twice(world: World, argv: list[str], path: Path) -> tuple[int, bool, bool]:
    """How often two equal calls and one for other levels measured, and what the second gave."""
    calls = []

    def profile_levels(config: Any, args: Any, world: World, *data: Any, **settings: Any) -> Profile:
        calls.append(1)
        lengths, loss_tokens, levels = data
        key = profile_key(config, args, world, lengths, loss_tokens, candidates=levels, **settings)
        return Profile(key, 10**9, 10**6, 0.0, [], _profile(None).candidates)

    auto.profile_levels = profile_levels  # type: ignore[assignment]
    config = load_config(argv)
    folder, _ = auto.from_rank_0(world, lambda: prepare(config, max_sample_tokens=1024))
    for levels in ([SHORT, LONG], [SHORT, LONG], [LONG]):
        profile = auto.measured_profile(config, ARGS, world, [TokenStore.open(folder)], path, lambda text: None, levels)
        dist.barrier()
    return len(calls), profile.candidates == _profile(None).candidates, path.exists()


def test_a_kept_profile_is_measured_again_only_for_other_levels(tmp_path: Path) -> None:
    found = run_distributed(_measure_twice, 2, _auto_run(tmp_path), tmp_path / "profile.json")
    assert found == [(2, True, True)] * 2


def test_where_nothing_fits_every_rank_says_so(tmp_path: Path) -> None:
    for result in run_distributed(_run, 2, _auto_run(tmp_path), [None, None], False):
        assert "max_tokens >= 1024" in result["error"]


def test_blocks_and_auto_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="auto_levels"):
        load_config(["--packing.auto_levels=true", "--levels=128:1"])
    with pytest.raises(ValueError, match="bool"):
        load_config(["--packing.auto_levels=best"])


def test_level_times_are_those_of_the_levels_asked_for(tmp_path: Path) -> None:
    assert load_level_times(tmp_path, [SHORT]) is None
    workload = Workload(np.array([100, 900]), np.array([50, 400]), 2, CostModel())
    candidates = [Candidate(SHORT, LevelTimeModel(1.0, per_square=1e-9)), Candidate(LONG, LevelTimeModel(2.0, 0.5))]
    save_level_times(tmp_path, selected(candidates, workload.plan([SHORT, LONG]), workload))
    assert load_level_times(tmp_path, [LONG, SHORT]) == (LevelTimeModel(2.0, 0.5), LevelTimeModel(1.0, per_square=1e-9))
    assert load_level_times(tmp_path, [LONG_ALONE]) is None
    (tmp_path / LEVEL_TIMES).write_text('[{"level": 1}]')
    with pytest.raises(ValueError, match=r"level_times\.json"):
        load_level_times(tmp_path, [SHORT])


def _measure_alone(world: World, argv: list[str]) -> tuple[Any, str, float]:
    """What an attempt gives where both ranks run out of memory; then where rank 1 does, and the sum of both ranks."""
    measured_engine.LONE_OOM_SECONDS = 1
    engine = measured_engine.MeasuredEngine(load_config(argv), ARGS, world, [SHORT])

    def run_out(_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")

    def reduce(_: Any = None) -> float:
        return all_reduce_values([world.rank + 1.0], "sum", world.device)[0]

    both, alone, total = engine.attempt(run_out), "", 0.0
    try:
        # As FSDP's collectives on the rank that has memory: it waits there for the other.
        total = engine.attempt(reduce if world.rank == 0 else run_out) or 0.0
    except ValueError as error:
        alone, total = str(error), reduce()
    except RuntimeError:
        # Rank 0, when rank 1 has given up the agreement.
        total = 3.0
    dist.destroy_process_group(world.control)
    return both, alone, total


def test_a_rank_that_runs_out_of_memory_alone_ends_and_touches_no_group_that_computes(tmp_path: Path) -> None:
    found = run_distributed(_measure_alone, 2, _auto_run(tmp_path))
    assert [both for both, _, _ in found] == [None, None]
    assert found[1][1].startswith("rank 1: out of memory on this rank alone")
    assert found[0][1] == ""
    # The collective that rank 0 waited in was met by rank 1's own, not by an agreement.
    assert found[1][2] == 3.0
