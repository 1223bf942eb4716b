"""The compiled extension ``difffit_fast._C``: loaded when asked for, missed with one warning, described on request.

Loading registers ``torch.ops.difffit_fast_cpp.*`` and, from a second library beside it and under a PyTorch with CUDA,
``torch.ops.difffit_fast_cuda.*``. Where the library is missing or does not load, :func:`load` warns once, with the
versions it was built for and those that run, and the package goes on with Triton or plain PyTorch.

Only the libraries beside this file are loaded. An import by name would also find that of another copy of the package, by
way of an editable install, and run its kernels under this Python code.
"""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

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
    "mlp_forward",
    "mlp_backward",
    "colsum",
    "modulation_forward",
    "modulation_backward",
    "attention_forward",
    "attention_backward",
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
    problem = problem or _cuda_library()
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
            module = _module()
            missing = [name for name in OPERATIONS if not hasattr(torch.ops.difffit_fast_cpp, name)]
            if missing:
                names = ", ".join(missing[:3]) + (" and others" if len(missing) > 3 else "")
                raise ImportError(f"it was built from other sources: {names} missing")
            return module, None
        except ImportError as error:  # no such file, an unknown symbol, a missing shared library, another Python
            return None, _problem(error, _recorded(), [path.name for path in _PACKAGE.glob("_C.*")])


@functools.cache
def _cuda_library() -> str | None:
    """Load the CUDA operations, if they were built and this PyTorch has CUDA; None, or why that failed."""
    file = _beside("_C_cuda")
    if file is None or torch.version.cuda is None or _library()[0] is None:
        return None
    try:
        torch.ops.load_library(file)
        return None
    except OSError as error:
        return (
            f"The CUDA library of difffit_fast cannot be loaded: {str(error).partition(chr(10))[0]}. It was built for "
            f"CUDA {_recorded().get('cuda', 'unknown')}, and PyTorch {torch.__version__} for CUDA {torch.version.cuda} is "
            "running. GELU in cuBLASLt's epilogues is not available; everything else runs, on Triton."
        )


def _beside(name: str) -> Path | None:
    """The file of the compiled module beside this one, for this Python; None when there is none."""
    files = (_PACKAGE / f"{name}{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    return next((file for file in files if file.is_file()), None)


def _module() -> Any:
    """Import the library beside this file, as ``difffit_fast._C``.

    Raises:
        ImportError: there is none, it does not load, or this process has the operations of another copy already, whose
            names are registered only once.
    """
    name = f"{__package__}._C"
    file = _beside("_C")
    known = sys.modules.get(name, file)
    if file is None or known is None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    space = torch.ops.difffit_fast_cpp
    loaded = getattr(known, "__file__", None) or space.__dict__.get("_loaded_from")
    if loaded is None and hasattr(space, OPERATIONS[0]):
        loaded = "an unknown place"
    if loaded is not None and str(loaded) != str(file):
        raise ImportError(f"this process has already loaded that of another copy of the package, from {loaded}")
    if known is file:
        spec = importlib.util.spec_from_file_location(name, file)
        known = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(known)
        sys.modules[name] = known
        setattr(sys.modules[__package__], "_C", known)  # noqa: B010 (as the import of a submodule does)
    space._loaded_from = str(file)
    return known


def _recorded() -> dict[str, Any]:
    """What the build wrote beside the library; empty when nothing was built."""
    try:
        return json.loads((_PACKAGE / "build_info.json").read_text())
    except (OSError, ValueError):
        return {}


def _problem(error: ImportError, recorded: dict[str, Any], files: list[str]) -> str:
    """The one warning: what is missing, the versions on both sides, what it costs, how to mend it."""
    running = f"PyTorch {torch.__version__}, Python {platform.python_version()}"
    mend = "To build it: pip install --force-reinstall --no-deps . in the source folder, with a C++ compiler"
    if files:
        reason = str(error).partition("\n")[0]
        if isinstance(error, ModuleNotFoundError) and error.name == "difffit_fast._C":
            reason = f"none of {', '.join(sorted(files))} is for this Python"
        what = (
            f"The C++ extension of difffit_fast cannot be loaded: {reason}. It was built against "
            f"PyTorch {recorded.get('torch', 'unknown')} for PyTorch >= {recorded.get('torch_target', 'unknown')}, "
            f"Python {recorded.get('python', 'unknown')}, and {running} is running."
        )
    elif "not_built" in recorded or not (_PACKAGE.parent / "csrc").is_dir():
        why = recorded.get("not_built", "nothing tells why")
        what = f"difffit_fast was installed without its C++ extension: {why}. {running} is running."
    else:
        other = _installed_elsewhere()
        what = f"{_PACKAGE} is the source of difffit_fast, in which nothing has been compiled."
        if other:
            what += f" The installed package is {other}."
            mend = "To use it, run Python from another folder; to use these sources: pip install -e . in their folder"
        else:
            mend = "To compile: pip install -e . in that folder, with a C++ compiler"
    return (
        f"{what} On the CPU every operation now runs in plain PyTorch: the same results, but slower and with more "
        "memory; on CUDA the Triton kernels still run where triton is installed, without the cuBLASLt epilogues. "
        f"{mend} (see docs/install.md). DIFFFIT_FAST_KERNELS=reference silences this."
    )


def _installed_elsewhere() -> Path | None:
    """The folder of the installed package, plain or editable, when that is not this one."""
    for distribution in importlib.metadata.distributions(name="difffit_fast"):
        package = Path(str(distribution.locate_file("difffit_fast")))
        origin = json.loads(distribution.read_text("direct_url.json") or "{}")
        if origin.get("dir_info", {}).get("editable"):
            package = Path(unquote(urlsplit(origin["url"]).path)) / "difffit_fast"
        if (package / "__init__.py").is_file() and package.resolve() != _PACKAGE.resolve():
            return package
    return None


@functools.cache
def cpu_is_amd() -> bool:
    """Whether the extension is there and says that this is a processor of AMD."""
    module, _ = _library()
    return module is not None and module.cpu_is_amd()


def cpu_multiplies_bf16() -> bool:
    """Whether the C++ kernels multiply bfloat16 as it is on this processor."""
    module, _ = _library()
    return module is not None and module.cpu_capability() == "AVX512_BF16"


# -- telling ---------------------------------------------------------------------------------------------------------
def build_info() -> dict[str, Any]:
    """What was built, against what, and what runs now. Does not warn.

    Keys: ``version``, ``built`` (the extension is loaded), ``problem`` (None, or why not), ``compiler``,
    ``cxx_flags``, ``torch_built``, ``torch_target`` (the oldest PyTorch the library serves), ``python_built``,
    ``cuda_built`` (CUDA version of the compiled CUDA sources, or None), ``cuda_arch_list``, ``cuda_problem`` (why they
    do not load under a PyTorch with CUDA, or None), ``torch``, ``torch_cuda``, ``python``, ``cpu_capability``
    (instruction set of the C++ kernels here: AVX512_BF16, AVX512, AVX2 or baseline; None without the extension), ``triton``,
    ``xformers`` (versions, or None), ``kernels`` (DIFFFIT_FAST_KERNELS).
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
        "cuda_problem": _cuda_library(),
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
