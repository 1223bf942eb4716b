"""How a matrix is cut: loads, stores and vectors of a [rows, WIDTH] tile that starts at a column.

Triton's blocks are powers of two. A row of D values is therefore two tiles, the largest power of two within D and the
rest: 1152 = 1024 + 128, 768 = 512 + 256, 384 = 256 + 128, 72 = 64 + 8. Nothing is padded for these; 37 = 32 + 8 wastes
three lanes, and no width wastes more than a quarter. Addresses of a tile start from a pointer that the kernel has
already advanced with 64-bit arithmetic, so 32-bit offsets suffice within it.
"""

import triton
import triton.language as tl


@triton.jit
def columns(START: tl.constexpr, WIDTH: tl.constexpr):
    return START + tl.arange(0, WIDTH)


@triton.jit
def load_vector(ptr, START: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """float32 [WIDTH] from a vector of D values, zero beyond D."""
    cols = START + tl.arange(0, WIDTH)
    if START + WIDTH > D:
        return tl.load(ptr + cols, mask=cols < D, other=0.0)
    else:
        return tl.load(ptr + cols)


@triton.jit
def load_tile(ptr, rows, live, START: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """float32 [rows, WIDTH] from a matrix with D columns, zero where a row is not live or a column is beyond D."""
    cols = START + tl.arange(0, WIDTH)
    mask = live[:, None]
    if START + WIDTH > D:
        mask = mask & (cols < D)[None, :]
    return tl.load(ptr + (rows[:, None] * D + cols[None, :]), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_tile(ptr, tile, rows, live, START: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """Store a float32 tile in the type of ``ptr``."""
    cols = START + tl.arange(0, WIDTH)
    mask = live[:, None]
    if START + WIDTH > D:
        mask = mask & (cols < D)[None, :]
    tl.store(ptr + (rows[:, None] * D + cols[None, :]), tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def store_vector(ptr, vector, START: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """Store a float32 vector of up to WIDTH columns."""
    cols = START + tl.arange(0, WIDTH)
    if START + WIDTH > D:
        tl.store(ptr + cols, vector, mask=cols < D)
    else:
        tl.store(ptr + cols, vector)


@triton.jit
def centre(tile, mean, START: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """tile − mean (one mean per row), zero in the columns beyond D, so that a sum of squares may run over all of it."""
    tile = tile - mean[:, None]
    if START + WIDTH > D:
        tile = tl.where(((START + tl.arange(0, WIDTH)) < D)[None, :], tile, 0.0)
    return tile
