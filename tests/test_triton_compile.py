"""Every Triton kernel is compiled for the architectures that are sold, without a GPU, and its binary is read.

The test holds what a later change could lose without any number becoming wrong: no spills, 16-byte loads, no shared
memory but for the exchange of row sums, and no kernel that an architecture cannot hold. ``benchmarks/kernel_resources.py``
prints the whole table, for more widths and types; here are the widths and types of training, each architecture once.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton", allow_module_level=True)

ROOT = Path(__file__).parents[1]
ROW_KERNELS = ["adaln_forward", "adaln_backward", "residual_adaln_forward", "residual_adaln_backward"]
OTHERS = [
    "residual_adaln_backward, no dy",
    "residual_forward",
    "residual_backward",
    "gelu_forward",
    "gelu_backward",
    "colsum",
    "qkv_scale",
    "qkv_backward",
    "qkv_backward, no gamma",
]


def resources(tmp_path: Path, *arguments: str) -> list[dict]:
    """The rows that the script writes; a process of its own, for this one may hold Triton's interpreter."""
    out = tmp_path / "rows.json"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "benchmarks" / "kernel_resources.py"), "--json", str(out), *arguments]
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert out.exists(), run.stdout[-3000:] + run.stderr[-3000:]
    print(run.stdout)
    return json.loads(out.read_text())


def check(rows: list[dict], count: int) -> None:
    assert len(rows) >= count
    for row in rows:
        assert row["spill"] == 0, row
        assert row["widest_load"] == 128, row
        assert row["resident"] >= 1, row


@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_row_kernels(tmp_path: Path, arch: int) -> None:
    """The four LayerNorm kernels at D = 1152, whose registers are the tightest."""
    rows = resources(tmp_path, "--arch", str(arch), "--dim", "1152", "--processes", "2", "--kernel", *ROW_KERNELS)
    check(rows, 6)  # each backward has a second stage
    for row in rows:
        if row["kernel"] != "finish":
            assert row["shared"] <= 64, f"pieces change their layout through shared memory: {row}"
            assert row["resident"] >= 3, f"too few programs fit to hide the latency of memory: {row}"


@pytest.mark.parametrize("arch", [90, 120])
def test_other_kernels(tmp_path: Path, arch: int) -> None:
    rows = resources(tmp_path, "--arch", str(arch), "--dim", "1152", "--processes", "2", "--kernel", *OTHERS)
    check(rows, 12)


def test_small_width(tmp_path: Path) -> None:
    """D = 384, one warp to a row, and one type throughout, where a thread holds twice the values."""
    rows = resources(
        tmp_path, "--arch", "90", "--dim", "384", "--processes", "2", "--uniform", "--kernel", *ROW_KERNELS[2:]
    )
    check(rows, 9)
