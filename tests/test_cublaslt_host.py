"""The host side of the cuBLASLt calls, without a GPU: layouts, checks, choices, and the choice between fused and unfused.

The column-major algebra is proved by evaluating the documented meaning of a cublasLtMatmul call in float64, from nothing
but the numbers in its descriptors, and comparing with the row-major formulas. The descriptors are taken twice: as our
plan, and as cuBLASLt itself reads them back where its library is installed (it makes descriptors without a device).
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from difffit_fast import _ext
from difffit_fast.errors import DiffFitError
from difffit_fast.ops import linear_gelu as fused
from difffit_fast.ops.probe import Chooser

HERE = Path(__file__).resolve().parent
built = _ext._library()[0] is not None and hasattr(torch.ops.difffit_fast_cpp, "cublaslt_plan")
needs_extension = pytest.mark.skipif(not built, reason="the extension is not built")
ops = torch.ops.difffit_fast_cpp
SHAPES = [(1, 8, 8), (5, 16, 24), (16, 8, 40), (37, 72, 16)]  # M, N, K


def gelu(z: np.ndarray) -> np.ndarray:
    return 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))


def gelu_slope(z: np.ndarray) -> np.ndarray:
    x = torch.from_numpy(z).requires_grad_()
    F.gelu(x, approximate="tanh").sum().backward()
    return x.grad.numpy()


def cublaslt_matmul(call: dict[str, Any], memory: dict[str, np.ndarray]) -> None:
    """What cublasLtMatmul does with these descriptors. ``memory``: A, B, D, aux, bias as flat float64 arrays.

    Column-major: element (i, j) of a matrix lies at i + j·ld. D = epilogue(op(A)·op(B)); the bias has one element per
    row of D, the bias gradient is the sum of every row of D (cuBLAS documentation, cublasLtEpilogue_t).
    """

    def view(name: str, layout: dict[str, int]) -> np.ndarray:
        assert layout["ld"] >= layout["rows"]
        flat = memory[name]
        assert flat.size == layout["ld"] * (layout["cols"] - 1) + layout["rows"], "the layout must cover the tensor"
        strides = (flat.itemsize, flat.itemsize * layout["ld"])
        return np.lib.stride_tricks.as_strided(flat, (layout["rows"], layout["cols"]), strides)

    a, b, d = (view(name, call[name]) for name in "ABD")
    acc = (a.T if call["transa"] else a) @ (b.T if call["transb"] else b)
    assert acc.shape == d.shape
    assert call["aux_ld"] % 8 == 0
    aux = view("aux", {"rows": d.shape[0], "cols": d.shape[1], "ld": call["aux_ld"]})
    bias = memory["bias"]
    assert bias.shape == (d.shape[0],)
    if call["epilogue"] == 164:  # GELU_AUX_BIAS
        aux[:] = acc + bias[:, None]
        d[:] = gelu(aux)
    else:
        assert call["epilogue"] == 208  # DGELU_BGRAD
        d[:] = acc * gelu_slope(aux.copy())
        bias[:] = d.sum(1)


def cublaslt_present() -> bool:
    """Load the cuBLASLt of the PyPI package, as PyTorch with CUDA would."""
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or []) if spec else []:
        for path in (*Path(root).glob("cu13/lib/libcublasLt.so.1?"), *Path(root).glob("cublas/lib/libcublasLt.so.1?")):
            ctypes.CDLL(str(path))
            return True
    return False


@pytest.fixture(params=["plan", "read back from cuBLASLt"])
def descriptors(request: pytest.FixtureRequest) -> Any:
    if request.param == "plan":
        return ops.cublaslt_plan
    if not cublaslt_present():
        pytest.skip("nvidia-cublas is not installed")
    return ops.cublaslt_descriptors


# -- the algebra -----------------------------------------------------------------------------------------------------
@needs_extension
@pytest.mark.parametrize("shape", SHAPES)
def test_linear_gelu_is_the_row_major_formula(descriptors, shape):
    M, N, K = shape
    rng = np.random.default_rng(0)
    h, w1, b1 = rng.normal(size=(M, K)), rng.normal(size=(N, K)), rng.normal(size=N)
    g, u = np.full((M, N), np.nan), np.full((M, N), np.nan)
    call = json.loads(descriptors("linear_gelu", M, N, K, "bfloat16"))
    cublaslt_matmul(call, {"A": w1.ravel(), "B": h.ravel(), "D": g.reshape(-1), "aux": u.reshape(-1), "bias": b1})
    np.testing.assert_allclose(u, h @ w1.T + b1, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(g, F.gelu(torch.from_numpy(h @ w1.T + b1), approximate="tanh"), rtol=1e-12, atol=1e-12)


@needs_extension
@pytest.mark.parametrize("shape", SHAPES)
def test_dgelu_dgrad_is_the_gradient_of_autograd(descriptors, shape):
    M, N, D = shape
    rng = np.random.default_rng(1)
    dbranch, w2, u = rng.normal(size=(M, D)), rng.normal(size=(D, N)), rng.normal(size=(M, N))
    du, db1 = np.full((M, N), np.nan), np.full(N, np.nan)
    call = json.loads(descriptors("dgelu_dgrad", M, N, D, "float16"))
    cublaslt_matmul(
        call, {"A": w2.ravel(), "B": dbranch.ravel(), "D": du.reshape(-1), "aux": u.reshape(-1), "bias": db1}
    )
    z, b = torch.from_numpy(u).requires_grad_(), torch.zeros(N, dtype=torch.float64, requires_grad=True)
    f = F.gelu(z + b, approximate="tanh") @ torch.from_numpy(w2).T
    f.backward(torch.from_numpy(dbranch))
    np.testing.assert_allclose(du, z.grad, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(db1, b.grad, rtol=1e-11, atol=1e-12)


@needs_extension
def test_cublaslt_stores_what_the_plan_says():
    if not cublaslt_present():
        pytest.skip("nvidia-cublas is not installed")
    for op in ("linear_gelu", "dgelu_dgrad"):
        for dtype, code in (("bfloat16", 14), ("float16", 2)):
            plan = json.loads(ops.cublaslt_plan(op, 256, 4608, 1152, dtype))
            back = json.loads(ops.cublaslt_descriptors(op, 256, 4608, 1152, dtype))
            for key in ("transa", "transb", "epilogue", "aux_ld"):
                assert back[key] == plan[key]
            for matrix in "ABD":
                assert back[matrix] == {**plan[matrix], "type": code, "order": 0}
            assert (back["aux"], back["bias"]) == (64, 80)  # the addresses that stand for AUX and bias


@needs_extension
@pytest.mark.parametrize(("arguments", "message"), [
    (("gelu", 8, 8, 8, "bfloat16"), "op must be linear_gelu or dgelu_dgrad; got 'gelu'"),
    (("linear_gelu", 8, 8, 8, "int8"), "dtype must be bfloat16, float16 or float32; got 'int8'"),
    (("linear_gelu", -1, 8, 8, "float16"), r"not be negative.*M = -1, N = 8, K = 8 in float16"),
])  # fmt: skip
def test_a_bad_plan_says_what_was_expected(arguments, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        ops.cublaslt_plan(*arguments)


# -- the calls, through a cuBLASLt made for the test -----------------------------------------------------------------
@needs_extension
def test_the_calls_reach_the_library_as_documented(tmp_path):
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if not compiler:
        pytest.skip("no C++ compiler")
    library = tmp_path / "libfake.so"
    source = HERE / "fake_cublaslt.cpp"
    subprocess.run([compiler, "-O1", "-std=c++17", "-shared", "-fPIC", source, "-o", library], check=True)
    code = """
        import os, sys, torch
        from torch.nn import functional as F
        from difffit_fast import _ext
        assert _ext.load()
        ops = torch.ops.difffit_fast_cpp
        os.environ["DIFFFIT_FAST_CUBLASLT_LIBRARY"] = sys.argv[1] + ".nothing"  # told, and tried again at the next call
        try:
            ops.cublaslt_descriptors("linear_gelu", 8, 8, 8, "bfloat16")
        except RuntimeError as error:
            assert "DIFFFIT_FAST_CUBLASLT_LIBRARY cannot be loaded" in str(error) and ".nothing" in str(error)
        else:
            raise AssertionError("a library that is not there was loaded")
        os.environ["DIFFFIT_FAST_CUBLASLT_LIBRARY"] = sys.argv[1]
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
            for M, N, K in ((5, 16, 24), (37, 72, 8)):
                make = lambda *s: torch.randn(*s).to(dtype)
                h, w1, b1 = make(M, K), make(N, K), make(N)
                g, u = torch.empty(M, N, dtype=dtype), torch.empty(M, N, dtype=dtype)
                assert ops.cublaslt_run("linear_gelu", w1, h, g, u, b1, M, N, K) == 2
                want = F.linear(h.double(), w1.double(), b1.double())
                torch.testing.assert_close(u.double(), want, rtol=tolerance, atol=tolerance)
                want = F.gelu(want, approximate="tanh")
                torch.testing.assert_close(g.double(), want, rtol=tolerance, atol=tolerance)

                dbranch, w2, z = make(M, K), make(K, N), u.double().requires_grad_()
                du, db1 = torch.empty(M, N, dtype=dtype), torch.empty(N, dtype=dtype)
                assert ops.cublaslt_run("dgelu_dgrad", w2, dbranch, du, u, db1, M, N, K) == 2
                (F.gelu(z, approximate="tanh") @ w2.double().T).backward(dbranch.double())
                torch.testing.assert_close(du.double(), z.grad, rtol=tolerance, atol=tolerance)
                torch.testing.assert_close(db1.double(), z.grad.sum(0), rtol=tolerance, atol=4 * tolerance)
        x = torch.randn(8, 8)
        assert ops.cublaslt_run("linear_gelu", x, x, x.clone(), x.clone(), x[0].clone(), 8, 8, 8) == 0  # not supported
        print("passed")
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(library)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert run.stdout.strip() == "passed", run.stderr


# -- checks and choices in C++ ---------------------------------------------------------------------------------------
@needs_extension
@pytest.mark.parametrize(("problem", "reason"), [
    ((256, 4608, 1152, "bfloat16", 256), ""),
    ((1, 8, 8, "float16", 16), ""),
    ((256, 4608, 1152, "float32", 256), "float32 is not fused"),
    ((256, 4604, 1152, "bfloat16", 256), "N = 4604 is not a multiple of 8"),
    ((256, 4608, 37, "bfloat16", 256), "K = 37 is not a multiple of 8"),
    ((0, 4608, 1152, "bfloat16", 256), "a size is 0"),
    ((256, 4608, 1152, "bfloat16", 8), "aligned to 8 bytes, not to 16"),
    ((1 << 31, 4608, 1152, "bfloat16", 256), "exceeds 2^31 - 1"),
])  # fmt: skip
def test_refusals_give_the_reason(problem, reason):
    told = ops.cublaslt_refusal(*problem)
    assert reason in told and bool(reason) == bool(told)


@needs_extension
def test_alignment_workspace_and_status():
    assert ops.cublaslt_alignment([512, 1024]) == 256
    assert ops.cublaslt_alignment([512, 4096 + 16, 64]) == 16
    assert ops.cublaslt_alignment([512, 1026]) == 2
    assert [ops.cublaslt_workspace(major) >> 20 for major in (8, 9, 10, 12)] == [4, 32, 32, 32]
    assert ops.cublaslt_status(15) == "CUBLAS_STATUS_NOT_SUPPORTED (15)"
    assert ops.cublaslt_status(99) == "unknown status (99)"


@needs_extension
@pytest.mark.parametrize(("times", "best"), [
    ([[3, 3, 3], [1, 9, 2], [2, 2, 2.5]], 1),  # medians 3, 2, 2: the lower index wins a tie
    ([[-1, -1, -1], [5, 5, 5]], 1),  # a failed candidate is never chosen
    ([[-1], [-1]], -1),
    ([[1, 1, 1, 100], [2, 2, 2, 2]], 0),  # one slow run does not matter
])  # fmt: skip
def test_the_smallest_median_wins(times, best):
    assert ops.cublaslt_fastest(torch.tensor(times, dtype=torch.float32)) == best


@needs_extension
def test_the_first_choice_stays_for_all_threads():
    wrong, kept = ops.cublaslt_cache(64, 5)
    assert wrong == 0
    entries = json.loads(kept)
    assert len(entries) == 5
    assert all(e["timed"] and e["dtype"] == "bfloat16" and e["median_ms"] == [1.5, -1.0] for e in entries)


# -- the column sum, thread by thread --------------------------------------------------------------------------------
@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (1, 1), (7, 8), (33, 72), (257, 264), (4097, 40), (5000, 37)])
def test_the_cuda_column_sum_covers_every_element_once(dtype, shape):
    x = torch.randint(-8, 9, shape).to(dtype)  # sums of small integers are exact in float32
    for vectors in (True, False):
        assert torch.equal(ops.colsum_emulated(x, vectors), x.double().sum(0).float())


@needs_extension
def test_the_cuda_column_sum_does_not_depend_on_the_vector_width():
    x = torch.randn(3000, 264)
    torch.testing.assert_close(ops.colsum_emulated(x, True).double(), x.double().sum(0), rtol=1e-5, atol=1e-4)
    assert torch.equal(ops.colsum_emulated(x, True), ops.colsum_emulated(x, False))


# -- fused or not ----------------------------------------------------------------------------------------------------
def test_on_the_cpu_nothing_is_fused(monkeypatch):
    monkeypatch.setenv("DIFFFIT_FAST_CUBLASLT", "always")
    h, w1, b1, w2 = torch.randn(5, 8), torch.randn(16, 8), torch.randn(16), torch.randn(8, 16)
    before = fused.report()["decisions"]
    g, u = fused.linear_gelu(h, w1, b1, lambda u: F.gelu(u, approximate="tanh"))
    torch.testing.assert_close(u, F.linear(h, w1, b1))
    torch.testing.assert_close(g, F.gelu(u, approximate="tanh"))
    du, db1 = fused.dgelu_dgrad(h, w2, u, lambda dg, u: (dg * u, (dg * u).sum(0)))
    torch.testing.assert_close(du, (h @ w2) * u)
    torch.testing.assert_close(db1, du.sum(0))
    assert fused.report()["decisions"] == before


@pytest.mark.parametrize(("setting", "dtype", "N", "K", "reason"), [
    ("never", torch.bfloat16, 16, 8, "DIFFFIT_FAST_CUBLASLT=never"),
    ("auto", torch.float32, 16, 8, "torch.float32 is not fused"),
    ("auto", torch.bfloat16, 12, 8, "N = 12 and K = 8 must be multiples of 8"),
    ("auto", torch.bfloat16, 16, 0, "a size is 0"),
])  # fmt: skip
def test_why_a_cuda_product_is_not_fused(monkeypatch, setting, dtype, N, K, reason):
    monkeypatch.setenv("DIFFFIT_FAST_CUBLASLT", setting)
    monkeypatch.setenv("DIFFFIT_FAST_KERNELS", "auto")
    assert reason in fused.refusal(CudaLike(4, K, dtype), N, K)


class CudaLike:
    """What the decision looks at, of a CUDA tensor."""

    def __init__(self, M: int, K: int, dtype: torch.dtype) -> None:
        self.device, self.dtype, self.shape = torch.device("cuda", 0), dtype, (M, K)

    def numel(self) -> int:
        return self.shape[0] * self.shape[1]


def test_always_without_the_cuda_kernels_is_an_error(monkeypatch):
    monkeypatch.setattr(fused, "cuda_ops", lambda: None)
    monkeypatch.setenv("DIFFFIT_FAST_KERNELS", "auto")
    monkeypatch.setenv("DIFFFIT_FAST_CUBLASLT", "always")
    with pytest.raises(DiffFitError, match="DIFFFIT_FAST_CUBLASLT=always, but the extension was built without"):
        fused.refusal(CudaLike(4, 8, torch.bfloat16), 16, 8)
    monkeypatch.setenv("DIFFFIT_FAST_CUBLASLT", "auto")
    assert "built without its CUDA sources" in fused.refusal(CudaLike(4, 8, torch.bfloat16), 16, 8)
    monkeypatch.setenv("DIFFFIT_FAST_CUBLASLT", "sometimes")
    with pytest.raises(DiffFitError, match="must be one of auto, always, never; got 'sometimes'"):
        fused.cublaslt_mode()


# -- choosing by time, with a clock made for the test ----------------------------------------------------------------
CPU = torch.device("cpu")


def chooser(times: dict[str, Any], default: str = "unfused") -> tuple[Chooser, list[str]]:
    """A chooser whose candidates need the given microseconds (an exception is raised), and the calls it has timed."""
    timed: list[str] = []

    def timer(call: Any, device: torch.device) -> float:
        name = call()
        timed.append(name)
        if isinstance(times[name], Exception):
            raise times[name]
        return times[name]

    return Chooser(default, timer), timed


def candidates() -> dict[str, Any]:
    return {"unfused": lambda: "unfused", "cublaslt": lambda: "cublaslt"}


@pytest.mark.parametrize(("fused_us", "chosen"), [(50.0, "cublaslt"), (99.0, "unfused"), (150.0, "unfused")])
def test_only_a_clear_advantage_replaces_the_default(fused_us, chosen):
    pick, timed = chooser({"unfused": 100.0, "cublaslt": fused_us})
    assert pick.choose(("a",), candidates(), CPU) == chosen
    count = len(timed)
    assert pick.choose(("a",), candidates(), CPU) == chosen and len(timed) == count  # remembered
    pick.choose(("b",), candidates(), CPU)
    assert len(timed) == 2 * count  # another problem is timed anew
    entry = pick.report()[0]
    assert entry["chosen"] == chosen and entry["times_us"] == {"unfused": 100.0, "cublaslt": fused_us}


def test_a_candidate_that_fails_is_not_used_and_the_reason_is_told():
    pick, _ = chooser({"unfused": 100.0, "cublaslt": RuntimeError("cuBLASLt has no algorithm for this\nmore")})
    assert pick.choose(("a",), candidates(), CPU) == "unfused"
    assert pick.report()[0]["why"] == "cublaslt failed: cuBLASLt has no algorithm for this"
    pick, _ = chooser({"unfused": RuntimeError("out of memory"), "cublaslt": 1.0})
    assert pick.choose(("a",), candidates(), CPU) == "cublaslt"  # even the default
    pick, _ = chooser({"unfused": RuntimeError("out of memory"), "cublaslt": RuntimeError("out of memory")})
    with pytest.raises(RuntimeError, match="out of memory"):
        pick.choose(("a",), candidates(), CPU)


def test_nothing_is_timed_when_results_must_repeat_and_the_choice_is_made_later():
    pick, timed = chooser({"unfused": 100.0, "cublaslt": 10.0})
    torch.use_deterministic_algorithms(True)
    try:
        assert pick.choose(("a",), candidates(), CPU) == "unfused"
    finally:
        torch.use_deterministic_algorithms(False)
    assert not timed and "deterministic" in pick.report()[0]["why"]
    assert pick.choose(("a",), candidates(), CPU) == "cublaslt"
    assert len(pick.report()) == 1
    torch.use_deterministic_algorithms(True)
    try:  # a choice made by the clock before is not used either
        assert pick.choose(("a",), candidates(), CPU) == "unfused"
    finally:
        torch.use_deterministic_algorithms(False)
    pick.clear()
    assert pick.report() == []


def test_the_report_is_part_of_the_kernel_report():
    choices = _ext.kernel_report()["choices"]
    report = choices["cublaslt"]
    assert set(report) == {"mode", "cublaslt", "decisions", "algorithms"}
    assert choices["colsum"] == []
    json.dumps(choices)
