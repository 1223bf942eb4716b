"""Products of frozen weights in eight bits: rows and what becomes of them in every room, weights that change, whole models.

The truth is what the formulas say in float64 of the values as they were quantized. Where a processor has no int8 products the
emulated ones stand for them; that both are the same is tested where it has.
"""

from __future__ import annotations

import copy
import importlib
import itertools
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from optest import BF16, F16, F32, ROOMS, close, in_room, rooms
from safetensors.torch import load_file
from torch import Tensor

from difffit_fast import DiffFitError, FastDiffFitDiT
from difffit_fast.models.frozen_dtype import linears, summary
from difffit_fast.models.load import load_model
from difffit_fast.ops import eight_bit, residual, use_kernels
from difffit_fast.ops import frozen_mlp as mlp
from difffit_fast.ops.block import block
from difffit_fast.ops.dispatch import cpp_ops, pick
from difffit_fast.ops.frozen_linear import frozen_linear
from difffit_fast.ops.frozen_mlp import frozen_mlp
from difffit_fast.ops.probe import Chooser, Decision

CPU = torch.device("cpu")
HAS_INT8 = eight_bit.refusal("int8", CPU) is None
SIZES = ((1, 1), (5, 64), (37, 128), (3, 40), (2, 1152), (33, 3), (4, 16), (0, 64))


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFFIT_FAST_EIGHT_BIT", "emulate")


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    eight_bit.forget()


def rows(M: int, K: int, dtype: torch.dtype = F32) -> Tensor:
    """Rows of very different sizes."""
    return (torch.randn(M, K) * torch.exp(3 * torch.randn(M, 1))).to(dtype)


def kernels(room: str) -> Any:
    if room == "cpp":
        ops = cpp_ops()
        return SimpleNamespace(quantize_int8=ops.quantize_int8, quantize_fp8=None, rescale=ops.rescale, device="cpu")
    if room == "reference":
        return SimpleNamespace(**vars(eight_bit), device="cpu")
    module = importlib.import_module("difffit_fast.kernels.eight_bit")
    return SimpleNamespace(**vars(module), device="cuda" if room == "gpu" else "cpu")


every_room = pytest.mark.parametrize("room", [pytest.param(r, marks=marks) for r, marks in ROOMS.items()])


# -- rows ------------------------------------------------------------------------------------------------------------
@every_room
@pytest.mark.parametrize("turn", [False, True], ids=["", "rotated"])
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_rows_are_quantized_alike_in_every_room(room: str, kind: str, turn: bool) -> None:
    there = kernels(room)
    quantize = getattr(there, f"quantize_{kind}")
    if quantize is None:
        pytest.skip("nothing on a CPU multiplies float8")
    if room == "gpu" and kind == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs float8")
    top = 127 if kind == "int8" else 448
    for dtype in (F32, BF16):
        for M, K in SIZES:
            x = rows(M, K, dtype)
            if M > 3:
                x[1], x[2, 0], x[3, -1] = 0, torch.nan, -torch.inf
            q, scale = (t.cpu() for t in quantize(x.to(there.device), turn))
            assert q.shape == (M, K) and scale.shape == (M,) and scale.dtype == F32
            want_q, want_scale = getattr(eight_bit, f"quantize_{kind}")(x, turn)
            # A multiplication that is fused with the addition behind it, or a rotation's sums in another order, may fall on
            # the other side of a tie.
            exact = room != "gpu" and not (turn and room == "triton")
            torch.testing.assert_close(scale, want_scale, rtol=0 if exact else 1e-6, atol=0, equal_nan=True)
            assert not M or (q.float() != want_q.float()).float().mean() < 5e-3
            if not M:
                continue
            finite = x.isfinite().all(1)
            assert scale[~finite].isnan().all() and not q.float()[~finite].any()
            back = q[finite].double() * scale[finite].double()[:, None]
            x64 = x[finite].double()
            x64 = eight_bit.rotate(x64) if turn else x64
            step = scale[finite].double()[:, None] if kind == "int8" else x64.abs() / 8 + scale[finite][:, None] / 256
            assert ((back - x64).abs() <= 0.501 * step).all()
            assert (q.float()[finite].abs().amax(1) == top * x.any(1)[finite]).all()  # each row uses all of its range


@every_room
@pytest.mark.parametrize("given", [torch.int32, F32], ids=str)
def test_products_are_rescaled_in_every_room(room: str, given: torch.dtype) -> None:
    there = kernels(room)
    for M, N in ((1, 1), (7, 33), (40, 128), (0, 5)):
        product = torch.randint(-(10**6), 10**6, (M, N)).to(given)
        row, column = torch.rand(M), torch.rand(N)
        for bias in (None, torch.randn(N), torch.randn(N, dtype=BF16)):
            for dtype in (F32, BF16) if room == "cpp" else (F32, BF16, F16):
                scaled = [
                    None if t is None else t.to(there.device)
                    for t in (product * 1e-3 if given == F32 else product, row, column, bias)
                ]
                y = there.rescale(*scaled, dtype)
                want = scaled[0].cpu().double() * row.double()[:, None] * column.double()
                assert y.dtype == dtype
                small = dtype == F16 and want.numel() and want.abs().max() > 6e4
                if not small:
                    close("y", y, want if bias is None else want + bias.double())


@pytest.mark.parametrize("room", [pytest.param(r, marks=ROOMS[r]) for r in ("reference", "triton", "gpu")])
def test_int8_products_with_their_scales_in_one(room: str) -> None:
    """Sizes that no tile divides, more rows than a group of tiles has, and the largest sums that there are."""
    there = kernels(room)
    kinds = [(None, F32), (torch.randn(300), BF16), (torch.randn(300, dtype=BF16), F16)]
    sizes = ((1, 1, 1), (7, 33, 40), (130, 300, 64), (40, 5, 300), (1100, 17, 16), (0, 5, 16), (33, 128, 1000))
    for (M, N, K), (bias, dtype) in zip(sizes, itertools.cycle(kinds), strict=False):
        q, values = (torch.randint(-127, 128, (count, K), dtype=torch.int8) for count in (M, N))
        if K == 1000:
            q[0], values[0], values[1] = 127, 127, -127
        row, column = torch.rand(M) / 127, torch.rand(N) / 127
        if M > 5:
            row[5] = torch.nan
        bias = None if bias is None else bias[:N]
        given = [None if t is None else t.to(there.device) for t in (q, row, values, column, bias)]
        y = there.product_int8(*given, dtype)
        want = (q.double() @ values.double().t()) * row.double()[:, None] * column.double()
        want = want if bias is None else want + bias.double()
        assert y.dtype == dtype and y.shape == (M, N) and (M <= 5 or y[5].isnan().all())
        finite = [i for i in range(M) if i != 5]
        close("y", y[finite], want[finite])
        assert torch.equal(y[finite], there.product_int8(*given, dtype)[finite])


@pytest.mark.parametrize("room", [pytest.param(r, marks=ROOMS[r]) for r in ("triton", "gpu")])
def test_the_faster_int8_product_is_taken(room: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device = device_of(room)
    q, values = (torch.randint(-127, 128, (count, 64), dtype=torch.int8, device=device) for count in (32, 48))
    row, column = torch.rand(32, device=device), torch.rand(48, device=device)
    side = eight_bit.Side(values, column)
    kinds = [eight_bit.LIBRARY, eight_bit.OWN]
    turns = iter(kinds)

    def choose(self: Chooser, key: tuple, candidates: dict, where: torch.device, default: str) -> str:
        assert key[0] == "int8_product" and key[3:] == (32, 64, 48) and default == eight_bit.LIBRARY
        assert list(candidates) == kinds
        return next(turns)

    monkeypatch.setattr(Chooser, "choose", choose)
    with in_room(room):
        found = [eight_bit._multiply_rows(eight_bit.Rows(q, row, BF16), side, "int8", None) for _ in kinds]
    assert torch.equal(*found)


def test_a_rotation_is_orthogonal_and_its_own_inverse() -> None:
    for channels in (1, 3, 4, 36, 48, 64, 1152):
        h = eight_bit.rotate(torch.eye(channels, dtype=torch.float64))
        torch.testing.assert_close(h @ h.T, torch.eye(channels, dtype=torch.float64), rtol=0, atol=1e-12)
        assert torch.equal(h, h.T)
        assert (h != 0).sum(1).unique().tolist() == [eight_bit.block_of(channels)]


def test_rotating_saves_what_a_large_channel_would_drown() -> None:
    x, w = torch.randn(64, 128), torch.randn(96, 128)
    x[:, 5] *= 100
    errors = [eight_bit._error(x, *eight_bit.quantize(x, "int8", turn), turn) for turn in (False, True)]
    want = x.double() @ w.double().T
    small = want - x[:, 5:6].double() @ w[:, 5:6].double().T  # what the other channels say
    off = []
    for turn in (False, True):
        (q, r), (p, s) = eight_bit.quantize(x, "int8", turn), eight_bit.quantize(w, "int8", turn)
        off.append(float((eight_bit.rescale(eight_bit.product(q, p), r, s, None, F32) - want).norm() / small.norm()))
    assert off[1] < 0.6 * off[0], (off, errors)


# -- products --------------------------------------------------------------------------------------------------------
def truth(x: Tensor, w: Tensor, kind: str, turn: bool, backward: bool) -> Tensor:
    """x·Wᵀ, or x·W, of what was quantized, in float64."""
    (q, r), (p, s) = (
        eight_bit.quantize(x.contiguous(), kind, turn),
        eight_bit.quantize((w.T if backward else w).contiguous(), kind, turn),
    )
    return (q.double() * r.double()[:, None]) @ (p.double() * s.double()[:, None]).T


def keep(w: Tensor, kind: str = "int8", turn: bool | None = None, **more: Any) -> eight_bit.EightBit:
    eight_bit.keep_eight_bit([w], kind, turn, **more)
    kept = eight_bit.eight_bit_of(w)
    assert kept is not None
    return kept


@pytest.mark.parametrize("kernel", rooms())
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("turn", [False, True], ids=["", "rotated"])
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_linear_and_its_gradients(emulated: None, kind: str, turn: bool, dtype: torch.dtype, kernel: str) -> None:
    with use_kernels(kernel):
        for M, N, K in ((1, 24, 40), (37, 96, 64), (5, 33, 1152), (0, 8, 16)):
            w, bias = (torch.randn(N, K) / K**0.5).to(dtype), torch.randn(N)
            x, dy = torch.randn(M, K).to(dtype), torch.randn(M, N).to(dtype)
            keep(w, kind, turn)
            for needs in ((True, True), (True, False), (False, True)):
                leaves = [t.clone().requires_grad_(need) for t, need in zip((x, bias), needs, strict=True)]
                y = frozen_linear(leaves[0], w, leaves[1])
                again = frozen_linear(leaves[0], w, leaves[1])
                assert torch.equal(y, again)
                close("y", y.detach(), truth(x, w, kind, turn, False) + bias.double(), slack=1e-5)
                y.backward(dy)
                if needs[0]:
                    close("dx", leaves[0].grad, truth(dy, w, kind, turn, True), slack=1e-5)
                if needs[1]:
                    close("db", leaves[1].grad, dy.double().sum(0))  # of what the backward carries, not quantized


@pytest.mark.skipif(not HAS_INT8, reason="this processor has no int8 products")
@pytest.mark.parametrize("turn", [False, True], ids=["", "rotated"])
def test_the_processors_products_are_the_emulated_ones(monkeypatch: pytest.MonkeyPatch, turn: bool) -> None:
    for M, N, K in ((1, 24, 40), (37, 96, 64), (300, 1152, 1152), (5, 33, 4608), (2, 7, 3)):
        w, x, dy = torch.randn(N, K, dtype=BF16), torch.randn(M, K, dtype=BF16), torch.randn(M, N, dtype=BF16)
        kept, found = keep(w, "int8", turn), []
        for how in ("auto", "emulate"):
            monkeypatch.setenv("DIFFFIT_FAST_EIGHT_BIT", how)
            found.append([eight_bit._multiply(t, kept.side(w, b), kept, None) for t, b in ((x, False), (dy, True))])
        for real, emulation in zip(*found, strict=True):
            assert torch.equal(real, emulation)


def test_mlp_in_eight_bits(emulated: None) -> None:
    h, w1, b1, w2 = torch.randn(37, 64), torch.randn(256, 64) / 8, torch.randn(256), torch.randn(64, 256) / 16
    plain = frozen_mlp(h, w1, b1, w2)
    keep(w1), keep(w2)
    off = (frozen_mlp(h, w1, b1, w2) - plain).norm() / plain.norm()
    assert 1e-4 < off < 0.03
    each = frozen_mlp(h[None], w1, b1[None], w2)[0]  # the bias of each sample
    assert (each - plain).norm() / plain.norm() < 0.03


def test_rows_that_are_not_finite_say_so(emulated: None) -> None:
    w = torch.randn(8, 16)
    keep(w)
    x = torch.randn(4, 16)
    x[1, 3], x[2, 0] = torch.inf, torch.nan
    y = frozen_linear(x, w)
    assert y[1].isnan().all() and y[2].isnan().all() and y[[0, 3]].isfinite().all()


# -- rows that leave the kernel that makes them in eight bits -------------------------------------------------------------
with_triton = pytest.mark.parametrize("room", [pytest.param(r, marks=ROOMS[r]) for r in ("triton", "gpu")])


def device_of(room: str) -> str:
    if room == "gpu" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs float8")
    return "cuda" if room == "gpu" else "cpu"


def same_rows(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    """e4m3 and scales from arithmetic that may differ in the last bits: a value in a hundred may be the next one."""
    (q, scale), (want_q, want_scale) = ((a.cpu(), b.cpu()) for a, b in (got, want))
    assert q.dtype == torch.float8_e4m3fn and q.shape == want_q.shape and scale.dtype == F32
    torch.testing.assert_close(scale, want_scale, rtol=2e-6, atol=0, equal_nan=True)
    q, want_q = q.float(), want_q.float()
    assert not q.numel() or (q != want_q).float().mean() <= 0.01 + 1 / q.numel()
    assert ((q - want_q).abs() <= want_q.abs() / 7.9 + 2**-8).all()


def twice(call: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    first, again = call(), call()
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    return first


@with_triton
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_joins_in_fp8(room: str, dtype: torch.dtype) -> None:
    device = device_of(room)
    for B, T, D in ((1, 1, 1), (3, 1, 100), (2, 5, 72), (1, 18, 1152), (0, 4, 72), (2, 0, 72)):
        x, branch, dh, dy = (torch.randn(B, T, D, device=device) for _ in range(4))
        branch, dh = branch.to(dtype), dh.to(dtype)
        gate, bias, scale, shift = torch.randn(4, B, D, device=device)
        if B * T > 9:
            branch[0, 3, 0] = torch.inf
        with in_room(room):
            forward = pick("residual", residual.residual_adaln_forward, x, dtype)
            backward = pick("residual", residual.residual_adaln_backward, x, dtype)
        given = x, branch, gate, bias, scale, shift, 1e-6
        y, h, mean, rstd, h_scale = twice(lambda: forward(*given, True))  # noqa: B023
        assert h_scale.shape == (B, T)
        plain = forward(*given)
        for got, want in zip((y, mean, rstd), (plain[0], *plain[2:]), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, equal_nan=True)
        want = residual.residual_adaln_forward(*given, True)
        same_rows((h, h_scale), (want[1], want[4]))
        branch = branch.nan_to_num(0, 0, 0)
        y, _, mean, rstd = residual.residual_adaln_forward(x, branch, *given[2:])
        for other in (dy, None):
            given_back = dh, other, y, branch, gate, scale, mean, rstd
            dx, dbranch, sums, dbranch_scale = twice(lambda: backward(*given_back, True))  # noqa: B023
            want = residual.residual_adaln_backward(*given_back, True)
            same_rows((dbranch, dbranch_scale), (want[1], want[3]))
            exact = residual.residual_adaln_backward(*(None if t is None else t.double() for t in given_back))
            close("dx", dx, exact[0].cpu(), slack=1e-5)
            close("sums", sums, exact[2].cpu(), slack=1e-5)
            if room == "triton":  # those of the kernel that writes dbranch as it is, to the bit
                plain = backward(*given_back)
                assert torch.equal(dx, plain[0]) and torch.equal(sums, plain[2])


@with_triton
@pytest.mark.parametrize("each", [False, True], ids=["", "a bias each"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_gelu_in_fp8(room: str, dtype: torch.dtype, each: bool) -> None:
    device = device_of(room)
    for samples, T, N in ((1, 1, 1), (2, 3, 72), (3, 1, 100), (2, 40, 288), (1, 3, 4608), (1, 0, 8), (0, 4, 8)):
        u, dg = (2 * torch.randn(samples * T, N, device=device)).to(dtype), torch.randn(samples * T, N, device=device)
        dg, bias = dg.to(dtype), torch.randn(samples, N, device=device) if each else None
        if len(u) > 9:
            u[3, 5], dg[4, 1] = torch.nan, -torch.inf
        with in_room(room):
            forward, backward = (pick("frozen_mlp", one, u) for one in (mlp.gelu_forward_fp8, mlp.gelu_backward_fp8))
        same_rows(twice(lambda: forward(u, bias)), mlp.gelu_forward_fp8(u, bias))  # noqa: B023
        *rows, db = twice(lambda: backward(dg, u, bias))  # noqa: B023
        *want, _ = mlp.gelu_backward_fp8(dg, u, bias)
        same_rows(rows, want)
        if not u.isfinite().all():
            u[3, 5], dg[4, 1] = 0, 0
            *_, db = backward(dg, u, bias)
        _, exact = mlp.gelu_backward(dg.double(), u.double(), None if bias is None else bias.double())
        close("db", db, exact.cpu(), slack=1e-5)


def block_of(device: str, each: bool = False) -> SimpleNamespace:
    """A block of two heads, its weights in bfloat16, and ``run``: outputs and the gradients of all else."""
    B, T, D, F = 2, 3, 36, 144
    shapes = {"qkv": (3 * D, D), "proj": (D, D), "fc1": (F, D), "fc2": (D, F)}
    weights = {name: (torch.randn(n, k) / k**0.5).to(device, BF16) for name, (n, k) in shapes.items()}
    given = [torch.randn(B, T, D), torch.randn(B, T, D).to(BF16), torch.randn(1, 3, D), torch.randn(*[B] * each, F)]
    given = [t.to(device) for t in (*given, torch.randn(4, B, D), torch.randn(4, B, D))]
    dy, dh = torch.randn(B, T, D, device=device), torch.randn(B, T, D, device=device).to(BF16)

    def run(with_dy: bool = True, with_dh: bool = True) -> list[Tensor]:
        x, h, vectors, bias1, *joints = leaves = [t.clone().requires_grad_() for t in given]
        out = block(x, h, tuple(weights.values()), vectors, bias1, tuple(joints), 2)
        pairs = [(o, g) for o, g, wanted in zip(out, (dy, dh), (with_dy, with_dh), strict=True) if wanted]
        torch.autograd.backward(*map(list, zip(*pairs, strict=True)))
        return [*(o.detach() for o in out), *(leaf.grad for leaf in leaves)]

    return SimpleNamespace(run=run, weights=weights)


@pytest.fixture
def quantized(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of what was quantized in a pass of its own, but for the weights: 6 rows are none of theirs."""
    seen: list[tuple[int, ...]] = []
    quantize = eight_bit.quantize

    def noting(x: Tensor, kind: str, turn: bool) -> tuple[Tensor, Tensor]:
        seen.extend([tuple(x.shape)] if len(x) == 6 else [])
        return quantize(x, kind, turn)

    monkeypatch.setattr(eight_bit, "quantize", noting)
    return seen


def off(got: list[Tensor], want: list[Tensor]) -> list[float]:
    """1 − cosine, of each."""
    assert [t.dtype for t in got] == [t.dtype for t in want]
    cosine = torch.nn.functional.cosine_similarity
    return [1 - float(cosine(a.flatten().double(), b.flatten().double(), 0)) for a, b in zip(got, want, strict=True)]


@with_triton
@pytest.mark.parametrize("each", [False, True], ids=["", "a bias each"])
def test_a_block_in_fp8(
    emulated: None, room: str, each: bool, quantized: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = block_of(device_of(room), each)

    def unfused(*asked: bool) -> list[Tensor]:
        quantized.clear()
        with monkeypatch.context() as patch:
            for module in ("block", "frozen_mlp"):
                where = importlib.import_module(f"difffit_fast.ops.{module}")
                patch.setattr(where, "takes_rows", lambda *_: False)
            found = one.run(*asked)
        assert len(quantized) == 8
        return found

    with in_room(room):
        plain = one.run()
        eight_bit.keep_eight_bit(one.weights.values(), "fp8")
        fused = one.run()
        assert quantized == [(6, 36), (6, 36), (6, 108)]  # for qkv and proj, and the gradient of what qkv gave
        assert all(torch.equal(a, b) for a, b in zip(fused, one.run(), strict=True))
        apart = unfused()
        assert max(off(fused, apart)) < 2e-3
        for mine, theirs in zip(off(fused, plain), off(apart, plain), strict=True):
            assert mine < 1.6 * theirs < 0.01  # a rounding less, and other values on the other side of a tie
        for asked in ((False, True), (True, False)) if not each else ():  # which gradients the block is given
            quantized.clear()
            fused = one.run(*asked)
            assert len(quantized) == (3 if asked[1] else 4)  # at the end of a model a tile kernel makes dbranch
            assert max(off(fused, unfused(*asked))) < 2e-3


@with_triton
def test_a_block_of_which_some_weights_are_kept(emulated: None, room: str, quantized: list[tuple[int, ...]]) -> None:
    one = block_of(device_of(room))
    with in_room(room):
        plain = one.run()
        for names, passes in ((("fc1",), 0), (("fc2",), 0), (("qkv", "proj"), 3)):
            eight_bit.keep_eight_bit([one.weights[name] for name in names], "fp8")
            quantized.clear()
            assert max(off(one.run(), plain)) < 5e-3
            assert len(quantized) == passes
            eight_bit.keep_eight_bit(one.weights.values(), None)


@pytest.mark.parametrize("room", [pytest.param("triton", marks=ROOMS["triton"])])
def test_where_no_rows_are_made(emulated: None, room: str, quantized: list[tuple[int, ...]]) -> None:
    w, x = torch.randn(24, 64), torch.randn(5, 64)

    def takes(like: Tensor = x, **more: Any) -> bool:
        keep(w, **({"kind": "fp8"} | more))
        return eight_bit.takes_rows(w, like, False)

    with use_kernels(room):
        assert takes() and not eight_bit.takes_rows(w.clone(), x, False)
        assert not takes(kind="int8") and not takes(kind="int8", turn=False) and not takes(turn=True)
        assert not takes(x[:0]) and not takes(x.double())
        assert not takes(auto=True)
        key = eight_bit._key(x, w, False)
        eight_bit._chooser.record(key, Decision("plain", "not for good", lasting=False))
        assert not takes(auto=True)
        eight_bit._chooser.record(key, Decision("fp8", "faster"))
        assert takes(auto=True) and not eight_bit.takes_rows(w, x, True) and not eight_bit.takes_rows(w, x[:4], False)
        torch.use_deterministic_algorithms(True)
        try:
            assert not takes(auto=True)
        finally:
            torch.use_deterministic_algorithms(False)
        bad = w.clone()
        bad[0, 0] = torch.nan
        with pytest.warns(UserWarning, match="not finite"):
            keep(bad, "fp8")
            assert not eight_bit.takes_rows(bad, x, False)
    for other in ("reference", "cpp") if cpp_ops() is not None else ("reference",):
        with use_kernels(other):
            assert not takes()
    one = block_of("cpu")
    eight_bit.keep_eight_bit(one.weights.values(), "int8")
    with use_kernels(room):
        one.run()
    assert len(quantized) == 8


# -- weights that change -----------------------------------------------------------------------------------------------
def test_a_weight_that_changes_is_quantized_again(emulated: None) -> None:
    w, x = torch.randn(24, 40), torch.randn(5, 40)
    keep(w)
    frozen_linear(x, w)
    for change in (lambda: w.mul_(2), lambda: w.data.add_(1), lambda: w.data.__setitem__((3, 3), 9.0)):
        change()
        close("y", frozen_linear(x, w), truth(x, w, "int8", True, False), slack=1e-5)
    elsewhere = w.clone()
    assert eight_bit.eight_bit_of(elsewhere) is None
    eight_bit.keep_eight_bit([w], None)
    close("y", frozen_linear(x, w), x.double() @ w.double().T)


def test_copies_go_with_the_weight() -> None:
    before = len(eight_bit._KEPT)
    w = torch.randn(24, 40)
    keep(w)
    del w
    assert len(eight_bit._KEPT) == before


def test_weights_that_eight_bits_cannot_hold(emulated: None) -> None:
    x = torch.randn(5, 64)
    zeros = torch.randn(24, 64)
    zeros[3] = 0
    kept = keep(zeros)
    y = frozen_linear(x, zeros)
    assert kept.good(zeros) and not y[:, 3].any()
    endless = torch.randn(24, 64)
    endless[2, 2] = torch.inf
    keep(endless, name="blocks.7.attn.proj")
    with pytest.warns(UserWarning, match=r"blocks\.7\.attn\.proj stays in torch\.float32: .* not finite"):
        y = frozen_linear(x, endless)
    torch.testing.assert_close(y, x @ endless.T)
    wild, x = torch.full((24, 1024), 30.0), torch.randn(5, 1024)
    wild[:, 0] = 1e4  # beside which the others round to nothing
    keep(wild, "int8", False, name="wild")
    with pytest.warns(UserWarning, match=r"wild stays in torch\.float32: in int8 it would be off by"):
        torch.testing.assert_close(frozen_linear(x, wild), x @ wild.T)


# -- what a device can ---------------------------------------------------------------------------------------------------
def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no float8" in eight_bit.refusal("fp8", CPU)
    assert "meta" in eight_bit.refusal("int8", torch.device("meta"))
    monkeypatch.setattr(eight_bit, "_cpu_has_int8", lambda: False)
    assert "VNNI" in eight_bit.refusal("int8", CPU) and eight_bit.kind_for(CPU) is None
    monkeypatch.setenv("DIFFFIT_FAST_EIGHT_BIT", "emulate")
    assert eight_bit.refusal("fp8", CPU) is None
    monkeypatch.setenv("DIFFFIT_FAST_EIGHT_BIT", "always")
    with pytest.raises(DiffFitError, match="must be auto or emulate; got 'always'"):
        eight_bit.refusal("int8", CPU)


def test_sizes_that_no_library_multiplies() -> None:
    def on_cuda(*shape: int) -> Any:
        return SimpleNamespace(device=torch.device("cuda"), shape=shape)

    assert eight_bit.fits(256, on_cuda(1152, 4608)) and not eight_bit.fits(16, on_cuda(1152, 4608))
    assert not eight_bit.fits(256, on_cuda(1152, 72)) and not eight_bit.fits(256, on_cuda(40, 1152))
    assert eight_bit.fits(1, torch.zeros(3, 5)) and not eight_bit.fits(0, torch.zeros(3, 5))


def test_auto_takes_the_faster(emulated: None, monkeypatch: pytest.MonkeyPatch) -> None:
    w, x = torch.randn(24, 64), torch.randn(5, 64)
    plain, eight = x @ w.T, truth(x, w, "int8", True, False).float()
    keep(w, auto=True)
    for fastest, want in (("int8", eight), (eight_bit.PLAIN_PRODUCT, plain)):
        seen: list[int] = []

        def timer(call: Any, device: torch.device, fastest: str = fastest, seen: list[int] = seen) -> float:
            seen.append(1)
            return 1.0 if torch.allclose(call(), eight, atol=1e-6) == (fastest == "int8") else 2.0

        monkeypatch.setattr(eight_bit, "_chooser", Chooser(eight_bit.PLAIN_PRODUCT, timer))
        torch.testing.assert_close(frozen_linear(x, w), want, rtol=1e-5, atol=1e-5)
        timed = len(seen)
        frozen_linear(x, w)
        assert timed and len(seen) == timed  # once


# -- models ----------------------------------------------------------------------------------------------------------
def model_of(dtype: torch.dtype | None = None, **more: Any) -> FastDiffFitDiT:
    return FastDiffFitDiT.from_pretrained("glyphs", compute_dtype=dtype, **more).eval()


def given(n: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(n, 1, 24, 24), torch.randint(0, 1000, (n,)), torch.randint(0, 52, (n,))


def gradients(model: FastDiffFitDiT, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    model.zero_grad()
    out = model(*inputs)
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("dtype", [None, BF16], ids=str)
@pytest.mark.parametrize(("kind", "least"), [("int8", 0.995), ("fp8", 0.99)])
def test_gradients_of_a_real_base(emulated: None, kind: str, least: float, dtype: torch.dtype | None) -> None:
    inputs = given(8)
    model = model_of()
    wanted, out = gradients(model, inputs), model(*inputs).detach()
    model = model_of(dtype, frozen_dtype=kind)
    found = gradients(model, inputs)
    assert (model(*inputs).detach() - out).norm() / out.norm() < 0.05
    for name, grad in found.items():
        assert torch.nn.functional.cosine_similarity(grad.flatten(), wanted[name].flatten(), 0) > least, name
    assert all(torch.equal(a, b) for a, b in zip(found.values(), gradients(model, inputs).values(), strict=True))
    report = model.eight_bit_report()
    assert {one["kind"] for one in report.values()} == {kind} and len(report) == 24
    assert f"42 of 48 products with the frozen weights of the blocks are in {kind}" in summary(report)


def test_the_parameters_know_nothing_of_it(emulated: None, tmp_path: Path) -> None:
    plain, model = model_of(BF16), model_of(BF16, frozen_dtype="int8")
    inputs = given()
    eight = model(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), model.state_dict().values(), strict=True))
    with torch.no_grad():
        for p in (
            model.trainable_parameters()
            if hasattr(model, "trainable_parameters")
            else [p for p in model.parameters() if p.requires_grad]
        ):
            p.add_(0.01 * torch.randn_like(p))
    model.save_delta(tmp_path / "a.safetensors")
    plain.load_delta(tmp_path / "a.safetensors")  # of the same base, used in another dtype
    plain.save_delta(tmp_path / "b.safetensors")
    a, b = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.to(torch.device("cpu"))):
        assert other.frozen_dtype == "int8" and torch.equal(other(*inputs), model(*inputs))
    merged, of_plain = model.merge(), plain.merge()
    assert all(
        torch.equal(a, b) for a, b in zip(merged.state_dict().values(), of_plain.state_dict().values(), strict=True)
    )
    model.set_frozen_dtype("bf16")
    assert torch.equal(model(*inputs), plain(*inputs)) and not torch.equal(eight, plain(*inputs))


def test_what_is_kept_out_of_it(emulated: None) -> None:
    model = model_of(frozen_dtype="int8", frozen_keep=("*.fc2", "blocks.0"))
    kinds = {name: one["kind"] for name, one in model.eight_bit_report().items()}
    assert {name for name, kind in kinds.items() if kind is None} == {
        *(f"blocks.{i}.mlp.fc2" for i in range(6)), "blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.0.mlp.fc1",
    }  # fmt: skip
    model.set_frozen_dtype("int8", ("*.fc2.forward", "blocks.1"))
    kept = {name: eight_bit.eight_bit_of(linear.weight) for name, linear in linears(model)}
    assert kept["blocks.0.mlp.fc2"].ways == ("backward",) and kept["blocks.0.mlp.fc1"].ways == ("forward", "backward")
    assert kept["blocks.1.mlp.fc1"] is None
    model.set_frozen_dtype("int8", ("*.forward",))
    inputs = given()
    assert torch.equal(model(*inputs), model_of()(*inputs))  # and only gradients are others
    model.set_frozen_dtype("int8", ("*.fc2", "blocks.0"))
    with pytest.raises(DiffFitError, match=r"no linear of a block is called 'fc9'; they are blocks\.0\.attn\.qkv"):
        model.set_frozen_dtype("int8", ("fc9",))
    assert model.frozen_keep == ("*.fc2", "blocks.0")
    with pytest.raises(DiffFitError, match="must be one of bf16, fp8, int8, auto; got 'int4'"):
        model.set_frozen_dtype("int4")
    with pytest.raises(DiffFitError, match="float64 was asked for"):
        model_of(torch.float64, frozen_dtype="int8")


def test_a_device_that_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eight_bit, "_cpu_has_int8", lambda: False)
    inputs = given()
    want = model_of()(*inputs)
    model = model_of(frozen_dtype="auto")
    with pytest.warns(UserWarning, match="stays with the compute dtype: this CPU has no int8"):
        assert torch.equal(model(*inputs), want)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(*inputs)  # said once
    with pytest.raises(DiffFitError, match="frozen_dtype='fp8': CPUs have no float8 arithmetic; .*=emulate"):
        model_of(frozen_dtype="fp8")(*inputs)


def test_autocast_beside_it_is_refused(emulated: None) -> None:
    model = model_of(frozen_dtype="int8")
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(DiffFitError, match=r"give compute_dtype=torch\.bfloat16"),
    ):
        model(*given())


def test_compiled_and_with_a_delta_for_each_sample(emulated: None) -> None:
    model = model_of(frozen_dtype="int8")
    inputs = given()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), model(*inputs), rtol=1e-5, atol=1e-5)
    model.add_delta("a"), model.add_delta("b")
    with torch.no_grad():
        model.deltas["b"].vectors.add_(0.02 * torch.randn_like(model.deltas["b"].vectors))
    mixed = model(*inputs, delta=["a", "b", None, "a"])
    for i, name in enumerate(("a", "b", None, "a")):
        alone = model(*(t[i : i + 1] for t in inputs), delta=name)
        assert (
            mixed[i : i + 1] - alone
        ).norm() < 0.01 * alone.norm()  # a rounding upstream is a step of a row downstream


def test_loading_with_it(emulated: None, tmp_path: Path) -> None:
    inputs = given()
    want = model_of(frozen_dtype="int8")(*inputs)
    loaded = load_model("glyphs", frozen_dtype="int8").model
    assert isinstance(loaded, FastDiffFitDiT) and torch.equal(loaded(*inputs), want)
    trained = model_of()
    with torch.no_grad():
        trained.blocks[0].attn.proj.bias.add_(1)
    trained.save_delta(tmp_path / "d.safetensors")
    for more in ({}, {"merge": True}):
        model = load_model(
            "glyphs", tmp_path / "d.safetensors", frozen_dtype="int8", frozen_keep=("*.fc1",), **more
        ).model
        assert sum(one["kind"] == "int8" for one in model.eight_bit_report().values()) == 18
