"""Shared settings of the tests: few threads, so that several ranks share two cores without fighting."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
