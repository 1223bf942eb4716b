"""The compiled extension ``difffit_fast._C``: loaded when asked for, missed with one warning, described on request.

Loading registers ``torch.ops.difffit_fast_cpp.*``. Where the library is missing or does not load, :func:`load` warns
once, with the versions it was built for and those that run, and the package goes on with Triton or plain PyTorch.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import json
import os
import platform
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ._rooms import room
from .errors import DiffFitError

# What the library must register. One that lacks some was built from other sources than this Python code.
OPERATIONS = (
    "adaln_forward",
    "adaln_backward",
    "residual_forward",
    "residual_backward",
    "residual_adaln_forward",
    "residual_adaln_backward",
    "gelu_forward",
    "gelu_backward",
    "colsum",
    "qkv_scale",
    "qkv_backward",
    "softmax_forward",
    "softmax_backward",
)

_PACKAGE = Path(__file__).parent
_LOCK = threading.Lock()
_warned = False
_choices: dict[str, Callable[[], Any]] = {}
_operations: dict[str, tuple[bool, str | None]] = {}


# -- loading ---------------------------------------------------------------------------------------------------------
def load() -> bool:
    """Load the extension if that has not been tried yet; True when its operations are there.

    The first call that finds it missing gives one ``RuntimeWarning``: what is missing, why, and what it costs.
    """
    global _warned
    module, problem = _library()
    if problem:
        with _LOCK:
            first, _warned = not _warned, True
        if first:
            warnings.warn(problem, RuntimeWarning, stacklevel=2)
    return module is not None


@functools.cache
def _library() -> tuple[Any | None, str | None]:
    """The module ``difffit_fast._C`` and None, or None and what is wrong with it."""
    with _LOCK:
        try:
            module = importlib.import_module("difffit_fast._C")
            missing = [name for name in OPERATIONS if not hasattr(torch.ops.difffit_fast_cpp, name)]
            if missing:
                names = ", ".join(missing[:3]) + (" and others" if len(missing) > 3 else "")
                raise ImportError(f"it was built from other sources: {names} missing")
            return module, None
        except ImportError as error:  # no such file, an unknown symbol, a missing shared library, another Python
            return None, _problem(error, _recorded(), [path.name for path in _PACKAGE.glob("_C.*")])


def _recorded() -> dict[str, Any]:
    """What the build wrote beside the library; empty when nothing was built."""
    try:
        return json.loads((_PACKAGE / "build_info.json").read_text())
    except (OSError, ValueError):
        return {}


def _problem(error: ImportError, recorded: dict[str, Any], files: list[str]) -> str:
    """The one warning: what is missing, the versions on both sides, what it costs, how to mend it."""
    running = f"PyTorch {torch.__version__}, Python {platform.python_version()}"
    if not files:
        why = recorded.get("not_built", "it was built where PyTorch could not be imported")
        what = f"difffit_fast was installed without its C++ extension: {why}. {running} is running."
    else:
        reason = str(error).partition("\n")[0]
        if isinstance(error, ModuleNotFoundError) and error.name == "difffit_fast._C":
            reason = f"none of {', '.join(sorted(files))} is for this Python"
        what = (
            f"The C++ extension of difffit_fast cannot be loaded: {reason}. It was built against "
            f"PyTorch {recorded.get('torch', 'unknown')} for PyTorch >= {recorded.get('torch_target', 'unknown')}, "
            f"Python {recorded.get('python', 'unknown')}, and {running} is running."
        )
    return (
        f"{what} On the CPU every operation now runs in plain PyTorch: the same results, but slower and with more "
        "memory; on CUDA the Triton kernels still run where triton is installed, without the cuBLASLt epilogues. "
        "To build it: pip install --no-build-isolation --force-reinstall --no-deps . in the source folder, with a C++ "
        "compiler (see docs/install.md). DIFFFIT_FAST_KERNELS=reference silences this."
    )


# -- telling ---------------------------------------------------------------------------------------------------------
def build_info() -> dict[str, Any]:
    """What was built, against what, and what runs now. Does not warn.

    Keys: ``version``, ``built`` (the extension is loaded), ``problem`` (None, or why not), ``compiler``,
    ``cxx_flags``, ``torch_built``, ``torch_target`` (the oldest PyTorch the library serves), ``python_built``,
    ``cuda_built`` (CUDA version of the compiled CUDA sources, or None), ``cuda_arch_list``, ``torch``, ``torch_cuda``,
    ``python``, ``cpu_capability`` (instruction set of the C++ kernels here: AVX512, AVX2 or baseline; None without
    the extension), ``triton``, ``xformers`` (versions, or None), ``kernels`` (DIFFFIT_FAST_KERNELS).
    """
    module, problem = _library()
    recorded = _recorded() if module else {}
    return {
        "version": importlib.import_module("difffit_fast").__version__,
        "built": module is not None,
        "problem": problem,
        "compiler": recorded.get("compiler") or (module and module.build_info()["compiler"]),
        "cxx_flags": recorded.get("cxx_flags"),
        "torch_built": recorded.get("torch") or (module and module.build_info()["torch"]),
        "torch_target": recorded.get("torch_target"),
        "python_built": recorded.get("python"),
        "cuda_built": recorded.get("cuda"),
        "cuda_arch_list": recorded.get("cuda_arch_list"),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "python": platform.python_version(),
        "cpu_capability": module.cpu_capability() if module else None,
        "triton": _version("triton"),
        "xformers": _version("xformers"),
        "kernels": os.environ.get("DIFFFIT_FAST_KERNELS") or "auto",
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def register_operation(stem: str, has_triton: bool = True, cuda: str | None = None) -> None:
    """Let :func:`kernel_report` tell where the operation ``stem`` runs.

    Args:
        has_triton: whether it has a Triton kernel.
        cuda: what does it on CUDA where that is none of the package's own rooms.
    """
    _operations[stem] = (has_triton, cuda)


def register_choice(name: str, describe: Callable[[], Any]) -> None:
    """Let ``describe()`` report an operation's run-time decisions under ``kernel_report()["choices"][name]``."""
    _choices[name] = describe


def kernel_report() -> dict[str, Any]:
    """Which implementation each operation uses now: ``"cpp"``, ``"triton"``, ``"reference"`` or why none.

    Returns:
        ``{"kernels": DIFFFIT_FAST_KERNELS, "extension": True or why not, "cpu": {operation: {dtype: implementation}},
        "cuda": the same, or why there is none, "choices": {name: what was decided at run time}}``.
    """
    info = build_info()
    return {
        "kernels": info["kernels"],
        "extension": True if info["built"] else info["problem"],
        "cpu": _where("cpu"),
        "cuda": _where("cuda") if torch.cuda.is_available() else "no CUDA device",
        "choices": {name: describe() for name, describe in sorted(_choices.items())},
    }


def _where(device: str) -> dict[str, dict[str, str]]:
    def one(dtype: torch.dtype, has_triton: bool, cuda: str | None) -> str:
        if device == "cuda" and cuda is not None:
            return cuda
        try:
            return room(torch.device(device), dtype, load, has_triton)
        except DiffFitError as error:
            return f"error: {error}"

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    return {stem: {name: one(t, *about) for name, t in dtypes.items()} for stem, about in _operations.items()}
