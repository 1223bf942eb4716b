"""What is special to the Triton kernels. Numbers, and every way to cut them: test_kernels.py."""

from __future__ import annotations

import importlib

import pytest
import torch
from op_cases import EPS, kernels, true_adaln
from optest import BF16, ROOMS, close


@pytest.mark.parametrize("room", [pytest.param(room, id=room, marks=ROOMS[room]) for room in ("triton", "gpu")])
def test_gelu_far_out(room: str) -> None:
    """Where u³ overflows, GELU is u or 0 and its slope 1 or 0."""
    ops = kernels(room)
    u = torch.tensor([[-3e38, -1e20, -12.0, -0.0, 0.0, 12.0, 1e20, 3e38]], device=ops.device)
    assert torch.equal(ops.gelu_forward(u).cpu(), u.cpu().clamp_min(0))
    du, _ = ops.gelu_backward(torch.ones_like(u), u)
    assert torch.allclose(du.cpu(), torch.tensor([[0.0, 0, 0, 0.5, 0.5, 1, 1, 1]]), atol=1e-7)


@pytest.mark.parametrize("room", [pytest.param(room, id=room, marks=ROOMS[room]) for room in ("triton", "gpu")])
def test_second_stages_together(room: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One launch for four sums of unlike sizes, more for more; what is timed on the way is not left to it."""
    sums = importlib.import_module("difffit_fast.kernels.sums")
    launches, launch = [], sums.launch
    monkeypatch.setattr(sums, "launch", lambda *args, **more: (launches.append(more["SUMS"]), launch(*args, **more)))
    shapes = ((2, 3, 130), (1, 17, 8), (3, 2, 300), (1, 9, 128), (2, 5, 40))
    parts = [torch.randn(*shape).to(kernels(room).device) for shape in shapes]
    with sums.together():
        found = [sums.finish(part)[0] for part in parts]
        assert not launches
        with sums.apart():
            (timed,) = sums.finish(parts[0])
        assert launches == [1]
        close("inside", timed, parts[0].double().sum(1).cpu())
    assert launches == [1, 4, 1]
    for part, total in zip(parts, found, strict=True):
        close("sum", total, part.double().sum(1).cpu())
    with pytest.raises(RuntimeError, match="broken"), sums.together():
        sums.finish(parts[0])
        raise RuntimeError("broken")
    assert launches == [1, 4, 1] and len(sums.finish(parts[0])) == 1 and launches[-1] == 1  # nothing waits for ever


@pytest.mark.gpu
def test_index_beyond_31_bits() -> None:
    """The last rows of a matrix of more than 2³¹ values."""
    ops = kernels("gpu")

    N, D = 4608, 1152
    M = (1 << 31) // N + 300
    u = torch.zeros(M, N, dtype=BF16, device="cuda")
    u[-64:] = torch.randn(64, N, device="cuda")
    want = torch.nn.functional.gelu(u[-64:].double(), approximate="tanh")
    close("g", ops.gelu_forward(u)[-64:], want.cpu())
    du, db = ops.gelu_backward(u, u)
    close("db", db, du[-64:].double().sum(0).cpu(), slack=6e-3)  # of the rounded values
    close("colsum", ops.colsum(u), u[-64:].double().sum(0).cpu())
    x = u.view(-1, 256, D)[: (1 << 31) // (256 * D) + 4].contiguous()
    x[-1] = torch.randn(256, D, device="cuda")
    v = torch.ones(x.shape[0], D, device="cuda")
    h, _, _ = ops.adaln_forward(x, v, v, EPS, BF16)
    close("h", h[-1:], true_adaln(x[-1:].double(), v[-1:].double(), v[-1:].double()).cpu())


@pytest.mark.gpu
def test_graph_capture() -> None:
    """A replayed graph gives the bits of a direct call, on inputs changed in between."""
    ops = kernels("gpu")

    B, T, D = 4, 256, 1152
    dh, branch = (torch.randn(B, T, D, device="cuda").bfloat16() for _ in range(2))
    dy, y = (torch.randn(B, T, D, device="cuda") for _ in range(2))
    gate, scale = (torch.randn(B, D, device="cuda") for _ in range(2))
    mean, rstd = y.mean(-1), y.var(-1, unbiased=False).rsqrt()
    arguments = (dh, dy, y, branch, gate, scale, mean, rstd)
    ops.residual_adaln_backward(*arguments)  # compile before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.residual_adaln_backward(*arguments)
    dh.copy_(torch.randn(B, T, D, device="cuda"))
    graph.replay()
    direct = ops.residual_adaln_backward(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(captured, direct, strict=True))
