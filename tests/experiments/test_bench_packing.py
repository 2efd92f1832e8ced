"""scripts/bench_packing.py runs with whatever peers are installed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bench_packing.py"


def test_our_rows_are_there_and_pack_tightly(tmp_path):
    words = ("--num_samples", "5000", "--limit", "1", "--repeat", "1", "--json", str(tmp_path / "out.json"))
    result = subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "out.json").read_text())
    assert {"ours bfd", "ours lpt", "ours isf", "plan hbp", "plan flat_sorted", "plan hbp_paper"} <= set(figures)
    assert figures["ours bfd"]["pr"] <= figures["ours isf"]["pr"]
    assert figures["plan hbp"]["samples"] == 5000
