"""The embedded corpus: an SFT data set and a tokenizer from the source text of the running Python's standard library.

Owns the conversations, the split into training and validation by module, and the folder: train.jsonl, validation.jsonl
(`messages` format, `source` is the kind of the row) and tokenizer/, always the same bytes for one Python version and
seed. Kinds of short to medium length: signature, docstring, source, implement, write_docstring, module_purpose; long
ones, with the whole source of a module: find_function, outline, module_questions (several turns), write_module. Lengths
are heavy-tailed, from tens of tokens to 64K; the longest 1% of the samples have a third of the tokens.
"""

from __future__ import annotations

import ast
import hashlib
import itertools
import json
import secrets
import shutil
import sysconfig
import textwrap
import tokenize
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from hbp_titan.data.tokenizer import train_tokenizer

Message = dict[str, str]

# A longer module (about 64K tokens: generated tables) has no conversations about the whole.
MAX_MODULE_CHARACTERS = 230_000
# A longer definition is not quoted: conversations about whole modules cover such lengths.
MAX_DEFINITION_CHARACTERS = 12_000
# One-line definitions teach nothing.
MIN_QUOTED_LINES = 3
QUESTIONS_PER_MODULE = 6


@dataclass(frozen=True)
class Definition:
    """A function, method or class with its dotted name in the module, and the texts of answers.

    stub: signature and docstring. bare: source without docstring. summary: first paragraph of the docstring.
    """

    name: str
    kind: str
    line: int
    signature: str
    docstring: str
    summary: str
    source: str
    stub: str
    bare: str


def module_conversations(module: str, text: str, rng: Random) -> Iterator[dict[str, Any]]:
    """Yield rows {"messages", "source", "module"} about a module with source `text`; `source` is the kind.

    Raises SyntaxError for text that this Python cannot parse.
    """
    tree = ast.parse(text)
    definitions = list(_definitions(tree, text.splitlines(keepends=True)))
    for kind, messages in _short(module, tree, definitions, rng):
        yield {"messages": messages, "source": kind, "module": module}
    if definitions and len(text) <= MAX_MODULE_CHARACTERS:
        for kind, messages in _long(module, tree, text, definitions, rng):
            yield {"messages": messages, "source": kind, "module": module}


def _short(
    module: str, tree: ast.Module, definitions: list[Definition], rng: Random
) -> Iterator[tuple[str, list[Message]]]:
    purpose = ast.get_docstring(tree)
    if purpose:
        ask = rng.choice(["What is the module `{}` for?", "Describe the module `{}`.", "What does `{}` provide?"])
        yield "module_purpose", _turn(ask.format(module), purpose)
    for item in definitions:
        name = f"{module}.{item.name}"
        if len(item.source) <= MAX_DEFINITION_CHARACTERS and item.source.count("\n") >= MIN_QUOTED_LINES:
            ask = rng.choice(["Show the source of `{}`.", "How is `{}` implemented?", "Print the code of `{}`."])
            yield "source", _turn(ask.format(name), _code(item.source))
        if not item.docstring:
            continue
        ask = rng.choice(["What is the signature of `{}`?", "How is `{}` called?", "Show the signature of `{}`."])
        yield "signature", _turn(ask.format(name), _code(item.signature))
        ask = rng.choice(["What does `{}` do?", "Explain `{}`.", "Give the documentation of `{}`."])
        yield "docstring", _turn(ask.format(name), item.docstring)
        if item.bare and len(item.source) <= MAX_DEFINITION_CHARACTERS:
            ask = rng.choice([f"Implement this {item.kind}.", f"Complete this {item.kind} of `{module}`."])
            yield "implement", _turn(f"{ask}\n\n{_code(item.stub)}", _code(item.source))
            ask = rng.choice([f"Write a docstring for this {item.kind}.", f"Document this {item.kind}."])
            yield "write_docstring", _turn(f"{ask}\n\n{_code(item.bare)}", item.docstring)


def _long(
    module: str, tree: ast.Module, text: str, definitions: list[Definition], rng: Random
) -> Iterator[tuple[str, list[Message]]]:
    source = f"This is the module `{module}`:\n\n{_code(text)}"
    documented = [item for item in definitions if item.docstring]
    if documented:
        item = rng.choice(documented)
        question = f"Which {item.kind} of this module does the following: {item.summary}"
        yield "find_function", _turn(f"{source}\n\n{question}", _location(item))
    yield "outline", _turn(f"{source}\n\nOutline this module.", _outline(definitions))
    # Without repetition: the answer would be in the turns before.
    asked = rng.sample(definitions, min(QUESTIONS_PER_MODULE, len(definitions)))
    messages: list[Message] = []
    for index, item in enumerate(asked):
        question, answer = _question(item, rng)
        messages += _turn(question if index else f"{source}\n\n{question}", answer)
    yield "module_questions", messages
    purpose = ast.get_docstring(tree) or f"The module `{module}`."
    request = f"Write the Python module `{module}`.\n\n{purpose}\n\nIt contains:\n{_outline(definitions)}"
    yield "write_module", _turn(request, _code(text))


def _question(item: Definition, rng: Random) -> tuple[str, str]:
    choices = [
        (f"What is the signature of `{item.name}`?", _code(item.signature)),
        (f"On which line does `{item.name}` begin?", f"`{item.name}` begins on line {item.line}."),
    ]
    if item.docstring:
        choices += [
            (f"What does `{item.name}` do?", item.docstring),
            (f"Which {item.kind} does the following: {item.summary}", _location(item)),
        ]
    if len(item.source) <= MAX_DEFINITION_CHARACTERS:
        choices.append((f"Quote the source of `{item.name}`.", _code(item.source)))
    return rng.choice(choices)


def _location(item: Definition) -> str:
    return f"The {item.kind} `{item.name}`, on line {item.line}:\n\n{_code(item.signature)}"


def _outline(definitions: list[Definition]) -> str:
    lines = []
    for item in definitions:
        indent = "  " * item.name.count(".")
        lines.append(f"{indent}- {item.kind} `{item.name}`" + (f": {item.summary}" if item.summary else ""))
    return "\n".join(lines)


def _turn(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _code(text: str) -> str:
    return f"```python\n{text.rstrip()}\n```"


def _definitions(tree: ast.Module | ast.ClassDef, lines: list[str], prefix: str = "") -> Iterator[Definition]:
    """Yield the functions and classes of the module, each class followed by its methods, without local ones."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield _definition(node, lines, prefix)
        if isinstance(node, ast.ClassDef):
            yield from _definitions(node, lines, f"{prefix}{node.name}.")


def _definition(
    node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, lines: list[str], prefix: str
) -> Definition:
    # A definition's own line comes after its decorators.
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
    end = node.end_lineno or node.lineno
    source = "".join(lines[first:end])
    docstring = ast.get_docstring(node) or ""
    stub = bare = ""
    opening = node.body[0]
    # A docstring on the line of its `def` cannot be removed by lines.
    if docstring and opening.end_lineno and opening.lineno > node.lineno:
        stub = "".join(lines[first : opening.end_lineno])
        # A body of nothing but its docstring would be empty without it.
        if len(node.body) > 1:
            bare = "".join(lines[first : opening.lineno - 1] + lines[opening.end_lineno : end])
    return Definition(
        name=prefix + node.name,
        kind="class" if isinstance(node, ast.ClassDef) else "method" if prefix else "function",
        line=node.lineno,
        signature=_signature(node),
        docstring=docstring,
        summary=" ".join(docstring.split("\n\n")[0].split()),
        source=textwrap.dedent(source),
        stub=textwrap.dedent(stub),
        bare=textwrap.dedent(bare),
    )


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(map(ast.unparse, [*node.bases, *node.keywords]))
        return f"class {node.name}({bases}):" if bases else f"class {node.name}:"
    keyword = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{keyword} {node.name}({ast.unparse(node.args)}){returns}:"


FILES = ("train.jsonl", "validation.jsonl", "tokenizer")
SKIPPED_FOLDERS = {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "turtledemo", "_bundled"}
# One in this many modules, by hash, is held out.
VALIDATION_EVERY = 20
# Text for training the tokenizer; more text saves less than 1% of the tokens.
TOKENIZER_CHARACTERS = 16_000_000


def ensure_stdlib_corpus(folder: Path, seed: int = 0) -> bool:
    """Build the embedded corpus in `folder` unless it exists; return whether it was built."""
    missing = [name for name in FILES if not (folder / name).exists()]
    if not missing:
        return False
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(
            f"data.embedded_folder = {folder}: not empty, but without {missing[0]}; delete it or use another"
        )
    build_stdlib_corpus(folder, seed)
    return True


def build_stdlib_corpus(folder: Path, seed: int = 0, stdlib: Path | None = None) -> None:
    """Write the embedded corpus to `folder`, which must not exist or be empty, atomically.

    stdlib: folder of the modules [the running Python's standard library]. Raises ValueError if it has no module.
    """
    # Next to the target, so that the rename stays on one file system.
    temporary = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}")
    temporary.mkdir(parents=True)
    try:
        _write_corpus(temporary, stdlib or Path(sysconfig.get_path("stdlib")), seed)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_corpus(folder: Path, stdlib: Path, seed: int) -> None:
    train: list[str] = []
    with (
        (folder / "train.jsonl").open("w", encoding="utf-8", newline="\n") as train_file,
        (folder / "validation.jsonl").open("w", encoding="utf-8", newline="\n") as validation_file,
    ):
        for module, text in _modules(stdlib):
            # By hash, so that a module stays on its side when others are added.
            held_out = _hash(f"{seed}:{module}") % VALIDATION_EVERY == 0
            for row in _rows(module, text, seed):
                line = json.dumps(row, ensure_ascii=False) + "\n"
                (validation_file if held_out else train_file).write(line)
            if not held_out:
                # The tokenizer must not be trained on held-out text.
                train.append(text)
    if not train:
        raise ValueError(f"{stdlib}: no Python module found for the embedded corpus")
    train_tokenizer(_tokenizer_text(train, seed), folder / "tokenizer")


def _modules(stdlib: Path) -> Iterator[tuple[str, str]]:
    """Yield name and source of each module, sorted by name."""
    files = {}
    for file in stdlib.rglob("*.py"):
        parts = file.relative_to(stdlib).with_suffix("").parts
        if not SKIPPED_FOLDERS.intersection(parts[:-1]) and all(part.isidentifier() for part in parts):
            name = ".".join(parts)
            files[name.removesuffix(".__init__")] = file
    # Sorted, because the order of rglob depends on the file system.
    for name in sorted(files):
        try:
            with tokenize.open(files[name]) as stream:
                yield name, stream.read()
        except SyntaxError:
            continue  # an unknown encoding


def _rows(module: str, text: str, seed: int) -> list[dict[str, Any]]:
    try:
        with warnings.catch_warnings():
            # Some test data of the library has invalid escapes on purpose.
            warnings.simplefilter("ignore", SyntaxWarning)
            return list(module_conversations(module, text, Random(f"{seed}:{module}")))
    except SyntaxError:
        return []  # test data of the library for other versions of Python


def _tokenizer_text(texts: list[str], seed: int) -> list[str]:
    """Return modules in random order, up to TOKENIZER_CHARACTERS."""
    # Random order, so that the tokenizer's text is not only the first modules by name.
    shuffled = Random(seed).sample(texts, len(texts))
    ends = itertools.accumulate(map(len, shuffled))
    return [text for text, end in zip(shuffled, ends, strict=True) if end <= TOKENIZER_CHARACTERS] or shuffled[:1]


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
