"""The tables that the ledger writes into docs/performance.md, between ``<!-- ledger:begin NAME -->`` and ``… end NAME``, and into
docs/eight-bit.md, between ``<!-- eight-bit-ledger:begin -->`` and ``… end``.

"before" is what ``--save-before`` kept in ``results/predicted/ledger-before.json``: predictions too, of the code as it was.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ledger_costs import DEVICES, FP8_BY_ROWS, KERNELS, OWN_INT8, Launch
from ledger_step import config_of, extrapolated, step, summary

from difffit_fast._files import write_text

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "performance.md"
EIGHT_BIT_PAGE = ROOT / "docs" / "eight-bit.md"
BEFORE = ROOT / "benchmarks" / "results" / "predicted" / "ledger-before.json"
MODEL, GPUS = "DiT-XL/2", ("h100", "h200")
PROBLEMS = ((256, 8), (256, 32), (256, 128), (512, 8), (512, 32))  # image size, batch
SHOWN, SHOWN_GPU = (256, 32), "h200"  # the problem of the detailed tables
EIGHT_BIT_GPUS, EIGHT_BIT_BATCHES = ("h100", "h200", "a100"), (8, 32, 128)
NOT_MEASURED = "not measured"
RESULTS = ROOT / "benchmarks" / "results"
# The profile of the shown step, and the kernels that have been rewritten since: what it says of them is not true of these.
PROFILE = RESULTS / "nvidia-h200" / "profile-256px-b32.json"
SINCE_PROFILE = ("attention_dq", "attention_dkdv", "finish")


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


def profiled() -> dict[str, float]:
    """What the profile measured of our kernels: name -> microseconds, the mean of all that have it."""
    rows = json.loads(PROFILE.read_text())["rows"]
    found = {row["name"].removeprefix("_").removesuffix("_kernel"): row["us_each"] for row in rows}
    return {name: us for name, us in found.items() if name in KERNELS and name not in SINCE_PROFILE}


def kernels(found: list[Launch]) -> str:
    """Every kernel of this package in the step of the shown problem."""
    measured = profiled()
    ours = [one for one in found if one.name in KERNELS]
    uses = Counter((one.kind, one.name, round(one.bytes / 1e6)) for one in ours)
    first = {(one.kind, one.name, round(one.bytes / 1e6)): one for one in reversed(ours)}

    def rows() -> Iterator[list[str]]:
        for key in sorted(uses, key=lambda k: -uses[k] * first[k].microseconds(SHOWN_GPU)):
            us = first[key].microseconds(SHOWN_GPU)
            megabytes = first[key].bytes / 1e6
            yield [
                f"`{key[1]}`", key[0], f"{megabytes:.0f}" if megabytes >= 10 else f"{megabytes:.1f}", f"{us:.1f}",
                str(uses[key]), f"{uses[key] * us / 1e3:.2f}", f"{measured.pop(key[1]):.1f}" if key[1] in measured else "",
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


# -- eight bits --------------------------------------------------------------------------------------------------------
Steps = dict[tuple[str, int, str], dict[str, Any]]  # (GPU, batch, "fast", "fast-fp8" or "fast-int8") -> its summary


def eight_bit_steps(now: dict[str, Any]) -> Steps:
    """``now``: the summaries of "fast" on Hopper by name, which are not traced again."""
    found: Steps = {}
    for gpus in (("h100", "h200"), ("a100",)):  # of one architecture
        kinds = DEVICES[gpus[0]].eight_bit
        for batch in EIGHT_BIT_BATCHES:
            for mode in ("fast", *(f"fast-{kind}" for kind in kinds)):
                known = now.get(_name((256, batch))) if mode == "fast" and gpus == GPUS else None
                about = known or summary(*step(mode, config_of(MODEL, 256), batch, gpus[0]), gpus)
                found |= {(gpu, batch, mode): about for gpu in gpus}
    return found


def eight_bit(found: Steps) -> str:
    """One row for every GPU and batch, and what the shown step is made of."""
    rate = DEVICES[SHOWN_GPU].eight_bit
    says = (
        f"{MODEL}, 256 px, a step in a CUDA graph. **All but the last column is predicted** by `benchmarks/ledger.py`. Eight-bit"
        f"\nproducts are assumed to reach the share of the datasheet's rate ({rate['int8']:.0f} TOP/s, A100 "
        f"{DEVICES['a100'].eight_bit['int8']:.0f}) that bfloat16's reach of\ntheirs, and those of fp8 {FP8_BY_ROWS:.0%} of that, "
        f"for scales by rows and sums kept in float32; int8's are of this package, at\n{OWN_INT8:.0%}, as measured."
    )

    def cells(key: tuple[str, int], mode: str) -> str:
        about = found.get((*key, mode))
        return (
            f"{about['launches']}, {about['gigabytes']:.1f} GB, {about['ms'][key[0]]:.1f} ms" if about else "not there"
        )

    def ratio(key: tuple[str, int], mode: str) -> str:
        about = found.get((*key, mode))
        return f"{found[(*key, 'fast')]['ms'][key[0]] / about['ms'][key[0]]:.2f}" if about else ""

    def measured(gpu: str, batch: int) -> str:
        path = RESULTS / f"nvidia-{gpu}" / f"eight-bit-256px-b{batch}.json"
        if not path.exists():
            return NOT_MEASURED
        modes = json.loads(path.read_text())["modes"]
        steps = (modes.get(f"{mode}-graph") for mode in ("fast", "fast-fp8", "fast-int8"))
        return ", ".join(f"{one['step_ms']['median']:.1f}" if one else "" for one in steps)

    def rows() -> Iterator[list[str]]:
        for gpu in EIGHT_BIT_GPUS:
            for batch in EIGHT_BIT_BATCHES:
                key = gpu, batch
                yield [
                    f"{gpu.upper()}, batch {batch}", *(cells(key, mode) for mode in ("fast", "fast-fp8", "fast-int8")),
                    ratio(key, "fast-fp8"), ratio(key, "fast-int8"), measured(gpu, batch),
                ]  # fmt: skip

    head = "predicted: launches, GB, ms | bf16 | fp8 | int8 | bf16 / fp8 | bf16 / int8 | measured ms: bf16, fp8, int8"
    sides = [found[SHOWN_GPU, SHOWN[1], mode] for mode in ("fast", "fast-fp8", "fast-int8")]

    def kind_rows() -> Iterator[list[str]]:
        for kind in dict.fromkeys(kind for side in sides for kind in side["kinds"]):
            parts = [side["kinds"].get(kind) for side in sides]
            yield [kind, *(f"{part['ms'][SHOWN_GPU]:.2f}" if part else "" for part in parts)]

    kind_head = f"predicted ms, {SHOWN_GPU.upper()}, batch {SHOWN[1]} | bf16 | fp8 | int8"
    return f"{says}\n\n{_table(head, rows())}\n\n{_table(kind_head, kind_rows())}"


# -- the command -------------------------------------------------------------------------------------------------------
def insert(text: str, name: str, table: str) -> str:
    """``text`` with the lines between the markers of ``name`` replaced.

    Raises:
        ValueError: the markers are not there, once each and in order.
    """
    return between(text, f"<!-- ledger:begin {name} -->", f"<!-- ledger:end {name} -->", table)


def between(text: str, begin: str, end: str, table: str) -> str:
    """The same for any two markers."""
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
    eight = eight_bit(eight_bit_steps(now))
    page, pages = PAGE, []
    try:
        before = json.loads(BEFORE.read_text())["steps"]
        text = new = page.read_text()
        for name, table in (
            ("step", steps(now, before, full, frozen)),
            ("kinds", kinds(now, before, full, frozen)),
            ("kernels", kernels(shown)),
            ("blocks", blocks(shown)),
        ):
            new = insert(new, name, table)
        pages.append((page, text, new))
        page = EIGHT_BIT_PAGE
        text = page.read_text()
        new = between(text, "<!-- eight-bit-ledger:begin -->", "<!-- eight-bit-ledger:end -->", eight)
        pages.append((page, text, new))
    except (OSError, ValueError) as error:
        print(f"{page}: {error}", file=sys.stderr)
        return 1
    stale = [(page, new) for page, text, new in pages if new != text]
    for page, new in stale:
        if check:
            print(f"{page}: its tables are not what the code launches; run python benchmarks/ledger.py --markdown")
        else:
            write_text(page, new)
    return int(check and bool(stale))
