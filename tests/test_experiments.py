"""What the experiments share: intervals, verdicts, pages."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

from difffit_fast.errors import DiffFitError

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "experiments"))
if not (ROOT / "experiments").is_dir():
    pytest.skip("the experiments are not part of this installation", allow_module_level=True)
pytest.importorskip("scipy")

import reporting  # noqa: E402


def test_interval_is_students():
    from scipy import stats

    values = [1.0, 2.5, 2.0, 4.0, 3.5]
    low, high = stats.t.interval(0.95, 4, loc=sum(values) / 5, scale=stats.sem(values))
    found = reporting.interval(values)
    assert found.mean - found.half == pytest.approx(low) and found.mean + found.half == pytest.approx(high)
    assert reporting.interval([3.0]).half == math.inf


def test_verdicts():
    interval = reporting.Interval
    assert reporting.verdict(interval(-2.0, 1.0, 5)) == "holds"
    assert reporting.verdict(interval(2.0, 1.0, 5)) == "the reverse"
    assert reporting.verdict(interval(-2.0, 2.5, 5)) == "undecided"
    assert reporting.verdict(interval(-2.0, math.inf, 1)) == "undecided"
    first, second = {0: {"m": 1.0}, 1: {"m": 2.0}}, {1: {"m": 2.5}, 0: {"m": 1.5}, 7: {"m": 99.0}}
    assert reporting.paired(first, second, "m") == (-0.5, 0.0, 2)


def test_only_what_is_between_the_markers_is_replaced(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- it: begin -->STALE<!-- it: end -->after\n")
    reporting.replace_block(page, "it", "new")
    assert page.read_text() == "before\n<!-- it: begin -->\nnew\n<!-- it: end -->after\n"


def test_page_without_markers_is_refused(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- resolution: end --> <!-- resolution: begin -->")
    with pytest.raises(DiffFitError, match="must hold"):
        reporting.replace_block(page, "resolution", "text")
