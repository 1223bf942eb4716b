"""attention as one C++ operation: numbers against float64, zero and tiny factors, same bits, special values, errors."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from op_cases import leaves
from optest import BF16, F32, close, draw
from torch import Tensor

from difffit_fast import _ext

pytestmark = pytest.mark.skipif(not _ext.load(), reason="the C++ extension is not built")
ops = torch.ops.difffit_fast_cpp

HEAD_SIZES = [4, 12, 24, 64, 72, 80, 96, 128]
TOKENS = [1, 5, 37, 77, 256, 1100]
# A score's own rounding, about d·2^-24 of its size, becomes a relative error of its probability.
SLACK = 2e-6


def truth(z: Tensor, vectors: Tensor, heads: int) -> Tensor:
    """The definition, for any dtype; vectors (G, R, D)."""
    q, k, v = z.chunk(3, -1)
    bias = vectors[:, :1]
    factor, value_factor = (vectors[:, 1:2], vectors[:, 2:]) if vectors.shape[1] == 3 else (1.0, 1.0)
    split = lambda x: x.unflatten(-1, (heads, -1)).transpose(1, 2)  # noqa: E731
    q, k, v = map(split, (factor * (q + bias), k, value_factor * v))
    p = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), -1)
    return (p @ v).transpose(1, 2).flatten(2)


def scores(z: Tensor, vectors: Tensor, heads: int) -> Tensor:
    q, k, _ = z.chunk(3, -1)
    factor = vectors[:, 1:2] if vectors.shape[1] == 3 else 1.0
    split = lambda x: x.unflatten(-1, (heads, -1)).transpose(1, 2)  # noqa: E731
    return split(factor * (q + vectors[:, :1])) @ split(k).transpose(-1, -2) / math.sqrt(q.shape[-1] / heads)


def inputs(
    b: int, t: int, h: int, d: int, dtype: torch.dtype = F32, g: int = 1, r: int = 3
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(b + t + h + d)
    vectors = torch.cat([draw(g, 1, h * d), 1 + 0.3 * draw(g, 2, h * d)], 1)[:, :r].to(F32).contiguous()
    return draw(b, t, 3 * h * d, dtype=dtype), vectors, draw(b, t, h * d, dtype=dtype)


def both(z: Tensor, vectors: Tensor, do: Tensor, heads: int) -> list[Tensor]:
    o, lse = ops.attention_forward(z, vectors, heads)
    return [o, lse, *ops.attention_backward(do, z, vectors, o, lse, heads)]


def check(z: Tensor, vectors: Tensor, do: Tensor, heads: int, slack: float = SLACK) -> None:
    o, lse, dz, dvectors = both(z, vectors, do, heads)
    assert (o.dtype, lse.dtype, dz.dtype, dvectors.dtype) == (z.dtype, F32, z.dtype, F32)
    z64, vectors64 = leaves(z, vectors)
    want = truth(z64, vectors64, heads)
    close("o", o, want.detach(), slack)
    close("lse", lse, scores(z64, vectors64, heads).logsumexp(-1).detach(), slack)
    # delta comes from o as it was stored: with its rounding taken out of the chain, dS = P·(dP - sum do·o).
    want_dz, want_dvectors = torch.autograd.grad(want, (z64, vectors64), do.double())
    coarse = 1e-2 if z.dtype == BF16 else slack
    for i, name in enumerate(("dz_q", "dz_k", "dz_v")):
        got, true = (x.chunk(3, -1)[i] for x in (dz, want_dz))
        # Of one token the first two vanish: held against the values they are the small difference of.
        scale = max(true.abs().max(), want_dz.abs().max() / 4)
        assert (got.double() - true).abs().max() <= coarse * scale, f"{name}: {(got.double() - true).abs().max() / scale:.2e}"
    for row, name in zip(range(vectors.shape[1]), ("db", "dg", "dgamma_v"), strict=False):
        error = (dvectors[:, row].double() - want_dvectors[:, row]).abs().max()
        scale = max(want_dvectors[:, row].abs().max(), want_dz.abs().max())
        assert error <= coarse * scale, f"{name}: {error / scale:.2e}"


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("t", TOKENS)
@pytest.mark.parametrize("d", HEAD_SIZES)
def test_numbers(d: int, t: int, dtype: torch.dtype) -> None:
    h = 1 if t > 1000 else 2
    check(*inputs(2, t, h, d, dtype), h)
