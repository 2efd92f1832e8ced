"""General benchmarks by EleutherAI's lm_eval (an optional extra): a TOML list of runs, each one lm_eval command.

Owns the keys of that list and the commands. lm_eval downloads its data sets itself. The list that comes with the
package, paper_tasks.toml, has the tasks of the paper's tables.
"""

from __future__ import annotations

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

from hbp_titan.utils import did_you_mean

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class HarnessRun:
    """One [[runs]] block: one lm_eval command.

    Args:
        name: name of the folder with its results.
        tasks: names of lm_eval tasks.
        model, model_args: how lm_eval runs the HF folder ("hf", "vllm", ...).
        num_fewshot: examples before a question [that of the task].
        chat: whether prompts go through the chat template.
        metadata: for generated tasks, such as the lengths of RULER.
        arguments: further arguments, passed on unchanged.
        environment: variables of the command.
        runs_code: whether the tasks run code that the model writes; then --run_code is needed.
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
        """Return the command as words; results go to a folder of the run's name in `out`."""
        # Not the program lm_eval, which could belong to another environment.
        words = [sys.executable, "-m", "lm_eval", "--model", self.model]
        words += ["--model_args", ",".join(filter(None, (f"pretrained={folder}", self.model_args)))]
        words += ["--tasks", ",".join(self.tasks), "--batch_size", self.batch_size]
        if self.num_fewshot is not None:
            words += ["--num_fewshot", str(self.num_fewshot)]
        if self.chat:
            # Examples as turns of a conversation, because the model was tuned on those.
            words += ["--apply_chat_template", "--fewshot_as_multiturn"]
        if self.metadata:
            words += ["--metadata", json.dumps(self.metadata)]
        return [*words, "--output_path", str(out / self.name), *self.arguments]

    def shell_command(self, folder: Path, out: Path) -> str:
        """Return the command as a line for a shell."""
        return shlex.join([*(f"{k}={v}" for k, v in self.environment.items()), *self.command(folder, out)])


# Annotation of a field -> type of its TOML value, and how a message describes it.
_KINDS: dict[str, tuple[type, str]] = {
    "str": (str, "a string"),
    "list[str]": (list, "a list of strings"),
    "int | None": (int, "a whole number"),
    "bool": (bool, "true or false"),
    "dict[str, Any]": (dict, "a table"),
    "dict[str, str]": (dict, "a table"),
}
_TYPES = {item.name: _KINDS[str(item.type)] for item in fields(HarnessRun)}


def read_runs(file: Path, names: Sequence[str] = ()) -> list[HarnessRun]:
    """Return the runs of a TOML file, all or those in `names`. Raises ValueError, naming file, run and key.

    file: a path, or the name of a list that comes with the package (paper_tasks).
    """
    packaged = Path(__file__).with_name(f"{file.name}.toml")
    if not file.exists() and file.name == str(file) and packaged.exists():
        file = packaged
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
            raise ValueError(f"{file}: {known.count(name)} runs have the name {name!r}; give each its own")
    for name in names:
        if name not in known:
            raise ValueError(f"{file}: no run {name!r}; it must be one of {', '.join(known)}")
    return [run for run in runs if not names or run.name in names]


def _run(block: dict[str, Any], where: str) -> HarnessRun:
    for key, value in block.items():
        if key not in _TYPES:
            raise ValueError(f"{where}: unknown key {key}{did_you_mean(key, _TYPES)}")
        kind, description = _TYPES[key]
        not_strings = kind is list and isinstance(value, list) and not all(isinstance(entry, str) for entry in value)
        # bool is a subclass of int.
        if not isinstance(value, kind) or not_strings or (kind is int and isinstance(value, bool)):
            raise ValueError(f"{where}: {key} = {value!r} must be {description}")
    for key in ("name", "tasks"):
        if not block.get(key):
            raise ValueError(f"{where}: lacks {key}")
    return HarnessRun(**block)


def run_harness(
    runs: Sequence[HarnessRun], folder: Path, out: Path, run_code: bool, report: Callable[[str], None]
) -> None:
    """Print every command, then run them in order, all of them even if some fail.

    Runs that execute code of the model are skipped unless `run_code`; a report says so.
    Raises ValueError if lm_eval is not installed, a command failed, the folder's path has a comma, or all runs would be
    skipped.
    """
    for run in runs:
        report(run.shell_command(folder, out))
    # lm_eval splits --model_args at commas and cannot quote one.
    if "," in str(folder):
        raise ValueError(f"{folder}: lm_eval does not accept a path with a comma; rename the folder")
    unsafe = [run.name for run in runs if run.runs_code and not run_code]
    if unsafe:
        reason = f"{', '.join(unsafe)} runs code that the model writes; add --run_code, on an isolated machine"
        if len(unsafe) == len(runs):
            raise ValueError(reason)
        report(f"skipped: {reason}")
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("lm_eval is not installed; pip install '.[eval]', or run the commands above elsewhere")
    failed = []
    for run in runs:
        if run.name not in unsafe:
            code = subprocess.call(run.command(folder, out), env={**os.environ, **run.environment})
            failed += [f"{run.name} (exit code {code})"] if code else []
    if failed:
        raise ValueError(f"lm_eval failed in {len(failed)} of {len(runs)} runs: {', '.join(failed)}; see above")
