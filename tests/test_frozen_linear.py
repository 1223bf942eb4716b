from __future__ import annotations

import pytest
import torch
from optest import TOLERANCE, check_compiled, check_layouts, check_needs_input_grad, check_numbers, draw, rooms
from torch import Tensor

from difffit_fast.ops import frozen_linear, use_kernels

SIZES = [(1, 1, 72, 40), (2, 77, 72, 100), (0, 4, 72, 40), (3, 37, 100, 1)]  # B, T, K, N


def inputs(b: int, t: int, k: int, n: int, dtype: torch.dtype) -> list[Tensor]:
    return [draw(b, t, k, dtype=dtype), draw(n, k, dtype=dtype), draw(n, dtype=torch.float32)]


NEEDS = (True, False, True)


@pytest.mark.parametrize("kernels", rooms())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_numbers(kernels: str, size: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    with use_kernels(kernels):
        check_numbers(frozen_linear, torch.nn.functional.linear, inputs(*size, dtype), NEEDS, TOLERANCE[dtype])


@pytest.mark.parametrize("kernels", rooms())
def test_needs_input_grad_layouts_and_compile(kernels: str) -> None:
    many = inputs(2, 5, 72, 40, torch.float32)
    with use_kernels(kernels):
        check_needs_input_grad(frozen_linear, many, NEEDS)
        check_layouts(frozen_linear, many, NEEDS)
        check_compiled(frozen_linear, many, NEEDS)
        x, w, b = many
        torch.library.opcheck(torch.ops.difffit_fast.frozen_linear.default, (x.requires_grad_(), w, b.requires_grad_()))


def test_without_bias_and_2d() -> None:
    x, w, _ = inputs(2, 5, 72, 40, torch.float32)
    check_numbers(lambda x: frozen_linear(x, w), lambda x: x @ w.double().t(), [x[0]], (True,), 3e-6)


def test_the_input_is_not_kept() -> None:
    """Nothing but the weight is saved: that is the memory that freezing saves."""
    x, w, b = inputs(2, 5, 72, 40, torch.float32)
    saved: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        frozen_linear(x.requires_grad_(), w, b.requires_grad_())
    assert [t.data_ptr() for t in saved] == [w.data_ptr()]


def test_a_weight_that_wants_a_gradient_is_an_error() -> None:
    x, w, b = inputs(2, 5, 72, 40, torch.float32)
    with pytest.raises(RuntimeError, match="frozen in DiffFit and gets no gradient"):
        frozen_linear(x, w.requires_grad_(), b)


def test_errors_name_both_sides() -> None:
    x, w, b = inputs(2, 5, 72, 40, torch.float32)
    with pytest.raises(ValueError, match=r"in = 72, the last size of x \(2, 5, 72\); got \(40, 71\)"):
        frozen_linear(x, w[:, 1:], b)
    with pytest.raises(TypeError, match=r"one dtype; got torch.float32 and torch.bfloat16"):
        frozen_linear(x, w.bfloat16(), b)
