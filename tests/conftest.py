"""Shared settings of the tests: few threads, so that several ranks share two cores without fighting; fixed examples."""

from __future__ import annotations

import os

from tests.properties import register_profiles

os.environ.setdefault("OMP_NUM_THREADS", "1")
register_profiles()
