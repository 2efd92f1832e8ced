"""docs/errors.md has a row for every message that a user can meet, and no other."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from hbp_titan.config import JobConfig, to_dict

ROOT = Path(__file__).resolve().parents[1]


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("list_errors", ROOT / "scripts" / "list_errors.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["list_errors"] = module
    spec.loader.exec_module(module)
    return module


LISTED = _script()
MESSAGES = LISTED.source_messages(ROOT)
TABLE = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")

SOURCE = """
_MEND = "set it back"

class Own(ValueError): ...
class Mistakes(Own): ...

class Speaks(RuntimeError):
    def __init__(self, what):
        super().__init__(f"it is {what} that speaks")

def check(path, rows, size):
    if size < 0:
        raise ValueError(f"{path}: {size} is "
                         f"below 0: {_MEND}")
    if size > 9:
        raise Own("too large: " + ", ".join(rows)) from None
    raise ValueError("one way" if size else "another way")

def many(rows):
    lines = [f"row {row} is wrong" for row in rows]
    lines.append("and that is all")
    raise Mistakes(lines)

def made():
    return Mistakes([f"first of {hint()}; mend it", *rest()])

def rest():
    yield f"a line of {size()}"

def audit(self, plan):
    self.faults += [f"step {plan.step} was not trained"]
    print(f"rank {self.rank} is ended", file=sys.stderr)
    print("all is well")

def others(error):
    assert error, "an invariant of ours"
    if error:
        raise IndexError(f"iteration {error} of a plan")
    if str(error):
        raise Speaks(error)
    raise ValueError(str(error))

def missing(path):
    raise FileNotFoundError(2, "no such config file", str(path))
"""

FOUND = [
    "<path>: <size> is below 0: set it back",
    "a line of <size>",
    "and that is all",
    "another way",
    "first of <hint>; mend it",
    "<path>: no such config file",
    "it is <what> that speaks",
    "one way",
    "rank <rank> is ended",
    "row <row> is wrong",
    "step <step> was not trained",
    "too large: <...>",
]


def test_every_message_has_a_row_and_every_row_a_message() -> None:
    assert len(MESSAGES) > 350
    assert LISTED.difference(MESSAGES, LISTED.table_messages(TABLE)) == ([], [])


def test_every_row_has_a_cause_and_a_mend() -> None:
    rows = [line for line in TABLE.splitlines() if re.match(r"\| `", line)]
    assert len(rows) == len(LISTED.table_messages(TABLE))
    for row in rows:
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]]
        assert len(cells) == 3, row
        assert all(cells), row


def test_every_topic_is_in_the_index() -> None:
    headings = re.findall(r"^## (.*)$", TABLE, re.MULTILINE)
    assert re.findall(r"\[([^\]]*)\]\(#", TABLE) == headings


SUFFIXES = ("md", "jsonl", "json", "safetensors", "py")
PAGES = ("errors.md", "troubleshooting.md")


@pytest.mark.parametrize("page", PAGES)
def test_keys_scripts_and_links_exist(page: str) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    sections = to_dict(JobConfig())
    keys = re.findall(r"(?<![\w./])([a-z_]+)\.([a-z_0-9]+)(?=[ `=,;:)\]])", text)
    named = {(section, key) for section, key in keys if section in sections}
    named = {(section, key) for section, key in named if section != "levels" and key not in SUFFIXES}
    assert len(named) > 20
    assert {f"{section}.{key}" for section, key in named if not hasattr(getattr(JobConfig(), section), key)} == set()
    for script in set(re.findall(r"scripts/\w+\.\w+", text)):
        assert (ROOT / script).is_file(), script
    for target, anchor in re.findall(r"\]\(([\w.]+)?(?:#([\w-]+))?\)", text):
        linked = (ROOT / "docs" / (target or page)).read_text(encoding="utf-8")
        headings = [
            re.sub(r"[^a-z0-9 -]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^##+ (.*)$", linked, re.M)
        ]
        assert not anchor or anchor in headings, (target, anchor)


def test_messages_are_found_in_every_form_in_which_they_are_written() -> None:
    tree = ast.parse(SOURCE)
    module = LISTED.Module(tree, LISTED.exception_classes([tree]))
    found = {" ".join(message.split()) for _, message in module.messages()}
    assert sorted(message for message in found if LISTED.WORDS.search(LISTED.PLACEHOLDER.sub("", message))) == sorted(
        FOUND
    )


@pytest.mark.parametrize("shell", ["scripts/setup_env.sh", "scripts/slurm_train.sbatch", "run_train.sh"])
def test_shell_scripts_are_read(shell: str) -> None:
    assert any(place.startswith(shell) for places in MESSAGES.values() for place in places)


def test_a_changed_message_is_missing_and_its_row_obsolete() -> None:
    messages = {"<path>: is <n> bytes: copy it again": ["a.py:1"]}
    assert LISTED.difference(messages, ["<file>: is <size> bytes:  copy it again"]) == ([], [])
    assert LISTED.difference(messages, ["<file>: has <size> bytes: copy it again"]) == (
        ["<path>: is <n> bytes: copy it again"],
        ["<file>: has <size> bytes: copy it again"],
    )
