"""What is special to modulation with vectors of each sample; the rest is in test_ops.py."""

from __future__ import annotations

import itertools

import pytest
import torch
from op_cases import draw, true_modulation
from optest import BF16, F32, TOLERANCE
from torch import Tensor

from difffit_fast.ops.modulation import modulation

B, J, D = 3, 4, 24
SIZES = {"bias": (3 * J + 2, D), "norm": (J + 1, 2, D), "gamma": (J, D), "beta": (J, D)}


def inputs(each: tuple[bool, ...], dtype: torch.dtype) -> list[Tensor]:
    sizes = [(B, *size) if own else size for own, size in zip(each, SIZES.values(), strict=True)]
    return [draw(B, 3 * J + 2, D, dtype=dtype), *(draw(*size, dtype=F32, shift=1) for size in sizes)]


def sample_by_sample(m: Tensor, *vectors: Tensor) -> Tensor:
    dims = [len(size) for size in SIZES.values()]
    return torch.cat([
        true_modulation(m[i : i + 1], *(v[i] if v.dim() > dim else v for v, dim in zip(vectors, dims, strict=True)))
        for i in range(B)
    ], 1)  # fmt: skip


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("each", [e for e in itertools.product((False, True), repeat=4) if any(e)])
def test_vectors_of_each_sample_against_float64(each: tuple[bool, ...], dtype: torch.dtype) -> None:
    given = [x.requires_grad_() for x in inputs(each, dtype)]
    exact = [x.detach().double().requires_grad_() for x in given]
    found, true = modulation(*given), sample_by_sample(*exact)
    torch.testing.assert_close(found.double(), true, rtol=1e-5, atol=1e-5)
    loss = torch.randn(true.shape, dtype=torch.float64)
    (found * loss).sum().backward()
    (true * loss).sum().backward()
    for mine, theirs in zip(given, exact, strict=True):
        scale = theirs.grad.abs().max()
        assert mine.grad.dtype == mine.dtype
        assert (mine.grad.double() - theirs.grad).abs().max() < max(TOLERANCE[mine.dtype], 1e-5) * scale


def test_none_and_errors() -> None:
    m, bias, _, _, beta = inputs((True, True, True, True), F32)
    one = torch.ones(B, J + 1, 2, D)
    one[:, :, 1] = 0
    torch.testing.assert_close(
        modulation(m, bias, None, None, beta), modulation(m, bias, one, torch.ones(B, J, D), beta)
    )
    for vectors, wrong in (
        ((bias[:2], None, None, beta), "bias"),
        ((bias, None, torch.ones(B, J + 1, D), beta), "gamma"),
        ((bias, torch.ones(2, J + 1, 2, D), None, beta), "norm"),
    ):
        with pytest.raises(ValueError, match=f"modulation: {wrong} must have shape"):
            modulation(m, *vectors)
