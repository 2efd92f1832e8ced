"""A chat template rendered in Jinja's immutable sandbox: conversation -> text.

Owns the environment that a template sees: the names, filters and tags that transformers gives to templates, and
nothing that reaches files, modules or the clock.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from hbp_titan.data.tokenizer import TokenizerFolder

Message = dict[str, Any]


class ChatTemplate:
    """A chat template in Jinja's immutable sandbox, with the names that transformers gives to templates.

    `strftime_now` is left out: tokens must not depend on the day. Templates that know a fixed date then use that.
    """

    def __init__(self, folder: TokenizerFolder) -> None:
        if not folder.chat_template:
            raise ValueError(f"model.tokenizer_path: {folder.path} has no chat template: add chat_template.jinja")
        self.special_tokens = folder.special_tokens
        self.has_generation_blocks = re.search(r"\{%-?\s*generation\s*-?%\}", folder.chat_template) is not None
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        try:
            self._compiled = environment.from_string(folder.chat_template)
        except jinja2.TemplateError as error:
            raise ValueError(f"model.tokenizer_path: the chat template of {folder.path} is broken: {error}") from None

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        sentinels: tuple[str, str] = ("", ""),
    ) -> str:
        """The text of `messages`; `sentinels` are written before and after each generation block."""
        try:
            return self._compiled.render(
                **self.special_tokens,
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                generation_sentinels=sentinels,
            )
        except RecursionError:
            raise ValueError("the chat template recurses without end") from None
        except (jinja2.TemplateError, TypeError, LookupError, AttributeError, ArithmeticError, ValueError) as error:
            raise ValueError(f"the chat template refuses the conversation: {error}") from None


class _GenerationBlocks(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}`: writes the block's text between the two sentinels."""

    tags = {"generation"}  # noqa: RUF012 (jinja's own form)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        sentinels = jinja2.nodes.Name("generation_sentinels", "load")
        call = self.call_method("_wrap", [sentinels])
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _wrap(self, sentinels: tuple[str, str], caller: Callable[[], str]) -> str:
        return sentinels[0] + caller() + sentinels[1]


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML characters.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
