"""Write a complete, commented TOML file for your model, data and GPUs, and check it with a dry run.

    python scripts/init.py --model models/Llama-3.1-8B-Instruct --data my.jsonl --gpus 8 --gpu h100-80gb
    python scripts/init.py --model models/Qwen2.5-7B-Instruct --data 'data/*.jsonl' --gpus 2 --gpu a100-80gb --lora
    python scripts/init.py --model models/SmolLM2-135M --data my.jsonl --gpus 2 --gpu cpu --data.chat_template chatml

Reads config.json and the tokenizer of the model, tokenizes a random sample of the rows, and chooses levels, memory
plan, batch, learning rate and intervals by estimates; needs no GPU and no weights. Each value has its reason as a
comment. Further arguments are configuration overrides, which are kept as given.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from hbp_titan.errors import exit_on_user_error
from hbp_titan.tuning.hardware import HARDWARE
from hbp_titan.tuning.init_config import CPU, Request, first_config
from hbp_titan.tuning.init_levels import GOALS
from hbp_titan.tuning.init_toml import report, write
from hbp_titan.tuning.sample_lengths import SAMPLE_ROWS


def arguments(argv: list[str] | None) -> Request:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="init.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", type=Path, required=True, help="HF folder with config.json and tokenizer.json")
    parser.add_argument("--data", nargs="+", required=True, help="files, patterns or folders of training rows")
    parser.add_argument("--gpus", type=int, required=True, help="GPUs of the run, on all nodes")
    parser.add_argument("--gpu", required=True, help=f"one of {', '.join(HARDWARE)}; {CPU} for a trial on CPU ranks")
    parser.add_argument("--gpus_per_node", type=int, default=8, help="GPUs of a node [8]")
    parser.add_argument("--lora", action="store_true", help="train adapters, not all parameters")
    parser.add_argument(
        "--goal", choices=GOALS, default="fast", help="least time, or within 10%% of the least GPU memory [fast]"
    )
    parser.add_argument("--output", type=Path, help="TOML file to write [name of the model's folder.toml]")
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    parser.add_argument("--sample_rows", type=int, default=SAMPLE_ROWS, help=f"rows to tokenize [{SAMPLE_ROWS}]")
    options, overrides = parser.parse_known_args(argv)
    output = options.output or Path(f"{options.model.absolute().name}.toml")
    return Request(**{**vars(options), "output": output, "overrides": overrides})


def main(argv: list[str] | None = None) -> None:
    first = first_config(arguments(argv), lambda line: print(line, flush=True))
    write(first)
    print(report(first))


if __name__ == "__main__":
    raise SystemExit(exit_on_user_error(main))
