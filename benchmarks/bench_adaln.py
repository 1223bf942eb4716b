"""adaln: LayerNorm with a scale and a shift per sample, forward and backward.

Command: python benchmarks/bench_adaln.py [--batches 32] [--widths 1152] [--json out.json]
"""

from __future__ import annotations

import sys

from common import Case, Size, kernel_case, main

from difffit_fast.ops.adaln import adaln_backward, adaln_forward


def forward(size: Size) -> Case:
    return kernel_case("adaln", adaln_forward, size.stream(), *size.vectors(2), 1e-6, size.dtype)


def backward(size: Size) -> Case:
    x, (scale, shift) = size.stream(), size.vectors(2)
    _, mean, rstd = adaln_forward(x, scale, shift, 1e-6, size.dtype)
    return kernel_case("adaln", adaln_backward, size.branch(), x, scale, mean, rstd)


KERNELS = {"adaln_forward": forward, "adaln_backward": backward}

if __name__ == "__main__":
    sys.exit(main("adaln", KERNELS, __doc__))
