"""Where the run is, what must not change when it resumes, and the record of each start.

Owns what state.json says apart from tensors: position in the data (data/epoch.py), learning-rate schedule and the
settings that must stay the same (`resume_invariants`). Ranks, levels, precision, compilation and the number of steps
may change. What decides which samples are trained, in what order and with what weight, and the model and optimizer of
the saved tensors may not: no configuration would describe the run.

Owns run.json as well, which lists for every start its command, ranks, seeds, resolved configuration and versions.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import hbp_titan
from hbp_titan.components.checkpoint import completed_checkpoints
from hbp_titan.components.optimizer import LRScheduler
from hbp_titan.config import CHOICES, JobConfig, to_dict
from hbp_titan.data.epoch import EpochPlans, EpochState
from hbp_titan.data.sample_log import SAMPLE_LOG, start_folders
from hbp_titan.models.configs import ModelArgs
from hbp_titan.models.hf_files import tokenizer_files, weights_digest
from hbp_titan.packing.plan import PLANNER_VERSION
from hbp_titan.utils import atomic_write, sha256_file, sha256_text

MISSING = "not recorded"
RESTORE = "restore it, or use a different --job.dump_folder"
MAY_CHANGE = CHOICES["checkpoint.allow_changed"]
"""A run can continue with another value: no plan, sample or saved tensor depends on it."""
DATA_KEYS = (
    "train_files", "sources", "train_on", "chat_template", "chat_template_kwargs", "template_date",
    "max_length_policy", "reasoning", "empty_answers", "malformed", "duplicates", "max_samples", "max_row_bytes",
)  # fmt: skip
"""Keys of [data] that decide what is trained."""
PARTS = ("data.", "validation.")
"""Keys that are compared only to say why the data differ."""
PACKAGES = (
    "torch", "torchdata", "numpy", "tokenizers", "safetensors", "jinja2", "tensorboard", "tqdm", "triton", "flash-attn",
    "torchao", "pyarrow", "zstandard", "pyyaml",
)  # fmt: skip
"""Packages that affect a run's numbers or read its files."""
CODE = ("hbp_titan", "scripts", "run_train.sh", "pyproject.toml")
"""What a run executes, in the root of a checkout."""
ROOT = Path(hbp_titan.__file__).resolve().parents[1]


class TrainState:
    """The progress of a run: its start, until `restore` continues from a checkpoint.

    data: fingerprint of the training data. resumed: the lines that describe the continuation, "" for a new run.
    """

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
        """Return the learning rate of the next step."""
        return self.config.optimizer.lr * self.lr_scheduler.factor(self.config.lr_scheduler, self.position.step)

    def state(self) -> dict[str, Any]:
        """Return what `restore` needs, as plain JSON values."""
        return {
            **self.position.state(),
            "lr_scheduler": dataclasses.asdict(self.lr_scheduler),
            "resume_invariants": self.resume_invariants,
        }

    def check(self, state: Mapping[str, Any], path: Path) -> None:
        """Raise ValueError if the checkpoint at `path` was saved with different settings."""
        allowed = self.config.checkpoint.allow_changed
        check_resume_compatible(state.get("resume_invariants", {}), self.resume_invariants, path, allowed)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`; raise ValueError if the run folder lacks the record of what was trained before it."""
        try:
            changed = self.position.restore(state)
        except ValueError as error:
            raise ValueError(f"cannot resume: {error}; {RESTORE}") from None
        step = self.position.step
        check_sample_log(self.config.dump_folder, step)
        # Other ranks, levels or epochs change the number of steps that remain.
        self.lr_scheduler = LRScheduler(**state["lr_scheduler"]).extend(step, self.position.total_steps())
        self.resumed = f"resumed from step {step}" + (f", {changed}" if changed else "")
        if self.lr_scheduler.used_up and self.config.lr_scheduler.decay != "constant":
            newest = self.config.dump_folder / "checkpoint" / f"step-{step}"
            self.resumed += (
                f"\nwarning: the learning-rate schedule ended with step {step}: steps {step + 1} to {self.total_steps} "
                f"train at its last rate, {self.learning_rate():.3g}; for a schedule of their own, start a new "
                f"run with --checkpoint.initial_load_path {newest} and another --job.dump_folder"
            )


def check_sample_log(run_folder: Path, step: int) -> None:
    """Raise ValueError if `run_folder` lacks the samples of the `step` steps that a run has done."""
    # Without it the audit could not tell what the earlier starts trained.
    if not start_folders(run_folder / SAMPLE_LOG):
        raise ValueError(f"cannot resume: {run_folder / SAMPLE_LOG} lacks the samples of steps 1 to {step}; {RESTORE}")


def can_resume(config: JobConfig) -> bool:
    """Return whether the run folder has a checkpoint, which this start then loads."""
    return config.checkpoint.enable and bool(completed_checkpoints(config.dump_folder / "checkpoint"))


def check_starts_over(config: JobConfig) -> None:
    """Raise ValueError if a run that does not resume would replace the metrics and sample log of one that can."""
    if not config.checkpoint.enable and (found := completed_checkpoints(config.dump_folder / "checkpoint")):
        raise ValueError(
            f"checkpoint.enable = false starts over, but {found[-1]} is of a run that can be resumed; use a different "
            "--job.dump_folder"
        )


def resume_invariants(config: JobConfig, args: ModelArgs, data: str) -> dict[str, Any]:
    """Return the settings that must stay the same, as JSON values under their configuration keys where they have one.

    data: fingerprint of the training data; the keys in PARTS say what it is made of.
    """
    packing, training, lora = config.packing, config.training, config.lora
    initial, hf_path = config.weights_path, config.model.hf_path
    settings = {
        "data": data,
        **{f"data.{key}": getattr(config.data, key) for key in DATA_KEYS},
        "data.seed": config.seed_of("data"),
        "validation.share": config.validation.share,
        "tokenizer": _tokenizer_digest(config.tokenizer_path),
        "initial_weights": _folder(initial) if initial else f"new, training.seed = {training.seed}",
        "model.hf_path": _folder(hf_path),
        "planner_version": PLANNER_VERSION,
        "packing.seed": config.seed_of("packing"),
        **{f"packing.{key}": getattr(packing, key) for key in ("method", "level_order", "curriculum_steps")},
        **{
            f"training.{key}": getattr(training, key)
            for key in ("global_batch_tokens", "loss_normalization", "max_norm")
        },
        "lora.rank": lora.rank,
        **({"lora.alpha": lora.alpha, "lora.target_modules": lora.target_modules} if lora.rank else {}),
        **{f"optimizer.{key}": value for key, value in dataclasses.asdict(config.optimizer).items()},
        **{f"lr_scheduler.{key}": value for key, value in dataclasses.asdict(config.lr_scheduler).items()},
        **{f"model.{key}": value for key, value in dataclasses.asdict(args).items() if key != "name"},
    }
    # Tuples become lists, as when they are read from the file.
    return json.loads(json.dumps(settings, default=dataclasses.asdict))


def _folder(path: str) -> dict[str, str] | str:
    """Return what identifies a folder with weights: a moved one is the same."""
    return {"path": path, "digest": weights_digest(Path(path))} if path else ""


def check_resume_compatible(
    saved: Mapping[str, Any], own: Mapping[str, Any], path: Path, allowed: Sequence[str] = ()
) -> None:
    """Raise ValueError, naming every difference, if the checkpoint at `path` has other invariants than this run.

    allowed: names that may differ (checkpoint.allow_changed).
    """
    same_data = saved.get("data") == own.get("data")
    differences = {}
    # Keys of both sides: one that only one version of the code records is a difference, too.
    for name in dict.fromkeys([*saved, *own]):
        before, now = saved.get(name, MISSING), own.get(name, MISSING)
        if name in allowed or _identity(before) == _identity(now) or (same_data and name.startswith(PARTS)):
            continue
        differences[name] = f"{name}: {_format(before)} (checkpoint) vs {_format(now)} (this run)"
    if not differences:
        return
    hint = " (data stands for the content of the files and of the template, the tokenizer, [data] and, unless "
    hint = "" if same_data else f'{hint}data.max_length_policy is "error", the largest level\'s max_tokens)'
    fix = "restore them, or use a different --job.dump_folder"
    if may := [name for name in differences if name in MAY_CHANGE]:
        fix += f"; to continue with the new value: --checkpoint.allow_changed {','.join(may)}"
    values = "; ".join(differences.values())
    raise ValueError(f"cannot resume: {path} was saved with different settings: {values}{hint}; {fix}")


def _identity(value: Any) -> Any:
    return value["digest"] if isinstance(value, dict) and "digest" in value else value


def _tokenizer_digest(tokenizer_path: Path) -> str:
    names = tokenizer_files(tokenizer_path)
    return sha256_text("\n".join(f"{name} {sha256_file(tokenizer_path / name)}" for name in names))


def _format(value: Any) -> str:
    if isinstance(value, dict) and "digest" in value:
        return f"{value['path']} (content {value['digest'][:16]})"
    is_digest = isinstance(value, str) and len(value) == 64
    return value[:16] if is_digest else json.dumps(value)


def set_determinism(seed: int, deterministic: bool) -> None:
    """Seed torch's generators on this rank; with `deterministic`, torch raises for kernels whose bits vary."""
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(deterministic)
    if deterministic:
        # By default every new tensor would also be filled: one more pass over memory, and nothing reads the values.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        # Without it torch raises at the first matrix product on a GPU: cuBLAS is not deterministic otherwise.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def record_start(config: JobConfig, step: int, world_size: int, device: torch.device) -> None:
    """Add this start to run.json; called on one rank. step: optimizer steps done before this start."""
    path = config.dump_folder / "run.json"
    starts = recorded_starts(path)
    starts.append(
        {
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "command": sys.argv,
            "first_step": step + 1,
            "world_size": world_size,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "seeds": {
                "training.seed": config.training.seed,
                "data.seed": config.seed_of("data"),
                "packing.seed": config.seed_of("packing"),
                "training.rng_seed": config.seed_of("rng"),
            },
            "deterministic": config.training.deterministic,
            "code": code_version(ROOT),
            "python": platform.python_version(),
            "cuda": torch.version.cuda,
            "packages": package_versions(),
            "config": to_dict(config),
        }
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps({"starts": starts}, indent=1) + "\n")


def recorded_starts(path: Path) -> list[dict[str, Any]]:
    """Return the starts listed in run.json, [] if there is no such file; raise ValueError if it cannot be read."""
    if not path.exists():
        return []
    try:
        starts = json.loads(path.read_text(encoding="utf-8"))["starts"]
    except (ValueError, KeyError, TypeError):
        starts = None
    if not isinstance(starts, list):
        raise ValueError(f"{path}: the file is corrupt; move it aside and a new one will be created")
    return starts


def package_versions() -> dict[str, str]:
    """Return the version of this package and of every installed one of PACKAGES."""
    found = {"hbp_titan": hbp_titan.__version__}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def code_version(root: Path) -> dict[str, Any]:
    """Return the git commit of the checkout at `root` and whether files changed since, or why there is none."""
    try:
        # An installation inside another project's checkout would otherwise report that project's commit.
        if Path(_git(root, "rev-parse", "--show-toplevel")).resolve() != root:
            return {"commit": None, "why": f"{root} is not a git checkout of its own"}
        # Only what a run executes: data, logs of SLURM or a configuration of the user in the root change no code.
        changed = _git(root, "status", "--porcelain", "--", *CODE)
        return {"commit": _git(root, "rev-parse", "HEAD"), "dirty": bool(changed)}
    except FileNotFoundError:
        return {"commit": None, "why": "git is not installed"}
    except subprocess.SubprocessError as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip()
        return {"commit": None, "why": f"git: {reason.splitlines()[0] if reason else error}"}


def _git(root: Path, *words: str) -> str:
    command = ["git", "-C", str(root), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
