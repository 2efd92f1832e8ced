"""Prepare the data of a run: embedded corpus and tokenizer where asked for, token stores, summary.

    python scripts/prepare_data.py --job.config_file train_configs/debug_model.toml [--world_size N] [--show K]

The training run finds what this leaves; a second call finds everything and only prints the summary.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hbp_titan.cli import guarded
from hbp_titan.config import help_text, load_config, validate
from hbp_titan.data.prepare import prepare
from hbp_titan.data.report import show, summary
from hbp_titan.data.token_store import TokenStore
from hbp_titan.distributed.world import local_device
from hbp_titan.preflight import check, model_args, most_tokens

OPTIONS = """
options of this command:
  --world_size N    check levels, model and weights for a run of N ranks, as the run itself will [no check]
  --show K          print K samples, trained tokens in green [0]
"""


def main(argv: list[str]) -> None:
    if "--help" in argv or "-h" in argv:
        print(f"{__doc__}{OPTIONS}\n{help_text()}")
        return
    world_size, argv = _take_number(argv, "--world_size", 0)
    shown, argv = _take_number(argv, "--show", 0)
    config = load_config(argv)
    # Without a world to check for, the smallest that the levels fit.
    validate(config, world_size or math.lcm(*(level.cp_degree for level in config.levels)))
    args = model_args(config)
    train, validation = prepare(config, most_tokens=most_tokens(config, args))
    if world_size:
        check(config, world_size, local_device(), args, TokenStore.open(train))
    print(f"tokenizer: {config.tokenizer_path}")
    for name, folder in (("training", train), ("validation", validation)):
        if folder is not None:
            store = TokenStore.open(folder)
            print(f"\n{name} store: {folder}\n{summary(store)}")
    if shown:
        print(show(TokenStore.open(train), shown, config.tokenizer_path))


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
    guarded(lambda: main(sys.argv[1:]))
