"""Prepare the data of a run: embedded corpus and tokenizer where asked for, token stores, summary.

    python scripts/prepare_data.py --job.config_file train_configs/debug_model.toml [--show K] [--strict]
    torchrun --nproc_per_node N scripts/prepare_data.py ...     ranks and nodes of a shared file system share the work

The training run finds what this leaves; a second call finds everything and only prints the summary. After a kill the
next call goes on where it was.
"""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hbp_titan.config import JobConfig, help_text, load_config, validate
from hbp_titan.data.prepare import open_stores
from hbp_titan.data.store_summary import show_samples, summary
from hbp_titan.data.token_store import TokenStore
from hbp_titan.distributed.world import close_world, gather_values, init_world, local_device
from hbp_titan.errors import WorkerGroup, exit_on_user_error
from hbp_titan.preflight import check, max_sample_tokens, model_args

OPTIONS = """
options of this command:
  --world_size N    check levels, model and weights for a run of N ranks, as the run itself will [no check]
  --show K          print K samples, trained tokens in green [0]
  --strict          any row that is left out or cut is an error (data.strict)
"""
# Ranks wait for each other at the end of their shares.
TIMEOUT_SECONDS = 24 * 3600


def main(argv: list[str]) -> None:
    if "--help" in argv or "-h" in argv:
        print(f"{__doc__}{OPTIONS}\n{help_text()}")
        return
    world_size, argv = _take_number(argv, "--world_size", 0)
    shown, argv = _take_number(argv, "--show", 0)
    config = load_config([word for word in argv if word != "--strict"])
    config.data.strict = config.data.strict or "--strict" in argv
    # Without a world to check for, the smallest that the levels fit.
    validate(config, world_size or math.lcm(*(level.cp_degree for level in config.levels)))
    args = model_args(config)
    stores = _prepared(config, max_sample_tokens(config, args))
    if os.environ.get("RANK", "0") != "0":
        return
    if world_size:
        check(config, world_size, local_device(), args, stores[0])
    print(f"tokenizer: {config.tokenizer_path}")
    for name, store in zip(("training", "validation"), stores, strict=False):
        print(f"\n{name} store: {store.folder}\n{summary(store)}")
    if shown:
        print(show_samples(stores[0], shown, config.tokenizer_path))


def _prepared(config: JobConfig, limit: int) -> list[TokenStore]:
    if "RANK" not in os.environ:
        return open_stores(config, limit)
    world = init_world(TIMEOUT_SECONDS)
    try:
        return open_stores(config, limit, WorkerGroup(world.rank, world.size, gather_values))
    finally:
        close_world()


def _take_number(argv: list[str], option: str, default: int) -> tuple[int, list[str]]:
    """The value of one of this command's own options, and the arguments that are left."""
    for index, word in enumerate(argv):
        name, equals, value = word.partition("=")
        if name != option:
            continue
        used = 1 if equals else 2
        value = value if equals else "".join(argv[index + 1 : index + 2])
        if not value.isdigit():
            raise ValueError(f"{option} needs a number, not {value!r}")
        return int(value), argv[:index] + argv[index + used :]
    return default, argv


if __name__ == "__main__":
    exit_on_user_error(lambda: main(sys.argv[1:]))
