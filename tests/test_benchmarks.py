"""The benchmarks run, write what they say, and lose nothing when a part fails. No number of theirs is a measurement here."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
TINY = ["--device", "cpu", "--batches", "1", "--widths", "72", "--tokens", "16", "--rounds", "3", "--no-compile"]


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


@pytest.mark.parametrize(
    ("kernel", "per_element"),  # bytes per element of (M, D), besides vectors: bf16 branches, float32 residual stream
    [
        ("residual_adaln_forward", 4 + 2 + 4 + 2),
        ("residual_adaln_backward", 2 + 4 + 4 + 2 + 4 + 2),
        ("adaln_backward", 2 + 4 + 4),
        ("gelu_backward", 4 * (2 + 2 + 2)),
        ("qkv_scale", 3 * (2 + 2)),
        ("qkv_backward", 6 + 4 + 6),
        ("qkv_backward_no_gamma", 2),
    ],
)
def test_bytes_are_those_of_the_formula(load, kernel: str, per_element: int) -> None:
    common = load("common")
    size = common.Size(2, 64, 96, torch.bfloat16, torch.device("cpu"))
    stems = ("adaln", "residual", "frozen_mlp", "frozen_qkv")
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
    assert names[:4] == ["build", "tests", "speed-256px-b32", "ops"]
    assert {"speed-256px-b8", "speed-256px-b128", "speed-512px-b8", "speed-512px-b32", "profile"} <= set(names)
    run = [*script, "--cpu-smoke", "--out", str(tmp_path), "--parts", "build", "linear-gelu"]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {n: p["status"] for n, p in summary["parts"].items()} == {"build": "ok", "linear-gelu": "ok"}
    assert "nothing was measured" in summary["parts"]["linear-gelu"]["log_tail"][-1]


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
    summary = gpu.run_parts(parts, tmp_path, 480, {"device": "none"})
    assert time.monotonic() - start < 60
    assert summary == json.loads((tmp_path / "summary.json").read_text())
    done = summary["parts"]
    assert [p["status"] for p in done.values()] == ["failed", "timed out", "ok", "skipped"]
    assert done["fails"]["exit_code"] == 3 and done["fails"]["log_tail"] == ["why"]
    assert done["works"]["log_tail"] == ["here 14"]  # told 0.8 × 30 − 10 of the seconds it has
    assert not (tmp_path / "logs" / "too long.log").exists()


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


def test_the_table_and_the_plots_come_from_the_files(load, tmp_path: Path, capsys) -> None:
    pytest.importorskip("matplotlib")
    plots = load("plots")
    readme, results = tmp_path / "README.md", tmp_path / "results"
    readme.write_text(f"before\n{plots.BEGIN}\nold\n{plots.END}\nafter\n")
    command = ["--readme", str(readme), "--results", str(results)]
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
    assert (results / "dev" / "speed-256px.png").stat().st_size > 1000
    readme.write_text("no markers")
    assert plots.main(command) == 1 and "expected one line" in capsys.readouterr().err


# -- the step --------------------------------------------------------------------------------------------------------
def test_profile_of_a_step(load, tmp_path: Path, monkeypatch) -> None:
    profile_step = load("profile_step")
    import argparse

    config = dict(
        input_size=8, patch_size=2, in_channels=4, hidden_size=48, depth=2, num_heads=3, mlp_ratio=4.0,
        class_dropout_prob=0.1, num_classes=5, learn_sigma=True,
    )  # fmt: skip
    args = argparse.Namespace(
        device="cpu",
        mode="fast",
        config=config,
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
    joins = next(r for r in result["rows"] if r["name"] == "difffit_fast::residual_adaln")
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
