"""eight_bit: rows quantized to int8 (rotated) and e4m3 (not), the int8 product rescaled, and products whole, D -> 4·D and back.

The products are those with a frozen weight whose copies are there: forward with fc1's bias, and the input gradient. "eager" is
the plain reference, of a product the one in its own dtype, and "mm" that without bias: what eight bits must beat.

Command: python benchmarks/bench_eight_bit.py [--batches 32] [--widths 1152] [--json out.json]
"""

from __future__ import annotations

import functools
import sys

import torch
from common import Case, Size, main, nbytes
from torch import Tensor

from difffit_fast.ops import eight_bit
from difffit_fast.ops.dispatch import pick, room
from difffit_fast.ops.gemm import dgrad, linear

# ‖ours − eager‖ / ‖eager‖ that is allowed. Of products what two roundings to eight bits of normal values leave, and a half more;
# of quantized rows what values leave that fall on the other side of a tie.
PRODUCT_ERROR = {"int8": 0.02, "fp8": 0.06}
TIES = 0.02


def _quantize(kind: str, widths: int, size: Size) -> Case:
    """Rows of as many times D."""
    x, turn = size.rows(widths * size.D), kind == "int8"
    reference = getattr(eight_bit, f"quantize_{kind}")
    return Case(
        lambda x: eight_bit.quantize(x, kind, turn), lambda x: reference(x, turn), (x,),
        bytes=nbytes(x) + x.numel() + 4 * size.M, implementation=_room(size, kind), tolerance=TIES,
    )  # fmt: skip


def _rescale(size: Size) -> Case:
    n = 4 * size.D
    product = torch.randint(-1000, 1000, (size.M, n), dtype=torch.int32, device=size.device)
    row, column = (size.draw(length, dtype=torch.float32) for length in (size.M, n))
    bias = size.draw(n)
    return Case(
        pick("eight_bit", eight_bit.rescale, bias), eight_bit.rescale, (product, row, column, bias, size.dtype),
        bytes=nbytes(product, row, column, bias) + product.numel() * bias.element_size(), implementation=_room(size, "int8"),
    )  # fmt: skip


def _product_int8(size: Size) -> Case | None:
    """The product alone, rows and weight in int8 already; "library" is PyTorch's and the pass that rescales. None on a CPU."""
    if room(size.device, size.dtype) != "triton" or eight_bit.refusal("int8", size.device) is not None:
        return None
    n, k = 4 * size.D, size.D
    q, values = (torch.randint(-127, 128, (rows, k), dtype=torch.int8, device=size.device) for rows in (size.M, n))
    row, column = (size.draw(length, dtype=torch.float32) for length in (size.M, n))
    bias = size.draw(n)
    rescale = pick("eight_bit", eight_bit.rescale, bias)
    args = (q, row, values, column, bias, size.dtype)
    return Case(
        pick("eight_bit", eight_bit.product_int8, bias), eight_bit.product_int8, args,
        bytes=nbytes(*args[:-1]) + size.M * n * bias.element_size(), flops=2 * size.M * n * k, implementation="triton",
        more={"library": lambda q, row, values, *rest: rescale(torch._int_mm(q, values.t()), row, *rest)},
    )  # fmt: skip


def _product(kind: str, backward: bool, size: Size) -> Case | None:
    """None where the device has no such products."""
    if eight_bit.refusal(kind, size.device) is not None:
        return None
    n, k = 4 * size.D, size.D
    weight = size.draw(n, k, scale=k**-0.5)
    plain = weight.clone()
    eight_bit.keep_eight_bit([weight], kind)
    args = (size.rows(n),) if backward else (size.rows(k), size.draw(n))

    def times(weight: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return dgrad(x, weight) if backward else linear(x, weight, bias)

    return Case(
        functools.partial(times, weight), functools.partial(times, plain), args,
        bytes=nbytes(args) + weight.numel() + size.M * (k if backward else n) * weight.element_size(),
        flops=2 * size.M * n * k, implementation=_room(size, kind), tolerance=PRODUCT_ERROR[kind],
        more={"mm": lambda x, *_: torch.mm(x, plain if backward else plain.t())},
    )  # fmt: skip


def _room(size: Size, kind: str) -> str:
    return "reference" if kind == "fp8" and size.device.type == "cpu" else room(size.device, size.dtype)


KERNELS = {
    **{f"quantize_{kind}_{w}D": functools.partial(_quantize, kind, w) for kind in PRODUCT_ERROR for w in (1, 4)},
    "rescale_4D": _rescale,
    "product_int8_D_to_4D": _product_int8,
    **{
        f"{kind}_D_to_4D_{way}": functools.partial(_product, kind, way == "backward")
        for kind in PRODUCT_ERROR
        for way in ("forward", "backward")
    },
}

if __name__ == "__main__":
    sys.exit(main("eight_bit", KERNELS, __doc__))
