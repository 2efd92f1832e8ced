"""Profile: everything that was measured of candidate levels, and its JSON file.

Owns the rows, the key that says what a profile holds for, and the reading and writing of the file.

LevelTimeModel from measured iterations.

Owns the fit: least squares with no negative coefficient. What a pack costs cannot fall with what it holds, and columns
may be nearly collinear (packs of equal token count): a column that explains next to nothing is dropped, not given a
wild value.
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
from hbp_titan.models.decoder import ModelArgs
from hbp_titan.packing import Level
from hbp_titan.packing.ragged import IntArray
from hbp_titan.tuning.search import Candidate

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Measurement:
    """One thing that was found out of one level (its ac_layers say how many layers were checkpointed).

    peak_bytes: the most that a rank holds during an iteration, of the rank that holds most; loads, seconds: what the
    timed packs hold ([n][4], as pack_loads) and the seconds of each on the slowest rank. out_of_memory: the iteration
    failed, or its peak exceeds the limit. estimated: nothing was run, peak_bytes is an estimate. error: of the fitted
    LevelTimeModel, root mean square relative to the mean.
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
    time = None if row["time"] is None else LevelTimeModel(**row["time"])
    return Candidate(Level(**row["level"]), time, row["peak_bytes"])


def _hardware(device: torch.device) -> dict[str, Any]:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {"name": properties.name, "memory": properties.total_memory}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    name = platform.processor() or platform.machine()
    return {"name": name, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "memory": memory}


WORTH = 1.5
"""A column is used only where it lowers the squared error by more than this factor: few noisy packs fit anything."""


def fit_level_time(loads: FloatArray, seconds: FloatArray) -> tuple[LevelTimeModel, float]:
    """The time model of a level, and the root mean square of its error relative to the mean of `seconds`.

    loads: of the timed packs, [n, 4] as from pack_loads, n at least 1; seconds: [n].
    Of all sets of columns the one with the least squared error * WORTH ** columns is taken. The base is no column to
    save on: shapes are static, so there is one.
    """
    loads, seconds = np.asarray(loads, np.float64), np.asarray(seconds, np.float64)
    assert loads.shape == (len(seconds), 4), loads.shape
    fits = _nonnegative_fits(loads, seconds)
    rounding = (1e-9 * float(np.linalg.norm(seconds))) ** 2

    def score(fit: tuple[FloatArray, float]) -> float:
        coefficients, error = fit
        columns = np.count_nonzero(coefficients[1:]) + (coefficients[0] == 0)
        return (error + rounding) * WORTH ** float(columns)

    coefficients, error = min(fits, key=score)
    return LevelTimeModel(*coefficients.tolist()), float(np.sqrt(error / len(seconds)) / seconds.mean())


def nonnegative_least_squares(columns: FloatArray, values: FloatArray) -> FloatArray:
    """The x >= 0 with the least |columns @ x - values|; columns: [n, k], few; values: [n] -> [k]."""
    return min(_nonnegative_fits(columns, values), key=lambda fit: fit[1])[0]


def _nonnegative_fits(columns: FloatArray, values: FloatArray) -> list[tuple[FloatArray, float]]:
    """(coefficients, squared error) of each set of columns whose own least squares has no negative coefficient.

    The best of them is the constrained optimum, because that is the plain optimum over its nonzero columns. Small
    sets first, those with the first columns first.
    """
    count = columns.shape[1]
    fits = [(np.zeros(count), float(values @ values))]
    # Columns of comparable size: tokens and squared tokens differ by many orders of magnitude.
    scale = np.maximum(np.abs(columns).max(axis=0), 1e-300)
    for size in range(1, count + 1):
        for chosen in map(list, itertools.combinations(range(count), size)):
            part = columns[:, chosen] / scale[chosen]
            solution, _, rank, _ = np.linalg.lstsq(part, values, rcond=1e-10)
            if rank < size or solution.min() < 0:
                continue
            coefficients = np.zeros(count)
            coefficients[chosen] = solution / scale[chosen]
            fits.append((coefficients, float(np.sum((part @ solution - values) ** 2))))
    return fits
