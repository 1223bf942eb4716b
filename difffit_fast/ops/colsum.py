"""colsum: out_n = Σ_m x_mn in float32, in a fixed order: what the gradient of a bias is.

On the CPU C++ does it. On CUDA there are two kernels, Triton's and one in CUDA C++ (``csrc/cuda/colsum.cu``); which is
faster depends on device and shape, so both are timed once per problem (:mod:`.probe`).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .. import _ext
from ._register import register, wide
from .dispatch import cuda_ops, pick
from .probe import Chooser

_chooser = Chooser("triton")


# -- the plain reference -------------------------------------------------------------------------------------------
def colsum_reference(x: Tensor) -> Tensor:
    return x.to(wide(x.dtype)).sum(0)


# -- which one -------------------------------------------------------------------------------------------------------
def _fastest(x: Tensor, kernel: Callable[[Tensor], Tensor]) -> Tensor:
    """The faster of ``kernel`` and the CUDA C++ kernel, for a CUDA matrix; each adds in an order of its own."""
    if x.numel() == 0 or cuda_ops() is None:
        return kernel(x)
    key = ("colsum", str(x.device), str(x.dtype).removeprefix("torch."), x.shape[0], x.shape[1], x.stride(0))
    candidates = {"triton": lambda: kernel(x), "cuda": lambda: cuda_ops().colsum(x)}
    return candidates[_chooser.choose(key, candidates, x.device)]()


def forget() -> None:
    """Forget which kernel was faster, so that both are timed again (for tests and benchmarks)."""
    _chooser.clear()


# -- registration --------------------------------------------------------------------------------------------------
def _forward(x: Tensor) -> Tensor:
    if x.dim() != 2:
        raise ValueError(f"colsum: x must be (rows, columns); got shape {tuple(x.shape)}")
    x = x.contiguous()
    kernel = pick("colsum", colsum_reference, x)
    return _fastest(x, kernel) if x.device.type == "cuda" else kernel(x)


_op = register("colsum(Tensor x) -> Tensor", _forward, lambda x: x.new_empty(x.shape[1], dtype=wide(x.dtype)))
_ext.register_operation("colsum")
_ext.register_choice("colsum", _chooser.report)


def colsum(x: Tensor) -> Tensor:
    """The sum over the rows of a matrix. Not differentiable: it is itself what a backward pass calls.

    Args:
        x: (M, N), any floating dtype.

    Returns:
        (N,) in float32 (float64 for float64 input).
    """
    return _op(x)
