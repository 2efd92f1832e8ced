"""Verify that packing and parallelism do not change loss and gradients, on your own configuration and data.

    python scripts/verify_equivalence.py --job.config_file train_configs/debug_model.toml [--section.key value]

Runs the same samples through one process (unpacked, fp32) and through every case on ranks of this machine (NCCL with
one GPU per rank where there are GPUs, else gloo on the CPU); prints one row per case with the relative differences of
loss and gradients, and a verdict. In bfloat16, the default on GPUs, a case may differ by 3 times what rounding does to
the same unpacked run. With float8.recipe the reference has FP8 products too, and all of them are emulated. Negative
controls must be caught. The exit code is 0 only when every verdict is right.
"""

from __future__ import annotations

import argparse

import torch

from hbp_titan.config import load_config, validate
from hbp_titan.data.prepare import prepare
from hbp_titan.data.token_store import TokenStore
from hbp_titan.errors import exit_on_user_error
from hbp_titan.preflight import model_args
from hbp_titan.testing.equivalence import HEADER, row, verify
from hbp_titan.testing.equivalence_cases import build_cases, choose_samples, scaled_levels, shrunk


def main(argv: list[str] | None = None) -> int:
    """Run the cases and print the table; return 0 if every verdict is right."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--world_sizes", default="", help="ranks to try, ascending [1,2,4; on GPUs at most their number]"
    )
    on_gpu = torch.cuda.is_available()
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if on_gpu else "cpu", help="[cuda if available]"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="compute dtype [bfloat16 on cuda]")
    parser.add_argument("--num_samples", type=int, default=24, help="samples to run [24]")
    parser.add_argument("--max_tokens", type=int, default=1024, help="scale the largest level to this; 0: keep [1024]")
    parser.add_argument(
        "--shrink",
        action="store_true",
        help="use two layers, narrow heads and the tokens that occur, not the whole model",
    )
    parser.add_argument("--only", default="", help="only cases whose name contains this text")
    options, overrides = parser.parse_known_args(argv)
    config = load_config(overrides)
    world_sizes = parse_world_sizes(options.world_sizes, options.device)
    dtype = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    if config.float8.recipe == "tensorwise":
        raise ValueError(
            'float8.recipe = "tensorwise": its scales depend on all tokens of a rank, so no unpacked run equals it; '
            'verify with "rowwise" (tests/distributed/test_float8.py compares tensorwise pack by pack)'
        )
    # The check is of packing and parallelism, not of kernels, whose shapes small levels do not have.
    config.float8.emulate = True
    validate(config, max(level.cp_degree for level in config.levels) if config.levels else 1)
    store = TokenStore.open(prepare(config)[0])
    levels = scaled_levels(config.levels, options.max_tokens)
    samples = choose_samples(store, options.num_samples, levels[-1].max_tokens)
    args = model_args(config)
    if options.shrink:
        args = shrunk(args, vocab_size=1 + max(int(tokens.max()) for tokens, _ in samples.rows))
    cases = [
        case for case in build_cases(levels, world_sizes, args, bool(config.float8.recipe)) if options.only in case.name
    ]
    print(
        f"{args.name}: {len(samples.lengths)} samples, {samples.lengths.sum():,} tokens, the longest has "
        f"{samples.lengths.max():,}; {len(cases)} cases on {options.device} in {dtype}\n{HEADER}"
    )
    wrong = 0
    for result in verify(config, args, cases, samples, options.device, dtype):
        print(row(result), flush=True)
        wrong += not result.passed
    print("every verdict is right" if not wrong else f"{wrong} of {len(cases)} verdicts are wrong")
    return int(wrong > 0)


def parse_world_sizes(text: str, device_type: str) -> list[int]:
    """Return the numbers of ranks to try, ascending; by default 1, 2 and 4, at most the number of GPUs."""
    gpus = torch.cuda.device_count()
    if device_type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no usable GPU; use --device cpu")
    if not text:
        return [size for size in (1, 2, 4) if device_type == "cpu" or size <= gpus]
    if not all(word.strip().isdecimal() and int(word) for word in text.split(",")):
        raise ValueError(f"--world_sizes {text!r}: must be comma-separated positive numbers, such as 1,2,4")
    sizes = sorted(int(word) for word in text.split(","))
    if device_type == "cuda" and sizes[-1] > gpus:
        raise ValueError(f"--world_sizes {text}: {sizes[-1]} ranks need as many GPUs, this machine has {gpus}")
    return sizes


if __name__ == "__main__":
    raise SystemExit(exit_on_user_error(main))
