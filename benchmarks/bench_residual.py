"""residual: the end of a branch, y = x + gate·branch + bias; and fused with the next LayerNorm (residual_adaln).

Command: python benchmarks/bench_residual.py [--batches 32] [--widths 1152] [--json out.json]
"""

from __future__ import annotations

import sys

from common import Case, Size, kernel_case, main

from difffit_fast.ops.residual import (
    residual_adaln_backward,
    residual_adaln_forward,
    residual_backward,
    residual_forward,
)


def forward(size: Size) -> Case:
    return kernel_case("residual", residual_forward, size.stream(), size.branch(), *size.vectors(2))


def backward(size: Size) -> Case:
    return kernel_case("residual", residual_backward, size.stream(), size.branch(), *size.vectors(1))


def join_forward(size: Size) -> Case:
    return kernel_case("residual", residual_adaln_forward, size.stream(), size.branch(), *size.vectors(4), 1e-6)


def join_backward(size: Size) -> Case:
    branch, (gate, bias, scale, shift) = size.branch(), size.vectors(4)
    y, _, mean, rstd = residual_adaln_forward(size.stream(), branch, gate, bias, scale, shift, 1e-6)
    dh, dy = size.branch(), size.stream()
    return kernel_case("residual", residual_adaln_backward, dh, dy, y, branch, gate, scale, mean, rstd)


KERNELS = {
    "residual_forward": forward,
    "residual_backward": backward,
    "residual_adaln_forward": join_forward,
    "residual_adaln_backward": join_backward,
}

if __name__ == "__main__":
    sys.exit(main("residual", KERNELS, __doc__))
