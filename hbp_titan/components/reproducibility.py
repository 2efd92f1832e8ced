"""What makes a run repeatable, and the note of it: seeds, deterministic kernels, and run.json in the run folder.

Owns the start of torch's generators and run.json: for every start of a run its command, ranks, seeds, resolved
configuration, the versions of what it is built on and the commit of its own code.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import hbp_titan
from hbp_titan.config import JobConfig, to_dict

PACKAGES = (
    "torch",
    "torchdata",
    "numpy",
    "tokenizers",
    "safetensors",
    "jinja2",
    "tensorboard",
    "tqdm",
    "triton",
    "flash-attn",
    "pyarrow",
    "zstandard",
    "pyyaml",
)
"""What decides a run's numbers or reads its files; those that are not installed are left out."""
ROOT = Path(hbp_titan.__file__).resolve().parents[1]


def start_generators(seed: int, deterministic: bool) -> None:
    """Seed torch's generators of this rank; deterministic: kernels that give other bits each time are refused."""
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(deterministic)
    if deterministic:
        # By default every new tensor would be filled too, a pass over memory each; nothing reads what it did not write.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        # What cuBLAS asks for, and torch otherwise refuses matrix products on a GPU for.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def seeds(config: JobConfig) -> dict[str, int]:
    """Every seed of a run by its key."""
    return {
        "data.seed": config.data.seed,
        "packing.seed": config.packing.seed,
        "training.seed": config.training.seed,
        "training.rng_seed": config.training.rng_seed,
    }


def note_start(config: JobConfig, step: int, world_size: int, device: torch.device) -> None:
    """Add this start of the run to run.json. step: optimizer steps that were done before it. One rank calls it."""
    path = config.dump_folder / "run.json"
    starts = read_starts(path)
    starts.append(
        {
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "command": sys.argv,
            "first_step": step + 1,
            "world_size": world_size,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "seeds": seeds(config),
            "deterministic": config.training.deterministic,
            "code": code_version(ROOT),
            "python": platform.python_version(),
            "cuda": torch.version.cuda,
            "packages": package_versions(),
            "config": to_dict(config),
        }
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"starts": starts}, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def read_starts(path: Path) -> list[dict[str, Any]]:
    """The starts that run.json at `path` tells of; none where there is no such file."""
    if not path.exists():
        return []
    try:
        starts = json.loads(path.read_text(encoding="utf-8"))["starts"]
    except (ValueError, KeyError, TypeError):
        starts = None
    if not isinstance(starts, list):
        raise ValueError(f"{path} is damaged: move it away, a new one is begun")
    return starts


def package_versions() -> dict[str, str]:
    """The versions of PACKAGES and of this one."""
    found = {"hbp_titan": hbp_titan.__version__}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def code_version(root: Path) -> dict[str, Any]:
    """The git commit of the checkout at `root` and whether its files were changed since, or why there is none."""
    try:
        if Path(_git(root, "rev-parse", "--show-toplevel")).resolve() != root:
            return {"commit": None, "why": f"{root} is not a git checkout of its own"}
        return {"commit": _git(root, "rev-parse", "HEAD"), "dirty": bool(_git(root, "status", "--porcelain"))}
    except FileNotFoundError:
        return {"commit": None, "why": "git is not installed"}
    except subprocess.SubprocessError as error:
        told = (getattr(error, "stderr", None) or str(error)).strip()
        return {"commit": None, "why": f"git: {told.splitlines()[0] if told else error}"}


def _git(root: Path, *words: str) -> str:
    command = ["git", "-C", str(root), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
