"""Greedy answers of an exported HF folder to a few questions.

    python scripts/generate.py outputs/debug_model/hf [--prompt TEXT]

--prompt TEXT asks one question (several times: several questions); without it, the first prompts of --file
(messages JSONL) are asked and the reference answers shown beside. Our own model code answers, on a GPU where there is
one; evaluation/generator.py says how.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from hbp_titan.distributed.world import local_device
from hbp_titan.errors import exit_on_user_error
from hbp_titan.evaluation.generate import LocalAnswerer
from hbp_titan.evaluation.needles import Prompter


def questions(path: Path, count: int) -> list[tuple[str, str]]:
    """(prompt, reference answer) of the first `count` single-turn rows of a messages JSONL file."""
    found: list[tuple[str, str]] = []
    with path.open(encoding="utf-8") as file:
        for line in file:
            roles = {message["role"]: message["content"] for message in json.loads(line)["messages"]}
            if len(roles["user"]) < 400:
                found.append((roles["user"], roles["assistant"]))
            if len(found) == count:
                break
    return found


def answer(folder: Path, prompts: list[str], max_new_tokens: int) -> list[str]:
    """The greedy answers of the model in `folder`."""
    prompter = Prompter(folder)
    model = LocalAnswerer(folder, prompter, local_device())
    return model([prompter.ids(prompt) for prompt in prompts], [max_new_tokens] * len(prompts))


def main(argv: list[str] | None = None) -> None:
    """Parse the command line, ask, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompt", action="append", default=[])
    parser.add_argument("--file", type=Path, default=Path(".data/stdlib/validation.jsonl"))
    parser.add_argument("--count", type=int, default=3)
    parser.add_argument("--max_new_tokens", type=int, default=64)
    arguments = parser.parse_args(argv)
    asked = [(prompt, "") for prompt in arguments.prompt] or questions(arguments.file, arguments.count)
    answers = answer(arguments.folder, [prompt for prompt, _ in asked], arguments.max_new_tokens)
    for (prompt, reference), text in zip(asked, answers, strict=True):
        print(f"> {prompt}\n{text}\n" + (f"(reference: {reference})\n" if reference else ""))


if __name__ == "__main__":
    raise SystemExit(exit_on_user_error(main))
