"""What is special to frozen_linear; the rest is in test_ops.py."""

from __future__ import annotations

import pytest
import torch
from op_cases import linear_inputs, scaled_linear_inputs
from optest import F32, TOLERANCE, check_numbers
from torch import Tensor

from difffit_fast.ops.frozen_linear import frozen_linear

SIZE = (2, 5, 72, 40)


def test_without_bias_and_2d() -> None:
    x, w, _ = linear_inputs(SIZE, F32, F32)
    check_numbers(lambda x: frozen_linear(x, w), lambda x: x @ w.double().t(), [x[0]], (True,), TOLERANCE[F32])


@pytest.mark.parametrize(("m", "n", "k"), [(0, 5, 4), (3, 0, 4), (3, 5, 0), (0, 0, 0)])
def test_sizes_of_zero_are_those_of_a_linear_layer(m: int, n: int, k: int) -> None:
    inputs = [torch.randn(2, m, k), torch.randn(n, k), torch.randn(n)]
    ours = [x.clone().requires_grad_(i != 1) for i, x in enumerate(inputs)]
    theirs = [x.clone().requires_grad_(i != 1) for i, x in enumerate(inputs)]
    got, want = frozen_linear(*ours), torch.nn.functional.linear(*theirs)
    torch.testing.assert_close(got, want)
    got.sum().backward()
    want.sum().backward()
    for a, b in zip((ours[0], ours[2]), (theirs[0], theirs[2]), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_the_input_is_not_kept() -> None:
    """Nothing but the weight is saved: that is the memory that freezing saves."""
    x, w, b = linear_inputs(SIZE, F32, F32)
    saved: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        frozen_linear(x.requires_grad_(), w, b.requires_grad_())
    assert [t.data_ptr() for t in saved] == [w.data_ptr()]


def test_with_gamma_the_product_is_kept_and_not_the_input() -> None:
    """γ's gradient needs z; y is not kept beside it."""
    x, w, b, gamma = scaled_linear_inputs(SIZE, F32, F32)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        frozen_linear(x.requires_grad_(), w, b.requires_grad_(), gamma.requires_grad_())
    assert [tuple(t.shape) for t in saved] == [tuple(w.shape), (10, 40), (40,)]
    torch.testing.assert_close(saved[1], torch.nn.functional.linear(x, w, b).detach().view(10, 40))


def test_a_weight_that_wants_a_gradient_is_an_error() -> None:
    x, w, b = linear_inputs(SIZE, F32, F32)
    with pytest.raises(RuntimeError, match="frozen in DiffFit and gets no gradient"):
        frozen_linear(x, w.requires_grad_(), b)


def test_errors_name_both_sides() -> None:
    x, w, b = linear_inputs(SIZE, F32, F32)
    with pytest.raises(ValueError, match=r"in = 72, the last size of x \(2, 5, 72\); got \(40, 71\)"):
        frozen_linear(x, w[:, 1:], b)
    with pytest.raises(TypeError, match=r"one dtype; got torch.float32 and torch.bfloat16"):
        frozen_linear(x, w.bfloat16(), b)
    with pytest.raises(ValueError, match=r"gamma must be one factor for each of 40 outputs; got \(39,\)"):
        frozen_linear(x, w, b, torch.ones(39))
