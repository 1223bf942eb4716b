from __future__ import annotations

import pytest
import torch
from optest import (
    TOLERANCE,
    assert_close,
    check_compiled,
    check_layouts,
    check_needs_input_grad,
    check_numbers,
    draw,
    rooms,
)
from torch import Tensor

from difffit_fast.ops import attention, frozen_qkv, use_kernels
from difffit_fast.ops.colsum import colsum_op

HEADS = 3
SIZES = [(1, 1, 72), (2, 77, 72), (0, 4, 72), (2, 37, 96)]  # B, T, D


@pytest.mark.parametrize("kernels", rooms())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(0, 5), (1, 1), (1000, 37), (77, 1152), (4099, 8)], ids=str)
def test_colsum(kernels: str, size: tuple[int, int], dtype: torch.dtype) -> None:
    x = draw(*size, dtype=dtype)
    with use_kernels(kernels):
        got = colsum_op(x)
        assert got.dtype == torch.float32 and torch.equal(got, colsum_op(x))
        scale = x.double().abs().sum(0).max().item() if x.numel() else 1.0
        assert (got.double() - x.double().sum(0)).abs().max().item() <= 1e-6 * scale
        torch.library.opcheck(torch.ops.difffit_fast.colsum.default, (x,))


def inputs(b: int, t: int, d: int, dtype: torch.dtype) -> list[Tensor]:
    weight = draw(3 * d, d) * 1.5 / d**0.5
    return [
        draw(b, t, d, dtype=dtype),
        weight.to(dtype),
        draw(d, dtype=torch.float32),
        draw(3 * d, dtype=torch.float32, shift=1),
    ]


def truth(h: Tensor, weight: Tensor, bias_q: Tensor, gamma: Tensor | None = None) -> Tensor:
    """Attention of an ordinary projection: the whole chain, since γ of the keys is read from the query third."""
    z = h @ weight.t() + torch.cat([bias_q, bias_q.new_zeros(2 * bias_q.shape[0])])
    q, k, v = (z if gamma is None else z * gamma).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    return (torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, -1) @ v).transpose(1, 2).flatten(2)


def chain(h: Tensor, weight: Tensor, bias_q: Tensor, gamma: Tensor | None = None) -> Tensor:
    return attention(frozen_qkv(h, weight, bias_q, gamma), HEADS)


@pytest.mark.parametrize("kernels", rooms())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gamma", [False, True], ids=["plain", "gamma"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_frozen_qkv_and_attention(kernels: str, size: tuple[int, int, int], gamma: bool, dtype: torch.dtype) -> None:
    many = inputs(*size, dtype)
    needs = (True, False, True, True)
    n = 4 if gamma else 3
    with use_kernels(kernels):
        check_numbers(chain, truth, many[:n], needs[:n], TOLERANCE[dtype] * (3 if dtype == torch.bfloat16 else 4))


@pytest.mark.parametrize("kernels", rooms())
def test_key_bias_never_matters_and_value_bias_passes_through(kernels: str) -> None:
    """What frozen_qkv leaves out: adding b_k changes nothing, adding b_v adds b_v to the attention's output."""
    h, w, bq, _ = (x.double() for x in inputs(2, 9, 72, torch.float32))
    bk, bv = draw(72), draw(72)
    z = h @ w.t() + torch.cat([bq, bk, bv])
    q, k, v = z.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    full = (torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, -1) @ v).transpose(1, 2).flatten(2)
    with use_kernels(kernels):
        assert_close(chain(h.float(), w.float(), bq.float()) + bv.float(), full, 1e-5, "attention")


@pytest.mark.parametrize("kernels", rooms())
def test_gamma_of_exactly_zero_still_learns(kernels: str) -> None:
    """dγ is read from the output divided by γ, so a γ of 0 is nudged by an invisible amount."""
    h, w, bq, gamma = inputs(1, 9, 72, torch.float32)
    gamma[[0, 80, 150]] = 0
    with use_kernels(kernels):
        check_numbers(chain, truth, [h, w, bq, gamma], (True, False, True, True), 1e-5)


@pytest.mark.parametrize("kernels", rooms())
def test_needs_input_grad_layouts_compile_opcheck(kernels: str) -> None:
    many, needs = inputs(2, 5, 72, torch.float32), (True, False, True, True)
    with use_kernels(kernels):
        check_needs_input_grad(chain, many, needs)
        check_layouts(chain, many, needs)
        check_compiled(chain, many, needs)
        h, w, bq, gamma = many
        args = (h.requires_grad_(), w, bq.requires_grad_(), gamma.requires_grad_())
        torch.library.opcheck(torch.ops.difffit_fast.frozen_qkv.default, args)
        torch.library.opcheck(torch.ops.difffit_fast.frozen_qkv.default, (*args[:3], None))


def test_errors() -> None:
    h, w, bq, _ = inputs(2, 5, 72, torch.float32)
    with pytest.raises(ValueError, match="3·71 rows"):
        frozen_qkv(h, w, bq[1:])
    with pytest.raises(RuntimeError, match="qkv is frozen"):
        frozen_qkv(h, w.requires_grad_(), bq)
