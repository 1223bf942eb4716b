"""What is special to attention; the rest is in test_ops.py and test_kernels.py."""

from __future__ import annotations

import pytest
import torch
from op_cases import HEADS, attention_inputs, true_attention
from optest import BF16, F16, F32, TOLERANCE, check_numbers, draw, rooms

from difffit_fast import DiffFitError
from difffit_fast.ops import use_kernels
from difffit_fast.ops.attention import attention

SIZES = [(1, 2, 24), (2, 77, 72), (0, 5, 24)]


@pytest.mark.parametrize("vectors", ["", "bias", "gamma", "each"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16, F16, torch.float64], ids=str)
def test_math(vectors: str, size: tuple[int, int, int], dtype: torch.dtype) -> None:
    inputs = attention_inputs(vectors, size, F32, dtype)
    if dtype == torch.float64:
        inputs = [x.double() for x in inputs]
    op = lambda *given: attention(given[0], HEADS, *given[1:], backend="math")  # noqa: E731
    check_numbers(op, true_attention, inputs, (True,) * len(inputs), 4 * TOLERANCE[dtype])


@pytest.mark.parametrize("kernels", rooms())
def test_large_scores_do_not_overflow(kernels: str) -> None:
    with use_kernels(kernels):
        qkv = 30 * draw(1, 17, 72, dtype=F32)
        # The probabilities of the backward come from lse, whose last bit weighs the more the larger the scores (here 4,000).
        check_numbers(lambda x: attention(x, HEADS), true_attention, [qkv], (True,), 1e-2)


@pytest.mark.parametrize("kernels", rooms())
@pytest.mark.parametrize("value", [0.0, -1.0, 1e-30])
def test_gamma_of_any_value(kernels: str, value: float) -> None:
    """Nothing is divided by γ."""
    qkv, bias, gamma = attention_inputs("gamma", (2, 9, 72), F32, F32)
    gamma[::5] = value
    with use_kernels(kernels):
        op = lambda z, b, g: attention(z, HEADS, b, g)  # noqa: E731
        check_numbers(op, true_attention, [qkv, bias, gamma], (True,) * 3, 4 * TOLERANCE[F32])


def test_an_impossible_choice_lists_the_possible_ones() -> None:
    qkv = draw(1, 4, 72, dtype=F32)
    with pytest.raises(DiffFitError, match=r"attention='xformers' cannot run on cpu.*possible: fused, math"):
        attention(qkv, HEADS, backend="xformers")
    with pytest.raises(DiffFitError, match="attention must be one of auto, fused"):
        attention(qkv, HEADS, backend="flashy")
    with pytest.raises(ValueError, match="multiple of 3·5 heads"):
        attention(qkv, 5)
    with pytest.raises(ValueError, match=r"must be \(1 or 1, 1 or 3, 24\)"):
        attention(qkv, HEADS, torch.zeros(23))
