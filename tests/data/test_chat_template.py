"""The sandbox of chat templates: runaway and hostile ones end in one error, within seconds and without gigabytes."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from hbp_titan.data import chat_template
from hbp_titan.data.chat_template import ChatTemplate, plain_messages
from hbp_titan.data.tokenizer import TokenizerFolder

MESSAGES = [{"role": "user", "content": "hi"}] * 3


def render(template: str) -> str:
    return ChatTemplate(TokenizerFolder(Path("folder"), {}, template)).render(MESSAGES)


def grow(expression: str, start: str = "'x'") -> str:
    """A template that replaces s by `expression` of s, sixty times."""
    return f"{{% set n = namespace(s={start}) %}}{{% for i in range(60) %}}{{% set n.s = {expression} %}}{{% endfor %}}"


RUNS_AWAY = {
    "nested loops": "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "filtered loop": "{% for i in range(100000) %}{% for j in range(100000) if false %}{% endfor %}{% endfor %}",
    "recursive loop": "{% for x in [1, 2] recursive %}{{ loop([1, 2]) if loop.depth < 60 }}{% endfor %}",
    "macro tree": "{% macro m(d) %}{% if d %}{{ m(d - 1) }}{{ m(d - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "output": "{% for i in range(100000) %}{{ 'x' * 1000000 }}{% endfor %}",
    "output kept": "{% set x %}{% for i in range(100000) %}{{ 'x' * 1000000 }}{% endfor %}{% endset %}",
    "sums": "{% for i in range(100000) %}{% set a = range(100000) | sum %}{% endfor %}",
    "text times": "{{ 'x' * 10000000000 }}",
    "times text": "{{ 10000000000 * 'x' }}",
    "list times": "{{ [0] * 10000000000 }}",
    "power": "{{ 10 ** (10 ** 10) }}",
    "squares": grow("n.s * n.s", "3"),
    "doubled": grow("n.s + n.s"),
    "joined": grow("n.s ~ n.s"),
    "list doubled": grow("n.s + n.s", "[0]"),
    "list in list": grow("[n.s, n.s]") + "{{ n.s }}",
    "list in list, JSON": grow("[n.s, n.s]") + "{{ n.s | tojson }}",
    "list in list, text": grow("[n.s, n.s]") + "{{ n.s | string }}",
    "replaced": grow("n.s.replace('x', 'x' * 1000)"),
    "replaced by a filter": grow("n.s | replace('x', 'x' * 1000)"),
    "separator": "{{ range(100000) | join('x' * 1000000) }}",
    "width": "{{ 'x'.ljust(10000000000) }}",
    "width of a filter": "{{ 'x' | center(10000000000) }}",
    "width of bytes": "{{ (1).to_bytes(10000000000, 'big') }}",
    "indent": "{{ messages | tojson(indent=1000000000) }}",
    "format": "{{ '%10000000000d' % 1 }}",
    "format of a filter": "{{ '%10000000000d' | format(1) }}",
    "format method": "{{ '{:>10000000000}'.format(1) }}",
    "computed width": "{{ '{:{}}'.format(1, 10000000000) }}",
}


@pytest.mark.parametrize("name", RUNS_AWAY)
def test_a_runaway_template_is_stopped_soon(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    if name not in ("nested loops", "output kept"):
        # A tenth of the budget is as good and ten times as fast.
        monkeypatch.setattr(chat_template, "BUDGET", chat_template.BUDGET // 10)
    began = time.process_time()
    with pytest.raises(ValueError, match=r"^the chat template was stopped") as error:
        render(RUNS_AWAY[name])
    assert "\n" not in str(error.value)
    # Well above what was measured (at most 2 s), far below what it would take.
    assert time.process_time() - began < 20


def test_endless_recursion_is_an_error() -> None:
    with pytest.raises(ValueError, match="recurses endlessly"):
        render("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% import 'x' as y %}", r"is broken: .*{% import %}"),
        ("{% from 'x' import y %}", r"is broken: .*{% from %}"),
        ("{% if false %}{% include 'x' %}{% endif %}", r"is broken: .*{% include %}"),
        ("{% extends 'x' %}", r"is broken: .*{% extends %}"),
        ("{{ [1, 2] | random }}", "is broken: No filter named 'random'"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "is broken: maximum recursion depth exceeded"),
        ("{{ lipsum(n=1) }}", "rejects the conversation: 'lipsum' is undefined"),
        ("{{ ''.__class__.__mro__[1] }}", "rejects the conversation: access to attribute '__class__' of 'str'"),
        ("{{ cycler.__init__.__globals__.os }}", "rejects the conversation: access to attribute '__init__'"),
        ("{{ self.__init__.__globals__ }}", "rejects the conversation: access to attribute '__init__'"),
        ("{{ namespace(_x=1) }}", "rejects the conversation: a namespace .*'_x'"),
        ("{{ messages.clear() }}", "rejects the conversation: .*clear"),
        ("{{ 'a'.translate({97: 'b'}) }}", "rejects the conversation: access to attribute 'translate'"),
        ("{{ 'a'.encode('x') }}", "rejects the conversation: unknown encoding: x"),
        ("{{ os.system('id') }}", "rejects the conversation: 'os' is undefined"),
    ],
)
def test_a_template_reaches_nothing_outside_itself(template: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        render(template)
    assert "\n" not in str(error.value)


def test_each_render_has_its_own_budget() -> None:
    template = ChatTemplate(TokenizerFolder(Path("folder"), {}, "{% for i in range(100000) %}{% endfor %}x"))
    assert [template.render(MESSAGES) for _ in range(30)] == ["x"] * 30


def test_a_budget_does_not_change_the_text() -> None:
    assert render("{{ 3 * 'ab' ~ 2 ** 3 ~ 7 % 4 ~ '%s|%d' % ('x', 5) }}") == "ababab83x|5"
    assert render("{{ '{}-{:>3}'.format('a', 7) ~ ('a,b'.replace(',', ';')) }}") == "a-  7a;b"
    assert (
        render("{% for x in [3, 1, 2] if x > 1 %}{{ loop.index }}{{ x }}{{ ',' if not loop.last }}{% endfor %}")
        == "13,22"
    )
    assert render("{% for x in [1, [2]] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}") == "12"
    assert render("{% macro m(x) %}<{{ x }}{{ caller() }}>{% endmacro %}{% call m(1) %}c{% endcall %}") == "<1c>"
    assert render("{% for k, v in dict(a=1).items() %}{{ k }}{{ v }}{{ loop.length }}{% endfor %}") == "a11"
    assert render("{{ messages | map(attribute='role') | join(' ') }}") == "user user user"
    assert render("{{ {'items': 1}.items is callable }} {{ {'role': 1}.role }}") == "True 1"


def test_a_message_of_many_megabytes_renders() -> None:
    template = "{% for m in messages %}{{ '<' + m.role + '>' + m.content | trim + '</' + m.role + '>' }}{% endfor %}"
    long = "x " * 5_000_000
    compiled = ChatTemplate(TokenizerFolder(Path("folder"), {}, template))
    assert compiled.render([{"role": "user", "content": long}]) == "<user>" + long[:-1] + "</user>"


def test_messages_are_passed_as_transformers_does() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [
        {"role": "assistant", "content": "a", "reasoning": "r", "tool_calls": None},
        {"role": "assistant", "thinking": "t", "content": "b"},
        {"role": "user", "content": "c", "name": None},
    ]
    template = "{{ messages | tojson }}"
    present = [{key: value for key, value in message.items() if value is not None} for message in messages]
    expected = render_jinja_template([present], chat_template=template)[0][0]
    compiled = ChatTemplate(TokenizerFolder(Path("folder"), {}, template))
    assert compiled.render(plain_messages(messages)) == expected
    assert plain_messages([{"role": "assistant", "content": "", "train": False}]) == [
        {"role": "assistant", "content": ""}
    ]
