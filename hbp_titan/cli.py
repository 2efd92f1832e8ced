"""How every command of the project ends: the result, or one line on stderr that names the mistake.

Owns the guard that turns a user's mistake (ValueError, OSError) into one line and exit code 1. The traceback
of such an error is shown when the environment has HBP_TRACEBACK=1. Any other exception keeps its traceback:
it is our bug.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


def one_line(error: BaseException) -> str:
    """The message of `error` on one line, with the file's name where the error is an OSError."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


def guarded(function: Callable[[], Result]) -> Result:
    """Run `function`; a user's mistake ends the process with one line on stderr and exit code 1."""
    try:
        return function()
    except (ValueError, OSError) as error:
        if os.environ.get("HBP_TRACEBACK") == "1":
            traceback.print_exc()
        print(f"error: {one_line(error)}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None
