"""What is kept beside frozen weights: it is used where it fits, and nowhere else."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable

import pytest
import torch
from optest import assert_close, draw
from torch import Tensor, nn

from difffit_fast import DiffFitError
from difffit_fast._devices import cpu_has_fast
from difffit_fast.ops import gemm, weights
from difffit_fast.ops.frozen_linear import frozen_linear
from difffit_fast.ops.pieces import possible, usual
from difffit_fast.ops.weights import has_layout, keep_layout, lay_together, layout_of, layout_wanted, together

F32 = torch.float32


# -- side by side ----------------------------------------------------------------------------------------------------
def some(*rows: int, dtype: torch.dtype = F32) -> list[nn.Parameter]:
    return [nn.Parameter(draw(n, 6, dtype=dtype), requires_grad=False) for n in rows]


@pytest.mark.parametrize("dtype", [torch.float64, F32, torch.bfloat16, torch.float16])
def test_one_tensor_over_all_without_a_copy_and_each_in_a_storage_of_its_own(dtype: torch.dtype) -> None:
    ws = some(3, 1, 5, dtype=dtype)
    before = [w.detach().clone() for w in ws]
    lay_together(ws)
    whole = together(ws)
    assert torch.equal(whole, torch.cat(before)) and all(torch.equal(a, b) for a, b in zip(ws, before, strict=True))
    assert [w.untyped_storage().nbytes() for w in ws] == [w.nbytes for w in ws]
    assert len({w.untyped_storage()._cdata for w in ws}) == 3 and whole.data_ptr() == ws[0].data_ptr()
    ws[1].mul_(2)
    ws[2].data.add_(1)
    assert torch.equal(together(ws), torch.cat([w.detach() for w in ws])), "a write is seen in the whole"
    lay_together(ws)
    assert together(ws).data_ptr() == whole.data_ptr(), "done once"


CHANGES: dict[str, Callable[[list[nn.Parameter]], object]] = {
    "data": lambda ws: setattr(ws[1], "data", torch.zeros(1, 6)),
    "another parameter": lambda ws: ws.__setitem__(1, nn.Parameter(torch.zeros(1, 6))),
    "another order": lambda ws: ws.reverse(),
    "fewer": lambda ws: ws.pop(),
    "more": lambda ws: ws.append(ws[0]),
    "another shape": lambda ws: setattr(ws[0], "data", ws[0].data.view(6, 3)),
    "another layout": lambda ws: setattr(ws[2], "data", ws[2].data.as_strided((5, 6), (1, 5))),
    "another dtype": lambda ws: setattr(ws[2], "data", ws[2].data.view(torch.int32)),
    "shared memory": lambda ws: ws[1].share_memory_(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_whatever_becomes_of_one_is_seen(name: str) -> None:
    ws = some(3, 1, 5)
    lay_together(ws)
    CHANGES[name](ws)
    assert together(ws) is None


def test_the_memory_goes_with_the_last_of_them() -> None:
    ws = some(3, 1, 5)
    lay_together(ws)
    address = ws[0].data_ptr()
    assert address in weights._WHOLE
    last = ws.pop()
    ws.clear()
    gc.collect()
    assert address in weights._WHOLE, "one of them is still there"
    del last
    gc.collect()
    assert address not in weights._WHOLE


@pytest.mark.parametrize("odd", ["dtype", "width", "meta", "subclass", "shared", "empty"])
def test_what_cannot_lie_together_is_left_where_it_is(odd: str) -> None:
    class Other(nn.Parameter):
        pass

    ws = some(3, 5)
    ws[1] = {
        "dtype": lambda: nn.Parameter(torch.zeros(5, 6).bfloat16(), requires_grad=False),
        "width": lambda: nn.Parameter(torch.zeros(5, 7), requires_grad=False),
        "meta": lambda: nn.Parameter(torch.zeros(5, 6, device="meta"), requires_grad=False),
        "subclass": lambda: Other(torch.zeros(5, 6), requires_grad=False),
        "shared": lambda: nn.Parameter(torch.zeros(5, 6).share_memory_(), requires_grad=False),
        "empty": lambda: nn.Parameter(torch.zeros(0, 6), requires_grad=False),
    }[odd]()
    before = [w.data_ptr() for w in ws]
    lay_together(ws)
    assert [w.data_ptr() for w in ws] == before


def test_copies_are_ordinary() -> None:
    ws = some(3, 5)
    lay_together(ws)
    twin = copy.deepcopy(ws)
    assert all(torch.equal(a, b) and a.data_ptr() != b.data_ptr() for a, b in zip(ws, twin, strict=True))


# -- in oneDNN's layout ----------------------------------------------------------------------------------------------
onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")


@pytest.fixture
def asked(monkeypatch) -> None:
    monkeypatch.setenv("DIFFFIT_FAST_PACK", "1")


def product(x: Tensor, w: Tensor) -> Tensor:
    return x.double() @ w.double().t()


@onednn
@pytest.mark.parametrize("rows", [1, 37, 256])
def test_the_same_products(asked, rows: int) -> None:
    x, w, b = draw(rows, 72, dtype=F32), draw(100, 72, dtype=F32), draw(100, dtype=F32)
    keep_layout([w])
    assert has_layout(w) and layout_of(w, rows) is not None
    assert_close(frozen_linear(x, w, b), product(x, w) + b.double(), 1e-6, "with a bias")
    assert_close(frozen_linear(x, w), product(x, w), 1e-6, "without")
    assert frozen_linear(x[:0], w, b).shape == (0, 100)


WRITES: dict[str, Callable[[Tensor], object]] = {
    "in place": lambda w: w.mul_(2),
    "through data": lambda w: w.data.mul_(2),
    "one value through data": lambda w: w.data[3, 7].add_(1e-3),
    "two rows changed": lambda w: w.data.__setitem__([0, 1], w.data[[1, 0]]),
    "copied over": lambda w: w.data.copy_(draw(100, 72, dtype=F32)),
    "through numpy": lambda w: w.numpy().__imul__(2),
    "other data": lambda w: setattr(w, "data", draw(100, 72, dtype=F32)),
}


@onednn
@pytest.mark.parametrize("name", WRITES)
def test_a_write_to_the_weight_is_seen(asked, name: str) -> None:
    x, w = draw(5, 72, dtype=F32), draw(100, 72, dtype=F32)
    keep_layout([w])
    frozen_linear(x, w)
    WRITES[name](w)
    assert_close(frozen_linear(x, w), product(x, w), 1e-6, name)


@onednn
def test_a_layout_goes_with_its_weight(asked) -> None:
    before = len(weights._LAYOUTS)
    w = nn.Parameter(draw(100, 72, dtype=F32), requires_grad=False)
    keep_layout([w])
    assert len(weights._LAYOUTS) == before + 1
    w.data = draw(100, 72, dtype=F32)
    gc.collect()
    assert len(weights._LAYOUTS) == before and not has_layout(w)


def test_which_layouts_are_kept(monkeypatch) -> None:
    tall, wide = torch.zeros(8, 4), torch.zeros(4, 8)
    monkeypatch.setenv("DIFFFIT_FAST_PACK", "1")
    wanted = torch.backends.mkldnn.is_available()
    assert layout_wanted(tall) == wanted and not layout_wanted(wide) and not layout_wanted(tall.double())
    monkeypatch.setenv("DIFFFIT_FAST_PACK", "0")
    assert not layout_wanted(tall)
    monkeypatch.setenv("DIFFFIT_FAST_PACK", "auto")
    assert not layout_wanted(tall)
    assert layout_wanted(tall.bfloat16()) == (wanted and cpu_has_fast(torch.bfloat16))
    for products in ("pieces", "library"):
        monkeypatch.setenv("DIFFFIT_FAST_PRODUCTS", products)
        assert usual(tall) == (products == "pieces" and possible(tall))
    monkeypatch.setenv("DIFFFIT_FAST_PRODUCTS", "pieces")
    monkeypatch.setenv("DIFFFIT_FAST_PACK", "1")
    assert not usual(tall) and not usual(tall.bfloat16())
    monkeypatch.setenv("DIFFFIT_FAST_PACK", "yes")
    with pytest.raises(DiffFitError, match="DIFFFIT_FAST_PACK must be auto, 0 or 1"):
        layout_wanted(tall)


@pytest.mark.parametrize("dtype", [torch.float64, F32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 4), (3, 5), (3,), (2, 3, 1), (0, 4), (3, 0)])
def test_checksums(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    w = draw(*shape, dtype=dtype)
    assert torch.equal(weights.checksum(w), weights.checksum(w.clone())) and weights.checksum(w).shape == shape[:1]
    assert torch.equal(weights.checksum(w), weights.checksum(w.clone(memory_format=torch.preserve_format)))
    if w.numel():
        other = w.clone()
        other.view(-1)[-1].add_(1)
        assert not torch.equal(weights.checksum(w), weights.checksum(other))


def test_products_of_a_weight_of_no_kept_layout_are_plain() -> None:
    w = draw(100, 72, dtype=F32)
    assert layout_of(w, 5) is None and not has_layout(w)
    assert_close(gemm.linear(draw(5, 72, dtype=F32) * 0 + 1, w), w.double().sum(1).expand(5, 100), 1e-6, "plain")
