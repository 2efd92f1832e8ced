"""Tokenizer folders of well-known model families, for tests: a small vocabulary with each family's tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from hbp_titan.data.tokenizer import train_tokenizer

TEMPLATES = Path(__file__).resolve().parents[1] / "fixtures" / "chat_templates"

_TOOL_NAMES = ["calls begin", "calls end", "call begin", "call end", "sep"]
_OUTPUT_NAMES = ["outputs begin", "outputs end", "output begin", "output end"]
_DEEPSEEK_TURNS = [
    *(f"<\uff5c{name}\uff5c>" for name in ("User", "Assistant")),
    *(f"<\uff5ctool {name}\uff5c>".replace(" ", "\u2581") for name in (*_TOOL_NAMES, *_OUTPUT_NAMES)),
]
BEGIN, END = (f"<\uff5c{name}\u2581of\u2581sentence\uff5c>" for name in ("begin", "end"))

# Family: special tokens (the first is bos, the second eos), other added tokens.
FAMILIES: dict[str, tuple[list[str], list[str]]] = {
    "chatml": (["<|endoftext|>", "<|im_end|>"], []),
    "llama3_1": (["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"], []),
    "qwen2_5": (["<|endoftext|>", "<|im_end|>"], ["<tool_call>", "</tool_call>"]),
    "qwen3": (["<|endoftext|>", "<|im_end|>"], ["<tool_call>", "</tool_call>", "<think>", "</think>"]),
    "deepseek_v2": ([BEGIN, END], []),
    "deepseek_v3": ([BEGIN, END], _DEEPSEEK_TURNS),
    "deepseek_v3_1": ([BEGIN, END], [*_DEEPSEEK_TURNS, "<think>", "</think>"]),
    "deepseek_r1": ([BEGIN, END], [*_DEEPSEEK_TURNS, "<think>", "</think>"]),
}


def make_family(family: str, folder: Path, vocab_size: int = 260) -> Path:
    """A tokenizer folder of the family; with 260 entries one token a byte, but for the added tokens."""
    texts = ["def add(a, b):\n    return a + b\n", "user\n\nsat on the mat user\nassistant\n\n"] * 4
    train_tokenizer(texts, folder, vocab_size)
    special, plain = FAMILIES[family]
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special])
    backend.add_tokens([AddedToken(text, normalized=False) for text in plain])
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": special[0], "eos_token": special[1]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text((TEMPLATES / f"{family}.jinja").read_text())
    return folder


def chat(*turns: str) -> list[dict[str, Any]]:
    """Turns of user and assistant in alternation, the user first."""
    return [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(turns)]


def calls(*arguments: Any, **more: Any) -> dict[str, Any]:
    """An assistant's message that calls f0, f1, ... with these arguments."""
    functions = [{"name": f"f{index}", "arguments": value} for index, value in enumerate(arguments)]
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": item} for item in functions], **more}
