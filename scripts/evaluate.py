"""Evaluate an exported HF folder: perplexity, the needle suite, general benchmarks; any of them in one call.

    python scripts/evaluate.py FOLDER --perplexity DATA.jsonl            loss by length and by position
    python scripts/evaluate.py FOLDER --needles --lengths 4096,32768     needles, tracking, counting; heat map
    python scripts/evaluate.py FOLDER --needles --server http://localhost:8000     the same, answered by a server
    python scripts/evaluate.py FOLDER --tasks paper_tasks                the paper's tasks, by lm_eval

One process, on a GPU where there is one. docs/evaluation.md explains the figures.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from hbp_titan.distributed.world import local_device
from hbp_titan.errors import exit_on_user_error
from hbp_titan.evaluation import needles, perplexity
from hbp_titan.evaluation.generate import (
    DEFAULT_CACHE_TOKENS,
    LocalBackend,
    ServerBackend,
    add_template_options,
    load_model,
    template_settings,
)
from hbp_titan.evaluation.harness import read_runs, run_harness
from hbp_titan.evaluation.needle_tasks import TASKS
from hbp_titan.evaluation.needles import PromptFormatter, heat_maps
from hbp_titan.models.hf_config import args_from_hf

SERVER_HELP = (
    "an OpenAI-compatible server answers instead; tried with llama.cpp's llama-server and transformers serve (prompts "
    "as text), by its API also vLLM and SGLang"
)


def main(argv: list[str] | None = None) -> None:
    """Run the selected evaluations, the cheapest first."""
    options = _options(argv)
    folder: Path = options.folder
    out: Path = options.out or folder / "evaluation"
    args = args_from_hf(folder)
    runs = read_runs(options.tasks, options.runs) if options.tasks else []
    # Named, so not to be skipped.
    if unsafe := [run.name for run in runs if run.runs_code and options.runs and not options.run_code]:
        raise ValueError(f"--runs {','.join(unsafe)} runs code that the model writes; add --run_code")
    if options.perplexity:
        _perplexity(options, args.max_position_embeddings, out)
    if options.needles:
        _needles(options, args.max_position_embeddings, out)
    if runs:
        run_harness(runs, folder, out / "lm_eval", options.run_code, print)


def _perplexity(options: argparse.Namespace, limit: int, out: Path) -> None:
    store = perplexity.open_data(
        options.perplexity,
        options.folder,
        limit,
        options.cache_folder,
        options.max_samples,
        options.overlong,
        template_settings(options),
    )
    means = perplexity.evaluate(load_model(options.folder, local_device()), store, options.pack_tokens, _progress)
    print(perplexity.perplexity_table(means))
    _write(out / "perplexity.json", {"data": str(options.perplexity), **perplexity.as_json(means)})


def _needles(options: argparse.Namespace, limit: int, out: Path) -> None:
    tasks, lengths = _words(options.needle_tasks), _numbers("--lengths", options.lengths)
    if options.depths < 1 or options.samples < 1:
        raise ValueError(f"--depths {options.depths} and --samples {options.samples} must be at least 1")
    depths = [0.5] if options.depths == 1 else [index / (options.depths - 1) for index in range(options.depths)]
    formatter = PromptFormatter(options.folder, template_settings(options))
    backend: needles.Backend
    if options.server:
        backend = ServerBackend(options.server, options.server_model, formatter.prompt_text)
    else:
        backend = LocalBackend(options.folder, formatter, local_device(), options.cache_tokens)
    scored = needles.run_suite(formatter, backend, tasks, lengths, depths, options.samples, options.seed, _progress)
    print(needles.score_table(scored))
    if isinstance(backend, ServerBackend) and backend.sends_text:
        print("note: the server takes no token ids; the prompts were sent as text")
    if max(lengths) > limit:
        print(f"note: lengths above {limit} exceed max_position_embeddings of config.json")
    settings = {"seed": options.seed, "samples": options.samples, "depths": depths, "server": options.server}
    _write(out / "needles.json", {**settings, **needles.as_json(scored)})
    (out / "needles.svg").write_text(heat_maps(scored), encoding="utf-8")
    print(f"heat map: {out / 'needles.svg'}")


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="HF folder: config.json, safetensors, tokenizer")
    parser.add_argument("--out", type=Path, help="where results are written [FOLDER/evaluation]")
    add_template_options(parser)
    group = parser.add_argument_group("perplexity")
    group.add_argument("--perplexity", type=Path, metavar="DATA", help="data source (docs/data.md) or prepared set")
    group.add_argument("--max_samples", type=int, default=0, help="size of a seeded random subset of the rows [0: all]")
    policies = ("error", "skip", "truncate", "split")
    group.add_argument("--overlong", default="error", choices=policies, help="samples above the model's limit [error]")
    group.add_argument(
        "--pack_tokens",
        type=int,
        default=perplexity.DEFAULT_PACK_TOKENS,
        help="tokens of a pass [%(default)s]",
    )
    group.add_argument("--cache_folder", type=Path, default=Path(".data/cache"), help="of token stores [%(default)s]")
    group = parser.add_argument_group("needle suite")
    group.add_argument("--needles", action="store_true", help="run the needle suite")
    group.add_argument("--needle_tasks", default=",".join(TASKS), help="[%(default)s]")
    group.add_argument("--lengths", default="4096,8192,16384", help="tokens of prompt and answer [%(default)s]")
    group.add_argument("--depths", type=int, default=11, help="number of positions of the needle [%(default)s]")
    group.add_argument("--samples", type=int, default=1, help="questions per task and depth [%(default)s]")
    group.add_argument("--seed", type=int, default=0, help="seed of the questions [%(default)s]")
    group.add_argument(
        "--cache_tokens", type=int, default=DEFAULT_CACHE_TOKENS, help="tokens of one batch [%(default)s]"
    )
    group.add_argument("--server", default="", metavar="URL", help=SERVER_HELP)
    group.add_argument("--server_model", metavar="NAME", help="name of the model on the server [the first]")
    group = parser.add_argument_group("general benchmarks (pip install '.[eval]')")
    group.add_argument("--tasks", type=Path, metavar="FILE.toml", help="runs of lm_eval; a file or paper_tasks")
    group.add_argument("--runs", default="", help="names of the runs, comma-separated [all]")
    group.add_argument("--run_code", action="store_true", help="allow runs that execute what the model writes")
    options = parser.parse_args(argv)
    if not (options.perplexity or options.needles or options.tasks):
        raise ValueError("nothing to evaluate; pass --perplexity DATA, --needles or --tasks FILE.toml")
    options.runs = _words(options.runs)
    return options


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _numbers(option: str, text: str) -> list[int]:
    words = _words(text)
    if not words or not all(word.isdigit() for word in words):
        raise ValueError(f"{option} {text}: must be comma-separated whole numbers, such as 4096,8192")
    return sorted({int(word) for word in words})


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _write(file: Path, values: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(exit_on_user_error(main))
