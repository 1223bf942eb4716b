"""How the compiled libraries are built: which sources, which flags, and what happens when they cannot be.

``difffit_fast._C`` is ``csrc/*.cpp``. Where PyTorch has CUDA and nvcc is there, ``difffit_fast._C_cuda`` is made too, from
``csrc/cuda/*``: a library of its own, so that a PyTorch without CUDA can load the first. Everything is written against
the libtorch stable ABI of PyTorch 2.10, so one build serves later versions. In an isolated build PyTorch is borrowed from
the environment that is installed into (find_torch.py).

Without PyTorch the build stops, since installers show nothing of a build that succeeds. Without a working compiler the
package still installs, says so on the installer's own output, and again at run time.

Environment variables:

DIFFFIT_FAST_REQUIRE_EXT=1    fail rather than install without the extension; 0: install without it, even without PyTorch
DIFFFIT_FAST_CUDA=0 or 1      leave the CUDA sources out, or fail when they cannot be compiled (unset: when possible)
DIFFFIT_FAST_CXXFLAGS         more flags for the C++ compiler and the linker (for example -fsanitize=address)
DIFFFIT_FAST_PYTHON           the Python whose PyTorch an isolated build uses (unset: that of the environment at hand)
TORCH_CUDA_ARCH_LIST          GPU architectures (unset: those of this machine's GPUs; without one, DEFAULT_ARCHS)
MAX_JOBS                      compilers at once (unset: from cores and free memory)
"""

from __future__ import annotations

import functools
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import find_torch

ROOT = Path(__file__).resolve().parent.parent
TARGET = "0x020a000000000000"  # libtorch stable ABI of PyTorch 2.10
MIN_TORCH = (2, 10)
DEFAULT_ARCHS = "8.0;9.0a;10.0"
MEMORY_PER_JOB = {False: 1.0, True: 4.0}  # GiB of one compiler process: g++ alone, with nvcc

CXX_FLAGS = [
    "-O3",
    "-std=c++20",
    "-fvisibility=hidden",
    "-fopenmp-simd",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-g0",
]
NVCC_FLAGS = ["-O3", "-std=c++20", "--expt-relaxed-constexpr", "-lineinfo"]
DEFINES = ["-DTORCH_STABLE_ONLY", f"-DTORCH_TARGET_VERSION={TARGET}"]


class BuildError(RuntimeError):
    """The extension, or its CUDA half, cannot be built here; the message says why."""


# -- decisions, each a function of its arguments ---------------------------------------------------------------------
def max_jobs(cores: int, free_gib: float, cuda: bool = False) -> int:
    """Compilers to run at once: one per core, but no more than fit into the free memory; at least one."""
    return max(1, min(cores, int(free_gib / MEMORY_PER_JOB[cuda])))


def free_memory_gib() -> float:
    """Memory that can be had now, in GiB (MemAvailable and the cgroup's limit on Linux; 4 where it cannot be known)."""
    free = []
    try:
        text = Path("/proc/meminfo").read_text()
        free.append(int(re.search(r"MemAvailable:\s+(\d+) kB", text)[1]) / 2**20)  # type: ignore[index]
    except (OSError, TypeError):
        pass
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        if limit != "max":
            free.append((int(limit) - used) / 2**30)
    except (OSError, ValueError):
        pass
    return min(free, default=4.0)


def check_cuda_versions(nvcc: str, torch_cuda: str) -> str | None:
    """Compare nvcc's version with the CUDA version PyTorch was built for, both like ``"13.0"``.

    Returns a warning when only the minor versions differ, None when they agree.

    Raises:
        BuildError: the major versions differ: the library would not load, or would crash.
    """
    if nvcc.split(".")[0] != torch_cuda.split(".")[0]:
        raise BuildError(
            f"nvcc is CUDA {nvcc}, but PyTorch was built for CUDA {torch_cuda}; the major versions must agree. "
            f"Point CUDA_HOME to a CUDA {torch_cuda.split('.')[0]} toolkit, install a PyTorch for CUDA "
            f"{nvcc.split('.')[0]}, or set DIFFFIT_FAST_CUDA=0 to build without CUDA C++ (Triton does not need nvcc)."
        )
    if nvcc.split(".")[:2] != torch_cuda.split(".")[:2]:
        return f"nvcc is CUDA {nvcc}, PyTorch was built for CUDA {torch_cuda}; only the minor versions differ: going on"
    return None


def wants_cuda(setting: str | None, torch_cuda: str | None, nvcc: str | None) -> bool:
    """Whether the CUDA sources are compiled; ``setting`` is DIFFFIT_FAST_CUDA, ``nvcc`` its path or None.

    Raises:
        BuildError: ``setting`` is ``"1"`` and PyTorch's CUDA or nvcc is missing, or it is neither 0, 1 nor unset.
    """
    if setting not in (None, "", "0", "1"):
        raise BuildError(f"DIFFFIT_FAST_CUDA must be 0 or 1; got {setting!r}")
    if setting == "0":
        return False
    missing = [] if torch_cuda else ["a PyTorch with CUDA (this one is built for the CPU)"]
    missing += [] if nvcc else ["nvcc (set CUDA_HOME or PATH)"]
    if setting == "1" and missing:
        raise BuildError(f"DIFFFIT_FAST_CUDA=1, but this is missing: {' and '.join(missing)}")
    return not missing


def nvcc_version(nvcc: str) -> str:
    """``"13.0"`` from ``nvcc --version``."""
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\d+\.\d+)", text)
    if not found:
        raise BuildError(f"{nvcc} --version does not tell its version:\n{text}")
    return found[1]


def required() -> bool | None:
    """DIFFFIT_FAST_REQUIRE_EXT: True (an install without the extension is an error), False, or None when unset."""
    setting = os.environ.get("DIFFFIT_FAST_REQUIRE_EXT", "")
    return None if setting == "" else setting != "0"


def installs(arguments: list[str]) -> bool:
    """Whether these arguments of setup.py ask for something that is installed, not for a source distribution."""
    return any(word.startswith(("bdist", "build", "develop", "dist_info", "editable", "install")) for word in arguments)


# -- the libraries ---------------------------------------------------------------------------------------------------
def extensions() -> list[Any]:
    """The libraries to build. Without PyTorch, one that build_ext then leaves out, so that the wheel names its platform.

    Raises:
        SystemExit: there is no usable PyTorch and something is to be installed (unless DIFFFIT_FAST_REQUIRE_EXT=0).
    """
    problem = torch_problem()
    sources = sorted((ROOT / "csrc").glob("*.cpp"))
    if problem:
        if installs(sys.argv[1:]) and required() is not False:
            raise SystemExit(f"\ndifffit_fast: {problem}")  # a traceback would hide the sentence
        from setuptools import Extension

        return [Extension("difffit_fast._C", [str(path.relative_to(ROOT)) for path in sources])]

    import torch
    from torch.utils import cpp_extension

    nvcc = shutil.which(f"{cpp_extension.CUDA_HOME}/bin/nvcc") if cpp_extension.CUDA_HOME else None
    cuda = wants_cuda(os.environ.get("DIFFFIT_FAST_CUDA"), torch.version.cuda, nvcc)
    if cuda:
        warning = check_cuda_versions(nvcc_version(nvcc), torch.version.cuda)
        if warning:
            warnings.warn(warning, stacklevel=2)
        if not torch.cuda.is_available():
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHS)

    more = shlex.split(os.environ.get("DIFFFIT_FAST_CXXFLAGS", ""))

    # The stable ABI lies in torch_cpu and torch_cuda. Linking the other libraries would tie the build to one PyTorch.
    def library(make: Any, name: str, sources: list[Path], defines: list[str], libraries: list[str]) -> Any:
        extension = make(
            name,
            [str(path.relative_to(ROOT)) for path in sources],
            include_dirs=[str(ROOT / "csrc")],
            extra_compile_args={"cxx": [*CXX_FLAGS, *defines, *more], "nvcc": [*NVCC_FLAGS, *defines]},
            extra_link_args=more,
        )
        extension.libraries = libraries
        return extension

    made = [library(cpp_extension.CppExtension, "difffit_fast._C", sources, DEFINES, ["torch_cpu"])]
    if cuda:
        defines, libraries = [*DEFINES, "-DUSE_CUDA"], ["torch_cpu", "torch_cuda", "cudart"]
        made.append(library(cpp_extension.CUDAExtension, "difffit_fast._C_cuda", cuda_sources(), defines, libraries))
    return made


def cuda_sources() -> list[Path]:
    """The sources of ``difffit_fast._C_cuda``: csrc/cuda, and the host code that it shares with the tests on the CPU."""
    cuda = ROOT / "csrc" / "cuda"
    return [*sorted(cuda.glob("*.cu")), *sorted(cuda.glob("*.cpp")), *sorted((ROOT / "csrc").glob("cublaslt_*.cpp"))]


@functools.cache
def torch_problem() -> str:
    """Why there is no PyTorch to build with, and what to do; empty when it can be imported."""
    missing = find_torch.borrow()
    try:
        import torch
        import torch.utils.cpp_extension
    except ImportError as error:
        reason = f"there is no PyTorch to compile against: {missing or error}."
    else:
        version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
        if version >= MIN_TORCH:
            return ""
        reason = f"PyTorch {torch.__version__} is too old to compile against."
    return (
        f"{reason} Install PyTorch >= 2.10 into this environment first (pip install torch), then repeat this command; "
        "or set DIFFFIT_FAST_REQUIRE_EXT=0 to install without the C++ kernels, which is slower on the CPU."
    )


def build_py_command() -> type:
    """Copies the Python files to where nothing of an earlier build is left: setuptools would pack that too."""
    from setuptools.command.build_py import build_py

    class build_py_anew(build_py):  # noqa: N801
        def run(self) -> None:
            if not self.editable_mode:
                shutil.rmtree(Path(self.build_lib) / "difffit_fast", ignore_errors=True)
            super().run()

    return build_py_anew


def build_ext_command() -> type:
    """PyTorch's ninja build; writes build_info.json beside the library and does not fail for want of a compiler."""
    if torch_problem():
        from setuptools.command.build_ext import build_ext
    else:
        from torch.utils.cpp_extension import BuildExtension as build_ext  # noqa: N813

    class build_ext_or_go_on(build_ext):  # noqa: N801 (the name setuptools gives its commands)
        def run(self) -> None:
            self.in_tree = bool(self.inplace or self.editable_mode)  # setuptools clears inplace while it runs
            try:
                if torch_problem():
                    raise BuildError(torch_problem().partition(". ")[0])
                super().run()
            except Exception as error:  # every way a compiler can fail
                reason = str(error).partition("\n")[0] or type(error).__name__
                _give_up(reason)
                self.extensions = []
                if not list(self._package().glob("_C.*")):  # where an earlier build stays, so does what it says
                    self._write({"not_built": reason})

        def build_extensions(self) -> None:
            for name in [name for name in ("CC", "CXX") if os.environ.get(name) == ""]:
                del os.environ[name]
            ninja = str(Path(sys.executable).parent)  # of an environment that is not activated
            if not find_torch.borrowed():  # an isolated build has its own on the PATH
                os.environ["PATH"] = os.pathsep.join([ninja, os.environ.get("PATH", "")])
            compiler = shlex.split(os.environ.get("CXX", "") or "c++")[0]
            if not shutil.which(compiler):
                raise BuildError(f"no C++ compiler ({compiler} not found)")
            cuda = len(self.extensions) > 1
            os.environ.setdefault("MAX_JOBS", str(max_jobs(os.cpu_count() or 1, free_memory_gib(), cuda)))
            if self.in_tree:  # keep the objects, so that the next build compiles what changed
                self.build_temp = str(ROOT / "build" / f"temp-{sys.implementation.cache_tag}")
            super().build_extensions()
            self._write(describe(self.extensions))

        def _package(self) -> Path:
            return (ROOT if self.in_tree else Path(self.build_lib)) / "difffit_fast"

        def _write(self, info: dict[str, Any]) -> None:
            file = self._package() / "build_info.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.with_suffix(".new").write_text(json.dumps(info, indent=2) + "\n")
            os.replace(file.with_suffix(".new"), file)

    return build_ext_or_go_on


def describe(extensions: list[Any]) -> dict[str, Any]:
    """What build_info.json says: the versions and flags of this build."""
    import torch

    compiler = shlex.split(os.environ.get("CXX", "") or "c++")
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False).stdout
    cuda = extensions[1] if len(extensions) > 1 else None
    return {
        "torch": torch.__version__,
        "torch_target": "2.10",
        "python": platform.python_version(),
        "platform": platform.platform(),
        "compiler": version.splitlines()[0] if version else " ".join(compiler),
        "cxx_flags": " ".join(extensions[0].extra_compile_args["cxx"]),
        "cuda": torch.version.cuda if cuda else None,
        "nvcc_flags": " ".join(cuda.extra_compile_args["nvcc"]) if cuda else None,
        "cuda_arch_list": os.environ.get("TORCH_CUDA_ARCH_LIST") if cuda else None,
        "sources": [source for extension in extensions for source in extension.sources],
    }


def _give_up(reason: str) -> None:
    """Say why there will be no extension and go on, or stop when it is required."""
    message = f"difffit_fast: the C++ extension is not built: {reason}"
    if required():
        raise BuildError(f"{message} (DIFFFIT_FAST_REQUIRE_EXT=1)")
    line = "=" * 100
    announce(
        f"{line}\n{message}\nThe package is installed without it and runs on Triton or plain PyTorch, slower on the CPU. Once "
        "that is mended, install again\n(pip: --force-reinstall --no-deps, uv: --reinstall-package difffit_fast).\n"
        + line
    )


def announce(text: str) -> None:
    """Print, and where an installer keeps this build's output to itself, print on the installer's own stderr too."""
    print(text, file=sys.stderr, flush=True)
    for place in (f"/proc/{os.getppid()}/fd/2", "/dev/tty"):
        try:
            out = os.open(place, os.O_WRONLY | os.O_APPEND | os.O_NOCTTY)
        except OSError:
            continue
        try:
            if not os.path.sameopenfile(out, sys.__stderr__.fileno()):  # else it has just been printed there
                os.write(out, f"\n{text}\n".encode())
            return
        except OSError:
            continue
        finally:
            os.close(out)
