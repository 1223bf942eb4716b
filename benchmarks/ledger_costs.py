"""What a call costs: the kernels it launches, the bytes and operations of each, and a predicted time. Nothing is measured.

Three tables, each the one place for what it holds:

- ``DEVICES`` and the constants under it: the model of time;
- ``ATEN``: for every call of PyTorch's library the launches it makes on CUDA;
- ``KERNELS``: for every Triton kernel of this package which arguments it reads and writes.

A call or kernel that is in no table is an error. To add a kernel: one line of ``KERNELS``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from ledger_trace import UPDATE, Call, Spec

# -- the model of time -------------------------------------------------------------------------------------------------


class Device(NamedTuple):
    """Figures of the datasheet (SXM modules)."""

    terabytes: float  # a second
    teraflops: float  # a second, dense bfloat16
    multiprocessors: int
    architecture: int
    eight_bit: dict[str, float]  # tera-operations a second, dense, by what is multiplied


DEVICES = {
    "h100": Device(3.35, 989.4, 132, 90, {"fp8": 1979.0, "int8": 1979.0}),
    "h200": Device(4.8, 989.4, 132, 90, {"fp8": 1979.0, "int8": 1979.0}),
    "a100": Device(2.039, 312.0, 108, 80, {"int8": 624.0}),
}
BANDWIDTH = 0.85  # of the datasheet's: what a pass over much memory reaches (a large copy: 0.9)
START_US = 1.8  # every launch in a graph: start, first loads, last stores
# Products. cuBLAS reaches about this share of the datasheet's rate with its best tile and every multiprocessor busy
# (published for 8192³ in bfloat16 on random data: 700–790 of 989 TFLOP/s). Smaller tiles are slower, but may leave fewer
# multiprocessors idle in the last wave; the best of these is taken.
PRODUCT = 0.80
# Eight-bit products are assumed to reach the same shares of their own rate; nothing published says so for these shapes.
TILES = {(128, 256): 1.0, (128, 192): 0.97, (128, 128): 0.93, (128, 64): 0.80, (64, 64): 0.60}
# From this K on the last wave may be cut along K instead: nobody idles, for a little more work. With fewer tiles than
# multiprocessors the parts go through memory, and another launch adds them up.
SPLIT_FROM, SPLIT = 4096, 0.95
# What is left of the fp8 rate where sums are kept in float32 and each row has a scale, as ours: assumed, to be replaced by a
# measurement. Reports go from no loss to several times slower, by shape and version (pytorch issue 147971, ao issue 2184).
FP8_BY_ROWS = 0.75
# The int8 product of this package, in tiles of 128 × 256 and never cut along K, as a share of what PyTorch's is assumed to reach
# with that tile: measured on an H200, 0.50 for K = 1152 and 0.68 for K = 4608.
OWN_INT8 = 0.55
# Attention at head size 72, as a share of the datasheet's rate, the arithmetic counted without padding: (forward, backward)
# up to 256 tokens and from 1024 on, in between by the logarithm. Estimates from published curves; what the library does
# inside (a float32 dq that is cleared, added to and converted) is in them. For a kernel of this package count what it
# multiplies: 7 products in a backward of two passes, where the libraries do 5.
ATTENTION = {
    (90, "cudnn"): ((0.228, 0.228), (0.300, 0.257)),
    (90, "flash"): ((0.217, 0.148), (0.300, 0.190)),
    (90, "triton"): ((0.163, 0.154), (0.163, 0.154)),  # measured at 256 tokens (H200), and assumed alike from there on
    (80, "flash"): ((0.400, 0.300), (0.500, 0.400)),
    (80, "triton"): ((0.400, 0.400), (0.450, 0.450)),
}
# The host in eager mode, assumed, microseconds: a call of PyTorch's library with its share of autograd, a view, an operation
# of this package through torch.library, a launch through Triton.
HOST_US = {"call": 8.0, "view": 2.5, "op": 60.0, "triton": 15.0}


class Launch(NamedTuple):
    """One kernel on the device."""

    name: str
    kind: str
    bytes: int  # read and written in memory
    flops: float = 0.0  # of products and attention
    product: tuple[int, int, int, int] | None = None  # batch, M, N, K
    attention: tuple[str, int, int] | None = None  # library, 0 forward or 1 backward, tokens
    where: str = ""
    op: str = ""
    shape: str = ""
    count: int = 1
    multiplied: str = "bf16"  # what a product multiplies, or "fp8", "int8", or "own int8", by this package

    def microseconds(self, device: str) -> float:
        about = DEVICES[device]
        memory = self.bytes / (BANDWIDTH * about.terabytes * 1e6)
        return self.count * START_US + max(memory, self.flops / (self.rate(about) * 1e6) if self.flops else 0.0)

    def rate(self, about: Device) -> float:
        """TFLOP/s of the arithmetic."""
        if self.attention is not None:
            library, backward, tokens = self.attention
            short, long = (pair[backward] for pair in ATTENTION[about.architecture, library])
            share = short + (long - short) * min(1.0, max(0.0, math.log2(tokens / 256) / 2))
            return about.teraflops * share
        batch, m, n, k = self.product or (1, 1, 1, 1)
        best = 0.0
        own = self.multiplied == "own int8"
        for (rows, cols), share in TILES.items():
            if own and (rows, cols) != (128, 256):
                continue
            tiles = batch * math.ceil(m / rows) * math.ceil(n / cols)
            waves = tiles / about.multiprocessors
            best = max(best, share * batch * m * n / (rows * cols * about.multiprocessors * math.ceil(waves)))
            if k >= SPLIT_FROM and not own:
                best = max(best, share * SPLIT * batch * m * n / (rows * cols * tiles))
        if self.multiplied == "bf16":
            return about.teraflops * PRODUCT * best
        slower = {"fp8": FP8_BY_ROWS, "own int8": OWN_INT8}.get(self.multiplied, 1.0)
        return about.eight_bit[self.multiplied.removeprefix("own ")] * slower * PRODUCT * best


def _through_memory(batch: int, m: int, n: int, k: int) -> bool:
    """Whether a product is split along K because it has too few tiles (of an H100; an A100 is not far from it)."""
    return k >= SPLIT_FROM and batch * math.ceil(m / 128) * math.ceil(n / 128) < DEVICES["h100"].multiprocessors


# -- calls of PyTorch's library ----------------------------------------------------------------------------------------
SMALL = 1 << 20  # element-wise launches that move less are of the kind "small"

_FREE = """view _unsafe_view reshape _reshape_alias t transpose permute slice select unbind unsqueeze squeeze expand detach
    alias as_strided split split_with_sizes empty empty_like empty_strided new_empty new_empty_strided lift_fresh
    scalar_tensor"""  # the last is a number that the host passes on
_FREE_NAMES = frozenset(_FREE.split())
_POINTWISE = """add sub mul div neg abs lt le gt ge eq where copysign silu silu_backward gelu gelu_backward exp cos sin
    sigmoid tanh rsqrt reciprocal pow add_ sub_ mul_ div_ mse_loss_backward"""
_FILL = "zeros ones full full_like zeros_like ones_like new_zeros new_ones new_full fill_ zero_ arange rand"
_REDUCE = "sum mean amax"


def _size(tensors: list[Spec]) -> int:
    return sum({(t.memory, t.bytes, t.shape): t.bytes for t in tensors}.values())


def _largest(tensors: list[Spec]) -> str:
    return "×".join(map(str, max(tensors, key=lambda t: t.bytes).shape)) if tensors else ""


def kind_by_size(kind: str, bytes: int) -> str:
    return "small" if bytes < SMALL else kind


def _one(call: Call, bytes: int, kind: str = "element-wise", count: int = 1) -> list[Launch]:
    return [
        Launch(call.name, kind_by_size(kind, bytes), bytes, shape=_largest(call.out or call.tensors()), count=count)
    ]


def _pointwise(call: Call) -> list[Launch]:
    return _one(call, _size(call.tensors()) + _size(call.out))


def _fill(call: Call) -> list[Launch]:
    return _one(call, _size(call.out))


def _copy_into(call: Call) -> list[Launch]:
    return _one(call, call.args["src"].bytes + call.out[0].bytes)


def _view_backward(call: Call) -> list[Launch]:
    """zeros of the whole, then a copy of the gradient into its part (FunctionsManual and TensorShape.cpp)."""
    gradient = call.tensors()[0].bytes
    clear = Launch(
        call.name, kind_by_size("element-wise", call.out[0].bytes), call.out[0].bytes, shape=_largest(call.out)
    )
    copy = Launch(call.name, kind_by_size("element-wise", 2 * gradient), 2 * gradient, shape=_largest(call.tensors()))
    return [clear, copy]


def _cat(call: Call) -> list[Launch]:
    """128 inputs a launch where all are dense, 64 otherwise (CatArrayBatchedCopy, ATen/native/cuda/Shape.cu)."""
    inputs = call.tensors()
    count = math.ceil(len(inputs) / (128 if all(t.dense for t in inputs) else 64))
    return _one(call, _size(inputs) + _size(call.out), count=count)


def product(call: Call, batch: int, m: int, n: int, k: int, bytes: int, multiplied: str = "bf16") -> list[Launch]:
    """One product, and where K is split the launch that adds the parts up (float32, left in L2)."""
    kind = "products" if min(m, n, k) >= 384 else "other products"  # those of the blocks are the large ones
    of = (batch, m, n, k)
    shape = f"{f'{batch}×' if batch > 1 else ''}{m}×{n}×{k}"
    launches = [Launch(call.name, kind, bytes, 2.0 * batch * m * n * k, of, shape=shape, multiplied=multiplied)]
    if _through_memory(*of):
        launches.append(Launch("split-K sum", "other products", call.out[0].bytes, shape=shape))
    return launches


def _mm(call: Call) -> list[Launch]:
    a, b = call.tensors()[-2:]
    m, k, n = a.shape[-2], a.shape[-1], b.shape[-1]
    return product(call, math.prod(a.shape[:-2]), m, n, k, _size(call.tensors()) + _size(call.out))


def _eight_bit_mm(call: Call) -> list[Launch]:
    """Of fp8 with scales for rows and columns, bfloat16 out; of int8 without, int32 out."""
    a, b = call.args["self"], call.args["mat2"]
    multiplied = "int8" if a.dtype == torch.int8 else "fp8"
    return product(call, 1, a.shape[0], b.shape[1], a.shape[1], _size(call.tensors()) + _size(call.out), multiplied)


def _attention_forward(call: Call) -> list[Launch]:
    library = "cudnn" if "cudnn" in call.name else "flash"
    q, k, v = (call.args[n] for n in ("query", "key", "value"))
    b, h, t, d = q.shape
    bytes = q.bytes + k.bytes + v.bytes + call.out[0].bytes + 4 * b * h * t
    return [
        Launch(
            f"{library} forward",
            "attention",
            bytes,
            4.0 * b * h * t * t * d,
            None,
            (library, 0, t),
            shape=f"{b}×{h}×{t}×{d}",
        )
    ]


def _attention_backward(call: Call) -> list[Launch]:
    """cuDNN: 3 launches (row sums of do·o, the kernel, dq to bfloat16); flash 4 (clears its float32 dq besides)."""
    library = "cudnn" if "cudnn" in call.name else "flash"
    q, k, v, o, do = (call.args[n] for n in ("query", "key", "value", "out", "grad_out"))
    b, h, t, d = q.shape
    bytes = sum(s.bytes for s in (q, k, v, o, do)) + sum(s.bytes for s in call.out[:3]) + 4 * b * h * t
    count = 3 if library == "cudnn" else 4
    return [
        Launch(f"{library} backward", "attention", bytes, 10.0 * b * h * t * t * d, None, (library, 1, t),
               shape=f"{b}×{h}×{t}×{d}", count=count)
    ]  # fmt: skip


def _embedding_backward(call: Call) -> list[Launch]:
    """Up to 3072 indices: zeros of the table, then one kernel (ATen/native/cuda/Embedding.cu)."""
    gradient, table = call.tensors()[0].bytes, call.out[0].bytes
    return [
        Launch(call.name, kind_by_size("element-wise", table), table, shape=_largest(call.out)),
        Launch(call.name, "small", 2 * gradient, shape=_largest(call.tensors())),
    ]


def _embedding(call: Call) -> list[Launch]:
    return _one(call, 2 * _size(call.out))


def _mse_loss(call: Call) -> list[Launch]:
    """The squares to memory, then their mean."""
    a = call.tensors()[0].bytes
    return _one(call, 3 * a) + _one(call, a)


def _layer_norm(call: Call) -> list[Launch]:
    return _one(call, _size(call.tensors()) + _size(call.out))


def _layer_norm_backward(call: Call) -> list[Launch]:
    weights = 2 if len([t for t in call.out if len(t.shape) == 1]) else 0
    main = _one(call, _size(call.tensors()) + _size(call.out))
    return main + (_one(call, _size(call.tensors()[:2])) if weights else [])


def _convolution(call: Call) -> list[Launch]:
    x, w = call.args["input"], call.args["weight"]
    n = call.out[0].shape
    return product(call, 1, n[0] * n[2] * n[3], n[1], math.prod(w.shape[1:]), x.bytes + w.bytes + call.out[0].bytes)


def _convolution_backward(call: Call) -> list[Launch]:
    """Of the weight and the bias alone: images get no gradient."""
    dy, x, w = (call.args[n] for n in ("grad_output", "input", "weight"))
    n = dy.shape
    rows = n[0] * n[2] * n[3]
    made = product(call, 1, n[1], math.prod(w.shape[1:]), rows, dy.bytes + x.bytes + w.bytes)
    return made + _one(call, dy.bytes)


# Multi-tensor launches: (tensors, blocks) that one holds, by the number of tensor lists, and elements of a block
# (depth_to_max_tensors, depth_to_max_blocks and kChunkSize of ATen/native/cuda/MultiTensorApply.cuh).
_LIST_TENSORS, _LIST_BLOCKS, _BLOCK = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}, 320, 65536


def _many(call: Call, lists: int, sizes: list[Spec], bytes: int) -> list[Launch]:
    """One multi-tensor call: a launch whenever its tensors or its blocks are full."""
    launches, tensors, blocks = 1, 0, 0
    for t in sizes:
        if tensors == _LIST_TENSORS[lists]:
            launches, tensors, blocks = launches + 1, 0, 0
        tensors += 1
        for _ in range(math.ceil(t.bytes / t.dtype.itemsize / _BLOCK)):
            if blocks == _LIST_BLOCKS:  # the tensor goes on in the next launch
                launches, tensors, blocks = launches + 1, 1, 0
            blocks += 1
    return [Launch(call.name, "optimizer and EMA", bytes, shape=f"{len(sizes)} tensors", count=launches)]


def _foreach(call: Call) -> list[Launch]:
    lists = [a for a in call.args.values() if isinstance(a, (list, tuple)) and a and isinstance(a[0], Spec)]
    read = sum(t.bytes for tensors in lists for t in tensors)
    return _many(call, len(lists), lists[0], read + sum(t.bytes for t in lists[0]))


def _foreach_zero(call: Call) -> list[Launch]:
    return _many(call, 1, call.args["self"], sum(t.bytes for t in call.args["self"]))


def _fused_adamw(call: Call) -> list[Launch]:
    """Reads weight, gradient and both moments, writes all but the gradient."""
    lists = [call.args[n] for n in ("self", "grads", "exp_avgs", "exp_avg_sqs")]
    sums = [sum(t.bytes for t in tensors) for tensors in lists]
    return _many(call, 4, lists[0], 2 * sum(sums) - sums[1])


def _linear_gelu(call: Call) -> list[Launch]:
    """fc1 with GELU in its epilogue: the pre-activation that it writes besides is assumed not to hide behind the product."""
    (m, k), n = call.args["h"].shape, call.args["w1"].shape[0]
    extra = call.out[1].bytes
    made = product(call, 1, m, n, k, _size(call.tensors()) + call.out[0].bytes)
    return [*made, Launch("epilogue of it", "GELU", extra, shape=_largest(call.out), count=0)]


def _dgelu_dgrad(call: Call) -> list[Launch]:
    """fc2's input gradient with GELU's backward in its epilogue; likewise for the pre-activation that it reads."""
    (m, k), n = call.args["dbranch"].shape, call.args["w2"].shape[1]
    extra = call.args["u"].bytes
    made = product(call, 1, m, n, k, _size(call.tensors()) + _size(call.out) - extra)
    return [*made, Launch("epilogue of it", "GELU", extra, shape=_largest(call.out), count=0)]


Rule = Callable[[Call], list[Launch]]
ATEN: dict[str, Rule] = {
    **dict.fromkeys(_FREE.split(), lambda call: []),
    **dict.fromkeys(_POINTWISE.split(), _pointwise),
    **dict.fromkeys(_FILL.split(), _fill),
    **dict.fromkeys(_REDUCE.split(), _pointwise),
    **dict.fromkeys(("_to_copy", "clone"), _pointwise),
    "copy_": _copy_into,
    **dict.fromkeys(("cat", "stack"), _cat),
    **dict.fromkeys(("slice_backward", "select_backward"), _view_backward),
    **dict.fromkeys(("mm", "addmm", "bmm", "baddbmm"), _mm),
    **dict.fromkeys(("_scaled_mm", "_int_mm"), _eight_bit_mm),
    **dict.fromkeys(("_scaled_dot_product_cudnn_attention", "_scaled_dot_product_flash_attention"), _attention_forward),
    "_scaled_dot_product_cudnn_attention_backward": _attention_backward,
    "_scaled_dot_product_flash_attention_backward": _attention_backward,
    "embedding": _embedding,
    "embedding_dense_backward": _embedding_backward,
    "mse_loss": _mse_loss,
    "native_layer_norm": _layer_norm,
    "native_layer_norm_backward": _layer_norm_backward,
    "convolution": _convolution,
    "convolution_backward": _convolution_backward,
    **dict.fromkeys(("_foreach_add_", "_foreach_mul_", "_foreach_lerp_", "_foreach_copy_"), _foreach),
    "_foreach_zero_": _foreach_zero,
    "_fused_adamw_": _fused_adamw,
    "cublaslt_linear_gelu": _linear_gelu,
    "cublaslt_dgelu_dgrad": _dgelu_dgrad,
}


# -- Triton kernels of this package ------------------------------------------------------------------------------------
@dataclass
class Kernel:
    """What a kernel does with its tensor arguments, which are named as in its definition, without ``_ptr``.

    ``scratch``: partial sums that the next launch reads back; they stay in L2 and are not counted. ``part``: the share of
    an argument that is touched, a number or a function of all arguments. ``flops`` and ``attention`` for kernels with
    products: functions of the arguments, e.g. for a forward of attention over (B, T, 3·H·d)::

        Kernel("attention", "qkv", "o lse", flops=lambda a: 4.0 * a["B"] * a["H"] * a["T"] ** 2 * a["d"],
               attention=lambda a: ("triton", 0, a["T"]))
    """

    kind: str
    reads: str
    writes: str = ""
    scratch: str = ""
    part: dict[str, Any] = field(default_factory=dict)
    flops: Callable[[dict[str, Any]], float] | None = None
    attention: Callable[[dict[str, Any]], tuple[str, int, int]] | None = None
    multiplies: tuple[str, str] | None = None  # the arguments (M, K) and (N, K) of an int8 product

    def launches(self, call: Call) -> list[Launch]:
        reads, writes, scratch = self.reads.split(), self.writes.split(), self.scratch.split()
        tensors = {n: a for n, a in call.args.items() if isinstance(a, Spec)}
        undeclared = set(tensors) - {*reads, *writes, *scratch}
        if undeclared:
            raise LookupError(f"{call.name}: KERNELS does not say what it does with {', '.join(sorted(undeclared))}")
        bytes = 0
        for name in (*reads, *writes):
            if name in tensors:
                share = self.part.get(name, 1)
                bytes += int(tensors[name].bytes * (share(call.args) if callable(share) else share))
        if self.multiplies:
            (m, k), (n, _) = (tensors[name].shape for name in self.multiplies)
            of = (1, m, n, k)
            return [
                Launch(call.name, self.kind, bytes, 2.0 * m * n * k, of, shape=f"{m}×{n}×{k}", multiplied="own int8")
            ]
        return [
            Launch(
                call.name, self.kind, bytes, self.flops(call.args) if self.flops else 0.0,
                attention=self.attention(call.args) if self.attention else None, shape=_largest(list(tensors.values())),
            )
        ]  # fmt: skip


def _columns(args: dict[str, Any]) -> Fraction:
    """colsum may take the first N of the STRIDE columns."""
    return Fraction(args["N"], args["STRIDE"])


def _attention_flops(products: int) -> Callable[[dict[str, Any]], float]:
    """Of so many products of T × T with the channels of z (B, T, 3D)."""
    return lambda args: products * 2.0 * args["z"].shape[0] * args["z"].shape[1] ** 2 * args["z"].shape[2] / 3


def _ours(backward: int) -> Callable[[dict[str, Any]], tuple[str, int, int]]:
    return lambda args: ("triton", backward, args["z"].shape[1])


def _dq_reads(args: dict[str, Any]) -> Fraction:
    """Of z, by attention_dq: the keys, and with γ the queries."""
    return Fraction(2, 3) if args["GAINS"] else Fraction(1, 3)


def _thirds_read(args: dict[str, Any]) -> Fraction:
    """Of z, for the sums: the query and the value third where there is γ, none otherwise."""
    return Fraction(2, 3) if args["GAINS"] else Fraction(0)


_FINISH = {f"out{i}": (lambda args, i=i: int(i < args["SUMS"])) for i in range(4)}  # the rest are padding

KERNELS: dict[str, Kernel] = {
    "adaln_forward": Kernel("joins", "x scale shift", "h mean rstd"),
    "adaln_backward": Kernel("joins", "dh x scale mean rstd", "dx", "dscale dshift"),
    "residual_forward": Kernel("joins", "x branch gate bias", "y"),
    "residual_backward": Kernel("joins", "dy branch gate", "dbranch", "dgate dbias"),
    "residual_adaln_forward": Kernel("joins", "x branch gate bias scale shift", "y h h_scale mean rstd"),
    "residual_adaln_backward": Kernel(
        "joins", "dh dy y branch gate scale mean rstd", "dx dbranch dbranch_scale", "dgate dbias dscale dshift"
    ),
    "gelu_forward": Kernel("GELU", "u", "g"),
    "gelu_bias_forward": Kernel("GELU", "u bias", "g"),
    "gelu_backward": Kernel("GELU", "dg u bias", "du", "db"),
    "gelu_fp8_forward": Kernel("GELU", "u bias", "g g_scale"),
    "gelu_fp8_backward": Kernel("GELU", "dg u bias", "du du_scale", "db"),
    "attention_forward": Kernel("attention", "z vectors", "o lse", flops=_attention_flops(2), attention=_ours(0)),
    "attention_query": Kernel("attention", "do o z vectors", "q delta", part={"z": Fraction(1, 3)}),
    "attention_dkdv": Kernel(
        "attention",
        "do q z vectors lse delta",
        "dz ds",
        "part",
        {"z": Fraction(2, 3), "dz": Fraction(2, 3)},
        _attention_flops(4),
        _ours(1),
    ),
    "attention_dq": Kernel(
        "attention", "ds z vectors", "dz", "part", {"z": _dq_reads, "dz": Fraction(1, 3)}, _attention_flops(1), _ours(1)
    ),
    "scale_qkv": Kernel("attention", "z vectors", "qkv"),
    "pack_dqkv": Kernel("attention", "dq dk dv z vectors", "dz", "part", {"z": _thirds_read}),
    "modulation_forward": Kernel("vectors", "m bias norm gamma beta", "vectors"),
    "modulation_backward": Kernel(
        "vectors", "dvectors m bias norm gamma beta", "dm dbias dnorm dgamma dbeta", part={"m": Fraction(2, 3)}
    ),
    "quantize": Kernel("eight bits", "x", "q scale"),
    "quantize_rotated": Kernel("eight bits", "x", "q scale"),
    "rescale": Kernel("eight bits", "product row column bias", "y"),
    "product": Kernel("products", "q row values column bias", "y", multiplies=("q", "values")),
    "colsum": Kernel("sums", "x", "", "out", part={"x": _columns}),
    "finish": Kernel("sums", "", "out0 out1 out2 out3", "part0 part1 part2 part3", part=_FINISH),
}


# -- all of it ---------------------------------------------------------------------------------------------------------
def launches(calls: list[Call]) -> list[Launch]:
    """The launches of these calls, in order.

    Raises:
        LookupError: calls that no table knows; the message names them all.
    """
    unknown = sorted({c.name for c in calls if c.name not in (KERNELS if c.triton else ATEN)})
    if unknown:
        raise LookupError(
            f"neither ATEN nor KERNELS of ledger_costs.py says what these cost: {', '.join(unknown)}; add a line for each"
        )
    found = []
    for call in calls:
        made = KERNELS[call.name].launches(call) if call.triton else ATEN[call.name](call)
        found += [
            one._replace(where=call.where, op=call.op, kind="optimizer and EMA" if call.where == UPDATE else one.kind)
            for one in made
        ]
    return found


def is_free(call: Call) -> bool:
    """Whether the call costs the device nothing: a view, or memory given out."""
    return not call.triton and call.name in _FREE_NAMES


def host_milliseconds(calls: list[Call], ops: int) -> float:
    """What the host needs for these calls in eager mode."""
    us = ops * HOST_US["op"]
    for call in calls:
        us += HOST_US["triton" if call.triton else "view" if is_free(call) else "call"]
    return us / 1e3
