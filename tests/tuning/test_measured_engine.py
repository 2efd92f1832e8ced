"""Memory is counted to the byte, inside operators and in backward."""

from __future__ import annotations

import torch

from hbp_titan.tuning.measured_engine import measure_memory

CPU = torch.device("cpu")


def test_peak_counts_what_is_held_at_one_time_and_held_what_remains() -> None:
    with measure_memory(CPU) as use:
        first = torch.zeros(1000, 1000)
        del first
        second = torch.zeros(500, 1000)
        third = torch.zeros(100, 1000)
    assert (use.peak_bytes, use.held_bytes) == (4_000_000, 2_400_000)
    del second, third


def test_backward_and_the_inside_of_operators_are_seen() -> None:
    x = torch.zeros(1000, requires_grad=True)
    with measure_memory(CPU) as use:
        # The result of the exponential is held for its backward while the gradient is made.
        (x * 2.0).exp().sum().backward()
    assert use.held_bytes == 4000
    assert use.peak_bytes >= 2 * 4000
