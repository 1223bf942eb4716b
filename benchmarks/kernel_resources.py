"""What the compiler made of every Triton kernel: registers, spills, shared memory, widest load. Needs no GPU.

    python benchmarks/kernel_resources.py                       # every kernel, every variant, sm_80 90 100 120
    python benchmarks/kernel_resources.py --arch 90 --dim 1152  # a part of it
    python benchmarks/kernel_resources.py --json table.json

The launchers themselves are called, with tensors of the training step's types, while a stand-in for the driver names
the architecture and compiles instead of running: what is measured is what a device of that architecture would be given.
The numbers are read from the binary with the ``cuobjdump`` that comes with Triton.

Attention is compiled for the head size that a DiT of that width has, "attention_forward" and "attention_backward", and for
the others by name: "attention_forward, d=80". "T=100" stands for a number of tokens that no block divides.

Columns: registers per thread; spill, the local-memory loads and stores in the machine code plus the stack frame in bytes
(all must be 0); shared memory in bytes; the widest global load in bits (128 wanted); as an aid to tuning, warps per program
and programs per multiprocessor that registers and shared memory allow; and which tensor cores are used how often: HMMA by
warps (sm_80, 120), HGMMA by groups of four (sm_90), UTCHMMA by one thread (sm_100); IMMA and IGMMA are those of int8, which
sm_100 has by warps alone. "one by one" is said of an HGMMA or IGMMA kernel whose products ptxas lets none overlap (its warning
C7510 ff.), which shows as a fence around each.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

ARCHITECTURES = (80, 90, 100, 120)
HEADS = {384: 64, 768: 64, 1024: 64, 1152: 72}  # channels of a head, by width of the published DiT
TENSOR_CORES = ("HMMA", "HGMMA", "UTCHMMA", "IMMA", "IGMMA")
HEAD_SIZES = (64, 72, 80, 96, 128)
# Registers and shared memory of a multiprocessor, most threads and most blocks on it (CUDA programming guide, table of
# compute capabilities).
_LIMITS = {
    80: (65536, 167936, 2048, 32),
    90: (65536, 233472, 2048, 32),
    100: (65536, 233472, 2048, 32),
    120: (65536, 102400, 1536, 24),
}


class _Driver:
    """Answers what Triton asks of a driver before it compiles. The device index is the architecture itself."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)


def variants(dim: int, x_dtype: torch.dtype, h_dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """Every launcher with tensors of width ``dim``, residual stream ``x_dtype`` and branches ``h_dtype``.

    Sizes are those of a small batch: they decide the grid, which is not used, and no constant of a kernel.
    """
    from difffit_fast.kernels import adaln, attention, colsum, eight_bit, frozen_mlp, modulation, residual

    B, T = 2, 256
    M, N = B * T, 4 * dim
    x = torch.empty(B, T, dim, dtype=x_dtype)
    h = torch.empty(B, T, dim, dtype=h_dtype)
    v = torch.empty(B, dim)
    stat = torch.empty(B, T)
    u, biases = torch.empty(M, N, dtype=h_dtype), torch.empty(B, N)
    qkv = torch.empty(M, 3 * dim, dtype=h_dtype)
    m, of_m, norm = torch.empty(B, 8, dim, dtype=h_dtype), torch.empty(8, dim), torch.empty(3, 2, dim)
    planes, per_branch = torch.empty(10, B, dim), torch.empty(2, dim)

    def attend(head_dim: int, R: int, T: int = T) -> tuple[Callable[[], Any], Callable[[], Any]]:
        """attention_forward and attention_backward for heads of that size, as many as dim holds."""
        H = max(dim // head_dim, 1)
        z, o = torch.empty(B, T, 3 * H * head_dim, dtype=h_dtype), torch.empty(B, T, H * head_dim, dtype=h_dtype)
        vectors, lse = torch.empty(1, R, H * head_dim), torch.empty(B, H, T)
        return (
            lambda: attention.attention_forward(z, vectors, H),
            lambda: attention.attention_backward(o, z, vectors, o, lse, H),
        )

    heads = {}
    for head_dim in (None, *HEAD_SIZES):
        for R, gains in ((3, ""), (1, ", no gains")):
            for tokens, ragged in ((256, ""), (100, ", T=100")):
                size = f", d={head_dim}" if head_dim else ""
                forward, backward = attend(head_dim or HEADS.get(dim, 64), R, tokens)
                heads[f"attention_forward{size}{gains}{ragged}"] = forward
                heads[f"attention_backward{size}{gains}{ragged}"] = backward
    z, packed = qkv.view(B, T, -1), {R: torch.empty(1, R, dim) for R in (1, 3)}
    return {
        "adaln_forward": lambda: adaln.adaln_forward(x, v, v, 1e-6, h_dtype),
        "adaln_backward": lambda: adaln.adaln_backward(h, x, v, stat, stat),
        "residual_forward": lambda: residual.residual_forward(x, h, v, v),
        "residual_backward": lambda: residual.residual_backward(x, h, v),
        "residual_adaln_forward": lambda: residual.residual_adaln_forward(x, h, v, v, v, v, 1e-6),
        "residual_adaln_backward": lambda: residual.residual_adaln_backward(h, x, x, h, v, v, stat, stat),
        "residual_adaln_backward, no dy": lambda: residual.residual_adaln_backward(h, None, x, h, v, v, stat, stat),
        "residual_adaln_forward, fp8": lambda: residual.residual_adaln_forward(x, h, v, v, v, v, 1e-6, True),
        "residual_adaln_backward, fp8": lambda: residual.residual_adaln_backward(h, x, x, h, v, v, stat, stat, True),
        "residual_adaln_backward, fp8, no dy": lambda: residual.residual_adaln_backward(
            h, None, x, h, v, v, stat, stat, True
        ),
        "gelu_forward": lambda: frozen_mlp.gelu_forward(u),
        "gelu_backward": lambda: frozen_mlp.gelu_backward(u, u),
        "gelu_forward, a bias each": lambda: frozen_mlp.gelu_forward(u, biases),
        "gelu_backward, a bias each": lambda: frozen_mlp.gelu_backward(u, u, biases),
        "gelu_forward_fp8": lambda: frozen_mlp.gelu_forward_fp8(u),
        "gelu_backward_fp8": lambda: frozen_mlp.gelu_backward_fp8(u, u),
        "gelu_forward_fp8, a bias each": lambda: frozen_mlp.gelu_forward_fp8(u, biases),
        "gelu_backward_fp8, a bias each": lambda: frozen_mlp.gelu_backward_fp8(u, u, biases),
        "colsum": lambda: colsum.colsum(u),
        "quantize_int8": lambda: eight_bit.quantize_int8(h.view(M, dim), True),
        "quantize_int8, of fc2": lambda: eight_bit.quantize_int8(u, True),
        "quantize_fp8": lambda: eight_bit.quantize_fp8(h.view(M, dim), False),
        "quantize_fp8, of fc2": lambda: eight_bit.quantize_fp8(u, False),
        "quantize_fp8, rotated": lambda: eight_bit.quantize_fp8(u, True),
        "rescale": lambda: eight_bit.rescale(
            torch.empty(M, N, dtype=torch.int32), torch.empty(M), torch.empty(N), None, h_dtype
        ),
        "product_int8": lambda: eight_bit.product_int8(
            torch.empty(M, dim, dtype=torch.int8),
            torch.empty(M),
            torch.empty(N, dim, dtype=torch.int8),
            torch.empty(N),
            None,
            h_dtype,
        ),
        "product_int8, of fc2": lambda: eight_bit.product_int8(
            torch.empty(M, N, dtype=torch.int8),
            torch.empty(M),
            torch.empty(dim, N, dtype=torch.int8),
            torch.empty(dim),
            torch.empty(dim),
            h_dtype,
        ),
        "modulation_forward": lambda: modulation.modulation_forward(m, of_m, norm, per_branch, per_branch),
        "modulation_backward": lambda: modulation.modulation_backward(planes, m, of_m, norm, per_branch, per_branch),
        "scale_qkv": lambda: attention.scale_qkv(z, packed[3]),
        "scale_qkv, no gains": lambda: attention.scale_qkv(z, packed[1]),
        "pack_dqkv": lambda: attention.pack_dqkv(h, h, h, z, packed[3]),
        "pack_dqkv, no gains": lambda: attention.pack_dqkv(h, h, h, z, packed[1]),
        **heads,
    }


def every_name(dim: int) -> tuple[str, ...]:
    """What ``make kernels`` compiles at width ``dim``: all but numbers of tokens that no block divides; and of attention the
    head size of that width, at the widest of DiT's the others too."""
    names = variants(dim, torch.float32, torch.float32)
    return tuple(name for name in names if "T=" not in name and ("d=" not in name or dim == max(HEADS)))


def compiled(arch: int, call: Callable[[], Any]) -> list[Any]:
    """The kernels that ``call`` would launch on ``arch``, compiled, in order."""
    from triton.runtime.driver import driver

    from difffit_fast.kernels import adaln, attention, colsum, config, eight_bit, frozen_mlp, modulation, residual, sums

    found: list[Any] = []

    def compile_instead(kernel: Any, programs: int, device: Any, *args: Any, **constants: Any) -> None:
        found.append(kernel.run(*args, grid=(programs,), warmup=True, **constants))

    modules = [
        m for m in (adaln, attention, colsum, eight_bit, frozen_mlp, modulation, residual, sums) if hasattr(m, "launch")
    ]
    saved = [(m, name, getattr(m, name)) for m in modules for name in ("launch", "architecture") if hasattr(m, name)]
    active = driver._active
    driver.set_active(_Driver(arch))
    try:
        for module, name, _ in saved:
            setattr(module, name, compile_instead if name == "launch" else lambda device: arch)
        call()
    finally:
        for module, name, value in saved:
            setattr(module, name, value)
        driver._active = active
    assert config.launch is not compile_instead
    return found


def _tool() -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


def inspect(kernel: Any, arch: int) -> dict[str, Any]:
    """Resources of one compiled kernel, read from its binary."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        usage = subprocess.run([_tool(), "-res-usage", str(cubin)], capture_output=True, text=True, check=True).stdout
        sass = subprocess.run([_tool(), "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    counts = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    loads = re.findall(r"\bLDG(?:STS)?\.E(\S*)", sass)
    stores = re.findall(r"\bSTG\.E(\S*)", sass)
    warps = kernel.metadata.num_warps
    registers, shared, threads, blocks = _LIMITS[arch]
    per_warp = -(-counts["REG"] * 32 // 256) * 256  # registers are handed out to warps in units of 256
    resident = min(
        registers // (per_warp * warps),
        shared // (kernel.metadata.shared + 1024),  # 1 KiB of every block is the system's
        threads // (32 * warps),
        blocks,
    )
    return {
        "kernel": kernel.metadata.name.strip("_").removesuffix("_kernel"),
        "arch": arch,
        "registers": counts["REG"],
        "spill": counts["STACK"] + counts["LOCAL"] + len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "shared": kernel.metadata.shared,
        "widest_load": _width(loads),
        "widest_store": _width(stores),
        "loads": len(loads),
        "warps": warps,
        "resident": resident,
        **{kind: len(re.findall(rf"\b{kind}\b", sass)) for kind in TENSOR_CORES},
        "fences": len(re.findall(r"\bWARPGROUP\.ARRIVE\b", sass)),
        "instructions": len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", sass, re.MULTILINE)),
    }


def _width(accesses: list[str]) -> int:
    """Bits of the widest access among the suffixes of LDG.E or STG.E."""
    widths = [int(m.group(1)) if (m := re.search(r"\.(64|128|256)\b", suffix)) else 32 for suffix in accesses]
    return max(widths, default=0)


def _job(job: tuple[int, int, str, torch.dtype, torch.dtype]) -> list[dict[str, Any]]:
    arch, dim, name, x_dtype, h_dtype = job
    torch.set_num_threads(1)
    kernels = compiled(arch, variants(dim, x_dtype, h_dtype)[name])
    short = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
    types = f"{short[x_dtype]}/{short[h_dtype]}"
    return [{"launcher": name, "D": dim, "types": types, **inspect(kernel, arch)} for kernel in kernels]


def table(
    architectures: tuple[int, ...] = ARCHITECTURES,
    dims: tuple[int, ...] = (384, 1152),
    types: tuple[tuple[torch.dtype, torch.dtype], ...] = ((torch.float32, torch.bfloat16),),
    names: tuple[str, ...] | None = None,
    processes: int = 2,
) -> list[dict[str, Any]]:
    """One row per kernel that each launcher would run, for every architecture, width and pair of types."""
    jobs = [
        (arch, dim, name, *pair)
        for pair in types
        for dim in dims
        for name in names or every_name(dim)
        for arch in architectures
        if arch > 80 or "fp8" not in name  # an A100 has no float8
    ]
    with ProcessPoolExecutor(processes) as pool:
        return [row for rows in pool.map(_job, jobs, chunksize=2) for row in rows]


def products(row: dict[str, Any]) -> str:
    """Instructions of a kernel that multiply matrices, and whether those of warp groups wait for each other."""
    found = [f"{row[kind]} {kind}" for kind in TENSOR_CORES if row[kind]]
    return ", ".join(found) + (" one by one" if row["fences"] >= row["HGMMA"] + row["IGMMA"] > 0 else "")


def lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The table as text. Identical rows (the second stage, which every reduction shares) are printed once."""
    yield (
        f"{'kernel':<26}{'launcher':<40}{'x/h':<11}{'D':>5}  sm   regs spill shared load store warps /SM  code  products"
    )
    seen = set()
    for row in rows:
        key = tuple(
            row[k] for k in row if k not in ("launcher", "D", "types") or not row["kernel"].startswith("finish")
        )
        if key in seen:
            continue
        seen.add(key)
        yield (
            f"{row['kernel']:<26}{row['launcher']:<40}{row['types']:<11}{row['D']:>5}  {row['arch']:<4}"
            f"{row['registers']:>5}{row['spill']:>6}{row['shared']:>7}{row['widest_load']:>5}{row['widest_store']:>6}"
            f"{row['warps']:>6}{row['resident']:>4}{row['instructions']:>6}  {products(row)}"
        )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHITECTURES), choices=ARCHITECTURES)
    parser.add_argument("--dim", type=int, nargs="+", default=[384, 768, 1024, 1152])
    parser.add_argument("--kernel", nargs="+", help="launchers to compile (default: all)")
    parser.add_argument("--uniform", action="store_true", help="also float32 and bfloat16 throughout")
    parser.add_argument("--json", type=Path, help="write the rows there too")
    parser.add_argument("--processes", type=int, default=min(8, os.cpu_count() or 1))
    args = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET"):
        sys.exit("kernel_resources compiles; unset TRITON_INTERPRET, which replaces the compiler by an interpreter")
    types = [(torch.float32, torch.bfloat16)]
    if args.uniform:
        types += [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32)]
    rows = table(
        tuple(args.arch), tuple(args.dim), tuple(types), tuple(args.kernel) if args.kernel else None, args.processes
    )
    for line in lines(rows):
        print(line)
    spilling = sorted({(row["kernel"], row["arch"]) for row in rows if row["spill"]})
    narrow = sorted({(row["kernel"], row["arch"]) for row in rows if row["widest_load"] < 128})
    print(f"\n{len(rows)} kernels compiled; spilling: {spilling or 'none'}; without 16-byte loads: {narrow or 'none'}")
    if args.json:
        beside = args.json.with_suffix(args.json.suffix + ".part")
        beside.write_text(json.dumps(rows, indent=1) + "\n")
        os.replace(beside, args.json)
    return 1 if spilling or narrow else 0


if __name__ == "__main__":
    sys.exit(main())
