"""What the other tests rely on: a result that nobody wrote is seen (conftest.poison)."""

from __future__ import annotations

import pytest
import torch

from difffit_fast.ops.dispatch import cpp_ops


def test_memory_that_python_allocates_holds_nan() -> None:
    like = torch.ones(3, 5)
    made = [torch.empty(3, 5), torch.empty_like(like), like.new_empty(7), torch.empty(4, dtype=torch.bfloat16)]
    assert all(t.isnan().all() for t in [*made, torch.empty_strided((2, 3), (1, 2))])
    assert (torch.empty(4, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()


@pytest.mark.skipif(cpp_ops() is None, reason="the C++ extension is not built")
def test_memory_that_an_operation_allocates_in_cpp_is_no_result() -> None:
    for _ in range(3):  # freed and handed out again
        output, total = torch.ops.difffit_fast_cpp.unwritten(torch.zeros(150, 72))
        assert output.isnan().all()
        assert not total.isfinite().any() or total.abs().max() > 1e37
