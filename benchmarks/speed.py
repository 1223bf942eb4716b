#!/usr/bin/env python
"""Training speed of DiffFit against the strongest full fine-tuning, in one interleaved run.

    python benchmarks/speed.py                                   # this machine's default, within three minutes
    python benchmarks/speed.py --modes all --seconds 0           # every mode, as long as it takes
    python benchmarks/speed.py --modes fast fast-int8            # what products in eight bits give, and how far they are off
    python benchmarks/speed.py --model DiT-XL/2 --batch-size 32 --dtype bf16 --json out.json --equal-memory 24 80

Every mode (modes.py) takes the same model, first weights, batch, precision and data; a step is forward, backward, fused AdamW
and EMA. On a CPU each mode first runs in a process of its own, which measures its peak memory and compiles what it compiles
(on CUDA the allocator tells the peak while a mode is built). Then the modes are built one after another and checked
(speed_check.py): one whose output or gradients are wrong is reported and gets no ratio. Then rounds: one step of each mode
in turn, and the floor, which is the same sequence of matrix products and attentions, nothing else, with the fastest
library call for each shape. A first table comes after three rounds; they go on until the ratios are settled
(speed_ratios.py) or the time is up. The file of --json is there after every mode and every few rounds, and says
"complete": false until the run has ended.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from machine import DTYPES, default_dtype
from modes import MODES, available_modes
from speed_memory import measure
from speed_report import print_table
from speed_run import Run

# What runs unless --modes says otherwise, what matters most first: the strongest baselines that three minutes hold.
# On a CPU a model compiled as a whole is faster than one compiled by blocks, which is no faster than eager.
DEFAULT_CPU = ("fast", "full", "frozen", "full-compile", "frozen-compile")
DEFAULT_CUDA = (
    "fast-graph",
    "full-graph",
    "full-blocks",
    "fast",
    "frozen-blocks",
    "full",
    "frozen",
    "full-blocks-graph",
)
SECONDS = 170.0


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="DiT-XL/2 on CUDA, DiT-S/2 on the CPU")
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=None, help="32 on CUDA, 4 on the CPU")
    parser.add_argument(
        "--dtype", choices=sorted(DTYPES), default=None, help="bf16 where the hardware has it, else fp32"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--modes",
        nargs="+",
        choices=("all", *MODES),
        default=None,
        metavar="MODE",
        help="all, or of " + ", ".join(MODES),
    )
    parser.add_argument(
        "--steps", type=int, default=None, help="so many rounds, instead of until the ratios are settled"
    )
    parser.add_argument(
        "--inner", type=int, default=None, help="steps between synchronisations (5 on CUDA, 1 on the CPU)"
    )
    parser.add_argument(
        "--warmup", type=int, default=None, help="untimed steps after the one that is checked (3; CPU 0)"
    )
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for everything ({SECONDS:g}); 0: no limit")
    parser.add_argument("--num-classes", type=int, default=101)
    parser.add_argument(
        "--no-memory", action="store_true", help="on a CPU, skip the processes that measure peak memory"
    )
    parser.add_argument(
        "--equal-memory",
        nargs="+",
        type=float,
        metavar="GB",
        help="also the largest batch that fits (1 GB is 10⁹ bytes)",
    )
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--measure", default=None, choices=MODES, help=argparse.SUPPRESS)
    parser.add_argument("--cap-bytes", type=int, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    cuda = device.type == "cuda"
    if cuda and not torch.cuda.is_available():
        parser.error("--device cuda, but PyTorch sees no CUDA device")
    args.model = args.model or ("DiT-XL/2" if cuda else "DiT-S/2")
    args.batch_size = args.batch_size or (32 if cuda else 4)
    args.dtype = args.dtype or default_dtype(device)
    args.inner = args.inner or (5 if cuda else 1)
    args.warmup = (3 if cuda else 0) if args.warmup is None else args.warmup
    if args.threads:
        torch.set_num_threads(args.threads)
    from difffit_fast.models.dit import DiT_models

    if args.model not in DiT_models:
        parser.error(f"--model must be one of {', '.join(DiT_models)}")
    with torch.device("meta"):
        args.config = DiT_models[args.model](input_size=args.image_size // 8, num_classes=args.num_classes).config
    args.modes = args.modes or list(DEFAULT_CUDA if cuda else DEFAULT_CPU)
    if "all" in args.modes:
        args.modes = available_modes(device)
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.measure:
        print(json.dumps(measure(args, args.measure, DTYPES[args.dtype])), flush=True)
        return 0
    if args.device == "cpu" and args.dtype == "bf16" and default_dtype(torch.device("cpu")) != "bf16":
        print("note: this CPU has no bf16 matrix instructions; PyTorch emulates them and the baselines suffer from it")
    print_table(Run(args).execute())
    if args.json:
        print(f"\nwritten to {args.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
