"""A block as one C++ operation: against float64, against the operations it is made of, same bits, what is left out, errors."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from optest import BF16, F32, draw
from test_cpp_kernels import INSTRUCTION_SETS, capability, check_apart
from test_cpp_mlp import DTYPES, dtypes
from torch import Tensor

from difffit_fast import _ext
from difffit_fast.ops.block import block

pytestmark = pytest.mark.skipif(not _ext.load(), reason="the C++ extension is not built")
ops = torch.ops.difffit_fast_cpp
NAMES = ("y", "h", "dx", "dh", "dvectors", "dbias1", "djoint1", "djoint2")


def inputs(
    b: int,
    t: int,
    d: int,
    f: int,
    heads: int,
    dtype: torch.dtype,
    stream: torch.dtype = F32,
    each: bool = False,
    rows: int = 3,
) -> dict[str, Any]:
    if dtype not in dtypes():
        pytest.skip(f"the kernels do not multiply {dtype} on this processor")
    torch.manual_seed(b + t + d + f)
    weights = tuple((draw(n, k) / k**0.5).to(dtype) for n, k in ((3 * d, d), (d, d), (f, d), (d, f)))
    vectors = torch.cat([draw(b if each else 1, 1, d), 1 + 0.3 * draw(b if each else 1, 2, d)], 1)[:, :rows].to(F32)
    return {
        "x": draw(b, t, d, dtype=stream), "h": draw(b, t, d, dtype=dtype), "weights": weights, "vectors": vectors.contiguous(),
        "bias1": draw(*((b, f) if each else (f,)), dtype=F32), "joints": tuple(draw(4, b, d, dtype=F32) for _ in range(2)),
        "heads": heads, "dy": draw(b, t, d, dtype=stream), "dh": draw(b, t, d, dtype=dtype),
    }  # fmt: skip


def run(
    given: dict[str, Any], way: str = "pieces", dy: bool = True, need_dh: bool = True, wide: bool = False
) -> list[Tensor]:
    """y, h and the gradients of x, h, vectors, bias1 and both joints; ``wide``: all of it in float64, by plain PyTorch."""
    cast = (lambda t: t.detach().double()) if wide else (lambda t: t.detach().clone())
    leaves = [
        cast(t).requires_grad_() for t in (given["x"], given["h"], given["vectors"], given["bias1"], *given["joints"])
    ]
    leaves[1].requires_grad_(need_dh)
    x, h, vectors, bias1, *joints = leaves
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFFIT_FAST_PRODUCTS", way)
        y, z = block(x, h, tuple(map(cast, given["weights"])), vectors, bias1, tuple(joints), given["heads"])
        ends, upstream = ([y, z], [given["dy"], given["dh"]]) if dy else ([z], [given["dh"]])
        torch.autograd.backward(ends, [cast(g).detach() for g in upstream])
    gradients = [t.grad if t.requires_grad else torch.zeros(0) for t in leaves]
    return [y.detach(), z.detach(), *gradients]


def off(got: Tensor, want: Tensor) -> float:
    return (
        ((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30)).item() if want.numel() else 0.0
    )


def check(given: dict[str, Any], dtype: torch.dtype, **how: bool) -> None:
    truth, mine, theirs = run(given, wide=True, **how), run(given, **how), run(given, "library", **how)
    for name, want, got, other in zip(NAMES, truth, mine, theirs, strict=True):
        assert got.shape == want.shape and got.dtype == other.dtype, name
        limit = 3e-6 if dtype == F32 else 1.5 * off(other, want) + 2e-4
        assert off(got, want) <= limit, f"{name}: off by {off(got, want):.1e}, apart by {off(other, want):.1e}"


SIZES = [(1, 1, 16, 16, 1), (2, 5, 48, 144, 3), (3, 37, 48, 272, 2), (2, 100, 80, 528, 5), (1, 300, 144, 576, 2)]


@DTYPES
@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_numbers(size: tuple[int, ...], each: bool, dtype: torch.dtype) -> None:
    check(inputs(*size, dtype, each=each), dtype)


@DTYPES
@pytest.mark.parametrize(("dy", "need_dh"), list(itertools.product([False, True], repeat=2)))
def test_gradients_that_are_not_there(dy: bool, need_dh: bool, dtype: torch.dtype) -> None:
    check(inputs(2, 37, 48, 144, 3, dtype, each=dy), dtype, dy=dy, need_dh=need_dh)


@DTYPES
def test_a_query_bias_alone(dtype: torch.dtype) -> None:
    check(inputs(2, 37, 48, 144, 3, dtype, rows=1), dtype)


def test_a_stream_in_bfloat16() -> None:
    check(inputs(2, 37, 48, 144, 3, BF16, stream=BF16), BF16)


def test_a_stream_that_the_operation_does_not_take() -> None:
    given = inputs(2, 37, 48, 144, 3, F32, stream=torch.float16)
    for name, p, q in zip(NAMES, run(given), run(given, "library"), strict=True):
        torch.testing.assert_close(p, q, msg=name, rtol=1e-4, atol=1e-4)


def test_the_last_block_of_a_model_whose_end_nobody_reads() -> None:
    """h of a block has no gradient then: the backward is put together of the other operations."""
    given = inputs(2, 37, 48, 144, 3, F32)
    found = []
    for way in ("pieces", "library"):
        x = given["x"].clone().requires_grad_()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("DIFFFIT_FAST_PRODUCTS", way)
            y, _ = block(x, given["h"], given["weights"], given["vectors"], given["bias1"], given["joints"], 3)
            y.backward(given["dy"])
        found.append(x.grad)
    torch.testing.assert_close(*found)


def test_strided_tensors_and_weights() -> None:
    given = inputs(2, 37, 48, 144, 3, F32)
    wanted = run(given)
    given["x"], given["h"] = given["x"].mT.contiguous().mT, given["h"].mT.contiguous().mT
    given["weights"] = tuple(w.mT.contiguous().mT for w in given["weights"])
    for p, q in zip(wanted, run(given), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("size", [(0, 5), (2, 0)], ids=str)
def test_empty(size: tuple[int, int]) -> None:
    given = inputs(*size, 48, 144, 3, F32)
    for name, got in zip(NAMES, run(given), strict=True):
        assert not got.any(), name


def test_nan_stays_in_its_sample() -> None:
    for dtype in dtypes():
        given = inputs(3, 37, 48, 144, 3, dtype, each=True)
        given["h"][1, 4, 3] = float("nan")
        for name, got in zip(NAMES, run(given), strict=True):
            samples = got.isfinite().transpose(0, 1).flatten(1) if "joint" in name else got.isfinite().flatten(1)
            assert samples.all(1).tolist() == [True, False, True], name


# -- same bits -------------------------------------------------------------------------------------------------------
@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@DTYPES
@pytest.mark.parametrize("size", [(3, 37, 48, 272, 2), (1, 300, 80, 528, 5), (5, 100, 48, 144, 3)], ids=str)
def test_the_same_bits_with_any_number_of_threads(size: tuple[int, ...], dtype: torch.dtype, threads: None) -> None:
    given = inputs(*size, dtype)
    torch.set_num_threads(1)
    one = run(given)
    for n in (1, 2, 3, 8):
        torch.set_num_threads(n)
        for name, p, q in zip(NAMES, one, run(given), strict=True):
            assert torch.equal(p, q), f"{name} differs with {n} threads"


@DTYPES
def test_a_sample_alone_gives_the_same_bits(dtype: torch.dtype) -> None:
    given = inputs(3, 70, 48, 144, 3, dtype, each=True)
    together = run(given)
    for b in range(3):
        alone = dict(given)
        for name in ("x", "h", "vectors", "bias1", "dy", "dh"):
            alone[name] = given[name][b : b + 1]
        alone["joints"] = tuple(joint[:, b : b + 1] for joint in given["joints"])
        for name, p, q in zip(NAMES, together, run(alone), strict=True):
            assert torch.equal(p[:, b : b + 1] if "joint" in name else p[b : b + 1], q), name


# -- errors and instruction sets -------------------------------------------------------------------------------------
def test_errors_say_what_was_expected_and_what_came() -> None:
    given = inputs(2, 5, 48, 144, 3, F32)

    def call(**other: Any) -> None:
        g = {**given, **other}
        rest = (g["vectors"], g["bias1"], *g["joints"], g["heads"], 1e-6)
        ops.block_forward(g["x"], g["h"], *g["weights"], *rest)

    qkv, proj, fc1, fc2 = given["weights"]
    wrong = [
        ({"x": given["x"][:1]}, r"block_forward: x must have shape \(2, 5, 48\); got \(1, 5, 48\)"),
        ({"weights": (qkv[:48], proj, fc1, fc2)}, r"qkv must have shape \(144, 48\); got \(48, 48\)"),
        ({"weights": (qkv, proj, fc1, fc1)}, r"fc2 must have shape \(48, 144\); got \(144, 48\)"),
        ({"weights": (qkv, proj.to(BF16), fc1, fc2)}, r"proj must have the dtype of h, Float; got BFloat16"),
        ({"weights": (qkv, proj, fc1[:40], fc2[:, :40].contiguous())}, r"multiples of 16; got \(40, 48\)"),
        ({"bias1": given["bias1"][:9]}, r"bias1 must have shape \(144\); got \(9\)"),
        ({"bias1": torch.zeros(3, 144)}, r"bias1 must have shape \(2, 144\); got \(3, 144\)"),
        (
            {"joints": (given["joints"][0], given["joints"][1][:3])},
            r"joint2 must have shape \(4, 2, 48\); got \(3, 2, 48\)",
        ),
        ({"h": given["h"].mT}, r"h must be contiguous"),
        ({"vectors": given["vectors"][0]}, r"vectors must have 3 dimensions"),
    ]
    for other, message in wrong:
        with pytest.raises(RuntimeError, match=message):
            call(**other)


def check_instruction_set(name: str) -> None:
    """For a process of its own: the choice is made once, at the first call."""
    for dtype in dtypes():
        for size in SIZES:
            check(inputs(*size, dtype, each=size[0] == 2), dtype)
    test_nan_stays_in_its_sample()
    assert capability() == name


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_every_instruction_set_of_this_processor(name: str) -> None:
    check_apart("test_cpp_block", "check_instruction_set", name)
