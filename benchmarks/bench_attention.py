"""attention: every backend that can run here, forward alone and forward with backward, with the query bias and γ.

"ours" is the package's own choice; ``eager`` and ``compile`` are the formula in plain PyTorch. Heads are those of the
DiT of that width (16 of 72 at D = 1152). TFLOP/s count 4·M·T·D operations forward and twice that backward.

Command: python benchmarks/bench_attention.py [--batches 32] [--widths 1152] [--json out.json]
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable

import torch
from common import Case, Size, main
from torch import Tensor

from difffit_fast.ops.attention import attention, available_backends


def ours(qkv: Tensor, bias_q: Tensor, gamma: Tensor, heads: int, backend: str = "auto") -> Tensor:
    return attention(qkv, heads, bias_q, gamma, backend)


def plain(qkv: Tensor, bias_q: Tensor, gamma: Tensor, heads: int) -> Tensor:
    """The formula."""
    qkv = ((qkv + torch.cat([bias_q, bias_q.new_zeros(2 * bias_q.shape[0])])) * gamma).to(qkv.dtype)
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return (torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), -1) @ v).transpose(1, 2).flatten(2)


def both_ways(function: Callable[..., Tensor], *args: Tensor) -> tuple[Tensor, ...]:
    """Output and gradients. Forward and backward together: a graph cannot capture the backward of an earlier forward."""
    *inputs, do = args
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in inputs]
        o = function(*leaves)
        return o.detach(), *torch.autograd.grad(o, leaves, do)


def _backends(size: Size) -> list[str]:
    return available_backends(size.device, size.dtype, size.D // size.heads)


def forward(size: Size) -> Case:
    args = (
        size.draw(size.B, size.T, 3 * size.D),
        size.draw(size.D).float(),
        1 + size.draw(3 * size.D, scale=0.1).float(),
    )
    by_backend = {b: functools.partial(ours, heads=size.heads, backend=b) for b in _backends(size)}
    return Case(
        functools.partial(ours, heads=size.heads), functools.partial(plain, heads=size.heads), args,
        bytes=4 * size.M * size.D * args[0].element_size(), flops=4 * size.M * size.T * size.D,
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


KERNELS = {
    "attention_forward": forward,
    "attention_forward_backward": forward_backward,
}

if __name__ == "__main__":
    sys.exit(main("attention", KERNELS, __doc__))
