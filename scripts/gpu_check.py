"""Check everything that needs a GPU, in one command of at most 8 minutes; writes a Markdown report and JSON.

    python scripts/gpu_check.py --out gpu_check
    python scripts/gpu_check.py --device cpu --tiny --out gpu_check

The steps and the options are hbp_titan/testing/gpu_check/runner.py's.
"""

from __future__ import annotations

from hbp_titan.errors import exit_on_user_error
from hbp_titan.testing.gpu_check.runner import main

if __name__ == "__main__":
    raise SystemExit(exit_on_user_error(main))
