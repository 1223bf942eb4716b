#!/usr/bin/env python
"""Where one training step goes, kernel by kernel: time, share, count; and the time in which the device waited.

    python benchmarks/profile_step.py                              # this device's default model, our model
    python benchmarks/profile_step.py --mode frozen-compile --batch-size 8 --json out.json

On CUDA the rows are kernels and their time on the device; on the CPU they are operators and their own time. The step is
that of speed.py: forward, backward, AdamW, EMA.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import environment, write_json
from machine import DTYPES, default_dtype, synchronize
from modes import MODES, build_mode, make_batch
from torch.profiler import ProfilerActivity, profile

# The first group one of whose words is in the (lower-case) name of a kernel or operator has it.
GROUPS = {
    "ours": ("adaln", "residual", "gelu_backward_kernel", "gelu_forward_kernel", "colsum", "modulation",
             "scale_qkv", "pack_dqkv", "quantize_kernel", "quantize_rotated_kernel", "rescale_kernel", "finish_kernel",
             "difffit_fast"),
    "attention": ("attention", "flash", "fmha", "sdpa", "cudnn_generated", "bmm"),
    "matrix products": ("gemm", "cutlass", "nvjet", "cublas", "xmma", "aten::mm", "aten::addmm", "linear_pointwise",
                        "mkldnn", "int_mm", "scaled_mm", "qlinear"),
    "optimizer and EMA": ("adam", "lerp", "multi_tensor"),
    "copies and casts": ("memcpy", "memset", "copy", "aten::to", "aten::cat", "catarray", "fill", "zero"),
    "torch.compile": ("triton_", "cpp_fused"),
}  # fmt: skip


def group_of(name: str) -> str:
    """The line of the summary that a kernel or operator belongs to."""
    lower = name.lower()
    return next((g for g, words in GROUPS.items() if any(w in lower for w in words)), "other")


def collect(prof: profile, cuda: bool, steps: int) -> list[dict[str, Any]]:
    """One row a kernel (CUDA) or operator (CPU), the longest first, per step."""
    total: dict[str, list[float]] = {}
    for event in prof.key_averages():
        on_device = str(event.device_type).endswith("CUDA")
        if cuda != on_device or event.key.startswith(("ProfilerStep", "Activity Buffer", "Lazy Function")):
            continue
        us = event.self_device_time_total if cuda else event.self_cpu_time_total
        entry = total.setdefault(event.key, [0.0, 0.0])
        entry[0] += us
        entry[1] += event.count
    whole = sum(us for us, _ in total.values()) or 1.0
    rows = [
        {
            "name": name, "group": group_of(name), "ms": us / 1e3 / steps, "share": us / whole,
            "count": count / steps, "us_each": us / max(count, 1),
        }
        for name, (us, count) in total.items()
        if us > 0
    ]  # fmt: skip
    return sorted(rows, key=lambda r: -r["ms"])


def summarise(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    groups: dict[str, dict[str, float]] = {}
    for r in rows:
        g = groups.setdefault(r["group"], {"ms": 0.0, "share": 0.0, "count": 0.0})
        for key in g:
            g[key] += r[key]
    return dict(sorted(groups.items(), key=lambda item: -item[1]["ms"]))


def run(args: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(args.device)
    cuda = device.type == "cuda"
    mode = build_mode(
        args.mode, args.config, DTYPES[args.dtype], device, make_batch(args.config, args.batch_size, device)
    )
    for _ in range(args.warmup):
        mode.step()
    synchronize(device)
    start = time.perf_counter()
    for _ in range(args.steps):
        mode.step()
    synchronize(device)
    step_ms = 1e3 * (time.perf_counter() - start) / args.steps
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    with profile(activities=activities) as prof:
        for _ in range(args.steps):
            mode.step()
        synchronize(device)
    rows = collect(prof, cuda, args.steps)
    busy = sum(r["ms"] for r in rows)
    return {
        **environment(device), "model": args.model, "image_size": args.image_size, "batch_size": args.batch_size,
        "dtype": args.dtype, "mode": args.mode, "steps": args.steps, "step_ms": step_ms, "busy_ms": busy,
        "idle_ms": max(0.0, step_ms - busy) if cuda else None, "groups": summarise(rows), "rows": rows,
    }  # fmt: skip


def print_table(result: dict[str, Any], top: int) -> None:
    what = f"{result['model']}, {result['image_size']} px, batch {result['batch_size']}, {result['dtype']}, {result['mode']}"
    print(f"{what}\n{result['device']}, PyTorch {result['torch']}, {result['date']}\n")
    print(f"step {result['step_ms']:.2f} ms without the profiler; sum of the rows {result['busy_ms']:.2f} ms")
    if result["idle_ms"] is not None:
        print(f"the device waits {result['idle_ms']:.2f} ms of a step")
    print(f"\n{'group':24}{'ms':>9}{'share':>8}{'count':>8}")
    for name, g in result["groups"].items():
        print(f"{name:24}{g['ms']:9.3f}{g['share']:8.1%}{g['count']:8.0f}")
    print(f"\n{'ms':>9}{'share':>8}{'count':>8}{'µs each':>10}  name")
    for r in result["rows"][:top]:
        print(f"{r['ms']:9.3f}{r['share']:8.1%}{r['count']:8.0f}{r['us_each']:10.1f}  {r['name'][:100]}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="DiT-XL/2 on CUDA, DiT-S/2 on the CPU")
    parser.add_argument("--mode", choices=MODES, default="fast")
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--batch-size", type=int, help="32 on CUDA, 4 on the CPU")
    parser.add_argument("--dtype", choices=sorted(DTYPES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--top", type=int, default=30, help="rows to print; the file has them all")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    from difffit_fast.models.dit import DiT_models

    cuda = torch.device(args.device).type == "cuda"
    args.model = args.model or ("DiT-XL/2" if cuda else "DiT-S/2")
    args.batch_size = args.batch_size or (32 if cuda else 4)
    args.dtype = args.dtype or default_dtype(torch.device(args.device))
    if args.model not in DiT_models:
        parser.error(f"--model must be one of {', '.join(DiT_models)}")
    with torch.device("meta"):
        args.config = DiT_models[args.model](input_size=args.image_size // 8, num_classes=101).config
    result = run(args)
    print_table(result, args.top)
    if args.json:
        write_json(args.json, result)
        print(f"\nwritten to {args.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
