"""What is special to the stacked products; the rest is in test_ops.py."""

from __future__ import annotations

import pytest
import torch
from op_cases import draw, many_matvec_inputs, matvec_inputs, stacked_inputs, true_stacked_linear, true_stacked_matvec
from optest import BF16, F32, TOLERANCE, check_numbers
from torch import Tensor, nn

from difffit_fast.ops.stacked import stacked_linear, stacked_matvec
from difffit_fast.ops.weights import lay_together

SIZE = (5, 72, 40)
OPS = {
    "linear": (stacked_linear, true_stacked_linear, stacked_inputs),
    "matvec": (stacked_matvec, true_stacked_matvec, matvec_inputs),
    "several vectors each": (stacked_matvec, true_stacked_matvec, many_matvec_inputs),
}


@pytest.mark.parametrize("laid", [False, True])
@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, F32), (F32, BF16)])
@pytest.mark.parametrize("name", OPS)
def test_weights_of_another_dtype_and_weights_side_by_side(name: str, dtypes: tuple, laid: bool) -> None:
    op, truth, make = OPS[name]
    x, *weights = make(SIZE, F32, F32)
    ws = [nn.Parameter(w.to(dtypes[1]), requires_grad=False) for w in weights]
    if laid:
        lay_together(ws)
    exact = [w.detach().to(dtypes[0]).double() for w in ws]
    tolerance = TOLERANCE[dtypes[0]]
    check_numbers(lambda x: op(x, ws), lambda x: truth(x, *exact), [x.to(dtypes[0])], (True,), tolerance)


@pytest.mark.parametrize("name", OPS)
def test_nothing_but_the_weights_is_kept_or_their_one_copy(name: str) -> None:
    op, _, make = OPS[name]
    x, *weights = make(SIZE, F32, F32)
    saved: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        op(x.requires_grad_(), weights)
        assert [t.data_ptr() for t in saved] == [w.data_ptr() for w in weights]
        saved.clear()
        op(x.detach().to(BF16).requires_grad_(), weights)
    assert [t.dtype for t in saved] == [BF16]


@pytest.mark.parametrize("name", OPS)
def test_a_weight_that_wants_a_gradient_is_an_error(name: str) -> None:
    op, _, make = OPS[name]
    x, *weights = make(SIZE, F32, F32)
    weights[1].requires_grad_()
    with pytest.raises(RuntimeError, match="frozen in DiffFit and gets no gradient"):
        op(x.requires_grad_(), weights)


def test_errors_name_both_sides() -> None:
    x, *weights = stacked_inputs(SIZE, F32, F32)
    with pytest.raises(ValueError, match=r"in = 72, the last size of the input \(5, 72\); got \(40, 71\)"):
        stacked_linear(x, [w[:, 1:] for w in weights])
    with pytest.raises(ValueError, match="got none"):
        stacked_linear(x, [])
    v, *weights = matvec_inputs(SIZE, F32, F32)
    with pytest.raises(ValueError, match="one weight of one size for each of 3 vectors is needed"):
        stacked_matvec(v, weights[:2])
    with pytest.raises(ValueError, match=r"in = 71, the last size of the input \(3, 2, 71\)"):
        stacked_matvec(draw(3, 2, 71, dtype=F32), weights)


def test_one_of_several_vectors_is_that_vector_alone() -> None:
    v, *weights = many_matvec_inputs(SIZE, F32, F32)
    together = stacked_matvec(v, weights)
    for i in range(v.shape[1]):
        torch.testing.assert_close(together[:, i], stacked_matvec(v[:, i], weights), rtol=1e-5, atol=1e-5)


def test_compiled_and_checked_with_several_vectors() -> None:
    v, *weights = many_matvec_inputs(SIZE, F32, F32)
    op = torch.ops.difffit_fast.stacked_matvec.default
    torch.library.opcheck(op, (v.requires_grad_(), weights))
    torch.library.opcheck(op, (v.to(BF16), weights))
    torch.library.opcheck(torch.ops.difffit_fast.stacked_matvec_backward.default, (torch.randn(3, 5, 40), weights))
