"""What is staged is a copy, in memory that is allocated once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from hbp_titan.components.checkpoint import PinnedStaging


def _check_copies(device: str) -> None:
    tensors = {
        "weight": torch.arange(6.0, device=device).view(2, 3).t(),  # not contiguous
        "bytes": torch.arange(3, dtype=torch.uint8, device=device),
        "half": torch.full((2,), 1.5, dtype=torch.bfloat16, device=device),
        "scalar": torch.tensor(7, device=device),
        "empty": torch.zeros(0, 4, device=device),
    }
    expected = {name: value.cpu().clone() for name, value in tensors.items()}
    buffer = PinnedStaging()
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


def test_forked_processes_do_not_inherit_the_buffer() -> None:
    buffer = PinnedStaging()
    copies = buffer.copy({"weight": torch.ones(1 << 20)})
    pages = [f"{copies['weight'].data_ptr():x}-"]
    assert any(line.startswith(pages[0]) for line in Path("/proc/self/maps").read_text().splitlines())
    child = os.fork()
    if child == 0:  # as a loader worker
        mapped = Path("/proc/self/maps").read_text().splitlines()
        os._exit(any(line.startswith(pages[0]) for line in mapped))
    assert os.waitpid(child, 0)[1] == 0
    assert copies["weight"].sum() == 1 << 20


@pytest.mark.gpu
def test_copies_of_gpu_tensors_are_pinned() -> None:
    _check_copies("cuda")
