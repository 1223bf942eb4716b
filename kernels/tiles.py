"""How a matrix is cut: rows into equal pieces, a chunk of rows into equal tiles.

Triton's blocks are powers of two and D = 1152 is not. So ROWS rows are a tuple of ⌈D / WIDTH⌉ pieces [ROWS, WIDTH], all of
one shape and therefore all laid over the threads in the same way: a sum over D adds the pieces in registers before threads
are asked for each other's, and nothing is ever moved between layouts. The last piece is masked; threads that have no
column there load and store nothing. Tile kernels walk SUB × COLS tiles, COUNT of them in flight, likewise of one shape.

The planner (``config``) makes a piece as wide as its warps times one access of 16 bytes of the widest type involved, so
that float32 and bfloat16 lie over the threads alike.

Every loop over rows is a ``while``: Triton's interpreter cannot take the bounds of a ``range`` from kernel arguments
under recent NumPy. Pointers are advanced to the chunk with 64-bit arithmetic; 32-bit offsets do within it.
"""

import os

import triton
import triton.language as tl

# Triton's interpreter cuts float32 off to bfloat16 and float8 where every device rounds to nearest.
CUTS_OFF = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def narrow(value, dtype: tl.constexpr):
    """float32 rounded to the nearest value of ``dtype``, ties to even."""
    if CUTS_OFF and dtype == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        value = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return value.to(dtype)


@triton.jit
def load_vector(ptr, D: tl.constexpr, WIDTH: tl.constexpr):
    """A float32 vector of D values in pieces [1, WIDTH], zero beyond D."""
    pieces = ()
    for p in tl.static_range((D + WIDTH - 1) // WIDTH):
        cols = p * WIDTH + tl.arange(0, WIDTH)
        pieces = pieces + (tl.load(ptr + cols, mask=cols < D, other=0.0)[None, :],)
    return pieces


@triton.jit
def store_sums(ptr, pieces, D: tl.constexpr, WIDTH: tl.constexpr):
    """Add up the rows of pieces [ROWS, WIDTH] and store the vector of D sums."""
    for p in tl.static_range((D + WIDTH - 1) // WIDTH):
        cols = p * WIDTH + tl.arange(0, WIDTH)
        tl.store(ptr + cols, tl.sum(pieces[p], axis=0), mask=cols < D)


@triton.jit
def load_rows(ptr, rows, count, D: tl.constexpr, WIDTH: tl.constexpr):
    """Rows of a matrix in pieces [ROWS, WIDTH], in its own type; zero beyond D and from row ``count`` on."""
    pieces = ()
    for p in tl.static_range((D + WIDTH - 1) // WIDTH):
        cols = p * WIDTH + tl.arange(0, WIDTH)
        mask = (rows < count)[:, None] & (cols < D)[None, :]
        pieces = pieces + (tl.load(ptr + (rows[:, None] * D + cols[None, :]), mask=mask, other=0.0),)
    return pieces


@triton.jit
def store_rows(ptr, pieces, rows, count, D: tl.constexpr, WIDTH: tl.constexpr):
    """Store pieces [ROWS, WIDTH] in the type of ``ptr``."""
    for p in tl.static_range((D + WIDTH - 1) // WIDTH):
        cols = p * WIDTH + tl.arange(0, WIDTH)
        mask = (rows < count)[:, None] & (cols < D)[None, :]
        tl.store(ptr + (rows[:, None] * D + cols[None, :]), narrow(pieces[p], ptr.dtype.element_ty), mask=mask)


@triton.jit
def zero_rows(D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Pieces [ROWS, WIDTH] of float32 zeros."""
    pieces = ()
    for _ in tl.static_range((D + WIDTH - 1) // WIDTH):
        pieces = pieces + (tl.zeros([ROWS, WIDTH], dtype=tl.float32),)
    return pieces


@triton.jit
def widen(pieces, D: tl.constexpr, WIDTH: tl.constexpr):
    """The pieces in float32."""
    out = ()
    for p in tl.static_range((D + WIDTH - 1) // WIDTH):
        out = out + (pieces[p].to(tl.float32),)
    return out


@triton.jit
def add(left, right, D: tl.constexpr, WIDTH: tl.constexpr):
    """left + right, element by element."""
    out = ()
    for p in tl.static_range((D + WIDTH - 1) // WIDTH):
        out = out + (left[p] + right[p],)
    return out


@triton.jit
def multiply(left, right, D: tl.constexpr, WIDTH: tl.constexpr):
    """left·right, element by element."""
    out = ()
    for p in tl.static_range((D + WIDTH - 1) // WIDTH):
        out = out + (left[p] * right[p],)
    return out


@triton.jit
def multiply_add(left, right, addend, D: tl.constexpr, WIDTH: tl.constexpr):
    """left·right + addend, element by element."""
    out = ()
    for p in tl.static_range((D + WIDTH - 1) // WIDTH):
        out = out + (left[p] * right[p] + addend[p],)
    return out


@triton.jit
def total(pieces, D: tl.constexpr, WIDTH: tl.constexpr):
    """Σ over D of pieces that are zero beyond D: [ROWS, 1]."""
    acc = pieces[0]
    for p in tl.static_range(1, (D + WIDTH - 1) // WIDTH):
        acc += pieces[p]
    return tl.sum(acc, axis=1)[:, None]


@triton.jit
def centre(pieces, mean, D: tl.constexpr, WIDTH: tl.constexpr):
    """pieces − mean, zero beyond D."""
    out = ()
    for p in tl.static_range((D + WIDTH - 1) // WIDTH):
        centred = pieces[p] - mean
        if (p + 1) * WIDTH > D:
            centred = tl.where((p * WIDTH + tl.arange(0, WIDTH) < D)[None, :], centred, 0.0)
        out = out + (centred,)
    return out


@triton.jit
def scale_rows(pieces, factor, D: tl.constexpr, WIDTH: tl.constexpr):
    """pieces·factor, one factor per row: [ROWS, 1]."""
    out = ()
    for p in tl.static_range((D + WIDTH - 1) // WIDTH):
        out = out + (pieces[p] * factor,)
    return out


@triton.jit
def norm_backward(w, xhat, rstd, D: tl.constexpr, WIDTH: tl.constexpr):
    """Gradient of LayerNorm's input: rstd·(w − Σ w / D − x̂·Σ w·x̂ / D), w the gradient of x̂, both zero beyond D."""
    mean_w = total(w, D, WIDTH) / D
    mean_wx = total(multiply(w, xhat, D, WIDTH), D, WIDTH) / D
    out = ()
    for p in tl.static_range((D + WIDTH - 1) // WIDTH):
        out = out + ((w[p] - mean_w - xhat[p] * mean_wx) * rstd,)
    return out


@triton.jit
def load_stack(ptr, start, count, cols, keep, STRIDE: tl.constexpr, SUB: tl.constexpr, COUNT: tl.constexpr):
    """COUNT float32 tiles [SUB, cols] from row ``start`` on; zero from row ``count`` on and where ``keep`` is false."""
    tiles = ()
    for i in tl.static_range(COUNT):
        rows = start + i * SUB + tl.arange(0, SUB)
        mask = (rows < count)[:, None] & keep[None, :]
        at = rows[:, None] * STRIDE + cols[None, :]
        tiles = tiles + (tl.load(ptr + at, mask=mask, other=0.0).to(tl.float32),)
    return tiles


@triton.jit
def store_stack(ptr, tiles, start, count, cols, keep, STRIDE: tl.constexpr, SUB: tl.constexpr, COUNT: tl.constexpr):
    """Store what :func:`load_stack` loaded, in the type of ``ptr``."""
    for i in tl.static_range(COUNT):
        rows = start + i * SUB + tl.arange(0, SUB)
        mask = (rows < count)[:, None] & keep[None, :]
        at = rows[:, None] * STRIDE + cols[None, :]
        tl.store(ptr + at, narrow(tiles[i], ptr.dtype.element_ty), mask=mask)
