"""Automatic selection of levels: a run measures its machines and selects its levels before it starts.

Owns the decision, which rank 0 makes for all ranks (measured times differ between ranks), the files that it leaves in
the run folder, and the exchange of [[levels]] blocks in a user's TOML file. A resumed run keeps the levels of its run
folder's config.toml, so that it repeats exactly.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from hbp_titan.components.checkpoint import completed_checkpoints
from hbp_titan.components.timing import LEVEL_TIMES
from hbp_titan.config import JobConfig, load_config
from hbp_titan.data.token_store import TokenStore
from hbp_titan.distributed.mesh import destroy_unused_groups
from hbp_titan.distributed.world import World, broadcast_value, ranks_per_node
from hbp_titan.errors import format_error
from hbp_titan.models.configs import ModelArgs
from hbp_titan.packing import Level
from hbp_titan.packing.ragged import IntArray
from hbp_titan.preflight import cost_model
from hbp_titan.tuning.float8_time import with_plain_levels
from hbp_titan.tuning.hardware import total_memory
from hbp_titan.tuning.memory import estimate_memory
from hbp_titan.tuning.memory_plans import MEMORY_MARGIN, needed_plans
from hbp_titan.tuning.profile import default_forms, profile_levels
from hbp_titan.tuning.profile_file import Profile, load_profile, profile_key, save_profile
from hbp_titan.tuning.search import Candidate, Selection, Workload, baselines, describe, select_paper, select_search
from hbp_titan.utils import atomic_write

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# Part of a profile's key, so a stored profile is valid for these settings only.
PROFILE_SETTINGS: dict[str, Any] = {"memory_limit": None, "margin": 0.05, "iterations": 6}

Result = TypeVar("Result")


def resolve_levels(
    config: JobConfig,
    args: ModelArgs,
    world: World,
    stores: Sequence[TokenStore],
    log: Callable[[str], None],
) -> None:
    """Set config.levels to the same levels on every rank.

    Measures the candidates unless the run folder has a valid profile, selects by search, writes level_times.json and
    logs the selection. stores: training data and, if any, held-out data.
    Raises ValueError on every rank if nothing fits.
    """
    folder = config.dump_folder
    # Only rank 0 reads the run folder: nodes may see its files at different times.
    levels: Sequence[Level] | None = from_rank_0(world, lambda: _levels_of_checkpoint(config))
    if levels is None:
        profile = measured_profile(config, args, world, stores, folder / "profile.json", log)

        def select() -> tuple[Sequence[Level], str]:
            cost = cost_model(args, frozen=config.lora.rank > 0)
            workload = Workload.of(config, world.size, cost, stores, profile.step_seconds)
            selections, text = select_all(profile.candidates, workload)
            save_level_times(folder, selections["search"])
            return selections["search"].levels, text

        levels, text = from_rank_0(world, select)
        log(text)
    config.levels = list(levels)
    # The other candidates had process groups that these do not need.
    destroy_unused_groups(
        [level.cp_shape(args.num_kv_heads) for level in levels], config.parallelism.expert_parallel_degree
    )
    # From here on, and in the config.toml that it writes, the run has these [[levels]] blocks.
    config.packing.auto_levels = False


def candidate_forms(lengths: IntArray, longest: int, world_size: int, args: ModelArgs) -> list[Level]:
    """Return the default lengths and cp degrees for samples of these lengths."""
    return default_forms(longest, world_size, args, median=int(np.median(lengths)))


def plans_here(config: JobConfig, args: ModelArgs, world: World, forms: Sequence[Level]) -> list[Level]:
    """Return the memory plans of `forms` to measure on this world, by the estimate."""
    # Of the whole device, so that the candidates, and with them the profile's key, do not depend on other processes.
    limit = total_memory(world.device, ranks_per_node(world.size)) * (1 - MEMORY_MARGIN)

    def fits(level: Level) -> bool:
        found = estimate_memory(args, level, config, world.size, device_type=world.device.type)
        # On a CPU the device's memory is the host's.
        return found.peak_bytes + (found.host_bytes if world.device.type == "cpu" else 0) <= limit

    return with_plain_levels(needed_plans(forms, args, fits), config)


def measured_profile(
    config: JobConfig,
    args: ModelArgs,
    world: World,
    stores: Sequence[TokenStore],
    path: Path,
    log: Callable[[str], None],
    forms: Sequence[Level] = (),
) -> Profile:
    """Return the profile of `forms` (by default `candidate_forms`) on this world, from `path` if valid there."""
    lengths, loss_tokens = stores[0].lengths, stores[0].loss_tokens
    longest = max(int(store.lengths.max()) for store in stores)
    # Candidates must also hold the longest held-out sample.
    forms = forms or candidate_forms(lengths, longest, world.size, args)
    # All ranks must measure the same: those of rank 0.
    levels = from_rank_0(world, lambda: plans_here(config, args, world, forms))

    def stored() -> Profile | None:
        key = profile_key(config, args, world, lengths, loss_tokens, candidates=levels, **PROFILE_SETTINGS)
        return load_profile(path, key)

    # Measuring is a collective, so all ranks must agree on whether a stored profile is valid.
    profile = from_rank_0(world, stored)
    if profile is None:
        log(f"measuring {len(levels)} candidate levels; the profile will be in {path}")
        profile = profile_levels(config, args, world, lengths, loss_tokens, levels, **PROFILE_SETTINGS)
        if world.rank == 0:
            save_profile(profile, path)
    return profile


def select_all(candidates: Sequence[Candidate], workload: Workload) -> tuple[dict[str, Selection], str]:
    """Return the selections by search and by the paper's stages, and a table that compares them with the baselines."""
    selections = {"search": select_search(candidates, workload), "paper": select_paper(candidates, workload)}
    fitting = sum(candidate.fits for candidate in candidates)
    text = f"levels: {fitting} of {len(candidates)} candidates fit in memory; predicted for one epoch:\n"
    return selections, text + describe(selections, baselines(candidates, workload))


def from_rank_0(world: World, function: Callable[[], Result]) -> Result:
    """Return on every rank what `function` returns on rank 0; ValueError and OSError there are raised on every rank."""
    result, message = None, None
    if world.rank == 0:
        try:
            result = function()
        except (ValueError, OSError) as error:
            message = format_error(error)
    result, message = broadcast_value((result, message))
    if message is not None:
        raise ValueError(message)
    return result


def _levels_of_checkpoint(config: JobConfig) -> list[Level] | None:
    """Return the levels of the run that is resumed; None for a new run."""
    folder = config.dump_folder
    if not config.checkpoint.enable or not completed_checkpoints(folder / "checkpoint"):
        return None
    return load_config(["--job.config_file", str(folder / "config.toml")]).levels


def save_level_times(folder: Path, selection: Selection) -> None:
    """Write the levels of `selection` and their times into `folder`."""
    pairs = zip(selection.levels, selection.times, strict=True)
    entries = [{"level": dataclasses.asdict(level), "time": dataclasses.asdict(time)} for level, time in pairs]
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / LEVEL_TIMES, json.dumps(entries, indent=1) + "\n")


_HEADER = re.compile(r"\s*\[")
_LEVELS_HEADER = re.compile(r"\s*\[\[\s*levels\s*\]\]")
_PACKING_HEADER = re.compile(r"\s*\[\s*packing\s*\]")
_AUTO = re.compile(r"(\s*auto_levels\s*=\s*)true")


def levels_block(levels: Sequence[Level]) -> str:
    """Return `levels` as [[levels]] blocks with blank lines between them."""
    blocks = []
    for level in levels:
        defaults = {"mlp_chunk_tokens": 0, "attention_head_groups": 1}
        pairs = dataclasses.asdict(level).items()
        values = {key: value for key, value in pairs if value is not None and value != defaults.get(key)}
        blocks.append("".join(["[[levels]]\n", *(f"{key} = {json.dumps(value)}\n" for key, value in values.items())]))
    return "\n".join(blocks)


def replace_levels(text: str, levels: Sequence[Level], name: str) -> str:
    """Return the TOML `text` with its [[levels]] blocks replaced by `levels`, in the place of the first of them.

    packing.auto_levels = true becomes false. Everything else is unchanged, including comments. name: of the file.
    Raises ValueError if levels are written in another way, such as an inline array.
    """
    kept: list[str] = []
    place: int | None = None
    in_packing = in_levels = False
    pending: list[str] = []
    for line in text.splitlines(keepends=True):
        if _HEADER.match(line):
            kept += pending if in_levels else []
            in_levels, in_packing = bool(_LEVELS_HEADER.match(line)), bool(_PACKING_HEADER.match(line))
            pending = []
            if in_levels:
                # The new blocks go where the first old one was.
                place = len(kept) if place is None else place
                continue
        if not in_levels:
            kept.append(_AUTO.sub(r"\1false", line) if in_packing else line)
        elif not line.strip() or line.lstrip().startswith("#"):
            # Kept if it turns out to be after the last key of the block: then it belongs to what follows.
            pending.append(line)
        else:
            pending = []
    kept += pending
    if place is None:
        place = len(kept)
    before, after = "".join(kept[:place]), "".join(kept[place:])
    if place == len(kept) and before:
        before = before.rstrip("\n") + "\n\n"
    result = before + levels_block(levels) + after
    # Strings, inline tables and dotted keys can hold levels in ways that the line scan does not understand.
    _check(text, result, levels, name)
    return result


def _check(text: str, result: str, levels: Sequence[Level], name: str) -> None:
    """Raise ValueError unless `result` has the same values as `text` except for the levels."""
    expected: dict[str, Any] = copy.deepcopy(tomllib.loads(text))
    expected.pop("levels", None)
    if expected.get("packing", {}).get("auto_levels"):
        expected["packing"]["auto_levels"] = False
    try:
        found = tomllib.loads(result)
        blocks = [Level(**block) for block in found.pop("levels")]
    except (tomllib.TOMLDecodeError, TypeError):
        found, blocks = {}, []
    if found != expected or blocks != list(levels):
        raise ValueError(f"{name}: levels are not written as [[levels]] blocks; rewrite them, or omit --output")
