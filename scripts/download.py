"""Download a model or data set of the Hugging Face hub.

    python scripts/download.py meta-llama/Llama-3.1-8B-Instruct                  # to models/Llama-3.1-8B-Instruct
    python scripts/download.py allenai/tulu-3-sft-mixture --dataset              # to data/tulu-3-sft-mixture
    python scripts/download.py org/data --dataset --split test --config en --out data/en
    python scripts/download.py org/model --include 'tokenizer*' --include config.json

Downloads what training reads: safetensors, configuration, tokenizer, templates, licences; of data sets, JSON, CSV,
Parquet and Arrow. The same command continues after an interruption, and does nothing once all is there. HF_TOKEN (or
--token) gives access to restricted repositories, HF_ENDPOINT names another hub. Needs the extra `hub`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hbp_titan.download import Request, download
from hbp_titan.errors import exit_on_user_error


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="download.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("repo", help="OWNER/NAME on the hub")
    parser.add_argument("--dataset", action="store_true", help="it is a data set, not a model")
    parser.add_argument("--revision", default="main", help="branch, tag or commit [main]")
    parser.add_argument("--out", type=Path, help="folder [models/NAME, or data/NAME with --dataset]")
    parser.add_argument("--include", action="append", default=[], metavar="PATTERN", help="only these; * matches / too")
    parser.add_argument("--split", default="", help="only the files of this split of a data set")
    parser.add_argument("--config", default="", help="configuration of a data set, as its README.md names it")
    parser.add_argument("--token", help="access token; HF_TOKEN is safer, because others can see arguments")
    parser.add_argument("--connections", type=int, default=8, help="files to transfer at the same time [8]")
    parser.add_argument("--overwrite", action="store_true", help="replace local files that differ from the hub's")
    options = parser.parse_args(argv)
    if (options.split or options.config) and not options.dataset:
        parser.error("--split and --config need --dataset")
    if options.connections < 1:
        parser.error("--connections must be at least 1")
    request = Request(
        repo_id=options.repo,
        repo_type="dataset" if options.dataset else "model",
        revision=options.revision,
        out=options.out,
        include=options.include,
        split=options.split,
        config=options.config,
        token=options.token,
        connections=options.connections,
        overwrite=options.overwrite,
    )
    try:
        download(request)
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    raise SystemExit(exit_on_user_error(main))
