#!/bin/sh
# Prepare an environment for the Makefile.
#
#   scripts/bootstrap.sh env DIRECTORY     create a virtual environment: the first Python >= 3.10 on the PATH, one that
#                                          can import PyTorch >= 2.10 before others; that PyTorch stays visible inside
#   scripts/bootstrap.sh install PYTHON    install PyTorch if there is none (TORCH, default torch==2.13.0), then this
#                                          package in editable mode with everything its tests and demo need
set -eu
cd "$(dirname "$0")/.."
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; }
has_torch() { "$1" -c 'import torch, sys; v = torch.__version__.split("."); sys.exit((int(v[0]), int(v[1])) < (2, 10))' >/dev/null 2>&1; }

find_python() {
    found=""
    for name in python3 python python3.13 python3.12 python3.11 python3.10 python3.14; do
        command -v "$name" >/dev/null 2>&1 && new_enough "$name" || continue
        if has_torch "$name"; then echo "$name"; return; fi
        [ -n "$found" ] || found=$name
    done
    if [ -z "$found" ]; then
        echo "difffit_fast needs Python 3.10 or newer; found $(python3 --version 2>&1 || echo none)." >&2
        echo "Install one, or name one: make PYTHON=/path/to/python ..." >&2
        exit 1
    fi
    echo "$found"
}

make_env() {
    python=$(find_python)
    if ! "$python" -m venv --help >/dev/null 2>&1; then
        echo "$python has no venv module (on Debian: apt-get install python3-venv)" >&2
        exit 1
    fi
    rm -rf "$1"
    if has_torch "$python"; then
        echo "Creating $1 with $("$python" --version), keeping PyTorch $("$python" -c 'import torch; print(torch.__version__)')"
        "$python" -m venv --system-site-packages "$1"
        # An active virtual environment is not the system that --system-site-packages means: name its folders too.
        has_torch "$1/bin/python" || "$python" - "$1" <<'PY'
import subprocess, sys, sysconfig
from pathlib import Path

python = str(Path(sys.argv[1]) / "bin" / "python")
inside = subprocess.check_output([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True).strip()
outside = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
(Path(inside) / "outer_environment.pth").write_text("\n".join(outside) + "\n")
PY
    else
        echo "Creating $1 with $("$python" --version)"
        "$python" -m venv "$1"
    fi
}

install() {
    new_enough "$1" || { echo "difffit_fast needs Python 3.10 or newer; $1 is $("$1" --version 2>&1 || true)" >&2; exit 1; }
    pip() { "$python" -m pip "$@"; }
    python=$1
    pip install --quiet "setuptools>=77" ninja
    if ! has_torch "$python"; then
        echo "Installing ${TORCH:-torch==2.13.0}"
        # shellcheck disable=SC2086 — TORCH may carry options, such as an --index-url
        pip install ${TORCH:-torch==2.13.0}
    fi
    # A CUDA build of PyTorch brings the Triton it was made for; beside a CPU build it is wanted for the interpreter.
    if [ "$(uname -s)" = Linux ] && ! "$python" -c 'import triton' >/dev/null 2>&1; then
        pip install --quiet "triton==3.6.0"
    fi
    echo "Building and installing difffit_fast"
    pip install --quiet --no-build-isolation -e '.[dev]'
    "$python" -c 'import difffit_fast as d; i = d.build_info(); print(i["problem"] or "difffit_fast %(version)s, PyTorch %(torch)s, C++ kernels (%(cpu_capability)s), CUDA C++: %(cuda_built)s" % i)'
}

case "${1:-}" in
env) make_env "$2" ;;
install) install "$2" ;;
*) sed -n '2,8p' "$0" >&2; exit 2 ;;
esac
