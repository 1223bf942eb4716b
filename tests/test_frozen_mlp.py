from __future__ import annotations

import pytest
import torch
from optest import TOLERANCE, check_compiled, check_layouts, check_needs_input_grad, check_numbers, draw, rooms
from torch import Tensor

from difffit_fast.ops import frozen_mlp, use_kernels

SIZES = [(1, 1, 72, 288), (2, 77, 72, 100), (0, 4, 72, 288), (3, 37, 100, 33)]  # B, T, D, F
NEEDS = (True, False, True, False)


def truth(h: Tensor, w1: Tensor, b1: Tensor, w2: Tensor) -> Tensor:
    return torch.nn.functional.gelu(h @ w1.t() + b1, approximate="tanh") @ w2.t()


def inputs(b: int, t: int, d: int, f: int, dtype: torch.dtype) -> list[Tensor]:
    w1, w2 = draw(f, d) / d**0.5, draw(d, f) / f**0.5
    return [draw(b, t, d, dtype=dtype), (2 * w1).to(dtype), draw(f, dtype=torch.float32), w2.to(dtype)]


@pytest.mark.parametrize("kernels", rooms())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_numbers(kernels: str, size: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    # bf16 rounds the pre-activation and the activation on the way: three roundings in the forward, four in the backward
    tolerance = TOLERANCE[dtype] * (2 if dtype == torch.bfloat16 else 1)
    with use_kernels(kernels):
        check_numbers(frozen_mlp, truth, inputs(*size, dtype), NEEDS, tolerance)


@pytest.mark.parametrize("kernels", rooms())
def test_needs_input_grad_layouts_compile_opcheck(kernels: str) -> None:
    many = inputs(2, 5, 72, 40, torch.float32)
    with use_kernels(kernels):
        check_needs_input_grad(frozen_mlp, many, NEEDS)
        check_layouts(frozen_mlp, many, NEEDS)
        check_compiled(frozen_mlp, many, NEEDS)
        h, w1, b1, w2 = many
        args = (h.requires_grad_(), w1, b1.requires_grad_(), w2)
        torch.library.opcheck(torch.ops.difffit_fast.frozen_mlp.default, args)


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
            3e-6,
        )


def test_only_the_pre_activation_is_kept() -> None:
    h, w1, b1, w2 = inputs(2, 5, 72, 288, torch.float32)
    saved: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        frozen_mlp(h.requires_grad_(), w1, b1.requires_grad_(), w2)
    kept = [t for t in saved if t.data_ptr() not in (w1.data_ptr(), w2.data_ptr())]
    assert [tuple(t.shape) for t in kept] == [(10, 288)]


def test_errors() -> None:
    h, w1, b1, w2 = inputs(2, 5, 72, 40, torch.float32)
    with pytest.raises(ValueError, match=r"fc2's weight must be \(out, 40\)"):
        frozen_mlp(h, w1, b1, w2[:, 1:])
    with pytest.raises(RuntimeError, match="fc2 is frozen"):
        frozen_mlp(h, w1, b1, w2.requires_grad_())
