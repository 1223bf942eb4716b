"""frozen_qkv: what γ and the query bias do to the projection q, k, v, forward and backward.

    qkv_scale       q = γ_q·(z_q + b_q),   k = γ_k·z_k,   v = γ_v·z_v,   in place on [M, 3D]
    qkv_backward    dz = γ·dqkv,   db_q = γ_q·Σ_m dq,   dγ_c = (Σ_m dqkv_c·qkv_c) / γ_c

Attention sees q and k only through their products, so Σ_m dq·q = Σ_m dk·k in every channel: the key third of dγ takes
the query third's sum and the key third of qkv is never read. Without γ, dz is dqkv itself and only the query third of
dqkv is read. (A key bias has no gradient, and the value bias is carried behind the attention, so b_q is the only one.)

Bytes, in bfloat16: qkv_scale 12·M·D; qkv_backward 16·M·D with γ (reads 3 + 2 thirds, writes 3), 2·M·D without.

Who owns what: a program owns a chunk of rows and 128 columns, keeps their sums in registers and writes one row of
partial sums per chunk. With γ a kernel here adds them up, because it also divides by γ; without, ``colsum`` does it all.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .colsum import sum_rows
from .config import architecture, chunks_of, launch, tile_plan, vector
from .sums import FINISH_CHUNKS, FINISH_COLS, FINISH_WARPS, add_chunks
from .tiles import load_stack, store_stack


@triton.jit(do_not_specialize=["M", "chunk_rows"])
def _qkv_scale_kernel(
    qkv_ptr, gamma_ptr, bias_ptr, M, chunk_rows,
    D: tl.constexpr, SUB: tl.constexpr, COUNT: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    N: tl.constexpr = 3 * D
    blocks: tl.constexpr = (N + COLS - 1) // COLS
    cols = (tl.program_id(0) % blocks) * COLS + tl.arange(0, COLS)
    first = (tl.program_id(0) // blocks).to(tl.int64) * chunk_rows
    count = tl.minimum(M - first, chunk_rows).to(tl.int32)
    inside = cols < N
    gamma = tl.load(gamma_ptr + cols, mask=inside, other=0.0)
    bias = tl.load(bias_ptr + cols, mask=cols < D, other=0.0)
    qkv_ptr += first * N
    start = 0
    while start < count:
        z = load_stack(qkv_ptr, start, count, cols, inside, N, SUB, COUNT)
        qkv = ()
        for i in tl.static_range(COUNT):
            qkv = qkv + ((z[i] + bias[None, :]) * gamma[None, :],)
        store_stack(qkv_ptr, qkv, start, count, cols, inside, N, SUB, COUNT)
        start += SUB * COUNT


@triton.jit(do_not_specialize=["M", "chunk_rows", "chunks"])
def _qkv_backward_kernel(
    dqkv_ptr, qkv_ptr, gamma_ptr, dz_ptr, grad_ptr, product_ptr, M, chunk_rows, chunks,
    D: tl.constexpr, SUB: tl.constexpr, COUNT: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    N: tl.constexpr = 3 * D
    blocks: tl.constexpr = (N + COLS - 1) // COLS
    cols = (tl.program_id(0) % blocks) * COLS + tl.arange(0, COLS)
    chunk = (tl.program_id(0) // blocks).to(tl.int64)
    first = chunk * chunk_rows
    count = tl.minimum(M - first, chunk_rows).to(tl.int32)
    inside = cols < N
    needed = (cols < D) | (cols >= 2 * D)  # the key third's product is the query third's
    gamma = tl.load(gamma_ptr + cols, mask=inside, other=0.0)
    grad = tl.zeros([SUB, COLS], dtype=tl.float32)
    product = tl.zeros([SUB, COLS], dtype=tl.float32)
    dqkv_ptr += first * N
    qkv_ptr += first * N
    dz_ptr += first * N
    start = 0
    while start < count:
        dqkv = load_stack(dqkv_ptr, start, count, cols, inside, N, SUB, COUNT)
        qkv = load_stack(qkv_ptr, start, count, cols, inside & needed, N, SUB, COUNT)
        dz = ()
        for i in tl.static_range(COUNT):
            grad += dqkv[i]
            product += dqkv[i] * qkv[i]
            dz = dz + (dqkv[i] * gamma[None, :],)
        store_stack(dz_ptr, dz, start, count, cols, inside, N, SUB, COUNT)
        start += SUB * COUNT
    tl.store(grad_ptr + (chunk * D + cols), tl.sum(grad, axis=0), mask=cols < D)
    tl.store(product_ptr + (chunk * N + cols), tl.sum(product, axis=0), mask=inside & needed)


@triton.jit(do_not_specialize=["chunks"])
def _qkv_finish_kernel(
    grad_ptr, product_ptr, gamma_ptr, dbias_ptr, dgamma_ptr, chunks,
    D: tl.constexpr, CHUNKS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    N: tl.constexpr = 3 * D
    block = tl.program_id(0)
    cols = block * COLS + tl.arange(0, COLS)
    inside = cols < D
    gamma_q = tl.load(gamma_ptr + cols, mask=inside, other=1.0)
    gamma_k = tl.load(gamma_ptr + D + cols, mask=inside, other=1.0)
    gamma_v = tl.load(gamma_ptr + 2 * D + cols, mask=inside, other=1.0)
    dq = add_chunks(grad_ptr, block * COLS, chunks, D, D, CHUNKS, COLS)
    dq_q = add_chunks(product_ptr, block * COLS, chunks, D, N, CHUNKS, COLS)
    dv_v = add_chunks(product_ptr + 2 * D, block * COLS, chunks, D, N, CHUNKS, COLS)
    tl.store(dbias_ptr + cols, gamma_q * dq, mask=inside)
    tl.store(dgamma_ptr + cols, dq_q / gamma_q, mask=inside)
    tl.store(dgamma_ptr + D + cols, dq_q / gamma_k, mask=inside)
    tl.store(dgamma_ptr + 2 * D + cols, dv_v / gamma_v, mask=inside)


def qkv_scale(qkv: torch.Tensor, gamma: torch.Tensor, bias_q: torch.Tensor) -> None:
    """γ and the query bias, in place. Args: qkv [M, 3D], the bare projection; gamma float32 [3D]; bias_q float32 [D]."""
    M, N = qkv.shape
    if M * N == 0:
        return
    plan = tile_plan(architecture(qkv.device), vector(qkv))
    blocks = -(-N // plan.cols)
    chunk_rows, chunks = chunks_of(M, plan, blocks)
    launch(
        _qkv_scale_kernel, chunks * blocks, qkv.device, qkv, gamma, bias_q, M, chunk_rows,
        D=N // 3, SUB=plan.rows, COUNT=plan.stack, COLS=plan.cols, num_warps=plan.warps,
    )  # fmt: skip


def qkv_backward(
    dqkv: torch.Tensor, qkv: torch.Tensor | None, gamma: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of :func:`qkv_scale`, or of the query bias alone where there is no γ.

    Args: dqkv [M, 3D]; qkv [M, 3D], the *output* of qkv_scale; gamma float32 [3D], nowhere 0. Both None without γ.
    Returns: dz [M, 3D] (without γ it is ``dqkv``, the same tensor), dbias_q float32 [D], dgamma float32 [3D] (without
        γ: empty).
    """
    M, N = dqkv.shape
    D = N // 3
    if gamma is None:
        return dqkv, sum_rows(dqkv, D), dqkv.new_empty((0,), dtype=torch.float32)
    if qkv is None:
        raise ValueError("qkv_backward: with gamma it needs qkv, the output of qkv_scale; got None")
    dz = torch.empty_like(dqkv)
    if M * N == 0:
        return dz, dqkv.new_zeros((D,), dtype=torch.float32), dqkv.new_zeros((N,), dtype=torch.float32)
    plan = tile_plan(architecture(dqkv.device), vector(dqkv))
    blocks = -(-N // plan.cols)
    chunk_rows, chunks = chunks_of(M, plan, blocks)
    grad = torch.empty((chunks, D), dtype=torch.float32, device=dqkv.device)
    product = torch.empty((chunks, N), dtype=torch.float32, device=dqkv.device)
    dbias_q = torch.empty((D,), dtype=torch.float32, device=dqkv.device)
    dgamma = torch.empty((N,), dtype=torch.float32, device=dqkv.device)
    launch(
        _qkv_backward_kernel, chunks * blocks, dqkv.device, dqkv, qkv, gamma, dz, grad, product, M, chunk_rows, chunks,
        D=D, SUB=plan.rows, COUNT=plan.stack, COLS=plan.cols, num_warps=plan.warps,
    )  # fmt: skip
    launch(
        _qkv_finish_kernel, -(-D // FINISH_COLS), dqkv.device, grad, product, gamma, dbias_q, dgamma, chunks,
        D=D, CHUNKS=FINISH_CHUNKS, COLS=FINISH_COLS, num_warps=FINISH_WARPS,
    )  # fmt: skip
    return dz, dbias_q, dgamma
