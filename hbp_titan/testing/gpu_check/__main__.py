"""`python -m hbp_titan.testing.gpu_check`: the whole check, or (as it starts itself) one step."""

from __future__ import annotations

from hbp_titan.errors import exit_on_user_error
from hbp_titan.testing.gpu_check.runner import main

if __name__ == "__main__":
    raise SystemExit(exit_on_user_error(main))
