#!/usr/bin/env bash
# Sets up once, then ruff, mypy and the tests in three processes (ranks that wait leave a core idle).
# Further arguments go to pytest: scripts/run_tests.sh -m slow; scripts/run_tests.sh -n 0 -m gpu
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup_env.sh dev
"$PY" -m ruff check .
"$PY" -m ruff format --check .
"$PY" -m mypy
# A file's tests share fixtures, and so a process.
exec "$PY" -m pytest -n 3 --dist loadfile "$@"
