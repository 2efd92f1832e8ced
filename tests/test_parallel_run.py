"""Levels side by side in a run: metrics, validation, and a resumption on other ranks and levels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hbp_titan.config import load_config
from hbp_titan.data.sample_log import audit_run, read_starts
from hbp_titan.data.token_store import TokenStore
from hbp_titan.preflight import check
from hbp_titan.testing.local_ranks import run_distributed
from tests.runs import read_metrics, train_until
from tests.tiny_run import ARGS, write_tiny_run


def test_a_run_of_levels_side_by_side_resumes_on_fewer_ranks_and_trains_each_sample_once(tmp_path: Path) -> None:
    argv = [
        *write_tiny_run(tmp_path, levels=""),
        # Other methods train these levels one at a time.
        "--packing.print_comparison=true",
        "--packing.level_order=parallel",
        "--checkpoint.interval=1",
        "--training.global_batch_tokens=1000",
        "--checkpoint.export_hf=false",
        "--validation.enable=true",
        "--validation.share=0.1",
        "--validation.interval=100",
        "--metrics.report=true",
    ]
    run_distributed(train_until, 4, [*argv, "--levels=128:1,256:2:allgather,256:4,512:2"], 2)
    ended = run_distributed(train_until, 2, [*argv, "--levels=128:1,512:2"], None)[0]
    assert ended["resumed"].startswith("resumed from step 2, with 2 ranks instead of 4 and levels")
    starts = read_starts(tmp_path / "run", ended["step"])
    store = TokenStore.open(starts[-1].store)
    (audit,), problems = audit_run(tmp_path / "run", ended["step"], starts, store)
    assert problems == audit.problems == []
    assert (audit.samples, audit.finished) == (len(store), True)

    steps = read_metrics(tmp_path / "run")
    step = max(steps[:2], key=lambda step: len(step["per_level"]))
    levels = step["per_level"]
    assert len(levels) > 1
    # A step's seconds and positions are divided between the levels that ran at once.
    assert sum(level["seconds"] for level in levels.values()) == pytest.approx(step["step_seconds"])
    ranks = sum(level["positions"] / int(name.split("/")[0]) * int(name[-1]) for name, level in levels.items())
    assert ranks == 4 * step["micro_batches"]
    assert steps[-1]["validation"]["trained_tokens"] > 0
    # The resumed run keeps the losses of the initial weights, and compares with them.
    assert [step["step"] for step in steps if "validation_at_start" in step] == [1]
    report = (tmp_path / "run" / "report.html").read_text()
    assert f"was {steps[0]['validation_at_start']['loss']:.4f} before step 1" in report


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ("--levels=128:1::::false,256:2::::true", "reshard_after_forward"),
        ("--levels=128:2,256:1", "lowest"),
        ("--packing.method=flat_sorted", "method"),
        ("--packing.curriculum_steps=2", "curriculum_steps"),
        ("--packing.auto_levels=true", "auto_levels"),
        ("--parallelism.expert_parallel_degree=2 --levels=128:1,256:2::full", "ac_policy"),
        ("--parallelism.expert_parallel_degree=2 --levels=128:1::::::64,256:2::::::64", "mlp_chunk_tokens"),
    ],
)
def test_what_would_give_ranks_different_collectives_is_refused(tmp_path: Path, options: str, key: str) -> None:
    levels = [] if "levels" in options else ["--levels=128:1,256:2"]
    argv = ["--packing.level_order=parallel", f"--data.train_files={tmp_path}/x.jsonl", *levels, *options.split()]
    with pytest.raises(ValueError, match=key):
        check(load_config(argv), 4, torch.device("cpu"), ARGS)
