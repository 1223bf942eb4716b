"""The CUDA C++ operations on a GPU: numbers against float64, repeatability, graph capture, streams, devices, fallback.

The yardstick for the numbers is the same computation in plain PyTorch in the same dtype: our error against float64 may
be at most 1.5 times its error (plus a thousandth of the scale, for results that the yardstick happens to hit exactly).
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from difffit_fast.graph import capture
from difffit_fast.ops import linear_gelu as fused
from difffit_fast.ops.dispatch import cuda_ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.is_available() and cuda_ops() is None, reason="built without the CUDA sources"),
]

DTYPES = [torch.bfloat16, torch.float16]
SHAPES = [(1, 8, 8), (37, 72, 16), (256, 4608, 1152), (1000, 1536, 384)]  # M, N, K


def gelu(u: Tensor) -> Tensor:
    return F.gelu(u, approximate="tanh")


def slope(u: Tensor) -> Tensor:
    k = math.sqrt(2 / math.pi)
    t = torch.tanh(k * (u + 0.044715 * u**3))
    return 0.5 * (1 + t) + 0.5 * u * (1 - t * t) * k * (1 + 3 * 0.044715 * u * u)


def gelu_backward(dg: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    du = dg.float() * slope(u.float())
    return du.to(u.dtype), du.sum(0)


def operands(M: int, N: int, K: int, dtype: torch.dtype, device: str | torch.device = "cuda") -> dict[str, Tensor]:
    make = lambda *s: torch.randn(*s, device=device).to(dtype)  # noqa: E731
    return {
        "h": make(M, K), "w1": make(N, K) / math.sqrt(K), "b1": make(N),
        "dbranch": make(M, K), "w2": make(K, N) / math.sqrt(K), "u": make(M, N),
    }  # fmt: skip


def assert_as_good(ours: Tensor, plain: Tensor, truth: Tensor, what: str) -> None:
    scale = truth.abs().max().item()
    error, yardstick = (ours.double() - truth).abs().max().item(), (plain.double() - truth).abs().max().item()
    assert error <= 1.5 * yardstick + 1e-3 * scale, f"{what}: error {error:.3g}, plain PyTorch {yardstick:.3g}"


# -- numbers ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_linear_gelu(dtype, shape):
    t = operands(*shape, dtype)
    g, u = torch.ops.difffit_fast_cuda.linear_gelu(t["h"], t["w1"], t["b1"])
    truth = F.linear(t["h"].double(), t["w1"].double(), t["b1"].double())
    plain = F.linear(t["h"], t["w1"], t["b1"])
    assert_as_good(u, plain, truth, "u")
    assert_as_good(g, gelu(plain), gelu(truth), "g")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_dgelu_dgrad(dtype, shape):
    t = operands(*shape, dtype)
    du, db1 = torch.ops.difffit_fast_cuda.dgelu_dgrad(t["dbranch"], t["w2"], t["u"])
    truth = (t["dbranch"].double() @ t["w2"].double()) * slope(t["u"].double())
    plain = torch.ops.aten.gelu_backward(t["dbranch"] @ t["w2"], t["u"], approximate="tanh")
    assert db1.dtype == torch.float32
    assert_as_good(du, plain, truth, "du")
    assert_as_good(db1, plain.sum(0), truth.sum(0), "db1")


@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES])
@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (37, 199), (257, 264), (4097, 1152), (32768, 1152), (70000, 8)])
def test_colsum(dtype, shape):
    x = torch.randn(*shape, device="cuda").to(dtype)
    out = torch.ops.difffit_fast_cuda.colsum(x)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), x.double().sum(0), rtol=1e-5, atol=1e-5 * math.sqrt(shape[0] + 1) * 4)
    if x.numel() and dtype != torch.float16:
        assert torch.equal(out.cpu(), torch.ops.difffit_fast_cpp.colsum_emulated(x.cpu(), True))


def test_colsum_of_a_column_range():
    x = torch.randn(300, 3 * 72, device="cuda", dtype=torch.bfloat16)
    for first, last in ((0, 72), (3, 75), (100, 101)):  # aligned, misaligned, one column
        part = x[:, first:last]
        torch.testing.assert_close(
            torch.ops.difffit_fast_cuda.colsum(part).double(), part.double().sum(0), rtol=1e-5, atol=1e-4
        )


def test_no_rows():
    t = operands(0, 16, 8, torch.bfloat16)
    g, u = torch.ops.difffit_fast_cuda.linear_gelu(t["h"], t["w1"], t["b1"])
    du, db1 = torch.ops.difffit_fast_cuda.dgelu_dgrad(t["dbranch"], t["w2"], t["u"])
    assert g.shape == u.shape == du.shape == (0, 16)
    assert torch.equal(db1, torch.zeros(16, device="cuda"))


# -- the same bits ---------------------------------------------------------------------------------------------------
def test_the_same_input_gives_the_same_bits():
    t = operands(1000, 4608, 1152, torch.bfloat16)
    ops = torch.ops.difffit_fast_cuda
    for call in (
        lambda: ops.linear_gelu(t["h"], t["w1"], t["b1"]),
        lambda: ops.dgelu_dgrad(t["dbranch"], t["w2"], t["u"]),
        lambda: (ops.colsum(t["u"]),),
    ):
        first = call()
        for _ in range(5):
            assert all(torch.equal(a, b) for a, b in zip(first, call(), strict=True))


# -- streams, graphs, devices ----------------------------------------------------------------------------------------
def test_the_current_stream_is_used():
    t = operands(256, 1536, 384, torch.bfloat16)
    ops = torch.ops.difffit_fast_cuda
    ops.linear_gelu(t["h"], t["w1"], t["b1"])  # chosen outside the stream
    want = ops.linear_gelu(t["h"] * 2, t["w1"], t["b1"])
    side = torch.cuda.Stream()
    h = t["h"].clone()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # a product on another stream would read h before it is doubled
        h.mul_(2)
        got = ops.linear_gelu(h, t["w1"], t["b1"])
    torch.cuda.current_stream().wait_stream(side)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("met_before", [True, False])
def test_graph_capture(met_before):
    M = 512 if met_before else 520  # another problem, so that nothing is known about it
    t = operands(M, 1536, 384, torch.bfloat16)
    ops = torch.ops.difffit_fast_cuda
    out: dict[str, Tensor] = {}

    def step() -> None:
        out["g"], out["u"] = ops.linear_gelu(t["h"], t["w1"], t["b1"])
        out["du"], out["db1"] = ops.dgelu_dgrad(t["dbranch"], t["w2"], out["u"])
        out["sum"] = ops.colsum(out["du"])

    if met_before:
        replay = capture(step)
    else:
        torch.mm(t["h"], t["w1"].t())  # cuBLAS itself is set up outside the capture
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        replay = graph.replay
    t["h"].normal_()
    t["dbranch"].normal_()
    replay()
    got = {name: x.clone() for name, x in out.items()}
    u = F.linear(t["h"].double(), t["w1"].double(), t["b1"].double())
    torch.testing.assert_close(got["u"].double(), u, rtol=2e-2, atol=2e-2)
    du = (t["dbranch"].double() @ t["w2"].double()) * slope(got["u"].double())
    torch.testing.assert_close(got["du"].double(), du, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(got["sum"].double(), got["du"].double().sum(0), rtol=1e-4, atol=1e-3)


def test_a_problem_first_met_in_a_capture_is_timed_afterwards(monkeypatch):
    monkeypatch.setenv("DIFFFIT_FAST_CUBLASLT", "auto")
    fused.forget()
    t = operands(136, 1536, 384, torch.bfloat16)
    call = lambda: fused.linear_gelu(t["h"], t["w1"], t["b1"], gelu)  # noqa: E731
    torch.mm(t["h"], t["w1"].t())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    (entry,) = fused.report()["decisions"]
    assert entry["chosen"] == "unfused" and "graph capture" in entry["why"]
    call()
    (entry,) = fused.report()["decisions"]
    assert set(entry["times_us"]) == {"unfused", "cublaslt"} and all(t > 0 for t in entry["times_us"].values())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_that_is_not_current():
    t = operands(64, 72, 16, torch.bfloat16, "cuda:1")
    with torch.cuda.device(0):
        g, _ = torch.ops.difffit_fast_cuda.linear_gelu(t["h"], t["w1"], t["b1"])
        total = torch.ops.difffit_fast_cuda.colsum(t["u"])
        assert torch.cuda.current_device() == 0
    assert g.device == total.device == torch.device("cuda", 1)
    torch.testing.assert_close(g, gelu(F.linear(t["h"], t["w1"], t["b1"])), rtol=2e-2, atol=2e-2)
    with pytest.raises(RuntimeError, match="w1 must be on CUDA device 1"):
        torch.ops.difffit_fast_cuda.linear_gelu(t["h"], t["w1"].to("cuda:0"), t["b1"])


# -- the choice, and what is refused ---------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", ["auto", "always", "never"])
@pytest.mark.parametrize(("shape", "dtype"), [
    ((256, 1536, 384), torch.bfloat16),
    ((256, 1536, 384), torch.float16),
    ((37, 74, 18), torch.bfloat16),  # not multiples of 8
    ((64, 72, 16), torch.float32),
])  # fmt: skip
def test_every_mode_gives_the_same_numbers(monkeypatch, mode, shape, dtype):
    monkeypatch.setenv("DIFFFIT_FAST_CUBLASLT", mode)
    fused.forget()
    t = operands(*shape, dtype)
    g, u = fused.linear_gelu(t["h"], t["w1"], t["b1"].float(), gelu)
    du, db1 = fused.dgelu_dgrad(t["dbranch"], t["w2"], t["u"], gelu_backward)
    truth = F.linear(t["h"].double(), t["w1"].double(), t["b1"].double())
    plain = F.linear(t["h"], t["w1"], t["b1"])
    assert_as_good(u, plain, truth, "u")
    assert_as_good(g, gelu(plain), gelu(truth), "g")
    dtruth = (t["dbranch"].double() @ t["w2"].double()) * slope(t["u"].double())
    dplain = torch.ops.aten.gelu_backward(t["dbranch"] @ t["w2"], t["u"], approximate="tanh")
    assert_as_good(du, dplain, dtruth, "du")
    assert_as_good(db1, dplain.sum(0), dtruth.sum(0), "db1")
    chosen = {entry["chosen"] for entry in fused.report()["decisions"]}
    fusable = dtype != torch.float32 and shape[1] % 8 == 0
    assert chosen <= {"cublaslt", "unfused"}
    if mode != "auto" or not fusable:
        assert chosen == {"cublaslt" if mode == "always" and fusable else "unfused"}


def test_views_at_odd_addresses_are_copied(monkeypatch):
    monkeypatch.setenv("DIFFFIT_FAST_CUBLASLT", "always")
    h = torch.randn(16 * 64 + 1, device="cuda").bfloat16()[1:].view(16, 64)  # 2 bytes past an aligned address
    w1, b1 = torch.randn(72, 64, device="cuda").bfloat16(), torch.zeros(72, device="cuda")
    g, _ = fused.linear_gelu(h, w1, b1, gelu)
    torch.testing.assert_close(g, gelu(h @ w1.t()), rtol=3e-2, atol=3e-2)
    with pytest.raises(RuntimeError, match="cannot be fused: the tensors are aligned to 2 bytes, not to 16"):
        torch.ops.difffit_fast_cuda.linear_gelu(h, w1, b1.bfloat16())


@pytest.mark.parametrize(("change", "message"), [
    ({"h": lambda x: x.float()}, "must be bfloat16 or float16; got Float"),
    ({"b1": lambda x: x.float()}, "b1 must have dtype BFloat16; got Float"),
    ({"b1": lambda x: x[:-8]}, r"b1 must have shape \(24\); got \(16\)"),
    ({"w1": lambda x: x[:, :-8]}, r"w1 must have shape \(24, 32\); got \(24, 24\)"),
    ({"h": lambda x: x.t().contiguous().t()}, "h must be contiguous"),
    ({"h": lambda x: x[0]}, r"h must have 2 dimensions; got shape \(32\)"),
])  # fmt: skip
def test_wrong_arguments_are_named(change, message):
    t = operands(16, 24, 32, torch.bfloat16)
    t.update({name: edit(t[name]) for name, edit in change.items()})
    with pytest.raises(RuntimeError, match=message):
        torch.ops.difffit_fast_cuda.linear_gelu(t["h"], t["w1"], t["b1"])


def test_cpu_tensors_have_no_cuda_kernel():
    with pytest.raises((NotImplementedError, RuntimeError)):
        torch.ops.difffit_fast_cuda.colsum(torch.zeros(2, 2))


def test_the_report_tells_versions_and_times(monkeypatch):
    monkeypatch.setenv("DIFFFIT_FAST_CUBLASLT", "auto")
    fused.forget()
    t = operands(264, 1536, 384, torch.bfloat16)
    fused.linear_gelu(t["h"], t["w1"], t["b1"], gelu)
    report = fused.report()
    assert report["cublaslt"] >= 120000
    (entry,) = report["decisions"]
    assert entry["problem"] == ("linear_gelu", "cuda:0", "bfloat16", 264, 1536, 384)
    (algorithms,) = [a for a in report["algorithms"] if a["M"] == 264 and a["timed"]]
    assert 1 <= len(algorithms["median_ms"]) <= 8
