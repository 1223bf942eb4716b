"""What is special to colsum; the rest is in test_ops.py and test_kernels.py."""

from __future__ import annotations

import pytest
import torch
from optest import draw, rooms

from difffit_fast.ops import use_kernels
from difffit_fast.ops.colsum import colsum


@pytest.mark.parametrize("kernels", rooms())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sums_that_cancel(kernels: str, dtype: torch.dtype) -> None:
    """Against the sum of absolute values: what is lost in float32 does not grow with the rows."""
    x = draw(4099, 37, dtype=dtype)
    with use_kernels(kernels):
        got = colsum(x)
    assert got.dtype == torch.float32
    assert (got.double() - x.double().sum(0)).abs().max() <= 1e-6 * x.double().abs().sum(0).max()


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"x must be \(rows, columns\); got shape \(2, 3, 4\)"):
        colsum(torch.zeros(2, 3, 4))
