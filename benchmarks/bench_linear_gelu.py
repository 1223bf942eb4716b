"""fc1 with GELU, and fc2's input gradient with GELU's backward: fused by cuBLASLt, unfused, and by torch.compile.

For DiT-XL (D = 1152, N = 4608) and M = 256·{32, 8} rows: median time of each, its spread, TFLOP/s, and the share
of the plain product's time that is left (``mm`` is the product alone, the floor). Every variant runs from a CUDA graph,
so that no launch gap is counted; before each timing the L2 cache is overwritten; variants take turns.

Everything but torch.compile comes first, since compiling takes longest; the file is written after every table of variants.

    python benchmarks/bench_linear_gelu.py [--dtype bfloat16] [--images 32 8] [--rounds 30] [--json out.json]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import write_json
from torch import Tensor
from torch.nn import functional as F

TOKENS = 256
FLUSH_BYTES = 256 << 20  # several times any GPU's L2 cache


def gelu_backward(dg: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Plain PyTorch: what torch.compile is given."""
    du = torch.ops.aten.gelu_backward(dg, u, approximate="tanh")
    return du, du.sum(0, dtype=torch.float32)


def variants(M: int, D: int, dtype: torch.dtype) -> dict[str, dict[str, Callable[[], Any]]]:
    """For each operation the ways to compute it, on data of the model's size and spread."""
    from difffit_fast.ops import frozen_mlp
    from difffit_fast.ops.dispatch import cuda_ops, pick

    N = 4 * D
    make = lambda *s, scale=1.0: (torch.randn(*s, device="cuda") * scale).to(dtype)  # noqa: E731
    h, w1, b1 = make(M, D), make(N, D, scale=D**-0.5), make(N, scale=0.1)
    dbranch, w2, u = make(M, D), make(D, N, scale=N**-0.5), make(M, N)
    forward, backward = pick("frozen_mlp", frozen_mlp.gelu_forward, u), pick("frozen_mlp", frozen_mlp.gelu_backward, u)
    ops = cuda_ops()

    def unfused_forward() -> tuple[Tensor, Tensor]:
        z = torch.addmm(b1, h, w1.t())
        return forward(z), z

    def plain_forward(h: Tensor, w1: Tensor, b1: Tensor) -> tuple[Tensor, Tensor]:
        z = F.linear(h, w1, b1)
        return F.gelu(z, approximate="tanh"), z

    def plain_backward(dbranch: Tensor, w2: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        return gelu_backward(dbranch @ w2, u)

    compiled_forward = torch.compile(plain_forward, mode="max-autotune-no-cudagraphs", dynamic=False)
    compiled_backward = torch.compile(plain_backward, mode="max-autotune-no-cudagraphs", dynamic=False)
    table: dict[str, dict[str, Callable[[], Any]]] = {
        "linear_gelu": {
            "mm": lambda: torch.mm(h, w1.t()),
            "unfused": unfused_forward,
            "compile": lambda: compiled_forward(h, w1, b1),
        },
        "dgelu_dgrad": {
            "mm": lambda: torch.mm(dbranch, w2),
            "unfused": lambda: backward(torch.mm(dbranch, w2), u),
            "compile": lambda: compiled_backward(dbranch, w2, u),
        },
        "colsum": {"triton": lambda: triton_colsum(u), "torch": lambda: u.sum(0, dtype=torch.float32)},
    }
    if ops is not None:
        table["linear_gelu"]["cublaslt"] = lambda: ops.linear_gelu(h, w1, b1)
        table["dgelu_dgrad"]["cublaslt"] = lambda: ops.dgelu_dgrad(dbranch, w2, u)
        table["colsum"]["cuda"] = lambda: ops.colsum(u)
    return table


def triton_colsum(x: Tensor) -> Tensor:
    from difffit_fast.ops.colsum import colsum_reference
    from difffit_fast.ops.dispatch import pick

    return pick("colsum", colsum_reference, x)(x)


def graphed(call: Callable[[], Any]) -> Callable[[], None]:
    """``call`` as a CUDA graph, after three ordinary runs (compilation, choice of algorithms)."""
    from difffit_fast.graph import capture

    def step() -> None:
        call()

    return capture(step)


def measure(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Microseconds of every call, ``rounds`` times, in turn, each after the L2 cache was overwritten."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    replays = {name: graphed(call) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(rounds + 3):
        for name, replay in replays.items():
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            flush.zero_()
            start.record()
            replay()
            stop.record()
            stop.synchronize()
            if round_ >= 3:
                times[name].append(start.elapsed_time(stop) * 1000)
    return times


def row_of(operation: str, M: int, D: int, variant: str, times: list[float]) -> dict[str, Any]:
    low, *_, high = statistics.quantiles(times, n=10)
    middle = statistics.median(times)
    flops, moved = (0, 8 * M * D) if operation == "colsum" else (8 * M * D**2, 0)
    return {
        "operation": operation, "M": M, "variant": variant, "median_us": middle, "p10": low, "p90": high,
        "tflops": flops / middle / 1e6, "gbs": moved / middle / 1e3,
    }  # fmt: skip


def print_row(row: dict[str, Any]) -> None:
    print(
        f"{row['operation']:12} {row['M']:6} {row['variant']:9} {row['median_us']:10.1f} {row['p10']:8.1f} "
        f"{row['p90']:8.1f} {row['tflops']:8.1f} {row['gbs']:7.0f}",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--width", type=int, default=1152, help="D; the hidden width is 4·D")
    parser.add_argument("--images", nargs="+", type=int, default=[32, 8], help="M is 256 times each (32 8)")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seconds", type=float, help="begin no further table after that time")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_linear_gelu: there is no CUDA device here, so nothing was measured.")
        return 0

    from difffit_fast.ops import linear_gelu as ours
    from difffit_fast.ops.dispatch import cuda_ops

    device = torch.cuda.get_device_name()
    where = f"{device}, PyTorch {torch.__version__}, CUDA {torch.version.cuda}, cuBLASLt {ours.report()['cublaslt']}"
    print(f"{where}, {options.dtype}, D = {options.width}\n")
    if cuda_ops() is None:
        print("The CUDA sources were not built: the columns cublaslt and cuda are missing.\n")
    print(f"{'operation':12} {'M':>6} {'variant':9} {'median µs':>10} {'10%':>8} {'90%':>8} {'TFLOP/s':>8} {'GB/s':>7}")
    start = time.monotonic()
    tables: dict[tuple[str, int], list[dict[str, Any]]] = {}
    record = {"where": where, "date": time.strftime("%Y-%m-%d"), "dtype": options.dtype, "width": options.width}
    for compiled in (False, True):  # the second time once more in turn with the others, for tables that have it
        for M in (TOKENS * images for images in options.images):
            for operation, calls in variants(M, options.width, getattr(torch, options.dtype)).items():
                if compiled and "compile" not in calls:
                    continue
                if options.seconds and time.monotonic() - start > options.seconds:
                    record.setdefault("left_out", []).append(f"{operation} M={M}{', compiled' if compiled else ''}")
                    continue
                if not compiled:
                    calls.pop("compile", None)
                try:
                    times = measure(calls, options.rounds)
                except RuntimeError as error:  # one table that fails must not lose the others
                    record.setdefault("failed", {})[f"{operation} M={M}"] = str(error)[:400]
                    continue
                tables[operation, M] = table = [row_of(operation, M, options.width, n, t) for n, t in times.items()]
                for row in table:
                    print_row(row)
                if options.json:
                    write_json(options.json, {**record, "rows": [row for t in tables.values() for row in t]})
    return 0


if __name__ == "__main__":
    sys.exit(main())
