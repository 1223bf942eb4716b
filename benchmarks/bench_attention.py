"""attention: every backend that can run here, forward alone and forward with backward; on the CPU also its softmax kernels.

"ours" is the package's own choice; ``eager`` and ``compile`` are softmax(q·kᵀ/√d)·v in plain PyTorch. Heads are those of the
DiT of that width (16 of 72 at D = 1152). TFLOP/s count 4·M·T·D operations forward and twice that backward.

Command: python benchmarks/bench_attention.py [--batches 32] [--widths 1152] [--json out.json]
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable

import torch
from common import Case, Size, kernel_case, main
from torch import Tensor

from difffit_fast.ops.attention import attention, available_backends, softmax_backward, softmax_forward


def plain(qkv: Tensor, heads: int) -> Tensor:
    """The formula."""
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return (torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), -1) @ v).transpose(1, 2).flatten(2)


def both_ways(function: Callable[[Tensor], Tensor], qkv: Tensor, do: Tensor) -> tuple[Tensor, Tensor]:
    """Output and dqkv. Forward and backward together: a graph cannot capture the backward of an earlier forward."""
    with torch.enable_grad():
        x = qkv.detach().requires_grad_()
        o = function(x)
        return o.detach(), torch.autograd.grad(o, x, do)[0]


def _backends(size: Size) -> list[str]:
    return available_backends(size.device, size.dtype, size.D // size.heads)


def forward(size: Size) -> Case:
    qkv = size.draw(size.B, size.T, 3 * size.D)
    by_backend = {b: functools.partial(attention, num_heads=size.heads, backend=b) for b in _backends(size)}
    return Case(
        functools.partial(attention, num_heads=size.heads), functools.partial(plain, heads=size.heads), (qkv,),
        bytes=4 * size.M * size.D * qkv.element_size(), flops=4 * size.M * size.T * size.D,
        implementation=_backends(size)[0], more=by_backend,
    )  # fmt: skip


def forward_backward(size: Size) -> Case:
    case = forward(size)
    wrap = lambda function: functools.partial(both_ways, function)  # noqa: E731
    formula = case.reference
    case.compiled = lambda: wrap(torch.compile(formula, dynamic=False))
    case.ours, case.reference = wrap(case.ours), wrap(case.reference)
    case.more = {name: wrap(function) for name, function in case.more.items()}
    case.args = (*case.args, size.branch())
    case.bytes, case.flops = 3 * case.bytes, 3 * case.flops
    return case


def _scores(size: Size) -> Tensor | None:
    """The scores of one sample, which is how the CPU's batched products go; CUDA has no softmax of ours."""
    return size.draw(size.heads, size.T, size.T) if size.device.type == "cpu" else None


def softmax(size: Size) -> Case | None:
    scores = _scores(size)
    if scores is None:
        return None
    return kernel_case("attention", softmax_forward, scores, 0.125, in_place=0, has_triton=False)


def softmax_gradient(size: Size) -> Case | None:
    scores = _scores(size)
    if scores is None:
        return None
    p = torch.softmax(scores, -1)
    return kernel_case("attention", softmax_backward, size.draw(*p.shape), p, 0.125, in_place=0, has_triton=False)


KERNELS = {
    "attention_forward": forward,
    "attention_forward_backward": forward_backward,
    "softmax_forward": softmax,
    "softmax_backward": softmax_gradient,
}

if __name__ == "__main__":
    sys.exit(main("attention", KERNELS, __doc__))
