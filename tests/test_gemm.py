from __future__ import annotations

import gc

import pytest
import torch
from optest import assert_close, draw

from difffit_fast import DiffFitError
from difffit_fast._devices import cpu_has_fast
from difffit_fast.ops import gemm
from difffit_fast.ops.frozen_linear import frozen_linear

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")


@pytest.fixture
def packing(monkeypatch):
    monkeypatch.setenv("DIFFFIT_FAST_PACK", "1")


@pytest.mark.parametrize("rows", [1, 37, 256])
def test_packed_products_are_the_same_products(packing, rows: int) -> None:
    x, w, b = draw(rows, 72, dtype=torch.float32), draw(100, 72, dtype=torch.float32), draw(100, dtype=torch.float32)
    kept = gemm.keep_packed([w])
    assert len(kept) == 1 and gemm._packed(w, rows) is not None
    assert_close(frozen_linear(x, w, b), x.double() @ w.double().t() + b.double(), 1e-6, "packed")
    assert_close(frozen_linear(x, w), x.double() @ w.double().t(), 1e-6, "packed without bias")
    assert frozen_linear(x[:0], w, b).shape == (0, 100)


def test_a_write_to_the_weight_is_seen(packing) -> None:
    x, w = draw(5, 72, dtype=torch.float32), draw(100, 72, dtype=torch.float32)
    kept = gemm.keep_packed([w])
    frozen_linear(x, w)
    w.mul_(2)
    assert_close(frozen_linear(x, w), x.double() @ w.double().t(), 1e-6, "after a write")
    assert kept


def test_packing_ends_with_its_owner(packing) -> None:
    w = draw(100, 72, dtype=torch.float32)
    kept = gemm.keep_packed([w])
    del kept
    gc.collect()
    assert gemm._packed(w, 5) is None


def test_what_is_packed(monkeypatch) -> None:
    tall, wide = torch.zeros(8, 4), torch.zeros(4, 8)
    monkeypatch.setenv("DIFFFIT_FAST_PACK", "1")
    assert gemm.pack_wanted(tall) and not gemm.pack_wanted(wide) and not gemm.pack_wanted(tall.double())
    monkeypatch.setenv("DIFFFIT_FAST_PACK", "0")
    assert not gemm.pack_wanted(tall)
    monkeypatch.setenv("DIFFFIT_FAST_PACK", "auto")
    assert not gemm.pack_wanted(tall)
    assert gemm.pack_wanted(tall.bfloat16()) == cpu_has_fast(torch.bfloat16)
    monkeypatch.setenv("DIFFFIT_FAST_PACK", "yes")
    with pytest.raises(DiffFitError, match="DIFFFIT_FAST_PACK must be auto, 0 or 1"):
        gemm.pack_wanted(tall)


def test_half_precision_products_are_rounded_once() -> None:
    """On any CPU: as accurate as float32 products rounded at the end."""
    x, w = draw(37, 300, dtype=torch.bfloat16), draw(50, 300, dtype=torch.bfloat16)
    exact = x.double() @ w.double().t()
    assert (gemm.linear(x, w).double() - exact).abs().max() <= 2**-8 * exact.abs().max()
