"""The command `hbp-titan` (or `python -m hbp_titan`): training, the scripts as subcommands, and the presets.

Owns the names of the commands; the options are each script's own. `torchrun -m hbp_titan NAME ...` starts a command on
several ranks. --job.config_file also takes the name of a preset (llama3_1_8b_hbp). Nothing here imports torch, so that
--help answers at once.
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
from pathlib import Path

from hbp_titan import __version__
from hbp_titan.errors import INSTALL_TRAIN, exit_on_user_error
from hbp_titan.utils import did_you_mean

PACKAGE = Path(__file__).resolve().parent
MODULES = {"train": "hbp_titan.train", "dry_run": "hbp_titan.tuning.dry_run"}
TRAIN_PACKAGES = ("torch", "torchdata", "tokenizers", "safetensors", "jinja2", "tqdm", "tensorboard")
"""The extra "train", without which the planner works."""
CONFIG_KEY = "--job.config_file"


def main(argv: list[str] | None = None) -> int | None:
    """Run the command; return its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(help_text())
    elif argv[0] == "--version":
        try:
            torch = importlib.metadata.version("torch")
        except importlib.metadata.PackageNotFoundError:
            torch = "not installed"
        print(f"hbp_titan {__version__}, torch {torch}, Python {platform.python_version()}")
    elif argv[0] == "presets":
        for path in presets().values():
            print(f"{path}\n    {_hardware(path)}")
    else:
        return exit_on_user_error(lambda: _run(argv[0], argv[1:]))
    return None


def _run(word: str, argv: list[str]) -> int | None:
    name = word.replace("-", "_")
    if name not in commands():
        known = [*commands(), "presets"]
        raise ValueError(f"unknown command {word!r}{did_you_mean(name, known)} (hbp-titan --help lists them)")
    if name == "train" and {"-h", "--help"} & set(argv):
        # As train.main, without torch.
        from hbp_titan.config import help_text as keys

        print(_summary(commands()[name]), keys(), sep="\n\n")
        return None
    argv = with_presets(argv)
    # The scripts are a subpackage where the package is installed, and a package next to it in a checkout that is not,
    # whose package may hide an editable installation of another checkout.
    spec = importlib.util.find_spec("hbp_titan.scripts")
    installed = spec is not None and Path(str(spec.origin)).resolve().parent == _folder("scripts").resolve()
    scripts = "hbp_titan.scripts" if installed else "scripts"
    # For the usage line of argparse.
    sys.argv = [f"hbp-titan {name}", *argv]
    try:
        module = importlib.import_module(MODULES.get(name, f"{scripts}.{name}"))
        if name == "train" and "RANK" not in os.environ:
            launcher = "python -m hbp_titan.launch --nproc_per_node N -m hbp_titan train ..."
            print(f"running on one rank; for several: {launcher}", flush=True)
        return module.main(argv)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in TRAIN_PACKAGES:
            raise
        raise ValueError(f"hbp-titan {name} needs {package}; {INSTALL_TRAIN}") from None


def commands() -> dict[str, Path]:
    """Return the file of each subcommand."""
    modules = {name: PACKAGE.parent.joinpath(*module.split(".")).with_suffix(".py") for name, module in MODULES.items()}
    scripts = {path.stem: path for path in sorted(_folder("scripts").glob("[!_]*.py"))}
    return modules | scripts


def presets() -> dict[str, Path]:
    """Return the file of each preset configuration."""
    return {path.stem: path for path in sorted(_folder("train_configs").glob("*.toml"))}


def help_text() -> str:
    """Return every subcommand with the first line of its file's docstring."""
    # Parsed, not imported: importing the scripts would import torch.
    summaries = {name: _summary(path) for name, path in commands().items()}
    summaries["presets"] = "List the preset configurations and the hardware that each is for."
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
            f"  python -m hbp_titan.launch --nproc_per_node 8 -m hbp_titan train {CONFIG_KEY} llama3_1_8b_hbp",
            f"{CONFIG_KEY} takes a TOML file or the name of a preset.",
        ]
    )


def _summary(script: Path) -> str:
    """Return the first line of a file's docstring."""
    return (ast.get_docstring(ast.parse(script.read_bytes())) or script.stem).splitlines()[0]


def with_presets(argv: list[str]) -> list[str]:
    """Return `argv` with the name of a preset after --job.config_file replaced by its path.

    Raises ValueError for a name that is neither a file nor a preset.
    """
    words = [part for word in argv for part in (word.split("=", 1) if word.startswith(f"{CONFIG_KEY}=") else [word])]
    for position, value in enumerate(words[1:], start=1):
        # A value with a suffix or a folder is a path; load_config reports it where it does not exist.
        is_name = value == Path(value).stem and not Path(value).exists()
        if words[position - 1] == CONFIG_KEY and is_name:
            found = presets()
            if value not in found:
                raise ValueError(f"{CONFIG_KEY} {value} is neither a file nor a preset{did_you_mean(value, found)}")
            words[position] = str(found[value])
    return words


def _folder(name: str) -> Path:
    """Return a folder of the repository: inside the package where that was installed, else next to it."""
    inside = PACKAGE / name
    return inside if inside.is_dir() else PACKAGE.parent / name


def _hardware(path: Path) -> str:
    """Return the "Hardware:" line of the comment at the top of a preset, "" if it has none."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return next((line.lstrip("# ") for line in lines if "Hardware:" in line), "")


if __name__ == "__main__":
    raise SystemExit(main())
