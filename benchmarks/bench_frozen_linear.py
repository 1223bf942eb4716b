"""frozen_linear: the products with a frozen weight, D -> 4·D and back: forward with bias, input gradient with bias gradient.

Bound by arithmetic: look at TFLOP/s. ``mm`` is the product alone, the floor.

Command: python benchmarks/bench_frozen_linear.py [--batches 32] [--widths 1152] [--json out.json]
"""

from __future__ import annotations

import sys

import torch
from common import Case, Size, main, nbytes
from torch import Tensor
from torch.nn import functional as F

from difffit_fast.ops.dispatch import room
from difffit_fast.ops.frozen_linear import backward_op, frozen_linear


def _case(size: Size, k: int, n: int) -> Case:
    x, weight, bias = size.rows(k), size.draw(n, k, scale=k**-0.5), size.draw(n)
    return Case(
        frozen_linear, F.linear, (x, weight, bias),
        bytes=nbytes(x, weight, bias) + size.M * n * x.element_size(), flops=2 * size.M * n * k,
        implementation=room(size.device, size.dtype), more={"mm": lambda x, w, b: torch.mm(x, w.t())},
    )  # fmt: skip


def _plain_backward(dy: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.mm(dy, weight), dy.sum(0, dtype=torch.float32)


def _backward_case(size: Size, k: int, n: int) -> Case:
    dy, weight = size.rows(n), size.draw(n, k, scale=k**-0.5)
    return Case(
        lambda dy, weight: backward_op(dy, weight, True, True), _plain_backward, (dy, weight),
        bytes=nbytes(dy, weight) + size.M * k * dy.element_size() + 4 * n, flops=2 * size.M * n * k,
        implementation=room(size.device, size.dtype), more={"mm": torch.mm},
    )  # fmt: skip


KERNELS = {
    "frozen_linear_D_to_4D_forward": lambda size: _case(size, size.D, 4 * size.D),
    "frozen_linear_D_to_4D_backward": lambda size: _backward_case(size, size.D, 4 * size.D),
    "frozen_linear_4D_to_D_forward": lambda size: _case(size, 4 * size.D, size.D),
    "frozen_linear_4D_to_D_backward": lambda size: _backward_case(size, 4 * size.D, size.D),
}

if __name__ == "__main__":
    sys.exit(main("frozen_linear", KERNELS, __doc__))
