"""General benchmarks by EleutherAI's lm_eval, which an optional extra brings: from a TOML list of runs to its commands.

Owns that list's keys and the command of each run. lm_eval fetches its data sets itself. The shipped list,
paper_tasks.toml, names the tasks of the paper's tables.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class HarnessRun:
    """One [[runs]] block: one lm_eval command.

    name: names its results. tasks: lm_eval's. model, model_args: how lm_eval runs the folder ("hf", "vllm", ...).
    num_fewshot: examples before a question; the tasks' own number unless given. chat: through the chat template.
    metadata: for tasks that are made, as RULER's lengths. arguments: further ones, as they are. environment: of the
    command. runs_code: the tasks run code that the model wrote; asked for by --run_code.
    """

    name: str
    tasks: list[str]
    model: str = "hf"
    model_args: str = "dtype=bfloat16"
    batch_size: str = "auto"
    num_fewshot: int | None = None
    chat: bool = True
    metadata: dict[str, Any] = field(default_factory=dict)
    arguments: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    runs_code: bool = False

    def command(self, folder: Path, out: Path) -> list[str]:
        """The command's words; results go to a folder of the run's name in `out`."""
        words = [sys.executable, "-m", "lm_eval", "--model", self.model]
        words += ["--model_args", ",".join(filter(None, (f"pretrained={folder}", self.model_args)))]
        words += ["--tasks", ",".join(self.tasks), "--batch_size", self.batch_size]
        if self.num_fewshot is not None:
            words += ["--num_fewshot", str(self.num_fewshot)]
        if self.chat:
            words += ["--apply_chat_template", "--fewshot_as_multiturn"]
        if self.metadata:
            words += ["--metadata", json.dumps(self.metadata)]
        return [*words, "--output_path", str(out / self.name), *self.arguments]

    def shown(self, folder: Path, out: Path) -> str:
        """The command as a shell takes it."""
        return shlex.join([*(f"{k}={v}" for k, v in self.environment.items()), *self.command(folder, out)])


_TYPES: dict[str, tuple[type, str]] = {
    "name": (str, "a string"),
    "tasks": (list, "a list of strings"),
    "model": (str, "a string"),
    "model_args": (str, "a string"),
    "batch_size": (str, "a string"),
    "num_fewshot": (int, "a whole number"),
    "chat": (bool, "true or false"),
    "metadata": (dict, "a table"),
    "arguments": (list, "a list of strings"),
    "environment": (dict, "a table"),
    "runs_code": (bool, "true or false"),
}
assert set(_TYPES) == {item.name for item in fields(HarnessRun)}


def read_runs(file: Path, names: Sequence[str] = ()) -> list[HarnessRun]:
    """The runs of a TOML file, all or those called `names`. Raises ValueError for a fault, naming file, run and key."""
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not valid TOML: {error}") from None
    blocks = values.get("runs")
    if set(values) != {"runs"} or not isinstance(blocks, list) or not all(isinstance(b, dict) for b in blocks):
        raise ValueError(f"{file}: must hold [[runs]] blocks and nothing else")
    runs = [_run(block, f"{file}: runs[{number}]") for number, block in enumerate(blocks, start=1)]
    known = [run.name for run in runs]
    for name in known:
        if known.count(name) > 1:
            raise ValueError(f"{file}: {known.count(name)} runs are called {name!r}: their results would be one")
    for name in names:
        if name not in known:
            raise ValueError(f"{file}: has no run {name!r}; it has {', '.join(known)}")
    return [run for run in runs if not names or run.name in names]


def _run(block: dict[str, Any], where: str) -> HarnessRun:
    for key, value in block.items():
        if key not in _TYPES:
            close = difflib.get_close_matches(key, _TYPES, n=1, cutoff=0.5)
            raise ValueError(f"{where}: unknown key {key}{f'; did you mean {close[0]}?' if close else ''}")
        kind, called = _TYPES[key]
        strings = kind is list and not all(isinstance(entry, str) for entry in value if isinstance(value, list))
        if not isinstance(value, kind) or strings or (kind is int and isinstance(value, bool)):
            raise ValueError(f"{where}: {key} = {value!r} must be {called}")
    for key in ("name", "tasks"):
        if not block.get(key):
            raise ValueError(f"{where}: lacks {key}")
    return HarnessRun(**block)


def run_harness(
    runs: Sequence[HarnessRun], folder: Path, out: Path, run_code: bool, report: Callable[[str], None]
) -> None:
    """Print every command, then run each in turn; the first that fails ends it.

    Raises ValueError where lm_eval is not installed, a command fails, the folder's path cannot be handed over, or a
    run wants to run the model's code and `run_code` is False.
    """
    for run in runs:
        report(run.shown(folder, out))
    if "," in str(folder):
        raise ValueError(f"{folder}: lm_eval cannot take a path with a comma: rename the folder")
    code = [run.name for run in runs if run.runs_code and not run_code]
    if code:
        raise ValueError(f"{', '.join(code)} runs code that the model writes: add --run_code, or choose other --runs")
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("lm_eval is not installed: pip install '.[eval]' (or run the commands above elsewhere)")
    for run in runs:
        ended = subprocess.run(run.command(folder, out), env={**os.environ, **run.environment}, check=False)
        if ended.returncode:
            raise ValueError(f"run {run.name}: lm_eval ended with exit code {ended.returncode}")
