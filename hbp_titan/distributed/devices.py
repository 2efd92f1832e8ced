"""The GPUs of this machine, before any rank starts: whether torch can use them, and how torchrun should.

`python -m hbp_titan.distributed.devices [RANKS]` prints for run_train.sh the number of ranks to start on this machine
(RANKS, or one for each GPU) and torchrun's options for GPUs. It ends with one error line where torch cannot use the
machine's GPU.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from hbp_titan.cli import guarded, one_line

CPU_RANKS = 2
"""Ranks on a machine without a GPU."""


def require_usable_gpu(dev: Path = Path("/dev")) -> None:
    """Raise ValueError where the machine has an NVIDIA GPU and torch, without CUDA, would train on the CPU unasked.

    CUDA_VISIBLE_DEVICES set to nothing asks for it. dev: where the driver's device files are.
    """
    device = dev / "nvidia0"
    if torch.cuda.is_available() or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1") or not device.exists():
        return
    raise ValueError(
        f"this machine has an NVIDIA GPU ({device}), but torch {torch.__version__} cannot use it: "
        f"{_reason()}; install a driver and a torch build that fit, or train on the CPU with CUDA_VISIBLE_DEVICES=''"
    )


def _reason() -> str:
    if torch.version.cuda is None:
        return "it is a build without CUDA"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return one_line(error).rstrip(".")
    return "it finds no CUDA device"


def numa_options(gpus: int) -> list[str]:
    """torchrun's options that bind each rank to the CPUs next to its GPU; none where that is not possible.

    torchrun does not start a rank that it cannot bind: without the program numactl, without an entry of the GPU in
    /sys, or where the job may not use the CPUs of the GPU's node. NUMA_BINDING in the environment names another mode
    of `torchrun --numa-binding`, or "none".
    """
    mode = os.environ.get("NUMA_BINDING", "node")
    if mode == "none" or shutil.which("numactl") is None:
        return []
    try:
        from torch.numa.binding import AffinityMode, NumaOptions, _get_logical_cpus_to_bind_to

        wanted = NumaOptions(affinity_mode=AffinityMode(mode))
        bound: Iterable[set[int]] = [
            set(_get_logical_cpus_to_bind_to(gpu_index=gpu, numa_options=wanted)) for gpu in range(gpus)
        ]
    except (ImportError, OSError, RuntimeError, ValueError, KeyError, AttributeError, TypeError):
        return []
    allowed = os.sched_getaffinity(0)
    return ["--numa-binding", mode] if all(cpus and cpus <= allowed for cpus in bound) else []


def main() -> None:
    """Print the number of ranks and torchrun's options on one line."""
    guarded(require_usable_gpu)
    gpus = torch.cuda.device_count()
    ranks = int(sys.argv[1]) if len(sys.argv) > 1 else gpus or CPU_RANKS
    print(ranks, *(numa_options(ranks) if gpus >= ranks else []))


if __name__ == "__main__":
    main()
