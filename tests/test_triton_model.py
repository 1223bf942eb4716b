"""A whole model on the Triton kernels, in Triton's interpreter, against float64."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")

SCRIPT = """
import json, sys, torch
sys.path.insert(0, {tests!r})
from test_fast_dit import batch, loss_and_grads, shake, worst
from difffit_fast import FastDiffFitDiT
from difffit_fast.baselines.plain_difffit import PlainDiffFitDiT
from difffit_fast.ops.dispatch import room

torch.manual_seed(0)
assert room(torch.device("cpu"), torch.float32) == "triton"
config = dict(input_size=8, patch_size=2, hidden_size=72, depth=2, num_heads=3, num_classes=5)
result = {{}}
for preset in ("paper", "bitfit"):
    plain = shake(PlainDiffFitDiT(**config, difffit=preset))
    fast = FastDiffFitDiT(**config, difffit=preset)
    fast.load_state_dict(plain.state_dict())
    x, t, y = batch(2)
    want_loss, want = loss_and_grads(plain.double(), x.double(), t, y)
    loss, grads = loss_and_grads(fast, x, t, y)
    _, again = loss_and_grads(fast, x, t, y)
    result[preset] = dict(
        loss=abs(loss - want_loss).item() / abs(want_loss.item()),
        worst=max(worst(grads, want).items(), key=lambda e: e[1]),
        names=set(grads) == set(want),
        repeats=all(torch.equal(grads[n], again[n]) for n in grads),
    )
print(json.dumps(result))
"""


def test_gradients_of_a_whole_model_equal_float64() -> None:
    env = {**os.environ, "TRITON_INTERPRET": "1", "DIFFFIT_FAST_KERNELS": "triton"}
    script = SCRIPT.format(tests=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    for preset, r in json.loads(done.stdout.splitlines()[-1]).items():
        assert r["names"] and r["repeats"], preset
        assert r["loss"] < 1e-5 and r["worst"][1] < 1e-4, (preset, r)
