"""What is special to frozen_qkv; the rest is in test_ops.py and test_kernels.py."""

from __future__ import annotations

import pytest
import torch
from op_cases import qkv_chain, qkv_inputs, true_attention, true_qkv_chain
from optest import F32, assert_close, check_numbers, draw, rooms

from difffit_fast.ops import use_kernels
from difffit_fast.ops.frozen_qkv import frozen_qkv


@pytest.mark.parametrize("kernels", rooms())
def test_key_bias_never_matters_and_value_bias_passes_through(kernels: str) -> None:
    """What frozen_qkv leaves out: adding b_k changes nothing, adding b_v adds b_v to the attention's output."""
    h, w, bq, _ = (x.double() for x in qkv_inputs((2, 9, 72), F32, F32))
    bk, bv = draw(72), draw(72)
    full = true_attention(h @ w.t() + torch.cat([bq, bk, bv]))
    with use_kernels(kernels):
        assert_close(qkv_chain(h.float(), w.float(), bq.float()) + bv.float(), full, 1e-5, "attention")


@pytest.mark.parametrize("kernels", rooms())
def test_gamma_of_exactly_zero_still_learns(kernels: str) -> None:
    """dγ is read from the output divided by γ, so a γ of 0 is nudged by an invisible amount."""
    h, w, bq, gamma = qkv_inputs((1, 9, 72), F32, F32)
    gamma[[0, 80, 150]] = 0
    with use_kernels(kernels):
        check_numbers(qkv_chain, true_qkv_chain, [h, w, bq, gamma], (True, False, True, True), 1e-5)


def test_errors() -> None:
    h, w, bq, _ = qkv_inputs((2, 5, 72), F32, F32)
    with pytest.raises(ValueError, match="3·71 rows"):
        frozen_qkv(h, w, bq[1:])
    with pytest.raises(RuntimeError, match="qkv is frozen"):
        frozen_qkv(h, w.requires_grad_(), bq)
