"""What the experiments share: the file of their results, intervals and what follows from them, tables, plots and pages."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from difffit_fast._extras import require
from difffit_fast._files import write_text
from difffit_fast.errors import DiffFitError


class Results:
    """A JSON-lines file of runs by key, rewritten beside and renamed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.runs: dict[str, dict[str, Any]] = {run["key"]: run for run in map(json.loads, lines)}

    def add(self, run: dict[str, Any]) -> None:
        self.runs[run["key"]] = run
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.path, "".join(json.dumps(self.runs[k]) + "\n" for k in sorted(self.runs)))


class Interval(NamedTuple):
    """Mean and half width of its 95 % confidence interval (Student's t; infinite for a single value)."""

    mean: float
    half: float
    n: int

    def __str__(self) -> str:
        if self.half == math.inf:
            return f"{self.mean:.3f} (one run)"
        digits = max(0, 2 - math.floor(math.log10(self.half))) if self.half > 0 else 3
        return f"{self.mean:.{digits}f} ± {self.half:.{digits}f}"


def interval(values: Sequence[float]) -> Interval:
    n = len(values)
    if n < 2:
        return Interval(float(np.mean(values)), math.inf, n)
    t = require("scipy.stats", "eval", "confidence intervals").t.ppf(0.975, n - 1)
    return Interval(float(np.mean(values)), float(t * np.std(values, ddof=1) / math.sqrt(n)), n)


def verdict(difference: Interval) -> str:
    """Of "the first is better", from the interval of first − second; smaller is better."""
    if not difference.mean + difference.half >= 0:
        return "holds"
    return "the reverse" if difference.mean - difference.half > 0 else "undecided"


def paired(first: dict[int, dict], second: dict[int, dict], metric: str) -> Interval | None:
    """Interval of first − second over the seeds that both have."""
    seeds = sorted(set(first) & set(second))
    return interval([first[s][metric] - second[s][metric] for s in seeds]) if seeds else None


def seeds_said(counts: Sequence[int]) -> str:
    """How many seeds runs have, in words."""
    low, high = min(counts), max(counts)
    return f"{high} seed{'s' if high > 1 else ''}" if low == high else f"{low} to {high} seeds"


# -- pages and plots ---------------------------------------------------------------------------------------------------


def replace_block(page: Path, name: str, text: str) -> None:
    """Put ``text`` between the markers ``<!-- name: begin -->`` and ``<!-- name: end -->`` of a page."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    old = page.read_text(encoding="utf-8")
    if old.count(begin) != 1 or old.count(end) != 1 or old.index(begin) > old.index(end):
        raise DiffFitError(f"{page} must hold {begin} and, after it, {end}, once each")
    head, rest = old.split(begin)
    write_text(page, f"{head}{begin}\n{text}\n{end}{rest.split(end)[1]}")


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def save_figure(path: Path, draw: Callable[[Any], Any]) -> None:
    """Let ``draw`` make a figure with pyplot and write it beside ``path``, then rename."""
    matplotlib = require("matplotlib", "eval", "plots")
    matplotlib.use("Agg")
    plt = require("matplotlib.pyplot", "eval", "plots")
    figure = draw(plt)
    temporary = path.with_name(f".tmp-{path.name}")
    figure.savefig(temporary, dpi=110, format="png", metadata={"Software": None})
    plt.close(figure)
    temporary.replace(path)
