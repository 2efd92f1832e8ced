"""A chat template rendered in Jinja's immutable sandbox: conversation -> text.

Owns what a template sees: the messages as transformers would hand them over, the names, filters and tags that
transformers gives to templates, and nothing that reaches files, modules or the clock.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import jinja2
import jinja2.ext

from hbp_titan.data.chat.template_budget import BudgetedEnvironment, TemplateBudgetError
from hbp_titan.data.chat.tokenizer import TokenizerFolder

Message = dict[str, Any]

# transformers.utils.chat_template_utils: reasoning is passed under several names, the first being the standard one.
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")


class ChatTemplate:
    """A chat template in Jinja's immutable sandbox, with the names that transformers gives to templates.

    `strftime_now` is left out: tokens must not depend on the day. Templates that know a fixed date then use that.
    """

    def __init__(self, folder: TokenizerFolder) -> None:
        if not folder.chat_template:
            raise ValueError(f"model.tokenizer_path: {folder.path} has no chat template: add chat_template.jinja")
        self.special_tokens = folder.special_tokens
        self.has_generation_blocks = re.search(r"\{%-?\s*generation\s*-?%\}", folder.chat_template) is not None
        self._environment = BudgetedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, jinja2.ext.loopcontrols]
        )
        self._environment.filters["tojson"] = self._environment.charged_filter("tojson", _to_json)
        self._environment.globals.update(raise_exception=_raise_exception, dict=_TemplateDict(), namespace=_Namespace)
        try:
            self._compiled = self._environment.from_string(folder.chat_template)
        except (jinja2.TemplateError, RecursionError, SyntaxError) as error:
            raise ValueError(f"model.tokenizer_path: the chat template of {folder.path} is broken: {error}") from None

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        sentinels: tuple[str, str] = ("", ""),
    ) -> str:
        """The text of `messages` as `plain_messages` gives them; `sentinels` enclose each generation block.

        Raises ValueError where the template refuses the conversation, or does more than any conversation needs.
        """
        self._environment.start_render()
        try:
            return self._compiled.render(
                **self.special_tokens,
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                generation_sentinels=sentinels,
            )
        except RecursionError:
            raise ValueError("the chat template recurses without end") from None
        except (TemplateBudgetError, MemoryError) as error:
            raise ValueError(f"the chat template is refused: {error or 'it needs too much memory'}") from None
        except Exception as error:
            # An expression of a template may raise what any operator or method of its operands raises.
            raise ValueError(f"the chat template refuses the conversation: {_one_line(error)}") from None


def plain_messages(messages: Sequence[Message]) -> list[Message]:
    """The messages as transformers' apply_chat_template hands them to a template, less our own key `train`."""
    plain = []
    for message in messages:
        # Templates test for presence: a null field must be absent.
        message = {key: value for key, value in message.items() if value is not None and key != "train"}
        reasoning = next((message[field] for field in _REASONING_FIELDS if field in message), None)
        if reasoning is not None:
            message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
        plain.append(message)
    return plain


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


class _TemplateDict:
    """`dict` without the attributes of a class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args, **kwargs)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's namespace, refusing names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, values = args[0], dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace has no room for the private name {name!r}")


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


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
