"""The function that runs an operation's kernel: the one of its name in the room in use (:mod:`.._rooms`)."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import torch

from .. import _ext, _rooms


@functools.cache
def cpp_ops() -> Any | None:
    """The namespace of the C++ operations, or None when the extension is not there (it has then warned once)."""
    return torch.ops.difffit_fast_cpp if _ext.load() else None


def cuda_ops() -> Any | None:
    """The namespace of the compiled CUDA operations, or None where they were not built."""
    if cpp_ops() is None or not hasattr(torch.ops.difffit_fast_cuda, "linear_gelu"):
        return None
    return torch.ops.difffit_fast_cuda


@functools.cache
def triton_kernels(stem: str) -> ModuleType:
    """The module ``difffit_fast.kernels.<stem>``."""
    return importlib.import_module(f"difffit_fast.kernels.{stem}")


def one_stage(like: torch.Tensor) -> AbstractContextManager[None]:
    """A context in which Triton's reductions leave their second stage to one launch at its end."""
    return triton_kernels("sums").together() if room(like.device, like.dtype) == "triton" else contextlib.nullcontext()


def apart() -> AbstractContextManager[None]:
    """Inside of :func:`one_stage`: a context in which every reduction is whole at once, as where things are timed."""
    loaded = triton_kernels.cache_info().currsize > 0  # else no reduction can be waiting
    return triton_kernels("sums").apart() if loaded else contextlib.nullcontext()


def _has_cpp() -> bool:
    return cpp_ops() is not None


def room(device: torch.device, dtype: torch.dtype, has_triton: bool = True) -> str:
    """``"reference"``, ``"cpp"`` or ``"triton"`` for a tensor of this device and dtype, or an error that says why not."""
    return _rooms.room(device, dtype, _has_cpp, has_triton)


def pick(stem: str, reference: Callable, like: torch.Tensor, *dtypes: torch.dtype, has_triton: bool = True) -> Callable:
    """The function of ``reference``'s name in the room that serves tensors like ``like``, and the other ``dtypes`` of the call.

    Where a reference would take the name of the operation itself it ends in ``_reference``; the others do not.
    """
    where = room(like.device, like.dtype, has_triton)
    if where == "reference" or any(room(like.device, dtype, has_triton) == "reference" for dtype in dtypes):
        return reference
    name = reference.__name__.removesuffix("_reference")
    return getattr(cpp_ops() if where == "cpp" else triton_kernels(stem), name)
