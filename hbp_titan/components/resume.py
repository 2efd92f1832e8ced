"""TrainState: how far a run is, beside tensors, and how it goes on from there.

Owns what state.json says of it: position in the data (data/epoch.py), the learning rate's schedule and the settings
that must not change.

What of a run stays as it was when it goes on from a checkpoint, and how a difference is told.

Owns the list of these settings. Ranks, levels, precision, compilation and the number of steps may change. What decides
which samples are trained, in what order and with what weight, and the model and optimizer that the saved tensors belong
to, may not: the run would be one that no configuration describes.

What makes a run repeatable, and the note of it: seeds, deterministic kernels, and run.json in the run folder.

Owns the start of torch's generators and run.json: for every start of a run its command, ranks, seeds, resolved
configuration, the versions of what it is built on and the commit of its own code.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import hbp_titan
from hbp_titan.components.optimizer import LRScheduler
from hbp_titan.config import JobConfig, to_dict
from hbp_titan.data.epoch import EpochPlans, EpochState
from hbp_titan.data.files import TOKENIZER_FILES
from hbp_titan.data.sample_log import SAMPLE_LOG, start_folders
from hbp_titan.models.decoder import ModelArgs
from hbp_titan.packing.plan import PLANNER_VERSION

MISSING = "not named"


def resume_invariants(config: JobConfig, args: ModelArgs, data: str) -> dict[str, Any]:
    """What has to stay, by the names of the configuration where it has one; JSON values. data: the fingerprint."""
    packing, training = config.packing, config.training
    settings = {
        "data": data,
        "tokenizer": _digest(config.tokenizer_path),
        "planner_version": PLANNER_VERSION,
        "packing.seed": config.seed_of("packing"),
        **{f"packing.{key}": getattr(packing, key) for key in ("method", "level_order", "curriculum_steps")},
        **{
            f"training.{key}": getattr(training, key)
            for key in ("global_batch_tokens", "loss_normalization", "max_norm")
        },
        **{f"optimizer.{key}": value for key, value in dataclasses.asdict(config.optimizer).items()},
        **{f"lr_scheduler.{key}": value for key, value in dataclasses.asdict(config.lr_scheduler).items()},
        **{f"model.{key}": value for key, value in dataclasses.asdict(args).items() if key != "name"},
    }
    # As it comes back from the file.
    return json.loads(json.dumps(settings))


def check_resume_compatible(saved: Mapping[str, Any], own: Mapping[str, Any], path: Path) -> None:
    """Raise ValueError where the checkpoint at `path` is of a run with other settings; it names every one of them."""
    differences = [
        f"{name} is {_shown(saved.get(name, MISSING))} there but {_shown(own.get(name, MISSING))} here"
        for name in dict.fromkeys([*saved, *own])
        if saved.get(name, MISSING) != own.get(name, MISSING)
    ]
    if not differences:
        return
    hint = ""
    if saved.get("data") != own.get("data"):
        hint = (
            ' (data stands for the files, the tokenizer, [data] and, unless data.max_length_policy is "error", '
            "the largest level's max_tokens)"
        )
    raise ValueError(
        f"cannot resume: {path} is of a run with other settings: {'; '.join(differences)}{hint}: set them back, or "
        "name another --job.dump_folder"
    )


def _digest(tokenizer_path: Path) -> str:
    files = [tokenizer_path / name for name in TOKENIZER_FILES if (tokenizer_path / name).is_file()]
    parts = [f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}" for file in files]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _shown(value: Any) -> str:
    is_digest = isinstance(value, str) and len(value) == 64
    return value[:16] if is_digest else json.dumps(value)


class TrainState:
    """A run at its start, until `restore`. resumed: a line that tells of that, "" before. data: the fingerprint."""

    def __init__(self, config: JobConfig, args: ModelArgs, plans: EpochPlans, data: str) -> None:
        self.config = config
        self.position = EpochState(plans, config.dump_folder, data)
        total_steps = self.position.total_steps()
        self.lr_scheduler = LRScheduler(total_steps, total_steps)
        self.resume_invariants = resume_invariants(config, args, data)
        self.resumed = ""

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.lr_scheduler.total

    def learning_rate(self) -> float:
        """The rate of the next step."""
        return self.config.optimizer.lr * self.lr_scheduler.factor(self.config.lr_scheduler, self.position.step)

    def state(self) -> dict[str, Any]:
        """What `restore` needs, as plain JSON values."""
        return {
            **self.position.state(),
            "lr_scheduler": dataclasses.asdict(self.lr_scheduler),
            "resume_invariants": self.resume_invariants,
        }

    def check(self, state: Mapping[str, Any], path: Path) -> None:
        """Raise ValueError where the checkpoint at `path` is of a run with other settings."""
        check_resume_compatible(state.get("resume_invariants", {}), self.resume_invariants, path)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go to where `state` said; ValueError where the run folder does not hold what was trained up to there."""
        mend = "restore that, or name another --job.dump_folder"
        try:
            changed = self.position.restore(state)
        except ValueError as error:
            raise ValueError(f"cannot resume: {error}; {mend}") from None
        step, sample_log = self.position.step, self.config.dump_folder / SAMPLE_LOG
        if not start_folders(sample_log):
            raise ValueError(f"cannot resume: {sample_log} does not have the samples of steps 1 to {step}; {mend}")
        self.lr_scheduler = LRScheduler(**state["lr_scheduler"]).extend(step, self.position.total_steps())
        self.resumed = f"resumed from step {step}" + (f", {changed}" if changed else "")


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


def set_determinism(seed: int, deterministic: bool) -> None:
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
        "data.seed": config.seed_of("data"),
        "packing.seed": config.seed_of("packing"),
        "training.seed": config.training.seed,
        "training.rng_seed": config.seed_of("rng"),
    }


def record_start(config: JobConfig, step: int, world_size: int, device: torch.device) -> None:
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
