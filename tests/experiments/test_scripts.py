"""scripts/plot_elastic.py and scripts/bench_packing.py."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from scripts import bench_packing, plot_elastic
from tests.programs import run_python
from tests.tiny_run import write_tiny_run


def _call(*words: str) -> subprocess.CompletedProcess[str]:
    return run_python(*words, timeout=500)


@pytest.mark.slow
def test_plot_elastic_trains_draws_and_audits_four_segments(tmp_path: Path) -> None:
    argv = [word for word in write_tiny_run(tmp_path, num_rows=600) if not word.startswith("--job")]
    words = ["--folder", str(tmp_path), "--svg", str(tmp_path / "elastic.svg"), "--segments", "4,2,1,4"]
    settings = ["--checkpoint.interval=3", "--checkpoint.export_hf=false", "--training.global_batch_tokens=600"]
    result = _call("scripts/plot_elastic.py", *words, *argv, *settings)
    assert result.returncode == 0, result.stderr
    for ranks, before in ((2, 4), (1, 2), (4, 1)):
        assert f"with {ranks} rank{'s' if ranks > 1 else ''} instead of {before}" in result.stdout
    svg = (tmp_path / "elastic.svg").read_text()
    assert [svg.count(f">{label}</text>") for label in ("4 ranks", "2 ranks", "1 rank")] == [4, 2, 2]
    for name in ("whole", "elastic"):
        audit = _call("scripts/audit_epoch.py", str(tmp_path / name))
        assert (audit.returncode, audit.stderr) == (0, "")
        assert "each sample trained once" in audit.stdout


def test_plot_elastic_needs_numbers_of_ranks() -> None:
    with pytest.raises(ValueError, match="4,two"):
        plot_elastic.main(["--segments", "4,two"])


def test_bench_packing_measures_our_packers_and_plans(tmp_path: Path) -> None:
    # A limit that no busy machine reaches: a packer that reaches it is reported for a tenth of the samples.
    bench_packing.main(["--num_samples=5000", "--limit=10000", "--repeat=1", f"--json={tmp_path / 'out.json'}"])
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures["ours bfd"]["samples"] == figures["ours isf"]["samples"]
    assert {"ours bfd", "ours lpt", "ours isf", "plan hbp", "plan flat_sorted", "plan hbp_paper"} <= set(figures)
    assert figures["ours bfd"]["pr"] <= figures["ours isf"]["pr"]
    assert figures["plan hbp"]["samples"] == 5000
