"""block: a whole transformer block with frozen weights, two branches and two joins, as one operation.

    x, h = join(x, proj(attention(qkv(h))))
    x, h = join(x, fc2(gelu(fc1(h))))                 join: residual_adaln, gate, bias, scale and shift of which are ``joint``

It computes what :mod:`.frozen_linear`, :mod:`.attention`, :mod:`.frozen_mlp` and :mod:`.residual` compute one after the other,
by the same kernels in the same order. As one operation it costs the host one call instead of six each way, and all sums of
its backward (of both joins, of fc1's bias, of what acts on qkv) share one second stage. Saved: what the six would save.

On the CPU, where the products are ours (:mod:`.pieces`), all of it is one C++ operation: from the attention's output to the
next block's input, and back, each thread takes some rows through everything in its cache.

What only a product reads (h of the first join, GELU's output, dbranch of both joins, du) leaves the kernel that makes it in eight
bits where the weight is kept so (:func:`.eight_bit.takes_rows`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import attention, frozen_mlp
from ._register import check_frozen, register, wide
from .dispatch import cpp_ops, one_stage, pick
from .eight_bit import Rows, takes_rows
from .gemm import check_operands, dgrad, linear
from .pieces import in_pieces
from .residual import (
    residual_adaln_backward,
    residual_adaln_forward,
    residual_backward,
)

_STREAMS = (torch.float32, torch.bfloat16)  # that the C++ operation takes


def _check(
    x: Tensor,
    h: Tensor,
    qkv: Tensor,
    proj: Tensor,
    fc1: Tensor,
    fc2: Tensor,
    vectors: Tensor,
    bias1: Tensor,
    joint1: Tensor,
    joint2: Tensor,
) -> None:
    if x.dim() != 3 or h.shape != x.shape:
        raise ValueError(f"block: x and h must both be (B, T, D); got {tuple(x.shape)} and {tuple(h.shape)}")
    b, _, d = x.shape
    for name, weight in (("qkv", qkv), ("proj", proj), ("fc1", fc1)):
        check_operands(f"block ({name})", h, weight)
    if qkv.shape[0] != 3 * d or proj.shape[0] != d or fc2.shape != (d, fc1.shape[0]) or fc2.dtype != h.dtype:
        raise ValueError(
            f"block: weights of qkv, proj, fc1, fc2 must be (3·{d}, {d}), ({d}, {d}), (F, {d}), ({d}, F); got "
            + ", ".join(str(tuple(w.shape)) for w in (qkv, proj, fc1, fc2))
        )
    frozen_mlp.check_bias("block", h, fc1, bias1)
    for joint in (joint1, joint2):
        if joint.shape != (4, b, d):
            raise ValueError(f"block: the vectors of a join must be (4, {b}, {d}); got {tuple(joint.shape)}")


def _wide(like: Tensor, tensor: Tensor) -> Tensor:
    return tensor.to(wide(like.dtype)).contiguous()


def _forward(
    x: Tensor,
    h: Tensor,
    qkv: Tensor,
    proj: Tensor,
    fc1: Tensor,
    fc2: Tensor,
    vectors: Tensor,
    bias1: Tensor,
    bias1_cast: Tensor,
    joint1: Tensor,
    joint2: Tensor,
    num_heads: int,
    eps: float,
    backend: str,
) -> tuple[Tensor, ...]:
    _check(x, h, qkv, proj, fc1, fc2, vectors, bias1, joint1, joint2)
    shape, d = h.shape, h.shape[-1]
    if x.dtype in _STREAMS and in_pieces(h, fc1, qkv, proj, fc2):
        rest = (_wide(x, vectors), _wide(x, bias1), _wide(x, joint1), _wide(x, joint2), num_heads, eps)
        weights = (w.contiguous() for w in (qkv, proj, fc1, fc2))
        return cpp_ops().block_forward(x.contiguous(), h.contiguous(), *weights, *rest)

    z = linear(h.reshape(-1, d), qkv).view(*shape[:-1], 3 * d)
    o, lse = attention.forward(z, _wide(x, vectors), num_heads, backend)
    branch1 = linear(o.view(-1, d), proj).view(shape)
    y1, h, mean1, rstd1 = _join(x.contiguous(), branch1, joint1, eps, fc1)

    branch2, u = frozen_mlp.forward(h, fc1, bias1_cast if bias1.dim() == 1 else bias1, fc2)
    branch2 = branch2.view(shape)
    y2, h, mean2, rstd2 = _join(y1, branch2, joint2, eps)
    return y2, h, z, o, lse, branch1, y1, mean1, rstd1, u, branch2, mean2, rstd2


def _join(
    x: Tensor, branch: Tensor, joint: Tensor, eps: float, weight: Tensor | None = None
) -> tuple[Tensor, Tensor | Rows, Tensor, Tensor]:
    """y, h, mean, rstd; with a ``weight`` h is (B·T, D), as the product with it wants it."""
    fp8 = (True,) if weight is not None and takes_rows(weight, _matrix(branch), False) else ()
    run = pick("residual", residual_adaln_forward, x, branch.dtype)
    y, h, mean, rstd, *scale = run(x, branch, *_wide(x, joint).unbind(), eps, *fp8)
    if weight is not None:
        h = Rows(_matrix(h), scale[0].view(-1), branch.dtype) if fp8 else _matrix(h)
    return y, h, mean, rstd


def _matrix(x: Tensor) -> Tensor:
    return x.view(-1, x.shape[-1])


def _forward_fake(x: Tensor, h: Tensor, *args: Any) -> tuple[Tensor, ...]:
    qkv, proj, fc1, fc2, vectors, bias1, _, joint1, joint2, num_heads = args[:10]
    _check(x, h, qkv, proj, fc1, fc2, vectors, bias1, joint1, joint2)
    b, t, d = x.shape
    statistic = lambda: x.new_empty(b, t, dtype=wide(x.dtype))  # noqa: E731
    return (
        x.new_empty(x.shape), h.new_empty(h.shape), h.new_empty(b, t, 3 * d), h.new_empty(h.shape),
        x.new_empty(b, num_heads, t, dtype=wide(h.dtype)), h.new_empty(h.shape), x.new_empty(x.shape), statistic(), statistic(),
        h.new_empty(b * t, fc1.shape[0]), h.new_empty(h.shape), statistic(), statistic(),
    )  # fmt: skip


def _backward(
    dy: Tensor | None,
    dh: Tensor | None,
    qkv: Tensor,
    proj: Tensor,
    fc1: Tensor,
    fc2: Tensor,
    vectors: Tensor,
    joint1: Tensor,
    joint2: Tensor,
    z: Tensor,
    o: Tensor,
    lse: Tensor,
    branch1: Tensor,
    y1: Tensor,
    mean1: Tensor,
    rstd1: Tensor,
    u: Tensor,
    branch2: Tensor,
    y2: Tensor,
    mean2: Tensor,
    rstd2: Tensor,
    num_heads: int,
    backend: str,
    need_dh: bool,
    bias1: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    shape, d = branch1.shape, branch1.shape[-1]
    joint1, joint2 = _wide(y1, joint1), _wide(y1, joint2)
    if dh is not None and y1.dtype in _STREAMS and in_pieces(dh, fc1, qkv, proj, fc2):
        weights = (w.contiguous() for w in (qkv, proj, fc1, fc2))
        rest = (num_heads, need_dh, None if bias1 is None else _wide(y1, bias1))
        saved = (z, o, lse, branch1, y1, mean1, rstd1, u, branch2, y2, mean2, rstd2)
        dx, dh, *vectors = cpp_ops().block_backward(
            None if dy is None else dy.contiguous(),
            dh.contiguous(),
            *weights,
            _wide(y1, vectors),
            joint1,
            joint2,
            *saved,
            *rest,
        )
        return dx, dh if need_dh else z.new_empty(0), *vectors
    with one_stage(y1):
        dy = None if dy is None else dy.contiguous()
        if dh is None:  # the end of a model that nothing but the stream is asked of
            dx = y2.new_zeros(y2.shape) if dy is None else dy
            dbranch, *two = pick("residual", residual_backward, y1, branch2.dtype)(dx, branch2, joint2[0].contiguous())
            dbranch = dbranch.view(-1, d)
            djoint2 = torch.cat([torch.stack(two), joint2.new_zeros(2, *joint2.shape[1:])])
        else:
            dx, dbranch, djoint2 = _join_backward(dh.contiguous(), dy, y2, branch2, joint2, mean2, rstd2, fc2)
        dh, dbias1 = frozen_mlp.backward(dbranch, fc1, fc2, u, True, bias1)
        dx, dbranch, djoint1 = _join_backward(dh.view(shape), dx, y1, branch1, joint1, mean1, rstd1, proj)
        do = dgrad(dbranch, proj).view(shape)
        dz, dvectors = attention.backward(do, z, _wide(y1, vectors), o, lse, num_heads, backend)
        dh = dgrad(dz.view(-1, 3 * d), qkv).view(shape) if need_dh else dz.new_empty(0)
    return dx, dh, dvectors, dbias1, djoint1, djoint2


def _join_backward(
    dh: Tensor, dy: Tensor | None, y: Tensor, branch: Tensor, joint: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor | Rows, Tensor]:
    """dx, dbranch (B·T, D) as the product with ``weight`` wants it, and the sums."""
    fp8 = (True,) if takes_rows(weight, _matrix(branch), True) else ()
    run = pick("residual", residual_adaln_backward, y, branch.dtype)
    dx, dbranch, sums, *scale = run(dh, dy, y, branch, joint[0], joint[2], mean, rstd, *fp8)
    return dx, Rows(_matrix(dbranch), scale[0].view(-1), branch.dtype) if fp8 else _matrix(dbranch), sums


def _backward_fake(dy: Tensor | None, dh: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    _, _, fc1, _, vectors, joint1, joint2, _, _, _, branch1, y1 = args[:12]
    need_dh, bias1 = (*args[_SAVED + 2 :], None)[:2]
    w = wide(y1.dtype)
    return (
        y1.new_empty(y1.shape), branch1.new_empty(branch1.shape if need_dh else 0), vectors.new_empty(vectors.shape, dtype=w),
        y1.new_empty(fc1.shape[:1] if bias1 is None else bias1.shape, dtype=w),
        joint1.new_empty(joint1.shape, dtype=w), joint2.new_empty(joint2.shape, dtype=w),
    )  # fmt: skip


backward_op = register(
    "block_backward(Tensor? dy, Tensor? dh, Tensor qkv, Tensor proj, Tensor fc1, Tensor fc2, Tensor vectors, Tensor joint1,"
    " Tensor joint2, Tensor z, Tensor o, Tensor lse, Tensor branch1, Tensor y1, Tensor mean1, Tensor rstd1, Tensor u,"
    " Tensor branch2, Tensor y2, Tensor mean2, Tensor rstd2, int num_heads, str backend, bool need_dh,"
    " Tensor? bias1=None)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


_SAVED = 19  # tensors, always; then the bias of fc1 where each sample has its own


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    _, _, qkv, proj, fc1, fc2, vectors, bias1, _, joint1, joint2, ctx.num_heads, _, ctx.backend = inputs
    for index, name in ((2, "qkv"), (3, "proj"), (4, "fc1"), (5, "fc2")):
        check_frozen(ctx, index, f"the weight of {name}")
    y2, _, z, o, lse, branch1, y1, mean1, rstd1, u, branch2, mean2, rstd2 = output
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    ctx.dtypes = vectors.dtype, bias1.dtype, joint1.dtype, joint2.dtype
    if any(ctx.needs_input_grad):
        ctx.save_for_backward(
            qkv, proj, fc1, fc2, vectors, joint1, joint2,
            z, o, lse, branch1, y1, mean1, rstd1, u, branch2, y2, mean2, rstd2, *([bias1] if bias1.dim() == 2 else []),
        )  # fmt: skip


def _autograd(ctx: Any, dy: Tensor | None, dh: Tensor | None, *_: Any) -> tuple:
    grads: list[Tensor | None] = [None] * 14
    if dy is None and dh is None:
        return tuple(grads)
    need = ctx.needs_input_grad
    saved = ctx.saved_tensors  # once: gradient checkpointing lets them be asked for no second time
    rest = ctx.num_heads, ctx.backend, need[1], *saved[_SAVED:]
    dx, dh, *vectors = backward_op(dy, dh, *saved[:_SAVED], *rest)
    found = [dx, dh, *(g.to(dtype) for g, dtype in zip(vectors, ctx.dtypes, strict=True))]
    for index, grad in zip((0, 1, 6, 7, 9, 10), found, strict=True):
        if need[index]:
            grads[index] = grad
    return tuple(grads)


_block = register(
    "block(Tensor x, Tensor h, Tensor qkv, Tensor proj, Tensor fc1, Tensor fc2, Tensor vectors, Tensor bias1,"
    " Tensor bias1_cast, Tensor joint1, Tensor joint2, int num_heads, float eps, str backend) -> (Tensor, Tensor, Tensor,"
    " Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    setup_context=_setup,
    backward=_autograd,
)


def block(
    x: Tensor,
    h: Tensor,
    weights: tuple[Tensor, Tensor, Tensor, Tensor],
    vectors: Tensor,
    bias1: Tensor,
    joints: tuple[Tensor, Tensor],
    num_heads: int,
    *,
    bias1_cast: Tensor | None = None,
    eps: float = 1e-6,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One block.

    Args:
        x: residual stream, (B, T, D).
        h: what the attention branch reads, already normalised and modulated, (B, T, D), the compute dtype.
        weights: of qkv (3D, D), proj (D, D), fc1 (F, D), fc2 (D, F), frozen, the dtype of ``h``.
        vectors: query bias, with γ or without, as :func:`.attention.qkv_vectors` gives it, (1 or B, 1 or 3, D), float32.
        bias1: bias of fc1, (F,), or (B, F) where each sample has its own, float32.
        joints: of the join behind the attention and of the one behind the MLP: gate, bias, scale, shift, (4, B, D) float32.
        bias1_cast: ``bias1`` in the compute dtype, where the caller has cast those of all blocks at once; one for each sample is
            added as it is, and its cast not looked at.
        backend: of :func:`.attention.attention`.

    Returns:
        x and h for the next block.
    """
    cast = bias1_cast
    if cast is None:
        cast = bias1.detach() if bias1.dim() == 2 else bias1.detach().to(h.dtype)
    return _block(x, h, *weights, vectors, bias1, cast, *joints, num_heads, eps, backend)[:2]
