"""Which room an operation runs in: plain PyTorch, C++ or Triton.

The environment variable ``DIFFFIT_FAST_KERNELS`` chooses for everything:

========== ==============================================================================================
auto       CUDA tensors: Triton if it is installed; CPU tensors: C++ if it was built; otherwise reference
reference  plain PyTorch, any device and dtype
cpp        the C++ kernels of ``difffit_fast._C`` (CPU, float32 and bfloat16)
triton     the Triton kernels (CUDA; or CPU tensors with ``TRITON_INTERPRET=1``)
========== ==============================================================================================

It is read at every call, so that a test or a benchmark can switch inside one process (see :func:`use_kernels`). This
module only names the room; it loads nothing: who asks says what is there (:mod:`._ext`, :mod:`.ops.dispatch`).
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator

import torch

from .errors import DiffFitError

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


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def has_triton() -> bool:
    """Whether Triton can be imported."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def room(device: torch.device, dtype: torch.dtype, has_cpp: Callable[[], bool], in_triton: bool = True) -> str:
    """``"reference"``, ``"cpp"`` or ``"triton"`` for a tensor of this device and dtype.

    Args:
        has_cpp: whether the C++ operations are there; asked only where they would be used.
        in_triton: whether the operation has a Triton kernel.

    Raises:
        DiffFitError: the mode asks for a room that is not there, or not for this device; the message says why.
    """
    return _room(kernels_mode(), interpreting(), device.type, dtype, has_cpp, in_triton)


@functools.cache
def _room(
    mode: str, interpreted: bool, device: str, dtype: torch.dtype, has_cpp: Callable[[], bool], in_triton: bool
) -> str:
    if mode == "reference":
        return "reference"
    if mode == "cpp":
        if device != "cpu":
            raise DiffFitError(f"DIFFFIT_FAST_KERNELS=cpp has kernels for CPU tensors only; got a tensor on {device}")
        if not has_cpp():
            raise DiffFitError("DIFFFIT_FAST_KERNELS=cpp, but the compiled extension difffit_fast._C is not available")
        return "cpp" if dtype in _CPP_DTYPES else "reference"
    if mode == "triton":
        if device == "cpu" and not interpreted:
            raise DiffFitError(
                "DIFFFIT_FAST_KERNELS=triton needs CUDA tensors, or TRITON_INTERPRET=1 for tensors on the CPU"
            )
        if not has_triton():
            raise DiffFitError("DIFFFIT_FAST_KERNELS=triton, but triton cannot be imported (pip install triton)")
        return "triton" if in_triton and dtype in _TRITON_DTYPES else "reference"
    if device == "cpu":
        return "cpp" if dtype in _CPP_DTYPES and has_cpp() else "reference"
    if device == "cuda" and in_triton and dtype in _TRITON_DTYPES and has_triton():
        return "triton"
    return "reference"
