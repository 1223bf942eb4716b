"""eight_bit: products of frozen weights in eight bits, int8 or float8 (e4m3).

A weight does not change, so it is quantised once, with the scales that each product wants; what it is multiplied with is
quantised at every step, by rows (tokens):

    y = x·Wᵀ     W ≈ diag(s)·Q    a scale for each output channel n,    x ≈ diag(r)·P    for each row m
                 y_mn = r_m·s_n·Σ_k P_mk·Q_nk + b_n
    dx = dy·W    W ≈ Q'·diag(s')  for each input channel k,             dy ≈ diag(r')·P'
                 dx_mk = r'_m·s'_k·Σ_n P'_mn·Q'_nk

    r = max |x| / top,   P = x / r, rounded to the nearest int8 or e4m3 value,   top = 127 or 448

**Rotation.** A few channels that are much larger than the others would leave nothing for those. Before it is quantised a row
is multiplied by a block diagonal orthogonal matrix H, whose blocks are Hadamard matrices of up to 64 channels; so is the
weight, and x·Wᵀ = (x·H)·(W·H)ᵀ. That spreads what is large over its block. int8, which has no exponent, wants it.

**Rows that are made for it.** Where the kernel that makes a row holds all of it, and nothing but the product reads it, the row
leaves that kernel as :class:`Rows`, quantised from float32: the product's own pass over it is saved, and a rounding with it.
:func:`takes_rows` says where: e4m3 without rotation, on a GPU.

The parameter stays the truth, here as for everything that is kept of a weight (:mod:`.weights`): hashes, merging and state
dicts know nothing of this. The quantised copies are made at the first product that wants them and again when the weight has
become another: on the CPU a checksum is compared at every use, elsewhere address and version; a write through
``weight.data`` on a GPU is seen by neither, and needs :func:`keep_eight_bit` again.

Sources: row and column scales: Jetfire and SwitchBack (arXiv 2403.12422, 2304.13013); rotation: QuaRot (arXiv 2404.00456).
"""

from __future__ import annotations

import functools
import math
import os
import warnings
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _ext
from ..errors import DiffFitError
from .dispatch import apart, pick, room, triton_kernels
from .probe import Chooser
from .weights import PLAIN, checksum

KINDS = ("int8", "fp8")
WAYS = ("forward", "backward")  # the product of a linear, and that of its input's gradient
ROTATED = {"int8": True, "fp8": False}  # unless somebody says otherwise
BOUND = 0.05  # a weight that is further off when quantized stays as it is
PLAIN_PRODUCT = "plain"
LIBRARY, OWN = (
    "library",
    "triton",
)  # of an int8 product on a GPU: PyTorch's and a pass over its int32, or all in one kernel
LEAST = 1e-30  # a row whose largest value is less is all zeros
_BLOCKS = (64, 16, 4)  # powers of four: 1/√block is a power of two, and rotating back is exact


_chooser = Chooser(PLAIN_PRODUCT, around=apart)


# -- the plain reference -------------------------------------------------------------------------------------------
def block_of(channels: int) -> int:
    """Channels that are rotated together, of so many; 1 where none of the sizes divides them."""
    return next((block for block in _BLOCKS if channels % block == 0), 1)


def rotate(x: Tensor) -> Tensor:
    """x (..., K) times H, in its own dtype; its own inverse."""
    block, half = block_of(x.shape[-1]), 1
    y = x.unflatten(-1, (x.shape[-1] // block, block))
    while half < block:
        a, b = y.unflatten(-1, (block // (2 * half), 2, half)).unbind(-2)
        y = torch.stack([a + b, a - b], -2).flatten(-3)
        half *= 2
    return (y * block**-0.5).flatten(-2)


def quantize_int8(x: Tensor, turn: bool) -> tuple[Tensor, Tensor]:
    """x (M, K), rotated or not, as (M, K) int8 and a scale for each row, (M,) float32.

    A row with a value that is not finite has the scale NaN, so that whatever it goes into is NaN.
    """
    y, scale = _scaled(x, turn, 127.0)
    return y.round().to(torch.int8), scale


def quantize_fp8(x: Tensor, turn: bool) -> tuple[Tensor, Tensor]:
    """The same as e4m3."""
    y, scale = _scaled(x, turn, 448.0)
    return y.to(torch.float8_e4m3fn), scale


def _scaled(x: Tensor, turn: bool, top: float) -> tuple[Tensor, Tensor]:
    x = rotate(x.float()) if turn else x.float()
    largest = x.abs().amax(1) if x.shape[1] else x.new_zeros(len(x))
    finite = largest.isfinite()
    largest = torch.where(finite, largest, 1.0).clamp_min(LEAST)
    factor = torch.full_like(largest, top) / largest  # top / largest would be the reciprocal times top, rounded twice
    y = torch.where(finite[:, None], x, 0.0) * factor[:, None]
    return y, torch.where(finite, largest / top, torch.nan)


def rescale(product: Tensor, row: Tensor, column: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """product (M, N), int32 or float32, times row (M,) and column (N,), plus bias (N,): (M, N) in ``dtype``."""
    y = product.float() * column * row[:, None]
    return (y if bias is None else y + bias.float()).to(dtype)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a (M, K) times b (N, K) transposed, both quantised, exact for int8: (M, N) float32 or int32."""
    a, b = decoded(a), decoded(b)
    return a @ b.t() if a.shape[1] * 127**2 < 2**24 else (a.double() @ b.double().t()).float()


def product_int8(
    q: Tensor, row: Tensor, values: Tensor, column: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """q (M, K) times values (N, K) transposed, int8, and :func:`rescale` of that: (M, N) in ``dtype``."""
    return rescale(product(q, values), row, column, bias, dtype)


def decoded(x: Tensor) -> Tensor:
    """The values of ``x``, int8 or e4m3, in float32."""
    if x.dtype != torch.float8_e4m3fn or x.device.type != "cpu":
        return x.float()
    # PyTorch's conversion on the CPU takes four times as long as looking the 256 values up.
    return _e4m3().index_select(0, x.contiguous().view(torch.uint8).flatten().int()).view(x.shape)


@functools.cache
def _e4m3() -> Tensor:
    """The values that there are."""
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


# -- what a device can -----------------------------------------------------------------------------------------------
def emulated() -> bool:
    """Whether ``DIFFFIT_FAST_EIGHT_BIT=emulate`` asks for the same numbers from float32 products, on any device."""
    asked = os.environ.get("DIFFFIT_FAST_EIGHT_BIT", "auto") or "auto"
    if asked not in ("auto", "emulate"):
        raise DiffFitError(f"DIFFFIT_FAST_EIGHT_BIT must be auto or emulate; got {asked!r}")
    return asked == "emulate"


@functools.cache
def _cpu_has_int8() -> bool:
    try:
        return torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()
    except AttributeError:
        return False


def refusal(kind: str, device: torch.device) -> str | None:
    """Why products of this kind are not to be had from ``device``, or None where they are."""
    if emulated():
        return None
    if device.type == "cpu":
        if kind == "fp8":
            return "CPUs have no float8 arithmetic"
        return None if _cpu_has_int8() else "this CPU has no int8 dot products (AVX-512 VNNI, AVX-VNNI or AMX)"
    if device.type != "cuda":
        return f"there are no {kind} products for {device.type}"
    capability = torch.cuda.get_device_capability(device)
    least = (8, 9) if kind == "fp8" else (8, 0)
    name = torch.cuda.get_device_name(device)
    return None if capability >= least else f"{name} (sm_{capability[0]}{capability[1]}) has no {kind} arithmetic"


def kind_for(device: torch.device) -> str | None:
    """What ``device`` has: "fp8" where it can, else "int8", else None."""
    return next((kind for kind in ("fp8", "int8") if refusal(kind, device) is None), None)


# -- a weight --------------------------------------------------------------------------------------------------------
@dataclass
class Side:
    """A weight for one of its products: ``values`` (rows, channels) to be multiplied by rows of as many channels."""

    values: Tensor
    scale: Tensor  # of each row, (rows,) float32
    packed: Any = None  # oneDNN's layout of the values


class EightBit:
    """The quantised copies of one frozen weight (N, K), made when they are wanted: of one for sampling, of two for training.

    Attributes:
        kind: "int8" or "fp8".
        turn: whether rows are rotated.
        auto: whether a product may be that of the weight's own dtype, where it is faster.
        ways: the products that are in eight bits, of :data:`WAYS`.
    """

    def __init__(self, weight: Tensor, kind: str, turn: bool, auto: bool, name: str, ways: tuple[str, ...]) -> None:
        self.kind, self.turn, self.auto, self.name, self.ways = kind, turn, auto, name, ways
        self.like = weight.data_ptr(), weight.dtype, weight.shape
        self._state: Any = None
        self._sides: dict[bool, Side] = {}
        self._error = 0.0

    def side(self, weight: Tensor, backward: bool) -> Side:
        """For ``linear`` or, ``backward``, for ``dgrad``."""
        self._look(weight)
        if backward not in self._sides:
            w = weight.detach()
            values, scale = quantize(w.t().contiguous() if backward else w, self.kind, self.turn)
            self._sides[backward] = Side(values, scale, _packed(values))
        return self._sides[backward]

    def error(self, weight: Tensor) -> float:
        """‖W − Ŵ‖ / ‖W‖, the Frobenius norm; inf where a value is not finite."""
        self._look(weight)
        return self._error

    def good(self, weight: Tensor) -> bool:
        """Whether the weight is as it was quantized but for :data:`BOUND`; if not, its products are those of its own dtype."""
        self._look(weight)
        return self._error <= BOUND

    def _look(self, weight: Tensor) -> None:
        now = checksum(weight) if weight.device.type == "cpu" else weight._version
        if self._state is not None and (
            torch.equal(now, self._state) if isinstance(now, Tensor) else now == self._state
        ):
            return
        self._state = now
        self._sides.clear()
        values, scale = quantize(weight.detach(), self.kind, self.turn)
        self._error = _error(weight, values, scale, self.turn)
        self._sides[False] = Side(values, scale, _packed(values))
        if self._error > BOUND:
            self._sides.clear()
            what = f"by {self._error:.0%}" if math.isfinite(self._error) else "and has values that are not finite"
            warnings.warn(f"{self.name} stays in {weight.dtype}: in {self.kind} it would be off {what}", stacklevel=2)


def _error(weight: Tensor, values: Tensor, scale: Tensor, turn: bool) -> float:
    w, back = weight.detach().float(), values.float() * scale[:, None]
    size = float(w.norm())
    error = float((w - (rotate(back) if turn else back)).norm()) / size if size else 0.0
    return error if math.isfinite(error) else math.inf


_KEPT: weakref.WeakKeyDictionary[torch.UntypedStorage, EightBit] = weakref.WeakKeyDictionary()


def keep_eight_bit(
    weights: Iterable[Tensor],
    kind: str | None,
    turn: bool | None = None,
    *,
    auto: bool = False,
    name: str = "a weight",
    ways: tuple[str, ...] = WAYS,
) -> None:
    """Let products with these weights (N, K) be of ``kind`` from now on, until their memory goes; None: no longer.

    Args:
        turn: whether to rotate; None: as :data:`ROTATED` says.
        auto: take the products of the weights' own dtype where they are faster.
        name: what warnings call them.
        ways: "forward", "backward", or both.
    """
    for weight in weights:
        if type(weight) not in PLAIN or weight.is_meta:
            continue
        memory = weight.untyped_storage()
        if kind is None:
            _KEPT.pop(memory, None)
        elif weight.numel() and weight.is_contiguous():
            _KEPT[memory] = EightBit(weight, kind, ROTATED[kind] if turn is None else turn, auto, name, ways)


def eight_bit_of(weight: Tensor) -> EightBit | None:
    """What is kept of ``weight``; None where its products are those of its own dtype."""
    if not _KEPT or type(weight) not in PLAIN:
        return None
    kept = _KEPT.get(weight.untyped_storage())
    return kept if kept is not None and kept.like == (weight.data_ptr(), weight.dtype, weight.shape) else None


def quantize(x: Tensor, kind: str, turn: bool) -> tuple[Tensor, Tensor]:
    """:func:`quantize_int8` or :func:`quantize_fp8` in the room in use, x (M, K) contiguous."""
    if kind == "fp8" and x.device.type == "cpu":  # no CPU has arithmetic for it, and so there is nothing in C++
        return quantize_fp8(x, turn)
    return pick("eight_bit", quantize_int8 if kind == "int8" else quantize_fp8, x)(x, turn)


# -- the products ----------------------------------------------------------------------------------------------------
class Rows(NamedTuple):
    """Rows (M, K) that are quantised already.

    Attributes:
        values: int8 or e4m3.
        scale: of each row, (M,) float32.
        dtype: what they would have been in, and what their product is in.
    """

    values: Tensor
    scale: Tensor
    dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def shape(self) -> torch.Size:
        return self.values.shape


def fits(rows: int, weight: Tensor) -> bool:
    """Whether the libraries multiply so many rows by ``weight`` in eight bits: on CUDA more than 16, by sizes that 16 divides."""
    if weight.device.type != "cuda" or emulated():
        return rows > 0
    return rows > 16 and not any(size % 16 for size in weight.shape)


def takes_rows(weight: Tensor, like: Tensor | Rows, backward: bool) -> bool:
    """Whether what ``weight`` or, ``backward``, its transpose is to be multiplied by is wanted as :class:`Rows`: where Triton has
    kernels that make them, and it is certain that the product is one of e4m3.

    Args:
        like: as many rows, on the device and in the dtype that they would otherwise be in.
    """
    kept = eight_bit_of(weight)
    if kept is None or kept.kind != "fp8" or kept.turn or WAYS[backward] not in kept.ways:
        return False
    if not fits(like.shape[0], weight):
        return False
    if room(like.device, like.dtype) != "triton" or not kept.good(weight):
        return False
    return not kept.auto or _chooser.known(_key(like, weight, backward)) == kept.kind


def multiply_rows(x: Rows, weight: Tensor, bias: Tensor | None, backward: bool) -> Tensor:
    """The product of x with a weight that :func:`takes_rows`, in ``x.dtype``."""
    kept = eight_bit_of(weight)
    assert kept is not None
    return _multiply_rows(x, kept.side(weight, backward), kept.kind, bias)


def multiply(
    x: Tensor, weight: Tensor, kept: EightBit, bias: Tensor | None, backward: bool, plain: Callable[[], Tensor]
) -> Tensor:
    """``plain()``, a product of x with ``weight`` or, ``backward``, its transpose, in eight bits where that is wanted.

    Args:
        x: (M, K), or (M, N) for the gradient of the input.
        bias: (N,), or None.
        plain: the same in the dtype of x.
    """
    if not fits(x.shape[0], weight) or WAYS[backward] not in kept.ways or not kept.good(weight):
        return plain()
    side = kept.side(weight, backward)
    if not kept.auto:
        return _multiply(x, side, kept, bias)
    key = _key(x, weight, backward)
    candidates = {PLAIN_PRODUCT: plain, kept.kind: lambda: _multiply(x, side, kept, bias)}
    return candidates[_chooser.choose(key, candidates, x.device)]()


def _key(x: Tensor | Rows, weight: Tensor, backward: bool) -> tuple:
    """Of the problem, to the chooser."""
    rows, channels = reversed(weight.shape) if backward else weight.shape
    return "eight_bit", str(x.device), str(x.dtype).removeprefix("torch."), x.shape[0], rows, channels


def forget() -> None:
    """Forget which product was faster (for tests and benchmarks)."""
    _chooser.clear()


def _multiply(x: Tensor, side: Side, kept: EightBit, bias: Tensor | None) -> Tensor:
    return _multiply_rows(Rows(*quantize(x.contiguous(), kept.kind, kept.turn), x.dtype), side, kept.kind, bias)


def _multiply_rows(x: Rows, side: Side, kind: str, bias: Tensor | None) -> Tensor:
    q, row, dtype = x
    to_rows = pick("eight_bit", rescale, row, dtype)
    if emulated():
        return to_rows(product(q, side.values), row, side.scale, bias, dtype)
    if kind == "fp8":
        # Sums of gradients, too, are kept in float32 all the way: no fast accumulation.
        y = torch._scaled_mm(
            q, side.values.t(), scale_a=row[:, None], scale_b=side.scale[None, :],
            bias=None if bias is None else bias.to(torch.bfloat16), out_dtype=torch.bfloat16, use_fast_accum=False,
        )  # fmt: skip
        return y.to(dtype)

    def library() -> Tensor:
        return to_rows(_integers(q, side), row, side.scale, bias, dtype)

    if room(q.device, dtype) != "triton":
        return library()
    own = triton_kernels("eight_bit").product_int8
    candidates = {LIBRARY: library, OWN: lambda: own(q, row, side.values, side.scale, bias, dtype)}
    key = ("int8_product", str(q.device), str(dtype).removeprefix("torch."), *q.shape, len(side.values))
    return candidates[_chooser.choose(key, candidates, q.device, default=LIBRARY)]()


def _packed(values: Tensor) -> Any:
    """The layout that oneDNN's int8 product wants, where there is one."""
    if values.device.type != "cpu" or values.dtype != torch.int8 or not hasattr(torch.ops.onednn, "qlinear_prepack"):
        return None
    return torch.ops.onednn.qlinear_prepack(values, None)


def _integers(q: Tensor, side: Side) -> Tensor:
    """Σ_k q_mk·values_nk of int8, (M, N) int32, or float32 on the CPU."""
    if side.packed is None:
        return torch._int_mm(q, side.values.t())
    ones, zeros = _ones(len(side.values))
    return torch.ops.onednn.qlinear_pointwise(
        q, 1.0, 0, side.packed, ones, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )


@functools.lru_cache(64)
def _ones(count: int) -> tuple[Tensor, Tensor]:
    return torch.ones(count), torch.zeros(count, dtype=torch.int64)


_ext.register_operation("eight_bit")
_ext.register_choice("eight_bit", _chooser.report)
