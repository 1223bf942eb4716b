"""attention: which cut of our three kernels is fastest on this device, beside that of kernels/config.py, one kernel at a time.

"ours" is the plan in use, ``eager`` plain PyTorch, and the others are called by their plan: rows that a program owns, rows of a
block that it walks over, warps, stages. dkdv and dq are timed as parts of a whole backward pass. What a device refuses, for want
of shared memory or registers, is left out. Nothing is changed: who has read the table writes it into kernels/config.py.

Command: python benchmarks/bench_attention_plans.py [--batches 32] [--widths 1152] [--dtypes bf16] [--json out.json]
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from common import Case, Size, main
from torch import Tensor

from difffit_fast.ops import attention as plain
from difffit_fast.ops.dispatch import triton_kernels

Plan = tuple[int, int, int, int]
PLANS: dict[str, tuple[Plan, ...]] = {
    "attention_forward": (
        (64, 32, 4, 2), (64, 32, 4, 3), (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2), (128, 32, 8, 2), (128, 32, 8, 3),
        (128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (128, 64, 4, 2),
    ),
    "attention_dkdv": (
        (64, 32, 4, 2), (64, 32, 4, 3), (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 8, 2), (128, 32, 8, 2), (128, 64, 8, 2),
        (128, 64, 8, 3),
    ),
    "attention_dq": (
        (64, 32, 4, 3), (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 4, 4), (64, 128, 4, 2), (128, 32, 4, 3), (128, 64, 4, 3),
        (128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2),
    ),
}  # fmt: skip
INTERPRETED: tuple[Plan, ...] = ((16, 16, 4, 1),)  # on a CPU, to try the chain


def cut(kernel: str, plan: Plan, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` of kernels/attention.py, in which ``kernel`` is cut by ``plan``."""
    kernels = triton_kernels("attention")
    before = kernels.attention_plan

    def plans(name: str, *given: Any) -> Any:
        known = before(name, *given)
        return type(known)(*plan) if name == kernel else known

    def run(*args: Any) -> Any:
        with mock.patch.object(kernels, "attention_plan", plans):
            return function(*args)

    return run


def runs(function: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    """Whether the device takes it."""
    try:
        function(*args)
        if args[0].is_cuda:
            torch.cuda.synchronize()
    except Exception as error:
        print(f"left out: {type(error).__name__}: {str(error).partition(chr(10))[0][:120]}", flush=True)
        return False
    return True


def case(kernel: str, size: Size) -> Case | None:
    if size.device.type == "cpu" and size.dtype != torch.float32:
        return None
    kernels = triton_kernels("attention")
    z: Tensor = size.draw(size.B, size.T, 3 * size.D)
    vectors = torch.stack([size.draw(size.D).float(), *(1 + size.draw(size.D, scale=0.1).float() for _ in range(2))])[
        None
    ]
    o, lse = kernels.attention_forward(z, vectors, size.heads)
    way = "attention_forward" if kernel == "attention_forward" else "attention_backward"
    args = (z, vectors, size.heads) if way == kernel else (size.branch(), z, vectors, o, lse, size.heads)
    ours = getattr(kernels, way)
    plans = PLANS[kernel] if size.device.type == "cuda" else INTERPRETED
    named = {"x".join(map(str, plan)): cut(kernel, plan, ours) for plan in plans}
    return Case(
        ours, getattr(plain, way), args, bytes=(4 if way == kernel else 10) * size.M * size.D * z.element_size(),
        flops=(4 if way == kernel else 8) * size.M * size.T * size.D, implementation="triton",
        more={name: function for name, function in named.items() if runs(function, args)},
    )  # fmt: skip


KERNELS = {kernel: functools.partial(case, kernel) for kernel in PLANS}

if __name__ == "__main__":
    sys.exit(main("attention_plans", KERNELS, __doc__))
