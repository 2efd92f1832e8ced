# Sourced by run_train.sh and run_tests.sh: creates .venv once, installs this checkout (editable), sets PY to its python.
# Usage: source scripts/setup_env.sh train|demo|dev     env PYTHON chooses the interpreter (python3 >= 3.10)
# A python that already has torch 2.11 to 2.13 is used as it is; otherwise torch is installed by an exact pin.

hbp_setup() {
    local kind="$1" base="${PYTHON:-python3}" target=".[$1]" stamp torch_pin="torch==2.13.0"
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || {
        echo "error: $base is missing or older than Python 3.10: set PYTHON to a newer one" >&2
        return 1
    }
    PY="$PWD/.venv/bin/python"
    stamp=".venv/.hbp_titan-$(cksum < pyproject.toml | cut -d' ' -f1)-"
    # The packages for the tests include those for a run.
    if [ -e "$stamp$kind" ] || [ -e "${stamp}dev" ]; then return 0; fi

    local fits='import sys, torch; v = tuple(map(int, torch.__version__.split(".")[:2])); sys.exit(not (2, 11) <= v < (2, 14))'
    if [ -x "$PY" ]; then
        "$PY" -c "$fits" 2>/dev/null && torch_pin=""
    else
        "$base" -m venv .venv || return 1
        if "$base" -c "$fits" 2>/dev/null; then
            torch_pin=""
            # By a .pth file, because --system-site-packages does not see those of a base that is itself a venv.
            "$base" -c 'import site; print("\n".join(site.getsitepackages()))' \
                > "$("$PY" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base_python.pth"
        fi
    fi
    echo "setup: installing into .venv (once) ..."
    # One call with the pin: a second call, or a range, would let pip choose a build with gigabytes of CUDA.
    if ! "$PY" -m pip install --quiet --disable-pip-version-check $torch_pin --editable "$target"; then
        # A machine without a package index may have every package; then only this checkout must be made importable.
        "$PY" -m hbp_titan doctor --packages "$kind" || return 1
        echo "$PWD" > "$("$PY" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/hbp_titan.pth"
    fi
    touch "$stamp$kind"
}

hbp_setup "$1" || exit 1
