"""colsum: the sum over the rows of a matrix, which is the gradient of a bias.

On CUDA "ours" is the Triton kernel; bench_linear_gelu.py compares it with the one in CUDA C++.

Command: python benchmarks/bench_colsum.py [--batches 32] [--widths 1152] [--json out.json]
"""

from __future__ import annotations

import sys

from common import Case, Size, kernel_case, main

from difffit_fast.ops.colsum import colsum_reference


def colsum(size: Size) -> Case:
    return kernel_case("colsum", colsum_reference, size.rows(size.D))


KERNELS = {"colsum": colsum}

if __name__ == "__main__":
    sys.exit(main("colsum", KERNELS, __doc__))
