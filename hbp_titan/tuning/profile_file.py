"""Profile file: everything that was measured of candidate levels, as JSON, and the time models fitted to it.

Owns the rows, the key that states what a profile is valid for, reading and writing, and the least-squares fit with
nonnegative coefficients. The cost of a pack cannot fall with its content, and columns may be nearly collinear (packs of
equal token count), so a column that explains next to nothing is dropped instead of getting a wild coefficient.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
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
from hbp_titan.components.timing import FloatArray, LevelTimeModel
from hbp_titan.config import JobConfig
from hbp_titan.distributed.parallelize import compute_dtype
from hbp_titan.distributed.world import World, ranks_per_node
from hbp_titan.models.attention import selected_backend
from hbp_titan.models.configs import ModelArgs
from hbp_titan.packing import Level
from hbp_titan.packing.ragged import IntArray
from hbp_titan.tuning.search import Candidate
from hbp_titan.utils import atomic_write

FORMAT_VERSION = 1
MIN_ERROR_RATIO = 1.5
"""A column is used only if it divides the squared error by more than this: a few noisy packs fit anything."""


@dataclass(frozen=True)
class Measurement:
    """One result for one level; level.ac_layers is the number of checkpointed layers.

    peak_bytes: the most that any rank holds during a micro-batch. loads: of the timed packs, [n][4] as from pack_loads.
    seconds: of each timed pack on the slowest rank. out_of_memory: the micro-batch failed, or its peak exceeds the
    limit. estimated: nothing was run, peak_bytes is an estimate. error: of the fitted LevelTimeModel, root mean square
    relative to the mean.
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
    """Time and memory of candidate levels on one machine with one model and one set of lengths.

    key: what it is valid for, from `profile_key`. memory_limit: bytes per rank, before the margin. resident_bytes:
    parameters, gradients and optimizer state per rank. step_seconds: of clipping and the optimizer's step. candidates:
    one per complete level; those that do not fit in memory have no time.
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
    """Return everything that times and memory depend on, as plain JSON values.

    settings: of the profile itself, such as its candidates and its margin.
    """
    digest = hashlib.sha256()
    for values in (lengths, loss_tokens):
        # Sorted: the distribution matters, not the order of the samples.
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
        "float8": dataclasses.asdict(config.float8),
        "optimizer": [config.optimizer.name, config.optimizer.state_dtype, config.training.gradient_dtype],
        "cpu_offload": config.parallelism.cpu_offload,
        "dp_replicate": config.parallelism.dp_replicate,
        "expert_parallel_degree": config.parallelism.expert_parallel_degree,
        "reshard_after_forward": config.parallelism.reshard_after_forward,
        "lengths": digest.hexdigest(),
        "versions": {"torch": torch.__version__, "hbp_titan": __version__, "format": FORMAT_VERSION},
        "settings": settings,
    }
    # Through JSON, so that the key compares equal to one read from a file.
    return json.loads(json.dumps(key, default=dataclasses.asdict))


def save_profile(profile: Profile, path: Path) -> None:
    """Write the profile with all measurements as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps(dataclasses.asdict(profile), indent=1) + "\n")


def load_profile(path: Path, key: dict[str, Any], report: Callable[[str], None] = print) -> Profile | None:
    """Return the profile in `path`; None if there is none or its key differs from `key`, which `report` then prints.

    Raises ValueError if the file is not a profile.
    """
    if not path.is_file():
        return None
    values = _read(path)
    stored = values["key"]
    # Missing and additional names differ too: they come from another version.
    differing = [name for name in (*key, *(stored.keys() - key.keys())) if stored.get(name) != key.get(name)]
    if differing:
        report(f"{path}: measured with a different {', '.join(differing)}; measuring again")
        return None
    return _profile(values, path)


def read_profile(path: Path) -> Profile:
    """Return the profile in `path` for any key; raise ValueError if the file is not a profile."""
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
    return ValueError(f"{path}: not a profile ({error!r}); delete it to measure again")


def _candidate(row: dict[str, Any]) -> Candidate:
    time = None if row["time"] is None else LevelTimeModel(**row["time"])
    return Candidate(Level(**row["level"]), time, row["peak_bytes"])


def _hardware(device: torch.device) -> dict[str, Any]:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {"name": properties.name, "memory": properties.total_memory}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    name = platform.processor() or platform.machine()
    return {"name": name, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "memory": memory}


def fit_level_time(loads: FloatArray, seconds: FloatArray) -> tuple[LevelTimeModel, float]:
    """Return a level's time model, and the root mean square of its error relative to the mean of `seconds`.

    loads: of the timed packs, [n, 4] as from pack_loads, n at least 1. seconds: [n].
    Selects the set of columns with the least squared error * MIN_ERROR_RATIO ** columns.
    """
    loads, seconds = np.asarray(loads, np.float64), np.asarray(seconds, np.float64)
    assert loads.shape == (len(seconds), 4), loads.shape
    fits = _nonnegative_fits(loads, seconds)
    # Without it a perfect fit would beat every other at any number of columns.
    rounding = (1e-9 * float(np.linalg.norm(seconds))) ** 2

    def score(fit: tuple[FloatArray, float]) -> float:
        coefficients, error = fit
        # Omitting the base does not count as a saved column: shapes are static, so there always is a base.
        columns = np.count_nonzero(coefficients[1:]) + (coefficients[0] == 0)
        return (error + rounding) * MIN_ERROR_RATIO ** float(columns)

    coefficients, error = min(fits, key=score)
    return LevelTimeModel(*coefficients.tolist()), float(np.sqrt(error / len(seconds)) / seconds.mean())


def nonnegative_least_squares(columns: FloatArray, values: FloatArray) -> FloatArray:
    """Return the x [k] >= 0 with the least |columns @ x - values|. columns: [n, k], k small. values: [n]."""
    return min(_nonnegative_fits(columns, values), key=lambda fit: fit[1])[0]


def _nonnegative_fits(columns: FloatArray, values: FloatArray) -> list[tuple[FloatArray, float]]:
    """Return (coefficients, squared error) of each set of columns whose least-squares solution is nonnegative.

    The best of them is the constrained optimum, because that is the unconstrained optimum over its nonzero columns.
    """
    count = columns.shape[1]
    fits = [(np.zeros(count), float(values @ values))]
    # Columns of comparable size: tokens and squared tokens differ by many orders of magnitude.
    scale = np.maximum(np.abs(columns).max(axis=0), 1e-300)
    for size in range(1, count + 1):
        for chosen in map(list, itertools.combinations(range(count), size)):
            part = columns[:, chosen] / scale[chosen]
            solution, _, rank, _ = np.linalg.lstsq(part, values, rcond=1e-10)
            # Collinear columns have no unique solution; a smaller set of them does.
            if rank < size or solution.min() < 0:
                continue
            coefficients = np.zeros(count)
            coefficients[chosen] = solution / scale[chosen]
            fits.append((coefficients, float(np.sum((part @ solution - values) ** 2))))
    return fits
