"""The benchmark of the data path."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hbp_titan.experiments.bench_data import Speed, table
from tests.programs import run_python
from tests.tiny_run import write_tiny_run

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_every_method_is_timed_on_the_same_tokens(tmp_path: Path) -> None:
    words = ["--rounds=2", "--workers=0,1", f"--json={tmp_path / 'out.json'}", *write_tiny_run(tmp_path)]
    result = run_python("scripts/bench_data.py", *words)
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    assert [speed["name"] for speed in report["loader"]] == [
        "plain copy of tokens and masks",
        "batches, in process",
        "loader, 0 workers",
        "loader, 1 worker",
    ]
    copied, made, loaded, _ = (speed["tokens"] for speed in report["loader"])
    assert copied == made == loaded > 0
    bare, whole = report["preparation"]
    # Decoded text is encoded to the same number of tokens.
    assert bare["tokens"] == whole["tokens"] >= copied
    assert all(len(speed["seconds"]) == 2 and min(speed["seconds"]) > 0 for speed in (*report["loader"], bare, whole))
    assert "| encode_batch on the same texts |" in result.stdout


def test_table_compares_medians_with_the_first_row() -> None:
    rows = table([Speed("floor", 100, [1.0, 2.0, 9.0]), Speed("whole", 50, [4.0])]).splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert cells[2] == ["floor", "100", "2 (1-9)", "50", "1"]
    assert cells[3] == ["whole", "50", "4 (4-4)", "12", "0.25"]
