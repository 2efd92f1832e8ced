"""Shared settings of the tests: few threads, so that several ranks share two cores without fighting."""

from __future__ import annotations

import os

import torch

# A CPU build of torch on a machine with a GPU: the tests use the CPU on purpose.
if not torch.cuda.is_available():
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("OMP_NUM_THREADS", "1")
