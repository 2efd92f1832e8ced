"""Python programs run as from a shell, without the seconds that a new interpreter takes to import torch.

Each is a process of its own, forked from a server that has the imports, with its own directory, environment, arguments
and output files. Tests of torchrun itself, or of an interpreter's start, use subprocess.
"""

from __future__ import annotations

import gc
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist

from hbp_titan.testing.local_ranks import fork_server

ROOT = Path(__file__).resolve().parents[1]


def run_python(
    *words: object, cwd: Path = ROOT, env: Mapping[str, str] | None = None, ranks: int = 0, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run `python *words` in `cwd`; words: a script, or -m and a module, and its arguments.

    ranks: number of processes with torchrun's environment, their output in one text; the exit code is the first that is
    not 0. env: additional variables. Raises subprocess.TimeoutExpired.
    """
    argv = [str(word) for word in words]
    environments = [{**os.environ, "OMP_NUM_THREADS": "1", **(env or {})} for _ in range(max(ranks, 1))]
    if ranks:
        # Hosted here as torchrun's agent does: a store in rank 0 would be gone when rank 0 ends first.
        store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        agent = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
        for rank, environment in enumerate(environments):
            environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), **agent}
            environment |= dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank))
            environment |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(ranks))
    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder, "stdout"), Path(folder, "stderr")
        arguments = [(argv, str(cwd), environment, output, errors) for environment in environments]
        processes = [fork_server().Process(target=_program, args=own) for own in arguments]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout)
        late = [process for process in processes if process.is_alive()]
        for process in late:
            process.kill()
            process.join()
        if late:
            raise subprocess.TimeoutExpired(argv, timeout, output.read_text(), errors.read_text())
        code = next((process.exitcode for process in processes if process.exitcode), 0)
        return subprocess.CompletedProcess(argv, code, output.read_text(), errors.read_text())


def _program(argv: list[str], cwd: str, environment: dict[str, str], output: Path, errors: Path) -> None:
    gc.freeze()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for number, path in ((1, output), (2, errors)):
        with path.open("a") as file:
            os.dup2(file.fileno(), number)
    sys.stdout = os.fdopen(os.dup(1), "w", encoding="utf-8")
    sys.stderr = os.fdopen(os.dup(2), "w", encoding="utf-8", buffering=1)
    try:
        if argv[0] == "-m":
            sys.path.insert(0, cwd)
            sys.argv = argv[1:]
            # As in a new interpreter; runpy warns about a module that the server has imported.
            sys.modules.pop(argv[1], None)
            runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, str(Path(argv[0]).absolute().parent))
            sys.argv = argv
            runpy.run_path(argv[0], run_name="__main__")
    except Exception:
        traceback.print_exc()
        sys.exit(1)
