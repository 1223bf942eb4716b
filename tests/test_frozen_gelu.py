"""What is special to frozen_gelu; the rest is in test_ops.py. Its kernels are those of frozen_mlp and frozen_linear."""

from __future__ import annotations

import pytest
import torch
from op_cases import gelu_inputs
from optest import F32
from torch import Tensor

from difffit_fast.ops.frozen_gelu import frozen_gelu

SIZE = (2, 5, 72, 40)


def test_the_forward_pass_is_that_of_pytorch_bit_for_bit() -> None:
    x, w, b = gelu_inputs(SIZE, F32, F32)
    want = torch.nn.functional.gelu(torch.nn.functional.linear(x, w, b), approximate="tanh")
    assert torch.equal(frozen_gelu(x, w, b), want)


def test_only_the_pre_activation_is_kept() -> None:
    x, w, b = gelu_inputs(SIZE, F32, F32)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        frozen_gelu(x.requires_grad_(), w, b.requires_grad_())
    assert [tuple(t.shape) for t in saved] == [tuple(w.shape), (10, 40)]
    torch.testing.assert_close(saved[1], torch.nn.functional.linear(x, w, b).detach().view(10, 40))


@pytest.mark.parametrize(("m", "n", "k"), [(0, 5, 4), (3, 0, 4), (3, 5, 0)])
def test_sizes_of_zero(m: int, n: int, k: int) -> None:
    x, b = torch.randn(2, m, k, requires_grad=True), torch.randn(n, requires_grad=True)
    y = frozen_gelu(x, torch.randn(n, k), b)
    assert y.shape == (2, m, n)
    y.sum().backward()
    assert x.grad.shape == x.shape and b.grad.shape == b.shape


def test_a_weight_that_wants_a_gradient_is_an_error() -> None:
    x, w, b = gelu_inputs(SIZE, F32, F32)
    with pytest.raises(RuntimeError, match="frozen in DiffFit and gets no gradient"):
        frozen_gelu(x, w.requires_grad_(), b)
