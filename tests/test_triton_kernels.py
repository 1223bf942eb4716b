"""The numbers of every Triton kernel, against float64 references written from the formulas and differentiated by autograd.

Without a GPU the kernels run in Triton's interpreter. That mode is chosen when Triton is first imported, and another test
of the same session may have imported it for compiling; so outside of it this file runs itself once more, in a process of
its own. With a GPU the same tests also run on the device.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton", allow_module_level=True)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
runs_here = pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="runs in the interpreter")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# Relative error of a whole tensor: rounding of the result to its type, and for float32 the arithmetic itself.
TOLERANCE = {F32: 2e-6, BF16: 3e-3, F16: 4e-4}
EPS = 1e-6
# (B, T, D, residual stream, branches, plan): every T of 1, 37, 77, every D of 72, 384, 1152, one width that no access
# divides, every pair of types that is used; cut as the device (or interpreter) at hand is, or as Hopper is with a
# program for every row, or with chunks of several rows.
CASES = [
    (2, 37, 72, F32, BF16, "own"),
    (1, 77, 384, F32, F32, "own"),
    (2, 1, 1152, F32, BF16, "own"),
    (1, 37, 1152, BF16, BF16, "own"),
    (2, 3, 37, F32, F16, "own"),
    (2, 1, 384, F32, BF16, "hopper"),
    (1, 5, 1152, F32, BF16, "hopper, long chunks"),
    (1, 5, 384, BF16, BF16, "hopper, long chunks"),
]
MATRICES = [
    (77, 72, BF16, "own"),
    (37, 384, F32, "own"),
    (1, 1152, BF16, "own"),
    (37, 37, F16, "own"),
    (40, 72, BF16, "hopper, long chunks"),
]
ROWS_CASES = pytest.mark.parametrize(("B", "T", "D", "x_dtype", "h_dtype", "plan"), CASES, indirect=["plan"])


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_in_the_interpreter() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not gpu", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    print(run.stdout[-6000:], run.stderr[-2000:])
    assert run.returncode == 0
    assert " passed" in run.stdout


@pytest.fixture
def plan(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """How the kernels are cut; see CASES."""
    from difffit_fast.kernels import config

    if request.param != "own":
        monkeypatch.setattr(config, "INTERPRETER", 90)
        monkeypatch.setattr(config, "_device_architecture", lambda index: 90)
    if request.param == "hopper, long chunks":
        monkeypatch.setitem(config._MULTIPROCESSORS, 90, 1)
    for cached in (config.row_plan, config.tile_plan):
        cached.cache_clear()
    yield
    for cached in (config.row_plan, config.tile_plan):
        cached.cache_clear()


def randn(*shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
    return torch.randn(*shape).to(dtype).to(DEVICE)


def exact(tensor: torch.Tensor) -> torch.Tensor:
    """A float64 leaf on the CPU."""
    return tensor.detach().double().cpu().requires_grad_()


def close(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype, slack: float = 1.0) -> None:
    assert got.dtype == dtype and got.shape == want.shape
    error = (got.double().cpu() - want).norm() / want.norm().clamp_min(1e-30)
    assert error < slack * TOLERANCE[dtype], f"relative error {error:.2e}, {slack * TOLERANCE[dtype]:.1e} allowed"


def same_bits(first: tuple[torch.Tensor, ...], second: tuple[torch.Tensor, ...]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def adaln_reference(x: torch.Tensor, a: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    xhat = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + EPS).sqrt()
    return xhat * a[:, None] + c[:, None]


@runs_here
@ROWS_CASES
def test_adaln(plan: None, B: int, T: int, D: int, x_dtype: torch.dtype, h_dtype: torch.dtype) -> None:
    from difffit_fast.kernels.adaln import adaln_backward, adaln_forward

    x = (3 + 2 * randn(B, T, D)).to(x_dtype)  # a mean that a one-pass variance would feel
    a, c, dh = randn(B, D), randn(B, D), randn(B, T, D, dtype=h_dtype)
    x64, a64, c64 = exact(x), exact(a), exact(c)
    h64 = adaln_reference(x64, a64, c64)
    dx64, da64, dc64 = torch.autograd.grad(h64, (x64, a64, c64), dh.double().cpu())

    h, mean, rstd = adaln_forward(x, a, c, EPS, h_dtype)
    close(h, h64, h_dtype)
    close(mean, x64.mean(-1), F32)
    close(rstd, (x64.var(-1, unbiased=False) + EPS).rsqrt(), F32)
    grads = adaln_backward(dh, x, a, mean, rstd)
    close(grads[0], dx64, x_dtype)
    close(grads[1], da64, F32)
    close(grads[2], dc64, F32)
    same_bits(grads, adaln_backward(dh, x, a, mean, rstd))


@runs_here
@ROWS_CASES
def test_residual(plan: None, B: int, T: int, D: int, x_dtype: torch.dtype, h_dtype: torch.dtype) -> None:
    from difffit_fast.kernels.residual import residual_backward, residual_forward

    x, f, s, r = randn(B, T, D, dtype=x_dtype), randn(B, T, D, dtype=h_dtype), randn(B, D), randn(B, D)
    dy = randn(B, T, D, dtype=x_dtype)
    f64, s64, r64 = exact(f), exact(s), exact(r)
    y64 = exact(x) + s64[:, None] * f64 + r64[:, None]
    df64, ds64, dr64 = torch.autograd.grad(y64, (f64, s64, r64), dy.double().cpu())

    close(residual_forward(x, f, s, r), y64, x_dtype)
    grads = residual_backward(dy, f, s)
    close(grads[0], df64, h_dtype)
    close(grads[1], ds64, F32)
    close(grads[2], dr64, F32)
    same_bits(grads, residual_backward(dy, f, s))


@runs_here
@pytest.mark.parametrize("other_use", [True, False])
@ROWS_CASES
def test_residual_adaln(
    plan: None, B: int, T: int, D: int, x_dtype: torch.dtype, h_dtype: torch.dtype, other_use: bool
) -> None:
    from difffit_fast.kernels.residual import residual_adaln_backward, residual_adaln_forward

    x, f = randn(B, T, D, dtype=x_dtype), randn(B, T, D, dtype=h_dtype)
    s, r, a, c = (randn(B, D) for _ in range(4))
    dh = randn(B, T, D, dtype=h_dtype)
    dy = randn(B, T, D, dtype=x_dtype) if other_use else None

    y, h, mean, rstd = residual_adaln_forward(x, f, s, r, a, c, EPS)
    close(y, x.double().cpu() + s.double().cpu()[:, None] * f.double().cpu() + r.double().cpu()[:, None], x_dtype)
    y64, a64, c64, f64 = exact(y), exact(a), exact(c), exact(f)  # the statistics are those of y as stored
    h64 = adaln_reference(y64, a64, c64)
    close(h, h64, h_dtype)
    close(mean, y64.mean(-1), F32, slack=4)  # a mean near 0
    close(rstd, (y64.var(-1, unbiased=False) + EPS).rsqrt(), F32)

    g64, da64, dc64 = torch.autograd.grad(h64, (y64, a64, c64), dh.double().cpu())
    if dy is not None:
        g64 = g64 + dy.double().cpu()
    grads = residual_adaln_backward(dh, dy, y, f, s, a, mean, rstd)
    close(grads[0], g64, x_dtype)
    close(grads[1], g64 * s.double().cpu()[:, None], h_dtype)
    close(grads[2], (g64 * f64).sum(1), F32)
    # Without the other use the sum over tokens of LayerNorm's gradient has nothing left but what cancels in it.
    close(grads[3], g64.sum(1), F32, slack=1 if other_use else 4)
    close(grads[4], da64, F32)
    close(grads[5], dc64, F32)
    same_bits(grads, residual_adaln_backward(dh, dy, y, f, s, a, mean, rstd))


@runs_here
@pytest.mark.parametrize(("M", "N", "dtype", "plan"), MATRICES, indirect=["plan"])
def test_gelu(plan: None, M: int, N: int, dtype: torch.dtype) -> None:
    from difffit_fast.kernels.mlp import gelu_backward, gelu_forward

    u, dg = (2 * randn(M, N)).to(dtype), randn(M, N, dtype=dtype)
    u64 = exact(u)
    g64 = torch.nn.functional.gelu(u64, approximate="tanh")
    (du64,) = torch.autograd.grad(g64, u64, dg.double().cpu())
    close(gelu_forward(u), g64, dtype)
    grads = gelu_backward(dg, u)
    close(grads[0], du64, dtype)
    close(grads[1], du64.sum(0), F32)
    same_bits(grads, gelu_backward(dg, u))


@runs_here
def test_gelu_far_out() -> None:
    """Where u³ overflows, GELU is u or 0 and its slope 1 or 0."""
    from difffit_fast.kernels.mlp import gelu_backward, gelu_forward

    u = torch.tensor([[-3e38, -1e20, -12.0, -0.0, 0.0, 12.0, 1e20, 3e38]], device=DEVICE)
    assert torch.equal(gelu_forward(u).cpu(), u.cpu().clamp_min(0))
    du, _ = gelu_backward(torch.ones_like(u), u)
    assert torch.allclose(du.cpu(), torch.tensor([[0.0, 0, 0, 0.5, 0.5, 1, 1, 1]]), atol=1e-7)


@runs_here
@pytest.mark.parametrize(("M", "N", "dtype", "plan"), MATRICES, indirect=["plan"])
def test_colsum(plan: None, M: int, N: int, dtype: torch.dtype) -> None:
    from difffit_fast.kernels.colsum import colsum

    x = randn(M, N, dtype=dtype)
    close(colsum(x), x.double().cpu().sum(0), F32)
    same_bits((colsum(x),), (colsum(x),))


@runs_here
@pytest.mark.parametrize(("M", "D", "dtype", "plan"), MATRICES, indirect=["plan"])
def test_qkv(plan: None, M: int, D: int, dtype: torch.dtype) -> None:
    """γ and the query bias, through an attention-like product: the key third of dγ is only then what the query's is."""
    from difffit_fast.kernels.colsum import qkv_backward, qkv_scale

    z = randn(M, 3 * D, dtype=dtype)
    gamma, bias_q = 1 + 0.3 * randn(3 * D), randn(D)
    z64, gamma64, bias64 = exact(z), exact(gamma), exact(bias_q)
    qkv64 = (z64 + torch.cat([bias64, torch.zeros(2 * D).double()])) * gamma64
    qkv = z.clone()
    assert qkv_scale(qkv, gamma, bias_q) is None
    close(qkv, qkv64, dtype)

    # A loss that knows q and k only by q_c·k_c, one channel at a time, has Σ dq·q = Σ dk·k in every channel.
    q, k, v = (t.detach().double().cpu() for t in qkv.split(D, dim=1))
    weight = torch.randn(M, D).double()
    dqkv = torch.cat([weight * k, weight * q, torch.randn(M, D).double()], dim=1).to(dtype).to(DEVICE)
    dqkv64 = dqkv.double().cpu()
    dz, dbias_q, dgamma = qkv_backward(dqkv, qkv, gamma)
    close(dz, dqkv64 * gamma64, dtype)
    close(dbias_q, gamma64[:D] * dqkv64[:, :D].sum(0), F32)
    product = (dqkv64 * torch.cat([q, k, v], dim=1)).sum(0)
    want = product / gamma64.detach()
    close(dgamma[:D], want[:D], F32)
    close(dgamma[2 * D :], want[2 * D :], F32)
    close(dgamma[D : 2 * D], product[:D] / gamma64[D : 2 * D].detach(), F32)
    close(dgamma[D : 2 * D], want[D : 2 * D], F32, slack=1 if dtype == F32 else 1e4)  # dq and dk are rounded each
    same_bits((dz, dbias_q, dgamma), qkv_backward(dqkv, qkv, gamma))

    same, dbias_q, none = qkv_backward(dqkv, None, None)
    assert same is dqkv and none.shape == (0,)
    close(dbias_q, dqkv64[:, :D].sum(0), F32)
    with pytest.raises(ValueError, match="needs qkv"):
        qkv_backward(dqkv, None, gamma)


@runs_here
@pytest.mark.parametrize(("B", "T"), [(0, 5), (2, 0)])
def test_empty(B: int, T: int) -> None:
    """Nothing is launched; outputs are empty and sums are zero."""
    from difffit_fast.kernels import adaln, colsum, mlp, residual

    D = 8
    x, h, v, stat = randn(B, T, D), randn(B, T, D, dtype=BF16), randn(B, D), randn(B, T)
    assert [t.shape for t in adaln.adaln_forward(x, v, v, EPS, BF16)] == [(B, T, D), (B, T), (B, T)]
    dx, *sums = adaln.adaln_backward(h, x, v, stat, stat)
    assert dx.shape == (B, T, D) and all(s.shape == (B, D) and not s.any() for s in sums)
    assert residual.residual_forward(x, h, v, v).shape == (B, T, D)
    df, *sums = residual.residual_backward(x, h, v)
    assert df.dtype == BF16 and all(s.shape == (B, D) and not s.any() for s in sums)
    assert len(residual.residual_adaln_forward(x, h, v, v, v, v, EPS)) == 4
    dx, df, *sums = residual.residual_adaln_backward(h, None, x, h, v, v, stat, stat)
    assert len(sums) == 4 and all(s.shape == (B, D) and not s.any() for s in sums)
    u, gamma = randn(0, 3 * D, dtype=BF16), randn(3 * D)
    assert mlp.gelu_forward(u).shape == (0, 3 * D)
    assert not mlp.gelu_backward(u, u)[1].any()
    assert colsum.colsum(u).shape == (3 * D,) and not colsum.colsum(u).any()
    colsum.qkv_scale(u, gamma, gamma[:D])
    assert [t.shape for t in colsum.qkv_backward(u, u, gamma)] == [(0, 3 * D), (D,), (3 * D,)]
    assert [t.shape for t in colsum.qkv_backward(u, None, None)] == [(0, 3 * D), (D,), (0,)]


@pytest.mark.gpu
def test_index_beyond_31_bits() -> None:
    """The last rows of a matrix of more than 2³¹ values."""
    from difffit_fast.kernels import adaln, colsum, mlp

    N, D = 4608, 1152
    M = (1 << 31) // N + 300
    u = torch.zeros(M, N, dtype=BF16, device="cuda")
    u[-64:] = torch.randn(64, N, device="cuda")
    want = torch.nn.functional.gelu(u[-64:].double(), approximate="tanh")
    close(mlp.gelu_forward(u)[-64:], want.cpu(), BF16)
    du, db = mlp.gelu_backward(u, u)
    close(db, du.double().sum(0).cpu() if du.numel() < 1 << 20 else du[-64:].double().sum(0).cpu(), F32, slack=3e3)
    close(colsum.colsum(u), u[-64:].double().sum(0).cpu(), F32)
    x = u.view(-1, 256, D)[: (1 << 31) // (256 * D) + 4].contiguous()
    x[-1] = torch.randn(256, D, device="cuda")
    v = torch.ones(x.shape[0], D, device="cuda")
    h, _, _ = adaln.adaln_forward(x, v, v, EPS, BF16)
    close(h[-1:], adaln_reference(x[-1:].double(), v[-1:].double(), v[-1:].double()).cpu(), BF16)


@pytest.mark.gpu
def test_graph_capture() -> None:
    """A replayed graph gives the bits of a direct call, on inputs changed in between."""
    from difffit_fast.kernels import residual

    B, T, D = 4, 256, 1152
    dh, f = (torch.randn(B, T, D, device="cuda").bfloat16() for _ in range(2))
    dy, y = (torch.randn(B, T, D, device="cuda") for _ in range(2))
    s, a = (torch.randn(B, D, device="cuda") for _ in range(2))
    mean, rstd = y.mean(-1), y.var(-1, unbiased=False).rsqrt()
    arguments = (dh, dy, y, f, s, a, mean, rstd)
    residual.residual_adaln_backward(*arguments)  # compile before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = residual.residual_adaln_backward(*arguments)
    dh.copy_(torch.randn(B, T, D, device="cuda"))
    graph.replay()
    same_bits(captured, residual.residual_adaln_backward(*arguments))
