"""Shared settings of the tests: few threads, so that several ranks share two cores without fighting; fixed examples."""

from __future__ import annotations

import os
from pathlib import Path

# Before torch is imported, which reads it then.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Programs that tests start import this checkout, not one that is installed.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(Path(__file__).resolve().parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
)

import torch

from tests.properties import register_profiles

# A CPU build of torch on a machine with a GPU: the tests use the CPU on purpose.
if not torch.cuda.is_available():
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
register_profiles()


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Name bytes by their argument: gzip writes the second into them, but every process must collect the same tests."""
    return argname if isinstance(val, bytes) else None
