"""What is special to frozen_mlp; the rest is in test_ops.py and test_kernels.py."""

from __future__ import annotations

import pytest
import torch
from op_cases import mlp_inputs
from optest import F32, TOLERANCE, check_numbers, rooms
from torch import Tensor

from difffit_fast.ops import use_kernels
from difffit_fast.ops.frozen_mlp import frozen_mlp


@pytest.mark.parametrize("kernels", rooms())
def test_gelu_far_from_zero(kernels: str) -> None:
    """Saturated activations: tanh must not overflow, and the slope must go to 0 and 1."""
    u = torch.tensor([-1e4, -100.0, -20.0, -6.0, -0.75, 0.0, 0.75, 6.0, 20.0, 100.0, 1e4])
    eye = torch.eye(u.numel())
    with use_kernels(kernels):
        check_numbers(
            lambda h: frozen_mlp(h, eye, torch.zeros(u.numel()), eye),
            lambda h: torch.nn.functional.gelu(h, approximate="tanh"),
            [u[None, None]],
            (True,),
            TOLERANCE[F32],
        )


@pytest.mark.parametrize(("d", "f"), [(0, 4), (4, 0), (0, 0)])
def test_widths_of_zero(d: int, f: int) -> None:
    h, b1 = torch.randn(2, 3, d, requires_grad=True), torch.randn(f, requires_grad=True)
    out = frozen_mlp(h, torch.randn(f, d), b1, torch.randn(d, f))
    assert out.shape == (2, 3, d) and not out.any()
    out.sum().backward()
    assert h.grad.shape == h.shape and b1.grad.shape == b1.shape


def test_only_the_pre_activation_is_kept() -> None:
    h, w1, b1, w2 = mlp_inputs((2, 5, 72, 288), F32, F32)
    saved: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        frozen_mlp(h.requires_grad_(), w1, b1.requires_grad_(), w2)
    kept = [t for t in saved if t.data_ptr() not in (w1.data_ptr(), w2.data_ptr())]
    assert [tuple(t.shape) for t in kept] == [(10, 288)]


def test_with_a_bias_each_the_bare_product_is_kept() -> None:
    h, w1, b1, w2 = mlp_inputs((2, 5, 72, 288), F32, F32, each=True)
    _, u = torch.ops.difffit_fast.frozen_mlp(h, w1, b1, w2)
    torch.testing.assert_close(u, h.view(10, 72) @ w1.t())
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        frozen_mlp(h.requires_grad_(), w1, b1.requires_grad_(), w2)
    kept = [t for t in saved if t.data_ptr() not in (w1.data_ptr(), w2.data_ptr(), b1.data_ptr())]
    assert [tuple(t.shape) for t in kept] == [(10, 288)]


@pytest.mark.parametrize("way", ["library", "pieces"])
@pytest.mark.parametrize("kernels", rooms())
def test_samples_with_biases_of_their_own_are_calls_of_their_own(
    kernels: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIFFFIT_FAST_PRODUCTS", way)
    h, w1, b1, w2 = mlp_inputs((3, 37, 48, 272), F32, F32, each=True)
    upstream = torch.randn(3, 37, 48)

    def call(h: Tensor, b1: Tensor, upstream: Tensor) -> list[Tensor]:
        h, b1 = h.clone().requires_grad_(), b1.clone().requires_grad_()
        y = frozen_mlp(h, w1, b1, w2)
        return [y.detach(), *torch.autograd.grad(y, (h, b1), upstream)]

    with use_kernels(kernels):
        together = call(h, b1, upstream)
        for i in range(3):
            for bias in (b1[i : i + 1], b1[i]):  # of one sample (1, F) and (F,) say the same
                alone = call(h[i : i + 1], bias, upstream[i : i + 1])
                for got, want in zip(together, alone, strict=True):
                    want = want.view(got[i].shape)
                    torch.testing.assert_close(got[i], want, rtol=1e-5, atol=3e-6 * want.abs().max().item())


def test_errors() -> None:
    h, w1, b1, w2 = mlp_inputs((2, 5, 72, 40), F32, F32)
    with pytest.raises(ValueError, match=r"fc2's weight must be \(out, 40\)"):
        frozen_mlp(h, w1, b1, w2[:, 1:])
    with pytest.raises(ValueError, match=r"fc1's bias must be \(40,\) or \(2, 40\); got \(3, 40\)"):
        frozen_mlp(h, w1, b1.expand(3, 40), w2)
    with pytest.raises(RuntimeError, match="fc2 is frozen"):
        frozen_mlp(h, w1, b1, w2.requires_grad_())
