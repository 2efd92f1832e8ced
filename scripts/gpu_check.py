"""Run all checks that need a GPU, in at most 8 minutes; write a Markdown report and JSON.

    python scripts/gpu_check.py --out gpu_check
    python scripts/gpu_check.py --device cpu --tiny --out gpu_check

Steps and options: hbp_titan/testing/gpu_check/runner.py.
"""

from __future__ import annotations

from hbp_titan.errors import exit_on_user_error
from hbp_titan.testing.gpu_check.runner import main

if __name__ == "__main__":
    raise SystemExit(exit_on_user_error(main))
