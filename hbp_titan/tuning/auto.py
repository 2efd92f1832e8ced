"""packing.auto_levels: a run that measures its machines and chooses its own levels before it starts.

Owns the decision: rank 0 takes it and every rank gets that one (measured times differ between ranks); a run that goes
on from a checkpoint keeps the levels of its run folder's config.toml, so that it repeats itself exactly. Beside them
lie the times that they were chosen by, for whoever compares a run with its prediction.

[[levels]] blocks as TOML text, and their exchange in a file that a person wrote.

Owns the rule of what stays: everything outside the blocks, comments and order included. The result is read back and
compared before it is returned, so that a file written in a way that is not understood is refused, never spoilt.
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
from hbp_titan.distributed.world import World, broadcast_value
from hbp_titan.errors import format_error
from hbp_titan.models.decoder import ModelArgs
from hbp_titan.packing import CostModel, Level
from hbp_titan.packing.ragged import IntArray
from hbp_titan.tuning.profile import default_candidates, profile_levels
from hbp_titan.tuning.profile_file import Profile, load_profile, profile_key, save_profile
from hbp_titan.tuning.search import Candidate, Selection, Workload, baselines, describe, select_paper, select_search

# Named here because a kept profile holds for these alone.
PROFILE_SETTINGS: dict[str, Any] = {"memory_limit": None, "margin": 0.05, "iterations": 6}

Result = TypeVar("Result")


def resolve_levels(
    config: JobConfig,
    args: ModelArgs,
    world: World,
    cost: CostModel,
    stores: Sequence[TokenStore],
    log: Callable[[str], None],
) -> None:
    """Fill config.levels, on every rank the same. stores: training data and, if any, held-out data.

    Measures the candidates unless the run folder holds their times, chooses by search and writes level_times.json;
    log gets the table of what was chosen. Raises ValueError on every rank where nothing fits.
    """
    folder = config.dump_folder
    levels: Sequence[Level] | None = from_rank_0(world, lambda: _levels_of_checkpoint(config))
    if levels is None:
        profile = measured(config, args, world, stores, folder / "profile.json", log)

        def choose() -> tuple[Sequence[Level], str]:
            workload = Workload.of(config, world.size, cost, stores, profile.step_seconds)
            selections, text = choices(profile.candidates, workload)
            save_level_times(folder, selections["search"])
            return selections["search"].levels, text

        levels, text = from_rank_0(world, choose)
        log(text)
    config.levels = list(levels)
    # The candidates had groups that these do not need.
    destroy_unused_groups(
        [level.cp_shape(args.num_kv_heads) for level in levels], config.parallelism.expert_parallel_degree
    )
    # From here on the run is one with these [[levels]] blocks; so is the config.toml that it writes.
    config.packing.auto_levels = False


def candidate_levels(lengths: IntArray, longest: int, world_size: int, args: ModelArgs) -> list[Level]:
    """The usual candidates for such samples, none of them longer than the model's limit."""
    median, limit = int(np.median(lengths)), args.max_position_embeddings
    return list(
        dict.fromkeys(
            dataclasses.replace(level, max_tokens=min(level.max_tokens, limit - limit % level.cp_degree))
            for level in default_candidates(longest, world_size, args, median=median)
        )
    )


def measured(
    config: JobConfig,
    args: ModelArgs,
    world: World,
    stores: Sequence[TokenStore],
    path: Path,
    log: Callable[[str], None],
    levels: Sequence[Level] = (),
) -> Profile:
    """The profile of `levels` (default: the usual candidates) on this world, from `path` where it was kept there."""
    lengths, loss_tokens = stores[0].lengths, stores[0].loss_tokens
    longest = max(int(store.lengths.max()) for store in stores)
    levels = levels or candidate_levels(lengths, longest, world.size, args)

    def kept() -> Profile | None:
        key = profile_key(config, args, world, lengths, loss_tokens, candidates=levels, **PROFILE_SETTINGS)
        return load_profile(path, key)

    profile = from_rank_0(world, kept)
    if profile is None:
        log(f"measuring {len(levels)} candidate levels, to be kept in {path}")
        profile = profile_levels(config, args, world, lengths, loss_tokens, levels, **PROFILE_SETTINGS)
        if world.rank == 0:
            save_profile(profile, path)
    return profile


def choices(candidates: Sequence[Candidate], workload: Workload) -> tuple[dict[str, Selection], str]:
    """The selections by search and by the paper's stages, and the table that shows both beside the baselines."""
    selections = {"search": select_search(candidates, workload), "paper": select_paper(candidates, workload)}
    fitting = sum(candidate.fits for candidate in candidates)
    text = f"levels: {fitting} of {len(candidates)} settings fit in memory; predicted for one epoch:\n"
    return selections, text + describe(selections, baselines(candidates, workload))


def from_rank_0(world: World, function: Callable[[], Result]) -> Result:
    """What `function` returns on rank 0, on every rank; a user's mistake that it raises there, on every rank too."""
    result, mistake = None, None
    if world.rank == 0:
        try:
            result = function()
        except (ValueError, OSError) as error:
            mistake = format_error(error)
    result, mistake = broadcast_value((result, mistake))
    if mistake is not None:
        raise ValueError(mistake)
    return result


def _levels_of_checkpoint(config: JobConfig) -> list[Level] | None:
    """The levels that the run folder's checkpoints were trained with; None where there is nothing to go on from."""
    folder = config.dump_folder
    if not config.checkpoint.enable or not completed_checkpoints(folder / "checkpoint"):
        return None
    return load_config(["--job.config_file", str(folder / "config.toml")]).levels


def save_level_times(folder: Path, selection: Selection) -> None:
    """Write the levels of `selection` and their times to `folder`."""
    pairs = zip(selection.levels, selection.times, strict=True)
    entries = [{"level": dataclasses.asdict(level), "time": dataclasses.asdict(time)} for level, time in pairs]
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{LEVEL_TIMES}.partial"
    partial.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    partial.replace(folder / LEVEL_TIMES)


if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_HEADER = re.compile(r"\s*\[")
_LEVELS_HEADER = re.compile(r"\s*\[\[\s*levels\s*\]\]")
_PACKING_HEADER = re.compile(r"\s*\[\s*packing\s*\]")
_AUTO = re.compile(r"(\s*auto_levels\s*=\s*)true")


def levels_block(levels: Sequence[Level]) -> str:
    """The [[levels]] blocks of `levels`, a blank line between them."""
    blocks = []
    for level in levels:
        values = {key: value for key, value in dataclasses.asdict(level).items() if value is not None}
        blocks.append("".join(["[[levels]]\n", *(f"{key} = {json.dumps(value)}\n" for key, value in values.items())]))
    return "\n".join(blocks)


def replace_levels(text: str, levels: Sequence[Level], name: str) -> str:
    """The TOML `text` with its [[levels]] blocks, if any, replaced by those of `levels`, where the first of them was.

    packing.auto_levels = true becomes false. name: of the file, for messages. Comments and blank lines between the last
    key of a block and the next header belong to what follows and stay.
    Raises ValueError where levels are written in another way, such as an inline array.
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
                place = len(kept) if place is None else place
                continue
        if not in_levels:
            kept.append(_AUTO.sub(r"\1false", line) if in_packing else line)
        elif not line.strip() or line.lstrip().startswith("#"):
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
    _check(text, result, levels, name)
    return result


def _check(text: str, result: str, levels: Sequence[Level], name: str) -> None:
    """Raise ValueError unless `result` says what `text` says but for the levels."""
    expected: dict[str, Any] = copy.deepcopy(tomllib.loads(text))
    expected.pop("levels", None)
    if expected.get("packing", {}).get("levels") == "auto":
        expected["packing"]["levels"] = ""
    try:
        found = tomllib.loads(result)
        blocks = [Level(**block) for block in found.pop("levels")]
    except (tomllib.TOMLDecodeError, TypeError):
        found, blocks = {}, []
    if found != expected or blocks != list(levels):
        raise ValueError(f"{name}: levels are not written as [[levels]] blocks: write them so, or leave --output out")
