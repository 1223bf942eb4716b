"""What speed.py prints: progress and the table."""

from __future__ import annotations

import math
import sys
import time
from typing import Any

from modes import frozen_dtype


class Progress:
    """One line that is written over on a terminal; anywhere else a line now and then."""

    def __init__(self, every: float = 15.0) -> None:
        self.terminal, self.every, self.last = sys.stdout.isatty(), every, -math.inf

    def show(self, text: str) -> None:
        if self.terminal:
            print(f"\r{text}\x1b[K", end="", flush=True)
        elif time.monotonic() - self.last >= self.every:
            print(text, flush=True)
            self.last = time.monotonic()

    def line(self, text: str) -> None:
        print(f"\r\x1b[K{text}" if self.terminal else text, flush=True)


def print_table(result: dict[str, Any]) -> None:
    head = f"{result['model']}, {result['image_size']} px, batch {result['batch_size']}, {result['dtype']}"
    print(f"\n{head}, {result['steps']} rounds\n{result['device']}, PyTorch {result['torch']}, {result['date']}\n")
    columns = (
        ("ms/step", 10),
        ("p10", 9),
        ("p90", 9),
        ("images/s", 10),
        ("peak MiB", 10),
        ("trainable", 13),
        ("stored MB", 11),
    )
    print(f"{'mode':20}" + "".join(f"{name:>{width}}" for name, width in columns))
    for name, m in [*result["modes"].items(), *result["without_ratio"].items()]:
        s, memory = m["step_ms"], m["peak_memory_bytes"]
        shown = f"{memory / 2**20:10.0f}" if memory else f"{'-':>10}"
        print(
            f"{name:20}{s['median']:10.1f}{s['p10']:9.1f}{s['p90']:9.1f}{m['images_per_second']:10.2f}{shown}"
            f"{m['trainable_parameters']:13,}{m['checkpoint_bytes'] / 1e6:11.2f}"
        )
    for kind in ("full", "frozen"):
        if f"{kind}_ms" in result["floor"]:
            print(f"{'floor ' + kind:20}{result['floor'][kind + '_ms']:10.1f}")
    for key, value in result["ratios"].items():
        if isinstance(value, dict):
            sure = (
                "95 % of the median: {:.2f} to {:.2f}".format(*value["interval"])
                if value["interval"]
                else "too few rounds"
            )
            rounds = f"single rounds {value['round_p10']:.2f} to {value['round_p90']:.2f}"
            settled = "" if value["settled"] else "; not settled"
            print(f"{key:20} {value['ratio']:.2f}x ({value['of']}; {sure}; {rounds}{settled})")
        elif isinstance(value, float):
            print(f"{key:20} {value:.2f}")
    for name, m in result["modes"].items():
        if frozen_dtype(name) != "bf16":
            off, cosine = m["check"]["gradient"], m["check"]["cosine"]
            print(f"{name:20} not the same numbers: a gradient is off by {off:.1%}; least cosine {cosine:.4f}")
    for name, why in result["failed"].items():
        print(f"{name:20} no ratio: {why}" if name in result["without_ratio"] else f"{name:20} {why}")
    if result["not_asked_for"]:
        print(f"not run: {', '.join(result['not_asked_for'])} (--modes all --seconds 0, or by name)")
    for gb, entry in (result["equal_memory"] or {}).items():
        for name, row in entry["modes"].items():
            rate = f"{row['images_per_second']:.2f} images/s" if row.get("images_per_second") else "not run"
            print(
                f"in {gb} GB {name:20} batch {row.get('batch_size', '-')}, {rate}; {row.get('found', row.get('problem'))}"
            )
