"""Check the machine or all nodes before a run: torch, GPUs, kernels, network, folder, limits; one table with advice.

    python scripts/doctor.py --folder outputs

Checks and options: hbp_titan/testing/doctor.py.
"""

from __future__ import annotations

from hbp_titan.errors import exit_on_user_error
from hbp_titan.testing.doctor import main

if __name__ == "__main__":
    raise SystemExit(exit_on_user_error(main))
