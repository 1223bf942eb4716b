"""The benchmarks run, write what they say, and lose nothing when a part fails. No number of theirs is a measurement here."""

from __future__ import annotations

import argparse
import csv
import gc
import json
import math
import subprocess
import sys
import tarfile
import time
import weakref
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from difffit_fast import DiT
from difffit_fast.ops import use_kernels

ROOT = Path(__file__).resolve().parent.parent
TINY = ["--device", "cpu", "--batches", "1", "--widths", "72", "--tokens", "16", "--rounds", "3", "--no-compile"]


SMALLEST = dict(
    input_size=8, patch_size=2, in_channels=4, hidden_size=48, depth=2, num_heads=3, mlp_ratio=4.0,
    class_dropout_prob=0.1, num_classes=5, learn_sigma=True,
)  # fmt: skip


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch):
    """Import a module of benchmarks/ by name, as the scripts do among themselves."""
    import importlib

    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


# -- single operations -----------------------------------------------------------------------------------------------
def test_every_operation_at_a_tiny_size(load, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run_all = load("run_all")
    assert run_all.main([*TINY, "--dtypes", "fp32", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "ops.json").read_text())
    kernels = {name for op in run_all.OPS for name in load(f"bench_{op}").KERNELS}
    assert {r["kernel"] for r in record["rows"]} == kernels
    assert record["device"] and record["torch"] == torch.__version__ and record["date"] and record["copy_gbs"] > 0
    for r in record["rows"]:
        assert 0 < r["p10_us"] <= r["median_us"] <= r["p90_us"]
        assert r["gbs"] == pytest.approx(r["bytes"] / r["median_us"] / 1e3)
        assert r["share_of_copy"] == pytest.approx(r["gbs"] / record["copy_gbs"])
    assert {"ours", "eager", "copy"} <= {r["variant"] for r in record["rows"]}
    with (tmp_path / "ops.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(record["rows"])
    assert (tmp_path / "ops.png").stat().st_size > 1000


def test_products_in_eight_bits_at_a_tiny_size(load, tmp_path: Path, monkeypatch) -> None:
    """With emulated products, so that no processor lacks them."""
    monkeypatch.setenv("DIFFFIT_FAST_EIGHT_BIT", "emulate")
    common, kernels = load("common"), load("bench_eight_bit").KERNELS
    words = [*TINY, "--dtypes", "bf16", "fp32", "--json", str(tmp_path / "eight_bit.json")]
    assert common.main("eight_bit", kernels, None, words) == 0
    rows = json.loads((tmp_path / "eight_bit.json").read_text())["rows"]
    assert {r["kernel"] for r in rows} == set(kernels) - {"product_int8_D_to_4D"}  # which Triton has
    errors = {r["kernel"]: r["error"] for r in rows if r["variant"] == "ours" and r["dtype"] == "bf16"}
    assert 1e-3 < errors["int8_D_to_4D_forward"] < errors["fp8_D_to_4D_forward"]  # it is not the plain product


@pytest.mark.interpreter
def test_the_int8_product_is_compared_with_the_library(load, monkeypatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("DIFFFIT_FAST_EIGHT_BIT", "emulate")
    size = load("common").Size(1, 40, 16, torch.bfloat16, torch.device("cpu"))
    with use_kernels("triton"):
        case = load("bench_eight_bit").KERNELS["product_int8_D_to_4D"](size)
        found = [call(*case.args) for call in (case.ours, case.reference, *case.more.values())]
    assert found[0].shape == (40, 64) and case.bytes == 40 * 16 + 64 * 16 + 4 * (40 + 64) + 2 * 64 + 2 * 40 * 64
    for other in found[1:]:
        torch.testing.assert_close(found[0], other)


@pytest.mark.parametrize(
    ("kernel", "per_element"),  # bytes per element of (M, D), besides vectors: bf16 branches, float32 residual stream
    [
        ("residual_adaln_forward", 4 + 2 + 4 + 2),
        ("residual_adaln_backward", 2 + 4 + 4 + 2 + 4 + 2),
        ("adaln_backward", 2 + 4 + 4),
        ("gelu_backward", 4 * (2 + 2 + 2)),
    ],
)
def test_bytes_are_those_of_the_formula(load, kernel: str, per_element: int) -> None:
    common = load("common")
    size = common.Size(2, 64, 96, torch.bfloat16, torch.device("cpu"))
    stems = ("adaln", "residual", "frozen_mlp")
    build = {k: b for stem in stems for k, b in load(f"bench_{stem}").KERNELS.items()}
    vectors = 4 * (10 * 96 * 2 + 2 * size.M)  # vectors and statistics, at most
    bytes = build[kernel](size).bytes
    assert per_element * size.M * 96 <= bytes <= per_element * size.M * 96 + vectors


def test_a_wrong_kernel_is_seen_and_a_failing_case_loses_no_other(load, tmp_path: Path) -> None:
    common = load("common")
    x = torch.randn(8, 8)

    def wrong(size: object) -> object:
        return common.Case(lambda x: x * 1.01, lambda x: x, (x,), bytes=512)

    def broken(size: object) -> object:
        raise RuntimeError("no such kernel")

    options = common.complete(common.parser(None).parse_args([*TINY, "--json", str(tmp_path / "x.json")]))
    record = common.run_grid({"op": {"broken": broken, "wrong": wrong}}, options)
    assert list(record["failed"]) == ["broken B=1 D=72 fp32"] and "no such kernel" in str(record["failed"])
    ours = next(r for r in record["rows"] if r["variant"] == "ours")
    assert ours["error"] == pytest.approx(0.01, rel=0.01) and common.exit_code(record) == 1


def test_an_argument_written_in_place_is_restored_before_every_call(load) -> None:
    common = load("common")
    x = torch.ones(4)
    case = common.Case(lambda x: x.mul_(2), lambda x: x.mul_(2), (x,), bytes=32, in_place=0)
    assert common.error_of(case) == 0 and torch.equal(x, torch.ones(4))
    call = common.bind(case.ours, case)
    for _ in range(3):
        call.prepare()
        assert torch.equal(call.run(), torch.full((4,), 2.0))


def test_a_time_limit_leaves_cases_out_and_says_which(load) -> None:
    common = load("common")
    options = common.complete(common.parser(None).parse_args([*TINY, "--seconds", "1e-9"]))
    record = common.run_grid({"adaln": load("bench_adaln").KERNELS}, options)
    assert not record["rows"] and len(record["left_out"]) == 2


def test_folder_names(load) -> None:
    slug = load("common").slug
    assert slug("NVIDIA H200") == "nvidia-h200"
    assert slug("Intel(R) Xeon(R) Platinum 8488C, 2 threads, AVX512") == "intel-xeon-platinum-8488c"


# -- the GPU command -------------------------------------------------------------------------------------------------
def test_gpu_lists_its_parts_and_runs_the_chain_on_the_cpu(tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "benchmarks" / "gpu.py")]
    listed = subprocess.run([*script, "--dry-run"], capture_output=True, text=True, check=True).stdout
    names = [line.split()[0] for line in listed.splitlines()]
    assert names[:4] == ["build", "smoke", "speed-256px-b32", "speed-256px-b32-frozen"] and names[-1] == "linear-gelu"
    assert names[4:9] == ["profile", "tests", "eight-bit-tests", "eight-bit-256px-b32", "eight-bit-ops"]
    assert {"speed-256px-b8", "speed-256px-b128", "speed-512px-b8", "speed-512px-b32", "speed-256px-b32-whole"} <= set(
        names
    )
    pack = tmp_path / "packed" / "gpu.tgz"
    run = [
        *script,
        "--cpu-smoke",
        "--out",
        str(tmp_path / "out"),
        "--parts",
        "build",
        "linear-gelu",
        "--pack",
        str(pack),
    ]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert {n: p["status"] for n, p in summary["parts"].items()} == {"build": "ok", "linear-gelu": "ok"}
    assert "nothing was measured" in summary["parts"]["linear-gelu"]["log_tail"][-1]
    assert json.loads((pack.parent / "summary.json").read_text()) == summary


def test_both_lists_of_parts_have_the_same_names(load, tmp_path: Path) -> None:
    """What is rehearsed on a CPU is what runs on a GPU."""
    gpu = load("gpu")
    real, tiny = gpu.list_parts(tmp_path), gpu.list_parts(tmp_path, tiny=True)
    assert [p.name for p in real] == [p.name for p in tiny]
    assert real[0].environment["DIFFFIT_FAST_REQUIRE_EXT"] == "1" and real[0].vital
    tested = {Path(w).name for w in next(p for p in real if p.name == "tests").command}
    assert {"test_gpu.py", "test_ops.py", "test_kernels.py", "test_cuda_kernels.py"} <= tested
    own = next(p for p in real if p.name == "eight-bit-tests").command  # which lose no other's results
    assert "test_eight_bit.py" in {Path(w).name for w in own} - tested


def test_results_are_packed_after_every_part_and_a_failed_build_ends_the_run(load, tmp_path: Path, capsys) -> None:
    gpu = load("gpu")
    out, pack = tmp_path / "device", tmp_path / "pack" / "gpu.tgz"
    packed = f"import tarfile; print(sorted(m.name for m in tarfile.open({str(pack)!r}) if m.isfile()))"
    parts = [
        gpu.Part("first", ["-c", "print('one')"], 30, 0),
        gpu.Part("second", ["-c", packed], 30, 0),
        gpu.Part("build", ["-c", "print('no compiler'); raise SystemExit(1)"], 30, 0, vital=True),
        gpu.Part("never", ["-c", "print('wrong')"], 30, 0),
    ]
    summary = gpu.run_parts(parts, out, 540, {"device": "none"}, pack)
    assert summary["parts"]["second"]["log_tail"] == ["['device/logs/first.log', 'device/summary.json']"]
    assert list(summary["parts"]) == ["first", "second", "build"] and "build failed" in summary["stopped"]
    assert "no compiler" in capsys.readouterr().out
    assert json.loads((pack.parent / "summary.json").read_text()) == summary
    with tarfile.open(pack) as archive:
        assert "device/logs/build.log" in archive.getnames()
    assert "never" in gpu.run_parts(parts, out, 540, {"device": "none"}, keep_going=True)["parts"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_without_a_gpu_says_so(load, capsys, monkeypatch) -> None:
    gpu = load("gpu")
    monkeypatch.setattr(gpu, "probe", lambda: ("", "2.13.0", "None"))
    assert gpu.main([]) == 2
    assert "There is no CUDA device here" in capsys.readouterr().out


def test_a_part_that_fails_hangs_or_does_not_fit_loses_no_other(load, tmp_path: Path) -> None:
    gpu = load("gpu")
    parts = [
        gpu.Part("fails", ["-c", "print('why'); raise SystemExit(3)"], 30, 0),
        gpu.Part("hangs", ["-c", "import time; print('up', flush=True); time.sleep(600)"], 3, 0),
        gpu.Part("works", ["-c", "import os; print(os.environ['MARK'], '{seconds}')"], 30, 0, {"MARK": "here"}),
        gpu.Part("too long", ["-c", "print('never')"], 30, 1000),
    ]
    start = time.monotonic()
    summary = gpu.run_parts(parts, tmp_path, 540, {"device": "none"})
    assert time.monotonic() - start < 60
    assert summary == json.loads((tmp_path / "summary.json").read_text())
    done = summary["parts"]
    assert [p["status"] for p in done.values()] == ["failed", "timed out", "ok", "skipped"]
    assert done["fails"]["exit_code"] == 3 and done["fails"]["log_tail"] == ["why"]
    assert done["works"]["log_tail"] == ["here 14"]  # told 0.8 × 30 − 10 of the seconds it has
    assert not (tmp_path / "logs" / "too long.log").exists()


# -- step times ------------------------------------------------------------------------------------------------------
SPEED = ["--device", "cpu", "--dtype", "fp32", "--batch-size", "2", "--no-memory", "--threads", "1"]


@pytest.fixture
def speed_run(load, tmp_path: Path):
    """A run of speed.py with the smallest model, its results in speed.json."""

    def make(*more: str):
        args = load("speed").parse([*SPEED, "--json", str(tmp_path / "speed.json"), *more])
        args.config = SMALLEST
        return load("speed_run").Run(args)

    return make


def test_a_run_is_complete_checked_and_prints_no_carriage_return(speed_run, load, tmp_path: Path, capsys) -> None:
    result = speed_run("--modes", "full", "frozen", "fast", "fast-graph", "--steps", "4").execute()
    load("speed_report").print_table(result)
    said = capsys.readouterr().out
    assert "\r" not in said and "A first table" in said and "vs_best_full" in said
    written = json.loads((tmp_path / "speed.json").read_text())
    assert written["complete"] is True and written["steps"] == 4 and written["ratios"]["ours"] == "fast"
    assert list(written["modes"]) == ["full", "frozen", "fast"] and written["failed"] == {"fast-graph": "needs CUDA"}
    assert "colsum" in written["choices"] and {"frozen_ms", "full_ms"} <= written["floor"].keys()
    compared = {name: mode["check"]["gradients_compared"] for name, mode in written["modes"].items()}
    assert compared["frozen"] == compared["fast"] > compared["full"] > 10  # γ and LayerNorm only where they are
    assert all(mode["check"]["ok"] and mode["check"]["reference"] == "float64" for mode in written["modes"].values())
    assert not list(tmp_path.glob("*tmp*"))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_modes_in_eight_bits_have_a_ratio_of_their_own(speed_run, load, monkeypatch, capsys, dtype: str) -> None:
    monkeypatch.setenv("DIFFFIT_FAST_EIGHT_BIT", "emulate")
    modes = ("full", "fast", "fast-fp8", "fast-int8")
    result = speed_run("--modes", *modes, "fast-int8-graph", "--steps", "2", "--dtype", dtype).execute()
    assert tuple(result["modes"]) == modes and result["failed"] == {"fast-int8-graph": "needs CUDA"}
    checks = {name: mode["check"] for name, mode in result["modes"].items()}
    assert checks["fast"]["gradient"] < checks["fast-int8"]["gradient"] < checks["fast-fp8"]["gradient"] < 0.15
    assert checks["fast-int8"]["cosine"] > 0.995 and checks["fast-fp8"]["cosine"] > 0.98
    assert result["ratios"]["ours"] == "fast" and result["ratios"]["vs_best_full"]["of"] == "full"
    for kind in ("fp8", "int8"):
        found, ms = result["ratios"][f"{kind}_vs_fast"], {n: m["step_ms"]["median"] for n, m in result["modes"].items()}
        assert (
            found["ratio"] == pytest.approx(ms["fast"] / ms[f"fast-{kind}"]) and found["of"] == f"fast-{kind} to fast"
        )
    load("speed_report").print_table(result)
    assert "fast-int8            not the same numbers" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_eight_bits_that_are_wrong_get_no_ratio(speed_run, load, monkeypatch, kind: str) -> None:
    """Scales that are off, and a processor that has no such products."""
    eight_bit = load("modes").eight_bit
    monkeypatch.setenv("DIFFFIT_FAST_EIGHT_BIT", "emulate")
    pick, rescale = eight_bit.pick, eight_bit.rescale

    def off(product, row, column, bias, dtype):
        return rescale(product, row, column * 1.3, bias, dtype)

    monkeypatch.setattr(eight_bit, "pick", lambda stem, op, *like: off if op is rescale else pick(stem, op, *like))
    result = speed_run("--modes", "fast", f"fast-{kind}", "--steps", "1").execute()
    assert list(result["modes"]) == ["fast"] and list(result["without_ratio"]) == [f"fast-{kind}"]
    assert "wrong numbers" in result["failed"][f"fast-{kind}"] and f"{kind}_vs_fast" not in result["ratios"]
    monkeypatch.undo()
    monkeypatch.setattr(eight_bit, "_cpu_has_int8", lambda: False)
    run = speed_run("--modes", "fast", f"fast-{kind}")
    assert run.possible() == ["fast"]
    assert {"int8": "no int8 dot products", "fp8": "no float8"}[kind] in run.failed[f"fast-{kind}"]


@pytest.mark.parametrize("factor", [1.0, 1.01])
def test_a_mode_with_wrong_gradients_gets_no_ratio(speed_run, load, monkeypatch, factor: float) -> None:
    module, build = load("speed_run"), load("modes").build_mode

    def wrong(name: str, *rest):
        mode = build(name, *rest)
        if name == "fast":
            mode.kind.trainable["blocks.1.mlp.fc1.bias"].register_hook(lambda g: g * factor)
        return mode

    monkeypatch.setattr(module, "build_mode", wrong)
    result = speed_run("--modes", "full", "fast", "--steps", "2").execute()
    if factor == 1:
        assert result["ratios"]["vs_best_full"]["of"] == "full" and not result["failed"]
        return
    assert result["ratios"] == {} and list(result["modes"]) == ["full"] and list(result["without_ratio"]) == ["fast"]
    assert "1.0e-02 of the gradient of blocks.1.mlp.fc1.bias" in result["failed"]["fast"]


def test_running_out_of_memory_in_a_round_drops_only_that_mode(speed_run, load, monkeypatch, tmp_path: Path) -> None:
    module = load("speed_run")
    step_of, alive = module.Run.step_of, []

    def failing(self, name: str):
        if name == "frozen" and len(self.times["frozen"]) == 1:
            alive.append(weakref.ref(self.kinds["frozen"].model))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return step_of(self, name)

    monkeypatch.setattr(module.Run, "step_of", failing)
    result = speed_run("--modes", "full", "frozen", "fast", "--steps", "3").execute()
    gc.collect()
    assert len(alive) == 1 and alive[0]() is None  # its memory is free again
    assert result["failed"]["frozen"].startswith("in round 2: out of memory")
    assert {name: mode["rounds"] for name, mode in result["modes"].items()} == {"full": 3, "fast": 3}
    assert "vs_best_full" in result["ratios"] and "vs_best_frozen" not in result["ratios"]


def test_what_was_measured_survives_a_kill(tmp_path: Path) -> None:
    """The second mode never comes, and the process gets no chance to say anything."""
    script = f"""
import sys, time
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
import speed, speed_run
args = speed.parse({[*SPEED, "--json", str(tmp_path / "speed.json"), "--modes", "full", "fast"]!r})
args.config = {SMALLEST!r}
build = speed_run.Run.build
speed_run.Run.build = lambda self, name: time.sleep(600) if self.built else build(self, name)
speed_run.Run(args).execute()
"""
    process = subprocess.Popen([sys.executable, "-c", script])
    try:
        end = time.monotonic() + 200
        while not (tmp_path / "speed.json").exists() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    written = json.loads((tmp_path / "speed.json").read_text())
    assert written["complete"] is False and list(written["modes"]) == ["full"] and written["ratios"] == {}
    assert written["modes"]["full"]["step_ms"]["median"] > 0 and written["modes"]["full"]["rounds"] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["speed.json"]


def test_the_time_limit_is_kept(speed_run, load, monkeypatch) -> None:
    module = load("speed_run")
    run = speed_run("--modes", "full", "fast", "--seconds", "1e-9")
    result = run.execute()
    assert not result["modes"] and all(why.startswith("left out") for why in result["failed"].values())
    assert result["complete"] and set(result["failed"]) == {"full", "fast", "floor:frozen", "floor:full"}

    # A clock that only steps move: a round of two modes and two floors takes four seconds.
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])

    def timed(step, device, inner) -> float:
        now[0] += 1
        return 1.0

    monkeypatch.setattr(module, "timed", timed)
    monkeypatch.setattr(module, "all_settled", lambda found: False)
    result = speed_run("--modes", "full", "fast", "--seconds", "30").execute()
    assert result["stopped"] == "--seconds 30" and result["steps"] == 7 and now[0] == 30  # two alone, seven rounds


def test_rounds_end_when_the_ratios_are_settled(speed_run, load, monkeypatch) -> None:
    monkeypatch.setattr(load("speed_run"), "timed", lambda step, device, inner: 1.0)
    result = speed_run("--modes", "full", "frozen", "fast").execute()
    assert result["steps"] == 6 and result["stopped"] == "the ratios are settled"
    assert result["ratios"]["vs_best_full"]["interval"] == (1.0, 1.0)


def test_the_interval_of_a_median(load) -> None:
    module = load("speed_ratios")
    assert module.median_interval([1.0, 2, 3, 4, 5]) is None  # the smallest and largest of five: 93.75 %
    assert module.median_interval([6.0, 1, 3, 2, 5, 4]) == (1, 6)
    assert module.median_interval([float(v) for v in range(1, 21)]) == (6, 15)  # 95.9 %, from tables of the sign test
    assert [module.settled(i) for i in (None, (0.9, 1.1), (0.99, 1.01), (1.01, 2), (0.5, 0.99))] == [
        False,
        False,
        True,
        True,
        True,
    ]


@pytest.mark.parametrize("name", ["full-blocks", "frozen-blocks", "full-compile", "fast-compile"])
def test_what_should_be_compiled_is(load, monkeypatch, name: str) -> None:
    """Blocks of all kinds run through the compiler, on the parameters of the model that the other modes train."""
    modes, check = load("modes"), load("speed_check")
    seen, compile = [], torch.compile

    def backend(graph, inputs):
        seen.append(graph)
        return graph

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda *a, **k: compile(*a, **(k | {"backend": backend})))
    device, kinds = torch.device("cpu"), {}
    batch = modes.make_batch(SMALLEST, 2, device)
    eager, mode = (
        modes.build_mode(n, SMALLEST, torch.float32, device, batch, kinds) for n in (name.split("-")[0], name)
    )
    assert eager.kind is mode.kind
    eager.step()
    assert not seen
    found = check.check(mode, check.make_reference(SMALLEST, 2, device), batch, 1e-5)
    assert found["ok"] and seen, found
    if name == "full-blocks":
        assert len(seen) == 1  # one block serves them all


def test_the_largest_batch_that_fits(load, monkeypatch) -> None:
    memory = load("speed_memory")
    assert memory.largest_batch({4: 600, 8: 1000}, 2000) == 18 and memory.largest_batch({4: 600, 8: 1000}, 100) == 0
    with pytest.raises(ValueError, match="does not grow"):
        memory.largest_batch({1: 5, 2: 5}, 100)

    def run_processes(jobs: dict[str, list[str]], together: int, deadline: float) -> dict:
        ((name, words),) = jobs.items()
        size = int(words[words.index("--batch-size") + 1])
        if name == "full":
            return {name: {"problem": "exit code 1: why"}}
        if "--cap-bytes" in words and size > 7:
            return {name: {"problem": "out of memory"}}
        return {name: {"peak_bytes": size * 10**8, "seconds": 0.5}}

    monkeypatch.setattr(memory, "run_processes", run_processes)
    args = argparse.Namespace(
        model="m", image_size=256, num_classes=3, batch_size=4, dtype="fp32", threads=None, equal_memory=[1.0],
    )  # fmt: skip
    for device, batch in (("cpu", 10), ("cuda", 7)):  # the line says ten; under the cap only seven run
        args.device, kept, said = device, [], []
        found = memory.equal_memory(args, ["full", "fast", "fast-graph"], math.inf, said.append, kept.append)["1"][
            "modes"
        ]
        assert found["full"] == {"problem": "exit code 1: why"} and len(kept) == len(said) == 3
        assert found["fast"]["batch_size"] == batch and found["fast"]["images_per_second"] == 2 * batch
        assert (found["fast-graph"]["images_per_second"] is None) == (device == "cpu")


# -- the README's table ----------------------------------------------------------------------------------------------
def speed_result() -> dict:
    mode = lambda ms, memory: {  # noqa: E731
        "step_ms": {"median": ms, "p10": ms - 1, "p90": ms + 1}, "images_per_second": 1.0, "peak_memory_bytes": memory,
        "trainable_parameters": 1, "checkpoint_bytes": 1,
    }  # fmt: skip
    ratio = {"ratio": 2.5, "round_p10": 2.4, "round_p90": 2.6}
    return {
        "device": "NVIDIA Test, 1 threads", "torch": "2.11.0", "date": "2026-01-02T03:04:05+00:00", "model": "DiT-XL/2",
        "image_size": 256, "batch_size": 32, "dtype": "bf16", "floor": {"frozen_ms": 18.0},
        "modes": {"full": mode(60.0, 4 << 30), "full-compile": mode(50.0, 8 << 30), "fast": mode(20.0, 1 << 30)},
        "ratios": {"ours": "fast", "vs_best_full": ratio, "step_over_floor": 1.11},
    }  # fmt: skip


def demo_result() -> dict:
    row = {"loss": 0.0234, "letters": 0.91, "memorised": 0.01, "loss_own": 0.021, "seconds": 12.3, "bytes": 31000}
    return {
        "date": "2026-01-02T03:04:05+00:00", "device": "NVIDIA Test", "verdict": "DiffFit wins.",
        "table": [["DiffFit", row], ["real letters", {"letters": 0.93}]],
        "images_per_second_median": {"DiffFit": 300.2, "full": 199.9},
    }  # fmt: skip


def apply_result() -> dict:
    mode = lambda ms, mib: {  # noqa: E731
        "step_ms": {"median": ms, "p10": ms - 1, "p90": ms + 1}, "peak_memory_bytes": mib << 20, "saved_bytes": 1,
        "trainable_parameters": 1, "problem": None,
    }  # fmt: skip
    return {
        "complete": True, "device": "NVIDIA Test, 1 threads", "torch": "2.11.0", "date": "2026-01-02T03:04:05+00:00",
        "width": 384, "depth": 12, "batch_size": 4, "dtype": "bf16",
        "models": {"sd3": {
            "modes": {"ours": mode(20.0, 64), "lora": mode(28.0, 80)},
            "ratios": {"vs_lora": {"ratio": 1.4, "round_p10": 1.3, "round_p90": 1.5}},
        }},
    }  # fmt: skip


def many_result() -> dict:
    def mode(ms: float, mib: int | None, problem: str | None = None) -> dict:
        return {
            "batch_ms": {"median": ms, "p10": ms - 1, "p90": ms + 1}, "samples_per_second": 1.0, "problem": problem,
            "peak_memory_bytes": mib and mib << 20, "memory_problem": None,
        }  # fmt: skip

    ratio = lambda r, interval: {  # noqa: E731
        "ratio": r + 0.2, "round_median": r, "round_p10": r - 0.01, "round_p90": r + 0.01, "interval": interval, "settled": True,
    }  # fmt: skip
    return {
        "complete": True, "device": "NVIDIA Test, 1 threads", "torch": "2.11.0", "date": "2026-01-02T03:04:05+00:00",
        "width": 384, "depth": 12, "batch_size": 8, "side": 32, "classes": 101, "domains": 8, "rank": 16, "dtype": "bf16",
        "prediction": {
            "mixed_flops_times_one": 1.0003, "lora_flops_times_one": 1.05, "mixed_stacked_bytes": 5e6,
            "mixed_gathered_bytes": 3e6,
        },
        "domain_bytes": {"delta": {"disk": 330_000, "memory": 300_000}, "lora": {"disk": 2_000_000, "memory": 1_900_000}},
        "inference": {
            "modes": {
                "one": mode(20.0, 64), "mixed": mode(21.0, 65), "lora": mode(60.0, None, "its output is off by 1.0e-01"),
            },
            "ratios": {"mixed": ratio(1.05, [1.04, 1.06])},
        },
        "training": {"modes": {"one": mode(50.0, 96), "mixed": mode(52.0, 99)}, "ratios": {"mixed": ratio(1.04, None)}},
    }  # fmt: skip


def test_the_table_and_the_plots_come_from_the_files(load, tmp_path: Path, capsys) -> None:
    pytest.importorskip("matplotlib")
    plots = load("plots")
    readme, results = tmp_path / "README.md", tmp_path / "results"
    blocks = "".join(f"<!-- {block}:begin -->\nold\n<!-- {block}:end -->\n" for block in ("apply", "demo", "speed"))
    readme.write_text(f"before\n{blocks}after\n")
    page = tmp_path / "docs" / "many.md"
    page.parent.mkdir()
    page.write_text("# Many\n<!-- many:begin -->\nold\n<!-- many:end -->\n")
    command = ["--readme", str(readme), "--docs", str(page.parent), "--results", str(results)]
    assert plots.main(command) == 0
    assert "Not measured yet" in readme.read_text()
    (results / "dev").mkdir(parents=True)
    (results / "dev" / "speed-256px.json").write_text(json.dumps(speed_result()))
    assert plots.main([*command, "--check"]) == 1 and "Not measured yet" in readme.read_text()
    assert plots.main(command) == 0 and plots.main([*command, "--check"]) == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    row = next(line for line in text.splitlines() if "NVIDIA Test" in line)
    for cell in ("50.0 ms (full-compile)", "20.0 ms (fast)", "**2.50×**", "1.11", "4.00 → 1.00 GiB"):
        assert cell in row
    assert "(results/dev/speed-256px.json)" in row
    lengths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert len(lengths) == 1
    (results / "dev" / "demo.json").write_text(json.dumps(demo_result()))
    assert plots.main([*command, "--check"]) == 1 and plots.main(command) == 0
    text = readme.read_text()
    assert (
        "| DiffFit | 0.0234 | 91% | 1% | 0.0210 | 12 | 31 |" in text and "| real letters |  | 93% |  |  |  |  |" in text
    )
    assert (
        "DiffFit wins. Images a second: DiffFit 300, full 200 ([2026-01-02](results/dev/demo.json), NVIDIA Test)."
        in text
    )
    assert "(results/dev/demo.png)" in text
    (results / "dev" / "apply-bf16.json").write_text(json.dumps(apply_result()))
    assert plots.main([*command, "--check"]) == 1 and plots.main(command) == 0
    row = next(line for line in readme.read_text().splitlines() if "SD3Transformer2DModel" in line)
    for cell in ("20.0 ms, 64 MiB", "**1.40×** (1.30–1.50), 80 MiB", "(results/dev/apply-bf16.json)"):
        assert f"| {cell} |" in row or cell in row
    assert (results / "dev" / "speed-256px.png").stat().st_size > 1000
    assert "Not measured yet" in page.read_text() and "old" not in page.read_text()
    (results / "dev" / "many-bf16.json").write_text(json.dumps(many_result()))
    (results / "dev" / "many-fp32.json").write_text(json.dumps(many_result() | {"complete": False, "dtype": "fp32"}))
    before = readme.read_text()
    assert plots.main([*command, "--check"]) == 1 and "docs/many.md: a table of it" in capsys.readouterr().out
    assert plots.main(command) == 0 and plots.main([*command, "--check"]) == 0
    assert readme.read_text() == before and "fp32" not in page.read_text()
    rows = {line.split("|")[1].strip(): line for line in page.read_text().splitlines() if line.startswith("|")}
    assert "([2026-01-02](../results/dev/many-bf16.json))" in page.read_text()
    assert rows["one domain for all samples"].endswith(
        "| 20.0 ms |  | 64 MiB | 50.0 ms |  | 96 MiB | 0.330 MB | 0.300 MB |"
    )
    mixed = (
        "| 21.0 ms | **1.05** (1.04–1.06) | 65 MiB | 52.0 ms | **1.04** (1.03–1.05) | 99 MiB | 0.330 MB | 0.300 MB |"
    )
    assert rows["a domain for each sample"].endswith(mixed)  # without an interval, the 10th and 90th percentile
    assert rows["PEFT LoRA, rank 16, an adapter for each"].endswith(
        "| 60.0 ms | its output is off by 1.0e-01 | memory not measured |  |  |  | 2.000 MB | 1.900 MB |"
    )
    assert len({line.count("|") for line in rows.values()}) == 1
    page.write_text("no markers")
    assert plots.main(command) == 1 and "many.md: expected one line" in capsys.readouterr().err
    readme.write_text("no markers")
    assert plots.main(command) == 1 and "expected one line" in capsys.readouterr().err


# -- the step --------------------------------------------------------------------------------------------------------
def test_profile_of_a_step(load, tmp_path: Path, monkeypatch) -> None:
    profile_step = load("profile_step")
    args = argparse.Namespace(
        device="cpu",
        mode="fast",
        config=SMALLEST,
        dtype="fp32",
        batch_size=2,
        warmup=1,
        steps=2,
        model="tiny",
        image_size=64,
    )
    result = profile_step.run(args)
    assert result["rows"] == sorted(result["rows"], key=lambda r: -r["ms"])
    assert sum(r["share"] for r in result["rows"]) == pytest.approx(1)
    assert sum(g["ms"] for g in result["groups"].values()) == pytest.approx(result["busy_ms"])
    joins = next(r for r in result["rows"] if r["name"] == "difffit_fast_cpp::residual_adaln_forward")
    assert joins["count"] == 4 and joins["group"] == "ours"  # two in each of two blocks
    profile_step.print_table(result, top=3)


def test_every_part_of_the_trainers_step_is_timed(load, tmp_path: Path) -> None:
    from training import SETTINGS, digits

    overhead = load("train_overhead")
    images = digits(tmp_path / "images")
    settings = {**SETTINGS, "max_steps": 4, "ckpt_every": 2, "results_dir": str(tmp_path / "runs")}
    with pytest.warns(UserWarning, match="random"):
        trainer = overhead.Trainer(data_path=str(images), **settings)
    plain = overhead.Stepper.update
    steps = overhead.measure(trainer)
    assert len(steps) == 3 and overhead.Stepper.update is plain  # the last step has no successor to end it
    for step in steps:
        parts = {name: seconds for name, seconds in step.items() if name != "step"}
        assert overhead.PARTS.keys() - parts.keys() <= {"checkpoint"}
        assert all(seconds > 0 for seconds in parts.values()) and sum(parts.values()) < step["step"]
    assert ["checkpoint" in step for step in steps] == [False, True, False]


def test_groups_of_kernels(load) -> None:
    group_of = load("profile_step").group_of
    for name, group in (
        ("_residual_adaln_backward_kernel", "ours"),
        ("nvjet_hsh_256x128_64x4_2x1_v_bz_coopA_TNT", "matrix products"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel", "attention"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamW>", "optimizer and EMA"),
        ("triton_red_fused_add_native_layer_norm_3", "torch.compile"),
        ("Memcpy DtoD (Device -> Device)", "copies and casts"),
        ("void at::native::elementwise_kernel<SiLU>", "other"),
    ):
        assert group_of(name) == group, name


# -- transformers of diffusers ---------------------------------------------------------------------------------------
def test_apply_against_peft_and_frozen_pytorch(load, tmp_path: Path, capsys) -> None:
    pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    apply = load("apply")
    path, tiny = (
        tmp_path / "apply.json",
        ["--width", "48", "--depth", "2", "--batch-size", "2", "--side", "8", "--text", "5"],
    )
    words = ["--device", "cpu", "--dtype", "fp32", "--rounds", "2", "--no-peak", "--json", str(path)]
    assert apply.main([*tiny, *words]) == 0
    record = json.loads(path.read_text())
    assert record["complete"] and set(record["models"]) == set(apply.MODELS) and record["torch"] == torch.__version__
    for measured in record["models"].values():
        modes = measured["modes"]
        assert set(modes) == set(apply.METHODS) and not any(m["problem"] for m in modes.values())
        assert set(measured["ratios"]) == {"vs_frozen", "vs_lora", "vs_ia3"}
        assert modes["ours"]["trainable_parameters"] == modes["frozen"]["trainable_parameters"]
        assert 0 < modes["ours"]["saved_bytes"] <= modes["frozen"]["saved_bytes"] < modes["lora"]["saved_bytes"]
    assert "ours is" in capsys.readouterr().out


def test_a_method_that_computes_something_else_gets_no_ratio(load, monkeypatch) -> None:
    pytest.importorskip("diffusers")
    apply = load("apply")
    args = apply.parse(
        ["--width", "48", "--depth", "1", "--side", "8", "--rounds", "1", "--dtype", "fp32", "--no-peak"]
    )
    args.methods, args.device = ["ours", "frozen"], "cpu"
    build = apply.build

    def off(method: str, base: Any) -> Any:
        if method == "ours":
            with torch.no_grad():
                base.proj_out_2.bias.add_(1.0)
        return build(method, base)

    monkeypatch.setattr(apply, "build", off)
    measured = apply.run_model("dit", args, lambda text: None)
    assert "its output is off by" in measured["modes"]["ours"]["problem"] and measured["ratios"] == {}


# -- many deltas on one base -----------------------------------------------------------------------------------------
MANY = [
    *("--width", "48", "--depth", "2", "--batch-size", "4", "--side", "8", "--classes", "5", "--domains", "3"),
    *("--rank", "4", "--device", "cpu"),
]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_many_deltas_against_one_merged_models_and_adapters(load, tmp_path: Path, capsys, dtype: str) -> None:
    many, path = load("many"), tmp_path / "many.json"
    methods = many.parse(MANY).methods  # without PEFT, without LoRA
    words = ["--dtype", dtype, "--rounds", "6", "--no-peak", "--json", str(path)]
    assert many.main([*MANY, *words]) == 0
    record = json.loads(path.read_text())
    assert record["complete"] and record["torch"] == torch.__version__ and record["domains"] == 3
    assert set(record["inference"]["modes"]) == set(methods)
    assert set(record["training"]["modes"]) == {"one", "own", "mixed", "mixed-strength"}
    for phase in ("inference", "training"):
        modes, ratios = record[phase]["modes"], record[phase]["ratios"]
        assert not any(mode["problem"] for mode in modes.values()) and set(ratios) == set(modes) - {"one"}
        for name, ratio in ratios.items():
            assert ratio["ratio"] == modes[name]["batch_ms"]["median"] / modes["one"]["batch_ms"]["median"]
            assert ratio["interval"][0] <= ratio["interval"][1]
            assert modes[name]["samples_per_second"] == pytest.approx(4e3 / modes[name]["batch_ms"]["median"])
    kept, width = record["domain_bytes"], 2 if dtype == "bf16" else 4
    vectors = record["prediction"]["vector_entries"]
    # Vectors, class rows, and the row of the base that each goes with.
    assert kept["delta"]["memory"] == 4 * (vectors + 6 * 48) + 6 * 8
    assert kept["delta"]["memory"] < kept["delta"]["disk"] < kept["merged"]["disk"]
    plain = DiT(**load("many_models").shape(many.parse(MANY)))
    assert kept["merged"]["memory"] == width * sum(t.numel() for t in plain.state_dict().values())
    if "lora" in methods:
        in_and_out = (1 + 3) + (1 + 1) + (1 + 4) + (4 + 1)  # of the four linears of a block, in widths
        assert kept["lora"]["memory"] == width * 4 * 48 * in_and_out * 2
    assert "× one" in capsys.readouterr().out


def test_memory_of_many_is_measured_in_a_process_for_each_method(load) -> None:
    many = load("many")
    args = many.parse([*MANY, "--dtype", "fp32", "--methods", "merged", "mixed"])
    found = {**many.peaks(args, "inference"), "step": many.peaks(args, "training")["mixed"]}
    assert set(found) == {"merged", "mixed", "step"} and all(said["peak_bytes"] > 1 << 20 for said in found.values())


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("mixed", "its output is off by"),
        ("merged", "its output is off by"),
        ("training", "its gradients of d1 are off by"),
    ],
)
def test_a_batch_that_wears_something_else_gets_no_ratio(load, monkeypatch, method: str, said: str) -> None:
    many = load("many")
    args = many.parse([*MANY, "--dtype", "fp32", "--rounds", "1", "--no-peak", "--methods", "one", "mixed", "merged"])
    ours, merged, make_step = many.ours, many.merged, many.make_step

    def other(made, name):  # the last two samples change their domains
        forward = ours(made, name)
        if name == "mixed" and method == "mixed":
            swapped = made.index[[0, 1, 3, 2]]
            return lambda: made.model(*made.inputs, delta=swapped)
        return forward

    def late(made, dtype):
        forward, models = merged(made, dtype)
        if method == "merged":
            models[1].final_layer.linear.bias.data.add_(0.1)
        return forward, models

    def scaled(made, name):
        step = make_step(made, name)
        if name == "mixed" and method == "training":
            made.model.deltas["d1"].vectors.register_hook(lambda g: g * 1.01)
        return step

    monkeypatch.setattr(many, "ours", other)
    monkeypatch.setattr(many, "merged", late)
    monkeypatch.setattr(many, "make_step", scaled)
    result = many.run(args)
    phase, name = ("training", "mixed") if method == "training" else ("inference", method)
    assert said in result[phase]["modes"][name]["problem"] and name not in result[phase]["ratios"]
    right = {"mixed": "merged", "merged": "mixed", "training": "mixed"}[method]
    assert result["inference"]["modes"][right]["problem"] is None and right in result["inference"]["ratios"]
    if method == "mixed":  # and what computes something else is not trained either
        assert result["training"]["ratios"] == {}


def test_domains_that_are_all_alike_prove_nothing(load) -> None:
    check, rows = load("many_check"), torch.randn(3, 8)
    near = rows + 1e-6
    assert check.same(rows, rows, rows.roll(1, 0), 1e-5) is None
    assert "nothing was compared" in check.same(rows, rows, near, 1e-5)
    assert "off by inf" in check.same(rows * float("nan"), rows, None, 1e-5)
    with pytest.raises(SystemExit):
        load("many").parse([*MANY, "--domains", "5"])


def test_adapters_on_other_samples_are_seen(load, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    models, check = load("many_models"), load("many_check")
    args = load("many").parse([*MANY, "--dtype", "fp32"])
    made = models.make_many(args, tmp_path)
    forward, model = models.lora(args, made)
    assert check.check_outputs(made, {"lora": forward}, model, torch.float32) == {}
    moved = made.worn[1:] + made.worn[:1]
    said = check.check_outputs(made, {"lora": lambda: model(*made.inputs, adapter_names=moved)}, model, torch.float32)
    assert "its output is off by" in said["lora"]
