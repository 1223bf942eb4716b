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
ARCHITECTURES = (80, 90, 100, 120)
ROW_KERNELS = ["adaln_forward", "adaln_backward", "residual_adaln_forward", "residual_adaln_backward"]
LAUNCHERS = [
    *ROW_KERNELS,
    "residual_adaln_backward, no dy",
    "residual_adaln_forward, fp8",
    "residual_adaln_backward, fp8",
    "residual_adaln_backward, fp8, no dy",
    "residual_forward",
    "residual_backward",
    "gelu_forward",
    "gelu_backward",
    "gelu_forward, a bias each",
    "gelu_backward, a bias each",
    "gelu_forward_fp8",
    "gelu_backward_fp8",
    "gelu_forward_fp8, a bias each",
    "gelu_backward_fp8, a bias each",
    "colsum",
    "modulation_forward",
    "modulation_backward",
    "scale_qkv",
    "pack_dqkv",
    "quantize_int8",
    "quantize_int8, of fc2",
    "quantize_fp8",
    "quantize_fp8, of fc2",
    "quantize_fp8, rotated",
    "rescale",
]
PRODUCTS = ["product_int8", "product_int8, of fc2"]
ATTENTION = [f"attention_{way}{gains}" for way in ("forward", "backward") for gains in ("", ", no gains")]


def resources(folder: Path, *arguments: str) -> list[dict]:
    """The rows that the script writes; a process of its own, for this one may hold Triton's interpreter."""
    out = folder / "rows.json"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    script = str(ROOT / "benchmarks" / "kernel_resources.py")
    command = [sys.executable, script, "--json", str(out), "--processes", "2", *arguments]
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert out.exists(), run.stdout[-3000:] + run.stderr[-3000:]
    print(run.stdout)
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """Every launcher at D = 1152 with a float32 residual stream and bfloat16 branches, for every architecture."""
    architectures = [str(arch) for arch in ARCHITECTURES]
    folder = tmp_path_factory.mktemp("resources")
    return resources(folder, "--dim", "1152", "--arch", *architectures, "--kernel", *LAUNCHERS, *ATTENTION, *PRODUCTS)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_spills_and_wide_loads(rows: list[dict], arch: int) -> None:
    mine = [row for row in rows if row["arch"] == arch]
    every = (*LAUNCHERS, *ATTENTION, *PRODUCTS)
    assert {row["launcher"] for row in mine} == {n for n in every if arch > 80 or "fp8" not in n}
    for row in mine:
        assert row["spill"] == 0, row
        assert row["widest_load"] == 128, row
        if row["launcher"] in LAUNCHERS:
            assert row["resident"] >= 2, (
                f"too few programs fit on a multiprocessor to hide the latency of memory: {row}"
            )


def attention_kernels(rows: list[dict]) -> list[dict]:
    return [row for row in rows if row["kernel"] in ("attention_forward", "attention_dq", "attention_dkdv")]


def test_attention_multiplies_by_warp_groups(rows: list[dict]) -> None:
    mine = attention_kernels([row for row in rows if row["arch"] == 90])
    assert len(mine) == 6
    for row in mine:
        assert row["HGMMA"] > row["fences"] and row["HMMA"] == 0, f"no products of warp groups, or one by one: {row}"


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_int8_products_are_those_of_tensor_cores(rows: list[dict], arch: int) -> None:
    mine = [row for row in rows if row["arch"] == arch and row["launcher"] in PRODUCTS]
    assert len(mine) == 2
    for row in mine:
        if arch == 90:
            assert row["IGMMA"] > row["fences"] and row["IMMA"] == 0, (
                f"no products of warp groups, or one by one: {row}"
            )
        else:
            assert row["IMMA"] > 0, row


@pytest.mark.reliability
def test_attention_of_other_heads(tmp_path: Path) -> None:
    """80, 96 and 128 channels on sm_90; ``make kernels`` compiles all of them for every architecture."""
    names = [f"attention_{way}, d={size}" for way in ("forward", "backward") for size in (80, 96, 128)]
    rows = attention_kernels(resources(tmp_path, "--dim", "1152", "--arch", "90", "--kernel", *names))
    assert len(rows) == 9
    for row in rows:
        assert row["spill"] == 0 and row["HGMMA"] > row["fences"] and row["HMMA"] == 0, row


@pytest.mark.reliability
def test_attention_where_registers_are_few(tmp_path: Path) -> None:
    """The widest heads on every architecture; and tokens that no block divides, as no published model has, where masks take a
    few registers more than there are: the backward of the keys may spill a little there."""
    names = ["attention_backward, d=128", "attention_forward, T=100", "attention_backward, T=100"]
    rows = attention_kernels(
        resources(tmp_path, "--dim", "1152", "--arch", "80", "90", "100", "120", "--kernel", *names)
    )
    assert len(rows) == 20
    for row in rows:
        ragged = "T=100" in row["launcher"] and row["kernel"] == "attention_dkdv"
        assert row["spill"] <= (24 if ragged else 0) and (row["arch"] != 90 or row["HGMMA"] > row["fences"]), row


@pytest.mark.reliability
def test_every_published_width(tmp_path: Path) -> None:
    """The kernels that hold whole rows, and attention of the heads of 64 that go with these widths, on the newest."""
    names = [*ROW_KERNELS, "residual_adaln_backward, no dy", "attention_backward"]
    rows = resources(tmp_path, "--dim", "384", "768", "1024", "--arch", "100", "--kernel", *names)
    assert {row["D"] for row in rows} == {384, 768, 1024}
    for row in rows:
        assert row["spill"] == 0 and row["widest_load"] == 128, row


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_rows_stay_in_registers(rows: list[dict], arch: int) -> None:
    """All the shared memory of a row kernel is one float32 per warp: nothing changes its layout on the way."""
    mine = [row for row in rows if row["arch"] == arch and row["kernel"] in ROW_KERNELS]
    assert {row["kernel"] for row in mine} == set(ROW_KERNELS)
    for row in mine:
        assert row["shared"] <= 4 * row["warps"], row


def test_small_width_and_one_type(tmp_path: Path) -> None:
    """D = 384, one warp to a row; also with one type throughout, where bfloat16 gives a thread twice the values."""
    rows = resources(tmp_path, "--dim", "384", "--arch", "90", "--uniform", "--kernel", "residual_adaln_backward")
    assert {row["types"] for row in rows} == {"f32/bf16", "bf16/bf16", "f32/f32"}
    for row in rows:
        assert row["spill"] == 0 and row["widest_load"] == 128, row
