"""Compile every CUDA source of csrc/cuda for several architectures, without a GPU, and report what the compiler made.

Warnings are errors. The table gives registers, shared memory and spills of every kernel; a spill fails the run. cuBLASLt's
header must be found, so that the constants in csrc/cublaslt_host.h are compared with it: in the PyPI package
``nvidia-cublas`` (or ``nvidia-cublas-cu12``) or in the CUDA toolkit.

    python scripts/cuda_compile.py [--arch 80 90a 100] [--require]

Without nvcc or the header it says so and succeeds; with ``--require`` it fails.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "csrc"))
import build_extension  # noqa: E402 (csrc is not a package)

ARCHITECTURES = ("80", "90a", "100")


class Kernel(NamedTuple):
    """What ptxas says about one kernel for one architecture; sizes in bytes."""

    source: str
    arch: str
    name: str
    registers: int
    shared: int
    stack: int
    spill_stores: int
    spill_loads: int


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME (or CUDA_PATH), of PATH, or of the usual folder."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    for candidate in (*(f"{home}/bin/nvcc" for home in homes if home), "nvcc", "/usr/local/cuda/bin/nvcc"):
        found = shutil.which(candidate)
        if found:
            return found
    return None


def find_cublas_headers(nvcc: str) -> Path | None:
    """The folder of cublasLt.h: the toolkit's, else that of the PyPI package nvidia-cublas."""
    folders = [Path(nvcc).resolve().parent.parent / "include"]
    folders += [Path(home) / "include" for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or []) if spec else []:
        folders += [Path(root) / "cu13" / "include", Path(root) / "cublas" / "include"]
    return next((folder for folder in folders if (folder / "cublasLt.h").exists()), None)


def sources() -> list[Path]:
    return sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


def command(nvcc: str, source: Path, arch: str, headers: Path, output: Path) -> list[str]:
    """The compiler call: the flags of the real build, warnings as errors, ptxas talking."""
    import torch

    torch_headers = Path(torch.__file__).parent / "include"
    return [
        nvcc,
        f"-gencode=arch=compute_{arch},code=sm_{arch}",
        *build_extension.NVCC_FLAGS,
        *build_extension.DEFINES,
        "-DUSE_CUDA",
        "-DDIFFFIT_FAST_NEED_CUBLASLT_HEADER",
        "-Werror",
        "all-warnings",
        "-Xptxas",
        "-v",
        "-Xcompiler",
        "-fPIC,-Wall",
        f"-I{ROOT / 'csrc'}",
        "-isystem",
        str(torch_headers),
        "-isystem",
        str(headers),
        "-c",
        str(source),
        "-o",
        str(output),
    ]


def parse_ptxas(text: str, source: str, arch: str) -> list[Kernel]:
    """The kernels in ``nvcc -Xptxas -v``'s output."""
    kernels = []
    for block in text.split("Compiling entry function '")[1:]:
        numbers = {}
        for key, pattern in {
            "registers": r"Used (\d+) registers",
            "shared": r"(\d+) bytes smem",
            "stack": r"(\d+) bytes stack frame",
            "spill_stores": r"(\d+) bytes spill stores",
            "spill_loads": r"(\d+) bytes spill loads",
        }.items():
            found = re.search(pattern, block)
            numbers[key] = int(found[1]) if found else 0
        kernels.append(Kernel(source, arch, block.partition("'")[0], **numbers))
    return kernels


def demangle(names: list[str]) -> list[str]:
    """Readable kernel names where c++filt is there: template arguments kept, namespaces and parameters dropped."""
    tool = shutil.which("c++filt") or shutil.which("cu++filt")
    if not tool or not names:
        return names
    text = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    out = []
    for line in text.splitlines():
        line = re.sub(r"\(anonymous namespace\)::|[\w]+::", "", line.partition("(")[0] if "(anon" not in line else line)
        out.append(re.sub(r"^void ", "", line.partition("(")[0]).strip())
    return out


def compile_all(nvcc: str, headers: Path, architectures: list[str], jobs: int) -> tuple[list[Kernel], list[str]]:
    """Compile every source for every architecture; returns the kernels and the failures' messages."""
    kernels: list[Kernel] = []
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:

        def build(item: tuple[Path, str]) -> tuple[Path, str, float, subprocess.CompletedProcess[str]]:
            source, arch = item
            start = time.perf_counter()
            output = Path(folder) / f"{source.stem}.{arch}.o"
            done = subprocess.run(
                command(nvcc, source, arch, headers, output), capture_output=True, text=True, check=False
            )
            return source, arch, time.perf_counter() - start, done

        for source, arch, seconds, done in pool.map(build, [(s, a) for s in sources() for a in architectures]):
            text = done.stdout + done.stderr
            print(f"{source.name:20} sm_{arch:4} {'ok' if done.returncode == 0 else 'FAILED':6} {seconds:5.1f} s")
            if done.returncode:
                failures.append(f"{source.name} for sm_{arch}:\n{text}")
            kernels += parse_ptxas(text, source.name, arch)
    return kernels, failures


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=list(ARCHITECTURES), help="architectures, like 80 90a 100")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="compilers at once")
    parser.add_argument("--require", action="store_true", help="fail where nvcc or cuBLASLt's header is missing")
    options = parser.parse_args(arguments)

    nvcc = find_nvcc()
    headers = find_cublas_headers(nvcc) if nvcc else None
    if nvcc is None or headers is None:
        missing = (
            "nvcc was not found (set CUDA_HOME or PATH)"
            if nvcc is None
            else ("cublasLt.h was not found (pip install nvidia-cublas)")
        )
        print(f"cuda-compile: skipped: {missing}; nothing was checked")
        return 1 if options.require else 0

    print(f"nvcc {build_extension.nvcc_version(nvcc)} ({nvcc}), cublasLt.h in {headers}")
    kernels, failures = compile_all(nvcc, headers, options.arch, options.jobs)
    if kernels:
        print(f"\n{'kernel':44} {'arch':8} {'registers':>9} {'shared':>7} {'stack':>6} {'spills':>7}")
        for kernel, name in zip(kernels, demangle([k.name for k in kernels]), strict=True):
            spills = kernel.spill_stores + kernel.spill_loads
            print(f"{name:44} sm_{kernel.arch:5} {kernel.registers:9} {kernel.shared:7} {kernel.stack:6} {spills:7}")
    for failure in failures:
        print(f"\n{failure}")
    spilled = [k for k in kernels if k.spill_stores or k.spill_loads]
    if spilled:
        print(f"\n{len(spilled)} kernels spill registers")
    return 1 if failures or spilled else 0


if __name__ == "__main__":
    sys.exit(main())
