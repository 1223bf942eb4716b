"""Every tuning number of the kernels, by architecture and row width, and the one place from which they are launched.

Two families of kernels exist:

- *row* kernels (LayerNorm) hold whole rows of width D. A program owns a chunk of the tokens of one sample and walks
  through it ``rows`` tokens at a time, so that vectors per sample are loaded once and sums over tokens stay in registers.
- *tile* kernels (everything without row statistics) hold ``rows`` × ``cols`` of a matrix and walk down a chunk of rows.

The number of chunks follows from the shape and from ``programs`` below, never from the device at hand: a reduction is
added up in the same order on every device of an architecture, and nothing is tuned at run time.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch


class Plan(NamedTuple):
    """How one launch is cut."""

    rows: int  # rows of one tile
    cols: int  # columns of one tile (of a row kernel: the width of a piece)
    stack: int  # tiles of a tile kernel in flight at once
    warps: int
    programs: int  # programs wanted: about what the device keeps resident, so that one wave does most shapes


class AttentionPlan(NamedTuple):
    """How one launch of an attention kernel is cut."""

    rows: int  # rows of the block that a program owns
    cols: int  # rows of a block that it walks over
    warps: int
    stages: int  # blocks on their way or in use at once


class RotationPlan(NamedTuple):
    """How rows that are rotated are cut."""

    rows: int  # of a program
    channels: int  # that are multiplied at once
    warps: int
    stages: int  # pieces of the rows on their way or in use at once


class ProductPlan(NamedTuple):
    """How the int8 product is cut."""

    rows: int  # of a tile of the result
    cols: int
    depth: int  # channels that are multiplied at once
    group: int  # tiles below each other that are taken before those beside
    warps: int
    stages: int  # pieces of the operands on their way or in use at once


# Architectures, and the multiprocessors of the device each is tuned for: A100, H100/H200, B200, RTX 5090. Triton's
# interpreter on the CPU, where every call costs and no element does, counts as one more.
INTERPRETER = 0
_MULTIPROCESSORS = {INTERPRETER: 1, 80: 108, 90: 132, 100: 148, 120: 170}

# Row kernels. Widths up to D take the first line that holds them: rows at once, columns of a piece of a row, and programs
# per multiprocessor for the four kernels, about what registers allow; the backward ones are held lower where that many
# would leave too many partial sums. Of DiT's widths, 384, 768 and 1024 are whole pieces; 1152 = 2 × 512 + 128, where three
# warps of four sit out the last piece. While one row is reduced the next is loaded, so one row at once is enough, and its
# pieces lie over the threads alike whatever their type.
_ROWS = {
    #                 rows  piece  adaln      residual_adaln
    # sm   D ≤                     fwd bwd    fwd bwd
    (INTERPRETER, 1 << 30): (16, 512, 4, 4, 4, 4),
    (80, 512): (1, 128, 16, 8, 16, 8),
    (80, 896): (1, 256, 16, 6, 8, 4),
    (80, 2048): (1, 512, 8, 4, 4, 3),
    (80, 1 << 30): (1, 2048, 2, 1, 1, 1),
    (90, 512): (1, 128, 16, 8, 16, 8),
    (90, 896): (1, 256, 16, 6, 8, 4),
    (90, 2048): (1, 512, 8, 4, 4, 3),
    (90, 1 << 30): (1, 2048, 2, 1, 1, 1),
    (100, 512): (1, 128, 16, 8, 16, 8),
    (100, 896): (1, 256, 16, 6, 8, 4),
    (100, 2048): (1, 512, 8, 4, 4, 3),
    (100, 1 << 30): (1, 2048, 2, 1, 1, 1),
    (120, 512): (1, 128, 16, 8, 16, 8),
    (120, 896): (1, 256, 16, 6, 8, 4),
    (120, 2048): (1, 512, 8, 4, 4, 2),
    (120, 1 << 30): (1, 2048, 2, 1, 1, 1),
}
_ROW_KERNELS = ("adaln_forward", "adaln_backward", "residual_adaln_forward", "residual_adaln_backward")

# Tile kernels: columns, warps, tiles in flight, programs per multiprocessor. 128 columns divide the widths of every DiT,
# 3D and 4D included; the rows of a tile are as many as the warps cover.
_TILES = {
    INTERPRETER: (512, 64, 2, 4),
    80: (128, 4, 4, 6),
    90: (128, 4, 4, 6),
    100: (128, 4, 4, 6),
    120: (128, 4, 4, 6),
}

# The modulation kernels: samples of a tile, columns, warps. A program walks over the samples of one branch.
_MODULATION = {INTERPRETER: (8, 512, 4), 80: (8, 128, 4), 90: (8, 128, 4), 100: (8, 128, 4), 120: (8, 128, 4)}

# Element-wise kernels: elements per program, warps.
_FLAT = {INTERPRETER: (4096, 4), 80: (4096, 4), 90: (4096, 4), 100: (4096, 4), 120: (4096, 4)}


# Rotating rows: rows of a program, channels that are multiplied at once, warps, stages of the pipeline that loads them. Few rows,
# for there must be as many programs as the device holds; 16 is what tensor cores multiply.
_ROTATION = {
    INTERPRETER: (256, 64, 4, 1), 80: (16, 64, 4, 4), 90: (16, 64, 4, 4), 100: (16, 64, 4, 4), 120: (16, 64, 4, 4),
}  # fmt: skip

# GELU's rows in eight bits, 4D wide, one at once: columns of a piece and programs per multiprocessor forward; warps and programs
# backward, where the sums of all columns lie in registers too.
_GELU_ROWS = {
    INTERPRETER: (512, 4, 4, 4), 80: (1024, 6, 8, 2), 90: (1024, 6, 8, 2), 100: (1024, 6, 8, 2), 120: (1024, 6, 8, 2),
}  # fmt: skip

# The second stage of sums: chunks and columns of a tile, warps. Its time is that of its loads one after another, each of so many
# chunks: two for the 128 that attention leaves of 32 samples. 32 columns are the least that memory gives whole.
_FINISH = {INTERPRETER: (64, 1024, 4), 80: (64, 32, 4), 90: (64, 32, 4), 100: (64, 32, 4), 120: (64, 32, 4)}

# The int8 product. Tiles of 128 × 256 read the operands 1/128 + 1/256 times for each result, for which 128 registers of a thread
# are the sum; what lies in shared memory is (rows + cols) · depth · stages bytes, which sm_120 has half as many of.
_PRODUCT = {
    INTERPRETER: (64, 128, 128, 8, 4, 1),  # which multiplies integers slowly
    80: (128, 256, 64, 8, 8, 4),
    90: (128, 256, 128, 8, 8, 3),
    100: (128, 256, 128, 8, 8, 3),
    120: (128, 128, 128, 8, 8, 3),
}

# Attention kernels, for heads of up to so many channels: rows of the block that a program owns, rows of a block that it walks
# over, warps, stages of the pipeline that loads those. Long blocks of a program's own are worth their registers, since all
# that streams past is read once for each of them; but two programs or more on a multiprocessor come first, for there are few
# steps to a walk. dkdv keeps two accumulators and two products of them, so that it must be short in everything.
_ATTENTION = {
    #                  forward           dkdv              dq
    # sm   d ≤
    (INTERPRETER, 128): ((256, 256, 4, 1), (128, 256, 4, 1), (256, 256, 4, 1)),
    (80, 80): ((128, 32, 8, 2), (64, 32, 4, 2), (128, 32, 4, 3)),
    (80, 96): ((64, 64, 4, 2), (64, 32, 4, 2), (128, 32, 4, 3)),
    (80, 128): ((64, 64, 4, 2), (64, 16, 4, 2), (128, 32, 4, 3)),
    (90, 80): ((128, 32, 8, 3), (64, 64, 4, 2), (64, 64, 4, 3)),
    (90, 128): ((64, 64, 4, 2), (64, 32, 4, 2), (64, 64, 4, 3)),
    (100, 96): ((128, 64, 8, 2), (64, 64, 4, 2), (128, 64, 4, 3)),
    (100, 128): ((128, 64, 8, 2), (64, 32, 4, 2), (128, 64, 4, 3)),
    (120, 80): ((128, 32, 8, 2), (64, 32, 4, 2), (128, 32, 4, 3)),
    (120, 96): ((64, 64, 4, 2), (64, 32, 4, 2), (128, 32, 4, 3)),
    (120, 128): ((64, 64, 4, 2), (64, 16, 4, 2), (128, 32, 4, 3)),
}
_ATTENTION_KERNELS = ("attention_forward", "attention_dkdv", "attention_dq")
_ATTENTION_QUERY = AttentionPlan(64, 1, 4, 1)  # reads each value once, so that there is nothing to choose


def vector(*tensors: torch.Tensor) -> int:
    """Elements per thread and access: 16 bytes of the widest type among ``tensors``."""
    return 16 // max(tensor.element_size() for tensor in tensors)


@cache
def row_plan(kernel: str, arch: int, D: int, vector: int) -> Plan:
    """Plan of the row kernel ``kernel`` of width D on ``arch`` (an entry of :data:`_MULTIPROCESSORS`)."""
    limit = min(width for sm, width in _ROWS if sm == arch and width >= D)
    rows, piece, *programs = _ROWS[arch, limit]
    piece = max(piece, 32 * vector)
    wanted = programs[_ROW_KERNELS.index(kernel)] * _MULTIPROCESSORS[arch]
    return Plan(rows=rows, cols=piece, stack=1, warps=piece // (32 * vector), programs=wanted)


def rotation_plan(arch: int) -> RotationPlan:
    """Plan of the kernel that rotates rows and quantizes them."""
    return RotationPlan(*_ROTATION[arch])


def finish_plan(arch: int) -> Plan:
    """Plan of the second stage of sums: rows are chunks."""
    rows, cols, warps = _FINISH[arch]
    return Plan(rows, cols, 1, warps, 0)


@cache
def registers(plan: Plan, arch: int) -> int:
    """Most registers a thread may have for all programs of ``plan`` to be resident at once: for kernels that the compiler would
    give a few too many."""
    resident = -(-plan.programs // _MULTIPROCESSORS[arch])
    return min(65536 // (32 * plan.warps * resident) // 8 * 8, 255)


@cache
def gelu_rows_plan(backward: bool, arch: int, N: int, vector: int) -> Plan:
    """Plan of GELU, or its backward, of whole rows of width N."""
    piece, forward, warps, programs = _GELU_ROWS[arch]
    if not backward:
        warps, programs = piece // (32 * vector), forward
    while warps > 1 and 16 * vector * warps >= N:  # narrower rows
        warps //= 2
    rows = 16 if arch == INTERPRETER else 1
    return Plan(rows, 32 * vector * warps, 1, warps, programs * _MULTIPROCESSORS[arch])


@cache
def tile_plan(arch: int, vector: int) -> Plan:
    """Plan of a tile kernel on ``arch``."""
    cols, warps, stack, programs = _TILES[arch]
    return Plan(32 * vector * warps // cols, cols, stack, warps, programs * _MULTIPROCESSORS[arch])


@cache
def product_plan(arch: int) -> ProductPlan:
    """Plan of the int8 product on ``arch``."""
    return ProductPlan(*_PRODUCT[arch])


@cache
def modulation_plan(arch: int) -> Plan:
    """Plan of the modulation kernels on ``arch``: nothing to choose but the tile."""
    rows, cols, warps = _MODULATION[arch]
    return Plan(rows, cols, 1, warps, 0)


@cache
def flat_plan(arch: int) -> Plan:
    """Plan of an element-wise kernel on ``arch``."""
    cols, warps = _FLAT[arch]
    return Plan(1, cols, 1, warps, 0)


@cache
def attention_plan(kernel: str, arch: int, head_dim: int, T: int) -> AttentionPlan:
    """Plan of the attention kernel ``kernel`` for T tokens and heads of ``head_dim`` channels on ``arch``."""
    if kernel == "attention_query":
        return _ATTENTION_QUERY
    limit = min(channels for sm, channels in _ATTENTION if sm == arch and channels >= head_dim)
    plan = AttentionPlan(*_ATTENTION[arch, limit][_ATTENTION_KERNELS.index(kernel)])
    if plan.rows == 128 and T <= 64:  # half of every block would be empty
        plan = plan._replace(rows=64, warps=plan.warps // 2)
    return plan


def chunks_of(rows: int, plan: Plan, copies: int) -> tuple[int, int]:
    """Cut ``rows`` ≥ 1 rows into chunks of whole tiles: (rows per chunk, chunks).

    ``copies`` programs share each chunk (samples, or columns of tiles); the chunks are as many as ``plan.programs``
    asks for, at least one.
    """
    step = plan.rows * plan.stack
    wanted = max(1, min(plan.programs // max(copies, 1), -(-rows // step)))
    chunk_rows = -(-rows // (wanted * step)) * step
    return chunk_rows, -(-rows // chunk_rows)


@cache
def _device_architecture(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    known = [sm for sm in _MULTIPROCESSORS if sm <= 10 * major + minor]
    return max(*known, 80)


def architecture(device: torch.device) -> int:
    """The architecture whose plans ``device`` uses: the newest known one that is not newer than the device."""
    if device.type != "cuda":
        return INTERPRETER
    return _device_architecture(torch.cuda.current_device() if device.index is None else device.index)


def launch(kernel: Any, programs: int, device: torch.device, *args: Any, **constants: Any) -> None:
    """Run ``programs`` programs of ``kernel`` on ``device``, whichever device is current."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[(programs,)](*args, **constants)
    else:
        kernel[(programs,)](*args, **constants)
