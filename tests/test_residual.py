from __future__ import annotations

import pytest
import torch
from optest import (
    DTYPES,
    SIZES,
    TOLERANCE,
    check_compiled,
    check_layouts,
    check_needs_input_grad,
    check_numbers,
    draw,
    rooms,
)
from torch import Tensor

from difffit_fast.ops import residual, residual_adaln, use_kernels


def truth(x: Tensor, f: Tensor, s: Tensor, r: Tensor) -> Tensor:
    return x + s[:, None] * f + r[:, None]


def truth_adaln(x: Tensor, f: Tensor, s: Tensor, r: Tensor, a: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    y = truth(x, f, s, r)
    return y, torch.nn.functional.layer_norm(y, y.shape[-1:], eps=1e-6) * a[:, None] + c[:, None]


def inputs(b: int, t: int, d: int, stream: torch.dtype, branch: torch.dtype, vectors: int) -> list[Tensor]:
    x, f = draw(b, t, d, dtype=stream), draw(b, t, d, dtype=branch)
    return [x, f, *(draw(b, d, dtype=torch.float32) for _ in range(vectors))]


@pytest.mark.parametrize("kernels", rooms())
@pytest.mark.parametrize(("stream", "branch"), DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_residual(kernels: str, size: tuple[int, int, int], stream: torch.dtype, branch: torch.dtype) -> None:
    with use_kernels(kernels):
        check_numbers(residual, truth, inputs(*size, stream, branch, 2), (True,) * 4, TOLERANCE[branch])


@pytest.mark.parametrize("kernels", rooms())
@pytest.mark.parametrize(("stream", "branch"), DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_residual_adaln(kernels: str, size: tuple[int, int, int], stream: torch.dtype, branch: torch.dtype) -> None:
    with use_kernels(kernels):
        # With a bf16 stream h is the normalisation of the y that was stored, rounded: one more rounding.
        tolerance = TOLERANCE[branch] * (2 if stream == torch.bfloat16 else 1)
        check_numbers(residual_adaln, truth_adaln, inputs(*size, stream, branch, 4), (True,) * 6, tolerance)


@pytest.mark.parametrize("kernels", rooms())
@pytest.mark.parametrize("used", [0, 1], ids=["only y", "only h"])
def test_one_output_unused(kernels: str, used: int) -> None:
    """The last join has no further reader of y; a reader of y alone needs no LayerNorm backward."""
    with use_kernels(kernels):
        many = inputs(2, 7, 72, torch.float32, torch.float32, 4)
        needs = (True, True, True, True, used == 1, used == 1)
        check_numbers(lambda *z: residual_adaln(*z)[used], lambda *z: truth_adaln(*z)[used], many, needs, 3e-6)


@pytest.mark.parametrize("kernels", rooms())
def test_needs_input_grad_layouts_and_compile(kernels: str) -> None:
    with use_kernels(kernels):
        for op, vectors in ((residual, 2), (residual_adaln, 4)):
            many = inputs(2, 5, 72, torch.float32, torch.float32, vectors)
            check_needs_input_grad(op, many, (True,) * len(many))
            check_layouts(op, many, (True,) * len(many))
            check_compiled(op, many, (True,) * len(many))


@pytest.mark.parametrize("kernels", rooms())
def test_opcheck(kernels: str) -> None:
    with use_kernels(kernels):
        many = [v.requires_grad_() for v in inputs(2, 5, 72, torch.float32, torch.bfloat16, 4)]
        torch.library.opcheck(torch.ops.difffit_fast.residual.default, tuple(many[:4]))
        torch.library.opcheck(torch.ops.difffit_fast.residual_adaln.default, (*many, 1e-6))


def test_errors_name_both_shapes() -> None:
    x, f, s, r, a, c = inputs(2, 5, 72, torch.float32, torch.float32, 4)
    with pytest.raises(ValueError, match=r"f must have the shape of x, \(2, 5, 72\); got \(2, 4, 72\)"):
        residual(x, f[:, :4], s, r)
    with pytest.raises(ValueError, match=r"c must be one vector per sample, shape \(2, 72\); got \(2, 71\)"):
        residual_adaln(x, f, s, r, a, c[:, 1:])
