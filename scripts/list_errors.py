"""Every error message that a user can meet, by the sources, against docs/errors.md: what is missing, what is obsolete.

    python scripts/list_errors.py          prints the difference; exit code 1 where there is one
    python scripts/list_errors.py --all    prints every message with its places

A site is a call of an exception's class, a line of a list that becomes Mistakes or is called `faults`, a text printed
to stderr, or a shell script's `echo "error: ..."`. Its message is what is written there, each computed part as <name>;
one that has no words of its own hands on another's. Not a user's: `assert` and the exceptions of OURS, which only a
bug of ours reaches.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "docs" / "errors.md"
OURS = {"AssertionError", "IndexError", "ImportError", "TypeError", "NotImplementedError"}
WORDS = re.compile(r"[A-Za-z]{2,}")
PLACEHOLDER = re.compile(r"<[^<>]*>")


def main(argv: list[str]) -> int:
    """Print; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="print every message with its places")
    options = parser.parse_args(argv)
    messages, rows = source_messages(ROOT), table_messages(TABLE.read_text(encoding="utf-8"))
    if options.all:
        for message, places in messages.items():
            print(f"{', '.join(places)}\n    {message}")
        return 0
    missing, obsolete = difference(messages, rows)
    for message in missing:
        print(f"not in {TABLE.name}: {message}   ({', '.join(messages[message])})")
    for message in obsolete:
        print(f"raised nowhere: {message}")
    return 1 if missing or obsolete else 0


def difference(messages: dict[str, list[str]], rows: list[str]) -> tuple[list[str], list[str]]:
    """Messages without a row, and rows without a message; names of placeholders do not count."""
    known, raised = {normal(row) for row in rows}, {normal(message) for message in messages}
    missing = [message for message in messages if normal(message) not in known]
    return missing, [row for row in rows if normal(row) not in raised]


def normal(message: str) -> str:
    """A message for comparison."""
    return " ".join(PLACEHOLDER.sub("<>", message).split())


def table_messages(markdown: str) -> list[str]:
    """The first cell of every row of the tables, which is code."""
    cells = re.findall(r"^\| (`+)(.+?)\1 \|", markdown, re.MULTILINE)
    return [text.strip().replace("\\|", "|") for _, text in cells]


def source_messages(root: Path) -> dict[str, list[str]]:
    """Messages with the places (file:line) where they are raised."""
    found: dict[str, list[str]] = {}
    paths = [*sorted((root / "hbp_titan").rglob("*.py")), *sorted((root / "scripts").glob("*.py"))]
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in paths}
    classes = exception_classes(trees.values())
    for path, tree in trees.items():
        for line, message in Module(tree, classes).messages():
            _add(found, message, f"{path.relative_to(root)}:{line}")
    for path in [*sorted(root.glob("*.sh")), *sorted((root / "scripts").glob("*.s*"))]:
        for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            told = re.search(r'echo "error: (.*)" >&2', text)
            if told:
                message = re.sub(r"\$\{?(\w+)[^\s\"},:]*\}?", r"<\1>", told[1])
                _add(found, message, f"{path.relative_to(root)}:{number}")
    return found


def _add(found: dict[str, list[str]], message: str, place: str) -> None:
    message = " ".join(message.removeprefix("error: ").split())
    if WORDS.search(PLACEHOLDER.sub("", message)):
        found.setdefault(message, []).append(place)


def exception_classes(trees: Iterable[ast.Module]) -> dict[str, ast.ClassDef | None]:
    """Exceptions by name: the built-in ones, and those that the package derives from them."""
    classes: dict[str, ast.ClassDef | None] = {
        name: None
        for name, value in vars(builtins).items()
        if isinstance(value, type) and issubclass(value, Exception | SystemExit)
    }
    classes |= dict.fromkeys(("TemplateError", "TemplateSyntaxError", "SecurityError"))
    defined = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    for _ in range(3):  # a class may derive from one that is defined later
        classes |= {node.name: node for node in defined if any(_last_name(base) in classes for base in node.bases)}
    return classes


def _last_name(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


class Module:
    """The messages of one file."""

    def __init__(self, tree: ast.Module, classes: dict[str, ast.ClassDef | None]) -> None:
        self.tree, self.classes = tree, classes
        self.functions: dict[str, list[ast.FunctionDef]] = {}
        self.owner: dict[ast.AST, ast.AST] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                self.functions.setdefault(node.name, []).append(node)
                self.owner |= dict.fromkeys(ast.walk(node), node)
        self.constants = {
            target.id: node.value
            for node in tree.body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        self.open: set[ast.AST] = set()

    def messages(self) -> Iterator[tuple[int, str]]:
        """Line and message of every site."""
        for node in ast.walk(self.tree):
            if _adds_to_faults(node):
                assert isinstance(node, ast.Assign | ast.AugAssign | ast.Call)
                value = node.args[0] if isinstance(node, ast.Call) else node.value
                for message in self.texts(value, self.owner.get(node, self.tree)):
                    if message.count(" ") > 2:
                        yield node.lineno, message
            if not isinstance(node, ast.Call):
                continue
            for argument in self._message_arguments(node):
                scope = self.owner.get(node, self.tree)
                for message in self.texts(argument, scope):
                    yield node.lineno, message
                for part in self.fragments(argument, scope):
                    yield node.lineno, part

    def _message_arguments(self, call: ast.Call) -> list[ast.expr]:
        name = _last_name(call.func)
        if name == "print" and any(k.arg == "file" and _last_name(k.value) == "stderr" for k in call.keywords):
            return call.args[:1]
        if name == "__init__" and self._in_exception(call) and not _is_join(call.args[0]):
            return call.args[:1]
        if name not in self.classes or name in OURS or not call.args:
            return []
        if len(call.args) == 3 and name.endswith("NotFoundError"):
            joined = ast.JoinedStr([ast.FormattedValue(call.args[2], -1), ast.Constant(": "), call.args[1]])
            return [ast.copy_location(joined, call)]
        own = self.classes[name]
        speaks = own is not None and any(isinstance(n, ast.FunctionDef) and n.name == "__init__" for n in own.body)
        return [] if speaks and not _takes_lines(own) else call.args[:1]

    def _in_exception(self, call: ast.Call) -> bool:
        own = [c for c in self.classes.values() if c is not None and call in ast.walk(c)]
        return bool(own) and bool(call.args)

    def texts(self, node: ast.AST, scope: ast.AST) -> list[str]:
        """What an expression can be as text, computed parts as <name>; of a list, each element."""
        if isinstance(node, ast.Constant):
            return [node.value] if isinstance(node.value, str) else []
        if isinstance(node, ast.JoinedStr):
            return ["".join(self._part(value) for value in node.values)]
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            if isinstance(node.left, ast.Call | ast.Name | ast.List):  # of lists
                return self.texts(node.left, scope) + self.texts(node.right, scope)
            right = self.texts(node.right, scope)
            return [a + b for a in self.texts(node.left, scope) for b in right or [_placeholder(node.right)]]
        if isinstance(node, ast.IfExp):
            return self.texts(node.body, scope) + self.texts(node.orelse, scope)
        if isinstance(node, ast.BoolOp):
            return [text for value in node.values for text in self.texts(value, scope)]
        if isinstance(node, ast.List | ast.Tuple):
            return [text for element in node.elts for text in self.texts(element, scope)]
        if isinstance(node, ast.ListComp | ast.GeneratorExp):
            return self.texts(node.elt, scope)
        if isinstance(node, ast.Starred | ast.FormattedValue):
            return self.texts(node.value, scope)
        if isinstance(node, ast.Attribute) and _last_name(node.value) == "self":
            return self._of_name(node.attr, self.tree)
        if isinstance(node, ast.Name | ast.Call) and node not in self.open:
            self.open.add(node)
            try:
                found = self._of_name(node.id, scope) if isinstance(node, ast.Name) else self._of_call(node, scope)
            finally:
                self.open.discard(node)
            return found
        return []

    def fragments(self, node: ast.AST, scope: ast.AST) -> list[str]:
        """Lists that a message joins are messages of their own, element by element, where they have several words."""
        found = []
        for inner in ast.walk(node):
            if _is_join(inner):
                assert isinstance(inner, ast.Call)
                found += [text for text in self.texts(inner.args[0], scope) if text.count(" ") > 2]
        return found

    def _part(self, value: ast.expr) -> str:
        if isinstance(value, ast.Constant):
            return str(value.value)
        inner = value.value if isinstance(value, ast.FormattedValue) else value
        constant = self.constants.get(inner.id) if isinstance(inner, ast.Name) else None
        if isinstance(constant, ast.Constant) and isinstance(constant.value, str):
            return constant.value
        return _placeholder(inner)

    def _of_name(self, name: str, scope: ast.AST) -> list[str]:
        if name in self.constants:
            return self.texts(self.constants[name], self.tree)
        found = []
        for node in ast.walk(scope):
            value = _assigned(node, name)
            if value is not None:
                found += self.texts(value, scope)
        return found

    def _of_call(self, call: ast.Call, scope: ast.AST) -> list[str]:
        name = _last_name(call.func)
        if name in self.functions and name not in self.classes:
            return [
                text
                for function in self.functions[name]
                for node in ast.walk(function)
                if isinstance(node, ast.Return | ast.Yield) and node.value is not None
                for text in self.texts(node.value, function)
            ]
        inside = [text for argument in call.args for text in self.texts(argument, scope)]
        return inside if name in ("list", "shown", "fromkeys", "rstrip") else []


def _adds_to_faults(node: ast.AST) -> bool:
    """Whether `node` fills a list called faults: so the project calls lines that a user is told."""
    if isinstance(node, ast.Assign | ast.AugAssign):
        return any(_last_name(t) == "faults" for t in getattr(node, "targets", [getattr(node, "target", None)]))
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args):
        return False
    return node.func.attr in ("append", "extend") and _last_name(node.func.value) == "faults"


def _assigned(node: ast.AST, name: str) -> ast.expr | None:
    """What a statement gives to the variable `name`, or adds to that list."""
    if isinstance(node, ast.Assign):
        return node.value if any(_last_name(target) == name for target in node.targets) else None
    if isinstance(node, ast.AnnAssign | ast.AugAssign):
        return node.value if _last_name(node.target) == name else None
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("append", "extend"):
        return node.args[0] if _last_name(node.func.value) == name else None
    return None


def _is_join(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "join"


def _takes_lines(own: ast.ClassDef | None) -> bool:
    """Whether the class makes its message of the lines that it is given."""
    return own is not None and any(_is_join(node) for node in ast.walk(own))


def _placeholder(node: ast.AST) -> str:
    while isinstance(node, ast.Subscript | ast.Starred | ast.FormattedValue):
        node = node.value
    if isinstance(node, ast.Call) and node.args and _last_name(node.func) in ("list", "shown", "str", "len", "sorted"):
        return _placeholder(node.args[0])
    name = _last_name(node.func if isinstance(node, ast.Call) else node)
    return f"<{name.strip('_') or '...'}>" if name != "join" else "<...>"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
