"""The hardware table, and the error for an unknown name."""

from __future__ import annotations

import pytest
import torch

from hbp_titan.components.step_stats import peak_flops
from hbp_titan.tuning.hardware import HARDWARE, get_hardware


def test_peak_of_a_cpu_is_unknown() -> None:
    assert peak_flops(torch.device("cpu")) is None


def test_lookup_ignores_case_and_suggests_names() -> None:
    assert get_hardware(" H100-80GB").peak_flops == 989e12
    with pytest.raises(ValueError, match="did you mean h100-80gb"):
        get_hardware("h100-80")


def test_memory_is_slightly_below_the_nominal_size() -> None:
    for name, hardware in HARDWARE.items():
        named = int(name.split("-")[1].removesuffix("gb"))
        assert 0.98 * named < hardware.memory_bytes / 2**30 < named


def test_ring_across_nodes_is_limited_by_the_adapters() -> None:
    h100 = get_hardware("h100-80gb")
    assert h100.bus_bandwidth(8, 8) == 450e9
    assert h100.bus_bandwidth(32, 8) == 400e9
    assert h100.bus_bandwidth(4, 1) == 50e9
