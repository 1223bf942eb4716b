from __future__ import annotations

import torch
from optest import draw

from difffit_fast.ops import gemm


def test_half_precision_products_are_rounded_once() -> None:
    """On any CPU: as accurate as float32 products rounded at the end."""
    x, w = draw(37, 300, dtype=torch.bfloat16), draw(50, 300, dtype=torch.bfloat16)
    exact = x.double() @ w.double().t()
    assert (gemm.linear(x, w).double() - exact).abs().max() <= 2**-8 * exact.abs().max()
