"""Soak test: leaks by hand, kills, and a run that is killed often against one that is not."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from hbp_titan.components.checkpoint import completed_checkpoints
from hbp_titan.experiments.soak import (
    ProcessSamples,
    Settings,
    differences,
    leaks,
    soak,
    stepped_kills,
    table,
    timed_kills,
)
from tests.tiny_run import write_tiny_run

pytestmark = pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc; run: scripts/run_tests.sh on Linux")
DEBUG = ["--job.config_file=train_configs/debug_model.toml", "--validation.enable=false"]


def _samples(memory: list[int], handles: list[int]) -> ProcessSamples:
    samples = [(float(at), size << 20, open_) for at, (size, open_) in enumerate(zip(memory, handles, strict=True))]
    return ProcessSamples("rank 0", 7, samples)


def test_leaks_are_found_and_temporary_peaks_are_not() -> None:
    steady = [400] * 42
    assert _samples(steady, [50] * 42).leaks() == []
    # Long packs and saves, with temporary peaks of both.
    assert _samples([100] * 10 + [400, 500] * 16, [20] * 10 + [50, 55] * 16).leaks() == []
    assert _samples([400 + 3 * at for at in range(42)], [50] * 42).leaks() == [
        "rank 0 (process 7, 41 s): memory grew from 481 to 523 MiB"
    ]
    assert _samples(steady, [50 + at // 4 for at in range(42)]).leaks() == [
        "rank 0 (process 7, 41 s): handles grew from 56 to 60"
    ]


def test_short_processes_are_judged_together() -> None:
    # Random peaks of the last third, above and below the others; then a leak of 2 MiB per sample in each.
    random_peaks = [
        _samples([400, 430, 430, step], [50, 52, 52, 50 + handles]) for step, handles in ((480, 8), (420, 1), (390, 0))
    ]
    assert leaks(random_peaks) == []
    assert leaks(random_peaks, long_seconds=2) == [
        "rank 0 (process 7, 3 s): memory grew from 430 to 480 MiB",
        "rank 0 (process 7, 3 s): handles grew from 52 to 58",
    ]
    leaking = [_samples([400 + 2 * at for at in range(42)], [50 + at // 4 for at in range(42)])] * 3
    assert leaks(leaking) == [
        "memory grew by 28 MiB: median of 3 processes shorter than 600 s",
        "handles grew by 4: median of 3 processes shorter than 600 s",
    ]


def test_kills_depend_on_the_seed_and_cover_every_moment() -> None:
    first, second = ([*stepped_kills(random.Random(3), 20, 100)] for _ in range(2))
    assert first == second
    assert [kill.moment for kill in first[:4]] == ["any", "save", "load", "any"]
    steps = [kill.step for kill in first if kill.moment != "load"]
    assert steps == sorted(steps)
    assert 1 <= steps[0] <= steps[-1] < 99
    timed = timed_kills(random.Random(3), 100)
    assert {next(timed).moment for _ in range(3)} == {"any", "save", "load"}


@pytest.mark.slow
def test_killed_run_equals_the_undisturbed_one(tmp_path: Path) -> None:
    argv = [*write_tiny_run(tmp_path, num_rows=150), "--checkpoint.interval=2", "--metrics.timing_check_interval=0"]
    settings = Settings(argv, tmp_path / "soak", sample_seconds=0.05, judged_seconds=0.5)
    report = soak(settings, lambda generator: stepped_kills(generator, 3, 32), seed=1)
    assert report["faults"] == []
    assert [kill["moment"] for kill in report["kills"]] == ["any", "save", "load"]
    assert (report["steps"], report["complete"]) == (32, True)
    assert {process["name"] for process in report["processes"]} >= {"torchrun", "rank 0", "rank 1"}
    assert "bit for bit those of the undisturbed run" in table(report)

    # One changed bit of a step or of the last state is found.
    whole, disturbed = settings.folder / "whole", settings.folder / "disturbed"
    metrics = disturbed / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join([*lines[:3], lines[3].replace('"grad_norm": ', '"grad_norm": 1'), *lines[4:]]))
    assert [line.split(" is ")[0] for line in differences(whole, disturbed, 32)] == ["step 4: grad_norm"]
    metrics.write_text("".join(lines))
    manifest = completed_checkpoints(disturbed / "checkpoint")[-1] / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"sha256": "', '"sha256": "0'))
    assert [line.split(" state")[0] for line in differences(whole, disturbed, 32)] == [
        "step-32: different model, optimizer or random"
    ]
    with pytest.raises(ValueError, match="exists"):
        soak(settings, lambda generator: (), seed=1)


@pytest.mark.slow
def test_forty_random_kills_change_nothing(tmp_path: Path) -> None:
    argv = [*write_tiny_run(tmp_path, num_rows=150), "--checkpoint.interval=2", "--metrics.timing_check_interval=0"]
    settings = Settings([*argv, "--training.epochs=3"], tmp_path / "soak", sample_seconds=0.2, judged_seconds=5)
    report = soak(settings, lambda generator: stepped_kills(generator, 40, 96), seed=2)
    print(table(report))
    assert report["faults"] == [], table(report)
    assert (len(report["kills"]), report["complete"]) == (40, True)
    assert {kill["all_ranks"] for kill in report["kills"]} == {True, False}


@pytest.mark.slow
def test_debug_model_soaks_for_an_hour(tmp_path: Path) -> None:
    # Both levels from the start: memory grows when the second one begins.
    argv = [*DEBUG, "--checkpoint.interval=10", "--training.epochs=40", "--packing.curriculum_steps=0"]
    settings = Settings(argv, tmp_path / "soak", seconds=3600)
    report = soak(settings, lambda generator: timed_kills(generator, 180), seed=0)
    assert report["faults"] == [], table(report)
    assert len(report["kills"]) >= 15
    assert len(report["processes"]) >= 10
