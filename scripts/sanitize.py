"""Run the tests of the C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer.

Builds the CPU extension with -fsanitize=address,undefined into build/sanitize (a copy of the package, so the installed
one stays as it is) and runs the operations' tests on it with libasan preloaded. Memory errors and undefined behaviour
end the run; leaks are not looked for, since the Python interpreter itself leaks on purpose.

    python scripts/sanitize.py [arguments for pytest]
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "sanitize"
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1 -O1"
TESTS = (
    "ops",
    "kernels",
    "cpp_kernels",
    "cpp_attention",
    "cpp_block",
    "residual",
    "cpp_mlp",
    "frozen_mlp",
    "colsum",
    "attention",
)
# Compiled graphs run the same kernels through slow machinery that is not ours; the other rooms have no C++.
DESELECT = "not compile and not opcheck and not reference and not triton"


def library(name: str) -> str:
    """The path of one of the compiler's run-time libraries."""
    compiler = os.environ.get("CXX") or "c++"
    return subprocess.check_output([compiler, f"-print-file-name={name}"], text=True).strip()


def main() -> int:
    environment = {
        **os.environ,
        "DIFFFIT_FAST_CXXFLAGS": FLAGS,
        "DIFFFIT_FAST_CUDA": "0",
        "DIFFFIT_FAST_REQUIRE_EXT": "1",
    }
    build = [sys.executable, "setup.py", "-q", "build", "--build-base", BUILD / "temp", "--build-lib", BUILD / "lib"]
    subprocess.run(build, cwd=ROOT, env=environment, check=True)

    tests = [ROOT / "tests" / f"test_{name}.py" for name in TESTS]
    environment = {
        **os.environ,
        "PYTHONPATH": str(BUILD / "lib"),
        "LD_PRELOAD": f"{library('libasan.so')} {library('libstdc++.so')}",
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "DIFFFIT_FAST_KERNELS": "auto",
    }
    where = (
        "import difffit_fast._ext as e; print('sanitized:', e._library()[0].__file__, e.build_info()['cpu_capability'])"
    )
    subprocess.run([sys.executable, "-c", where], cwd=BUILD / "lib", env=environment, check=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", ROOT / "pyproject.toml"]
    command += [f"--rootdir={ROOT}", "-k", DESELECT, *sys.argv[1:], *(test for test in tests if test.exists())]
    return subprocess.run(command, cwd=BUILD / "lib", env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
