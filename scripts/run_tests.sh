#!/usr/bin/env bash
# Sets up once, then runs ruff, mypy and the tests in three processes (waiting ranks leave cores idle).
# Further arguments go to pytest: scripts/run_tests.sh -m slow; scripts/run_tests.sh -n 0 -m gpu. The last lines list what
# did not run, why, and the command that runs it.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup_env.sh dev
"$PY" -m ruff check .
"$PY" -m ruff format --check .
"$PY" -m mypy
# Tests of one file share fixtures, so they run in one process.
exec "$PY" -m pytest -n 3 --dist loadfile "$@"
