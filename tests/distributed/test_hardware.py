"""The table of machines, and the error for one that is not in it."""

from __future__ import annotations

import pytest
import torch

from hbp_titan.components.step_stats import peak_flops
from hbp_titan.tuning.hardware import HARDWARE, get_hardware


def test_peak_of_a_cpu_is_unknown() -> None:
    assert peak_flops(torch.device("cpu")) is None


def test_a_name_is_found_whatever_its_case_and_a_wrong_one_names_the_nearest() -> None:
    assert get_hardware(" H100-80GB").peak_flops == 989e12
    with pytest.raises(ValueError, match="did you mean h100-80gb"):
        get_hardware("h100-80")


def test_every_machine_reports_somewhat_less_memory_than_its_name_says() -> None:
    for name, hardware in HARDWARE.items():
        named = int(name.split("-")[1].removesuffix("gb"))
        assert 0.98 * named < hardware.memory_bytes / 2**30 < named


def test_a_ring_across_nodes_is_as_fast_as_the_adapters_of_its_ranks() -> None:
    h100 = get_hardware("h100-80gb")
    assert h100.bus_bandwidth(8, 8) == 450e9
    assert h100.bus_bandwidth(32, 8) == 400e9
    assert h100.bus_bandwidth(4, 1) == 50e9
