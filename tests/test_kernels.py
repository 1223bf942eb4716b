"""The functions under the operations, alone, in every room: each output against float64, to the last rounding.

Triton's are cut in several ways: as the device (or interpreter) at hand is, as Hopper is with a program for every row,
and with chunks of several rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from op_cases import MATRIX_KERNELS, ROW_KERNELS, check_modulation, everything, kernels
from optest import BF16, F16, F32, ROOMS

PAIRS = [(F32, F32), (F32, BF16), (BF16, BF16)]  # dtype of the residual stream, dtype of the branch
WIDTHS = [37, 72, 384, 1152]
CPU = [pytest.param(room, id=room, marks=ROOMS[room]) for room in ("reference", "cpp")]
TRITON = [pytest.param(room, id=room, marks=ROOMS[room]) for room in ("triton", "gpu")]


# -- plain PyTorch and C++ -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("room", CPU)
@pytest.mark.parametrize("D", WIDTHS)
@pytest.mark.parametrize(("X", "H"), PAIRS)
@pytest.mark.parametrize("check", ROW_KERNELS.values(), ids=ROW_KERNELS)
def test_rows(room: str, check: Callable, D: int, X: torch.dtype, H: torch.dtype) -> None:
    for B, T in [(3, 37), (1, 1), (1, 77), (3, 1)][: 4 if D < 1000 else 2]:
        check(kernels(room), B, T, D, X, H)


@pytest.mark.parametrize("room", CPU)
@pytest.mark.parametrize("D", WIDTHS)
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("check", MATRIX_KERNELS.values(), ids=MATRIX_KERNELS)
def test_matrices(room: str, check: Callable, D: int, dtype: torch.dtype) -> None:
    for M in (1, 37, 77):
        check(kernels(room), M, D, dtype)


@pytest.mark.parametrize("room", CPU + TRITON)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_modulation(room: str, dtype: torch.dtype) -> None:
    for B, J, D in ((1, 1, 37), (3, 4, 72), (9, 1, 600), (2, 0, 72))[2 if room == "triton" else 0 :]:
        check_modulation(kernels(room), B, J, D, dtype)


# -- Triton, by the ways to cut --------------------------------------------------------------------------------------
# Every T of 1, 37, 77, every D of 72, 384, 1152, one width that no access divides, every pair of types that is used.
ROW_PLANS = [
    (2, 37, 72, F32, BF16, "own"),
    (1, 77, 384, F32, F32, "own"),
    (2, 1, 1152, F32, BF16, "own"),
    (1, 37, 1152, BF16, BF16, "own"),
    (2, 3, 37, F32, F16, "own"),
    (2, 1, 384, F32, BF16, "hopper"),
    (1, 5, 1152, F32, BF16, "hopper, long chunks"),
    (1, 5, 384, BF16, BF16, "hopper, long chunks"),
]
MATRIX_PLANS = [
    (77, 72, BF16, "own"),
    (37, 384, F32, "own"),
    (1, 1152, BF16, "own"),
    (37, 37, F16, "own"),
    (40, 72, BF16, "hopper, long chunks"),
]


@pytest.fixture
def plan(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """How the kernels are cut; see above."""
    config = pytest.importorskip("difffit_fast.kernels.config")
    if request.param != "own":
        monkeypatch.setattr(config, "INTERPRETER", 90)
        monkeypatch.setattr(config, "_device_architecture", lambda index: 90)
    if request.param == "hopper, long chunks":
        monkeypatch.setitem(config._MULTIPROCESSORS, 90, 1)
    for cached in (config.row_plan, config.tile_plan):
        cached.cache_clear()
    yield
    for cached in (config.row_plan, config.tile_plan):
        cached.cache_clear()


@pytest.mark.parametrize("room", TRITON)
@pytest.mark.parametrize(("B", "T", "D", "X", "H", "plan"), ROW_PLANS, indirect=["plan"])
@pytest.mark.parametrize("check", ROW_KERNELS.values(), ids=ROW_KERNELS)
def test_rows_by_plan(
    plan: None, room: str, check: Callable, B: int, T: int, D: int, X: torch.dtype, H: torch.dtype
) -> None:
    check(kernels(room), B, T, D, X, H)


@pytest.mark.parametrize("room", TRITON)
@pytest.mark.parametrize(("M", "D", "dtype", "plan"), MATRIX_PLANS, indirect=["plan"])
@pytest.mark.parametrize("check", MATRIX_KERNELS.values(), ids=MATRIX_KERNELS)
def test_matrices_by_plan(plan: None, room: str, check: Callable, M: int, D: int, dtype: torch.dtype) -> None:
    check(kernels(room), M, D, dtype)


# -- all rooms -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("room", CPU + TRITON)
def test_the_same_bits_twice(room: str) -> None:
    size = (1, 9, 40) if room == "triton" else (2, 150, 200)
    first, second = (everything(kernels(room), *size, F32, BF16) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("room", CPU + TRITON)
@pytest.mark.parametrize("size", [(0, 5, 8), (2, 0, 8), (0, 0, 0)], ids=str)
def test_empty(room: str, size: tuple[int, int, int]) -> None:
    """Outputs are empty and sums are zero: nothing is read and nothing stays unwritten."""
    for X, H in PAIRS:
        for out in everything(kernels(room), *size, X, H):
            assert not out.numel() or not out.any()
