"""The ledger counts what the step launches, to the launch: a copy that slips in fails here. It predicts and measures nothing.

A change that launches more or less on purpose changes the numbers below, and ``benchmarks/ledger.py --markdown`` the docs.
"""

from __future__ import annotations

import importlib
import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from difffit_fast.models import fast_dit

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parent.parent
DEPTH, BATCH = 4, 8  # blocks 0 and 1 have γ on qkv, 2 and 3 have not
# Launches, and MB read and written, by part of the model: D = 1152, 256 tokens, batch 8, preset "paper".
PINNED = {
    "stem and vectors": (91, 303.1),
    "block 0 forward": (8, 221.1),
    "block 1 forward": (8, 221.1),
    "block 2 forward": (8, 221.1),
    "block 3 forward": (8, 221.1),
    "head and loss": (13, 13.1),
    "block 3 backward": (11, 330.6),  # the last: its output has no other use
    "block 2 backward": (11, 340.0),
    "block 1 backward": (11, 344.7),
    "block 0 backward": (11, 344.7),
    "optimizer and EMA": (4, 50.4),
}
# Of a block in eight bits; what is outside the blocks is as above. All products but the forward of fc2: fp8 quantizes three of
# the seven inputs in kernels of their own, int8 all of them.
PINNED_EIGHT_BIT = {
    "fast-fp8": {"block 2 forward": (10, 215.3), "block 2 backward": (12, 310.0)},
    "fast-int8": {"block 2 forward": (11, 224.7), "block 2 backward": (15, 366.6)},
}
PINNED_XL = {"launches": 653, "forward and backward": 636, "gigabytes": 59.61}  # DiT-XL/2, 256 px, batch 32


@pytest.fixture(scope="module")
def ledger() -> Any:
    """The modules of the ledger, imported as the scripts do among themselves."""
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(ROOT / "benchmarks"))
    names = ("ledger", "ledger_costs", "ledger_docs", "ledger_fusion", "ledger_step", "ledger_trace")
    yield SimpleNamespace(**{n.removeprefix("ledger_"): importlib.import_module(n) for n in names})
    patch.undo()


def config(**more: Any) -> dict[str, Any]:
    return dict(depth=DEPTH, hidden_size=1152, num_heads=16, **more)


@pytest.fixture(scope="module")
def found(ledger) -> list[Any]:
    return ledger.step.step("fast", config(), BATCH)[0]


# -- what is counted -------------------------------------------------------------------------------------------------
def by_part(found: list[Any]) -> dict[str, tuple[int, float]]:
    launches, bytes = Counter(), Counter()
    for one in found:
        launches[one.where] += one.count
        bytes[one.where] += one.bytes
    return {where: (launches[where], round(bytes[where] / 1e6, 1)) for where in launches}


def test_launches_and_bytes_of_every_part(found) -> None:
    assert by_part(found) == PINNED


@pytest.mark.parametrize("mode", PINNED_EIGHT_BIT)
def test_launches_and_bytes_in_eight_bits(ledger, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    """Weights are not quantized in the step, whatever this machine would do in place of such products."""
    monkeypatch.setenv("DIFFFIT_FAST_EIGHT_BIT", "emulate")
    found, _ = ledger.step.step(mode, config(), BATCH)
    parts, names = by_part(found), Counter(one.name for one in found)
    assert {where: parts[where] for where in PINNED_EIGHT_BIT[mode]} == PINNED_EIGHT_BIT[mode]
    assert all(parts[where] == pinned for where, pinned in PINNED.items() if not where.startswith("block"))
    products = 7 * DEPTH  # all but the forward of fc2
    assert products == names["_scaled_mm" if mode == "fast-fp8" else "product"] and not names["rescale"]
    # In fp8 the rows of the inputs of qkv and proj, and dz, are quantized by themselves; the others leave their kernels so.
    kernel, times = ("quantize", 3 * DEPTH) if mode == "fast-fp8" else ("quantize_rotated", products)
    assert {name: n for name, n in names.items() if name.startswith("quantize")} == {kernel: times}
    elements = BATCH * 256 * 1152
    assert min(o.bytes for o in found if o.name == kernel) == pytest.approx(3 * elements, rel=0.002)
    if mode == "fast-int8":
        of_both = {name: _int8_product(ledger, name) for name in ("library", "triton")}
        assert {name: len(of["rescale"]) for name, of in of_both.items()} == {"library": products, "triton": 0}
        assert min(of_both["library"]["rescale"]) == pytest.approx(6 * elements, rel=0.002)
        assert 0 < sum(of_both["triton"]["product"]) < sum(of_both["library"]["_int_mm"])  # 2 bytes for a result, not 4


def _int8_product(ledger: Any, how: str) -> dict[str, list[float]]:
    """Bytes of the launches by name."""
    found, _ = ledger.step.step("fast-int8", config(), BATCH, choices={"int8_product": how})
    return {name: [o.bytes for o in found if o.name == name] for name in ("product", "_int_mm", "rescale")}


@pytest.mark.slow
def test_launches_of_the_whole_model(ledger) -> None:
    about = ledger.step.summary(*ledger.step.step("fast", ledger.step.config_of("DiT-XL/2", 256), 32))
    assert about["launches"] == PINNED_XL["launches"]
    assert about["forward and backward"]["launches"] == PINNED_XL["forward and backward"]
    assert about["gigabytes"] == pytest.approx(PINNED_XL["gigabytes"], abs=0.005)
    # Forward and backward; of attention's products one, the scores, is made twice.
    linear, attention = 4 * 12 * 1152**2 * 32 * 256 * 28, 14 * 256**2 * 1152 * 32 * 28
    assert about["teraflop"] == pytest.approx((linear + attention) / 1e12, rel=0.005)  # and what is outside the blocks


def test_a_copy_that_slips_in_is_seen(ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    def count() -> int:
        calls = ledger.trace.trace_step("fast", config(), BATCH).calls
        return sum(one.count for one in ledger.costs.launches(calls))

    before, block = count(), fast_dit.run_block
    monkeypatch.setattr(fast_dit, "run_block", lambda x, h, *args, **more: block(x, h.clone(), *args, **more))
    assert count() == before + DEPTH


def test_bytes_of_the_kernels_are_those_of_their_formulas(found) -> None:
    """Bytes per element, (B, T, D), besides vectors: bfloat16 branches, float32 residual stream."""
    elements = BATCH * 256 * 1152
    scores = 2 * 16 * 256 / 1152  # of dS, which dkdv leaves to dq
    per_element = {
        "adaln_forward": 6, "residual_adaln_forward": 12, "residual_adaln_backward": 18, "adaln_backward": 10,
        "gelu_forward": 16, "gelu_backward": 24, "attention_forward": 8, "attention_query": 8, "attention_dq": 4 + scores,
        "attention_dkdv": 12 + scores, "colsum": 2,
    }  # fmt: skip
    seen = {one.name: one.bytes / elements for one in reversed(found) if one.where != "head and loss"}
    seen["residual_adaln_backward"] = max(o.bytes / elements for o in found if o.name == "residual_adaln_backward")
    for name, expected in per_element.items():
        assert expected <= seen[name] <= expected + 0.2, name


# -- what it costs ---------------------------------------------------------------------------------------------------
def test_what_no_table_knows_is_an_error_that_names_it(ledger) -> None:
    call = ledger.trace.Call("fft", False, {}, [], "head and loss")
    kernel = ledger.trace.Call("new_kernel", True, {}, [], "head and loss")
    with pytest.raises(LookupError, match="fft, new_kernel"):
        ledger.costs.launches([call, kernel])


def test_a_kernel_argument_that_is_not_declared_is_an_error(ledger) -> None:
    tensor = ledger.trace.Spec((4,), torch.float32, 16, True, 0)
    call = ledger.trace.Call("gelu_forward", True, {"u": tensor, "g": tensor, "mask": tensor}, [], "head and loss")
    with pytest.raises(LookupError, match="mask"):
        ledger.costs.launches([call])


@pytest.mark.parametrize("device", ["h100", "h200", "a100"])
def test_an_eight_bit_product_takes_half_the_time(ledger, device: str) -> None:
    """Where it is bound by arithmetic; fp8 but for what its scales and sums are assumed to cost."""

    def us(multiplied: str) -> float:
        m, n, k = 8192, 3456, 1152
        one = ledger.costs.Launch("", "products", 0, 2.0 * m * n * k, (1, m, n, k), multiplied=multiplied)
        return one.microseconds(device) - ledger.costs.START_US

    assert us("int8") / us("bf16") == pytest.approx(0.5, rel=1e-3)
    if device != "a100":
        assert us("fp8") / us("bf16") == pytest.approx(0.5 / ledger.costs.FP8_BY_ROWS, rel=1e-3)


def test_what_a_device_cannot_multiply_is_said(ledger, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--depth", "1", "--batch-size", "1", "--device", "a100"]
    assert ledger.ledger.main([*words, "--mode", "fast-fp8"]) == 1
    assert "A100 (sm_80) has no fp8 arithmetic" in capsys.readouterr().err
    for how, named in (("triton", "product"), ("library", "_int_mm")):
        assert ledger.ledger.main([*words, "--mode", "fast-int8", "--choose", f"int8_product={how}"]) == 0
        assert any(named in line.split() for line in capsys.readouterr().out.splitlines()), how


@pytest.mark.slow
def test_predictions_grow_with_the_batch(ledger) -> None:
    for mode, batches in (("fast", (8, 32, 128)), ("full", (8, 32))):
        about = [ledger.step.summary(*ledger.step.step(mode, config() | {"depth": 1}, b)) for b in batches]
        for smaller, larger in pairwise(about):
            assert smaller["gigabytes"] < larger["gigabytes"]
            assert all(smaller["ms"][device] < larger["ms"][device] for device in ("h100", "h200"))
        assert all(one["ms"]["h200"] < one["ms"]["h100"] for one in about)


def test_multi_tensor_launches(ledger) -> None:
    """36 tensors or 320 blocks of 65536 elements a launch of fused AdamW."""

    def launches(sizes: list[int]) -> int:
        specs = [ledger.trace.Spec((n,), torch.float32, 4 * n, True, i) for i, n in enumerate(sizes)]
        lists = dict.fromkeys(("self", "grads", "exp_avgs", "exp_avg_sqs"), specs)
        (one,) = ledger.costs.launches([ledger.trace.Call("_fused_adamw_", False, lists, [], "optimizer and EMA")])
        assert one.bytes == 7 * 4 * sum(sizes)
        return one.count

    assert [launches([10] * n) for n in (36, 37, 72)] == [1, 2, 2]
    assert [launches([65536 * n]) for n in (320, 321)] == [1, 2]


def test_a_choice_that_is_asked_for_is_taken(ledger) -> None:
    choices = {"linear_gelu": "cublaslt", "dgelu_dgrad": "cublaslt"}
    trace = ledger.trace.trace_step("fast", config() | {"depth": 1}, BATCH, choices=choices)
    names = Counter(call.name for call in trace.calls)
    assert trace.choices == {**choices, "attention": "fused"}
    assert names["cublaslt_linear_gelu"] == names["cublaslt_dgelu_dgrad"] == 1
    assert not names["gelu_forward"] and not names["gelu_backward"]
    about = ledger.step.summary(ledger.costs.launches(trace.calls), 0.0)  # the epilogues are no launch, and not free
    assert about["kinds"]["GELU"]["launches"] == 0 and about["kinds"]["GELU"]["ms"]["h200"] > 0
    assert sum(kind["ms"]["h200"] for kind in about["kinds"].values()) == pytest.approx(about["ms"]["h200"])


def test_fusion_leaves_the_passes_that_are_written_by_hand(ledger) -> None:
    """In a block of full fine-tuning: residual with LayerNorm, 12 bytes an element, and GELU, 4 on 4D."""
    trace = ledger.trace.trace_step("full", config() | {"depth": 3}, BATCH)
    elements = BATCH * 256 * 1152
    passes = [
        one.bytes / elements
        for one in ledger.fusion.compiled(trace.calls)
        if one.where == "block 1 forward" and one.name == "fused pass" and one.shape.startswith(f"{BATCH}×256")
    ]
    assert sorted(passes) == [pytest.approx(12, abs=0.1), pytest.approx(12, abs=0.1), pytest.approx(16)]
    eager = ledger.costs.launches(trace.calls)
    left = ledger.fusion.compiled(trace.calls)
    assert sum(one.count for one in left) < sum(one.count for one in eager)
    assert sum(one.bytes for one in left) < sum(one.bytes for one in eager)
    assert sum(one.flops for one in left) == sum(one.flops for one in eager)


# -- what is written -------------------------------------------------------------------------------------------------
def test_text_and_json_say_predicted(ledger, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "ledger.json"
    assert ledger.ledger.main(["--depth", "2", "--batch-size", "8", "--blocks", "--json", str(path)]) == 0
    text = capsys.readouterr().out
    record = json.loads(path.read_text())
    assert "predicted, not measured" in text and record["predicted"] is True
    assert record["sums"]["launches"] == sum(one["count"] for one in record["launches"])


def test_the_docs_are_about_this_code(ledger) -> None:
    """The tables carry the counts pinned here; ``--check``, which takes a minute, compares all of them."""
    page = ledger.docs.PAGE.read_text(encoding="utf-8")
    whole = {(256, 8), (256, 32)}  # in which no batch is cut into groups for what attention's backward leaves
    assert whole < set(ledger.docs.PROBLEMS) and {batch for _, batch in whole} < set(ledger.docs.EIGHT_BIT_BATCHES)
    assert page.count(f"→ {PINNED_XL['launches']} |") == len(whole) * len(ledger.docs.GPUS)
    eight = ledger.docs.EIGHT_BIT_PAGE.read_text(encoding="utf-8")
    assert eight.count(f"| {PINNED_XL['launches']}, ") == len(whole) * len(ledger.docs.EIGHT_BIT_GPUS)
    assert "predicted" in eight and ledger.docs.NOT_MEASURED in eight
    assert json.loads(ledger.docs.BEFORE.read_text(encoding="utf-8"))["predicted"] is True
    with pytest.raises(ValueError, match="ledger:begin step"):
        ledger.docs.insert("no markers", "step", "")
