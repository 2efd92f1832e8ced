"""How every command of the project ends: the result, or one line on stderr that names the mistake.

Owns the guard that turns a user's mistake (ValueError, OSError; Mistakes are several) into one line each and exit
code 1. The traceback of such an error is shown when the environment has HBP_TRACEBACK=1. Any other exception keeps its
traceback: it is our bug.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import TypeVar

Result = TypeVar("Result")


class Mistakes(ValueError):
    """Several mistakes of the user's in one error, a line each."""

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__("\n".join(lines))
        self.lines = list(lines)

    def __reduce__(self) -> tuple[type[Mistakes], tuple[list[str]]]:
        return Mistakes, (self.lines,)


def one_line(error: BaseException) -> str:
    """The message of `error` on one line, with the file's name where the error is an OSError."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


def error_lines(error: BaseException) -> str:
    """What a command says of a mistake: a line each."""
    lines = error.lines if isinstance(error, Mistakes) else [one_line(error)]
    return "\n".join(f"error: {' '.join(line.split())}" for line in lines)


def guarded(function: Callable[[], Result], shows: Callable[[], bool] | None = None) -> Result:
    """Run `function`; a user's mistake ends the process with one line on stderr and exit code 1.

    shows: whether this process, of several that may run into the same mistake, prints it; without it Mistakes, which
    every rank raises, are printed by rank 0, other errors by any.
    """
    try:
        return function()
    except (ValueError, OSError) as error:
        every_rank = isinstance(error, Mistakes)
        if not (shows() if shows else not every_rank or os.environ.get("RANK", "0") == "0"):
            raise SystemExit(1) from None
        if os.environ.get("HBP_TRACEBACK") == "1":
            traceback.print_exc()
        print(error_lines(error), file=sys.stderr, flush=True)
        raise SystemExit(1) from None
