"""What is special to residual and residual_adaln; the rest is in test_ops.py and test_kernels.py."""

from __future__ import annotations

import pytest
from op_cases import residual_inputs, true_residual_adaln
from optest import F32, TOLERANCE, check_numbers, rooms

from difffit_fast.ops import use_kernels
from difffit_fast.ops.residual import residual, residual_adaln


@pytest.mark.parametrize("kernels", rooms())
@pytest.mark.parametrize("used", [0, 1], ids=["only y", "only h"])
def test_one_output_unused(kernels: str, used: int) -> None:
    """The last join has no further reader of y; a reader of y alone needs no LayerNorm backward."""
    with use_kernels(kernels):
        many = residual_inputs(4, (2, 7, 72), F32, F32)
        needs = (True, True, True, True, used == 1, used == 1)
        truth = lambda *z: true_residual_adaln(*z)[used]  # noqa: E731
        check_numbers(lambda *z: residual_adaln(*z)[used], truth, many, needs, TOLERANCE[F32])


def test_errors_name_both_shapes() -> None:
    x, branch, gate, bias, scale, shift = residual_inputs(4, (2, 5, 72), F32, F32)
    with pytest.raises(ValueError, match=r"branch must have the shape of x, \(2, 5, 72\); got \(2, 4, 72\)"):
        residual(x, branch[:, :4], gate, bias)
    with pytest.raises(ValueError, match=r"shift must be one vector per sample, shape \(2, 72\); got \(2, 71\)"):
        residual_adaln(x, branch, gate, bias, scale, shift[:, 1:])
