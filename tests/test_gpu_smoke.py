"""The first minute on a GPU: every kernel once against float64, and one captured step against an eager one.

The same runs on the CPU in plain PyTorch, without the capture, so that this file is known to work before it is needed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from op_cases import CASES, MATRIX_KERNELS, ROW_KERNELS, Case, kernels
from optest import BF16, F32, ROOMS, TOLERANCE, check_numbers, in_room, on_gpu
from test_fast_dit import SMALL, shake

from difffit_fast import FastDiffFitDiT

EVERYWHERE = pytest.mark.parametrize("room", [pytest.param(r, id=r, marks=ROOMS[r]) for r in ("reference", "gpu")])


@EVERYWHERE
@pytest.mark.parametrize("check", ROW_KERNELS.values(), ids=ROW_KERNELS)
def test_row_kernels(room: str, check: Callable) -> None:
    check(kernels(room), *((2, 256, 1152) if room == "gpu" else (2, 5, 72)), F32, BF16)


@EVERYWHERE
@pytest.mark.parametrize("check", MATRIX_KERNELS.values(), ids=MATRIX_KERNELS)
def test_matrix_kernels(room: str, check: Callable) -> None:
    check(kernels(room), *((512, 1152) if room == "gpu" else (10, 72)), BF16)


@EVERYWHERE
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_operations_and_their_gradients(room: str, case: Case) -> None:
    size = max(case.gpu, key=lambda s: torch.Size(s).numel()) if room == "gpu" else case.small
    op = case.function(BF16)
    with in_room(room):
        tolerance = TOLERANCE[BF16] * case.factor(room, F32, BF16)
        check_numbers(
            on_gpu(op) if room == "gpu" else op, case.truth, case.inputs(size, F32, BF16), case.trainable, tolerance
        )


@EVERYWHERE
def test_a_captured_step(room: str) -> None:
    """Forward, backward and AdamW with gradients that are made anew: replayed from a graph as run eagerly."""
    device = torch.device("cuda" if room == "gpu" else "cpu")
    with in_room(room):
        first = FastDiffFitDiT(**SMALL, compute_dtype=BF16 if room == "gpu" else None, attention="auto")
        first = shake(first).to(device).eval()
        before = copy.deepcopy(first)
        inputs = torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), torch.tensor([0, 2])
        inputs = tuple(x.to(device) for x in inputs)
        target = torch.randn(2, 8, 8, 8, device=device)

        def stepper(model: FastDiffFitDiT) -> Callable[[], None]:
            lr = torch.tensor(1e-2, device=device)
            optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=lr, fused=True, capturable=room == "gpu")

            def step() -> None:
                optimizer.zero_grad(set_to_none=True)
                torch.nn.functional.mse_loss(model(*inputs).float(), target).backward()
                optimizer.step()

            return step

        models = [first, copy.deepcopy(first)]
        steps = [stepper(model) for model in models]
        if room == "gpu":
            from difffit_fast.graph import capture

            steps[0] = capture(steps[0])  # three steps to warm up
            for _ in range(3):
                steps[1]()
        for _ in range(3):
            for step in steps:
                step()
    for a, b, start in zip(*(model.trainable_parameters() for model in (*models, before)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        assert not torch.equal(a, start)
