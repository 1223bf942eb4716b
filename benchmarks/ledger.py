#!/usr/bin/env python
"""A ledger of the training step: every kernel launch in order, with its bytes, its operations and a predicted time.

    python benchmarks/ledger.py                                   # DiT-XL/2, 256 px, batch 32, an H200
    python benchmarks/ledger.py --blocks                          # equal blocks as one
    python benchmarks/ledger.py --mode full --device h100         # full fine-tuning, compiled
    python benchmarks/ledger.py --mode fast-fp8 --device h100     # frozen weights multiplied in eight bits
    python benchmarks/ledger.py --choose linear_gelu=cublaslt dgelu_dgrad=cublaslt
    python benchmarks/ledger.py --markdown                        # rewrite the tables of docs/performance.md and eight-bit.md
    python benchmarks/ledger.py --check                           # write nothing; fail if they are not what it says

**Everything here is predicted; nothing is measured, and no GPU is needed.** The launches are those of the code as it runs
(:mod:`ledger_trace`), what each costs is arithmetic (:mod:`ledger_costs`). Full fine-tuning and frozen PyTorch are traced
in eager mode, and what a compiler would leave of them is assumed (:mod:`ledger_fusion`).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import ledger_docs
from ledger_costs import DEVICES, Launch
from ledger_step import MODES, config_of, step, summary

from difffit_fast import DiffFitError
from difffit_fast._files import write_text


# -- as text -----------------------------------------------------------------------------------------------------------
def collapsed(found: list[Launch]) -> Iterator[tuple[str, int, list[Launch]]]:
    """(title, how often, launches): runs of blocks with the same launches come once."""
    parts = [(where, list(part)) for where, part in groupby(found, key=lambda one: one.where)]
    same = [(where, part, [one._replace(where="") for one in part]) for where, part in parts]
    at = 0
    while at < len(same):
        end = at + 1
        while end < len(same) and same[end][2] == same[at][2] and same[at][0].startswith("block"):
            end += 1
        first, last = same[at][0], same[end - 1][0]
        title = first if end == at + 1 else f"{first.rpartition(' ')[0]}–{last.split()[1]} {first.split()[-1]}"
        yield title, end - at, same[at][1]
        at = end


def lines(found: list[Launch], device: str, collapse: bool) -> Iterator[str]:
    """The ledger as text."""
    yield f"{'operation':<25}{'launch':<34}{'shape':<22}{'kind':<18}{'count':>5}{'MB':>9}{'GFLOP':>9}{'µs':>8}"
    parts = collapsed(found) if collapse else ((w, 1, list(p)) for w, p in groupby(found, key=lambda one: one.where))
    for title, times, part in parts:
        us = sum(one.microseconds(device) for one in part)
        count = sum(one.count for one in part)
        megabytes = sum(one.bytes for one in part) / 1e6
        repeated = f" × {times}" if times > 1 else ""
        yield f"-- {title}{repeated}: {count} launches, {megabytes:.1f} MB, {us:.1f} µs predicted" + (
            " each" if repeated else ""
        )
        for one in part:
            yield (
                f"{one.op:<25}{one.name:<34}{one.shape:<22}{one.kind:<18}{one.count:>5}{one.bytes / 1e6:>9.2f}"
                f"{one.flops / 1e9:>9.1f}{one.microseconds(device):>8.1f}"
            )


def totals(about: dict[str, Any], device: str) -> Iterator[str]:
    """Sums by kind, and what the step is predicted to take."""
    yield f"{'kind':<20}{'launches':>9}{'GB':>9}{'TFLOP':>9}{'predicted ms':>14}"
    for kind, one in (*about["kinds"].items(), ("sum", about)):
        yield (
            f"{kind:<20}{one['launches']:>9.0f}{one['gigabytes']:>9.3f}{one['teraflop']:>9.3f}{one['ms'][device]:>14.2f}"
        )
    half = about["forward and backward"]
    yield f"of which forward and backward: {half['launches']:.0f} launches, {half['ms'][device]:.2f} ms"
    graph, host = about["ms"][device], about["host_ms"]
    yield f"predicted for {device}: {graph:.1f} ms in a graph; {max(graph, host):.1f} ms in eager mode (host {host:.1f} ms)"


# -- the command -------------------------------------------------------------------------------------------------------
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="DiT-XL/2", help="a published size, e.g. DiT-B/2")
    parser.add_argument("--depth", type=int, help="another number of blocks")
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--device", choices=list(DEVICES), default="h200")
    parser.add_argument("--mode", choices=MODES, default="fast")
    parser.add_argument("--choose", nargs="+", default=[], metavar="OP=HOW", help="where the package times two ways")
    parser.add_argument("--blocks", action="store_true", help="print equal blocks once")
    parser.add_argument("--json", type=Path, help="write launches and sums there too")
    parser.add_argument("--markdown", action="store_true", help="rewrite the tables of docs/")
    parser.add_argument("--check", action="store_true", help="fail if they are out of date; write nothing")
    parser.add_argument(
        "--save-before", action="store_true", help="keep today's predictions as what later ones compare with"
    )
    args = parser.parse_args(argv)
    if args.markdown or args.check or args.save_before:
        return ledger_docs.run(args.check, args.save_before)
    config = config_of(args.model, args.image_size, **({"depth": args.depth} if args.depth is not None else {}))
    choices = dict(choice.split("=", 1) for choice in args.choose)
    try:
        found, host_ms = step(args.mode, config, args.batch_size, args.device, choices)
    except (LookupError, DiffFitError) as error:
        print(error.args[0], file=sys.stderr)
        return 1
    about = summary(found, host_ms, (args.device,))
    what = f"{args.model}, {args.image_size} px, batch {args.batch_size}, {args.mode}"
    print(f"{what}: predicted, not measured\n")
    for line in (*lines(found, args.device, args.blocks), "", *totals(about, args.device)):
        print(line)
    if args.json:
        rows = [{**one._asdict(), "predicted_us": one.microseconds(args.device)} for one in found]
        record = {"predicted": True, "what": what, "device": args.device, "sums": about, "launches": rows}
        write_text(args.json, json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
