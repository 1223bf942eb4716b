"""Every operation and every kernel that is tested, with its truth, its inputs, its sizes and its types: one table each.

:data:`CASES` are the operations as the model calls them, with their gradients (test_ops.py). :data:`KERNELS` are the
functions under them that every room has by the same name (test_kernels.py, test_cpp_kernels.py).
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from optest import BF16, F16, F32, KERNEL_SLACK, close, draw
from torch import Tensor
from torch.nn import functional as F

from difffit_fast.ops.adaln import adaln
from difffit_fast.ops.attention import attention
from difffit_fast.ops.colsum import colsum
from difffit_fast.ops.frozen_linear import frozen_linear
from difffit_fast.ops.frozen_mlp import frozen_mlp
from difffit_fast.ops.frozen_qkv import frozen_qkv
from difffit_fast.ops.residual import residual, residual_adaln

EPS = 1e-6
HEADS = 3
Size = tuple[int, ...]


# -- the truth -------------------------------------------------------------------------------------------------------
def true_adaln(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * scale[:, None] + shift[:, None]


def true_residual(x: Tensor, branch: Tensor, gate: Tensor, bias: Tensor) -> Tensor:
    return x + gate[:, None] * branch + bias[:, None]


def true_residual_adaln(
    x: Tensor, branch: Tensor, gate: Tensor, bias: Tensor, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor]:
    y = true_residual(x, branch, gate, bias)
    return y, true_adaln(y, scale, shift)


def true_mlp(h: Tensor, w1: Tensor, b1: Tensor, w2: Tensor) -> Tensor:
    return F.gelu(h @ w1.t() + b1, approximate="tanh") @ w2.t()


def true_attention(qkv: Tensor, heads: int = HEADS) -> Tensor:
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return (torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, -1) @ v).transpose(1, 2).flatten(2)


def qkv_chain(h: Tensor, weight: Tensor, bias_q: Tensor, gamma: Tensor | None = None) -> Tensor:
    return attention(frozen_qkv(h, weight, bias_q, gamma), HEADS)


def true_qkv_chain(h: Tensor, weight: Tensor, bias_q: Tensor, gamma: Tensor | None = None) -> Tensor:
    """Attention of an ordinary projection: the whole chain, since γ of the keys is read from the query third."""
    z = h @ weight.t() + torch.cat([bias_q, bias_q.new_zeros(2 * bias_q.shape[0])])
    return true_attention(z if gamma is None else z * gamma)


# -- the inputs ------------------------------------------------------------------------------------------------------
def adaln_inputs(size: Size, stream: torch.dtype, branch: torch.dtype) -> list[Tensor]:
    b, t, d = size
    return [draw(b, t, d, dtype=stream, shift=0.5), draw(b, d, dtype=F32), draw(b, d, dtype=F32)]


def residual_inputs(vectors: int, size: Size, stream: torch.dtype, branch: torch.dtype) -> list[Tensor]:
    b, t, d = size
    return [draw(b, t, d, dtype=stream), draw(b, t, d, dtype=branch), *(draw(b, d, dtype=F32) for _ in range(vectors))]


def linear_inputs(size: Size, stream: torch.dtype, branch: torch.dtype) -> list[Tensor]:
    b, t, k, n = size
    return [draw(b, t, k, dtype=branch), draw(n, k, dtype=branch), draw(n, dtype=F32)]


def mlp_inputs(size: Size, stream: torch.dtype, branch: torch.dtype) -> list[Tensor]:
    b, t, d, f = size
    w1, w2 = draw(f, d) / d**0.5, draw(d, f) / f**0.5
    return [draw(b, t, d, dtype=branch), (2 * w1).to(branch), draw(f, dtype=F32), w2.to(branch)]


def qkv_inputs(size: Size, stream: torch.dtype, branch: torch.dtype) -> list[Tensor]:
    b, t, d = size
    weight = (draw(3 * d, d) * 1.5 / d**0.5).to(branch)
    return [draw(b, t, d, dtype=branch), weight, draw(d, dtype=F32), draw(3 * d, dtype=F32, shift=1)]


# -- the operations --------------------------------------------------------------------------------------------------
STREAMS = ((F32, F32), (F32, BF16), (BF16, BF16))  # residual stream, branch
PRODUCTS = ((F32, F32), (BF16, BF16))
ROWS = ((1, 1, 72), (2, 77, 72), (3, 37, 100), (1, 77, 384), (2, 5, 1152), (0, 4, 72), (2, 0, 72))  # B, T, D
Calls = list[tuple[str, tuple[Any, ...]]]


@dataclass(frozen=True)
class Case:
    """One operation as the model calls it.

    Args:
        op: takes the tensors of ``inputs`` (and the dtype of the branch, where ``takes_branch``).
        truth: the same in plain PyTorch, called with float64.
        trainable: which inputs may want a gradient; the others are frozen.
        calls: for given inputs, the registered operations under it with arguments for them.
        sizes: for plain PyTorch and C++; ``triton`` for the interpreter, where every launch costs; ``gpu`` for a device.
        small: size for everything that is not about numbers.
        roundings: of the branch's dtype on the way to the result or a gradient: a factor on the tolerance; float32's
            stands for sums in another order. ``roundings_gpu``: there products are long, and of float32 blocked otherwise.
    """

    name: str
    op: Callable[..., Any]
    truth: Callable[..., Any]
    inputs: Callable[[Size, torch.dtype, torch.dtype], list[Tensor]]
    trainable: tuple[bool, ...]
    calls: Callable[[list[Tensor]], Calls]
    sizes: tuple[Size, ...]
    triton: tuple[Size, ...]
    gpu: tuple[Size, ...]
    small: Size
    dtypes: tuple[tuple[torch.dtype, torch.dtype], ...] = PRODUCTS
    roundings: dict[torch.dtype, float] = field(default_factory=dict)
    roundings_gpu: dict[torch.dtype, float] = field(default_factory=dict)
    rounded_stream: float = (
        1.0  # a further factor where the stream is bf16: what is stored is rounded before it is used
    )
    takes_branch: bool = False

    def function(self, branch: torch.dtype) -> Callable[..., Any]:
        return functools.partial(self.op, out_dtype=branch) if self.takes_branch else self.op

    def factor(self, room: str, stream: torch.dtype, branch: torch.dtype) -> float:
        """On :data:`optest.TOLERANCE` of the branch's dtype."""
        roundings = {**self.roundings, **(self.roundings_gpu if room == "gpu" else {})}
        return roundings.get(branch, 1.0) * (self.rounded_stream if stream == BF16 else 1.0)


def row_case(name: str, op: Callable, truth: Callable, inputs: Callable, calls: Callable, **more: Any) -> Case:
    """An operation on the residual stream: everything it takes is trainable."""
    trainable = (True,) * len(inputs((1, 1, 1), F32, F32))
    triton, gpu = ((2, 5, 72), (1, 3, 100), (0, 4, 72)), ((1, 1, 72), (2, 256, 1152), (3, 37, 100), (0, 4, 72))
    return Case(name, op, truth, inputs, trainable, calls, ROWS, triton, gpu, (2, 5, 72), STREAMS, **more)


def adaln_calls(inputs: list[Tensor]) -> Calls:
    x, scale, shift = inputs
    h, mean, rstd = torch.ops.difffit_fast.adaln(*inputs, EPS, BF16)
    dh = torch.ones_like(h)
    return [("adaln", (x, scale, shift, EPS, BF16)), ("adaln_backward", detached(dh, x, scale, mean, rstd))]


def residual_calls(inputs: list[Tensor]) -> Calls:
    x, branch, gate, bias = inputs
    return [("residual", (x, branch, gate, bias)), ("residual_backward", detached(torch.ones_like(x), branch, gate))]


def residual_adaln_calls(inputs: list[Tensor]) -> Calls:
    _, branch, gate, _, scale, _ = inputs
    y, h, mean, rstd = torch.ops.difffit_fast.residual_adaln(*inputs, EPS)
    saved = (y, branch, gate, scale, mean, rstd)
    return [
        ("residual_adaln", (*inputs, EPS)),
        ("residual_adaln_backward", detached(torch.ones_like(h), torch.ones_like(y), *saved)),
        ("residual_adaln_backward", detached(torch.ones_like(h), None, *saved)),
    ]


def linear_calls(inputs: list[Tensor]) -> Calls:
    x, weight, bias = inputs
    dy = x.detach().new_ones(*x.shape[:-1], weight.shape[0])
    backward = [("frozen_linear_backward", (dy, weight, dx, not dx)) for dx in (True, False)]
    return [("frozen_linear", (x, weight, bias)), ("frozen_linear", (x, weight, None)), *backward]


def mlp_calls(inputs: list[Tensor]) -> Calls:
    _, w1, _, w2 = inputs
    branch, u = torch.ops.difffit_fast.frozen_mlp(*inputs)
    backward = [("frozen_mlp_backward", (*detached(torch.ones_like(branch), w1, w2, u), dh)) for dh in (True, False)]
    return [("frozen_mlp", tuple(inputs)), *backward]


def qkv_calls(inputs: list[Tensor]) -> Calls:
    h, weight, bias_q, gamma = (*inputs, None)[:4]
    qkv = torch.ops.difffit_fast.frozen_qkv(h, weight, bias_q, gamma)
    saved = detached(torch.ones_like(qkv), weight, None if gamma is None else qkv, gamma)
    backward = [("frozen_qkv_backward", (*saved, dh)) for dh in (True, False)]
    return [("frozen_qkv", (h, weight, bias_q, gamma)), *backward]


def attention_calls(inputs: list[Tensor]) -> Calls:
    calls: Calls = []
    for keep in (True, False):
        o, kept = torch.ops.difffit_fast.attention(inputs[0], HEADS, keep)
        calls += [
            ("attention", (inputs[0], HEADS, keep)),
            ("attention_backward", (*detached(torch.ones_like(o), inputs[0], kept), HEADS)),
        ]
    return calls


def detached(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else t.detach() for t in tensors)


CASES = [
    row_case("adaln", adaln, true_adaln, adaln_inputs, adaln_calls, takes_branch=True),
    row_case("residual", residual, true_residual, functools.partial(residual_inputs, 2), residual_calls),
    row_case(
        "residual_adaln", residual_adaln, true_residual_adaln, functools.partial(residual_inputs, 4),
        residual_adaln_calls, rounded_stream=2.0,  # h is the normalisation of the y that was stored
    ),
    Case(
        "colsum", colsum, lambda x: x.sum(0), lambda size, _, branch: [draw(*size, dtype=branch, shift=1)], (False,),
        lambda inputs: [("colsum", tuple(inputs))],
        sizes=((0, 5), (1, 1), (1000, 37), (77, 1152), (4099, 8)), triton=((0, 5), (77, 72)), gpu=((0, 5), (8192, 1152)),
        small=(5, 72), roundings={BF16: 2.5e-4, F16: 1.5e-3},  # the sum is float32 whatever its terms are
    ),
    Case(
        "frozen_linear", frozen_linear, F.linear, linear_inputs, (True, False, True), linear_calls,
        sizes=((1, 1, 72, 40), (2, 77, 72, 100), (0, 4, 72, 40), (3, 37, 100, 1)), triton=((2, 5, 72, 40), (0, 4, 72, 40)),
        gpu=((1, 1, 72, 40), (2, 256, 1152, 4608), (0, 4, 72, 40)), small=(2, 5, 72, 40),
        roundings_gpu={F32: 4, BF16: 3, F16: 3},
    ),
    Case(
        "frozen_mlp", frozen_mlp, true_mlp, mlp_inputs, (True, False, True, False), mlp_calls,
        sizes=((1, 1, 72, 288), (2, 77, 72, 100), (0, 4, 72, 288), (3, 37, 100, 33)), triton=((2, 5, 72, 40), (0, 4, 72, 40)),
        gpu=((1, 1, 72, 288), (2, 256, 1152, 4608), (3, 37, 100, 33), (0, 4, 72, 288)), small=(2, 5, 72, 40),
        # The pre-activation and the activation are rounded on the way: three times in the forward, four in the backward.
        roundings={BF16: 2, F16: 2}, roundings_gpu={F32: 4, BF16: 3, F16: 3},
    ),
    *(
        Case(
            name, qkv_chain, true_qkv_chain, lambda size, s, b, n=n: qkv_inputs(size, s, b)[:n], needs, qkv_calls,
            sizes=((1, 1, 72), (2, 77, 72), (0, 4, 72), (2, 37, 96)), triton=((2, 5, 72), (0, 4, 72)),
            gpu=((1, 1, 72), (2, 256, 384), (2, 256, 1152), (0, 4, 72)), small=(2, 5, 72),
            # Small query and key gradients, against the largest value of the whole, after attention's roundings.
            roundings={F32: 4, BF16: 3, F16: 3}, roundings_gpu={F32: 8, BF16: 6, F16: 6},
        )
        for name, n, needs in (
            ("frozen_qkv", 3, (True, False, True)),
            ("frozen_qkv with gamma", 4, (True, False, True, True)),
        )
    ),
    Case(
        "attention", functools.partial(attention, num_heads=HEADS, backend="bmm"), true_attention,
        lambda size, _, branch: [draw(*size[:2], 3 * size[2], dtype=branch)], (True,), attention_calls,
        sizes=((1, 1, 24), (2, 77, 72), (3, 37, 12), (0, 5, 24)), triton=((2, 5, 24),), gpu=((2, 77, 72),),
        small=(2, 5, 24), roundings={F32: 2, BF16: 2, F16: 2}, roundings_gpu={F32: 4, BF16: 3, F16: 3},
    ),
]  # fmt: skip


# -- the kernels -----------------------------------------------------------------------------------------------------
STEMS = {
    "adaln": ("adaln_forward", "adaln_backward"),
    "residual": ("residual_forward", "residual_backward", "residual_adaln_forward", "residual_adaln_backward"),
    "frozen_mlp": ("gelu_forward", "gelu_backward"),
    "frozen_qkv": ("qkv_scale", "qkv_backward"),
    "colsum": ("colsum",),
    "attention": ("softmax_forward", "softmax_backward"),
}


def kernels(room: str) -> SimpleNamespace:
    """The functions of all stems in ``room``, by name, and the ``device`` they are for."""
    if room == "cpp":
        found = {name: getattr(torch.ops.difffit_fast_cpp, name) for names in STEMS.values() for name in names}
    elif room == "reference":
        modules = {stem: importlib.import_module(f"difffit_fast.ops.{stem}") for stem in STEMS}
        found = {name: getattr(modules[stem], name) for stem, names in STEMS.items() for name in names}
        found["colsum"] = modules["colsum"].colsum_reference
    else:
        modules = {
            stem: importlib.import_module(f"difffit_fast.kernels.{stem}") for stem in STEMS if stem != "attention"
        }
        found = {name: getattr(modules[stem], name) for stem in modules for name in STEMS[stem]}
    return SimpleNamespace(**found, device="cuda" if room == "gpu" else "cpu")


def rand(*shape: int, dtype: torch.dtype = F32, seed: int = 0, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1000 * len(shape) + sum(shape))
    return (torch.randn(shape, generator=generator) * scale + shift).to(dtype)


def leaves(*tensors: Tensor) -> list[Tensor]:
    """Float64 leaves on the CPU."""
    return [t.double().cpu().requires_grad_() for t in tensors]


def check_adaln(ops: Any, B: int, T: int, D: int, X: torch.dtype, H: torch.dtype) -> None:
    x, dh = rand(B, T, D, dtype=X, seed=1, scale=2, shift=0.5), rand(B, T, D, dtype=H, seed=2)
    scale, shift = rand(B, D, seed=3, shift=1), rand(B, D, seed=4)
    there = [t.to(ops.device) for t in (x, scale, shift)]
    h, mean, rstd = ops.adaln_forward(*there, EPS, H)
    grads = ops.adaln_backward(dh.to(ops.device), *there[:2], mean, rstd)
    assert (h.dtype, mean.dtype, grads[0].dtype, grads[1].dtype) == (H, F32, X, F32)

    inputs = leaves(x, scale, shift)
    want = true_adaln(*inputs)
    want.backward(dh.double())
    close("h", h, want.detach())
    close("mean", mean, x.double().mean(-1))
    close("rstd", rstd, 1 / (x.double().var(-1, unbiased=False) + EPS).sqrt())
    for name, got, leaf in zip(("dx", "dscale", "dshift"), grads, inputs, strict=True):
        close(name, got, leaf.grad)


def check_residual(ops: Any, B: int, T: int, D: int, X: torch.dtype, H: torch.dtype) -> None:
    x, dy = rand(B, T, D, dtype=X, seed=1), rand(B, T, D, dtype=X, seed=2)
    branch = rand(B, T, D, dtype=H, seed=3)
    gate, bias = rand(B, D, seed=5), rand(B, D, seed=6)
    there = [t.to(ops.device) for t in (x, branch, gate, bias)]
    y = ops.residual_forward(*there)
    grads = ops.residual_backward(dy.to(ops.device), *there[1:3])
    assert (y.dtype, grads[0].dtype, grads[1].dtype) == (X, H, F32)

    inputs = leaves(x, branch, gate, bias)
    want = true_residual(*inputs)
    want.backward(dy.double())
    close("y", y, want.detach())
    for name, got, leaf in zip(("dbranch", "dgate", "dbias"), grads, inputs[1:], strict=True):
        close(name, got, leaf.grad)


def check_residual_adaln(ops: Any, B: int, T: int, D: int, X: torch.dtype, H: torch.dtype) -> None:
    x, dy = rand(B, T, D, dtype=X, seed=1), rand(B, T, D, dtype=X, seed=2)
    branch, dh = rand(B, T, D, dtype=H, seed=3), rand(B, T, D, dtype=H, seed=4)
    vectors = gate, bias, scale, shift = [rand(B, D, seed=i) for i in (5, 6, 7, 8)]
    there = [t.to(ops.device) for t in (x, branch, *vectors)]
    y, h, mean, rstd = ops.residual_adaln_forward(*there, EPS)
    assert (y.dtype, h.dtype) == (X, H)
    close("y", y, true_residual(*(t.double() for t in (x, branch, gate, bias))))

    # LayerNorm sees y as it was stored: take the rounding out of the chain x, branch -> y.
    y64, scale64, shift64 = leaves(y, scale, shift)
    want_h = true_adaln(y64, scale64, shift64)
    want_h.backward(dh.double())
    close("h", h, want_h.detach())
    off = (mean.double().cpu() - y64.detach().mean(-1)).abs().max()
    assert off <= KERNEL_SLACK * y64.abs().max(), f"mean: off by {off:.2e}"  # of the values: the mean itself is near 0
    close("rstd", rstd, 1 / (y64.detach().var(-1, unbiased=False) + EPS).sqrt())
    for other in (dy, None):
        saved = (y, there[1], there[2], there[4], mean, rstd)
        grads = ops.residual_adaln_backward(dh.to(ops.device), None if other is None else other.to(ops.device), *saved)
        g = y64.grad + (0 if other is None else other.double())
        wanted = {
            "dx": g, "dbranch": g * gate.double()[:, None], "dgate": (g * branch.double()).sum(1), "dbias": g.sum(1),
            "dscale": scale64.grad, "dshift": shift64.grad,
        }  # fmt: skip
        for (name, want), got in zip(wanted.items(), grads, strict=True):
            # Without dy the sum of g over a row vanishes, so for one token of few features dbias is small against g.
            close(name, got, want, slack=1e-5 if name in ("dgate", "dbias") else 2e-6)


def check_gelu(ops: Any, M: int, N: int, dtype: torch.dtype) -> None:
    u, dg = rand(M, N, dtype=dtype, seed=1, scale=3), rand(M, N, dtype=dtype, seed=2)
    (u64,) = leaves(u)
    want = F.gelu(u64, approximate="tanh")
    want.backward(dg.double())
    close("g", ops.gelu_forward(u.to(ops.device)), want.detach())
    du, db = ops.gelu_backward(dg.to(ops.device), u.to(ops.device))
    close("du", du, u64.grad)
    close("db", db, u64.grad.sum(0))


def check_colsum(ops: Any, M: int, N: int, dtype: torch.dtype) -> None:
    x = rand(M, N, dtype=dtype, seed=1)
    out = ops.colsum(x.to(ops.device))
    assert out.dtype == F32
    close("colsum", out, x.double().sum(0))


def check_qkv(ops: Any, M: int, D: int, dtype: torch.dtype) -> None:
    z, dqkv = rand(M, 3 * D, dtype=dtype, seed=1), rand(M, 3 * D, dtype=dtype, seed=2)
    gamma, bias = rand(3 * D, seed=3, shift=0.3), rand(D, seed=4)
    factor, wide, d64 = gamma.double(), z.double(), dqkv.double()
    there, gamma_there, d_there = z.to(ops.device, copy=True), gamma.to(ops.device), dqkv.to(ops.device)
    assert ops.qkv_scale(there, gamma_there, bias.to(ops.device)) is None
    close("qkv", there, torch.cat([wide[:, :D] + bias.double(), wide[:, D:]], 1) * factor)

    dz, dbias, dgamma = ops.qkv_backward(d_there, there, gamma_there)
    dots = (d64 * there.double().cpu()).sum(0)
    dots = torch.cat([dots[:D], dots[:D], dots[2 * D :]])  # the keys' sum is taken from the queries
    close("dz", dz, d64 * factor)
    close("dbias_q", dbias, factor[:D] * d64[:, :D].sum(0))
    close("dgamma", dgamma.cpu() * gamma, dots)

    dz, dbias, none = ops.qkv_backward(d_there, None, None)
    assert torch.equal(dz.cpu(), dqkv) and none.shape == (0,)
    close("dbias_q without gamma", dbias, d64[:, :D].sum(0))


def check_softmax(ops: Any, N: int, T: int, S: int, G: torch.dtype, P: torch.dtype) -> None:
    for scale in (0.125, 3.0, -0.5):
        scores, dp = rand(N, T, S, dtype=P, seed=1, scale=4), rand(N, T, S, dtype=G, seed=2)
        p, ds = scores.clone(), dp.clone()
        assert ops.softmax_forward(p, scale) is None
        close("p", p, torch.softmax(scores.double() * scale, -1))
        assert ops.softmax_backward(ds, p, scale) is None
        p64, dp64 = p.double(), dp.double()
        close("ds", ds, scale * p64 * (dp64 - (dp64 * p64).sum(-1, keepdim=True)))


ROW_KERNELS = {"adaln": check_adaln, "residual": check_residual, "residual_adaln": check_residual_adaln}
MATRIX_KERNELS = {"gelu": check_gelu, "colsum": check_colsum, "qkv": check_qkv}


def everything(ops: Any, B: int, T: int, D: int, X: torch.dtype, H: torch.dtype) -> list[Tensor]:
    """The outputs of all kernels of a room on the same inputs."""

    def make(*shape: int, **kwargs: Any) -> Tensor:
        return rand(*shape, **kwargs).to(ops.device)

    x, branch = make(B, T, D, dtype=X, seed=1), make(B, T, D, dtype=H, seed=2)
    gate, bias, scale, shift = (make(B, D, seed=i) for i in range(3, 7))
    y, h, mean, rstd = ops.residual_adaln_forward(x, branch, gate, bias, scale, shift, EPS)
    out = [y, h, mean, rstd, ops.residual_forward(x, branch, gate, bias), *ops.adaln_forward(x, scale, shift, EPS, H)]
    out += [*ops.residual_backward(y, branch, gate), *ops.adaln_backward(h, y, scale, mean, rstd)]
    for dy in (x, None):
        out += ops.residual_adaln_backward(h, dy, y, branch, gate, scale, mean, rstd)
    u, v = make(B * T, 3 * D, dtype=H, seed=7), make(B * T, 3 * D, dtype=H, seed=8)
    out += [ops.gelu_forward(u), *ops.gelu_backward(v, u), ops.colsum(u)]
    gamma, w = make(3 * D, seed=9, shift=2), u.clone()
    ops.qkv_scale(w, gamma, gamma[:D].contiguous())
    out += [w, *ops.qkv_backward(v, u, gamma), *ops.qkv_backward(v, None, None)]
    if hasattr(ops, "softmax_forward"):
        p, dp = make(B, T, D, dtype=H, seed=1), make(B, T, D, dtype=H, seed=2)
        ops.softmax_forward(p, 0.3)
        ops.softmax_backward(dp, p, 0.3)
        out += [p, dp]
    return out
