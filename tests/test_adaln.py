"""What is special to adaln; the rest is in test_ops.py and test_kernels.py."""

from __future__ import annotations

import pytest
import torch
from op_cases import adaln_inputs, true_adaln
from optest import BF16, F32, TOLERANCE, check_numbers, rooms

from difffit_fast.ops import use_kernels
from difffit_fast.ops.adaln import adaln


@pytest.mark.parametrize("kernels", rooms())
def test_statistics_are_float32_for_bf16_rows_far_from_zero(kernels: str) -> None:
    """A mean of 100 with a spread of 1: statistics in bf16 would lose the spread."""
    x, scale, shift = adaln_inputs((1, 9, 384), F32, BF16)
    with use_kernels(kernels):
        op = lambda *z: adaln(*z, out_dtype=torch.bfloat16)  # noqa: E731
        check_numbers(op, true_adaln, [x + 100, scale, shift], (True,) * 3, TOLERANCE[BF16])


def test_errors_name_both_shapes() -> None:
    x, scale, shift = adaln_inputs((2, 5, 72), F32, F32)
    with pytest.raises(ValueError, match=r"scale must be one vector per sample, shape \(2, 72\); got \(1, 72\)"):
        adaln(x, scale[:1], shift)
    with pytest.raises(ValueError, match="x must be"):
        adaln(x[0], scale, shift)
