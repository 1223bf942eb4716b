"""A whole model on the Triton kernels, in Triton's interpreter, against float64."""

from __future__ import annotations

import pytest
import torch
from optest import ROOMS, in_room
from test_fast_dit import batch, loss_and_grads, shake, worst

from difffit_fast import FastDiffFitDiT
from difffit_fast.baselines.plain_difffit import PlainDiffFitDiT
from difffit_fast.ops.dispatch import room

pytestmark = list(ROOMS["triton"])
CONFIG = dict(input_size=8, patch_size=2, hidden_size=72, depth=2, num_heads=3, num_classes=5)


@pytest.mark.parametrize("preset", ["paper", "bitfit"])
def test_gradients_of_a_whole_model_equal_float64(preset: str) -> None:
    with in_room("triton"):
        assert room(torch.device("cpu"), torch.float32) == "triton"
        plain = shake(PlainDiffFitDiT(**CONFIG, difffit=preset))
        fast = FastDiffFitDiT(**CONFIG, difffit=preset)
        fast.load_state_dict(plain.state_dict())
        x, t, y = batch(2)
        want_loss, want = loss_and_grads(plain.double(), x.double(), t, y)
        loss, grads = loss_and_grads(fast, x, t, y)
        _, again = loss_and_grads(fast, x, t, y)
    assert set(grads) == set(want)
    assert all(torch.equal(grads[n], again[n]) for n in grads)
    assert loss.item() == pytest.approx(want_loss.item(), rel=1e-5)
    errors = worst(grads, want)
    assert max(errors.values()) < 1e-4, max(errors.items(), key=lambda e: e[1])
