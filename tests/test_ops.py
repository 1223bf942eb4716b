"""Every operation in every room: numbers, gradients, layouts, empty and odd sizes, the same bits twice, compilation.

The rooms are plain PyTorch, C++, Triton's interpreter and, where there is one, Triton on a GPU. The table is in
op_cases.py, the checks are in optest.py; what is special to one operation is in the file of its name.
"""

from __future__ import annotations

import pytest
import torch
from op_cases import CASES, Case, Size
from optest import (
    BF16,
    F16,
    F32,
    ROOMS,
    TOLERANCE,
    check_compiled,
    check_layouts,
    check_needs_input_grad,
    check_numbers,
    in_room,
    on_gpu,
)
from torch import Tensor


def sizes(case: Case, room: str) -> list[tuple[Size, torch.dtype, torch.dtype]]:
    if room in ("reference", "cpp"):
        return [(size, *pair) for size in case.sizes for pair in case.dtypes]
    half = [(stream if stream == F32 else F16, F16) for stream, branch in case.dtypes if branch == BF16][:1]
    if room == "gpu":
        return [
            *((size, *pair) for size in case.gpu for pair in case.dtypes),
            *((case.gpu[min(1, len(case.gpu) - 1)], *pair) for pair in half),
        ]
    # The interpreter takes its time: every size and every pair of types once; all pairs and plans are in test_kernels.py.
    pairs = [*case.dtypes, *half]
    return [(case.triton[i % len(case.triton)], *pair) for i, pair in enumerate(pairs) if case.triton]


def small(case: Case, room: str) -> list[Tensor]:
    """Inputs for what is not about numbers; in the interpreter of one sample."""
    return case.inputs((1, *case.small[1:]) if room == "triton" else case.small, F32, F32)


def short(dtype: torch.dtype) -> str:
    return {F32: "fp32", BF16: "bf16", F16: "fp16"}[dtype]


EVERY = pytest.mark.parametrize(
    ("room", "case"),
    [
        pytest.param(room, c, id=f"{room}-{c.name}", marks=marks)
        for room, marks in ROOMS.items() for c in CASES if room != "triton" or c.triton
    ],
)  # fmt: skip


@pytest.mark.parametrize(
    ("room", "case", "size", "stream", "branch"),
    [
        pytest.param(
            room, case, size, stream, branch, marks=marks,
            id=f"{room}-{case.name}-{'x'.join(map(str, size))}-{short(stream)}-{short(branch)}",
        )
        for room, marks in ROOMS.items() for case in CASES for size, stream, branch in sizes(case, room)
    ],
)  # fmt: skip
def test_numbers(room: str, case: Case, size: Size, stream: torch.dtype, branch: torch.dtype) -> None:
    """Outputs and gradients against float64, and the same bits twice."""
    op = case.function(branch)
    with in_room(room):
        tolerance = TOLERANCE[branch] * case.factor(room, stream, branch)
        inputs = case.inputs(size, stream, branch)
        check_numbers(on_gpu(op) if room == "gpu" else op, case.truth, inputs, case.trainable, tolerance)


@EVERY
def test_every_combination_of_gradients(room: str, case: Case) -> None:
    with in_room(room):
        inputs = small(case, room)
        op = on_gpu(case.op) if room == "gpu" else case.op
        check_needs_input_grad(op, inputs, case.trainable, few=room == "triton")


@EVERY
def test_layouts(room: str, case: Case) -> None:
    with in_room(room):
        inputs = small(case, room)
        check_layouts(on_gpu(case.op) if room == "gpu" else case.op, inputs, case.trainable)


@EVERY
def test_compiled(room: str, case: Case) -> None:
    with in_room(room):
        inputs = small(case, room)
        check_compiled(on_gpu(case.op) if room == "gpu" else case.op, inputs, case.trainable)


@EVERY
def test_opcheck(room: str, case: Case) -> None:
    """Schema, fake and autograd of each registered operation under it."""
    with in_room(room):
        inputs = [x.requires_grad_(need) for x, need in zip(small(case, room), case.trainable, strict=True)]
        if room == "gpu":
            inputs = [x.detach().cuda().requires_grad_(x.requires_grad) for x in inputs]
        # Registration and autograd are the same whichever room computes; the others are only asked for the rest.
        checks = {} if room == "reference" else {"test_utils": ("test_schema", "test_faketensor")}
        for name, args in case.calls(inputs):
            torch.library.opcheck(getattr(torch.ops.difffit_fast, name).default, args, **checks)


def test_every_registered_operation_has_a_case() -> None:
    registered = {
        name.removeprefix("difffit_fast::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("difffit_fast::")
    }
    tested = {name for case in CASES for name, _ in case.calls(case.inputs(case.small, F32, F32))}
    assert tested == registered
