"""Greedy samples from an exported HF folder, by transformers: python scripts/generate.py outputs/debug_model/hf

--prompt TEXT asks one question (several times: several questions); without it, the first prompts of --file
(messages JSONL) are asked and the reference answers shown beside. Needs transformers: pip install .[dev]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from hbp_titan.cli import guarded


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
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    answers = []
    for prompt in prompts:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        answers.append(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return answers


def main() -> None:
    """Parse the command line, ask, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompt", action="append", default=[])
    parser.add_argument("--file", type=Path, default=Path(".data/stdlib/validation.jsonl"))
    parser.add_argument("--count", type=int, default=3)
    parser.add_argument("--max_new_tokens", type=int, default=64)
    arguments = parser.parse_args()

    def run() -> None:
        asked = [(prompt, "") for prompt in arguments.prompt] or questions(arguments.file, arguments.count)
        answers = answer(arguments.folder, [prompt for prompt, _ in asked], arguments.max_new_tokens)
        for (prompt, reference), text in zip(asked, answers, strict=True):
            print(f"> {prompt}\n{text}\n" + (f"(reference: {reference})\n" if reference else ""))

    guarded(run)


if __name__ == "__main__":
    main()
