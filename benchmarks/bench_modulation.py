"""modulation: the vectors of all joints from the one modulation product, for the 56 branches of DiT-XL.

Command: python benchmarks/bench_modulation.py [--batches 32] [--widths 1152] [--json out.json]
"""

from __future__ import annotations

import sys

from common import Case, Size, kernel_case, main
from torch import Tensor

from difffit_fast.ops.modulation import modulation_backward, modulation_forward

BRANCHES = 56


def _inputs(size: Size) -> tuple[Tensor, ...]:
    shapes = (3 * BRANCHES + 2, size.D), (BRANCHES + 1, 2, size.D), (BRANCHES, size.D), (BRANCHES, size.D)
    return size.draw(size.B, 3 * BRANCHES + 2, size.D), *(size.draw(*shape).float() for shape in shapes)


def forward(size: Size) -> Case:
    return kernel_case("modulation", modulation_forward, *_inputs(size))


def backward(size: Size) -> Case:
    return kernel_case(
        "modulation", modulation_backward, size.draw(4 * BRANCHES + 2, size.B, size.D).float(), *_inputs(size)
    )


KERNELS = {"modulation_forward": forward, "modulation_backward": backward}

if __name__ == "__main__":
    sys.exit(main("modulation", KERNELS, __doc__))
