#!/usr/bin/env bash
# Sets up once, then ruff, mypy and the tests. Further arguments go to pytest: scripts/run_tests.sh -m slow
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup_env.sh dev
"$PY" -m ruff check .
"$PY" -m ruff format --check .
"$PY" -m mypy
exec "$PY" -m pytest "$@"
