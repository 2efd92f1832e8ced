#!/usr/bin/env bash
# Downloads wheels for a machine without network, as scripts/gpu_check.py needs them:
#   scripts/fill_wheels.sh FOLDER [PYTHON [PLATFORM [PACKAGE ...]]]
#   scripts/fill_wheels.sh wheels 3.12 manylinux_2_28_x86_64 "torchdata>=0.11,<0.12"     (the defaults after FOLDER)
# Dependencies are not followed: the image brings torch and its own. On the other machine:
#   pip install --no-index --no-deps --target site wheels/*.whl && export PYTHONPATH=$PWD:$PWD/site
set -euo pipefail
cd "$(dirname "$0")/.."
FOLDER=${1:?usage: scripts/fill_wheels.sh FOLDER [PYTHON [PLATFORM [PACKAGE ...]]]}
PYTHON=${2:-3.12}
PLATFORM=${3:-manylinux_2_28_x86_64}
PACKAGES=("${@:4}")
[ "${#PACKAGES[@]}" -gt 0 ] || PACKAGES=("torchdata>=0.11,<0.12")
PY=python3
[ -x .venv/bin/python ] && PY=.venv/bin/python
exec "$PY" -m pip download --no-deps --only-binary=:all: --implementation cp --python-version "$PYTHON" \
    --platform "$PLATFORM" --platform manylinux2014_x86_64 --platform any --dest "$FOLDER" "${PACKAGES[@]}"
