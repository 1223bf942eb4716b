from __future__ import annotations

import sys

import pytest
import torch
from optest import TOLERANCE, check_compiled, check_layouts, check_numbers, draw, rooms
from torch import Tensor

from difffit_fast import DiffFitError
from difffit_fast.ops import attention, use_kernels

module = sys.modules["difffit_fast.ops.attention"]  # the package binds the function to this name
HEADS = 3


def truth(qkv: Tensor) -> Tensor:
    q, k, v = qkv.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    return (torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, -1) @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("kernels", rooms())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("keep", [True, False], ids=["kept", "recomputed"])
@pytest.mark.parametrize("size", [(1, 1, 24), (2, 77, 72), (3, 37, 12), (0, 5, 24)], ids=str)
def test_numbers(kernels: str, size: tuple[int, int, int], keep: bool, dtype: torch.dtype, monkeypatch) -> None:
    monkeypatch.setattr(module, "KEEP_PROBABILITIES_UP_TO", 10**6 if keep else 0)
    b, t, d = size
    with use_kernels(kernels):
        qkv = draw(b, t, 3 * d, dtype=dtype)
        check_numbers(lambda x: attention(x, HEADS, "bmm"), truth, [qkv], (True,), 2 * TOLERANCE[dtype])


@pytest.mark.parametrize("backend", ["sdpa", "sdpa-math", "sdpa-flash"])
def test_sdpa_backends(backend: str) -> None:
    check_numbers(lambda x: attention(x, HEADS, backend), truth, [draw(2, 37, 72, dtype=torch.float32)], (True,), 1e-5)


@pytest.mark.parametrize("kernels", rooms())
def test_large_scores_do_not_overflow(kernels: str) -> None:
    with use_kernels(kernels):
        qkv = 30 * draw(1, 17, 72, dtype=torch.float32)
        check_numbers(lambda x: attention(x, HEADS, "bmm"), truth, [qkv], (True,), 1e-4)


@pytest.mark.parametrize("kernels", rooms())
def test_layouts_compile_opcheck(kernels: str) -> None:
    op = lambda x: attention(x, HEADS)  # noqa: E731
    with use_kernels(kernels):
        qkv = draw(2, 5, 72, dtype=torch.float32)
        check_layouts(op, [qkv], (True,))
        check_compiled(op, [qkv], (True,))
        for keep in (True, False):
            torch.library.opcheck(torch.ops.difffit_fast.attention.default, (qkv.requires_grad_(), HEADS, keep))


def test_an_impossible_choice_lists_the_possible_ones() -> None:
    qkv = draw(1, 4, 72, dtype=torch.float32)
    with pytest.raises(DiffFitError, match=r"attention='xformers' cannot run on cpu.*possible: bmm, sdpa"):
        attention(qkv, HEADS, "xformers")
    with pytest.raises(DiffFitError, match="attention must be one of auto, bmm"):
        attention(qkv, HEADS, "flashy")
    with pytest.raises(ValueError, match="multiple of 3·5 heads"):
        attention(qkv, 5)
