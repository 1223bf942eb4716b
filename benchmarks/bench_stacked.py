"""stacked: the modulation product of the 28 blocks and the final layer of DiT-XL, weights side by side, and its way back.

Bound by the bytes of the weights. ``mm`` is one product with one weight of that size, the floor; the reference takes each
weight by itself, as ours does where they do not lie side by side.

Command: python benchmarks/bench_stacked.py [--batches 32] [--widths 1152] [--json out.json]
"""

from __future__ import annotations

import sys

import torch
from common import Case, Size, main, nbytes
from torch import Tensor, nn

from difffit_fast.ops.dispatch import room
from difffit_fast.ops.stacked import linear_backward_op, stacked_linear
from difffit_fast.ops.weights import lay_together, together

BLOCKS = 28


def _weights(size: Size) -> list[nn.Parameter]:
    heights = [6 * size.D] * BLOCKS + [2 * size.D]
    weights = [nn.Parameter(size.draw(n, size.D, scale=size.D**-0.5), requires_grad=False) for n in heights]
    lay_together(weights)
    return weights


def _apart(x: Tensor, weights: list[Tensor]) -> Tensor:
    return torch.cat([x @ w.t() for w in weights], 1)


def _apart_backward(dy: Tensor, weights: list[Tensor]) -> Tensor:
    parts = dy.split([w.shape[0] for w in weights], 1)
    return sum(torch.mm(d, w).float() for d, w in zip(parts, weights, strict=True)).to(dy.dtype)


def forward(size: Size) -> Case:
    x, weights = size.draw(size.B, size.D), _weights(size)
    rows = sum(w.shape[0] for w in weights)
    return Case(
        stacked_linear, _apart, (x, weights), bytes=nbytes(x, weights) + size.B * rows * x.element_size(),
        flops=2 * size.B * rows * size.D, implementation=room(size.device, size.dtype),
        more={"mm": lambda x, weights: torch.mm(x, together(weights).t())},
    )  # fmt: skip


def backward(size: Size) -> Case:
    weights = _weights(size)
    rows = sum(w.shape[0] for w in weights)
    dy = size.draw(size.B, rows)
    return Case(
        linear_backward_op, _apart_backward, (dy, weights), bytes=nbytes(dy, weights) + size.B * size.D * dy.element_size(),
        flops=2 * size.B * rows * size.D, implementation=room(size.device, size.dtype),
        more={"mm": lambda dy, weights: torch.mm(dy, together(weights))},
    )  # fmt: skip


KERNELS = {"stacked_linear_forward": forward, "stacked_linear_backward": backward}

if __name__ == "__main__":
    sys.exit(main("stacked", KERNELS, __doc__))
