"""Every tuning number of the kernels, by architecture and row width, and the one place from which they are launched.

Two families of kernels exist:

- *row* kernels (LayerNorm) hold whole rows of width D. A program owns a chunk of the tokens of one sample and walks
  through it ``rows`` tokens at a time, so that vectors per sample are loaded once and sums over tokens stay in registers.
- *tile* kernels (everything without row statistics) hold ``rows`` × ``cols`` of a matrix and walk down a chunk of rows.

The number of chunks follows from the shape and from ``programs`` below, never from the device at hand: a reduction is
added up in the same order on every device of an architecture, and nothing is tuned at run time.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch


class Plan(NamedTuple):
    """How one launch is cut. ``tail`` is 0 for tile kernels and for widths that are a power of two."""

    rows: int  # rows in flight per program
    cols: int  # columns of a tile; of a row kernel, the largest power of two within D
    tail: int  # the rest of the row, rounded up to a power of two
    warps: int
    programs: int  # programs wanted: about what the device keeps resident, so that one wave does most shapes


# Multiprocessors of the device each architecture is tuned for: A100, H100/H200, B200, RTX 5090.
_MULTIPROCESSORS = {80: 108, 90: 132, 100: 148, 120: 170}

# Row kernels. Widths up to D use the row: tokens in flight in a forward and in a backward program, warps per program,
# and programs per multiprocessor, forward and backward. A warp covers 256 columns of bfloat16 in 16-byte accesses, so
# with warps = (largest power of two in D) / 256 every thread owns its columns for all tokens and sums over tokens need
# no exchange. Backward programs are fewer: each one leaves partial sums in memory.
_ROWS = {
    #  sm   D ≤   rows fwd/bwd  warps  programs fwd/bwd
    (80, 511): (4, 2, 1, 16, 8),
    (80, 1023): (4, 2, 2, 8, 4),
    (80, 2047): (4, 2, 4, 4, 2),
    (80, 4095): (2, 1, 8, 4, 2),
    (80, 1 << 30): (1, 1, 16, 2, 1),
    (90, 511): (4, 2, 1, 16, 8),
    (90, 1023): (4, 2, 2, 8, 4),
    (90, 2047): (4, 2, 4, 4, 2),
    (90, 4095): (2, 1, 8, 4, 2),
    (90, 1 << 30): (1, 1, 16, 2, 1),
    (100, 511): (4, 2, 1, 16, 8),
    (100, 1023): (4, 2, 2, 8, 4),
    (100, 2047): (4, 2, 4, 4, 2),
    (100, 4095): (2, 1, 8, 4, 2),
    (100, 1 << 30): (1, 1, 16, 2, 1),
    (120, 511): (4, 2, 1, 16, 8),
    (120, 1023): (4, 2, 2, 8, 4),
    (120, 2047): (4, 2, 4, 4, 2),
    (120, 4095): (2, 1, 8, 4, 2),
    (120, 1 << 30): (1, 1, 16, 2, 1),
}

# Tile kernels: rows and columns of a tile, warps, programs per multiprocessor. 128 columns divide the widths of every
# DiT, 3D and 4D included.
_TILES = {
    80: (16, 128, 4, 6),
    90: (16, 128, 4, 6),
    100: (16, 128, 4, 6),
    120: (16, 128, 4, 6),
}


# Element-wise kernels: elements per program, warps.
_FLAT = {80: (4096, 4), 90: (4096, 4), 100: (4096, 4), 120: (4096, 4)}


@lru_cache(maxsize=None)
def row_plan(arch: int, D: int, backward: bool) -> Plan:
    """Plan of a row kernel of width D on ``arch`` (an entry of :data:`_MULTIPROCESSORS`)."""
    limit = min(width for sm, width in _ROWS if sm == arch and width >= D)
    rows_forward, rows_backward, warps, programs_forward, programs_backward = _ROWS[arch, limit]
    cols = 1 << (D.bit_length() - 1)
    tail = 0 if cols == D else 1 << (D - cols - 1).bit_length()
    rows, programs = (rows_backward, programs_backward) if backward else (rows_forward, programs_forward)
    return Plan(rows, cols, tail, warps, programs * _MULTIPROCESSORS[arch])


@lru_cache(maxsize=None)
def tile_plan(arch: int) -> Plan:
    """Plan of a tile kernel on ``arch``."""
    rows, cols, warps, programs = _TILES[arch]
    return Plan(rows, cols, 0, warps, programs * _MULTIPROCESSORS[arch])


@lru_cache(maxsize=None)
def flat_plan(arch: int) -> Plan:
    """Plan of an element-wise kernel on ``arch``."""
    cols, warps = _FLAT[arch]
    return Plan(1, cols, 0, warps, 0)


def chunks_of(rows: int, plan: Plan, copies: int) -> tuple[int, int]:
    """Cut ``rows`` ≥ 1 rows into chunks of whole tiles: (rows per chunk, chunks).

    ``copies`` programs share each chunk (samples, or columns of tiles); the chunks are as many as ``plan.programs``
    asks for, at least one.
    """
    wanted = max(1, min(plan.programs // max(copies, 1), -(-rows // plan.rows)))
    chunk_rows = -(-rows // (wanted * plan.rows)) * plan.rows
    return chunk_rows, -(-rows // chunk_rows)


@lru_cache(maxsize=None)
def _device_architecture(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    known = [sm for sm in _MULTIPROCESSORS if sm <= 10 * major + minor]
    return max(known, default=min(_MULTIPROCESSORS))


def architecture(device: torch.device) -> int:
    """The architecture whose plans ``device`` uses: the newest known one that is not newer than the device.

    CPU tensors, which only Triton's interpreter takes, are cut as on Hopper.
    """
    if device.type != "cuda":
        return 90
    return _device_architecture(torch.cuda.current_device() if device.index is None else device.index)


def launch(kernel: Any, programs: int, device: torch.device, *args: Any, **constants: Any) -> None:
    """Run ``programs`` programs of ``kernel`` on ``device``, whichever device is current."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[(programs,)](*args, **constants)
    else:
        kernel[(programs,)](*args, **constants)
