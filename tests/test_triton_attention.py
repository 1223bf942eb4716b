"""Triton's attention on the bare product of qkv, and the two kernels around a library's: against float64, cut in several ways.

The truth takes the inputs as they are, so that an error is the kernel's own: of its operands, rounded once to the type of z,
and of its result.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from optest import BF16, F16, F32, ROOMS, TOLERANCE, assert_close, draw
from torch import Tensor
from torch.nn import functional as F

TRITON = [pytest.param(room, id=room, marks=ROOMS[room]) for room in ("triton", "gpu")]
NAMES = {1: ("db",), 3: ("db", "dg", "dgamma_v")}


def launchers() -> ModuleType:
    """The module under test, imported when the process that interprets has chosen to."""
    from difffit_fast.kernels import attention

    return attention


def on(room: str, *tensors: Tensor) -> list[Tensor]:
    return [t.to("cuda" if room == "gpu" else "cpu") for t in tensors]


def inputs(
    B: int, T: int, H: int, d: int, dtype: torch.dtype, R: int, G: int, size: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """z, vectors and do; the bias around 0, the gains around 1."""
    vectors = 0.5 * draw(G, R, H * d, dtype=F32)
    vectors[:, 1:] += 1
    return size * draw(B, T, 3 * H * d, dtype=dtype), vectors, draw(B, T, H * d, dtype=dtype)


def made_qkv(z: Tensor, vectors: Tensor) -> list[Tensor]:
    """What ``scale_qkv`` computes: q, k, v [B, T, D] each."""
    q, k, v = z.chunk(3, -1)
    bias, *gains = (row[:, None] for row in vectors.unbind(1))
    q = q + bias
    return [gains[0] * q, k, gains[1] * v] if gains else [q, k, v]


def attend(q: Tensor, k: Tensor, v: Tensor, H: int) -> tuple[Tensor, Tensor]:
    """o [B, T, D] and lse [B, H, T]."""
    q, k, v = (x.unflatten(-1, (H, -1)).transpose(1, 2) for x in (q, k, v))
    s = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return (torch.softmax(s, -1) @ v).transpose(1, 2).flatten(2), torch.logsumexp(s, -1)


def truth(z: Tensor, vectors: Tensor, do: Tensor, H: int) -> list[Tensor]:
    """o, lse, dz, dvectors in float64."""
    z, vectors = (x.double().requires_grad_() for x in (z, vectors))
    o, lse = attend(*made_qkv(z, vectors), H)
    return [o.detach(), lse.detach(), *torch.autograd.grad(o, (z, vectors), do.double())]


def check(room: str, z: Tensor, vectors: Tensor, do: Tensor, H: int, slack: float = 1) -> None:
    """Every output by itself (thirds of dz and rows of dvectors too), and the same bits twice."""
    triton = launchers()
    z_, vectors_, do_ = on(room, z, vectors, do)
    o, lse = triton.attention_forward(z_, vectors_, H)
    dz, dvectors = triton.attention_backward(do_, z_, vectors_, o, lse, H)
    assert (o.dtype, lse.dtype, dz.dtype, dvectors.dtype) == (z.dtype, F32, z.dtype, F32)
    if room == "gpu" or z.shape[1] <= 100:
        again = [*triton.attention_forward(z_, vectors_, H), *triton.attention_backward(do_, z_, vectors_, o, lse, H)]
        for first, second in zip((o, lse, dz, dvectors), again, strict=True):
            assert torch.equal(first, second), "a second run gave other bits"

    want_o, want_lse, want_dz, want_dvectors = truth(z, vectors, do, H)
    tolerance = slack * TOLERANCE[z.dtype]
    assert_close(o.cpu(), want_o, tolerance, "o")
    assert_close(lse.cpu(), want_lse, tolerance, "lse")
    assert dvectors.shape == vectors.shape
    if z.shape[1] == 1:  # P = 1: dz_q, dz_k and what is summed from them are differences that vanish
        assert_close(dz.cpu(), want_dz, tolerance, "dz")
        assert (dvectors.cpu() - want_dvectors).abs().max() <= tolerance * want_dz.abs().max() * z.shape[0]
        return
    for name, got, want in zip(("dz_q", "dz_k", "dz_v"), dz.cpu().chunk(3, -1), want_dz.chunk(3, -1), strict=True):
        assert_close(got, want, tolerance, name)
    for name, got, want in zip(NAMES[vectors.shape[1]], dvectors.cpu().unbind(1), want_dvectors.unbind(1), strict=True):
        assert_close(got, want, tolerance, name)


# -- numbers ---------------------------------------------------------------------------------------------------------
# B, T, H, d, dtype, R, G. In the interpreter every program costs, so that a shape tests several things at once.
CASES = [
    (2, 1, 1, 8, F32, 1, 1),
    (2, 5, 1, 4, F32, 3, 2),
    (1, 5, 2, 100, F32, 3, 1),
    (2, 50, 1, 24, F32, 1, 2),
    (2, 50, 1, 72, F32, 3, 1),
    (1, 64, 1, 64, F32, 3, 1),
    (1, 64, 1, 128, F32, 3, 1),
    (1, 100, 1, 96, F32, 1, 1),
    (1, 256, 1, 72, F32, 3, 1),
    (2, 100, 1, 80, BF16, 3, 2),
    (1, 100, 1, 128, BF16, 3, 1),
    (2, 64, 1, 64, BF16, 1, 1),
    (1, 256, 1, 72, BF16, 1, 1),
    (1, 50, 2, 72, BF16, 3, 1),
    (1, 1, 1, 96, F16, 3, 1),
    (1, 256, 1, 72, F16, 3, 1),
    (1, 1030, 1, 64, BF16, 3, 1),
]


def name(case: tuple) -> str:
    B, T, H, d, dtype, R, G = case
    return f"{B}x{T}-{H}x{d}-{str(dtype).removeprefix('torch.')}-R{R}-G{G}"


@pytest.mark.parametrize("room", TRITON)
@pytest.mark.parametrize("case", CASES, ids=name)
def test_numbers(room: str, case: tuple) -> None:
    check(room, *inputs(*case), case[2])


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Cut as a Hopper is; interpreted, that is other blocks than the interpreter's own."""
    config = pytest.importorskip("difffit_fast.kernels.config")
    monkeypatch.setattr(config, "INTERPRETER", 90)
    for cached in (config.attention_plan, config.tile_plan):
        cached.cache_clear()
    yield
    for cached in (config.attention_plan, config.tile_plan):
        cached.cache_clear()


@pytest.mark.interpreter
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(("T", "dtype"), [(50, F32), (200, F32), (128, BF16)])
def test_cut_as_a_device_is(T: int, dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    check("triton", *inputs(1, T, 1, 72, dtype, 3, 1), 1)


@pytest.mark.parametrize("room", TRITON)
@pytest.mark.parametrize(("R", "G"), [(3, 1), (3, 5), (1, 5)])
def test_batches_are_cut_into_groups(room: str, R: int, G: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where dS of all samples would be too much at once: of five two at a time, the last alone, or each; the same bits."""
    triton = launchers()
    z, vectors, do = inputs(5, 20, 2, 24, F32, R, G)
    there = on(room, z, vectors, do)
    o, lse = triton.attention_forward(*there[:2], 2)
    backward = lambda: triton.attention_backward(there[2], *there[:2], o, lse, 2)  # noqa: E731
    whole, one = backward(), 2 * 20 * 32 * z.element_size()
    for size in (2 * one, 1):
        monkeypatch.setattr(triton, "DS_BYTES", size)
        check(room, z, vectors, do, 2)
        assert all(torch.equal(a, b) for a, b in zip(whole, backward(), strict=True))


@pytest.mark.parametrize("room", TRITON)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_gains_that_nothing_may_be_divided_by(room: str, dtype: torch.dtype) -> None:
    """Zero, negative, tiny and denormal factors in some channels."""
    z, vectors, do = inputs(1, 20, 1, 24, dtype, 3, 1)
    for row in (1, 2):
        vectors[0, row, :6] = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e-42, -1.5])
    check(room, z, vectors, do, 1)
    vectors[0, 1:] = 0  # uniform weights, and no output at all
    o, _, dz, dvectors = truth(z, vectors, do, 1)
    assert not o.any() and not dz.any() and dvectors[0, 2].any()
    check(room, z, vectors, do, 1)


@pytest.mark.parametrize("room", TRITON)
@pytest.mark.parametrize("sign", [1, -1])
def test_large_scores(room: str, sign: int) -> None:
    """Scores beyond ±1000, where exp(S) is infinite or, in every column, zero; ragged, so that nothing masked is exp(0)."""
    d, T = 16, 70
    z, vectors, do = inputs(1, T, 1, d, F32, 3, 1)
    z[..., : 2 * d] = 18 + 0.1 * z[..., : 2 * d]  # about 18²·d / √d = 1300
    z[..., d : 2 * d] *= sign
    vectors[0, 1] = 1
    _, lse, _, _ = truth(z, vectors, do, 1)
    assert (sign * lse > 1000).all()
    check(room, z, vectors, do, 1, slack=200)  # float32 has units of 1e-4 there, which are relative errors of P


@pytest.mark.parametrize("room", TRITON)
@pytest.mark.parametrize("shape", [(0, 4), (2, 0)])
def test_nothing(room: str, shape: tuple[int, int]) -> None:
    triton = launchers()
    z, vectors, do = on(room, *inputs(*shape, 2, 8, BF16, 3, 1))
    o, lse = triton.attention_forward(z, vectors, 2)
    assert o.shape == (*shape, 16) and lse.shape == (shape[0], 2, shape[1])
    for dz, dvectors in (
        triton.attention_backward(do, z, vectors, o, lse, 2),
        triton.pack_dqkv(do, do, do, z, vectors),
    ):
        assert dz.shape == z.shape and dvectors.shape == vectors.shape and not dvectors.any()
    assert triton.scale_qkv(z, vectors).shape == z.shape


# -- around a library's ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("room", TRITON)
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("R", "G"), [(1, 1), (1, 2), (3, 1), (3, 2)])
def test_scale_and_pack(room: str, dtype: torch.dtype, R: int, G: int) -> None:
    """One rounding each; and with a library's attention between them, what attention_forward and _backward give."""
    triton = launchers()
    B, T, H, d = 2, 9, 2, 72
    z, vectors, do = inputs(B, T, H, d, dtype, R, G)
    z_, vectors_ = on(room, z, vectors)
    got = triton.scale_qkv(z_, vectors_)
    assert got.dtype == dtype
    assert_close(got.cpu(), torch.cat(made_qkv(z.double(), vectors.double()), -1), TOLERANCE[dtype] / 2, "qkv")

    q, k, v = (x.unflatten(-1, (H, d)).transpose(1, 2).detach().requires_grad_() for x in got.chunk(3, -1))
    o = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    grads = [g.transpose(1, 2).contiguous() for g in torch.autograd.grad(o, (q, k, v), on(room, do)[0])]
    dz, dvectors = triton.pack_dqkv(*grads, z_, vectors_)
    assert (dz.dtype, dvectors.dtype, dvectors.shape) == (dtype, F32, vectors.shape)
    leaves = [x.double().requires_grad_() for x in (z, vectors)]
    want = torch.autograd.grad(made_qkv(*leaves), leaves, [g.cpu().double().flatten(2) for g in grads])
    assert_close(dz.cpu(), want[0], TOLERANCE[dtype] / 2, "dz")
    assert_close(dvectors.cpu(), want[1], TOLERANCE[F32], "dvectors")
    whole = truth(z, vectors, do, H)
    assert_close(dz.cpu(), whole[2], 2 * TOLERANCE[dtype], "dz of the whole")
    assert_close(dvectors.cpu(), whole[3], 2 * TOLERANCE[dtype], "dvectors of the whole")
    again = triton.pack_dqkv(*grads, z_, vectors_)
    assert torch.equal(dz, again[0]) and torch.equal(dvectors, again[1])


# -- heads -----------------------------------------------------------------------------------------------------------
def test_what_is_supported() -> None:
    triton = pytest.importorskip("triton") and launchers()
    assert [d for d in range(256) if triton.supports(d, BF16)] == list(range(16, 129, 8))
    assert triton.supports(72, F16) and not triton.supports(72, F32)
    for d in range(1, 129):
        first, *rest = triton.head_tiles(d)
        assert d <= first + sum(rest) and sum(rest) <= first and all(w in (16, 32, 64) for w in (first, *rest)), d
    assert [triton.head_tiles(d) for d in (8, 64, 72)] == [(16,), (64,), (64, 16)]
    assert [triton.head_tiles(d) for d in (80, 96, 128)] == [(64, 16), (64, 32), (64, 64)]


# -- devices ---------------------------------------------------------------------------------------------------------
@pytest.mark.gpu
@pytest.mark.parametrize("d", [64, 72, 80, 96, 128])
@pytest.mark.parametrize("T", [50, 64, 100, 256, 1024, 1100])
@pytest.mark.parametrize("R", [1, 3])
def test_sizes_on_a_device(d: int, T: int, R: int) -> None:
    check("gpu", *inputs(2, T, 2, d, BF16, R, 2), 2)


@pytest.mark.gpu
def test_index_beyond_31_bits() -> None:
    """The last sample of more than 2³¹ values is what it is alone."""
    triton = launchers()
    B, T, H, d = 2440, 256, 16, 72
    z = torch.zeros(B, T, 3 * H * d, dtype=BF16, device="cuda")
    do = torch.zeros(B, T, H * d, dtype=BF16, device="cuda")
    assert z.numel() > 1 << 31
    last, vectors, dlast = on("gpu", *inputs(1, T, H, d, BF16, 3, 1))
    z[-1:], do[-1:] = last, dlast
    o, lse = triton.attention_forward(z, vectors, H)
    dz, dvectors = triton.attention_backward(do, z, vectors, o, lse, H)
    o1, lse1 = triton.attention_forward(last, vectors, H)
    dz1, dvectors1 = triton.attention_backward(dlast, last, vectors, o1, lse1, H)
    for got, want in ((o, o1), (lse, lse1), (dz, dz1)):
        assert torch.equal(got[-1:], want)
    assert_close(dvectors, dvectors1, 1e-6, "dvectors")  # all others are zero
    del dz, o, lse
    assert torch.equal(triton.scale_qkv(z, vectors)[-1:], triton.scale_qkv(last, vectors))


@pytest.mark.gpu
def test_graph_capture() -> None:
    """A replayed graph gives the bits of a direct call, on inputs changed in between."""
    triton = launchers()
    H = 4
    z, vectors, do = on("gpu", *inputs(2, 100, H, 72, BF16, 3, 1))

    def step() -> tuple[Tensor, ...]:
        o, lse = triton.attention_forward(z, vectors, H)
        packed = triton.pack_dqkv(do, do, do, z, vectors)
        return o, *triton.attention_backward(do, z, vectors, o, lse, H), triton.scale_qkv(z, vectors), *packed

    step()  # compile before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    z.copy_(torch.randn_like(z))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))
