"""Both products of the MLP as one C++ operation: numbers against float64, odd numbers of rows, same bits, errors, and the
choice between it and PyTorch's products."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from optest import BF16, F32, KERNEL_SLACK
from optest import draw as draw_double
from test_cpp_kernels import INSTRUCTION_SETS, capability, check_apart
from torch import Tensor
from torch.nn import functional as F

from difffit_fast import _ext, kernel_report
from difffit_fast.errors import DiffFitError
from difffit_fast.ops.block import block
from difffit_fast.ops.frozen_mlp import frozen_mlp
from difffit_fast.ops.pieces import in_pieces

pytestmark = pytest.mark.skipif(not _ext.load(), reason="the C++ extension is not built")
ops = torch.ops.difffit_fast_cpp

ROWS = [0, 1, 5, 31, 32, 33, 255, 300, 1100]
SIZES = [(16, 16), (32, 144), (48, 272), (80, 528), (384, 1536)]  # D, F: pieces of the hidden channels are 256 wide


def draw(*size: int, dtype: torch.dtype = F32) -> Tensor:
    return draw_double(*size, dtype=dtype)


def dtypes() -> list[torch.dtype]:
    """Those that the kernels multiply here."""
    return [F32, BF16] if capability() == "avx512_bf16" else [F32]


DTYPES = pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
# Of the largest value: in bfloat16 what is stored and what a product takes are rounded.
SLACK = {F32: KERNEL_SLACK, BF16: 2**-6}


def inputs(m: int, d: int, f: int, dtype: torch.dtype = F32) -> tuple[Tensor, ...]:
    """dbranch, h, w1, b1, w2."""
    if dtype not in dtypes():
        pytest.skip(f"the kernels do not multiply {dtype} on this processor")
    torch.manual_seed(m + d + f)
    w1, w2 = 2 * draw(f, d) / d**0.5, draw(d, f) / f**0.5
    return draw(m, d, dtype=dtype), draw(m, d, dtype=dtype), w1.to(dtype), draw(f), w2.to(dtype)


def both(dbranch: Tensor, h: Tensor, w1: Tensor, b1: Tensor, w2: Tensor) -> list[Tensor]:
    branch, u = ops.mlp_forward(h, w1, b1, w2)
    return [branch, u, *ops.mlp_backward(dbranch, w1, w2, u, True)]


def check(m: int, d: int, f: int, dtype: torch.dtype = F32) -> None:
    given = inputs(m, d, f, dtype)
    dbranch, h, w1, b1, w2 = (x.double() for x in given)
    h.requires_grad_()
    got = both(*given)
    u = h @ w1.t() + b1
    u.retain_grad()
    branch = F.gelu(u, approximate="tanh") @ w2.t()
    branch.backward(dbranch)
    wanted = {"branch": branch, "u": u, "dh": h.grad, "db1": u.grad.sum(0)}
    for (name, want), x in zip(wanted.items(), got, strict=True):
        assert x.shape == want.shape and x.dtype == (F32 if name == "db1" else dtype), name
        size = want.detach().abs().max().item() if want.numel() else 0.0
        if name == "db1" and m:  # of terms that cancel
            size = u.grad.abs().sum(0).max().item()
        error = (x.double() - want.detach()).abs().max().item() if want.numel() else 0.0
        assert error <= SLACK[dtype] * size, f"{name}: off by {error / size:.1e} of {size:.1e}"


def each(samples: int, t: int, d: int, f: int, dtype: torch.dtype = F32) -> list[Tensor]:
    dbranch, h, w1, _, w2 = inputs(samples * t, d, f, dtype)
    b1 = draw(samples, f)
    branch, u = ops.mlp_forward(h, w1, b1, w2)
    return [dbranch, h, w1, b1, w2, branch, u, *ops.mlp_backward(dbranch, w1, w2, u, True, b1)]


def check_with_a_bias_each(samples: int, t: int, d: int, f: int, dtype: torch.dtype = F32) -> None:
    """u is the bare product, and db1 is (samples, F)."""
    dbranch, h, w1, b1, w2, *got = each(samples, t, d, f, dtype)
    h64, b64 = (x.double().requires_grad_() for x in (h, b1))
    bare = h64 @ w1.double().t()
    full = bare + b64.repeat_interleave(t, 0)
    full.retain_grad()
    branch = F.gelu(full, approximate="tanh") @ w2.double().t()
    branch.backward(dbranch.double())
    sizes = {"db1": full.grad.abs().view(samples, t, f).sum(1).max().item() if samples * t else 0.0}
    wanted = {"branch": branch, "u": bare, "dh": h64.grad, "db1": b64.grad}
    for (name, want), x in zip(wanted.items(), got, strict=True):
        assert x.shape == want.shape and x.dtype == (F32 if name == "db1" else dtype), name
        if want.numel():
            size = sizes.get(name, want.detach().abs().max().item())
            error = (x.double() - want.detach()).abs().max().item()
            assert error <= SLACK[dtype] * size, f"{name}: off by {error:.1e} of {size:.1e}"


@pytest.mark.parametrize(("d", "f"), SIZES[1:4])
@pytest.mark.parametrize(("samples", "t"), [(0, 4), (2, 0), (1, 33), (3, 1), (5, 31), (3, 37), (2, 300), (9, 64)])
@DTYPES
def test_numbers_with_a_bias_each(dtype: torch.dtype, samples: int, t: int, d: int, f: int) -> None:
    check_with_a_bias_each(samples, t, d, f, dtype)


@pytest.mark.parametrize(("d", "f"), SIZES)
@pytest.mark.parametrize("m", ROWS)
@DTYPES
def test_numbers(dtype: torch.dtype, m: int, d: int, f: int) -> None:
    check(m, d, f, dtype)


def test_without_the_gradient_of_the_input() -> None:
    dbranch, h, w1, b1, w2 = inputs(77, 48, 272)
    _, u, _, db = both(dbranch, h, w1, b1, w2)
    nothing, alone = ops.mlp_backward(dbranch, w1, w2, u, False)
    assert nothing.numel() == 0 and torch.equal(alone, db)


def test_nan_stays_in_its_row() -> None:
    dbranch, h, w1, b1, w2 = inputs(70, 32, 144)
    h[40, 3] = math.nan
    branch, u, dh, db = both(dbranch, h, w1, b1, w2)
    others = torch.arange(70) != 40
    for x in (branch, u, dh):
        assert x[40].isnan().all() and x[others].isfinite().all()
    assert db.isnan().all()


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("m", [33, 300, 1100])
@DTYPES
def test_the_same_bits_with_any_number_of_threads(dtype: torch.dtype, m: int, threads: None) -> None:
    given = inputs(m, 48, 528, dtype)
    torch.set_num_threads(1)
    one = both(*given)
    for n in (1, 2, 3, 8):
        torch.set_num_threads(n)
        for i, (p, q) in enumerate(zip(one, both(*given), strict=True)):
            assert torch.equal(p, q), f"output {i} differs with {n} threads"


@pytest.mark.parametrize(("samples", "t"), [(7, 37), (2, 300)])
@DTYPES
def test_a_bias_each_with_any_number_of_threads(dtype: torch.dtype, samples: int, t: int, threads: None) -> None:
    torch.set_num_threads(1)
    one = each(samples, t, 48, 528, dtype)
    for n in (2, 3, 8):
        torch.set_num_threads(n)
        for p, q in zip(one, each(samples, t, 48, 528, dtype), strict=True):
            assert torch.equal(p, q), f"differs with {n} threads"


def test_rows_alone_give_the_same_bits() -> None:
    dbranch, h, w1, b1, w2 = inputs(300, 48, 528)
    together = both(dbranch, h, w1, b1, w2)
    for first in (0, 37, 299):
        part = slice(first, first + 20)
        for p, q in zip(together[:3], both(dbranch[part], h[part], w1, b1, w2), strict=False):
            assert torch.equal(p[part], q)


# -- the choice ------------------------------------------------------------------------------------------------------
def test_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    w1, many, few = torch.zeros(64, 32), torch.zeros(256, 32), torch.zeros(255, 32)
    for amd in (True, False):
        monkeypatch.setattr(_ext, "cpu_is_amd", lambda amd=amd: amd)
        monkeypatch.setenv("DIFFFIT_FAST_PRODUCTS", "auto")
        assert in_pieces(many, w1) == amd and not in_pieces(few, w1)
        monkeypatch.setenv("DIFFFIT_FAST_PRODUCTS", "pieces")
        assert in_pieces(few, w1)
        assert not in_pieces(torch.zeros(256, 40), torch.zeros(64, 40)) and not in_pieces(many, w1[:60])
        assert not in_pieces(many.double(), w1.double())
        assert in_pieces(many.bfloat16(), w1.bfloat16()) == (capability() == "avx512_bf16")
        monkeypatch.setenv("DIFFFIT_FAST_PRODUCTS", "library")
        assert not in_pieces(many, w1)
    monkeypatch.setenv("DIFFFIT_FAST_PRODUCTS", "pieces")
    monkeypatch.setenv("DIFFFIT_FAST_KERNELS", "reference")
    assert not in_pieces(many, w1)
    monkeypatch.setenv("DIFFFIT_FAST_PRODUCTS", "both")
    with pytest.raises(DiffFitError, match="DIFFFIT_FAST_PRODUCTS must be auto, pieces or library; got 'both'"):
        in_pieces(many, w1)


def test_the_report_tells_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFFIT_FAST_PRODUCTS", "pieces")
    assert kernel_report()["choices"]["products"]["DIFFFIT_FAST_PRODUCTS"] == "pieces"


@pytest.mark.parametrize("each_its_own", [False, True])
@pytest.mark.parametrize("strided", [False, True])
def test_both_ways_agree_in_the_operation_and_in_the_block(
    monkeypatch: pytest.MonkeyPatch, strided: bool, each_its_own: bool
) -> None:
    torch.manual_seed(3)
    b, t, d, f, heads = 2, 37, 48, 144, 3
    h = draw(b, d, t).mT if strided else draw(b, t, d)
    weights = tuple(draw(n, k) / k**0.5 for n, k in ((3 * d, d), (d, d), (f, d), (d, f)))
    b1, vectors, joints = draw(b, f) if each_its_own else draw(f), draw(1, 1, d), (draw(4, b, d), draw(4, b, d))
    found = {}
    for way in ("pieces", "library"):
        monkeypatch.setenv("DIFFFIT_FAST_PRODUCTS", way)
        x, bias = h.clone().requires_grad_(), b1.clone().requires_grad_()
        if strided:
            x = h.detach().requires_grad_()
        y = frozen_mlp(x, weights[2], bias, weights[3])
        y.backward(torch.cos(y.detach()))
        found[way] = [y.detach(), x.grad, bias.grad]
        x, bias = h.detach().clone().requires_grad_(), b1.clone().requires_grad_()
        y, z = block(x, x, weights, vectors, bias, joints, heads)
        (y + torch.sin(z)).sum().backward()
        found[way] += [y.detach(), z.detach(), x.grad, bias.grad]
    for p, q in zip(found["pieces"], found["library"], strict=True):
        assert not torch.equal(p, torch.zeros_like(p))
        torch.testing.assert_close(p, q, rtol=1e-4, atol=2e-5 * q.abs().max().item())


# -- errors and instruction sets -------------------------------------------------------------------------------------
def test_errors_say_what_was_expected_and_what_came() -> None:
    h, w1, b1, w2 = torch.zeros(5, 32), torch.zeros(48, 32), torch.zeros(48), torch.zeros(32, 48)
    u = torch.zeros(5, 48)
    cases = [
        (lambda: ops.mlp_forward(h, w1[:40], b1, w2), r"mlp_forward: w2 must have shape \(32, 40\); got \(32, 48\)"),
        (lambda: ops.mlp_forward(h[:, :16].contiguous(), w1, b1, w2), r"h must have shape \(5, 32\); got \(5, 16\)"),
        (
            lambda: ops.mlp_forward(h.to(BF16), w1, b1, w2),
            r"w1 must have the dtype of h|h must be float32, or bfloat16 on",
        ),
        (lambda: ops.mlp_forward(h, w1.mT, b1, w2), r"w1 must be contiguous"),
        (lambda: ops.mlp_forward(h, w1, b1[:47], w2), r"b1 must have shape \(48\); got \(47\)"),
        (
            lambda: ops.mlp_forward(h, w1[:40].contiguous(), b1[:40], w2[:, :40].contiguous()),
            r"the sizes of w1 must be multiples of 16; got \(40, 32\)",
        ),
        (lambda: ops.mlp_backward(h[:4], w1, w2, u, True), r"dbranch must have shape \(5, 32\); got \(4, 32\)"),
        (lambda: ops.mlp_forward(h, w1, b1.expand(3, 48).contiguous(), w2), r"one for each sample; got 3 for 5 rows"),
        (lambda: ops.mlp_backward(h, w1, w2, u, True, b1), r"bias must have 2 dimensions; got shape \(48\)"),
    ]
    for call, message in cases:
        with pytest.raises(RuntimeError, match=message):
            call()


def check_instruction_set(name: str) -> None:
    """For a process of its own: the choice is made once, at the first call."""
    for m, (d, f) in zip((1, 33, 300, 77), SIZES, strict=False):
        for dtype in dtypes():
            check(m, d, f, dtype)
            check_with_a_bias_each(2, m, d, f, dtype)
    test_nan_stays_in_its_row()
    assert capability() == name


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_every_instruction_set_of_this_processor(name: str) -> None:
    check_apart("test_cpp_mlp", "check_instruction_set", name)
