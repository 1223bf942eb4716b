"""attention: softmax(q·kᵀ/√d)·v over the tokens of each sample; q, k, v are views of one projection and never copied.

On CUDA (and wherever asked for) PyTorch's scaled_dot_product_attention or xformers does it, chosen by architecture and
head size. On the CPU batched matrix products beat it: two forward and four backward, with the probabilities kept where
they are small (up to 512 tokens) and recomputed where they are not, gradients written straight into one dqkv.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import _ext
from ..errors import DiffFitError
from ._register import register, wide
from .dispatch import pick
from .gemm import widen

KEEP_PROBABILITIES_UP_TO = 512  # tokens; beyond it the probabilities outweigh q, k, v and are recomputed

_SDPA = {
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa-math": SDPBackend.MATH,
}
BACKENDS = ("auto", "bmm", "sdpa", *_SDPA, "xformers")


# -- the plain reference -------------------------------------------------------------------------------------------
def softmax_forward(scores: Tensor, scale: float) -> None:
    scores.copy_(torch.softmax(scores.to(wide(scores.dtype)) * scale, -1))


def softmax_backward(dp: Tensor, p: Tensor, scale: float) -> None:
    w = wide(dp.dtype)
    dp32, p32 = dp.to(w), p.to(w)
    dp.copy_(scale * p32 * (dp32 - (dp32 * p32).sum(-1, keepdim=True)))


# -- batched products, the CPU's way -------------------------------------------------------------------------------
# As many samples at a time as keep the probabilities in a core's cache: many, when they are short.
PROBABILITIES_AT_A_TIME = 2**19


def _groups(batch: int, num_heads: int, tokens: int) -> list[slice]:
    n = max(1, PROBABILITIES_AT_A_TIME // max(1, num_heads * tokens * tokens))
    return [slice(i, min(i + n, batch)) for i in range(0, batch, n)]


def _heads(x: Tensor, parts: int, num_heads: int) -> Tensor:
    """(n, T, parts·H·d) -> (parts, n·H, T, d); a view for one sample, a copy for several."""
    n, t, width = x.shape
    heads = x.view(n, t, parts, num_heads, width // (parts * num_heads)).permute(2, 0, 3, 1, 4)
    return heads.squeeze(1) if n == 1 else heads.reshape(parts, n * num_heads, t, -1)


def _store(into: Tensor, part: int, parts: int, num_heads: int, value: Tensor) -> None:
    """Write (n·H, T, d) as part ``part`` of (n, T, parts·H·d)."""
    n, t, width = into.shape
    view = into.view(n, t, parts, num_heads, width // (parts * num_heads))[:, :, part].transpose(1, 2)
    view.copy_(value.view(view.shape))


def _probabilities(q: Tensor, k: Tensor, out: Tensor | None) -> Tensor:
    p = torch.bmm(q, k.transpose(1, 2)) if out is None else torch.bmm(q, k.transpose(1, 2), out=out)
    pick("attention", softmax_forward, p, has_triton=False)(p, 1 / math.sqrt(q.shape[-1]))
    return p


def _forward(qkv: Tensor, num_heads: int, keep: bool) -> tuple[Tensor, Tensor]:
    qkv = qkv.contiguous()
    b, t, n = qkv.shape
    up = widen(qkv)
    o = qkv.new_empty(b, t, n // 3)
    kept = qkv.new_empty(b, num_heads, t, t) if keep else qkv.new_empty(0)
    for s in _groups(b, num_heads, t):
        q, k, v = _heads(qkv[s].float() if up else qkv[s], 3, num_heads)
        p = _probabilities(q, k, kept[s].view(-1, t, t) if keep and not up else None)
        if keep and up:
            kept[s].copy_(p.view(kept[s].shape))
        _store(o[s], 0, 1, num_heads, torch.bmm(p, v))
    return o, kept


def _backward(do: Tensor, qkv: Tensor, kept: Tensor, num_heads: int) -> Tensor:
    qkv, do = qkv.contiguous(), do.contiguous()
    b, t, n = qkv.shape
    scale, up = 1 / math.sqrt(n // (3 * num_heads)), widen(qkv)
    dqkv = torch.empty_like(qkv)
    for s in _groups(b, num_heads, t):
        q, k, v = _heads(qkv[s].float() if up else qkv[s], 3, num_heads)
        (dos,) = _heads(do[s].float() if up else do[s], 1, num_heads)
        if kept.numel():
            p = kept[s].view(-1, t, t).float() if up else kept[s].view(-1, t, t)
        else:
            p = _probabilities(q, k, None)
        _store(dqkv[s], 2, 3, num_heads, torch.bmm(p.transpose(1, 2), dos))
        ds = torch.bmm(dos, v.transpose(1, 2))
        pick("attention", softmax_backward, ds, has_triton=False)(ds, p, scale)
        _store(dqkv[s], 0, 3, num_heads, torch.bmm(ds, k))
        _store(dqkv[s], 1, 3, num_heads, torch.bmm(ds.transpose(1, 2), q))
    return dqkv


backward_op = register(
    "attention_backward(Tensor do, Tensor qkv, Tensor kept, int num_heads) -> Tensor",
    _backward,
    lambda do, qkv, kept, num_heads: qkv.new_empty(qkv.shape),
)


def _forward_fake(qkv: Tensor, num_heads: int, keep: bool) -> tuple[Tensor, Tensor]:
    b, t, n = qkv.shape
    return qkv.new_empty(b, t, n // 3), qkv.new_empty((b, num_heads, t, t) if keep else (0,))


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    qkv, ctx.num_heads, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    if ctx.needs_input_grad[0]:
        ctx.save_for_backward(qkv, output[1])


def _autograd(ctx: Any, do: Tensor | None, _: Any) -> tuple:
    if do is None or not ctx.needs_input_grad[0]:
        return None, None, None
    return backward_op(do, *ctx.saved_tensors, ctx.num_heads), None, None


_attention = register(
    "attention(Tensor qkv, int num_heads, bool keep) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    setup_context=_setup,
    backward=_autograd,
)
_ext.register_operation("attention", has_triton=False, cuda="library (SDPA or xformers)")


# -- the choice ----------------------------------------------------------------------------------------------------
def available_backends(device: torch.device, dtype: torch.dtype, head_dim: int) -> list[str]:
    """The values of ``attention=`` that can work for this device, dtype and head size, the preferred one first."""
    if device.type != "cuda":
        return ["bmm", "sdpa", "sdpa-math", *(["sdpa-flash"] if device.type == "cpu" else [])]
    half = dtype in (torch.float16, torch.bfloat16)
    major = torch.cuda.get_device_capability(device)[0]
    names = []
    if half and major >= 8 and head_dim % 8 == 0:
        flash = ["sdpa-flash"] if head_dim <= 256 else []
        cudnn = (
            ["sdpa-cudnn"] if head_dim <= (256 if major >= 9 else 128) and torch.backends.cudnn.is_available() else []
        )
        names += cudnn + flash if major >= 9 else flash + cudnn
    names += ["sdpa-efficient", "sdpa-math", "sdpa", "bmm"]
    if _xformers() is not None:
        names.append("xformers")
    return names


def _xformers() -> Any | None:
    try:
        import xformers.ops
    except ImportError:
        return None
    return xformers.ops


def resolve_backend(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Check ``attention=name`` for this device and return the backend that will run.

    Raises:
        DiffFitError: the name is unknown, or impossible here; the message lists the possible ones.
    """
    if name not in BACKENDS:
        raise DiffFitError(f"attention must be one of {', '.join(BACKENDS)}; got {name!r}")
    possible = available_backends(device, dtype, head_dim)
    if name == "auto":
        return possible[0]
    if name not in possible:
        raise DiffFitError(
            f"attention={name!r} cannot run on {device} in {dtype} with head size {head_dim}; possible: {', '.join(possible)}"
        )
    return name


def attention(qkv: Tensor, num_heads: int, backend: str = "auto") -> Tensor:
    """Multi-head self-attention over the tokens of each sample.

    Args:
        qkv: (B, T, 3·H·d), q, k, v side by side and head-major, as :func:`frozen_qkv` returns them.
        num_heads: H.
        backend: one of ``BACKENDS``; "auto" is batched products on the CPU and, on CUDA, the first of cuDNN, flash and
            memory-efficient attention that the architecture and head size allow.

    Returns:
        (B, T, H·d) in the dtype of ``qkv``.
    """
    b, t, n = qkv.shape
    if n % (3 * num_heads):
        raise ValueError(f"attention: the last size of qkv must be a multiple of 3·{num_heads} heads; got {n}")
    backend = resolve_backend(backend, qkv.device, qkv.dtype, n // (3 * num_heads))
    if backend == "bmm":
        return _attention(qkv, num_heads, t <= KEEP_PROBABILITIES_UP_TO)[0]
    q, k, v = qkv.view(b, t, 3, num_heads, -1).unbind(2)
    if backend == "xformers":
        return _xformers().memory_efficient_attention(q, k, v).reshape(b, t, n // 3)
    choice = sdpa_kernel(_SDPA[backend]) if backend in _SDPA else contextlib.nullcontext()
    with choice:
        o = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return o.transpose(1, 2).reshape(b, t, n // 3)
