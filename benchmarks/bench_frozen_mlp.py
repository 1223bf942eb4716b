"""frozen_mlp: the tanh GELU between fc1 and fc2, over 4·D columns; the backward also sums fc1's bias gradient.

The products around it are in bench_frozen_linear.py, and fused with it in bench_linear_gelu.py.

Command: python benchmarks/bench_frozen_mlp.py [--batches 32] [--widths 1152] [--json out.json]
"""

from __future__ import annotations

import sys

from common import Case, Size, kernel_case, main

from difffit_fast.ops.frozen_mlp import gelu_backward, gelu_forward


def forward(size: Size) -> Case:
    return kernel_case("frozen_mlp", gelu_forward, size.rows(4 * size.D))


def backward(size: Size) -> Case:
    return kernel_case("frozen_mlp", gelu_backward, size.rows(4 * size.D), size.rows(4 * size.D))


KERNELS = {"gelu_forward": forward, "gelu_backward": backward}

if __name__ == "__main__":
    sys.exit(main("frozen_mlp", KERNELS, __doc__))
