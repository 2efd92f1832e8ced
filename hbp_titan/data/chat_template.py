"""A chat template, rendered in Jinja's immutable sandbox with a budget: conversation -> text.

Owns what a template gets: the messages as transformers passes them, the names, filters and tags that transformers
provides, and nothing that reaches files, modules, other templates or the clock. Owns the budget: a template that loops,
recurses or multiplies text ends in an error. A unit is about a microsecond of work. A loop pass and a call cost a few;
an operator, method, filter or output costs one per 1024 characters or 64 list items that it creates, charged before
they exist. This stops runaway templates, not those that are made to be slow.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from hbp_titan.data.tokenizer import TokenizerFolder
from hbp_titan.job_config import Data

# One to five seconds of loop passes, or 2 GB of text: 40 operators over a message of 50 MB.
BUDGET = 2_000_000
ITERATION = 2
CALL = 10

# Filters that pass values on; any other filter may convert a list or dict to text.
_STRUCTURAL = re.compile(
    "abs|attr|batch|count|d|default|dictsort|first|float|groupby|int|items|last|length|list|map|max|min|reject"
    "|rejectattr|reverse|round|select|selectattr|slice|sort|sum|unique"
)
_WIDE_FORMAT = re.compile(r"%[^a-zA-Z%]*(\*|\d{6})|\{[^{}]*(\{|\d{6})")


class TemplateBudgetError(jinja2.TemplateError):
    """A render over its budget."""


class _CodeGenerator(CodeGenerator):
    """Calls the environment's own methods directly: through the sandbox, a charge would cost more than a loop pass."""

    def visit_Call(self, node: nodes.Call, frame: Frame, forward_caller: bool = False) -> None:
        if not isinstance(node.node, nodes.EnvironmentAttribute):
            return super().visit_Call(node, frame, forward_caller=forward_caller)
        self.visit(node.node, frame)
        self.write("(")
        for argument in node.args:
            self.visit(argument, frame)
        self.write(")")


class BudgetedEnvironment(ImmutableSandboxedEnvironment):
    """An immutable sandbox with a budget per render; call `start_render` before each, and render one at a time."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})
    code_generator_class = _CodeGenerator

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._left = BUDGET
        self.finalize = self.charge_value
        # These differ from run to run.
        del self.filters["random"], self.globals["lipsum"]
        for name, function in self.filters.items():
            self.filters[name] = self.charged_filter(name, function)

    def start_render(self) -> None:
        """Reset the budget."""
        self._left = BUDGET

    def charge(self, units: int) -> bool:
        """Spend `units`; raises TemplateBudgetError if fewer are left, or for more than an eighth of the budget at once
        (a text of 256 MB). Returns True, so that it can be part of a loop's condition."""
        self._left -= units
        if self._left < 0 or units > BUDGET // 8:
            raise TemplateBudgetError("it loops, recurses or multiplies text beyond any conversation's need")
        return True

    def charge_value(self, value: Any) -> Any:
        """Spend units for a value that is written as text; returns the value."""
        if isinstance(value, (str, bytes)):
            if len(value) >= 1024:
                self.charge(len(value) >> 10)
        elif isinstance(value, (list, tuple, dict)):
            # A list that contains another one twice, and so on, is small until it is written.
            self.charge(1 + (len(value) >> 6))
            for item in value:
                self.charge_value(item)
            if isinstance(value, dict):
                for item in value.values():
                    self.charge_value(item)
        return value

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "+":
            result = left + right
            if type(result) is not str or len(result) >= 1024:
                self._charge_size(result)
            return result
        if operator == "*":
            self.charge(_product_units(left, right))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            self.charge((left.bit_length() * abs(right)) ** 2 >> 20)
        elif operator == "%" and isinstance(left, str):
            self._charge_format(left, right if isinstance(right, tuple) else (right,))
        result = super().call_binop(context, operator, left, right)
        self._charge_size(result)
        return result

    def call(__self, __context: Context, __obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, (str, bytes, int)):
            __self._charge_growth(__obj.__name__, owner, [*args, *kwargs.values()])
        __self.charge(1)
        result = super().call(__context, __obj, *args, **kwargs)
        __self._charge_size(result)
        return result

    def getattr(self, obj: Any, attribute: str) -> Any:
        # `message.role` of a dict is an item; looking for an attribute first would raise each time.
        if type(obj) is dict and attribute in obj and not hasattr(dict, attribute):
            return obj[attribute]
        return super().getattr(obj, attribute)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        # str.translate can grow a text by any factor.
        return attr != "translate" and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def charged(*args: Any, **kwargs: Any) -> str:
            self._charge_format(value.__self__, (*args, *kwargs.values()))
            return wrapped(*args, **kwargs)

        return charged

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template = super()._parse(source, name, filename)
        # Charges are inserted into the syntax tree, since the sandbox has no hook for a loop pass.
        for node in template.find_all((nodes.Import, nodes.FromImport, nodes.Include, nodes.Extends)):
            tag = {"FromImport": "from"}.get(type(node).__name__, type(node).__name__.lower())
            raise jinja2.TemplateSyntaxError(
                f"a chat template is one file; {{% {tag} %}} is not supported", node.lineno, name
            )
        for body in template.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
            assert isinstance(body, (nodes.For, nodes.Macro, nodes.CallBlock))
            work = sum(1 for _ in body.find_all(nodes.Expr)) // 8
            work += sum(len(data.data) for data in body.find_all(nodes.TemplateData)) // 1024
            is_loop = isinstance(body, nodes.For) and not body.recursive
            cost = nodes.Const(work + (ITERATION if is_loop else CALL))
            if isinstance(body, nodes.For) and body.test is not None:
                body.test = nodes.And(_call("charge", cost), body.test, lineno=body.lineno)
            body.body.insert(0, nodes.ExprStmt(_call("charge", cost), lineno=body.lineno))
        # ~ has no hook either; charging its parts before they are joined bounds the result.
        for concat in template.find_all(nodes.Concat):
            concat.nodes = [_call("charge_value", item) for item in concat.nodes]
        template.set_environment(self)
        return template

    def charged_filter(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def charged(*args: Any, **kwargs: Any) -> Any:
            # Some filters take the environment or context as their first argument.
            position = 1 if hasattr(function, "jinja_pass_arg") else 0
            if len(args) > position:
                value, more = args[position], [*args[position + 1 :], *kwargs.values()]
                self.charge(1)
                self._charge_size(value)
                if not _STRUCTURAL.fullmatch(name):
                    self.charge_value(value)
                if name == "format":
                    self._charge_format(str(value), tuple(more))
                elif name not in ("default", "d"):
                    self._charge_growth(name, value, more)
            result = function(*args, **kwargs)
            self._charge_size(result)
            return result

        return charged

    def _charge_size(self, value: Any) -> None:
        if isinstance(value, (str, bytes)):
            if len(value) >= 1024:
                self.charge(len(value) >> 10)
        elif isinstance(value, (list, tuple, dict, range)):
            self.charge(len(value) >> 6)

    def _charge_growth(self, name: str, value: Any, args: list[Any]) -> None:
        """Spend units for what a method or filter may add to `value`: the largest number or text among its arguments,
        times how often it may repeat that."""
        texts = [len(arg) for arg in args if isinstance(arg, str)]
        numbers = [arg for arg in args if isinstance(arg, int)]
        if not texts and not numbers and name != "join":
            return
        times = 1
        if name == "replace" and isinstance(value, str) and args and isinstance(args[0], str):
            times = value.count(args[0])
        elif name == "join":
            times = max([len(item) for item in (value, *args) if isinstance(item, (list, tuple, range))], default=1)
            texts += [len(value)] if isinstance(value, str) else []
        elif name in ("indent", "expandtabs", "wordwrap", "tojson"):
            times = len(str(value))
        self.charge((times * max([0, *texts, *numbers])) >> 10)

    def _charge_format(self, text: str, values: tuple[Any, ...]) -> None:
        if _WIDE_FORMAT.search(text):
            raise TemplateBudgetError("it formats with a width of six digits or a computed one")
        largest = max([len(value) for value in values if isinstance(value, str)], default=0)
        self.charge(((text.count("{") + text.count("%")) * largest) >> 10)


def _product_units(left: Any, right: Any) -> int:
    if isinstance(left, int) and isinstance(right, int):
        return (left.bit_length() * right.bit_length()) >> 20
    for value, times in ((left, right), (right, left)):
        if isinstance(value, (str, bytes, list, tuple)) and isinstance(times, int):
            return (len(value) * max(times, 0)) >> 10
    return 0


def _call(name: str, argument: nodes.Expr) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name), [argument], [], None, None)


Message = dict[str, Any]

# transformers.utils.chat_template_utils: reasoning is passed under several names, the first being the standard one.
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")


class ChatTemplate:
    """A chat template in Jinja's immutable sandbox, with the names that transformers gives to templates.

    date: the day (ISO) that `strftime_now` gives, at midnight: tokens must not depend on today's.
    Raises ValueError if the folder has no template, or it does not compile.
    """

    def __init__(self, folder: TokenizerFolder, date: str = Data.template_date) -> None:
        if not folder.chat_template:
            raise ValueError(
                f"model.tokenizer_path: {folder.path} has no chat template; add chat_template.jinja, or set "
                "data.chat_template"
            )
        self.name = str(folder.path / folder.template_name)
        self.special_tokens = folder.special_tokens
        self.has_generation_blocks = re.search(r"\{%-?\s*generation\s*-?%\}", folder.chat_template) is not None
        self._environment = BudgetedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, jinja2.ext.loopcontrols]
        )
        self._environment.filters["tojson"] = self._environment.charged_filter("tojson", _to_json)
        self._environment.globals.update(raise_exception=_raise_exception, dict=_TemplateDict(), namespace=_Namespace)
        self._environment.globals["strftime_now"] = _StrftimeNow(date, self._environment.charge)
        try:
            self._compiled = self._environment.from_string(folder.chat_template)
        except (jinja2.TemplateError, RecursionError, SyntaxError) as error:
            key = "data.chat_template" if Path(folder.template_name).is_absolute() else "model.tokenizer_path"
            raise ValueError(f"{key}: the chat template {self.name} is broken: {error}") from None
        self.literals = self._literals(folder.chat_template)

    def _literals(self, source: str) -> list[str]:
        """Return the texts, such as "</think>", that the template may look for in a message."""
        constants = {node.value for node in self._environment.parse(source).find_all(nodes.Const)}
        stripped = {value.strip() for value in constants if isinstance(value, str)}
        # Plain words are roles and keys; long texts are instructions.
        return sorted(text for text in stripped if 3 <= len(text) <= 64 and not text.replace("_", "").isalnum())

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        sentinels: tuple[str, str] = ("", ""),
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the text of `messages`, as from `plain_messages`; `sentinels` enclose each generation block.

        variables: further names for the template, such as enable_thinking.
        Raises ValueError if the template rejects the conversation or exceeds its budget.
        """
        self._environment.start_render()
        try:
            return self._compiled.render(
                {
                    **self.special_tokens,
                    "documents": None,
                    **(variables or {}),
                    "messages": messages,
                    "tools": tools,
                    "add_generation_prompt": add_generation_prompt,
                    "generation_sentinels": sentinels,
                }
            )
        except RecursionError:
            raise ValueError("the chat template recurses endlessly") from None
        except (TemplateBudgetError, MemoryError) as error:
            raise ValueError(f"the chat template was stopped: {error or 'it needs too much memory'}") from None
        except Exception as error:
            # A template's expression may raise anything that an operator or method of its operands raises.
            raise ValueError(
                f"the chat template rejects the conversation: {' '.join(str(error).split()) or type(error).__name__}"
            ) from None


def plain_messages(messages: Sequence[Message]) -> list[Message]:
    """Return the messages as transformers' apply_chat_template passes them to a template, without our key `train`."""
    plain = []
    for message in messages:
        # Templates test for presence: a null field must be absent.
        message = {key: value for key, value in message.items() if value is not None and key != "train"}
        reasoning = next((message[field] for field in REASONING_FIELDS if field in message), None)
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
    """Jinja's namespace without names that begin with an underscore."""

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
        raise jinja2.exceptions.SecurityError(f"a namespace cannot have the private name {name!r}")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML characters.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
_DATE_CODE = re.compile("%(-?)(.?)", re.DOTALL)
# Each of those before it.
_COMPOSED_CODES = {"D": "%m/%d/%y", "T": "%H:%M:%S", "F": "%Y-%m-%d", "r": "%I:%M:%S %p", "R": "%H:%M"}
_COMPOSED_CODES |= {"x": "%D", "X": "%T", "c": "%a %b %e %T %Y"}


class _StrftimeNow:
    """`strftime_now` on a fixed day, at midnight, as datetime.strftime writes it in the C locale.

    Not strftime itself: its names depend on the locale, its other codes on the platform, and a width can fill memory.
    """

    def __init__(self, date: str, charge: Callable[[int], Any]) -> None:
        day = datetime.datetime.fromisoformat(date)
        self._charge = charge
        self._numbers = {code: day.strftime(f"%{code}") for code in "dmyYjHIMSfUWVGuw"} | {"e": f"{day.day:2}"}
        name, month = _DAYS[day.weekday()], _MONTHS[day.month - 1]
        self._words = {"a": name[:3], "A": name, "b": month[:3], "h": month[:3], "B": month, "p": "AM"}
        self._words |= {"Z": "", "z": "", "%": "%", "n": "\n", "t": "\t"}
        for code, format in _COMPOSED_CODES.items():
            self._words[code] = _DATE_CODE.sub(self._write, format)

    def __call__(self, format: str) -> str:
        if not isinstance(format, str):
            raise jinja2.TemplateError("strftime_now takes a text, such as '%d %b %Y'")
        # %c writes twelve times its own length.
        self._charge(12 * len(format) >> 10)
        return _DATE_CODE.sub(self._write, format)

    def _write(self, match: re.Match[str]) -> str:
        dash, code = match.groups()
        if code in self._numbers:
            return self._numbers[code].lstrip("0 ") or "0" if dash else self._numbers[code]
        if dash or code not in self._words:
            raise jinja2.TemplateError(f"strftime_now: unknown code {match[0]!r}")
        return self._words[code]


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
