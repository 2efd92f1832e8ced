#!/usr/bin/env bash
# Sets up once, then ruff, mypy and the tests in two processes (most leave a core idle: one rank, or ranks that wait).
# Further arguments go to pytest: scripts/run_tests.sh -m slow; scripts/run_tests.sh -n 0 -m gpu
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup_env.sh dev
"$PY" -m ruff check .
"$PY" -m ruff format --check .
"$PY" -m mypy
# A file's tests share fixtures, and so a process.
exec "$PY" -m pytest -n 2 --dist loadfile "$@"
