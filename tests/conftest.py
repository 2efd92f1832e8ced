"""Shared settings of the tests: few threads, so that several ranks share two cores without fighting; fixed examples."""

from __future__ import annotations

import gc
import os
from collections import Counter
from pathlib import Path

import pytest

# Before torch is imported, which reads it then.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Otherwise each of many processes would compile the package and the tests again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# Programs that tests start import this checkout, not one that is installed.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(Path(__file__).resolve().parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
)

from tests.properties import register_profiles

register_profiles()


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs from a CPU build of torch: the tests use the CPU on purpose."""
    if not hasattr(config, "workerinput") and getattr(config.option, "numprocesses", None):
        # The process that only distributes tests needs no torch, and its workers wait for it.
        return
    import torch

    from hbp_titan.testing import local_ranks

    # What ranks of tests import, in addition to what every rank does.
    local_ranks.PRELOADED += ["pytest", "hypothesis", "hbp_titan.data.build_set", "hbp_titan.components.export"]
    if not torch.cuda.is_available():
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")


def pytest_collection_finish() -> None:
    """Exempt what was imported, a million objects, from every later garbage collection."""
    gc.collect()
    gc.freeze()


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Name bytes by their argument: gzip writes the second into them, but every process must collect the same tests."""
    return argname if isinstance(val, bytes) else None


RUN = "; run: "
"""Between what a skipped test needs and the command that runs it: every reason has both (tests/test_skips.py)."""
SETS = {"slow": "scripts/run_tests.sh -m slow", "gpu": "scripts/run_tests.sh -n 0 -m gpu    (on a machine with a GPU)"}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print what did not run, why, and the command that runs it: skipped tests by reason, and sets of markers."""
    counts = Counter(str(report.longrepr[-1]) for report in terminalreporter.stats.get("skipped", []))
    rows = [
        (str(count), *reason.removeprefix("Skipped: ").partition(RUN)[::2]) for reason, count in counts.most_common()
    ]
    rows += [("all", name, command) for name, command in SETS.items() if f"not {name}" in config.option.markexpr]
    if rows:
        terminalreporter.section("not run here")
        width = max(len(why) for _, why, _ in rows)
        for count, why, command in [("tests", "why", "to run them"), *rows]:
            terminalreporter.write_line(f"{count:>5}  {why:<{width}}  {command}")
