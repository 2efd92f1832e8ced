"""Choose the packing levels of a run: measured on the machines it will use, or estimated without a GPU.

    torchrun --nproc-per-node 8 scripts/select_levels.py --job.config_file train_configs/X.toml --output levels.toml
    python scripts/select_levels.py --job.config_file X.toml --estimate h100-80gb --world_size 32

Measures (or estimates) time and memory of an iteration for candidates of length, context parallelism and activation
checkpointing, predicts the whole epoch of this data for sets of them, and prints the best set, that of the paper's two
stages, and flat packing. The levels of the TOML file, if any, are not used. Further arguments override the TOML:
--section.key value.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hbp_titan.cli import guarded
from hbp_titan.config import JobConfig, load_config, validate
from hbp_titan.data.prepare import prepare
from hbp_titan.data.token_store import TokenStore
from hbp_titan.distributed.world import World, close_world, init_world
from hbp_titan.levels.auto import choices, from_rank_0, measured
from hbp_titan.levels.candidate import Candidate
from hbp_titan.levels.estimate import estimate_candidates
from hbp_titan.levels.hardware import HARDWARE, get_hardware
from hbp_titan.levels.levels_toml import levels_block, replace_levels
from hbp_titan.levels.profile import default_candidates
from hbp_titan.levels.selection import Workload
from hbp_titan.models.decoder import ModelArgs
from hbp_titan.packing import Level, check_levels, parse_levels
from hbp_titan.packing.level import AC_POLICIES
from hbp_titan.preflight import check_device, cost_model, model_args, most_tokens


def arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """This command's own options, and the words that are configuration overrides."""
    parser = argparse.ArgumentParser(
        prog="select_levels.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--method", choices=("search", "paper"), default="search",
                        help="what is written: the least predicted time, or the paper's two stages [search]")  # fmt: skip
    parser.add_argument("--estimate", metavar="HARDWARE", help=f"do not measure: one of {', '.join(HARDWARE)}")
    parser.add_argument("--world_size", type=int, help="ranks of the run; with --estimate only")
    parser.add_argument("--candidates", help="max_tokens:cp_degree,...: only these, each with every AC policy")
    parser.add_argument("--output", type=Path, help="write the TOML file with the chosen [[levels]] there [print them]")
    parser.add_argument("--profile_cache", type=Path,
                        help="where measurements are kept [profile.json in the run folder]")  # fmt: skip
    return parser.parse_known_args(argv)
