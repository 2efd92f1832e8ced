"""README and docs: every command names what there is, every link leads somewhere, every command is run.

The quick tests parse each command with the script's own parser. The slow ones run them in order in a clean copy of the
repository; docs_commands.py says how each is shortened and which cannot run here.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import numpy as np
import pytest

from hbp_titan.__main__ import commands as hbp_titan_commands
from hbp_titan.__main__ import with_presets
from hbp_titan.config import load_config
from tests.docs_checkout import make_documented_checkout, run
from tests.docs_commands import NOT_RUN, RUNS, Run
from tests.docs_text import PAGES, ROOT, Command, anchors, blocks, commands, links

# The last is what a command of the page leaves.
PLACEHOLDERS = ("X.toml", "train_configs/X.toml", "outputs/quality/hbp/seed-1/run.toml")
# What run_train.sh and SLURM's script read, and what others do.
SHELL = "".join(
    (ROOT / name).read_text() for name in ("run_train.sh", "scripts/setup_env.sh", "scripts/slurm_train.sbatch")
)
VARIABLES = ("OMP_NUM_THREADS", "HBP_TRACEBACK", "WANDB_MODE", "CUDA_VISIBLE_DEVICES")


class _Parsed(Exception):
    """A script has read its options; the rest are keys of the configuration."""

    def __init__(self, rest: list[str]) -> None:
        super().__init__(rest)
        self.rest = rest


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"documented_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    module.__package__ = "scripts"
    spec.loader.exec_module(module)
    return module


def _check_options(path: Path, argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the script at `path` read `argv`, and stop it there."""
    parse = argparse.ArgumentParser.parse_known_args

    def known(parser: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> NoReturn:
        raise _Parsed(parse(parser, args, namespace)[1])

    def strict(parser: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> NoReturn:
        rest = parse(parser, args, namespace)[1]
        assert not rest, f"{path.name} has no option {rest}"
        raise _Parsed([])

    def load(words: list[str]) -> NoReturn:
        raise _Parsed(words)

    module = _module(path)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", known)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", strict)
    monkeypatch.setattr(module, "load_config", load, raising=False)
    monkeypatch.setattr("sys.argv", [str(path), *argv])
    if {"-h", "--help"} & set(argv):
        return
    with pytest.raises(_Parsed) as parsed:
        module.main(*[argv][: module.main.__code__.co_argcount])
    _check_keys(parsed.value.rest)


def _check_keys(words: list[str]) -> None:
    """Each is a key of the configuration with a value that it may have."""
    if {"-h", "--help"} & set(words):
        return
    there = ["train_configs/debug_model.toml" if word in PLACEHOLDERS else word for word in with_presets(words)]
    load_config(there)


def _without_launcher(argv: list[str]) -> list[str]:
    """What torchrun starts."""
    place = next(i for i, word in enumerate(argv) if word == "-m" or word.endswith(".py"))
    return ["python", *argv[place:]]


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("M", "models/Llama-3.1-8B-Instruct")


ALL = commands()


@pytest.mark.parametrize("command", ALL, ids=[f"{c.page}: {c.text[:70]}" for c in ALL])
def test_a_command_names_what_there_is(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in command.environment.items():
        assert name in VARIABLES or f"${{{name}" in SHELL or f"${name}" in SHELL, f"nothing reads {name}"
        if name == "CONFIG_FILE":
            assert value in PLACEHOLDERS or (ROOT / value).is_file()
    argv = [os.path.expandvars(word) for word in command.argv]
    if argv[0] == "torchrun":
        argv = _without_launcher(argv)
    match argv:
        case ["./run_train.sh", *words]:
            _check_keys(words)
        case ["sbatch", *words] if "scripts/slurm_train.sbatch" in words:
            place = words.index("scripts/slurm_train.sbatch")
            _check_keys(words[place + 1 :])
        case ["python", "-m", "hbp_titan.tuning.dry_run", *words]:
            _check_options(ROOT / "hbp_titan" / "tuning" / "dry_run.py", words, monkeypatch)
        case ["hbp-titan", "--help" | "--version" | "presets"] | ["python", "-m", "pytest", *_]:
            pass
        case ["python", "-m", "hbp_titan", "train", *words]:
            _check_keys(words)
        case ["hbp-titan", name, *words] | ["python", "-m", "hbp_titan", name, *words]:
            _check_options(hbp_titan_commands()[name], with_presets(words), monkeypatch)
        case ["python", script, *words]:
            _check_options(ROOT / script, words, monkeypatch)
        case [program, *_]:
            assert (ROOT / program).is_file() or command.text in NOT_RUN or command.text.startswith(("export", "ls"))


def test_every_command_is_run_or_says_why_not() -> None:
    texts = {command.text for command in ALL}
    runs = [run.command for run in RUNS]
    assert len(runs) == len(set(runs)), "listed twice"
    assert not set(runs) & set(NOT_RUN), "both run and not run"
    assert texts - set(runs) - set(NOT_RUN) == set(), "in the docs, but not in tests/docs_commands.py"
    assert (set(runs) | set(NOT_RUN)) - texts == set(), "in tests/docs_commands.py, but no longer in the docs"


def test_every_link_leads_to_a_page_and_a_heading() -> None:
    for page, target in links():
        name, _, anchor = target.partition("#")
        linked = page.parent / name if name else page
        assert linked.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(linked), f"{page.name} links to {target}: no such heading"


def test_pages_are_ascii() -> None:
    for page in PAGES:
        page.read_text(encoding="ascii")


def test_every_page_and_picture_is_reached_from_the_readme() -> None:
    reached, ahead = set(), [ROOT / "README.md"]
    while ahead:
        page = ahead.pop()
        if page not in reached:
            reached.add(page)
            ahead += [(page.parent / target.partition("#")[0]).resolve() for p, target in links() if p == page]
    assert [path.name for path in sorted((ROOT / "docs").iterdir()) if path not in reached] == []


@pytest.mark.parametrize(("page", "text"), blocks("toml"))
def test_toml_has_known_keys(page: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "block.toml").write_text(text)
    load_config(["--job.config_file", str(tmp_path / "block.toml")])


def test_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lengths = np.random.default_rng(0).integers(100, 20_000, size=2000)
    names: dict[str, Any] = {"lengths": lengths, "fingerprint": "data of the test", "steps": 3}
    for page, text in blocks("python"):
        exec(compile(text, page, "exec"), names)
    assert names["rest"].world_size == 16


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_documented_checkout(tmp_path_factory.mktemp("documented") / "repository")


@pytest.mark.slow
@pytest.mark.parametrize("documented", RUNS, ids=[run.command[:90] for run in RUNS])
def test_a_command_runs(documented: Run, checkout: Path) -> None:
    done: subprocess.CompletedProcess[str]
    for done in run(documented.text(), checkout):
        assert done.returncode == 0, f"{done.args}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
