"""Which implementation runs: plain PyTorch, C++ or Triton.

The environment variable ``DIFFFIT_FAST_KERNELS`` chooses for everything:

========== ==============================================================================================
auto       CUDA tensors: Triton if it is installed; CPU tensors: C++ if it was built; otherwise reference
reference  plain PyTorch, any device and dtype
cpp        the C++ kernels of ``difffit_fast._C`` (CPU, float32 and bfloat16)
triton     the Triton kernels (CUDA; or CPU tensors with ``TRITON_INTERPRET=1``)
========== ==============================================================================================

It is read at every call, so that a test or a benchmark can switch inside one process (see :func:`use_kernels`).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch

from ..errors import DiffFitError

MODES = ("auto", "reference", "cpp", "triton")
_CPP_DTYPES = (torch.float32, torch.bfloat16)
_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def kernels_mode() -> str:
    """The value of ``DIFFFIT_FAST_KERNELS``, checked."""
    mode = os.environ.get("DIFFFIT_FAST_KERNELS", "auto") or "auto"
    if mode not in MODES:
        raise DiffFitError(f"DIFFFIT_FAST_KERNELS must be one of {', '.join(MODES)}; got {mode!r}")
    return mode


@contextlib.contextmanager
def use_kernels(mode: str) -> Iterator[None]:
    """Choose the implementation inside a ``with`` block (sets and restores ``DIFFFIT_FAST_KERNELS``)."""
    if mode not in MODES:
        raise DiffFitError(f"kernels must be one of {', '.join(MODES)}; got {mode!r}")
    before = os.environ.get("DIFFFIT_FAST_KERNELS")
    os.environ["DIFFFIT_FAST_KERNELS"] = mode
    try:
        yield
    finally:
        if before is None:
            del os.environ["DIFFFIT_FAST_KERNELS"]
        else:
            os.environ["DIFFFIT_FAST_KERNELS"] = before


@functools.cache
def cpp_ops() -> Any | None:
    """The namespace of the C++ operations, or None when the extension is not there (it has then warned once)."""
    from .. import _ext

    return torch.ops.difffit_fast_cpp if _ext.load() else None


@functools.cache
def triton_kernels(stem: str) -> ModuleType | None:
    """The module ``difffit_fast.kernels.<stem>``, or None where Triton is not installed."""
    try:
        importlib.import_module("triton")
    except ImportError:
        return None
    return importlib.import_module(f"difffit_fast.kernels.{stem}")


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def room(device: torch.device, dtype: torch.dtype, has_triton: bool = True, has_cpp: bool = True) -> str:
    """``"reference"``, ``"cpp"`` or ``"triton"`` for a tensor of this device and dtype, or an error that says why not."""
    return _room(kernels_mode(), _interpreting(), device.type, dtype, has_triton, has_cpp)


@functools.cache
def _room(mode: str, interpreting: bool, device: str, dtype: torch.dtype, has_triton: bool, has_cpp: bool) -> str:
    if mode == "reference":
        return "reference"
    if mode == "cpp":
        if device != "cpu":
            raise DiffFitError(f"DIFFFIT_FAST_KERNELS=cpp has kernels for CPU tensors only; got a tensor on {device}")
        if cpp_ops() is None:
            raise DiffFitError("DIFFFIT_FAST_KERNELS=cpp, but the compiled extension difffit_fast._C is not available")
        return "cpp" if has_cpp and dtype in _CPP_DTYPES else "reference"
    if mode == "triton":
        if device == "cpu" and not interpreting:
            raise DiffFitError(
                "DIFFFIT_FAST_KERNELS=triton needs CUDA tensors, or TRITON_INTERPRET=1 for tensors on the CPU"
            )
        if triton_kernels("adaln") is None:
            raise DiffFitError("DIFFFIT_FAST_KERNELS=triton, but triton cannot be imported (pip install triton)")
        return "triton" if has_triton and dtype in _TRITON_DTYPES else "reference"
    if device == "cpu":
        return "cpp" if has_cpp and dtype in _CPP_DTYPES and cpp_ops() is not None else "reference"
    if device == "cuda" and has_triton and dtype in _TRITON_DTYPES and triton_kernels("adaln") is not None:
        return "triton"
    return "reference"


def pick(
    stem: str, reference: Callable, like: torch.Tensor, *, has_triton: bool = True, has_cpp: bool = True
) -> Callable:
    """The function of ``reference``'s name in the room that serves tensors like ``like``."""
    where = room(like.device, like.dtype, has_triton, has_cpp)
    if where == "cpp":
        return getattr(cpp_ops(), reference.__name__)
    if where == "triton":
        return getattr(triton_kernels(stem), reference.__name__)
    return reference
