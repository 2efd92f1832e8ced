"""A question as the tokens that a model is asked to continue, and its answer as text.

Owns the two forms: through the chat template with the header of the assistant's turn, where the folder has a template,
else the bare text behind the tokenizer's own prefix (as a beginning-of-text token). In both the answer's first words
may be given. Also which ids end an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from hbp_titan.data.chat.jinja_template import ChatTemplate
from hbp_titan.data.chat.tokenizer import read_tokenizer_folder
from hbp_titan.models.hf_config import token_ids_from_hf


class Prompter:
    """The tokenizer of an HF folder, ready to ask.

    Raises ValueError where the folder lacks a tokenizer or its template does not compile.
    """

    def __init__(self, folder: Path) -> None:
        described = read_tokenizer_folder(folder)
        self.template = ChatTemplate(described) if described.chat_template else None
        self.stop_ids = stop_ids(folder)
        # With a template no prefix must be added, which `load` sees to.
        self.tokenizer = described.load() if self.template else Tokenizer.from_file(str(folder / "tokenizer.json"))

    def ids(self, question: str, answer_start: str = "") -> list[int]:
        """The prompt's tokens; `answer_start` is what the answer is made to begin with."""
        if self.template is None:
            return self.tokenizer.encode(f"{question}{answer_start}").ids
        messages = [{"role": "user", "content": question}]
        text = self.template.render(messages, add_generation_prompt=True)
        start = answer_start.lstrip() if text[-1:].isspace() else answer_start
        return self.tokenizer.encode(f"{text}{start}", add_special_tokens=False).ids

    def count(self, text: str) -> int:
        """Tokens of a piece of text."""
        return len(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def text(self, ids: Sequence[int]) -> str:
        """The text of an answer, without control tokens."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)


def stop_ids(folder: Path) -> list[int]:
    """The ids that end an answer: those of generation_config.json, else of config.json, else the tokenizer's eos."""
    eos = token_ids_from_hf(folder).get("eos_token_id")
    if eos is None:
        described = read_tokenizer_folder(folder)
        name = described.special_tokens.get("eos_token")
        eos = None if name is None else described.load().token_to_id(name)
    return [] if eos is None else list(eos) if isinstance(eos, list) else [eos]
