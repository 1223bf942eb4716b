"""fc1 with its activation, and fc2's input gradient with the activation's backward: one cuBLASLt call each, or several.

    linear_gelu    u = h·W₁ᵀ + b₁,  g = GELU(u)                     epilogue GELU_AUX_BIAS
    dgelu_dgrad    du = (dbranch·W₂) ⊙ GELU′(u),  db₁ = Σ_m du      epilogue DGELU_BGRAD

The fused kernels are in ``csrc/cuda/linear_gelu.cu``: two operations with schemas, choices and a benchmark of their own,
hence a stem of their own, that :mod:`.frozen_mlp` may use or not. Whether they are faster than a plain product followed by the
activation's own kernel depends on GPU, shape and cuBLAS version, so on CUDA both are timed once per device, shape and
dtype (:mod:`.probe`). ``DIFFFIT_FAST_CUBLASLT`` overrules that:

======== ==============================================================================================
auto     the faster one (the default)
always   fused wherever the shape allows it, without comparing; an error where the kernels were not built
never    product and activation apart
======== ==============================================================================================

Numerics: fused, the activation is applied to the float32 accumulator, unfused to u as stored; fused, db₁ is rounded to
the dtype of du once, because cuBLASLt gives it in that dtype. float32 is never fused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _ext
from .._rooms import kernels_mode
from ..errors import DiffFitError
from .dispatch import apart, cuda_ops
from .eight_bit import eight_bit_of
from .gemm import dgrad, linear
from .probe import Chooser, Decision

MODES = ("auto", "always", "never")
FUSED, UNFUSED = "cublaslt", "unfused"
_FUSED_DTYPES = (torch.bfloat16, torch.float16)
_MULTIPLE = 8  # of N and K

_chooser = Chooser(UNFUSED, around=apart)


# -- which one -------------------------------------------------------------------------------------------------------
def cublaslt_mode() -> str:
    """The value of ``DIFFFIT_FAST_CUBLASLT``, checked."""
    mode = os.environ.get("DIFFFIT_FAST_CUBLASLT", "auto") or "auto"
    if mode not in MODES:
        raise DiffFitError(f"DIFFFIT_FAST_CUBLASLT must be one of {', '.join(MODES)}; got {mode!r}")
    return mode


def refusal(x: Tensor, N: int, K: int) -> str | None:
    """Why the fused product [M, K] × [K, N] with activations like ``x`` cannot be used, or None when it can."""
    mode = cublaslt_mode()
    if mode == "never":
        return "DIFFFIT_FAST_CUBLASLT=never"
    if x.device.type != "cuda":
        return f"the tensors are on {x.device.type}, not on CUDA"
    if kernels_mode() == "reference":
        return "DIFFFIT_FAST_KERNELS=reference"
    if x.dtype not in _FUSED_DTYPES:
        return f"{x.dtype} is not fused: the epilogues are for bfloat16 and float16"
    if x.numel() == 0 or N == 0:
        return "a size is 0"
    if N % _MULTIPLE or K % _MULTIPLE:
        return f"N = {N} and K = {K} must be multiples of {_MULTIPLE}"
    if cuda_ops() is None:
        reason = "the extension was built without its CUDA sources, or not at all (difffit_fast.build_info())"
        if mode == "always":
            raise DiffFitError(f"DIFFFIT_FAST_CUBLASLT=always, but {reason}")
        return reason
    return None


def choose(op: str, x: Tensor, N: int, K: int, fused: Callable[[], Any], unfused: Callable[[], Any]) -> str:
    """``"cublaslt"`` or ``"unfused"`` for a product of ``x`` (M, K) with a weight of N columns or rows.

    ``fused`` and ``unfused`` compute it without changing their inputs; they are called when they have to be timed.
    """
    key = (op, str(x.device), str(x.dtype).removeprefix("torch."), x.shape[0], N, K)
    why_not = refusal(x, N, K)
    if why_not:
        return _chooser.record(key, Decision(UNFUSED, why_not, lasting=False)) if x.device.type == "cuda" else UNFUSED
    if cublaslt_mode() == "always":
        _chooser.record(key, Decision(FUSED, "DIFFFIT_FAST_CUBLASLT=always", lasting=False))
        return FUSED
    return _chooser.choose(key, {UNFUSED: unfused, FUSED: fused}, x.device)


# -- the operations --------------------------------------------------------------------------------------------------
def linear_gelu(h: Tensor, w1: Tensor, b1: Tensor, gelu_forward: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """fc1 and its tanh GELU.

    Args:
        h: (M, K), contiguous, the compute dtype.
        w1: (N, K), contiguous, the dtype of ``h``.
        b1: (N,), any floating dtype; used in the dtype of ``h``.
        gelu_forward: u -> GELU(u), for the unfused way.

    Returns:
        g = GELU(u) and u = h·w1ᵀ + b1, both (M, N) in the dtype of ``h``.
    """
    N, K = w1.shape

    def unfused() -> tuple[Tensor, Tensor]:
        u = linear(h, w1, b1)
        return gelu_forward(u), u

    def fused() -> tuple[Tensor, Tensor]:
        return cuda_ops().linear_gelu(_aligned(h), _aligned(w1), _aligned(b1.to(h.dtype)), _may_tune())

    if eight_bit_of(w1) is not None:  # cuBLASLt has no epilogue of these with scales
        return unfused()
    return fused() if choose("linear_gelu", h, N, K, fused, unfused) == FUSED else unfused()


def dgelu_dgrad(
    dbranch: Tensor, w2: Tensor, u: Tensor, gelu_backward: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Gradient of fc1's output and of its bias, from the gradient of fc2's output.

    Args:
        dbranch: (M, D), contiguous, the compute dtype.
        w2: weight of fc2 (D, N), contiguous, the dtype of ``dbranch``.
        u: (M, N), contiguous, the pre-activation saved by :func:`linear_gelu`.
        gelu_backward: (dg, u) -> (du, db1), for the unfused way.

    Returns:
        du (M, N) in the dtype of ``dbranch``, and db1 = Σ_m du, float32 (N,).
    """
    D, N = w2.shape

    def unfused() -> tuple[Tensor, Tensor]:
        return gelu_backward(dgrad(dbranch, w2), u)

    def fused() -> tuple[Tensor, Tensor]:
        return cuda_ops().dgelu_dgrad(_aligned(dbranch), _aligned(w2), _aligned(u), _may_tune())

    if eight_bit_of(w2) is not None:
        return unfused()
    return fused() if choose("dgelu_dgrad", dbranch, N, D, fused, unfused) == FUSED else unfused()


def _aligned(x: Tensor) -> Tensor:
    """``x`` contiguous and at an address that 16-byte accesses can use (a view into another tensor may not be)."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _may_tune() -> bool:
    """Whether cuBLASLt's algorithms may be chosen by timing (never by timing when results must repeat across runs)."""
    return not torch.are_deterministic_algorithms_enabled()


# -- telling ---------------------------------------------------------------------------------------------------------
def report() -> dict[str, Any]:
    """What was decided so far.

    Returns:
        ``{"mode": DIFFFIT_FAST_CUBLASLT, "cublaslt": its version or why it is not used, "decisions": [one entry per op,
        device, dtype, M, N, K], "algorithms": [cuBLASLt's candidates and their times]}``.
    """
    ops = cuda_ops() if torch.cuda.is_available() else None
    status: Any = "no CUDA device" if not torch.cuda.is_available() else "the CUDA sources were not built"
    algorithms: list[dict[str, Any]] = []
    if ops is not None:
        try:
            status = ops.cublaslt_version()
            algorithms = json.loads(ops.cublaslt_choices())
        except RuntimeError as error:
            status = str(error).partition("\n")[0]
    return {
        "mode": cublaslt_mode(),
        "cublaslt": status,
        "decisions": _chooser.report(),
        "algorithms": algorithms,
    }


def forget() -> None:
    """Forget the choices between fused and unfused, so that they are made again (for tests and benchmarks)."""
    _chooser.clear()


_ext.register_choice("cublaslt", report)
