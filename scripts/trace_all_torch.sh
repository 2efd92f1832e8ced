#!/usr/bin/env bash
# Runs tests/gpu_trace (traces of the GPU code path, no GPU needed) with every supported version of torch. Creates one
# virtual environment per version in TRACE_VENVS, about 5 GB each, because torch's wheels include the CUDA libraries.
#   scripts/trace_all_torch.sh                    the quick run
#   scripts/trace_all_torch.sh -m slow            every preset with every kernel
#   TORCH_VERSIONS=2.12.1 scripts/trace_all_torch.sh
# HBP_TRACE_DEVICE=cuda also traces on CUDA tensors: forward only, with a GPU backward as well.
set -euo pipefail
cd "$(dirname "$0")/.."
VENVS=${TRACE_VENVS:-${XDG_CACHE_HOME:-$HOME/.cache}/hbp_titan/trace}
failed=()
for version in ${TORCH_VERSIONS:-2.11.0 2.12.1 2.13.0}; do
    venv=$VENVS/torch-$version
    if [[ ! -e $venv/ready ]]; then
        echo "torch $version: installing into $venv"
        "${PYTHON:-python3}" -m venv "$venv"
        "$venv/bin/pip" install --quiet "torch==$version" -e ".[train]" "pytest>=8"
        touch "$venv/ready"
    fi
    echo "torch $version:"
    # Each environment tests this checkout, not the installed package.
    PYTHONPATH=$PWD "$venv/bin/python" -m pytest tests/gpu_trace -q -p no:cacheprovider "$@" || failed+=("$version")
done
if (( ${#failed[@]} )); then
    echo "failed with torch ${failed[*]}"
    exit 1
fi
