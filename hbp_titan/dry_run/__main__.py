"""Try a configuration for N ranks in one CPU process: no GPU, no weights and no data needed.

    COMM_MODE=fake NGPU=32 CONFIG_FILE=train_configs/X.toml ./run_train.sh [--section.key value]
    python -m hbp_titan.dry_run --world_size 32 --gpu h100-80gb --job.config_file train_configs/X.toml

Builds the model on the meta device, applies every parallel form under a fake process group, and prints what a rank
would hold, each level's memory by checkpoint policy, and the time of an epoch. A mistake that a start would meet, or a
level that does not fit the GPU's memory, is one line on stderr and exit code 1.
"""

from __future__ import annotations

import argparse
import sys

from hbp_titan.cli import guarded
from hbp_titan.config import help_text, load_config
from hbp_titan.distributed.hardware import HARDWARE, get_hardware
from hbp_titan.dry_run.report import describe
from hbp_titan.dry_run.run import dry_run

DEFAULT_GPU = "h100-80gb"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m hbp_titan.dry_run",
        description=__doc__,
        epilog=help_text(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--world_size", type=int, required=True, help="ranks of the run")
    parser.add_argument("--gpu", default=DEFAULT_GPU, help=f"one of {', '.join(HARDWARE)} [{DEFAULT_GPU}]")
    options, overrides = parser.parse_known_args(argv)
    found = dry_run(load_config(overrides), options.world_size, get_hardware(options.gpu))
    print(describe(found), flush=True)
    found.check_memory()


if __name__ == "__main__":
    guarded(lambda: main(sys.argv[1:]))
