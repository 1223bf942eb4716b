"""The tables that the ledger writes into docs/performance.md, between ``<!-- ledger:begin NAME -->`` and ``… end NAME``.

"before" is what ``--save-before`` kept in ``results/predicted/ledger-before.json``: predictions too, of the code as it was.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ledger_costs import KERNELS, Launch
from ledger_step import config_of, extrapolated, step, summary

from difffit_fast._files import write_text

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "performance.md"
BEFORE = ROOT / "benchmarks" / "results" / "predicted" / "ledger-before.json"
MODEL, GPUS = "DiT-XL/2", ("h100", "h200")
PROBLEMS = ((256, 8), (256, 32), (256, 128), (512, 8), (512, 32))  # image size, batch
SHOWN, SHOWN_GPU = (256, 32), "h200"  # the problem of the detailed tables


def _name(problem: tuple[int, int]) -> str:
    return f"{problem[0]} px, batch {problem[1]}"


def _table(head: str, rows: Iterator[list[str]]) -> str:
    lines = [f"| {head} |", "|" + "---|" * (head.count("|") + 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


# -- the tables --------------------------------------------------------------------------------------------------------
def steps(now: dict[str, Any], before: dict[str, Any], full: dict[str, Any], frozen: dict[str, Any]) -> str:
    """One row for every GPU and problem."""
    head = (
        "predicted | launches: before → now | GB: before → now | TFLOP | ours in a graph, ms: before → now | ours, eager, ms "
        "| full fine-tuning, ms | frozen PyTorch, ms | full / ours"
    )

    def rows() -> Iterator[list[str]]:
        for gpu in GPUS:
            for name in map(_name, PROBLEMS):
                ours, then = now[name], before[name]
                ms = ours["ms"][gpu]
                yield [
                    f"{gpu.upper()}, {name}", f"{then['launches']} → {ours['launches']}",
                    f"{then['gigabytes']:.1f} → {ours['gigabytes']:.1f}", f"{ours['teraflop']:.1f}",
                    f"{then['ms'][gpu]:.1f} → **{ms:.1f}**", f"{max(ms, ours['host_ms']):.1f}",
                    f"{full[name]['ms'][gpu]:.1f}", f"{frozen[name]['ms'][gpu]:.1f}", f"**{full[name]['ms'][gpu] / ms:.2f}**",
                ]  # fmt: skip

    return _table(head, rows())


def kinds(now: dict[str, Any], before: dict[str, Any], full: dict[str, Any], frozen: dict[str, Any]) -> str:
    """What the step of the shown problem is made of."""
    name = _name(SHOWN)
    sides = [side[name] for side in (before, now, frozen, full)]

    def cells(side: dict[str, Any]) -> str:
        return f"{side['launches']:.0f}, {side['gigabytes']:.1f} GB, {side['ms'][SHOWN_GPU]:.2f} ms"

    def rows() -> Iterator[list[str]]:
        for kind in dict.fromkeys(kind for side in sides for kind in side["kinds"]):
            yield [kind, *(cells(side["kinds"][kind]) if kind in side["kinds"] else "" for side in sides)]
        yield ["**sum**", *(f"**{cells(side)}**" for side in sides)]

    return _table("kind, predicted | ours before | ours now | frozen PyTorch | full fine-tuning", rows())


def kernels(found: list[Launch]) -> str:
    """Every kernel of this package in the step of the shown problem."""
    ours = [one for one in found if one.name in KERNELS]
    uses = Counter((one.kind, one.name, round(one.bytes / 1e6)) for one in ours)
    first = {(one.kind, one.name, round(one.bytes / 1e6)): one for one in reversed(ours)}

    def rows() -> Iterator[list[str]]:
        for key in sorted(uses, key=lambda k: -uses[k] * first[k].microseconds(SHOWN_GPU)):
            us = first[key].microseconds(SHOWN_GPU)
            megabytes = first[key].bytes / 1e6
            yield [
                f"`{key[1]}`", key[0], f"{megabytes:.0f}" if megabytes >= 10 else f"{megabytes:.1f}", f"{us:.1f}",
                str(uses[key]), f"{uses[key] * us / 1e3:.2f}", "",
            ]  # fmt: skip
        sum_ms = sum(one.microseconds(SHOWN_GPU) for one in ours) / 1e3
        yield ["**sum**", "", "", "", f"**{len(ours)}**", f"**{sum_ms:.2f}**", ""]

    return _table("kernel | kind | MB | predicted µs | uses | predicted ms per step | measured µs", rows())


def blocks(found: list[Launch]) -> str:
    """The launches of the first and of the last but one block, forward and backward; small ones as a number."""
    depth = config_of(MODEL, 256)["depth"]

    def rows() -> Iterator[list[str]]:
        for title, index in (("with γ", 0), ("without γ", depth - 2)):
            for way in ("forward", "backward"):
                part = [one for one in found if one.where == f"block {index} {way}"]
                large = [one for one in part if one.kind != "small"]
                listed = ", ".join(
                    f"{one.op + ': ' if one.op and one.op != one.name else ''}{one.name} {one.bytes / 1e6:.0f} MB"
                    for one in large
                )
                small = sum(one.count for one in part) - sum(one.count for one in large)
                us = sum(one.microseconds(SHOWN_GPU) for one in part)
                yield [
                    f"{title}, {way}", str(sum(one.count for one in part)), f"{sum(one.bytes for one in part) / 1e6:.0f}",
                    f"{us:.0f}", listed + (f"; {small} small ones" if small else ""),
                ]  # fmt: skip

    return _table("block | launches | MB | predicted µs | in order", rows())


# -- the command -------------------------------------------------------------------------------------------------------
def insert(text: str, name: str, table: str) -> str:
    """``text`` with the lines between the markers of ``name`` replaced.

    Raises:
        ValueError: the markers are not there, once each and in order.
    """
    begin, end = f"<!-- ledger:begin {name} -->", f"<!-- ledger:end {name} -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"expected one line {begin} and after it one line {end}")
    before, rest = text.split(begin)
    return f"{before}{begin}\n\n{table}\n\n{end}{rest.split(end)[1]}"


def run(check: bool, save_before: bool) -> int:
    """Write the tables, or say whether they are up to date."""
    now, full, frozen = {}, {}, {}
    shown: list[Launch] = []
    for problem in PROBLEMS:
        config = config_of(MODEL, problem[0])
        found, host_ms = step("fast", config, problem[1])
        now[_name(problem)] = summary(found, host_ms)
        shown = found if problem == SHOWN else shown
        full[_name(problem)] = extrapolated("full", config, problem[1])
        frozen[_name(problem)] = extrapolated("frozen", config, problem[1])
    if save_before:
        record = {
            "predicted": True,
            "what": f"{MODEL}, ours, by benchmarks/ledger.py; nothing is measured",
            "steps": now,
        }
        BEFORE.parent.mkdir(parents=True, exist_ok=True)
        write_text(BEFORE, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    try:
        before = json.loads(BEFORE.read_text())["steps"]
        text = new = PAGE.read_text()
        for name, table in (
            ("step", steps(now, before, full, frozen)),
            ("kinds", kinds(now, before, full, frozen)),
            ("kernels", kernels(shown)),
            ("blocks", blocks(shown)),
        ):
            new = insert(new, name, table)
    except (OSError, ValueError) as error:
        print(f"{PAGE}: {error}", file=sys.stderr)
        return 1
    if check:
        if new != text:
            print(f"{PAGE}: its tables are not what the code launches; run python benchmarks/ledger.py --markdown")
        return int(new != text)
    if new != text:
        write_text(PAGE, new)
    return 0
