"""What is special to the C++ kernels: accuracy, rounding, threads, errors, every instruction set. Numbers: test_kernels.py."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from op_cases import EPS, MATRIX_KERNELS, ROW_KERNELS, check_modulation, everything, kernels, leaves, rand
from optest import BF16, F32
from torch.nn import functional as F

from difffit_fast import _ext

pytestmark = pytest.mark.skipif(not _ext.load(), reason="the C++ extension is not built")
ops = torch.ops.difffit_fast_cpp
PAIRS = [(F32, F32), (F32, BF16), (BF16, BF16)]  # dtype of the residual stream, dtype of the branch


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
        z = rand(1, 3, 60, dtype=dtype)
        z[0, 1, 7] = math.nan  # of one query
        o, lse = ops.attention_forward(z, torch.zeros(1, 1, 20), 1)
        assert (
            o[0, 1].isnan().all() and o[0, ::2].isfinite().all() and lse[0, 0].isnan().tolist() == [False, True, False]
        )


def test_attention_of_large_and_far_apart_scores() -> None:
    """Probabilities over the whole range of exp: one query, keys whose scores are d apart, values that tell them."""
    d = torch.linspace(0, 86, 4001)
    z = torch.zeros(1, 4001, 3)
    z[0, :, 0], z[0, :, 1], z[0, 0, 2] = 1.0, -d, 1.0
    o, lse = ops.attention_forward(z, torch.zeros(1, 1, 1), 1)
    want = torch.logsumexp(-d.double(), 0)
    torch.testing.assert_close(lse.double(), want.expand(1, 1, 4001), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(o.double(), (-want).exp().expand(1, 4001, 1), rtol=2e-6, atol=0)
    for size in (1e4, 1e18):  # scores of 1e8 and 1e36: the larger key takes all
        z = torch.tensor([[[size, size, 1.0], [size, -size, 2.0], [-size, 0.0, 4.0]]])
        o, _ = ops.attention_forward(z, torch.zeros(1, 1, 1), 1)
        assert o.flatten().tolist() == [1.0, 1.0, 2.0]


def test_bfloat16_rounds_to_nearest_even_for_every_kind_of_number() -> None:
    bits = torch.randint(-(2**31), 2**31 - 1, (64, 97), dtype=torch.int64, generator=torch.Generator().manual_seed(0))
    ties = (torch.arange(97) << 16) + 0x3F808000
    special = torch.tensor([0x7F800000, 0x7FFFFFFF, 0x7F800001, 0x7F7FFFFF, 0x00000001, 0x80000000 - 2**32, -1])
    bits[0], bits[1, :7] = ties, special
    dy = bits.to(torch.int32).view(F32)[None].contiguous()
    dbranch, _, _ = ops.residual_backward(dy, torch.zeros(1, 64, 97, dtype=BF16), torch.ones(1, 97))
    want = dy.to(BF16)
    assert torch.equal(dbranch.isnan(), want.isnan())
    assert torch.equal(dbranch.nan_to_num().view(torch.int16), want.nan_to_num().view(torch.int16))


# -- same bits -----------------------------------------------------------------------------------------------------
@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("X", "H"), PAIRS)
def test_the_same_bits_with_any_number_of_threads(X: torch.dtype, H: torch.dtype, threads: None) -> None:
    torch.set_num_threads(1)
    one = everything(kernels("cpp"), 2, 150, 200, X, H)
    for n in (2, 3):
        torch.set_num_threads(n)
        for i, (p, q) in enumerate(zip(one, everything(kernels("cpp"), 2, 150, 200, X, H), strict=True)):
            assert torch.equal(p, q), f"output {i} differs with {n} threads"


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
            r"scale must be contiguous; got shape \(2, 7\) with strides \(8, 1\)",
        ),
        (lambda: ops.adaln_forward(x, v[:1], v, EPS, F32), r"scale must have shape \(2, 8\); got \(1, 8\)"),
        (lambda: ops.adaln_forward(x, v, v.bfloat16(), EPS, F32), r"shift must be float32; got BFloat16"),
        (lambda: ops.adaln_forward(x.half(), v, v, EPS, F32), r"x must be float32 or bfloat16; got Half"),
        (lambda: ops.adaln_forward(x, v, v, EPS, torch.half), r"out_dtype must be float32 or bfloat16; got Half"),
        (
            lambda: ops.residual_forward(x, x[:, :2].contiguous(), v, v),
            r"branch must have shape \(2, 3, 8\); got \(2, 2, 8\)",
        ),
        (
            lambda: ops.residual_adaln_backward(
                x, x.bfloat16(), x, x, v, v, v[:, :3].contiguous(), v[:, :3].contiguous()
            ),
            r"dy must have the dtype of y, Float; got BFloat16",
        ),
        (lambda: ops.gelu_backward(x[0], x[0].bfloat16()), r"dg must have the dtype of u, BFloat16; got Float"),
    ]
    for call, message in cases:
        with pytest.raises(RuntimeError, match=message):
            call()


# -- instruction sets ----------------------------------------------------------------------------------------------
def capability() -> str:
    from difffit_fast import _C

    return _C.cpu_capability().lower()


INSTRUCTION_SETS = ["baseline", "avx2", "avx512", "avx512_bf16"]


def skip_unless_another(name: str) -> None:
    """Skip what the other tests use, and what this processor does not have."""
    best = INSTRUCTION_SETS.index(capability())
    if name == "avx512_bf16" and capability() == "avx512":  # it may be there and have to be asked for
        cpuinfo = Path("/proc/cpuinfo")
        best += cpuinfo.exists() and "avx512_bf16" in cpuinfo.read_text().split()
    if name == capability() or INSTRUCTION_SETS.index(name) > best:
        pytest.skip(f"the other tests use {capability()}, or this processor does not have {name}")


def check_everything(name: str) -> None:
    """One odd size of every check, for a process of its own: the choice is made once, at the first call."""
    os.environ["DIFFFIT_FAST_CPU"] = "sse9"
    with pytest.raises(RuntimeError, match="must be avx512_bf16, avx512, avx2 or baseline; got 'sse9'"):
        ops.colsum(torch.zeros(2, 2))
    os.environ["DIFFFIT_FAST_CPU"] = name
    B, T, D = 2, 37, 53
    for X, H in PAIRS:
        for check in ROW_KERNELS.values():
            check(kernels("cpp"), B, T, D, X, H)
        for check in MATRIX_KERNELS.values():
            check(kernels("cpp"), B * T, D, H)
        check_modulation(kernels("cpp"), B, 3, D, H)
    test_bfloat16_rounds_to_nearest_even_for_every_kind_of_number()
    test_gelu_is_accurate_everywhere()
    test_nan_and_infinity_stay_visible()
    test_attention_of_large_and_far_apart_scores()
    assert capability() == name


def check_apart(module: str, function: str, name: str) -> None:
    """Call ``function(name)`` of a module of tests in a process of its own that runs the kernels for this instruction set."""
    skip_unless_another(name)
    run = subprocess.run(
        [sys.executable, "-c", f"import {module} as t, conftest\nwith conftest.poison(): t.{function}({name!r})"],
        cwd=Path(__file__).parent,
        env={**os.environ, "DIFFFIT_FAST_CPU": name},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_every_instruction_set_of_this_processor(name: str) -> None:
    check_apart("test_cpp_kernels", "check_everything", name)
