"""What is staged is a copy, in memory that is allocated once."""

from __future__ import annotations

import pytest
import torch

from hbp_titan.components.staging import HostBuffer


def _check_copies(device: str) -> None:
    tensors = {
        "weight": torch.arange(6.0, device=device).view(2, 3).t(),  # not contiguous
        "bytes": torch.arange(3, dtype=torch.uint8, device=device),
        "half": torch.full((2,), 1.5, dtype=torch.bfloat16, device=device),
        "scalar": torch.tensor(7, device=device),
        "empty": torch.zeros(0, 4, device=device),
    }
    expected = {name: value.cpu().clone() for name, value in tensors.items()}
    buffer = HostBuffer()
    copies = buffer.copy(tensors)
    for value in tensors.values():
        value.zero_()
    assert all(copies[name].equal(value) for name, value in expected.items())
    assert all(copy.is_contiguous() and not copy.is_cuda for copy in copies.values())
    again = buffer.copy(tensors)
    assert [copy.data_ptr() for copy in again.values()] == [copy.data_ptr() for copy in copies.values()]
    assert not any(copy.any() for copy in again.values())
    assert copies["weight"].is_pinned() == (device == "cuda")
    buffer.close()


def test_copies_do_not_follow_their_tensors_and_memory_is_used_again() -> None:
    _check_copies("cpu")


@pytest.mark.gpu
def test_copies_of_gpu_tensors_are_pinned() -> None:
    _check_copies("cuda")
