"""attention over short sequences, on the bare product of qkv: no bias pass, no γ pass, no copies of q, k and v, no atomics.

With z [B, T, 3, H, d] the product without any bias, b the query bias, g = γ_q·γ_k on the channels of the scores, and γ_v:

    S = d^-½·Σ_c g_c (z_q + b)_c z_k,c,   P = softmax(S),   o = γ_v·(P z_v),   lse = ln Σ exp(S)

    A = d^-½·dS z_k,      dz_q = g·A
                          dz_k = d^-½·dSᵀ q,   where q = g·(z_q + b)
    V = Pᵀ do,            dz_v = γ_v·V,        where dS = P·(do·(γ_v z_v)ᵀ − δ), δ = Σ_c do·o

    db = Σ dz_q,   dg = Σ A·(z_q + b),   dγ_v = Σ V·z_v      (over tokens; over samples too where all share one set)

Nothing is divided by γ. A key bias has no gradient and the value bias is carried behind the attention, so b is the only one.

Where the vectors are applied: to the tile that a program keeps, never to the ones that stream past it, which would be rounded
again by everyone they pass. Where queries stream past, they are made before; so S is the same there and in the forward pass to
which lse belongs, and the rows of P sum to one.

Triton's tiles are powers of two: a head of 72 channels is two tiles, 64 + 16, the second half masked (:func:`head_tiles`).
Loops run over ``steps``, counted at run time, so that a binary serves every number of tokens; only whether blocks come out
even is compiled in. Triton's interpreter, which cannot count to an argument, is given STEPS.

Bytes, in bfloat16, from memory: forward 8·B·T·D (reads z, writes o); backward 28·B·T·D (do, o and z_q, writes q; do, q, z_k and
z_v; z_k and z_q; writes dz) and 4·B·H·T² for dS, written and read, part of it in L2. The rest (lse, δ, sums) is below 3 %.

Who owns what, in four launches and ``sums.finish``:

- forward: a program owns a block of queries of one head and walks over the keys; o and lse are its own.
- query: the same block: q and δ.
- dkdv: a program owns a block of keys and walks over the queries, scores transposed; dz_k, dz_v, Σ V·z_v and dSᵀ are its own.
- dq: a program owns a block of queries and walks over the keys: dz_q and the sums Σ dz_q and Σ A·(z_q + b) are its own. What it
  multiplies with z_k is the dS that dkdv left: to make it once more would be two of five products and every exponential.

No launch leaves more than DS_BYTES of dS: batches that would are cut into groups of samples, one after another in the same place.

For a library's attention, which wants q, k, v made and dq, dk, dv taken apart, :func:`scale_qkv` (12·B·T·D) and
:func:`pack_dqkv` (16·B·T·D, or 12 without gains) do what the kernels above do on the way: tile kernels, see ``config``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .config import AttentionPlan, architecture, attention_plan, chunks_of, launch, tile_plan, vector
from .sums import finish
from .tiles import CUTS_OFF, load_stack, narrow, store_stack

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


# Modifiers of a load. Compilers merge equal loads, so that what an epilogue reads again would be kept in registers through the
# loop, where they are scarcest. They do not merge what is spelt differently: "cached at all levels", which is the default.
FIRST, AGAIN = tl.constexpr(""), tl.constexpr(".ca")

DS_BYTES = 128 << 20  # of dS at once; at least one sample's


# -- heads: one or two tiles of columns ------------------------------------------------------------------------------
@triton.jit
def _rounded(value, dtype: tl.constexpr):
    """``value`` as an operand of a product, rounded to ``dtype``.

    Triton's interpreter would multiply the bits of bfloat16, so operands are widened there once they are rounded.
    """
    value = narrow(value, dtype)
    if CUTS_OFF:
        value = value.to(tl.float32)
    return value


@triton.jit
def _load_tile(
    ptr, rows, count, STRIDE: tl.constexpr, HD: tl.constexpr, WIDTHS: tl.constexpr, p: tl.constexpr, EVEN: tl.constexpr,
    WHEN: tl.constexpr,
):  # fmt: skip
    """Tile ``p`` of rows of a head, an operand of a product: zero beyond HD and, unless EVEN, from row ``count`` on."""
    cols = p * WIDTHS[0] + tl.arange(0, WIDTHS[p])
    at = rows[:, None] * STRIDE + cols[None, :]
    if EVEN and p * WIDTHS[0] + WIDTHS[p] <= HD:
        tile = tl.load(ptr + at, cache_modifier=WHEN)
    elif EVEN:
        tile = tl.load(ptr + at, mask=(cols < HD)[None, :], other=0.0, cache_modifier=WHEN)
    else:
        tile = tl.load(ptr + at, mask=(rows < count)[:, None] & (cols < HD)[None, :], other=0.0, cache_modifier=WHEN)
    if CUTS_OFF:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def _load_head(ptr, rows, count, STRIDE: tl.constexpr, HD: tl.constexpr, WIDTHS: tl.constexpr, EVEN: tl.constexpr):
    """All tiles of rows of a head."""
    tiles = ()
    for p in tl.static_range(len(WIDTHS)):
        tiles = tiles + (_load_tile(ptr, rows, count, STRIDE, HD, WIDTHS, p, EVEN, FIRST),)
    return tiles


@triton.jit
def _store_tile(
    ptr, tile, rows, count,
    STRIDE: tl.constexpr, HD: tl.constexpr, WIDTHS: tl.constexpr, p: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Store what :func:`_load_tile` loads, in the type of ``ptr``."""
    cols = p * WIDTHS[0] + tl.arange(0, WIDTHS[p])
    at = rows[:, None] * STRIDE + cols[None, :]
    tile = narrow(tile, ptr.dtype.element_ty)
    if EVEN and p * WIDTHS[0] + WIDTHS[p] <= HD:
        tl.store(ptr + at, tile)
    elif EVEN:
        tl.store(ptr + at, tile, mask=(cols < HD)[None, :])
    else:
        tl.store(ptr + at, tile, mask=(rows < count)[:, None] & (cols < HD)[None, :])


@triton.jit
def _load_vector(ptr, HD: tl.constexpr, WIDTHS: tl.constexpr, p: tl.constexpr, WHEN: tl.constexpr):
    """Tile ``p`` of a float32 vector of a head: [1, width], zero beyond HD."""
    cols = p * WIDTHS[0] + tl.arange(0, WIDTHS[p])
    return tl.load(ptr + cols, mask=cols < HD, other=0.0, cache_modifier=WHEN)[None, :]


@triton.jit
def _store_sum(
    ptr, tile, chunk, chunks, D: tl.constexpr, HD: tl.constexpr, WIDTHS: tl.constexpr, p: tl.constexpr, SHARE: tl.constexpr
):  # fmt: skip
    """The sum of the rows of tile ``p`` into row ``chunk`` of partial sums, D apart, and zeros into the next SHARE − 1."""
    cols = p * WIDTHS[0] + tl.arange(0, WIDTHS[p])
    total = tl.sum(tile, axis=0)
    tl.store(ptr + cols, total, mask=cols < HD)
    for i in tl.static_range(1, SHARE):
        tl.store(ptr + i * D + cols, tl.zeros_like(total), mask=(cols < HD) & (chunk + i < chunks))


@triton.jit
def _zero_head(ROWS: tl.constexpr, WIDTHS: tl.constexpr):
    tiles = ()
    for p in tl.static_range(len(WIDTHS)):
        tiles = tiles + (tl.zeros([ROWS, tl.constexpr(WIDTHS[p])], dtype=tl.float32),)
    return tiles


@triton.jit
def _scores(kept, streamed, ROWS: tl.constexpr, COLS: tl.constexpr, WIDTHS: tl.constexpr):
    """kept·streamedᵀ: float32 [ROWS, COLS]."""
    acc = tl.zeros([ROWS, COLS], dtype=tl.float32)
    for p in tl.static_range(len(WIDTHS)):
        acc = tl.dot(kept[p], tl.trans(streamed[p]), acc, input_precision="ieee")
    return acc


@triton.jit
def _gather(acc, weights, streamed, WIDTHS: tl.constexpr):
    """acc + weights·streamed, tile by tile."""
    out = ()
    for p in tl.static_range(len(WIDTHS)):
        out = out + (tl.dot(weights, streamed[p], acc[p], input_precision="ieee"),)
    return out


# -- attention -------------------------------------------------------------------------------------------------------
@triton.jit(do_not_specialize=["T", "steps", "vector_stride"])
def _attention_forward_kernel(
    z_ptr, vectors_ptr, o_ptr, lse_ptr, scale, T, steps, vector_stride,
    H: tl.constexpr, HD: tl.constexpr, WIDTHS: tl.constexpr, GAINS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, STEPS: tl.constexpr, EVEN_M: tl.constexpr, EVEN_N: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    D: tl.constexpr = H * HD
    dtype: tl.constexpr = z_ptr.dtype.element_ty
    tl.assume(steps > 0)  # else ptxas lets no two products of warp groups overlap, lest there be none
    if EVEN_N:
        T = steps * BN  # the compiler then knows what divides it
    blocks = tl.cdiv(T, BM)
    head = tl.program_id(0) // blocks
    sample = (head // H).to(tl.int64)
    channel = (head % H) * HD
    z_ptr += sample * T * (3 * D) + channel
    o_ptr += sample * T * D + channel
    vectors_ptr += sample * vector_stride + channel
    rows = (tl.program_id(0) % blocks) * BM + tl.arange(0, BM)
    q = ()
    for p in tl.static_range(len(WIDTHS)):
        q = q + (_query_tile(z_ptr, vectors_ptr, rows, T, H, HD, WIDTHS, p, GAINS, EVEN_M),)
    scale2 = scale * LOG2E
    top = tl.full([BM], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BM], dtype=tl.float32)
    acc = _zero_head(BM, WIDTHS)
    for step in tl.range(0, STEPS if STEPS > 0 else steps, num_stages=STAGES):
        keys = step * BN + tl.arange(0, BN)
        k = _load_head(z_ptr + D, keys, T, 3 * D, HD, WIDTHS, EVEN_N)
        s = _scores(q, k, BM, BN, WIDTHS)
        if not EVEN_N:
            s = tl.where((keys < T)[None, :], s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, axis=1))
        weights = tl.exp2(s * scale2 - (new_top * scale2)[:, None])
        fade = tl.exp2((top - new_top) * scale2)
        total = total * fade + tl.sum(weights, axis=1)
        top = new_top
        v = _load_head(z_ptr + 2 * D, keys, T, 3 * D, HD, WIDTHS, EVEN_N)
        faded = ()
        for p in tl.static_range(len(WIDTHS)):
            faded = faded + (acc[p] * fade[:, None],)
        acc = _gather(faded, _rounded(weights, dtype), v, WIDTHS)
    share = (1.0 / total)[:, None]
    for p in tl.static_range(len(WIDTHS)):
        o = acc[p] * share
        if GAINS:
            o *= _load_vector(vectors_ptr + 2 * D, HD, WIDTHS, p, AGAIN)
        _store_tile(o_ptr, o, rows, T, D, HD, WIDTHS, p, EVEN_M)
    tl.store(lse_ptr + head.to(tl.int64) * T + rows, top * scale + tl.log2(total) * LN2, mask=rows < T)


@triton.jit
def _query_tile(
    z_ptr, vectors_ptr, rows, count, H: tl.constexpr, HD: tl.constexpr, WIDTHS: tl.constexpr, p: tl.constexpr,
    GAINS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Tile ``p`` of q = g·(z_q + b), rounded to the type of z."""
    tile = _load_tile(z_ptr, rows, count, 3 * H * HD, HD, WIDTHS, p, EVEN, FIRST).to(tl.float32)
    tile += _load_vector(vectors_ptr, HD, WIDTHS, p, FIRST)
    if GAINS:
        tile *= _load_vector(vectors_ptr + H * HD, HD, WIDTHS, p, FIRST)
    return _rounded(tile, z_ptr.dtype.element_ty)


@triton.jit(do_not_specialize=["T", "vector_stride"])
def _attention_query_kernel(
    do_ptr, z_ptr, vectors_ptr, o_ptr, q_ptr, delta_ptr, T, vector_stride,
    H: tl.constexpr, HD: tl.constexpr, WIDTHS: tl.constexpr, GAINS: tl.constexpr, BM: tl.constexpr, EVEN_M: tl.constexpr,
):  # fmt: skip
    D: tl.constexpr = H * HD
    blocks = tl.cdiv(T, BM)
    head = tl.program_id(0) // blocks
    sample = (head // H).to(tl.int64)
    channel = (head % H) * HD
    z_ptr += sample * T * (3 * D) + channel
    vectors_ptr += sample * vector_stride + channel
    start = sample * T * D + channel
    rows = (tl.program_id(0) % blocks) * BM + tl.arange(0, BM)
    delta = tl.zeros([BM], dtype=tl.float32)
    for p in tl.static_range(len(WIDTHS)):
        do = _load_tile(do_ptr + start, rows, T, D, HD, WIDTHS, p, EVEN_M, FIRST).to(tl.float32)
        o = _load_tile(o_ptr + start, rows, T, D, HD, WIDTHS, p, EVEN_M, FIRST).to(tl.float32)
        delta += tl.sum(do * o, axis=1)
        q = _query_tile(z_ptr, vectors_ptr, rows, T, H, HD, WIDTHS, p, GAINS, EVEN_M)
        _store_tile(q_ptr + start, q.to(tl.float32), rows, T, D, HD, WIDTHS, p, EVEN_M)
    tl.store(delta_ptr + head.to(tl.int64) * T + rows, delta, mask=rows < T)


@triton.jit(do_not_specialize=["T", "steps", "vector_stride", "chunks"])
def _attention_dkdv_kernel(
    do_ptr, q_ptr, z_ptr, vectors_ptr, lse_ptr, delta_ptr, ds_ptr, dz_ptr, part_ptr, scale, T, steps, vector_stride, chunks,
    ds_stride,
    H: tl.constexpr, HD: tl.constexpr, WIDTHS: tl.constexpr, GAINS: tl.constexpr, SHARE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, STEPS: tl.constexpr, EVEN_M: tl.constexpr, EVEN_N: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    D: tl.constexpr = H * HD
    dtype: tl.constexpr = z_ptr.dtype.element_ty
    tl.assume(steps > 0)  # else ptxas lets no two products of warp groups overlap, lest there be none
    if EVEN_N:
        T = steps * BN  # the compiler then knows what divides it
    blocks = tl.cdiv(T, BM)
    block = tl.program_id(0) % blocks
    head = tl.program_id(0) // blocks
    sample = (head // H).to(tl.int64)
    channel = (head % H) * HD
    z_ptr += sample * T * (3 * D) + channel
    dz_ptr += sample * T * (3 * D) + channel
    q_ptr += sample * T * D + channel
    do_ptr += sample * T * D + channel
    lse_ptr += head.to(tl.int64) * T
    delta_ptr += head.to(tl.int64) * T
    ds_ptr += head.to(tl.int64) * T * ds_stride
    vectors_ptr += sample * vector_stride + channel
    rows = block * BM + tl.arange(0, BM)
    k = _load_head(z_ptr + D, rows, T, 3 * D, HD, WIDTHS, EVEN_M)
    v = ()
    for p in tl.static_range(len(WIDTHS)):
        tile = _load_tile(z_ptr + 2 * D, rows, T, 3 * D, HD, WIDTHS, p, EVEN_M, FIRST)
        if GAINS:
            tile = _rounded(tile.to(tl.float32) * _load_vector(vectors_ptr + 2 * D, HD, WIDTHS, p, FIRST), dtype)
        v = v + (tile,)
    scale2 = scale * LOG2E
    dk = _zero_head(BM, WIDTHS)
    dv = _zero_head(BM, WIDTHS)
    for step in tl.range(0, STEPS if STEPS > 0 else steps, num_stages=STAGES):
        queries = step * BN + tl.arange(0, BN)
        q = _load_head(q_ptr, queries, T, D, HD, WIDTHS, EVEN_N)
        do = _load_head(do_ptr, queries, T, D, HD, WIDTHS, EVEN_N)
        if EVEN_N:
            lse = tl.load(lse_ptr + queries)
            delta = tl.load(delta_ptr + queries)
        else:
            lse = tl.load(lse_ptr + queries, mask=queries < T, other=float("inf"))
            delta = tl.load(delta_ptr + queries, mask=queries < T, other=0.0)
        s = _scores(k, q, BM, BN, WIDTHS)
        dp = _scores(v, do, BM, BN, WIDTHS)
        if not EVEN_M:
            s = tl.where((rows < T)[:, None], s, float("-inf"))  # else exp2(0 − lse), which may be infinite
        weights = tl.exp2(s * scale2 - (lse * LOG2E)[None, :])
        dv = _gather(dv, _rounded(weights, dtype), do, WIDTHS)
        ds = weights * (dp - delta[None, :])
        ds = _rounded(ds, dtype)
        dk = _gather(dk, ds, q, WIDTHS)
        at = rows[:, None] * ds_stride + queries[None, :]
        if EVEN_M and EVEN_N:
            tl.store(ds_ptr + at, ds.to(dtype))
        else:
            tl.store(ds_ptr + at, ds.to(dtype), mask=(rows < T)[:, None] & (queries < T)[None, :])
    chunk = block * SHARE
    if GAINS:
        part_ptr += (sample * chunks + chunk) * (3 * D) + 2 * D + channel
    for p in tl.static_range(len(WIDTHS)):
        _store_tile(dz_ptr + D, dk[p] * scale, rows, T, 3 * D, HD, WIDTHS, p, EVEN_M)
        grad = dv[p]
        if GAINS:
            z = _load_tile(z_ptr + 2 * D, rows, T, 3 * D, HD, WIDTHS, p, EVEN_M, AGAIN).to(tl.float32)
            _store_sum(part_ptr, grad * z, chunk, chunks, 3 * D, HD, WIDTHS, p, SHARE)
            grad *= _load_vector(vectors_ptr + 2 * D, HD, WIDTHS, p, AGAIN)
        _store_tile(dz_ptr + 2 * D, grad, rows, T, 3 * D, HD, WIDTHS, p, EVEN_M)


@triton.jit(do_not_specialize=["T", "steps", "vector_stride", "chunks"])
def _attention_dq_kernel(
    ds_ptr, z_ptr, vectors_ptr, dz_ptr, part_ptr, scale, T, steps, vector_stride, chunks, ds_stride,
    H: tl.constexpr, HD: tl.constexpr, WIDTHS: tl.constexpr, GAINS: tl.constexpr, SHARE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, STEPS: tl.constexpr, EVEN_M: tl.constexpr, EVEN_N: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    D: tl.constexpr = H * HD
    R: tl.constexpr = 3 if GAINS else 1
    tl.assume(steps > 0)  # else ptxas lets no two products of warp groups overlap, lest there be none
    if EVEN_N:
        T = steps * BN  # the compiler then knows what divides it
    blocks = tl.cdiv(T, BM)
    block = tl.program_id(0) % blocks
    head = tl.program_id(0) // blocks
    sample = (head // H).to(tl.int64)
    channel = (head % H) * HD
    z_ptr += sample * T * (3 * D) + channel
    dz_ptr += sample * T * (3 * D) + channel
    ds_ptr += head.to(tl.int64) * T * ds_stride
    vectors_ptr += sample * vector_stride + channel
    rows = block * BM + tl.arange(0, BM)
    a = _zero_head(BM, WIDTHS)
    for step in tl.range(0, STEPS if STEPS > 0 else steps, num_stages=STAGES):
        keys = step * BN + tl.arange(0, BN)
        k = _load_head(z_ptr + D, keys, T, 3 * D, HD, WIDTHS, EVEN_N)
        at = keys[:, None] * ds_stride + rows[None, :]
        if EVEN_M and EVEN_N:
            ds = tl.load(ds_ptr + at)
        else:
            ds = tl.load(ds_ptr + at, mask=(keys < T)[:, None] & (rows < T)[None, :], other=0.0)
        if CUTS_OFF:
            ds = ds.to(tl.float32)
        a = _gather(a, tl.trans(ds), k, WIDTHS)
    chunk = block * SHARE
    part_ptr += (sample * chunks + chunk) * (R * D) + channel
    for p in tl.static_range(len(WIDTHS)):
        dq = a[p] * scale
        if GAINS:
            z = _load_tile(z_ptr, rows, T, 3 * D, HD, WIDTHS, p, EVEN_M, FIRST).to(tl.float32)
            z += _load_vector(vectors_ptr, HD, WIDTHS, p, FIRST)
            _store_sum(part_ptr + D, dq * z, chunk, chunks, R * D, HD, WIDTHS, p, SHARE)
            dq *= _load_vector(vectors_ptr + D, HD, WIDTHS, p, FIRST)
        _store_sum(part_ptr, dq, chunk, chunks, R * D, HD, WIDTHS, p, SHARE)
        _store_tile(dz_ptr, dq, rows, T, 3 * D, HD, WIDTHS, p, EVEN_M)


# -- for a library's attention ---------------------------------------------------------------------------------------
@triton.jit(do_not_specialize=["M", "chunk_rows", "chunks"])
def _scale_qkv_kernel(
    z_ptr, vectors_ptr, qkv_ptr, M, chunk_rows, chunks,
    D: tl.constexpr, GAINS: tl.constexpr, SUB: tl.constexpr, COUNT: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    R: tl.constexpr = 3 if GAINS else 1
    N: tl.constexpr = 3 * D
    blocks: tl.constexpr = (N + COLS - 1) // COLS
    cols = (tl.program_id(0) % blocks) * COLS + tl.arange(0, COLS)
    chunk = tl.program_id(0) // blocks
    group = (chunk // chunks).to(tl.int64)
    first = (chunk % chunks).to(tl.int64) * chunk_rows
    count = tl.minimum(M - first, chunk_rows).to(tl.int32)
    inside = cols < N
    vectors_ptr += group * (R * D)
    bias = tl.load(vectors_ptr + cols, mask=cols < D, other=0.0)
    if GAINS:  # g for the queries, 1 for the keys, γ_v for the values
        gain = tl.load(vectors_ptr + D + cols, mask=cols < D, other=1.0)
        gain *= tl.load(vectors_ptr + cols, mask=inside & (cols >= 2 * D), other=1.0)
    z_ptr += (group * M + first) * N
    qkv_ptr += (group * M + first) * N
    start = 0
    while start < count:
        z = load_stack(z_ptr, start, count, cols, inside, N, SUB, COUNT)
        qkv = ()
        for i in tl.static_range(COUNT):
            value = z[i] + bias[None, :]
            if GAINS:
                value *= gain[None, :]
            qkv = qkv + (value,)
        store_stack(qkv_ptr, qkv, start, count, cols, inside, N, SUB, COUNT)
        start += SUB * COUNT


@triton.jit
def _pack_third(
    d_ptr, z_ptr, vectors_ptr, dz_ptr, part_ptr, count, cols,
    THIRD: tl.constexpr, D: tl.constexpr, GAINS: tl.constexpr,
    SUB: tl.constexpr, COUNT: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """One of q, k, v (0, 1, 2): a chunk of rows × COLS columns of it, and its sums."""
    SCALED: tl.constexpr = GAINS and THIRD != 1
    inside = cols < D
    z_ptr += THIRD * D
    dz_ptr += THIRD * D
    if SCALED:
        gain = tl.load(vectors_ptr + (1 + THIRD // 2) * D + cols, mask=inside, other=0.0)
        product = tl.zeros([SUB, COLS], dtype=tl.float32)
        if THIRD == 0:
            bias = tl.load(vectors_ptr + cols, mask=inside, other=0.0)
    if THIRD == 0:
        grad = tl.zeros([SUB, COLS], dtype=tl.float32)
    start = 0
    while start < count:
        d = load_stack(d_ptr, start, count, cols, inside, D, SUB, COUNT)
        if SCALED:
            z = load_stack(z_ptr, start, count, cols, inside, 3 * D, SUB, COUNT)
        dz = ()
        for i in tl.static_range(COUNT):
            value = d[i]
            if SCALED:
                if THIRD == 0:
                    product += value * (z[i] + bias[None, :])
                else:
                    product += value * z[i]
                value *= gain[None, :]
            if THIRD == 0:
                grad += value
            dz = dz + (value,)
        store_stack(dz_ptr, dz, start, count, cols, inside, 3 * D, SUB, COUNT)
        start += SUB * COUNT
    if THIRD == 0:
        tl.store(part_ptr + cols, tl.sum(grad, axis=0), mask=inside)
    if SCALED:
        tl.store(part_ptr + (1 + THIRD // 2) * D + cols, tl.sum(product, axis=0), mask=inside)


@triton.jit(do_not_specialize=["M", "chunk_rows", "chunks"])
def _pack_dqkv_kernel(
    dq_ptr, dk_ptr, dv_ptr, z_ptr, vectors_ptr, dz_ptr, part_ptr, M, chunk_rows, chunks,
    D: tl.constexpr, GAINS: tl.constexpr, SUB: tl.constexpr, COUNT: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    R: tl.constexpr = 3 if GAINS else 1
    blocks: tl.constexpr = (D + COLS - 1) // COLS
    cols = (tl.program_id(0) % blocks) * COLS + tl.arange(0, COLS)
    third = (tl.program_id(0) // blocks) % 3
    chunk = tl.program_id(0) // (3 * blocks)
    group = (chunk // chunks).to(tl.int64)
    first = (chunk % chunks).to(tl.int64) * chunk_rows
    count = tl.minimum(M - first, chunk_rows).to(tl.int32)
    token = group * M + first
    z_ptr += token * (3 * D)
    dz_ptr += token * (3 * D)
    vectors_ptr += group * (R * D)
    part_ptr += chunk.to(tl.int64) * (R * D)
    if third == 0:
        d_ptr = dq_ptr + token * D
        _pack_third(d_ptr, z_ptr, vectors_ptr, dz_ptr, part_ptr, count, cols, 0, D, GAINS, SUB, COUNT, COLS)
    elif third == 1:
        d_ptr = dk_ptr + token * D
        _pack_third(d_ptr, z_ptr, vectors_ptr, dz_ptr, part_ptr, count, cols, 1, D, GAINS, SUB, COUNT, COLS)
    else:
        d_ptr = dv_ptr + token * D
        _pack_third(d_ptr, z_ptr, vectors_ptr, dz_ptr, part_ptr, count, cols, 2, D, GAINS, SUB, COUNT, COLS)


# -- launchers -------------------------------------------------------------------------------------------------------
def supports(head_dim: int, dtype: torch.dtype) -> bool:
    """Whether a device should be given heads of ``head_dim`` channels of ``dtype``.

    The kernels are right for every head size up to 128 and for float32 too; but accesses are 16 bytes wide, and products
    on tensor cores, only where this says so.
    """
    return head_dim % 8 == 0 and 16 <= head_dim <= 128 and dtype in (torch.bfloat16, torch.float16)


def head_tiles(head_dim: int) -> tuple[int, ...]:
    """Widths of the tiles of a head, powers of two from 16 to 64 columns: 72 is (64, 16), 96 is (64, 32).

    128 is (64, 64): of the operands that a program keeps it has half as many in registers at a time.
    """
    first = min(64, max(16, 1 << (head_dim.bit_length() - 1)))
    rest = head_dim - first
    return (first,) if rest <= 0 else (first, max(16, 1 << (rest - 1).bit_length()))


def _constants(T: int, H: int, HD: int, R: int, plan: AttentionPlan) -> dict[str, object]:
    return dict(
        H=H, HD=HD, WIDTHS=head_tiles(HD), GAINS=R == 3, BM=plan.rows, BN=plan.cols,
        STEPS=-(-T // plan.cols) if CUTS_OFF else 0, EVEN_M=T % plan.rows == 0, EVEN_N=T % plan.cols == 0,
        STAGES=plan.stages, num_warps=plan.warps,
    )  # fmt: skip


def attention_forward(z: torch.Tensor, vectors: torch.Tensor, num_heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of the bare product of qkv.

    Args: z [B, T, 3D] without bias; vectors float32 [G, R, D], one set for all samples (G = 1) or one each (G = B): the query
        bias, and with R = 3 the factor g = γ_q·γ_k on the scores' channels and γ_v on the values; R = 1 is all ones.
    Returns: o [B, T, D] in the type of z; lse float32 [B, H, T], natural logarithms.
    """
    B, T, N = z.shape
    D, (G, R, _) = N // 3, vectors.shape
    HD = D // num_heads
    o = torch.empty((B, T, D), dtype=z.dtype, device=z.device)
    lse = torch.empty((B, num_heads, T), dtype=torch.float32, device=z.device)
    if z.numel() == 0:
        return o, lse
    plan = attention_plan("attention_forward", architecture(z.device), HD, T)
    launch(
        _attention_forward_kernel, B * num_heads * -(-T // plan.rows), z.device, z, vectors, o, lse, HD**-0.5,
        T, -(-T // plan.cols), R * D if G > 1 else 0,
        **_constants(T, num_heads, HD, R, plan),
    )  # fmt: skip
    return o, lse


def attention_backward(
    do: torch.Tensor, z: torch.Tensor, vectors: torch.Tensor, o: torch.Tensor, lse: torch.Tensor, num_heads: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of :func:`attention_forward`.

    Args: do [B, T, D] contiguous; z, vectors as the forward took them, o and lse as it gave them.
    Returns: dz [B, T, 3D] in the type of z; dvectors float32 [G, R, D], the gradients of ``vectors``.
    """
    B, T, N = z.shape
    D, (G, R, _) = N // 3, vectors.shape
    HD = D // num_heads
    dz = torch.empty_like(z)
    if z.numel() == 0:
        return dz, torch.zeros_like(vectors)
    arch = architecture(z.device)
    rows, queries, keys = (attention_plan(f"attention_{kernel}", arch, HD, T) for kernel in ("query", "dq", "dkdv"))
    unit = min(queries.rows, keys.rows)  # tokens of one row of partial sums
    chunks = -(-T // unit)
    q, delta = torch.empty_like(o), torch.empty_like(lse)
    part = torch.empty((B, chunks, R * D), dtype=torch.float32, device=z.device)
    scale, stride = HD**-0.5, R * D if G > 1 else 0
    launch(
        _attention_query_kernel, B * num_heads * -(-T // rows.rows), z.device, do, z, vectors, o, q, delta, T, stride,
        H=num_heads, HD=HD, WIDTHS=head_tiles(HD), GAINS=R == 3, BM=rows.rows, EVEN_M=T % rows.rows == 0, num_warps=rows.warps,
    )  # fmt: skip
    ds_stride = -(-T // 16) * 16  # rows begin at whole sectors
    group = max(1, min(B, DS_BYTES // (num_heads * T * ds_stride * z.element_size())))
    ds = torch.empty((group, num_heads, T, ds_stride), dtype=z.dtype, device=z.device)  # dSᵀ: keys, queries
    for first in range(0, B, group):
        some = slice(first, first + group)
        count = min(group, B - first)
        own = vectors[some] if G > 1 else vectors
        launch(
            _attention_dkdv_kernel, count * num_heads * -(-T // keys.rows), z.device,
            do[some], q[some], z[some], own, lse[some], delta[some], ds, dz[some], part[some], scale,
            T, -(-T // keys.cols), stride, chunks, ds_stride,
            SHARE=keys.rows // unit, **_constants(T, num_heads, HD, R, keys),
        )  # fmt: skip
        launch(
            _attention_dq_kernel, count * num_heads * -(-T // queries.rows), z.device,
            ds, z[some], own, dz[some], part[some], scale,
            T, -(-T // queries.cols), stride, chunks, ds_stride,
            SHARE=queries.rows // unit, **_constants(T, num_heads, HD, R, queries),
        )  # fmt: skip
    part = part.view(G, B // G * chunks, R * D)
    (sums,) = finish(part)
    return dz, sums.view(G, R, D)


def scale_qkv(z: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """q = g·(z_q + b), k = z_k, v = γ_v·z_v, for attention without bias and gains.

    Args: z [B, T, 3D]; vectors float32 [G, R, D], as :func:`attention_forward` takes them.
    Returns: qkv [B, T, 3D] in the type of z.
    """
    B, T, N = z.shape
    G, R, D = vectors.shape
    qkv = torch.empty_like(z)
    if z.numel() == 0:
        return qkv
    M = B * T // G
    plan = tile_plan(architecture(z.device), vector(z))
    blocks = -(-N // plan.cols)
    chunk_rows, chunks = chunks_of(M, plan, G * blocks)
    launch(
        _scale_qkv_kernel, G * chunks * blocks, z.device, z, vectors, qkv, M, chunk_rows, chunks,
        D=D, GAINS=R == 3, SUB=plan.rows, COUNT=plan.stack, COLS=plan.cols, num_warps=plan.warps,
    )  # fmt: skip
    return qkv


def pack_dqkv(
    dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, z: torch.Tensor, vectors: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of :func:`scale_qkv` from those of q, k and v, packed.

    Args: dq, dk, dv [B, T, H, d] (or [B, T, D]) contiguous; z [B, T, 3D] and vectors [G, R, D] as :func:`scale_qkv` took them.
    Returns: dz [B, T, 3D] in the type of z; dvectors float32 [G, R, D].
    """
    B, T, _ = z.shape
    G, R, D = vectors.shape
    dz = torch.empty_like(z)
    if z.numel() == 0:
        return dz, torch.zeros_like(vectors)
    M = B * T // G
    plan = tile_plan(architecture(z.device), vector(z, dq))
    blocks = -(-D // plan.cols)
    chunk_rows, chunks = chunks_of(M, plan, G * 3 * blocks)
    part = torch.empty((G, chunks, R * D), dtype=torch.float32, device=z.device)
    launch(
        _pack_dqkv_kernel, G * chunks * 3 * blocks, z.device, dq, dk, dv, z, vectors, dz, part, M, chunk_rows, chunks,
        D=D, GAINS=R == 3, SUB=plan.rows, COUNT=plan.stack, COLS=plan.cols, num_warps=plan.warps,
    )  # fmt: skip
    (sums,) = finish(part)
    return dz, sums.view(G, R, D)
