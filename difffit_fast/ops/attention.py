"""attention: softmax(q·kᵀ/√d)·v over the tokens of each sample, straight from the bare product of qkv.

    q = z_q + b,   k = z_k,   v = z_v,   S = Σ_c g_c q_c k_c / √d,   P = softmax S,   o = γ_v·(P v),   g = γ_q·γ_k

Softmax does not see a constant key bias, and a constant value bias leaves the attention as it came (rows of P sum to
one): b_k is left out, its gradient is exactly 0, and γ_v·b_v moves behind the attention into the bias of proj. γ of queries
and keys act through their product g alone, so Σ_t A·q, A = dS·k/√d, is the one reduction that serves both. Nothing is
divided by γ. What acts on the channels is one tensor ``vectors`` (G, R, D): R = 3 rows b, g, γ_v, or b alone (R = 1, no γ);
G = 1 for all samples or B, one set for each.

Saved: z, o and the logarithm of the sum of each row's exponentials. Ours ("fused": Triton on CUDA, C++ on the CPU) reads z
and writes dz in place, packed. Libraries on CUDA want q and k with g applied, and give dq, dk, dv apart: a pass over z before
them and one after. Which one runs is timed once for each problem, passes included (:mod:`.probe`), forward and backward apart,
since all of them mean the same by o and lse. A library that gives other bits when it is run again is not chosen: who wants it
names it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _ext
from ..errors import DiffFitError
from ._register import register, wide
from .dispatch import apart, pick, room, triton_kernels
from .probe import Chooser

BACKENDS = ("auto", "fused", "sdpa-cudnn", "sdpa-flash", "sdpa-efficient", "xformers", "math")

_chooser = Chooser("fused", around=apart)
_RESULTS = {"forward": ("o", "lse"), "backward": ("dqkv", "dvectors")}
_AGAIN = 3  # runs that a library must give the same bits in
_ALIKE = 0.05  # two ways differ by less, as a share of the norm: bfloat16 and another order of sums


# -- the plain reference -------------------------------------------------------------------------------------------
def _rows(vectors: Tensor, like: torch.dtype) -> tuple[Tensor, Tensor | float, Tensor | float]:
    """b, g and γ_v, each (G, 1, D) or 1."""
    rows = vectors.to(wide(like))[:, :, None].unbind(1)
    return (rows[0], 1.0, 1.0) if len(rows) == 1 else rows  # type: ignore[return-value]


def _heads(x: Tensor, num_heads: int) -> Tensor:
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _merged(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def attention_forward(z: Tensor, vectors: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    bias, gain, gamma_v = _rows(vectors, z.dtype)
    zq, zk, zv = z.to(wide(z.dtype)).chunk(3, -1)
    q, k, v = (_heads(x, num_heads) for x in (gain * (zq + bias), zk, zv))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    lse = torch.logsumexp(scores, -1)
    o = gamma_v * _merged(torch.exp(scores - lse[..., None]) @ v)
    return o.to(z.dtype), lse


def attention_backward(
    do: Tensor, z: Tensor, vectors: Tensor, o: Tensor, lse: Tensor, num_heads: int
) -> tuple[Tensor, Tensor]:
    w = wide(z.dtype)
    bias, gain, gamma_v = _rows(vectors, z.dtype)
    zq, zk, zv = z.to(w).chunk(3, -1)
    q, k, v, g = (_heads(x, num_heads) for x in (gain * (zq + bias), zk, zv, do.to(w)))
    scale = 1 / math.sqrt(q.shape[-1])
    p = torch.exp(q @ k.transpose(-1, -2) * scale - lse[..., None])
    dv = _merged(p.transpose(-1, -2) @ g)
    delta = _heads((do.to(w) * o.to(w)), num_heads).sum(-1, keepdim=True)
    ds = scale * p * (_heads(gamma_v * do.to(w), num_heads) @ v.transpose(-1, -2) - delta)
    return _gradients(_merged(ds @ k), _merged(ds.transpose(-1, -2) @ q), dv, z, vectors)


def scale_qkv(z: Tensor, vectors: Tensor) -> Tensor:
    """What a library takes: g·(z_q + b), z_k, γ_v·z_v, (B, T, 3D)."""
    bias, gain, gamma_v = _rows(vectors, z.dtype)
    zq, zk, zv = z.to(wide(z.dtype)).chunk(3, -1)
    return torch.cat([gain * (zq + bias), zk, gamma_v * zv], -1).to(z.dtype)


def pack_dqkv(dq: Tensor, dk: Tensor, dv: Tensor, z: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """dz and dvectors from a library's gradients of what :func:`scale_qkv` gave it, each (B, T, D)."""
    return _gradients(*(x.to(wide(z.dtype)) for x in (dq, dk, dv)), z, vectors)


def _gradients(a: Tensor, dk: Tensor, dv: Tensor, z: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """From the gradients of g·q, of k and of γ_v·v."""
    bias, gain, gamma_v = _rows(vectors, z.dtype)
    zq, _, zv = z.to(a.dtype).chunk(3, -1)
    dq = gain * a
    sums = [dq] if vectors.shape[1] == 1 else [dq, a * (zq + bias), dv * zv]
    per_sample = torch.stack([s.sum(1) for s in sums], 1)
    dvectors = per_sample if vectors.shape[0] == z.shape[0] else per_sample.sum(0, keepdim=True)
    return torch.cat([dq, dk, gamma_v * dv], -1).to(z.dtype), dvectors


# -- libraries on CUDA ---------------------------------------------------------------------------------------------
# Each: forward (q, k, v (B, H, T, d), scale) -> o, lse and backward (do, q, k, v, o, lse, scale) -> dq, dk, dv. The meaning of
# lse (B, H, T) is one for all, ours included.
def _no_seed(q: Tensor) -> Tensor:
    return torch.zeros((), dtype=torch.int64, device=q.device)  # dropout's, unused


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, False, scale=scale)[:2]


def _flash_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    t, seed = q.shape[2], torch.zeros(2, dtype=torch.uint64, device=q.device)
    # The sums of lengths are those of sequences of several lengths: a tensor there, an empty one too, would ask for that.
    return torch.ops.aten._scaled_dot_product_flash_attention_backward(
        do, q, k, v, o, lse, None, None, t, t, 0.0, False, seed, seed, scale=scale
    )


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    o, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, False, False, scale=scale)[:2]
    return o, lse.reshape(q.shape[:3])


def _cudnn_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    t, seed = q.shape[2], _no_seed(q)
    return torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        do, q, k, v, o, lse[..., None], seed, seed, None, None, None, t, t, 0.0, False, scale=scale
    )


def _efficient_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    o, lse = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, False, scale=scale)[:2]
    return o, lse[..., : q.shape[2]].contiguous()


def _efficient_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    padded = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=math.inf)  # its rows are multiples of 32
    mask = [True, True, True, False]
    return torch.ops.aten._scaled_dot_product_efficient_attention_backward(
        do, q, k, v, None, o, padded, _no_seed(q), _no_seed(q), 0.0, mask, False, scale=scale
    )[:3]


def _xformers_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    fmha = _xformers().fmha
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    o, lse = fmha.memory_efficient_attention_forward_requires_grad(q, k, v, scale=scale)
    return o.transpose(1, 2), lse[..., : q.shape[1]].contiguous()


def _xformers_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, ...]:
    do, q, k, v, o = (x.transpose(1, 2) for x in (do, q, k, v, o))
    grads = _xformers().fmha.memory_efficient_attention_backward(do, o, lse, q, k, v, scale=scale)
    return tuple(g.transpose(1, 2) for g in grads)


_LIBRARIES: dict[str, tuple[Callable, Callable]] = {
    "sdpa-cudnn": (_cudnn_forward, _cudnn_backward),
    "sdpa-flash": (_flash_forward, _flash_backward),
    "sdpa-efficient": (_efficient_forward, _efficient_backward),
    "xformers": (_xformers_forward, _xformers_backward),
}


@functools.cache  # looking for what is not there takes as long as a launch
def _xformers() -> Any | None:
    try:
        import xformers.ops
    except ImportError:
        return None
    return xformers.ops


def _around(reference: Callable, like: Tensor) -> Callable:
    """A pass before or after a library, which run on CUDA only."""
    return pick("attention", reference, like) if room(like.device, like.dtype) == "triton" else reference


# -- the choice ----------------------------------------------------------------------------------------------------
def fused_is_ours(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether "fused" is one kernel here (on CUDA Triton's, in half precision), not plain PyTorch or slower than it."""
    if device.type != "cuda":
        return True
    if room(device, dtype) != "triton" or dtype == torch.float32:
        return False
    return triton_kernels("attention").supports(head_dim, dtype)


def available_backends(device: torch.device, dtype: torch.dtype, head_dim: int) -> list[str]:
    """The values of ``attention=`` that can work for this device, dtype and head size, the one taken untimed first."""
    if device.type != "cuda":
        return ["fused", "math"]
    major = torch.cuda.get_device_capability(device)[0]
    half = dtype in (torch.float16, torch.bfloat16) and major >= 8 and head_dim % 8 == 0
    names = ["fused"] if fused_is_ours(device, dtype, head_dim) else []
    if half and head_dim <= (256 if major >= 9 else 128) and torch.backends.cudnn.is_available():
        names.append("sdpa-cudnn")
    if half and head_dim <= 256:
        names.append("sdpa-flash")
    if dtype in (torch.float16, torch.bfloat16, torch.float32):
        names.append("sdpa-efficient")
        if _xformers() is not None:
            names.append("xformers")
    return [*names, "math"]


def resolve_backend(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> list[str]:
    """Check ``attention=name`` for this device; the backends among which the device decides, the default first.

    Raises:
        DiffFitError: the name is unknown, or impossible here; the message lists the possible ones.
    """
    if name not in BACKENDS:
        raise DiffFitError(f"attention must be one of {', '.join(BACKENDS)}; got {name!r}")
    possible = available_backends(device, dtype, head_dim)
    if name == "auto":
        return (
            possible[:-1] if possible[0] == "fused" else possible
        )  # a library may refuse; ours and plain PyTorch do not
    if name not in possible:
        raise DiffFitError(
            f"attention={name!r} cannot run on {device} in {dtype} with head size {head_dim}; possible: {', '.join(possible)}"
        )
    return [name]


def _choose(
    way: str, run: Callable[[str], tuple[Tensor, ...]], z: Tensor, vectors: Tensor, num_heads: int, backend: str
) -> str:
    """The backend for ``way``, forward or backward, which ``run`` computes by name."""
    b, t, n = z.shape
    dtype = str(z.dtype).removeprefix("torch.")
    key = ("attention", way, str(z.device), dtype, b, t, num_heads, n // (3 * num_heads), vectors.shape[1] == 3)
    known = _chooser.known(key) if backend == "auto" else None
    if known is not None:
        return known
    names = resolve_backend(backend, z.device, z.dtype, n // (3 * num_heads))
    if len(names) == 1 or z.numel() == 0:
        return names[0]
    truth: list[Tensor] = []
    looked_at: set[str] = set()

    def attempt(name: str) -> None:
        found = run(name)
        if name not in looked_at:
            looked_at.add(name)
            _check_alike(name, _RESULTS[way], found, truth)
            if name in _LIBRARIES:
                _check_repeats(name, _RESULTS[way], found, run)

    candidates = {name: functools.partial(attempt, name) for name in names}
    return _chooser.choose(key, candidates, z.device, default=names[0])


def _check_alike(name: str, results: tuple[str, ...], found: tuple[Tensor, ...], truth: list[Tensor]) -> None:
    """Fail where a library computes something else than the first candidate: some are called by names that are not public."""
    if not truth:
        truth += [t.detach().clone() for t in found]
        return
    for what, got, want in zip(results, found, truth, strict=True):
        off = (got.float() - want.float()).norm() / want.float().norm().clamp_min(1e-30)
        if not off <= _ALIKE:
            raise RuntimeError(f"{what} of {name} is off by {float(off):.1e}")


def _check_repeats(
    name: str, results: tuple[str, ...], found: tuple[Tensor, ...], run: Callable[[str], tuple[Tensor, ...]]
) -> None:
    """Fail where a library does not give the same bits again: some add up gradients in the order in which programs end."""
    for _ in range(_AGAIN):
        for what, first, again in zip(results, found, run(name), strict=True):
            if not torch.equal(first, again):
                raise RuntimeError(f"{what} of {name} has other bits on another run")


def _run_forward(name: str, z: Tensor, vectors: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    if name == "math":
        return attention_forward(z, vectors, num_heads)
    if name == "fused":
        return pick("attention", attention_forward, z)(z, vectors, num_heads)
    q, k, v = (_heads(x, num_heads) for x in _around(scale_qkv, z)(z, vectors).chunk(3, -1))
    o, lse = _LIBRARIES[name][0](q, k, v, 1 / math.sqrt(q.shape[-1]))
    return _merged(o).contiguous(), lse.contiguous()  # for any backward


def _run_backward(
    name: str, do: Tensor, z: Tensor, vectors: Tensor, o: Tensor, lse: Tensor, num_heads: int
) -> tuple[Tensor, Tensor]:
    if name == "math":
        return attention_backward(do, z, vectors, o, lse, num_heads)
    if name == "fused":
        return pick("attention", attention_backward, z)(do, z, vectors, o, lse, num_heads)
    q, k, v = (_heads(x, num_heads) for x in _around(scale_qkv, z)(z, vectors).chunk(3, -1))
    grads = _LIBRARIES[name][1](_heads(do, num_heads), q, k, v, _heads(o, num_heads), lse, 1 / math.sqrt(q.shape[-1]))
    return _around(pack_dqkv, z)(*(_merged(g).contiguous() for g in grads), z, vectors)


def forget() -> None:
    """Forget which backend was faster, so that they are timed again (for tests and benchmarks)."""
    _chooser.clear()


# -- registration --------------------------------------------------------------------------------------------------
def _check(z: Tensor, vectors: Tensor, num_heads: int) -> None:
    if z.dim() != 3 or num_heads < 1 or z.shape[-1] % (3 * num_heads) or not z.shape[-1]:
        raise ValueError(
            f"attention: qkv must be (B, T, n) with n a positive multiple of 3·{num_heads} heads; got {tuple(z.shape)}"
        )
    b, d = z.shape[0], z.shape[-1] // 3
    if vectors.dim() != 3 or vectors.shape[0] not in (1, b) or vectors.shape[1] not in (1, 3) or vectors.shape[2] != d:
        raise ValueError(
            f"attention: the query bias, with γ or without, must be (1 or {b}, 1 or 3, {d}); got {tuple(vectors.shape)}"
        )


def forward(z: Tensor, vectors: Tensor, num_heads: int, backend: str) -> tuple[Tensor, Tensor]:
    """o (B, T, D) and lse (B, H, T) of contiguous z and vectors."""

    def run(name: str) -> tuple[Tensor, Tensor]:
        return _run_forward(name, z, vectors, num_heads)

    return run(_choose("forward", run, z, vectors, num_heads, backend))


def backward(
    do: Tensor, z: Tensor, vectors: Tensor, o: Tensor, lse: Tensor, num_heads: int, backend: str
) -> tuple[Tensor, Tensor]:
    """dz (B, T, 3D) and dvectors, float32, of contiguous tensors."""

    def attempt(name: str) -> tuple[Tensor, Tensor]:  # do may be all zeros in a model that begins as the identity
        return _run_backward(name, o, z, vectors, o, lse, num_heads)

    chosen = _choose("backward", attempt, z, vectors, num_heads, backend)
    return _run_backward(chosen, do, z, vectors, o, lse, num_heads)


def _forward(z: Tensor, vectors: Tensor, num_heads: int, backend: str) -> tuple[Tensor, Tensor]:
    _check(z, vectors, num_heads)
    return forward(z.contiguous(), vectors.to(wide(z.dtype)).contiguous(), num_heads, backend)


def _forward_fake(z: Tensor, vectors: Tensor, num_heads: int, backend: str) -> tuple[Tensor, Tensor]:
    _check(z, vectors, num_heads)
    b, t, n = z.shape
    return z.new_empty(b, t, n // 3), z.new_empty(b, num_heads, t, dtype=wide(z.dtype))


def _backward(
    do: Tensor, z: Tensor, vectors: Tensor, o: Tensor, lse: Tensor, num_heads: int, backend: str
) -> tuple[Tensor, Tensor]:
    vectors = vectors.to(wide(z.dtype)).contiguous()
    return backward(do.contiguous(), z.contiguous(), vectors, o, lse, num_heads, backend)


backward_op = register(
    "attention_backward(Tensor do, Tensor z, Tensor vectors, Tensor o, Tensor lse, int num_heads, str backend)"
    " -> (Tensor, Tensor)",
    _backward,
    lambda do, z, vectors, o, lse, num_heads, backend: (
        z.new_empty(z.shape),
        vectors.new_empty(vectors.shape, dtype=wide(z.dtype)),
    ),
)


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    z, vectors, ctx.num_heads, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    if any(ctx.needs_input_grad):
        ctx.save_for_backward(z, vectors, *output)


def _autograd(ctx: Any, do: Tensor | None, _: Any) -> tuple:
    if do is None:
        return None, None, None, None
    vectors = ctx.saved_tensors[1]
    dz, dvectors = backward_op(do, *ctx.saved_tensors, ctx.num_heads, ctx.backend)
    need = ctx.needs_input_grad
    return dz if need[0] else None, dvectors.to(vectors.dtype) if need[1] else None, None, None


_attention = register(
    "attention(Tensor z, Tensor vectors, int num_heads, str backend) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    setup_context=_setup,
    backward=_autograd,
)
_ext.register_operation("attention")
_ext.register_choice("attention", _chooser.report)


def qkv_vectors(bias_q: Tensor, gamma: Tensor | None) -> Tensor:
    """b, or b, g = γ_q·γ_k and γ_v, side by side: bias_q (..., D), gamma (..., 3D) or None -> (..., 1 or 3, D)."""
    if gamma is None:
        return bias_q[..., None, :]
    gamma_q, gamma_k, gamma_v = gamma.chunk(3, -1)
    return torch.stack([bias_q, gamma_q * gamma_k, gamma_v], -2)


def attention(
    qkv: Tensor, num_heads: int, bias_q: Tensor | None = None, gamma: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """Multi-head self-attention over the tokens of each sample.

    Args:
        qkv: (B, T, 3·H·d), the bare product: q, k, v side by side, each head-major.
        num_heads: H.
        bias_q: query bias, (D,), or (B, D) where each sample has its own; None: 0.
        gamma: DiffFit's scale on the projection, (3D,) or (B, 3D), or None.
        backend: one of ``BACKENDS``; "auto" is our own kernel on the CPU and, on CUDA, the fastest that runs.

    Returns:
        (B, T, H·d) in the dtype of ``qkv``.

    Raises:
        ValueError: shapes that do not fit. DiffFitError: a backend that is unknown, or impossible here.
    """
    if bias_q is None:
        width = qkv.shape[-1] // 3
        like = gamma[..., :width] if gamma is not None else None
        bias_q = qkv.new_zeros(width, dtype=wide(qkv.dtype)) if like is None else torch.zeros_like(like)
    vectors = qkv_vectors(bias_q, gamma)
    return _attention(qkv, vectors if vectors.dim() == 3 else vectors[None], num_heads, backend)[0]
