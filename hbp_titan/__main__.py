"""The command `hbp-titan` (or `python -m hbp_titan`): the scripts of the project as subcommands, and the presets.

Owns the names; every option is the script's own. A script runs as `python scripts/NAME.py` would, in this process, so
its exit code is this command's, and `torchrun -m hbp_titan NAME ...` starts it on several ranks. A preset that
--job.config_file names without a path (llama3_1_8b_hbp) is found wherever the package lies. Nothing here imports torch.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
import textwrap
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

from hbp_titan import __version__
from hbp_titan.errors import exit_on_user_error
from hbp_titan.utils import did_you_mean

PACKAGE = Path(__file__).resolve().parent
MODULES = {"train": "hbp_titan.train", "dry_run": "hbp_titan.tuning.dry_run"}
# What serves a checkout alone.
NOT_COMMANDS = ("check_env",)
CONFIG_KEY = "--job.config_file"


def main() -> None:
    """Run what the command line asks for."""
    argv = sys.argv[1:]
    if not argv or argv[0] in ("-h", "--help"):
        print(help_text())
    elif argv[0] == "--version":
        torch = importlib.metadata.version("torch")
        print(f"hbp_titan {__version__}, torch {torch}, Python {platform.python_version()}")
    elif argv[0] == "presets":
        for path in presets().values():
            print(f"{path}\n    {_hardware(path)}")
    else:
        name, path = exit_on_user_error(lambda: _command(argv[0]))
        words = exit_on_user_error(lambda: with_presets(argv[1:]))
        if name == "train" and "RANK" not in os.environ and not {"-h", "--help"} & set(words):
            print("one rank; several: torchrun --nproc_per_node N -m hbp_titan train ...", flush=True)
        _run(name, path, words)


def commands() -> dict[str, Path]:
    """The file of each subcommand."""
    modules = {name: PACKAGE.parent.joinpath(*module.split(".")).with_suffix(".py") for name, module in MODULES.items()}
    scripts = {path.stem: path for path in sorted(_folder("scripts").glob("[!_]*.py"))}
    return modules | {name: path for name, path in scripts.items() if name not in NOT_COMMANDS}


def presets() -> dict[str, Path]:
    """The file of each preset configuration."""
    return {path.stem: path for path in sorted(_folder("train_configs").glob("*.toml"))}


def help_text() -> str:
    """Every subcommand with the first line of its file's docstring."""
    summaries = {name: _docstring(path).splitlines()[0] for name, path in commands().items()}
    summaries["presets"] = "Where the preset configurations lie, and what hardware each is for."
    width, indent = min(shutil.get_terminal_size().columns, 120), max(map(len, summaries)) + 4
    lines = ["usage: hbp-titan COMMAND ...    hbp-titan COMMAND --help    hbp-titan --version", ""]
    for name, text in summaries.items():
        first = f"  {name:{indent - 2}}"
        lines += textwrap.wrap(text, width, initial_indent=first, subsequent_indent=" " * indent)
    return "\n".join(
        [
            *lines,
            "",
            "On several ranks (train, and each command whose --help shows torchrun):",
            f"  torchrun --nproc_per_node 8 -m hbp_titan train {CONFIG_KEY} llama3_1_8b_hbp",
            f"{CONFIG_KEY} takes a TOML file or the name of a preset.",
        ]
    )


def with_presets(argv: list[str]) -> list[str]:
    """`argv` with the path of the preset where the configuration is named by a preset's name.

    Raises ValueError for a name that is neither a file nor a preset.
    """
    words = [part for word in argv for part in (word.split("=", 1) if word.startswith(f"{CONFIG_KEY}=") else [word])]
    for place, value in enumerate(words[1:], start=1):
        # What has a suffix or a folder is a path, and the script says where it is missing.
        is_name = value == Path(value).stem and not Path(value).exists()
        if words[place - 1] == CONFIG_KEY and is_name:
            found = presets()
            if value not in found:
                raise ValueError(f"{CONFIG_KEY} {value} is neither a file nor a preset{did_you_mean(value, found)}")
            words[place] = str(found[value])
    return words


def _command(word: str) -> tuple[str, Path]:
    name, found = word.replace("-", "_"), commands()
    if name not in found:
        raise ValueError(
            f"unknown command {word!r}{did_you_mean(name, [*found, 'presets'])} (hbp-titan --help lists them)"
        )
    return name, found[name]


def _run(name: str, path: Path, argv: list[str]) -> None:
    """Run the file as the main module, in which worker processes too find what it defines."""
    module = MODULES.get(name, f"hbp_titan.scripts.{name}")
    main_module = ModuleType("__main__")
    main_module.__file__ = str(path)
    main_module.__package__ = module.rpartition(".")[0]
    # Processes that are started afresh import the main module by this; where it is None, by its file.
    main_module.__spec__ = _spec(module)
    sys.modules["__main__"] = main_module
    sys.argv = [f"hbp-titan {name}", *argv]
    exec(compile(path.read_bytes(), path, "exec"), main_module.__dict__)


def _spec(module: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(module)
    except ModuleNotFoundError:
        # A checkout that is not installed has no hbp_titan.scripts.
        return None


def _folder(name: str) -> Path:
    """A folder of the repository: in the package where that was installed, else beside it."""
    inside = PACKAGE / name
    return inside if inside.is_dir() else PACKAGE.parent / name


def _docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_bytes())) or path.stem


def _hardware(path: Path) -> str:
    """What the comment at a preset's top says of the machines."""
    lines = path.read_text(encoding="utf-8").splitlines()
    # A file that was added to a checkout may have none.
    return next((line.lstrip("# ") for line in lines if "Hardware:" in line), "")


if __name__ == "__main__":
    main()
