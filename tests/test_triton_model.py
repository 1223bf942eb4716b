"""A whole model on the Triton kernels, in Triton's interpreter, against float64."""

from __future__ import annotations

import copy

import pytest
import torch
from optest import ROOMS, in_room
from test_fast_dit import batch, loss_and_grads, shake, worst

from difffit_fast import FastDiffFitDiT
from difffit_fast.baselines.plain_difffit import PlainDiffFitDiT
from difffit_fast.models.difffit import is_extra, neutral
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


def test_a_delta_for_each_sample_equals_each_alone_in_float64() -> None:
    model = shake(FastDiffFitDiT(**CONFIG)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():  # the base has no γ and LayerNorm of its own
            if is_extra(name):
                p.fill_(neutral(name))
    for name in ("a", "b"):
        shake(model.add_delta(name))
    worn = ["a", None, "b"]
    x, t, y = batch(3)
    with in_room("triton"):
        out = model(x, t, y, delta=worn)
        out.square().sum().backward()
    found = {n: p.grad.double() for n, p in model.deltas.named_parameters()}
    exact = copy.deepcopy(model).double()
    exact.zero_grad()
    true = torch.cat(
        [exact(x[i : i + 1].double(), t[i : i + 1], y[i : i + 1], delta=name) for i, name in enumerate(worn)]
    )
    true.square().sum().backward()
    assert (out.double() - true).abs().max() < 1e-5 * true.abs().max()
    for name, p in exact.deltas.named_parameters():
        assert (found[name] - p.grad).norm() < 1e-4 * p.grad.norm(), name
