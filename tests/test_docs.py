"""README.md, docs/ and the pages next to the experiments: commands parse, files and keys exist, links lead somewhere.

Nothing is run: each fenced command is given to the parser of its own script, which stops there.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

from hbp_titan.__main__ import MODULES, with_presets
from hbp_titan.config import load_config

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "hbp_titan" / "experiments").rglob("*.md")),
]
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
ASSIGNMENT = re.compile(r"[A-Z][A-Z_]*=\S*$")
PARSE = argparse.ArgumentParser.parse_known_args
OURS = ("python", ".venv/bin/python", "torchrun", "hbp-titan", "sbatch")
# Files that a page's reader has and the repository has not: the user's own configuration, or a run's.
PLACEHOLDER = re.compile(r"(train_configs/)?X\.toml|outputs/.*|small/.*")
OUTPUT_OPTIONS = ("--output", "--svg", "--html", "--json")
# Read by other programs than our shell scripts.
VARIABLES = ("OMP_NUM_THREADS", "HBP_TRACEBACK", "WANDB_MODE", "CUDA_VISIBLE_DEVICES", "PYTHONPATH")


@dataclass(frozen=True)
class Command:
    """A command of a page as it stands there, without comment and line breaks."""

    page: str
    text: str
    environment: dict[str, str]
    argv: list[str]


class Parsed(Exception):
    """Raised when a script has read its options; `rest` are keys of the configuration."""

    def __init__(self, rest: list[str]) -> None:
        super().__init__(rest)
        self.rest = rest


def blocks(page: Path, *languages: str) -> Iterator[str]:
    """Yield the text of the fenced blocks in these languages ("" for none)."""
    for indent, language, body in FENCE.findall(page.read_text(encoding="utf-8")):
        if language in languages:
            yield "".join(line.removeprefix(indent) for line in body.splitlines(keepends=True))


def commands() -> Iterator[Command]:
    """Yield every command of every page that our own programs read: fenced, or in backticks within a paragraph."""
    for page in PAGES:
        joined = "".join(blocks(page, "", "bash", "sh")).replace("\\\n", " ")
        lines = [re.sub(r"\s+#\s.*$", "", line).strip() for line in joined.splitlines()]
        for line in dict.fromkeys([*lines, *re.findall(r"`([^`\n]+)`", FENCE.sub("", page.read_text()))]):
            # "..." and NAME stand for the reader's own words.
            if "..." in line or re.search(r"\bNAME\b", line) or not line:
                continue
            try:
                words = shlex.split(line)
            except ValueError:
                continue  # not a command: an apostrophe of a text block
            begin = next((at for at, word in enumerate(words) if not ASSIGNMENT.match(word)), len(words))
            argv = [os.path.expandvars(word) for word in words[begin:]]
            is_script = bool(argv) and re.match(r"\.?/?(scripts/)?\w+\.(sh|sbatch)$", argv[0]) is not None
            if is_script or (len(argv) > 1 and argv[0] in OURS):
                environment = dict(word.split("=", 1) for word in words[:begin])
                yield Command(str(page.relative_to(ROOT)), line, environment, argv)


def links() -> list[tuple[Path, str]]:
    """Return (page, target) of every link within the repository."""
    found = []
    for page in PAGES:
        text = FENCE.sub("", page.read_text(encoding="utf-8"))
        found += [(page, target) for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    return found


def anchors(page: Path) -> set[str]:
    """Return the names under which the headings of a page can be linked to."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def check_keys(words: list[str]) -> None:
    """Load the configuration that `words` describe."""
    if not {"-h", "--help"} & set(words):
        debug_model = "train_configs/debug_model.toml"
        load_config([debug_model if PLACEHOLDER.fullmatch(word) else word for word in with_presets(words)])


def check_module(name: str, argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let main(argv) of a module parse its options, and check the keys of the configuration that are left."""
    if {"-h", "--help"} & set(argv):
        return
    module = importlib.import_module(name)
    if name == "hbp_titan.train":
        return check_keys(argv)

    def known(parser: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> NoReturn:
        raise Parsed(PARSE(parser, args, namespace)[1])

    def strict(parser: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> NoReturn:
        rest = PARSE(parser, args, namespace)[1]
        assert not rest, f"{name} has no option {rest}"
        raise Parsed([])

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", known)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", strict)
    with pytest.raises(Parsed) as parsed:
        module.main(argv)
    return check_keys(parsed.value.rest)


ALL = list(commands())
SHELL = "".join(
    (ROOT / name).read_text() for name in ("run_train.sh", "scripts/setup_env.sh", "scripts/slurm_train.sbatch",
                                           "scripts/trace_all_torch.sh", "scripts/run_tests.sh")
)  # fmt: skip


@pytest.mark.parametrize("command", ALL, ids=[f"{c.page}: {c.text[:70]}" for c in ALL])
def test_command_names_existing_programs_files_and_options(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for name, value in command.environment.items():
        assert name in VARIABLES or f"${{{name}" in SHELL or f"${name}" in SHELL, f"nothing reads {name}"
        assert name != "CONFIG_FILE" or PLACEHOLDER.fullmatch(value) or (ROOT / value).is_file()
    for before, word in itertools.pairwise(["", *command.argv]):
        in_repository = re.match(r"(train_configs|scripts|hbp_titan|tests)/", word)
        is_input = in_repository and before not in OUTPUT_OPTIONS
        assert not is_input or PLACEHOLDER.fullmatch(word) or (ROOT / word.partition("::")[0]).exists(), word
    argv = command.argv
    if argv[0] == "torchrun":
        start = next(at for at, word in enumerate(argv) if word == "-m" or word.endswith(".py"))
        argv = ["python", *argv[start:]]
    match argv:
        case ["./run_train.sh", *words]:
            check_keys(words)
        case ["sbatch", *words]:
            check_keys(words[words.index("scripts/slurm_train.sbatch") + 1 :])
        case ["hbp-titan", "--version" | "--help" | "presets"]:
            pass
        case ["hbp-titan", name, *words] | [_, "-m", "hbp_titan", name, *words]:
            check_module(MODULES.get(name, f"scripts.{name.replace('-', '_')}"), with_presets(words), monkeypatch)
        case [_, "-m", module, *words] if module.startswith("hbp_titan."):
            check_module(module, words, monkeypatch)
        case [_, script, *words] if script.startswith("scripts/") and script.endswith(".py"):
            check_module(script.removesuffix(".py").replace("/", "."), words, monkeypatch)


def test_every_kind_of_command_is_found() -> None:
    programs = {command.argv[0] for command in ALL}
    assert {"./run_train.sh", "python", "torchrun", "hbp-titan", "sbatch"} <= programs


def test_unknown_options_and_keys_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match="trainin"):
        check_module("scripts.prepare_data", ["--trainin.steps", "3"], monkeypatch)
    with pytest.raises(AssertionError, match="--pag"):
        check_module("scripts.report", ["outputs/x", "--pag"], monkeypatch)


def test_every_link_leads_to_a_page_and_a_heading() -> None:
    for page, target in links():
        name, _, anchor = target.partition("#")
        linked = page.parent / name if name else page
        assert linked.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(linked), f"{page.name} links to {target}: no such heading"


def test_every_page_and_picture_is_reached_from_the_readme() -> None:
    reached, ahead = set(), [ROOT / "README.md"]
    while ahead:
        page = ahead.pop()
        if page not in reached:
            reached.add(page)
            ahead += [(page.parent / target.partition("#")[0]).resolve() for p, target in links() if p == page]
    pictures = [path for folder in {page.parent for page in PAGES} for path in folder.glob("*.[sp][vn]g")]
    assert [path.name for path in [*PAGES, *pictures] if path not in reached] == []


def test_pages_are_ascii() -> None:
    for page in PAGES:
        page.read_text(encoding="ascii")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_toml_blocks_have_known_keys(page: Path, tmp_path: Path) -> None:
    for text in blocks(page, "toml"):
        (tmp_path / "block.toml").write_text(text)
        load_config(["--job.config_file", str(tmp_path / "block.toml")])


def test_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lengths = np.random.default_rng(0).integers(100, 20_000, size=2000)
    names: dict[str, Any] = {"lengths": lengths, "fingerprint": "data of the test", "steps": 3}
    for page in PAGES:
        for text in blocks(page, "python"):
            exec(compile(text, page.name, "exec"), names)
    assert names["rest"].world_size == 16
