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
from torch import Tensor, nn
from torch.nn import functional as F

from difffit_fast.ops.adaln import adaln
from difffit_fast.ops.attention import attention, qkv_vectors
from difffit_fast.ops.block import block
from difffit_fast.ops.colsum import colsum
from difffit_fast.ops.frozen_gelu import frozen_gelu
from difffit_fast.ops.frozen_linear import frozen_linear
from difffit_fast.ops.frozen_mlp import frozen_mlp
from difffit_fast.ops.modulation import modulation
from difffit_fast.ops.residual import residual, residual_adaln
from difffit_fast.ops.stacked import stacked_linear, stacked_matvec
from difffit_fast.ops.weights import lay_together

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


def true_stacked_linear(x: Tensor, *weights: Tensor) -> Tensor:
    return x @ torch.cat(weights).t()


def true_stacked_matvec(v: Tensor, *weights: Tensor) -> Tensor:
    return torch.einsum("l...k,lnk->l...n", v, torch.stack(weights))


def true_mlp(h: Tensor, w1: Tensor, b1: Tensor, w2: Tensor) -> Tensor:
    return F.gelu(h @ w1.t() + b1[..., None, :], approximate="tanh") @ w2.t()


def true_attention(
    qkv: Tensor, bias_q: Tensor | None = None, gamma: Tensor | None = None, heads: int = HEADS
) -> Tensor:
    """Attention of an ordinary projection; bias_q (D,) or (B, D), gamma (3D,) or (B, 3D)."""
    if bias_q is not None:
        qkv = qkv + F.pad(bias_q, (0, 2 * bias_q.shape[-1])).reshape(-1, 1, qkv.shape[-1])
    if gamma is not None:
        qkv = qkv * gamma.reshape(-1, 1, qkv.shape[-1])
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return (torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, -1) @ v).transpose(1, 2).flatten(2)


def fused_attention(qkv: Tensor, bias_q: Tensor | None = None, gamma: Tensor | None = None) -> Tensor:
    return attention(qkv, HEADS, bias_q, gamma, "fused")


def true_modulation(m: Tensor, bias: Tensor, norm: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """Branch by branch, as DiT's blocks do it."""
    planes = []
    for j in range(norm.shape[0]):
        shift, scale = (m[:, 3 * j + i] + bias[3 * j + i] for i in (0, 1))
        planes += [norm[j, 0] * (1 + scale), norm[j, 1] * (1 + scale) + shift]
        if j < gamma.shape[0]:
            gate = gamma[j] * (m[:, 3 * j + 2] + bias[3 * j + 2])
            planes += [gate, gate * beta[j]]
    return torch.stack(planes)


def plain_block(x: Tensor, h: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
    qkv, proj, fc1, fc2, bias_q, gamma, bias1, joint1, joint2 = rest
    return block(
        x, h, (qkv, proj, fc1, fc2), qkv_vectors(bias_q, gamma)[None], bias1, (joint1, joint2), HEADS, backend="fused"
    )


def true_block(x: Tensor, h: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
    qkv, proj, fc1, fc2, bias_q, gamma, bias1, joint1, joint2 = rest
    x, h = true_residual_adaln(x, true_attention(h @ qkv.t(), bias_q, gamma) @ proj.t(), *joint1)
    return true_residual_adaln(x, true_mlp(h, fc1, bias1, fc2), *joint2)


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


def stacked_inputs(size: Size, stream: torch.dtype, branch: torch.dtype) -> list[Tensor]:
    """Weights of several heights."""
    m, k, n = size
    return [draw(m, k, dtype=branch), *(draw(rows, k, dtype=branch) for rows in (n, n, 2 * n))]


def matvec_inputs(size: Size, stream: torch.dtype, branch: torch.dtype) -> list[Tensor]:
    _, k, n = size
    return [draw(3, k, dtype=branch), *(draw(n, k, dtype=branch) for _ in range(3))]


def many_matvec_inputs(size: Size, stream: torch.dtype, branch: torch.dtype) -> list[Tensor]:
    m, k, _ = size
    return [draw(3, m, k, dtype=branch), *matvec_inputs(size, stream, branch)[1:]]


def scaled_linear_inputs(size: Size, stream: torch.dtype, branch: torch.dtype) -> list[Tensor]:
    return [*linear_inputs(size, stream, branch), draw(size[-1], dtype=F32, shift=1)]


def gelu_inputs(size: Size, stream: torch.dtype, branch: torch.dtype) -> list[Tensor]:
    return mlp_inputs(size, stream, branch)[:3]


def mlp_inputs(size: Size, stream: torch.dtype, branch: torch.dtype, each: bool = False) -> list[Tensor]:
    """``each``: every sample has a bias of its own."""
    b, t, d, f = size
    mine = (b,) if each else ()
    w1, w2 = draw(f, d) / d**0.5, draw(d, f) / f**0.5
    return [draw(b, t, d, dtype=branch), (2 * w1).to(branch), draw(*mine, f, dtype=F32), w2.to(branch)]


def attention_inputs(vectors: str, size: Size, stream: torch.dtype, branch: torch.dtype) -> list[Tensor]:
    """``vectors``: "", "bias", "gamma" (and bias) or "each" (sample its own)."""
    b, t, d = size
    mine = (b,) if vectors == "each" else ()
    inputs = [draw(b, t, 3 * d, dtype=branch), draw(*mine, d, dtype=F32), draw(*mine, 3 * d, dtype=F32, shift=1)]
    return inputs[: {"": 1, "bias": 2}.get(vectors, 3)]


def modulation_inputs(size: Size, stream: torch.dtype, branch: torch.dtype) -> list[Tensor]:
    b, j, d = size
    shapes = (3 * j + 2, d), (j + 1, 2, d), (j, d), (j, d)
    return [draw(b, 3 * j + 2, d, dtype=branch), *(draw(*shape, dtype=F32, shift=0.5) for shape in shapes)]


def block_inputs(size: Size, stream: torch.dtype, branch: torch.dtype, each: bool = False) -> list[Tensor]:
    b, t, d, f = size
    mine = (b,) if each else ()
    weights = [(draw(n, k) / k**0.5).to(branch) for n, k in ((3 * d, d), (d, d), (f, d), (d, f))]
    vectors = [draw(d, dtype=F32), draw(3 * d, dtype=F32, shift=1), draw(*mine, f, dtype=F32)]
    joints = [draw(4, b, d, dtype=F32) for _ in range(2)]
    return [draw(b, t, d, dtype=stream), draw(b, t, d, dtype=branch), *weights, *vectors, *joints]


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
        sizes: for plain PyTorch and C++; ``triton`` for the interpreter, where every launch costs (none: not there);
            ``gpu`` for a device.
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


def stacked_calls(name: str, inputs: list[Tensor]) -> Calls:
    x, *weights = inputs
    together = [nn.Parameter(w.detach().clone(), requires_grad=False) for w in weights]
    lay_together(together)
    op = getattr(torch.ops.difffit_fast, name)
    calls: Calls = []
    for given in (weights, together, [w.double() for w in weights]):
        dy = torch.ones_like(op(x, given)[0]).detach()
        calls += [(name, (x, given)), (f"{name}_backward", (dy, given))]
    return calls


def scaled_linear_calls(inputs: list[Tensor]) -> Calls:
    x, weight, bias, gamma = inputs
    y, z = torch.ops.difffit_fast.frozen_linear_scaled(*inputs)
    backward = [(*detached(torch.ones_like(y), weight, z, gamma), dx) for dx in (True, False)]
    return [
        ("frozen_linear_scaled", (x, weight, bias, gamma)),
        ("frozen_linear_scaled", (x, weight, None, gamma)),
        *(("frozen_linear_scaled_backward", given) for given in backward),
    ]


def gelu_calls(inputs: list[Tensor]) -> Calls:
    x, weight, bias = inputs
    g, u = torch.ops.difffit_fast.frozen_gelu(*inputs)
    backward = [("frozen_gelu_backward", (*detached(torch.ones_like(g), weight, u), dx)) for dx in (True, False)]
    return [("frozen_gelu", (x, weight, bias)), ("frozen_gelu", (x, weight, None)), *backward]


def mlp_calls(inputs: list[Tensor]) -> Calls:
    _, w1, b1, w2 = inputs
    branch, u = torch.ops.difffit_fast.frozen_mlp(*inputs)
    kept, own = detached(torch.ones_like(branch), w1, w2, u), detached(b1) if b1.dim() == 2 else ()
    backward = [("frozen_mlp_backward", (*kept, dh, *own)) for dh in (True, False)]
    return [("frozen_mlp", tuple(inputs)), *backward]


def attention_calls(inputs: list[Tensor]) -> Calls:
    z, bias_q, gamma = (*inputs, None, None)[:3]
    bias_q = z.detach().new_zeros(z.shape[-1] // 3) if bias_q is None else bias_q
    vectors = qkv_vectors(bias_q, gamma)
    vectors = vectors if vectors.dim() == 3 else vectors[None]
    o, lse = torch.ops.difffit_fast.attention(z, vectors, HEADS, "fused")
    backward = (*detached(torch.ones_like(o), z, vectors, o, lse), HEADS, "fused")
    return [("attention", (z, vectors.detach(), HEADS, "fused")), ("attention_backward", backward)]


def modulation_calls(inputs: list[Tensor]) -> Calls:
    m, bias, norm, gamma, beta = inputs
    calls: Calls = []
    for given in ((m, bias, norm, gamma, beta), (m, bias, None, None, beta)):
        dvectors = torch.ones_like(torch.ops.difffit_fast.modulation(*given))
        calls += [("modulation", given), ("modulation_backward", detached(dvectors, *given))]
    return calls


def block_calls(inputs: list[Tensor]) -> Calls:
    x, h, *weights = inputs[:6]
    bias_q, gamma, bias1, joint1, joint2 = inputs[6:]
    vectors = qkv_vectors(bias_q, gamma)[None].detach()
    given = (x, h, *weights, vectors, bias1, bias1.detach().to(h.dtype), joint1, joint2, HEADS, EPS, "fused")
    y2, _, *saved = torch.ops.difffit_fast.block(*given)
    z, o, lse, branch1, y1, mean1, rstd1, u, branch2, mean2, rstd2 = saved
    kept = detached(
        *weights, vectors, joint1, joint2, z, o, lse, branch1, y1, mean1, rstd1, u, branch2, y2, mean2, rstd2
    )
    own = detached(bias1) if bias1.dim() == 2 else ()
    ones = torch.ones_like(h).detach()
    grads = ((ones.to(x.dtype), ones, True), (None, ones, False), (ones.to(x.dtype), None, True))
    return [
        ("block", given),
        *(("block_backward", (dy, dh, *kept, HEADS, "fused", need, *own)) for dy, dh, need in grads),
    ]


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
    *(
        Case(
            name, lambda x, *weights, op=op: op(x, weights), truth, make, (True, False, False, False),
            functools.partial(stacked_calls, name),
            sizes=((1, 72, 40), (5, 100, 24), (0, 72, 40)), triton=((2, 72, 40),), gpu=((1, 72, 40), (32, 1152, 6912)),
            small=(5, 72, 40), roundings_gpu={F32: 4, BF16: 3, F16: 3},
        )
        for name, op, truth, make in (
            ("stacked_linear", stacked_linear, true_stacked_linear, stacked_inputs),
            ("stacked_matvec", stacked_matvec, true_stacked_matvec, matvec_inputs),
        )
    ),
    Case(
        "frozen_linear with gamma", frozen_linear, lambda x, w, b, gamma: gamma * F.linear(x, w, b), scaled_linear_inputs,
        (True, False, True, True), scaled_linear_calls,
        sizes=((1, 1, 72, 40), (2, 77, 72, 100), (0, 4, 72, 40), (3, 37, 100, 1)), triton=((2, 5, 72, 40), (0, 4, 72, 40)),
        gpu=((1, 1, 72, 40), (2, 256, 1152, 4608), (0, 4, 72, 40)), small=(2, 5, 72, 40),
        roundings={BF16: 2, F16: 2}, roundings_gpu={F32: 4, BF16: 4, F16: 4},  # z is rounded on the way
    ),
    Case(
        "frozen_gelu", frozen_gelu, lambda x, w, b: F.gelu(F.linear(x, w, b), approximate="tanh"), gelu_inputs,
        (True, False, True), gelu_calls,
        sizes=((1, 1, 72, 40), (2, 77, 72, 100), (0, 4, 72, 40), (3, 37, 100, 1)), triton=((2, 5, 72, 40), (0, 4, 72, 40)),
        gpu=((1, 1, 72, 40), (2, 256, 1152, 4608), (0, 4, 72, 40)), small=(2, 5, 72, 40),
        roundings={BF16: 2, F16: 2}, roundings_gpu={F32: 4, BF16: 4, F16: 4},  # u is rounded on the way
    ),
    *(
        Case(
            f"frozen_mlp{' with a bias each' if each else ''}", frozen_mlp, true_mlp,
            functools.partial(mlp_inputs, each=each), (True, False, True, False), mlp_calls,
            sizes=((1, 1, 72, 288), (2, 77, 72, 100), (0, 4, 72, 288), (3, 37, 100, 33), *(((2, 0, 72, 40),) if each else ())),
            triton=((2, 5, 72, 40), (0, 4, 72, 40)),
            gpu=((1, 1, 72, 288), (2, 256, 1152, 4608), (3, 37, 100, 33), (0, 4, 72, 288)), small=(2, 5, 72, 40),
            # The pre-activation and the activation are rounded on the way: three times in the forward, four in the backward.
            roundings={BF16: 2, F16: 2}, roundings_gpu={F32: 4, BF16: 3, F16: 3},
        )
        for each in (False, True)
    ),
    *(
        Case(
            f"attention{' with ' + vectors if vectors else ''}", fused_attention, true_attention,
            functools.partial(attention_inputs, vectors), (True,) * n, attention_calls,
            # One token alone has no gradient but its value's: the others' are 0, which nothing can be relative to.
            sizes=((1, 1 if n == 1 else 2, 24), (2, 77, 72), (3, 37, 12), (0, 5, 24), (2, 37, 96)),
            triton=((2, 5, 24), (0, 5, 24)) if vectors == "each" else (),  # more in test_triton_attention.py
            gpu=((1, 3, 72), (2, 256, 216), (2, 77, 192), (0, 5, 24)), small=(2, 5, 24),
            # Small query and key gradients, against the largest value of the whole, after attention's roundings.
            roundings={F32: 4, BF16: 3, F16: 3}, roundings_gpu={F32: 8, BF16: 6, F16: 6},
        )
        for vectors, n in (("", 1), ("bias", 2), ("gamma", 3), ("each", 3))
    ),
    Case(
        "modulation", modulation, true_modulation, modulation_inputs, (True,) * 5, modulation_calls,
        sizes=((1, 1, 72), (5, 4, 37), (2, 24, 384), (0, 2, 72)), triton=((2, 2, 40), (9, 1, 600), (0, 2, 40)),
        gpu=((32, 56, 1152), (0, 2, 40), (5, 4, 37)), small=(2, 2, 40),
    ),
    *(
        Case(
            f"block{' with a bias each' if each else ''}", plain_block, true_block,
            functools.partial(block_inputs, each=each), (True, True, *(False,) * 4, *(True,) * 5), block_calls,
            sizes=((1, 2, 24, 40), (2, 37, 72, 288), (0, 4, 24, 40), (3, 5, 36, 33)),
            triton=((2, 5, 24, 40), (0, 4, 24, 40)),
            gpu=((1, 3, 72, 288), (2, 256, 216, 864), (0, 4, 24, 40)), small=(2, 5, 24, 40), dtypes=STREAMS[:2],
            roundings={F32: 6, BF16: 5, F16: 5}, roundings_gpu={F32: 8, BF16: 8, F16: 8},
        )
        for each in (False, True)
    ),
]  # fmt: skip


# -- the kernels -----------------------------------------------------------------------------------------------------
STEMS = {
    "adaln": ("adaln_forward", "adaln_backward"),
    "residual": ("residual_forward", "residual_backward", "residual_adaln_forward", "residual_adaln_backward"),
    "frozen_mlp": ("gelu_forward", "gelu_backward"),
    "modulation": ("modulation_forward", "modulation_backward"),
    "colsum": ("colsum",),
    "attention": ("attention_forward", "attention_backward"),
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
        modules = {stem: importlib.import_module(f"difffit_fast.kernels.{stem}") for stem in STEMS}
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
        for (name, want), got in zip(wanted.items(), (*grads[:2], *grads[2]), strict=True):
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


def check_gelu_with_a_bias_each(ops: Any, T: int, N: int, dtype: torch.dtype) -> None:
    B = 3
    u, dg, bias = rand(B * T, N, dtype=dtype, seed=1, scale=3), rand(B * T, N, dtype=dtype, seed=2), rand(B, N, seed=3)
    u64, bias64 = leaves(u, bias)
    want = F.gelu(u64 + bias64.repeat_interleave(T, 0), approximate="tanh")
    want.backward(dg.double())
    close("g", ops.gelu_forward(u.to(ops.device), bias.to(ops.device)), want.detach())
    du, db = ops.gelu_backward(*(t.to(ops.device) for t in (dg, u, bias)))
    close("du", du, u64.grad)
    close("db", db, bias64.grad)


def check_colsum(ops: Any, M: int, N: int, dtype: torch.dtype) -> None:
    x = rand(M, N, dtype=dtype, seed=1)
    out = ops.colsum(x.to(ops.device))
    assert out.dtype == F32
    close("colsum", out, x.double().sum(0))


def check_modulation(ops: Any, B: int, J: int, D: int, dtype: torch.dtype) -> None:
    m, bias = rand(B, 3 * J + 2, D, dtype=dtype, seed=1), rand(3 * J + 2, D, seed=2)
    norm, gamma, beta = rand(J + 1, 2, D, seed=3), rand(J, D, seed=4, shift=1), rand(J, D, seed=5)
    dvectors = rand(4 * J + 2, B, D, seed=6)
    for with_norm, with_gamma in ((True, True), (True, False), (False, True), (False, False)):
        given = [m, bias, norm if with_norm else None, gamma if with_gamma else None, beta]
        there = [None if t is None else t.to(ops.device) for t in given]
        inputs = leaves(*(t for t in given if t is not None))
        it = iter(inputs)
        full = [None if t is None else next(it) for t in given]
        one = torch.stack([torch.ones(J + 1, D), torch.zeros(J + 1, D)], 1).double()
        ones = torch.ones(J, D).double()
        want = true_modulation(
            *full[:2], one if full[2] is None else full[2], ones if full[3] is None else full[3], full[4]
        )
        want.backward(dvectors.double())
        close("vectors", ops.modulation_forward(*there), want.detach())
        grads = ops.modulation_backward(dvectors.to(ops.device), *there)
        for name, got, leaf in zip(("dm", "dbias", "dnorm", "dgamma", "dbeta"), grads, full, strict=True):
            if leaf is None:
                assert got.shape == (0,)
            else:
                close(name, got, torch.zeros_like(leaf) if leaf.grad is None else leaf.grad)


ROW_KERNELS = {"adaln": check_adaln, "residual": check_residual, "residual_adaln": check_residual_adaln}
MATRIX_KERNELS = {"gelu": check_gelu, "gelu_with_a_bias_each": check_gelu_with_a_bias_each, "colsum": check_colsum}


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
    each = make(B, 3 * D, seed=14)
    out += [ops.gelu_forward(u), *ops.gelu_backward(v, u), ops.gelu_forward(u, each), *ops.gelu_backward(v, u, each)]
    out.append(ops.colsum(u))
    z = make(B, T, 3 * D, dtype=H, seed=9)
    for vectors in () if D == 0 else (make(1, 1, D, seed=10), make(1, 3, D, seed=11), make(B, 3, D, seed=12)):
        o, lse = ops.attention_forward(z, vectors, 1)
        out += [o, lse, *ops.attention_backward(branch, z, vectors, o, lse, 1)]
    m, bias, norm, gamma, beta = (make(*shape, seed=13) for shape in ((B * T, 5, D), (5, D), (2, 2, D), (1, D), (1, D)))
    vectors = ops.modulation_forward(m.to(H), bias, norm, gamma, beta)
    return [*out, vectors, *ops.modulation_backward(vectors, m.to(H), bias, norm, gamma, beta)]
