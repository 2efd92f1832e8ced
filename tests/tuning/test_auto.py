"""Automatic selection of levels: one decision for all ranks, kept by a resumed run; TOML blocks; select_levels.py."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from hbp_titan.components.timing import LEVEL_TIMES, LevelTimeModel, load_level_times
from hbp_titan.config import load_config, validate
from hbp_titan.data.prepare import prepare
from hbp_titan.data.token_store import TokenStore
from hbp_titan.distributed.world import World, all_reduce_values, control_group
from hbp_titan.models.registry import get_flavor
from hbp_titan.packing import CostModel, Level
from hbp_titan.testing.local_ranks import run_distributed
from hbp_titan.train import Trainer
from hbp_titan.tuning import auto, measured_engine, parallel_levels
from hbp_titan.tuning.auto import candidate_forms, replace_levels, save_level_times
from hbp_titan.tuning.profile_file import Profile, profile_key
from hbp_titan.tuning.search import Candidate, Workload, selected
from scripts import select_levels
from tests.programs import run_python
from tests.tiny_run import ARGS, write_tiny_run

SHORT, LONG, LONG_ALONE = Level(128), Level(1024, 2, ac_policy="full"), Level(1024)


def _auto_run(folder: Path) -> list[str]:
    named = write_tiny_run(folder, num_rows=30, levels="")
    return [*named, "--packing.auto_levels=true", "--training.epochs=2", "--checkpoint.interval=2"]


def _profile(slow: Level | None, fits: bool = True) -> Profile:
    """Return a profile with microseconds per token and rank: 1 at SHORT, 2 at LONG, 100 at `slow`."""
    candidates = []
    for level in (SHORT, LONG, LONG_ALONE):
        seconds = level.max_tokens / level.cp_degree * (1e-4 if level == slow else 1e-6 if level == SHORT else 2e-6)
        candidates.append(Candidate(level, LevelTimeModel(seconds) if fits and level != LONG_ALONE else None))
    return Profile({}, 10**9, 10**6, 0.0, [], candidates)


def _run(world: World, argv: list[str], slow: list[Level | None], fits: bool = True, steps: int = 4) -> dict[str, Any]:
    """Train with made-up measurements of this rank; return what it selected."""
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


def test_all_ranks_and_a_resumed_run_train_the_levels_that_rank_0_selects(tmp_path: Path) -> None:
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

    # Without a stored profile and on a different machine, a resumed run neither measures nor selects.
    (tmp_path / "run" / "profile.json").unlink(missing_ok=True)
    second = run_distributed(_run, 2, argv, [SHORT, SHORT])
    assert [(r["measured"], r["first"], r["levels"], r["plan"]) for r in second] == [
        (0, 2, first[0]["levels"], first[0]["plan"])
    ] * 2


def _measure_twice(world: World, argv: list[str], path: Path) -> tuple[int, bool, bool]:
    """Return how often two equal calls and one with other levels measured, and what the last returned."""
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


def test_stored_profile_is_measured_again_only_for_other_levels(tmp_path: Path) -> None:
    found = run_distributed(_measure_twice, 2, _auto_run(tmp_path), tmp_path / "profile.json")
    assert found == [(2, True, True)] * 2


def test_every_rank_raises_if_nothing_fits(tmp_path: Path) -> None:
    for result in run_distributed(_run, 2, _auto_run(tmp_path), [None, None], False):
        assert "max_tokens >= 1024" in result["error"]


def test_level_times_are_those_of_the_requested_levels(tmp_path: Path) -> None:
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
    """Return the attempt if both ranks run out of memory; the error if only rank 1 does; a sum over both ranks."""
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
    dist.destroy_process_group(control_group())
    return both, alone, total


def test_lone_rank_out_of_memory_raises_without_using_a_computing_group(tmp_path: Path) -> None:
    found = run_distributed(_measure_alone, 2, _auto_run(tmp_path))
    assert [both for both, _, _ in found] == [None, None]
    assert found[1][1].startswith("rank 1: out of memory on this rank alone")
    assert found[0][1] == ""
    # The collective that rank 0 waited in was met by rank 1's own, not by an agreement.
    assert found[1][2] == 3.0


NEW_LEVELS = [Level(64), Level(512, 2, "hybrid", "full", 3)]
BLOCKS = """\
[[levels]]
max_tokens = 64
cp_degree = 1
cp_style = "ulysses"
ac_policy = "none"

[[levels]]
max_tokens = 512
cp_degree = 2
cp_style = "hybrid"
ac_policy = "full"
ac_layers = 3
"""


def test_blocks_are_replaced_in_place() -> None:
    before = """\
# A run.
[packing]
level_order = "alternate"  # short, long

# Short samples.
[[levels]]
max_tokens = 1024  # tokens
cp_degree = 1

# Long samples.
[[levels]]
max_tokens = 8192

# Training.
[training]
epochs = 2
"""
    after = f"""\
# A run.
[packing]
level_order = "alternate"  # short, long

# Short samples.
{BLOCKS}
# Long samples.

# Training.
[training]
epochs = 2
"""
    assert replace_levels(before, NEW_LEVELS, "a.toml") == after


def test_blocks_are_appended_and_automatic_levels_are_reset(tmp_path: Path) -> None:
    before = '[packing]\nauto_levels = true  # measured\n[job]\ndump_folder = "auto_levels = true"\n'
    after = replace_levels(before, NEW_LEVELS, "a.toml")
    assert after == before.replace("true  #", "false  #") + "\n" + BLOCKS
    (tmp_path / "a.toml").write_text(after)
    assert load_config(["--job.config_file", str(tmp_path / "a.toml")]).levels == NEW_LEVELS
    assert replace_levels("", NEW_LEVELS, "") == BLOCKS


@pytest.mark.parametrize(
    "text",
    [
        "levels = [{max_tokens = 64}]\n",
        "packing.auto_levels = true\n",
        '[job]\ndump_folder = """\n[[levels]]\nmax_tokens = 3\n"""\n',
    ],
)
def test_other_notations_are_rejected(text: str) -> None:
    with pytest.raises(ValueError, match=r"a\.toml"):
        replace_levels(text, NEW_LEVELS, "a.toml")


# scripts/select_levels.py


Capture = pytest.CaptureFixture[str]

TOML = """\
# The user's own file.
[data]
train_files = ["{folder}/train.jsonl"]
max_length_policy = "error"  # none is longer
cache_folder = "{folder}/cache"
num_proc = 1

[[levels]]
max_tokens = 64  # too short for the data

[model]
hf_path = "{folder}/model"

[checkpoint]
initial_load_path = "none"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("select")
    write_tiny_run(path)
    (path / "run.toml").write_text(TOML.format(folder=path))
    return path


def _main(folder: Path, *words: object) -> None:
    select_levels.main(["--job.config_file", str(folder / "run.toml"), *map(str, words)])


ESTIMATE = ("--estimate", "h100-80gb", "--world_size", "8")


def test_levels_side_by_side_are_proposed_and_written(
    folder: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel_levels, "SHARES", (1,))
    monkeypatch.setattr(parallel_levels, "LOWEST", (1,))
    words = ("--method", "parallel", "--candidates", "128:1,512:2", "--output", tmp_path / "out.toml")
    _main(folder, *ESTIMATE, *words, "--packing.level_order=parallel")
    assert 'packing.level_order = "parallel"' in capsys.readouterr().out
    overrides = ["--job.config_file", str(tmp_path / "out.toml"), "--packing.level_order=parallel"]
    config = load_config(overrides)
    validate(config, 8)
    assert max(level.max_tokens for level in config.levels) >= 256
    with pytest.raises(ValueError, match="estimate"):
        _main(folder, "--method", "parallel")


def test_script_writes_the_users_file_with_levels_that_hold_the_data(folder: Path, capsys: Capture) -> None:
    output = folder / "new" / "levels.toml"
    _main(folder, *ESTIMATE, "--candidates", "128:1,1024:1,1024:2", "--output", output)
    printed = capsys.readouterr().out
    assert " of 9 candidates fit in memory" in printed
    for row in ("search", "paper", "ISF", r"flat \+ sort", "levels and balance"):
        assert re.search(rf"^{row} .*%", printed, re.MULTILINE), printed
    text = output.read_text()
    assert text.startswith("# The user's own file.\n[data]\n")
    assert 'max_length_policy = "error"  # none is longer\n' in text
    assert "max_tokens = 64  #" not in text
    config = load_config(["--job.config_file", str(output)])
    assert {level.max_tokens for level in config.levels} <= {128, 1024}
    assert config.levels[-1].max_tokens > 340
    assert all(8 % level.cp_degree == 0 for level in config.levels)


def test_script_proposes_host_memory_where_nothing_else_fits(folder: Path) -> None:
    # 8B parameters with gradients and moments are 120 GiB.
    model = ["--model.hf_path=", "--model.flavor=llama3_1_8b", f"--model.tokenizer_path={folder / 'model'}"]
    words = [*ESTIMATE[:3], "1", "--candidates", "1024:1", *model]
    with pytest.raises(ValueError, match=r"cpu_offload = true: 1K/cp1 then fits, waits for copies over PCIe \d+%"):
        _main(folder, *words)
    _main(folder, *words, "--parallelism.cpu_offload=true")


def test_script_measures_on_two_ranks_and_prints_once(folder: Path) -> None:
    output, cache = folder / "measured.toml", folder / "profile.json"
    words = ["--job.config_file", folder / "run.toml", "--candidates", "128:1,1024:2", "--profile_cache", cache]
    result = run_python("scripts/select_levels.py", *words, "--output", output, ranks=2)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("candidates fit in memory") == 1
    assert load_config(["--job.config_file", str(output)]).levels[-1].max_tokens == 1024
    assert cache.exists()


def test_default_candidates_are_at_most_as_long_as_the_model_allows() -> None:
    args = dataclasses.replace(get_flavor("debug"), max_position_embeddings=3000)
    levels = candidate_forms(np.array([400, 500, 2900]), 2900, 8, args)
    assert {level.max_tokens for level in levels} == {512, 1024, 2048, 3000}
    assert len(set(levels)) == len(levels)
    assert all(level.max_tokens % level.cp_degree == 0 for level in levels)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (ESTIMATE[:2], "--world_size"),
        (("--estimate", "h10", "--world_size", "8"), "did you mean h100"),
        ((*ESTIMATE, "--candidates", "1023:3"), "cp_degree=3"),
        ((*ESTIMATE, "--candidates", "128:1"), "longest sample"),
        (("--packing.auto_levles", "true"), "did you mean packing.auto_levels"),
        ((*ESTIMATE, "--packing.max_sample_tokens", "99"), r"packing\.max_sample_tokens"),
    ],
)
def test_script_reports_mistakes(folder: Path, words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _main(folder, *words)
