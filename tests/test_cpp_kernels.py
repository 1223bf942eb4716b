"""The C++ kernels against float64: numbers, rounding, determinism, empty and odd sizes, errors, every instruction set."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from difffit_fast import _ext

pytestmark = pytest.mark.skipif(not _ext.load(), reason="the C++ extension is not built")
ops = torch.ops.difffit_fast_cpp

F32, BF16 = torch.float32, torch.bfloat16
PAIRS = [(F32, F32), (F32, BF16), (BF16, BF16)]  # dtype of the residual stream, dtype of the branch
WIDTHS = [37, 72, 384, 1152]
ROWS = [(3, 37), (1, 1), (1, 77), (3, 1)]  # samples, tokens
EPS = 1e-6


def rand(*shape: int, dtype: torch.dtype = F32, seed: int = 0, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1000 * len(shape) + sum(shape))
    return (torch.randn(shape, generator=generator) * scale + shift).to(dtype)


def close(name: str, got: Tensor, want: Tensor, slack: float = 2e-6) -> None:
    """bfloat16 may be off by its rounding (2^-8 of the value); anything by ``slack`` of the largest value."""
    assert got.shape == want.shape, f"{name}: {tuple(got.shape)}, expected {tuple(want.shape)}"
    if not want.numel():
        return
    unit = 2**-8 if got.dtype == BF16 else 0.0
    excess = (got.double() - want).abs() - 1.001 * unit * want.abs() - slack * want.abs().max()
    assert excess.max() <= 0, f"{name}: off by {(got.double() - want).abs().max():.2e} of {want.abs().max():.2e}"


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [t.double().requires_grad_() for t in tensors]


# -- the formulas, in float64 with autograd ------------------------------------------------------------------------
def check_adaln(B: int, T: int, D: int, X: torch.dtype, H: torch.dtype) -> None:
    x, dh = rand(B, T, D, dtype=X, seed=1, scale=2, shift=0.5), rand(B, T, D, dtype=H, seed=2)
    a, c = rand(B, D, seed=3, shift=1), rand(B, D, seed=4)
    h, mean, rstd = ops.adaln_forward(x, a, c, EPS, H)
    grads = ops.adaln_backward(dh, x, a, mean, rstd)
    assert (h.dtype, mean.dtype, grads[0].dtype, grads[1].dtype) == (H, F32, X, F32)

    x64, a64, c64 = leaves(x, a, c)
    want = F.layer_norm(x64, (D,), eps=EPS) * a64[:, None] + c64[:, None]
    want.backward(dh.double())
    close("h", h, want.detach())
    close("mean", mean, x.double().mean(-1))
    close("rstd", rstd, 1 / (x.double().var(-1, unbiased=False) + EPS).sqrt())
    for name, got, leaf in zip(("dx", "da", "dc"), grads, (x64, a64, c64), strict=True):
        close(name, got, leaf.grad)


def check_residual(B: int, T: int, D: int, X: torch.dtype, H: torch.dtype) -> None:
    x, dy = rand(B, T, D, dtype=X, seed=1), rand(B, T, D, dtype=X, seed=2)
    f, dh = rand(B, T, D, dtype=H, seed=3), rand(B, T, D, dtype=H, seed=4)
    s, r, a, c = (rand(B, D, seed=i) for i in (5, 6, 7, 8))

    x64, f64, s64, r64 = leaves(x, f, s, r)
    want = x64 + s64[:, None] * f64 + r64[:, None]
    want.backward(dy.double())
    y = ops.residual_forward(x, f, s, r)
    assert y.dtype == X
    close("y", y, want.detach())
    for name, got, leaf in zip(("df", "ds", "dr"), ops.residual_backward(dy, f, s), (f64, s64, r64), strict=True):
        close(name, got, leaf.grad)

    y2, h, mean, rstd = ops.residual_adaln_forward(x, f, s, r, a, c, EPS)
    assert torch.equal(y, y2) and h.dtype == H
    for with_dy in (True, False):
        grads = ops.residual_adaln_backward(dh, dy if with_dy else None, y, f, s, a, mean, rstd)
        # LayerNorm sees y as it was stored: take the rounding out of the chain x, f -> y.
        y64, a64, c64 = leaves(y, a, c)
        want_h = F.layer_norm(y64, (D,), eps=EPS) * a64[:, None] + c64[:, None]
        want_h.backward(dh.double())
        g = y64.grad + (dy.double() if with_dy else 0)
        wanted = (g, g * s.double()[:, None], (g * f.double()).sum(1), g.sum(1), a64.grad, c64.grad)
        close("h", h, want_h.detach())
        for name, got, want in zip(("dx", "df", "ds", "dr", "da", "dc"), grads, wanted, strict=True):
            # Without dy the sum of g over a row vanishes, so for one token of few features dr is small against g.
            close(name, got, want, slack=1e-5 if name in ("ds", "dr") else 2e-6)


def check_mlp(M: int, N: int, dtype: torch.dtype) -> None:
    u, dg = rand(M, N, dtype=dtype, seed=1, scale=3), rand(M, N, dtype=dtype, seed=2)
    (u64,) = leaves(u)
    want = F.gelu(u64, approximate="tanh")
    want.backward(dg.double())
    du, db = ops.gelu_backward(dg, u)
    close("g", ops.gelu_forward(u), want.detach())
    close("du", du, u64.grad)
    close("db", db, u64.grad.sum(0))


def check_colsum(M: int, D: int, dtype: torch.dtype) -> None:
    z, dqkv = rand(M, 3 * D, dtype=dtype, seed=1), rand(M, 3 * D, dtype=dtype, seed=2)
    gamma, bias = rand(3 * D, seed=3, shift=0.3), rand(D, seed=4)
    close("colsum", ops.colsum(z), z.double().sum(0))

    scale = gamma.double()
    qkv = z.clone()
    assert ops.qkv_scale(qkv, gamma, bias) is None
    wide = z.double()
    close("qkv", qkv, torch.cat([wide[:, :D] + bias.double(), wide[:, D:]], 1) * scale)

    dz, dbias, dgamma = ops.qkv_backward(dqkv, qkv, gamma)
    d64 = dqkv.double()
    dots = (d64 * qkv.double()).sum(0)
    dots = torch.cat([dots[:D], dots[:D], dots[2 * D :]])  # the keys' sum is taken from the queries
    close("dz", dz, d64 * scale)
    close("dbias_q", dbias, scale[:D] * d64[:, :D].sum(0))
    close("dgamma", dgamma * gamma, dots)

    dz, dbias, none = ops.qkv_backward(dqkv, None, None)
    assert torch.equal(dz, dqkv) and none.shape == (0,)
    close("dbias_q without gamma", dbias, d64[:, :D].sum(0))


def check_attention(N: int, T: int, S: int, G: torch.dtype, P: torch.dtype) -> None:
    for scale in (0.125, 3.0, -0.5):
        scores, dp = rand(N, T, S, dtype=P, seed=1, scale=4), rand(N, T, S, dtype=G, seed=2)
        p, ds = scores.clone(), dp.clone()
        assert ops.softmax_forward(p, scale) is None
        close("p", p, torch.softmax(scores.double() * scale, -1))
        assert ops.softmax_backward(ds, p, scale) is None
        p64, dp64 = p.double(), dp.double()
        close("ds", ds, scale * p64 * (dp64 - (dp64 * p64).sum(-1, keepdim=True)))


@pytest.mark.parametrize("D", WIDTHS)
@pytest.mark.parametrize(("X", "H"), PAIRS)
def test_rows(D: int, X: torch.dtype, H: torch.dtype) -> None:
    for B, T in ROWS if D < 1000 else ROWS[:2]:
        check_adaln(B, T, D, X, H)
        check_residual(B, T, D, X, H)


@pytest.mark.parametrize("D", WIDTHS)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_matrices(D: int, dtype: torch.dtype) -> None:
    for M in (1, 37, 77):
        check_mlp(M, D, dtype)
        check_colsum(M, D, dtype)


@pytest.mark.parametrize(("G", "P"), [*PAIRS, (BF16, F32)])
def test_softmax(G: torch.dtype, P: torch.dtype) -> None:
    for N, T, S in ((1, 1, 1), (3, 5, 7), (2, 37, 77), (6, 9, 256)):
        check_attention(N, T, S, G, P)


# -- accuracy and special values -----------------------------------------------------------------------------------
def test_gelu_is_accurate_everywhere() -> None:
    u = torch.cat([torch.linspace(-15, 15, 200_001), torch.logspace(-20, 30, 500), -torch.logspace(-20, 30, 500)])[None]
    (u64,) = leaves(u)
    want = F.gelu(u64, approximate="tanh")
    error = (ops.gelu_forward(u).double() - want.detach()).abs() / want.detach().abs().clamp(min=1)
    assert error.max() <= 2e-7
    want.sum().backward()
    du, _ = ops.gelu_backward(torch.ones_like(u), u)
    slope = torch.where(u64.abs() > 1e6, (u64 > 0).double(), u64.grad)  # inf - inf in the formula
    assert (du.double() - slope).abs().max() <= 4e-7


def test_nan_and_infinity_stay_visible() -> None:
    for dtype in (F32, BF16):
        u = torch.tensor([[math.nan, -math.nan, math.inf, 1.0]], dtype=dtype)
        g = ops.gelu_forward(u)
        assert g[0, :2].isnan().all() and g[0, 2] == math.inf and g[0, 3].isfinite()
        assert ops.gelu_backward(torch.ones_like(u), u)[0][0, :2].isnan().all()
        x = rand(1, 3, 40, dtype=dtype)
        x[0, 1, 7] = math.nan
        ones = torch.ones(1, 40)
        h, _, _ = ops.adaln_forward(x, ones, ones, EPS, dtype)
        assert h[0, 1].isnan().all() and h[0, ::2].isfinite().all()
        p = rand(1, 2, 20, dtype=dtype)
        p[0, 0, 19] = math.nan
        ops.softmax_forward(p, 1.0)
        assert p[0, 0].isnan().all() and p[0, 1].isfinite().all()


def test_softmax_of_large_and_far_apart_scores() -> None:
    x = torch.tensor([[[3e38, 3e38, -3e38], [-3e38, -3e38, -3e38], [0.0, -200.0, -80.0]]])
    ops.softmax_forward(x, 1.0)
    want = [[0.5, 0.5, 0.0], [1 / 3, 1 / 3, 1 / 3], [1.0, 0.0, math.exp(-80)]]
    torch.testing.assert_close(x[0].double(), torch.tensor(want, dtype=torch.float64), rtol=1e-5, atol=0)
    # exp over its whole range: p/(1-p) of two scores is e^-d.
    d = torch.linspace(0, 86, 4001)
    pair = torch.stack([torch.zeros_like(d), -d], -1)[None].contiguous()
    ops.softmax_forward(pair, 1.0)
    odds = pair[0, :, 1].double() / pair[0, :, 0].double()
    assert (odds * d.double().exp() - 1).abs().max() <= 5e-7


def test_bfloat16_rounds_to_nearest_even_for_every_kind_of_number() -> None:
    bits = torch.randint(-(2**31), 2**31 - 1, (64, 97), dtype=torch.int64, generator=torch.Generator().manual_seed(0))
    ties = (torch.arange(97) << 16) + 0x3F808000
    special = torch.tensor([0x7F800000, 0x7FFFFFFF, 0x7F800001, 0x7F7FFFFF, 0x00000001, 0x80000000 - 2**32, -1])
    bits[0], bits[1, :7] = ties, special
    dy = bits.to(torch.int32).view(F32)[None].contiguous()
    df, _, _ = ops.residual_backward(dy, torch.zeros(1, 64, 97, dtype=BF16), torch.ones(1, 97))
    want = dy.to(BF16)
    assert torch.equal(df.isnan(), want.isnan())
    assert torch.equal(df.nan_to_num().view(torch.int16), want.nan_to_num().view(torch.int16))


# -- same bits -----------------------------------------------------------------------------------------------------
@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def everything(B: int, T: int, D: int, X: torch.dtype, H: torch.dtype) -> list[Tensor]:
    """The outputs of all operations on the same inputs."""
    x, f = rand(B, T, D, dtype=X, seed=1), rand(B, T, D, dtype=H, seed=2)
    s, r, a, c = (rand(B, D, seed=i) for i in range(3, 7))
    y, h, mean, rstd = ops.residual_adaln_forward(x, f, s, r, a, c, EPS)
    out = [y, h, mean, rstd, ops.residual_forward(x, f, s, r), *ops.adaln_forward(x, a, c, EPS, H)]
    out += [*ops.residual_backward(y, f, s), *ops.adaln_backward(h, y, a, mean, rstd)]
    for dy in (x, None):
        out += ops.residual_adaln_backward(h, dy, y, f, s, a, mean, rstd)
    u, v = rand(B * T, 3 * D, dtype=H, seed=7), rand(B * T, 3 * D, dtype=H, seed=8)
    out += [ops.gelu_forward(u), *ops.gelu_backward(v, u), ops.colsum(u)]
    gamma = rand(3 * D, seed=9, shift=2)
    w, p, dp = u.clone(), rand(B, T, D, dtype=H, seed=1), rand(B, T, D, dtype=H, seed=2)
    ops.qkv_scale(w, gamma, gamma[:D].contiguous())
    ops.softmax_forward(p, 0.3)
    ops.softmax_backward(dp, p, 0.3)
    return [*out, w, *ops.qkv_backward(v, u, gamma), *ops.qkv_backward(v, None, None), p, dp]


@pytest.mark.parametrize(("X", "H"), PAIRS)
def test_same_bits_twice_and_with_any_number_of_threads(X: torch.dtype, H: torch.dtype, threads: None) -> None:
    torch.set_num_threads(1)
    one = everything(2, 150, 200, X, H)
    again = everything(2, 150, 200, X, H)
    for n in (2, 3):
        torch.set_num_threads(n)
        many = everything(2, 150, 200, X, H)
        for i, (p, q, r) in enumerate(zip(one, again, many, strict=True)):
            assert torch.equal(p, q) and torch.equal(p, r), f"output {i} differs with {n} threads"


@pytest.mark.parametrize(("X", "H"), PAIRS)
def test_empty(X: torch.dtype, H: torch.dtype) -> None:
    for B, T, D in ((0, 5, 8), (2, 0, 8), (2, 5, 0), (0, 0, 0)):
        everything(B, T, D, X, H)
    f = torch.empty(2, 0, 8, dtype=H)
    for total in ops.residual_backward(f.to(X), f, torch.ones(2, 8))[1:]:
        assert torch.equal(total, torch.zeros(2, 8))
    assert torch.equal(ops.colsum(torch.empty(0, 9)), torch.zeros(9))


# -- errors --------------------------------------------------------------------------------------------------------
def test_errors_say_what_was_expected_and_what_came() -> None:
    x, v = torch.zeros(2, 3, 8), torch.zeros(2, 8)
    cases = [
        (
            lambda: ops.adaln_forward(x[0], v, v, EPS, F32),
            r"adaln_forward: x must have 3 dimensions; got shape \(3, 8\)",
        ),
        (
            lambda: ops.adaln_forward(x, v[:, :7], v, EPS, F32),
            r"a must be contiguous; got shape \(2, 7\) with strides \(8, 1\)",
        ),
        (lambda: ops.adaln_forward(x, v[:1], v, EPS, F32), r"a must have shape \(2, 8\); got \(1, 8\)"),
        (lambda: ops.adaln_forward(x, v, v.bfloat16(), EPS, F32), r"c must be float32; got BFloat16"),
        (lambda: ops.adaln_forward(x.half(), v, v, EPS, F32), r"x must be float32 or bfloat16; got Half"),
        (lambda: ops.adaln_forward(x, v, v, EPS, torch.half), r"out_dtype must be float32 or bfloat16; got Half"),
        (
            lambda: ops.residual_forward(x, x[:, :2].contiguous(), v, v),
            r"f must have shape \(2, 3, 8\); got \(2, 2, 8\)",
        ),
        (
            lambda: ops.residual_adaln_backward(
                x, x.bfloat16(), x, x, v, v, v[:, :3].contiguous(), v[:, :3].contiguous()
            ),
            r"dy must have the dtype of y, Float; got BFloat16",
        ),
        (lambda: ops.gelu_backward(x[0], x[0].bfloat16()), r"dg must have the dtype of u, BFloat16; got Float"),
        (lambda: ops.qkv_scale(x[0], v[0], v[0]), r"qkv must have a multiple of 3 columns; got shape \(3, 8\)"),
        (lambda: ops.qkv_scale(torch.zeros(3), v[0], v[0]), r"qkv must have 2 dimensions; got shape \(3,?\)"),
        (
            lambda: ops.qkv_backward(torch.zeros(4, 6), torch.zeros(4, 6), None),
            r"both be given, or neither; got only qkv",
        ),
        (lambda: ops.softmax_forward(x.transpose(1, 2), 1.0), r"scores must be contiguous"),
        (lambda: ops.softmax_forward(x.half(), 1.0), r"scores must be float32 or bfloat16; got Half"),
    ]
    for call, message in cases:
        with pytest.raises(RuntimeError, match=message):
            call()


# -- instruction sets ----------------------------------------------------------------------------------------------
def capability() -> str:
    from difffit_fast import _C

    return _C.cpu_capability().lower()


def check_everything(name: str) -> None:
    """One odd size of every check, for a process of its own: the choice is made once, at the first call."""
    os.environ["DIFFFIT_FAST_CPU"] = "sse9"
    with pytest.raises(RuntimeError, match="must be avx512, avx2 or baseline; got 'sse9'"):
        ops.colsum(torch.zeros(2, 2))
    os.environ["DIFFFIT_FAST_CPU"] = name
    B, T, D = 2, 37, 53
    for X, H in PAIRS:
        check_adaln(B, T, D, X, H)
        check_residual(B, T, D, X, H)
        check_mlp(B * T, D, H)
        check_colsum(B * T, D, H)
        check_attention(B, T, D, X, H)
    test_bfloat16_rounds_to_nearest_even_for_every_kind_of_number()
    test_gelu_is_accurate_everywhere()
    test_nan_and_infinity_stay_visible()
    test_softmax_of_large_and_far_apart_scores()
    assert capability() == name


@pytest.mark.parametrize("name", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_of_this_processor(name: str) -> None:
    best = capability()
    order = ["baseline", "avx2", "avx512"]
    if order.index(name) >= order.index(best):
        pytest.skip(f"this processor has {best}, which the other tests use")
    script = f"import test_cpp_kernels as t; t.check_everything({name!r})"
    command = [sys.executable, "-c", script]
    run = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
