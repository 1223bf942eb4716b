"""frozen_qkv: γ and the query bias on the projection q, k, v, forward and backward.

The product itself is in bench_frozen_linear.py.

Command: python benchmarks/bench_frozen_qkv.py [--batches 32] [--widths 1152] [--json out.json]
"""

from __future__ import annotations

import sys

from common import Case, Size, kernel_case, main, nbytes
from torch import Tensor

from difffit_fast.ops.frozen_qkv import qkv_backward, qkv_scale


def _gamma(size: Size) -> Tensor:
    return 1 + size.draw(3 * size.D, scale=0.1).float()


def scale(size: Size) -> Case:
    """In place: qkv is read and written."""
    return kernel_case(
        "frozen_qkv", qkv_scale, size.rows(3 * size.D), _gamma(size), size.draw(size.D).float(), in_place=0
    )


def backward(size: Size) -> Case:
    """Of qkv the key third is not read: Σ dk·k per channel is Σ dq·q."""
    dqkv, qkv, gamma = size.rows(3 * size.D), size.rows(3 * size.D), _gamma(size)
    moved = 2 * nbytes(dqkv) + nbytes(qkv) * 2 // 3 + 3 * nbytes(gamma)
    return kernel_case("frozen_qkv", qkv_backward, dqkv, qkv, gamma, bytes=moved)


def backward_without_gamma(size: Size) -> Case:
    """Only the query third is read, and nothing but its sum is written."""
    dqkv = size.rows(3 * size.D)
    return kernel_case("frozen_qkv", qkv_backward, dqkv, None, None, bytes=nbytes(dqkv) // 3 + 4 * size.D)


KERNELS = {"qkv_scale": scale, "qkv_backward": backward, "qkv_backward_no_gamma": backward_without_gamma}

if __name__ == "__main__":
    sys.exit(main("frozen_qkv", KERNELS, __doc__))
