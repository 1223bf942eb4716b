"""attention as one C++ operation: numbers against float64, zero and tiny factors, same bits, special values, errors."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from optest import BF16, F32, KERNEL_SLACK, ROUNDING, draw
from test_cpp_kernels import INSTRUCTION_SETS, capability, check_apart
from torch import Tensor

from difffit_fast import _ext

pytestmark = pytest.mark.skipif(not _ext.load(), reason="the C++ extension is not built")
ops = torch.ops.difffit_fast_cpp

HEAD_SIZES = [4, 12, 24, 64, 72, 80, 96, 128]
TOKENS = [1, 5, 37, 77, 256, 1100]
ROWS = ("b", "g", "gamma_v")
DTYPES = pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
# Where a product takes what is rounded to bfloat16, three or four roundings of 2⁻⁹ on the way: of the largest value, and in
# the norm.
DOT_SLACK, DOT_NORM = 2**-4, 2**-6


def inputs(b: int, t: int, h: int, d: int, dtype: torch.dtype = F32, g: int = 1, r: int = 3) -> tuple[Tensor, ...]:
    """do, z, vectors."""
    torch.manual_seed(b + t + h + d)
    vectors = torch.cat([draw(g, 1, h * d), 1 + 0.3 * draw(g, 2, h * d)], 1)[:, :r].to(F32).contiguous()
    return draw(b, t, h * d, dtype=dtype), draw(b, t, 3 * h * d, dtype=dtype), vectors


def both(do: Tensor, z: Tensor, vectors: Tensor, heads: int) -> list[Tensor]:
    o, lse = ops.attention_forward(z, vectors, heads)
    return [o, lse, *ops.attention_backward(do, z, vectors, o, lse, heads)]


def truth(do: Tensor, z: Tensor, vectors: Tensor, o: Tensor, heads: int) -> tuple[list[Tensor], float]:
    """o, lse, dz, dvectors in float64, and what the gradients of scores are the difference of, at most.

    delta is taken from ``o`` as it was stored, so that only the kernel's own roundings are left.
    """
    do, z, vectors, o = (x.double() for x in (do, z, vectors, o))
    bias, factor, value_factor = (
        vectors.unbind(1) if vectors.shape[1] == 3 else (vectors[:, 0], *2 * [1 + 0 * vectors[:, 0]])
    )

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (heads, -1)).transpose(-3, -2)

    def join(x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(2)

    q, k, v = map(split, z.chunk(3, -1))
    b, g, gv = (split(x[:, None]) for x in (bias, factor, value_factor))
    do, o, scale = split(do), split(o), q.shape[-1] ** -0.5
    s = scale * (g * (q + b)) @ k.mT
    p = torch.softmax(s, -1)
    dp, delta = (gv * do) @ v.mT, (do * o).sum(-1, keepdim=True)
    ds = p * (dp - delta)
    a, pv = scale * ds @ k, p.mT @ do
    dz = torch.cat([join(g * a), join(g * scale * (ds.mT @ (q + b))), join(gv * pv)], -1)
    sums = torch.stack([join(x).sum(1) for x in (g * a, a * (q + b), pv * v)], 1)
    dvectors = sums.sum(0, keepdim=True) if len(vectors) == 1 else sums
    cancelled = (scale * (p * (dp.abs() + delta.abs())) @ k.abs()).abs().max() * g.abs().max()
    wanted = [join(gv * (p @ v)), s.logsumexp(-1), dz, dvectors[:, : vectors.shape[1]]]
    return wanted, cancelled.item()


def near(name: str, got: Tensor, want: Tensor, size: float = 0.0, slack: float = KERNEL_SLACK) -> None:
    """Off by the rounding of ``got`` and ``slack`` of the largest value or of ``size``."""
    assert got.shape == want.shape, f"{name}: {tuple(got.shape)}, expected {tuple(want.shape)}"
    error, largest = (got.double() - want).abs(), max(want.abs().max().item(), size)
    excess = (error - 1.001 * ROUNDING[got.dtype] * want.abs()).max() / largest
    assert excess <= slack, f"{name}: off by {excess:.2e} of {largest:.2e}"
    if slack == DOT_SLACK:
        off = error.norm() / max(want.norm().item(), size * want.numel() ** 0.5)
        assert off <= DOT_NORM, f"{name}: off by {off:.2e} in the norm"


def check(do: Tensor, z: Tensor, vectors: Tensor, heads: int, slack: float = KERNEL_SLACK) -> None:
    if z.dtype == BF16 and capability() == "avx512_bf16":
        slack = DOT_SLACK
    o, lse, dz, dvectors = both(do, z, vectors, heads)
    assert [x.dtype for x in (o, lse, dz, dvectors)] == [z.dtype, F32, z.dtype, F32]
    (want_o, want_lse, want_dz, want_dvectors), cancelled = truth(do, z, vectors, o, heads)
    near("o", o, want_o, slack=slack)
    near("lse", lse, want_lse, size=1.0, slack=slack)
    alone = cancelled if z.shape[1] == 1 else 0.0  # one token has no gradient of scores; what is left is rounding
    for name, got, want, size in zip("qkv", dz.chunk(3, -1), want_dz.chunk(3, -1), (alone, alone, 0.0), strict=True):
        near(f"dz_{name}", got, want, size, slack)
    for row, name in enumerate(ROWS[: vectors.shape[1]]):
        near(f"d{name}", dvectors[:, row], want_dvectors[:, row], max(alone, want_dz.abs().max().item()), slack)


# -- numbers ---------------------------------------------------------------------------------------------------------
@DTYPES
@pytest.mark.parametrize("t", TOKENS)
@pytest.mark.parametrize("d", HEAD_SIZES)
def test_numbers(d: int, t: int, dtype: torch.dtype) -> None:
    h = 1 if t > 1000 else 2
    slack = KERNEL_SLACK * (2 if t > 1000 else 1)  # sums of so many terms, in the order of the processor's vectors
    check(*inputs(2, t, h, d, dtype), h, slack)


@DTYPES
@pytest.mark.parametrize("r", [1, 3])
@pytest.mark.parametrize("g", [1, 3])
def test_vectors_for_all_samples_or_for_each(g: int, r: int, dtype: torch.dtype) -> None:
    check(*inputs(3, 37, 2, 12, dtype, g, r), 2)
    check(*inputs(3, 77, 3, 24, dtype, g, r), 3)


@pytest.mark.parametrize("d", [1, 3, 17, 300])
def test_odd_head_sizes(d: int) -> None:
    check(*inputs(2, 41, 2, d), 2)


def test_zero_negative_and_tiny_factors() -> None:
    do, z, vectors = inputs(2, 37, 2, 24)
    vectors[:, 1:, 0::4], vectors[:, 1:, 1::4], vectors[:, 1:, 2::4] = 0.0, -0.7, 1e-30
    check(do, z, vectors, 2)
    vectors[:, 1:] = 0
    o, _, dz, dvectors = both(do, z, vectors, 2)
    assert not o.any() and not dz.any() and not dvectors[:, 0].any()
    assert not dvectors[:, 1].any() and dvectors[:, 2].abs().min() > 0  # uniform P: no score matters, values do


def test_no_vectors_but_a_zero_bias_is_plain_attention() -> None:
    do, z, _ = inputs(2, 37, 2, 24)
    o, lse = ops.attention_forward(z, torch.zeros(1, 1, 48), 2)
    ones = torch.cat([torch.zeros(1, 1, 48), torch.ones(1, 2, 48)], 1)
    assert torch.equal(o, ops.attention_forward(z, ones, 2)[0])
    dz, _ = ops.attention_backward(do, z, torch.zeros(1, 1, 48), o, lse, 2)
    assert torch.equal(dz, ops.attention_backward(do, z, ones, o, lse, 2)[0])


def test_large_scores_do_not_overflow() -> None:
    do, z, vectors = inputs(2, 77, 2, 24)
    check(do, 10 * z, vectors, 2, slack=1e-4)  # of scores of some hundreds the last bit is 3e-5
    z[..., :96] *= 1e4  # of scores of 1e8 P knows only which one is largest
    for x in both(do, z, vectors, 2):
        assert x.isfinite().all()


def test_nan_in_nan_out() -> None:
    for dtype in (F32, BF16):
        do, z, vectors = inputs(3, 20, 2, 12, dtype)
        for channel, rows in (
            (0, slice(4, 5)),
            (24, slice(None)),
            (48, slice(None)),
        ):  # of the query, the key, the value
            bad = z.clone()
            bad[1, 4, channel] = math.nan
            o, lse, dz, dvectors = both(do, bad, vectors, 2)
            assert o[1, rows, 0].isnan().all() and dvectors[0, :, :12].isnan().any() and dz[1, :, :12].isnan().any()
            assert o[::2].isfinite().all() and dz[::2].isfinite().all()  # the other samples
            assert o[1, :, 12:].isfinite().all() and lse[1, 1].isfinite().all()  # the other head


@pytest.mark.parametrize("size", [(0, 5, 1), (2, 0, 1), (2, 0, 2), (0, 0, 0)], ids=str)
def test_empty(size: tuple[int, int, int]) -> None:
    b, t, g = size
    vectors = torch.ones(g, 3, 24)
    o, lse, dz, dvectors = both(torch.zeros(b, t, 24), torch.zeros(b, t, 72), vectors, 2)
    assert (o.shape, lse.shape, dz.shape) == ((b, t, 24), (b, 2, t), (b, t, 72))
    assert torch.equal(dvectors, torch.zeros(g, 3, 24))


# -- same bits -------------------------------------------------------------------------------------------------------
@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@DTYPES
@pytest.mark.parametrize("size", [(2, 300, 3, 24), (1, 333, 1, 72), (4, 70, 2, 64)], ids=str)
def test_the_same_bits_with_any_number_of_threads(size: tuple[int, ...], dtype: torch.dtype, threads: None) -> None:
    """With few heads for the threads, a head is shared by several."""
    do, z, vectors = inputs(*size, dtype)
    torch.set_num_threads(1)
    one = both(do, z, vectors, size[2])
    for n in (1, 2, 3, 8):
        torch.set_num_threads(n)
        for i, (p, q) in enumerate(zip(one, both(do, z, vectors, size[2]), strict=True)):
            assert torch.equal(p, q), f"output {i} differs with {n} threads"


def test_a_sample_alone_gives_the_same_bits() -> None:
    do, z, vectors = inputs(3, 90, 2, 24, g=3)
    together = both(do, z, vectors, 2)
    for b in range(3):
        for p, q in zip(together, both(do[b : b + 1], z[b : b + 1], vectors[b : b + 1], 2), strict=True):
            assert torch.equal(p[b : b + 1], q)


# -- errors ----------------------------------------------------------------------------------------------------------
def test_errors_say_what_was_expected_and_what_came() -> None:
    do, z, v = torch.zeros(2, 5, 24), torch.zeros(2, 5, 72), torch.ones(1, 3, 24)
    o, lse = ops.attention_forward(z, v, 2)
    cases = [
        (
            lambda: ops.attention_forward(z[0], v, 2),
            r"attention_forward: z must have 3 dimensions; got shape \(5, 72\)",
        ),
        (lambda: ops.attention_forward(z.half(), v, 2), r"z must be float32 or bfloat16; got Half"),
        (lambda: ops.attention_forward(z.mT, v, 2), r"z must be contiguous; got shape \(2, 72, 5\)"),
        (lambda: ops.attention_forward(z, v, 0), r"num_heads must be at least 1; got 0"),
        (
            lambda: ops.attention_forward(z, v, 5),
            r"the last size of z must be a multiple of 3·5; got shape \(2, 5, 72\)",
        ),
        (lambda: ops.attention_forward(z, v[0], 2), r"vectors must have 3 dimensions; got shape \(3, 24\)"),
        (lambda: ops.attention_forward(z, v.bfloat16(), 2), r"vectors must be float32; got BFloat16"),
        (
            lambda: ops.attention_forward(z, torch.ones(3, 2, 24), 2),
            r"vectors must have shape \(1 or 2, 1 or 3, 24\); got \(3, 2, 24\)",
        ),
        (
            lambda: ops.attention_backward(do[:1], z, v, o, lse, 2),
            r"attention_backward: do must have shape \(2, 5, 24\); got \(1, 5, 24\)",
        ),
        (
            lambda: ops.attention_backward(do.bfloat16(), z, v, o, lse, 2),
            r"do must have the dtype of z, Float; got BFloat16",
        ),
        (
            lambda: ops.attention_backward(do, z, v, o.bfloat16(), lse, 2),
            r"o must have the dtype of z, Float; got BFloat16",
        ),
        (lambda: ops.attention_backward(do, z, v, o, lse[:, :1].contiguous(), 2), r"lse must have shape \(2, 2, 5\)"),
    ]
    for call, message in cases:
        with pytest.raises(RuntimeError, match=message):
            call()


@pytest.mark.parametrize(("t", "d"), [(5, 4), (77, 72), (256, 64)])
def test_bfloat16_is_as_accurate_as_products_of_bfloat16_can_be(t: int, d: int) -> None:
    """Against the same formulas in PyTorch, every operand of a product rounded to bfloat16 and sums in float32."""
    do, z, vectors = inputs(2, t, 2, d, BF16)
    got = both(do, z, vectors, 2)
    wanted = truth(do, z, vectors, got[0], 2)[0]

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (2, -1)).transpose(-3, -2)

    def join(x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(2)

    r = lambda x: x.to(BF16).double()  # noqa: E731
    q, k, v = (split(x) for x in z.double().chunk(3, -1))
    b, g, gv = (split(x[:, None].double()) for x in vectors.unbind(1))
    scale, g_o, o = d**-0.5, split(do.double()), split(got[0].double())
    q = r(r(q + b) * g)
    s = r(scale * q @ k.mT)
    p = torch.softmax(s, -1)
    ds = r(p * (r(r(g_o * gv) @ v.mT) - (g_o * o).sum(-1, keepdim=True)))
    plain = {"o": r(join(gv * r(r(p) @ v))), "dq": join(g * r(scale * ds @ k)), "dk": join(r(scale * ds.mT @ q))}
    plain["dv"] = join(gv * r(r(p).mT @ g_o))
    dq, dk, dv = got[2].chunk(3, -1)
    want_dq, want_dk, want_dv = wanted[2].chunk(3, -1)
    for name, mine, want in (("o", got[0], wanted[0]), ("dq", dq, want_dq), ("dk", dk, want_dk), ("dv", dv, want_dv)):
        errors = [(x.double() - want).norm().item() for x in (mine, plain[name])]
        assert errors[0] <= 1.2 * errors[1], f"{name}: {errors[0]:.2e}, and in PyTorch {errors[1]:.2e}"


# -- instruction sets ------------------------------------------------------------------------------------------------
def check_instruction_set(name: str) -> None:
    """For a process of its own: the choice is made once, at the first call."""
    for dtype in (F32, BF16):
        for t, d in ((1, 4), (37, 12), (77, 72), (300, 24), (20, 128)):
            check(*inputs(2, t, 2, d, dtype), 2)
    test_zero_negative_and_tiny_factors()
    test_large_scores_do_not_overflow()
    test_nan_in_nan_out()
    assert capability() == name


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_every_instruction_set_of_this_processor(name: str) -> None:
    check_apart("test_cpp_attention", "check_instruction_set", name)
