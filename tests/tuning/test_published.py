"""The hardware table's efficiencies follow from the published figures."""

from __future__ import annotations

import statistics

import numpy as np
import pytest

from hbp_titan.tuning.hardware import HARDWARE, get_hardware
from hbp_titan.tuning.published import (
    LENGTHS,
    NCCL_ALL_GATHER,
    RANGES,
    RUNS,
    attention_estimates,
    block_waste,
    combined_tflops,
    curve,
    efficiency_tables,
    exchange_efficiency,
    fit_length,
    linear_efficiency,
    run_seconds,
)


def test_combined_rate_counts_the_backward_twice() -> None:
    # One second of forward at 100, and 2.5 times its products at 100: 3.5 seconds for what the model counts as 3.
    assert combined_tflops(100, 100) == pytest.approx(300 / 3.5)


def test_fit_recovers_rate_and_block() -> None:
    rate, block = fit_length(500 / block_waste(np.array(LENGTHS), 128))
    assert (rate, block) == (pytest.approx(500), 128)


@pytest.mark.parametrize(
    ("gpu", "kernel", "head_dim"),
    [
        *(("a100", "fa2", 64), ("a100", "fa2", 128), ("h100", "fa2", 64), ("h100", "fa2", 128)),
        *(("h100", "fa3", 64), ("h100", "fa3", 128), ("b200", "fa4", 128), ("b200", "fa4", 192)),
    ],
)
def test_attention_of_the_table_is_within_4_percent_of_the_published(gpu: str, kernel: str, head_dim: int) -> None:
    machine = get_hardware(next(name for name in HARDWARE if name.startswith(gpu))).with_attention(kernel)
    value = machine.attention_rate(head_dim) / machine.peak_flops
    estimates = [share for share, _ in attention_estimates(gpu, kernel, head_dim)]
    assert value == pytest.approx(statistics.mean(estimates), rel=0.04)


@pytest.mark.parametrize(("gpu", "kernel"), [("a100-80gb", "fa2"), ("h100-80gb", "fa2")])
def test_block_reproduces_the_published_lengths(gpu: str, kernel: str) -> None:
    machine, published = get_hardware(gpu).with_attention(kernel), curve(gpu[:4], kernel, 128, "both")
    shape = 1 / block_waste(np.array(LENGTHS), machine.attention_block)
    expected = np.array(published.tflops) / published.tflops[-1]
    np.testing.assert_allclose(shape / shape[-1], expected, rtol=0.05)


def test_unknown_curve_raises() -> None:
    with pytest.raises(ValueError, match="fa5"):
        curve("h100", "fa5", 128, "both")


@pytest.mark.parametrize("gpu", ["a100", "h100"])
def test_linear_efficiency_is_the_median_of_large_runs(gpu: str) -> None:
    # torchtitan's GPUs were limited to 500 W; its runs are the low end of the range.
    derived = [linear_efficiency(run) for run in RUNS if run.gpu == gpu and "500 W" not in run.source]
    assert get_hardware(f"{gpu}-80gb").linear_efficiency == pytest.approx(statistics.median(derived), abs=0.015)
    low = next(r for r in RANGES if r.field == "linear_efficiency").low
    compiled = next(run for run in RUNS if run.compiled)
    assert linear_efficiency(compiled) == pytest.approx(low, abs=0.01)
    assert run_seconds(compiled, linear_efficiency(compiled)) == pytest.approx(16384 / 6667, rel=1e-3)


def test_communication_follows_from_nccl() -> None:
    for name, machine in HARDWARE.items():
        if not name.startswith("rtx"):
            assert machine.exchange_efficiency == pytest.approx(exchange_efficiency(machine), abs=0.006)
            assert machine.gather_efficiency == NCCL_ALL_GATHER


def test_table_values_lie_in_their_ranges_and_are_printed() -> None:
    text = efficiency_tables()
    for r in RANGES:
        assert r.low <= getattr(get_hardware("h100-80gb"), r.field) <= r.high
        assert r.field in text
    assert text.count("| assumed |") == 3 + 6
