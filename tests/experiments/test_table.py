"""The printed row of a measurement, by hand."""

from __future__ import annotations

import dataclasses

import pytest

from hbp_titan.experiments.bench_train import COLUMNS, Measurement, header, relative_times, rows

NONE = Measurement(
    model="debug",
    layers=4,
    max_tokens=8192,
    cp_degree=2,
    documents="one",
    ac_policy="none",
    ac_layers=None,
    compile=False,
    optimizer_step=False,
    tokens=8192,
    flops=3e12,
    flops_ratio=1.0,
    saved_bytes=10264.0,
    peak_bytes=3 << 30,
    seconds=[2.0, 4.0, 2.0],
)
FULL = dataclasses.replace(NONE, ac_policy="full", ac_layers=3, flops_ratio=1.2, seconds=[3.0, 4.0, 2.5])


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_row_gives_throughput_mfu_memory_and_the_ratio_round_by_round() -> None:
    assert relative_times(FULL, NONE) == (1.25, 1.0, 1.5)  # 3 / 2, 4 / 4, 2.5 / 2
    names, *found = (_cells(line) for line in (header().splitlines()[0], *rows([NONE, FULL], peak_flops=6e12)))
    assert names == [name for name, _ in COLUMNS]
    level = ["debug", "4", "8192", "2", "one", "off"]
    # Medians of 2 and 3 seconds.
    assert found[0] == [*level, "none", "4,096", "1.5", "25.0%", "3", "10,264", "2", "1.00 (1.00-1.00)", "1.00"]
    assert found[1] == [*level, "full:3", "2,731", "1", "16.7%", "3", "10,264", "3", "1.25 (1.00-1.50)", "1.20"]


def test_want_of_memory_and_unknown_peaks_are_said() -> None:
    lost = dataclasses.replace(NONE, seconds=[], peak_bytes=None, saved_bytes=None)
    found = [_cells(line) for line in rows([lost, FULL], peak_flops=None)]
    assert found[0][7:] == ["out of memory", "", "", "", "-", "", "", "1.00"]
    assert (found[1][9], found[1][13]) == ("-", "-")  # no peak FLOP/s, nothing to compare with
    assert relative_times(FULL, None) is None


@pytest.mark.parametrize("found", [NONE, FULL, dataclasses.replace(NONE, seconds=[], peak_bytes=None)])
def test_every_row_has_every_column(found: Measurement) -> None:
    (line,) = rows([found], peak_flops=1e12)
    assert line.count("|") == header().splitlines()[1].count("|") == len(COLUMNS) + 1
