"""Prove that packing and every parallel form leave loss and gradients right, on your own configuration and data.

    python scripts/verify_equivalence.py --job.config_file train_configs/debug_model.toml [--section.key value]

Runs the same samples through one process (unpacked, fp32) and through every case on CPU ranks of this machine; prints
a row a case with the relative differences of loss and gradients, and a verdict. Negative controls must be caught.
The exit code is 0 only when every verdict is right.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hbp_titan.cli import guarded
from hbp_titan.config import load_config, validate
from hbp_titan.data.store.prepare import prepare
from hbp_titan.data.store.token_store import TokenStore
from hbp_titan.levels.verify import HEADER, build_cases, choose_samples, row, scaled_levels, shrunk, verify
from hbp_titan.preflight import model_args


def main() -> int:
    """Parse the command line, run the cases, print the table; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--world_sizes", default="1,2,4", help="ranks to try, ascending [1,2,4]")
    parser.add_argument("--num_samples", type=int, default=24, help="samples to run [24]")
    parser.add_argument("--max_tokens", type=int, default=1024, help="scale the largest level to this; 0: keep [1024]")
    parser.add_argument("--shrink", action="store_true", help="two layers and narrow heads instead of the whole model")
    parser.add_argument("--only", default="", help="only the cases whose name holds this text")
    options, overrides = parser.parse_known_args()
    config = load_config(overrides)
    world_sizes = sorted(int(size) for size in options.world_sizes.split(","))
    validate(config, max(level.cp_degree for level in config.levels) if config.levels else 1)
    args = shrunk(model_args(config)) if options.shrink else model_args(config)
    store = TokenStore.open(prepare(config)[0])
    levels = scaled_levels(config.levels, options.max_tokens)
    samples = choose_samples(store, options.num_samples, levels[-1].max_tokens)
    cases = [case for case in build_cases(levels, world_sizes, args) if options.only in case.name]
    print(
        f"{args.name}: {len(samples.lengths)} samples, {samples.lengths.sum():,} tokens, the longest of "
        f"{samples.lengths.max():,}; {len(cases)} cases\n{HEADER}"
    )
    wrong = 0
    for result in verify(config, args, cases, samples):
        print(row(result), flush=True)
        wrong += not result.passed
    print("every verdict is right" if not wrong else f"{wrong} of {len(cases)} verdicts are wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(guarded(main))
