"""Profile: everything that was measured of candidate levels, and its JSON file.

Owns the rows, the key that says what a profile holds for, and the reading and writing of the file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hbp_titan import __version__
from hbp_titan.config import JobConfig
from hbp_titan.distributed.parallelize import compute_dtype
from hbp_titan.distributed.world import World, ranks_per_node
from hbp_titan.levels.candidate import Candidate
from hbp_titan.levels.level_time import LevelTime
from hbp_titan.models.attention import selected_backend
from hbp_titan.models.decoder import ModelArgs
from hbp_titan.packing import Level
from hbp_titan.packing.arrays import IntArray

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Measurement:
    """One thing that was found out of one level (its ac_layers say how many layers were checkpointed).

    peak_bytes: the most that a rank holds during an iteration, of the rank that holds most; loads, seconds: what the
    timed packs hold ([n][4], as pack_loads) and the seconds of each on the slowest rank. out_of_memory: the iteration
    failed, or its peak exceeds the limit. estimated: nothing was run, peak_bytes is an estimate. error: of the fitted
    LevelTime, root mean square relative to the mean.
    """

    level: Level
    peak_bytes: int | None = None
    out_of_memory: bool = False
    estimated: bool = False
    loads: list[list[float]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    error: float | None = None


@dataclass(frozen=True)
class Profile:
    """What one machine does with one model and one set of lengths.

    key: what it holds for, as from `profile_key`. memory_limit: bytes of a rank, before the margin. resident_bytes:
    parameters, gradients and optimizer state of a rank. step_seconds: of clipping and the optimizer's step.
    candidates: one for each complete level; those whose memory did not suffice have no time.
    """

    key: dict[str, Any]
    memory_limit: int
    resident_bytes: int
    step_seconds: float
    measurements: list[Measurement]
    candidates: list[Candidate]


def profile_key(
    config: JobConfig,
    args: ModelArgs,
    world: World,
    lengths: IntArray,
    loss_tokens: IntArray,
    **settings: Any,
) -> dict[str, Any]:
    """Everything that times and memory depend on, as plain JSON values.

    settings: of the profile itself, such as its candidates and its margin.
    """
    digest = hashlib.sha256()
    for values in (lengths, loss_tokens):
        # The distribution counts, not the order of the samples.
        digest.update(np.sort(np.asarray(values)).astype("<i8").tobytes())
    model = dataclasses.asdict(args)
    key = {
        "model": model,
        "hardware": _hardware(world.device),
        "world_size": world.size,
        "ranks_per_node": ranks_per_node(world.size),
        "dtype": config.training.dtype,
        "compute_dtype": str(compute_dtype(config, world.device)),
        "reduce_dtype": config.training.mixed_precision_reduce,
        "attention": selected_backend(world.device),
        "deterministic": config.training.deterministic,
        "loss_chunk_tokens": config.training.loss_chunk_tokens,
        "compile": dataclasses.asdict(config.compile),
        "dp_replicate": config.parallelism.dp_replicate,
        "expert_parallel_degree": config.parallelism.expert_parallel_degree,
        "reshard_after_forward": config.parallelism.reshard_after_forward,
        "lengths": digest.hexdigest(),
        "versions": {"torch": torch.__version__, "hbp_titan": __version__, "format": FORMAT_VERSION},
        "settings": settings,
    }
    return json.loads(json.dumps(key, default=dataclasses.asdict))


def save_profile(profile: Profile, path: Path) -> None:
    """Write the profile as JSON, every measurement in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(json.dumps(dataclasses.asdict(profile), indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def load_profile(path: Path, key: dict[str, Any], report: Callable[[str], None] = print) -> Profile | None:
    """The profile in `path`; None where there is none, or where `report` is told what differs from `key`.

    Raises ValueError for a file that is not a profile.
    """
    if not path.is_file():
        return None
    values = _read(path)
    stored = values["key"]
    differing = [name for name in (*key, *(stored.keys() - key.keys())) if stored.get(name) != key.get(name)]
    if differing:
        report(f"{path}: was measured with another {', another '.join(differing)}: measured anew")
        return None
    return _profile(values, path)


def read_profile(path: Path) -> Profile:
    """The profile in `path`, whatever it was measured for; ValueError for a file that is not a profile."""
    return _profile(_read(path), path)


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        values["key"].keys()
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, KeyError, TypeError) as error:
        raise _not_a_profile(path, error) from None
    return values


def _profile(values: dict[str, Any], path: Path) -> Profile:
    try:
        return Profile(
            key=values["key"],
            memory_limit=values["memory_limit"],
            resident_bytes=values["resident_bytes"],
            step_seconds=values["step_seconds"],
            measurements=[Measurement(**{**row, "level": Level(**row["level"])}) for row in values["measurements"]],
            candidates=[_candidate(row) for row in values["candidates"]],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise _not_a_profile(path, error) from None


def _not_a_profile(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path}: not a profile ({error!r}): delete it, and it is measured again")


def _candidate(row: dict[str, Any]) -> Candidate:
    time = None if row["time"] is None else LevelTime(**row["time"])
    return Candidate(Level(**row["level"]), time, row["peak_bytes"])


def _hardware(device: torch.device) -> dict[str, Any]:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {"name": properties.name, "memory": properties.total_memory}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    name = platform.processor() or platform.machine()
    return {"name": name, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "memory": memory}
