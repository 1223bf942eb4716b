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

from difffit_fast.ops import adaln, use_kernels

ALL = (True, True, True)


def truth(x: Tensor, a: Tensor, c: Tensor) -> Tensor:
    return torch.nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6) * a[:, None] + c[:, None]


def inputs(b: int, t: int, d: int, stream: torch.dtype = torch.float32) -> list[Tensor]:
    return [draw(b, t, d, dtype=stream, shift=0.5), draw(b, d, dtype=torch.float32), draw(b, d, dtype=torch.float32)]


@pytest.mark.parametrize("kernels", rooms())
@pytest.mark.parametrize(("stream", "branch"), DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_numbers(kernels: str, size: tuple[int, int, int], stream: torch.dtype, branch: torch.dtype) -> None:
    with use_kernels(kernels):
        check_numbers(lambda *z: adaln(*z, out_dtype=branch), truth, inputs(*size, stream), ALL, TOLERANCE[branch])


@pytest.mark.parametrize("kernels", rooms())
def test_needs_input_grad_layouts_and_compile(kernels: str) -> None:
    with use_kernels(kernels):
        check_needs_input_grad(adaln, inputs(2, 5, 72), ALL)
        check_layouts(adaln, inputs(2, 5, 72), ALL)
        check_compiled(adaln, inputs(2, 5, 72), ALL)


@pytest.mark.parametrize("kernels", rooms())
def test_opcheck(kernels: str) -> None:
    with use_kernels(kernels):
        x, a, c = (v.requires_grad_() for v in inputs(2, 5, 72))
        torch.library.opcheck(torch.ops.difffit_fast.adaln.default, (x, a, c, 1e-6, torch.bfloat16))


@pytest.mark.parametrize("kernels", rooms())
def test_statistics_are_float32_for_bf16_rows_far_from_zero(kernels: str) -> None:
    """A mean of 100 with a spread of 1: statistics in bf16 would lose the spread."""
    x, a, c = inputs(1, 9, 384, torch.float32)
    x = x + 100
    with use_kernels(kernels):
        check_numbers(lambda *z: adaln(*z, out_dtype=torch.bfloat16), truth, [x, a, c], ALL, 1.2e-2)


def test_errors_name_both_shapes() -> None:
    x, a, c = inputs(2, 5, 72)
    with pytest.raises(ValueError, match=r"a must be one vector per sample, shape \(2, 72\); got \(1, 72\)"):
        adaln(x, a[:1], c)
    with pytest.raises(ValueError, match="x must be"):
        adaln(x[0], a, c)
