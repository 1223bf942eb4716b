"""What is special to attention; the rest is in test_ops.py and test_kernels.py."""

from __future__ import annotations

import pytest
import torch
from op_cases import HEADS, true_attention
from optest import F32, TOLERANCE, check_numbers, draw, rooms

from difffit_fast import DiffFitError
from difffit_fast.ops import attention as module
from difffit_fast.ops import use_kernels
from difffit_fast.ops.attention import attention


@pytest.mark.parametrize("kernels", rooms())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(1, 1, 24), (2, 77, 72), (3, 37, 12), (0, 5, 24)], ids=str)
def test_recomputed_probabilities(kernels: str, size: tuple[int, int, int], dtype: torch.dtype, monkeypatch) -> None:
    monkeypatch.setattr(module, "KEEP_PROBABILITIES_UP_TO", 0)
    b, t, d = size
    with use_kernels(kernels):
        qkv = draw(b, t, 3 * d, dtype=dtype)
        check_numbers(lambda x: attention(x, HEADS, "bmm"), true_attention, [qkv], (True,), 2 * TOLERANCE[dtype])


@pytest.mark.parametrize("kernels", rooms())
def test_samples_in_several_groups(kernels: str, monkeypatch) -> None:
    """As many samples at a time as fit the cache: here two, two and one."""
    monkeypatch.setattr(module, "PROBABILITIES_AT_A_TIME", 2 * HEADS * 11 * 11)
    with use_kernels(kernels):
        qkv = draw(5, 11, 72, dtype=F32)
        check_numbers(lambda x: attention(x, HEADS, "bmm"), true_attention, [qkv], (True,), 2 * TOLERANCE[F32])


@pytest.mark.parametrize("backend", ["sdpa", "sdpa-math", "sdpa-flash"])
def test_sdpa_backends(backend: str) -> None:
    qkv = draw(2, 37, 72, dtype=F32)
    check_numbers(lambda x: attention(x, HEADS, backend), true_attention, [qkv], (True,), 4 * TOLERANCE[F32])


@pytest.mark.parametrize("kernels", rooms())
def test_large_scores_do_not_overflow(kernels: str) -> None:
    with use_kernels(kernels):
        qkv = 30 * draw(1, 17, 72, dtype=F32)
        check_numbers(lambda x: attention(x, HEADS, "bmm"), true_attention, [qkv], (True,), 1e-4)


def test_an_impossible_choice_lists_the_possible_ones() -> None:
    qkv = draw(1, 4, 72, dtype=F32)
    with pytest.raises(DiffFitError, match=r"attention='xformers' cannot run on cpu.*possible: bmm, sdpa"):
        attention(qkv, HEADS, "xformers")
    with pytest.raises(DiffFitError, match="attention must be one of auto, bmm"):
        attention(qkv, HEADS, "flashy")
    with pytest.raises(ValueError, match="multiple of 3·5 heads"):
        attention(qkv, 5)
