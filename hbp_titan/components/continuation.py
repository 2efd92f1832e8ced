"""What of a run stays as it was when it goes on from a checkpoint, and how a difference is told.

Owns the list of these settings. Ranks, levels, precision, compilation and the number of steps may change. What decides
which samples are trained, in what order and with what weight, and the model and optimizer that the saved tensors belong
to, may not: the run would be one that no configuration describes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hbp_titan.config import JobConfig
from hbp_titan.data.chat.tokenizer import TOKENIZER_FILES
from hbp_titan.models.decoder import ModelArgs
from hbp_titan.packing.plan import PLANNER_VERSION

MISSING = "not named"


def lasting_settings(config: JobConfig, args: ModelArgs, data: str) -> dict[str, Any]:
    """What has to stay, by the names of the configuration where it has one; JSON values. data: the fingerprint."""
    packing, training = config.packing, config.training
    settings = {
        "data": data,
        "tokenizer": _digest(config.tokenizer_path),
        "planner_version": PLANNER_VERSION,
        **{f"packing.{key}": getattr(packing, key) for key in ("method", "seed", "mix", "curriculum_steps")},
        **{f"training.{key}": getattr(training, key) for key in ("global_batch_tokens", "normalizer", "max_norm")},
        **{f"optimizer.{key}": value for key, value in dataclasses.asdict(config.optimizer).items()},
        **{f"lr_scheduler.{key}": value for key, value in dataclasses.asdict(config.lr_scheduler).items()},
        **{f"model.{key}": value for key, value in dataclasses.asdict(args).items() if key != "name"},
    }
    # As it comes back from the file.
    return json.loads(json.dumps(settings))


def check_lasting(saved: Mapping[str, Any], own: Mapping[str, Any], path: Path) -> None:
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
            ' (data stands for the files, the tokenizer, [data] and, unless data.overlong is "error", the largest '
            "level's max_tokens)"
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
