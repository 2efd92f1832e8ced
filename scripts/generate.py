"""Answer a few questions greedily with an exported HF folder.

    python scripts/generate.py outputs/debug_model/hf [--prompt TEXT]

--prompt TEXT asks one question and can be repeated; without it, the first prompts of --file (messages JSONL) are asked,
and the reference answers printed as well. Our own model code answers (hbp_titan/evaluation/generate.py), on a GPU if
there is one.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from hbp_titan.distributed.world import local_device
from hbp_titan.errors import exit_on_user_error
from hbp_titan.evaluation.generate import LocalBackend, add_template_options, template_settings
from hbp_titan.evaluation.needles import PromptFormatter
from hbp_titan.job_config import Data

MAX_CHARACTERS = 400
"""Longer questions of --file are skipped."""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="HF folder: config.json, safetensors, tokenizer")
    parser.add_argument("--prompt", action="append", default=[], help="a question")
    parser.add_argument("--file", type=Path, default=Path(".data/stdlib/validation.jsonl"), help="[%(default)s]")
    parser.add_argument("--count", type=int, default=3, help="questions of --file [3]")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="tokens of an answer [64]")
    add_template_options(parser)
    options = parser.parse_args(argv)
    asked = [(prompt, "") for prompt in options.prompt] or read_questions(options.file, options.count)
    prompts = [prompt for prompt, _ in asked]
    answers = answer(options.folder, prompts, options.max_new_tokens, template_settings(options))
    for (prompt, reference), text in zip(asked, answers, strict=True):
        print(f"> {prompt}\n{text}\n" + (f"(reference: {reference})\n" if reference else ""))


def read_questions(path: Path, count: int) -> list[tuple[str, str]]:
    """Return (prompt, reference answer) of the first `count` short single-turn rows of a messages JSONL file."""
    questions: list[tuple[str, str]] = []
    with path.open(encoding="utf-8") as file:
        for line in file:
            roles = {message["role"]: message["content"] for message in json.loads(line)["messages"]}
            if len(roles["user"]) < MAX_CHARACTERS:
                questions.append((roles["user"], roles["assistant"]))
            if len(questions) == count:
                break
    return questions


def answer(folder: Path, prompts: list[str], max_new_tokens: int, data: Data | None = None) -> list[str]:
    """Return the greedy answers of the model in `folder`. data: template settings [those of the folder]."""
    formatter = PromptFormatter(folder, data)
    backend = LocalBackend(folder, formatter, local_device())
    return backend([formatter.ids(prompt) for prompt in prompts], [max_new_tokens] * len(prompts))


if __name__ == "__main__":
    raise SystemExit(exit_on_user_error(main))
