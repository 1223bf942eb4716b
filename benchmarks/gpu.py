#!/usr/bin/env python
"""Everything that needs a GPU, in one command: build, tests, step times, kernels, profile. `make gpu` calls it.

Command: python benchmarks/gpu.py [--budget 480] [--out benchmarks/results/<device>] [--parts build tests ...] [--dry-run]

It uses the Python that runs it, with its PyTorch, and no network. Nothing is installed: the package with its extension is
built into build/gpu, and the parts find it there through PYTHONPATH.
Every part is a process of its own with a limit of its own, most valuable first, and leaves its files and its line in
summary.json (status, seconds, end of the log) as soon as it ends: a part that fails or is stopped loses no other's results.
Parts for which the budget has no time left are skipped, and the summary says so.

Exit codes: 0 all parts succeeded or were skipped for want of time, 1 a part failed, 2 there is no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
BUILT = ROOT / "build" / "gpu"  # the package as it would be installed: kernels/ is difffit_fast.kernels there
DEFAULT_BUDGET = 480.0
TAIL_LINES = 40
PROBE = (
    "import torch; c = torch.cuda.is_available(); "
    "print('\\n'.join([torch.cuda.get_device_name() if c else '', torch.__version__, str(torch.version.cuda)]))"
)


@dataclass
class Part:
    """One process: ``limit`` seconds at most at the default budget, not started with less than ``need`` seconds left."""

    name: str
    command: list[str]
    limit: float
    need: float
    environment: dict[str, str] = field(default_factory=dict)


def speed_part(out: Path, image: int, batch: int, limit: float, need: float, modes: list[str], *more: str) -> Part:
    """speed.py at one size; it is told its limit, so that it ends with fewer rounds rather than with nothing."""
    name = f"speed-{image}px-b{batch}"
    command = ["speed.py", "--image-size", str(image), "--batch-size", str(batch), "--modes", *modes, "--no-memory"]
    command += ["--seconds", "{seconds}", "--json", str(out / f"{name}.json"), *more]
    return Part(name, command, limit, need)


def gpu_parts(out: Path) -> list[Part]:
    """What runs on a GPU, in the order of its value."""
    every = [
        "fast",
        "full-compile",
        "fast-graph",
        "frozen-compile",
        "full",
        "frozen",
        "fast-compile",
        "lora",
        "full-tf32",
    ]
    some = ["fast", "full-compile", "fast-graph", "frozen-compile", "full"]
    xl = ["--model", "DiT-XL/2", "--dtype", "bf16", "--device", "cuda"]
    tests = ["-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "--durations=10"]
    return [
        Part("build", ["{root}/setup.py", "-q", "build", "--build-lib", str(BUILT)], 120, 10),
        # Safe path: `python -m pytest` would put the source tree, where nothing is built, before PYTHONPATH.
        Part("tests", [*tests, "{root}/tests"], 110, 20, {"PYTHONSAFEPATH": "1"}),
        speed_part(out, 256, 32, 150, 40, every, *xl, "--steps", "15"),
        Part("ops", ["run_all.py", "--device", "cuda", "--out", str(out), "--compile-widths", "1152",
                     "--seconds", "{seconds}"], 75, 20),
        speed_part(out, 256, 8, 60, 30, some, *xl, "--steps", "10"),
        speed_part(out, 256, 128, 80, 40, some, *xl, "--steps", "5", "--inner", "2"),
        speed_part(out, 512, 8, 60, 40, some, *xl, "--steps", "8"),
        speed_part(out, 512, 32, 80, 40, some, *xl, "--steps", "5", "--inner", "2"),
        Part("profile", ["profile_step.py", "--device", "cuda", "--json", str(out / "profile-256px-b32.json")], 40, 15),
        Part("linear-gelu", ["bench_linear_gelu.py", "--json", str(out / "linear_gelu.json")], 60, 20),
    ]  # fmt: skip


def cpu_parts(out: Path) -> list[Part]:
    """The same chain at tiny sizes on a CPU: proof that the script works, not a measurement. Builds nothing."""
    tiny = ["--model", "DiT-S/8", "--dtype", "fp32", "--device", "cpu", "--steps", "2", "--warmup", "1"]
    ops = ["--device", "cpu", "--batches", "1", "--widths", "72", "--tokens", "16", "--rounds", "3", "--no-compile"]
    report = "import difffit_fast, json; print(json.dumps(difffit_fast.build_info(), indent=1))"
    return [
        Part("build", ["-c", report], 300, 1),
        Part(
            "tests", ["-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "{root}/tests/test_gpu.py"], 300, 1
        ),
        speed_part(out, 256, 1, 300, 1, ["fast", "full"], *tiny),
        Part("ops", ["run_all.py", "--out", str(out), "--seconds", "{seconds}", *ops], 300, 1),
        Part("profile", ["profile_step.py", *tiny, "--batch-size", "1", "--json", str(out / "profile.json")], 300, 1),
        Part("linear-gelu", ["bench_linear_gelu.py", "--json", str(out / "linear_gelu.json")], 300, 1),
    ]


# -- running -----------------------------------------------------------------------------------------------------------
def run_part(part: Part, seconds: float, log: Path) -> tuple[str, int | None]:
    """Run it for at most ``seconds``; ("ok" | "failed" | "timed out", exit code). Everything it prints goes to ``log``."""
    soft = max(1.0, 0.8 * seconds - 10)  # what a part that can stop by itself is told
    words = [w.format(root=ROOT, seconds=f"{soft:.0f}") for w in part.command]
    if words[0].endswith(".py") and not Path(words[0]).is_absolute():
        words[0] = str(BENCHMARKS / words[0])
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **part.environment}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, *words], stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=environment,
            start_new_session=True,  # so that compilers and workers it started can be stopped with it
        )  # fmt: skip
        try:
            code = process.wait(timeout=seconds)
            return ("ok" if code == 0 else "failed"), code
        except subprocess.TimeoutExpired:
            return "timed out", None
        finally:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def tail(log: Path) -> list[str]:
    lines = log.read_bytes().decode(errors="replace").replace("\r", "\n").splitlines() if log.exists() else []
    return [line[:300] for line in lines if line.strip()][-TAIL_LINES:]


def write_summary(path: Path, summary: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".new")
    beside.write_text(json.dumps(summary, indent=1) + "\n")
    os.replace(beside, path)


def run_parts(parts: list[Part], out: Path, budget: float, head: dict[str, Any]) -> dict[str, Any]:
    """All parts in order; the summary is written anew after each."""
    start = time.monotonic()
    summary: dict[str, Any] = {**head, "budget_s": budget, "parts": {}}
    for part in parts:
        left = budget - (time.monotonic() - start)
        need = part.need * min(1.0, budget / DEFAULT_BUDGET)
        if left < need:
            summary["parts"][part.name] = {"status": "skipped", "why": f"{max(left, 0):.0f} s left, {need:.0f} needed"}
            print(f"{part.name:20} skipped: {max(left, 0):.0f} s left", flush=True)
            write_summary(out / "summary.json", summary)
            continue
        seconds = min(left, part.limit * max(1.0, budget / DEFAULT_BUDGET))
        print(f"{part.name:20} at most {seconds:.0f} s ...", flush=True)
        began = time.monotonic()
        log = out / "logs" / f"{part.name}.log"
        try:
            status, code = run_part(part, seconds, log)
        except OSError as error:
            status, code = f"failed: {error}", None
        took = time.monotonic() - began
        summary["parts"][part.name] = {
            "status": status, "exit_code": code, "wall_s": round(took, 1), "limit_s": round(seconds, 1),
            "command": " ".join(part.command), "log_tail": tail(log),
        }  # fmt: skip
        summary["wall_s"] = round(time.monotonic() - start, 1)
        write_summary(out / "summary.json", summary)
        print(f"{part.name:20} {status}, {took:.0f} s", flush=True)
        if status != "ok":
            print("    " + "\n    ".join(tail(log)[-12:]), flush=True)
    return summary


def probe() -> tuple[str, str, str]:
    """Name of the GPU ("" without one), PyTorch's version and its CUDA's, from a process that leaves no context behind."""
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)
    lines = done.stdout.split("\n")
    if done.returncode or len(lines) < 3:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise SystemExit(f"{sys.executable} cannot import PyTorch: {reason}")
    return lines[0], lines[1], lines[2]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=DEFAULT_BUDGET, help="seconds for everything (480)")
    parser.add_argument("--out", type=Path, help="folder of the results (benchmarks/results/<device>)")
    parser.add_argument("--parts", nargs="+", metavar="PART", help="these only, in the order of the list")
    parser.add_argument("--dry-run", action="store_true", help="list the parts and run nothing")
    parser.add_argument("--cpu-smoke", action="store_true", help="the chain at tiny sizes on the CPU; measures nothing")
    args = parser.parse_args(argv)
    # The folder's name is needed before anything runs; a list of parts needs no device.
    name, torch_version, cuda = ("<device>", "", "") if args.dry_run else probe()
    folder = "cpu-smoke" if args.cpu_smoke else re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    out = (args.out or BENCHMARKS / "results" / folder).resolve()
    parts = cpu_parts(out) if args.cpu_smoke else gpu_parts(out)
    names = [p.name for p in parts]
    if unknown := set(args.parts or ()) - set(names):
        parser.error(f"no part named {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    parts = [p for p in parts if not args.parts or p.name in args.parts]
    if not args.cpu_smoke:
        for p in parts:
            p.environment["PYTHONPATH"] = os.pathsep.join([str(BUILT), *filter(None, [os.environ.get("PYTHONPATH")])])
    if args.dry_run:
        for p in parts:
            print(f"{p.name:20} at most {p.limit:4.0f} s   python {' '.join(p.command)}")
        return 0
    if not name and not args.cpu_smoke:
        print(
            f"There is no CUDA device here (PyTorch {torch_version}), so nothing was measured. --dry-run lists the parts."
        )
        return 2
    head = {
        "device": name or "CPU (smoke test, no measurement)", "torch": torch_version, "cuda": cuda,
        "python": sys.version.split()[0],
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }  # fmt: skip
    print(f"{head['device']}, PyTorch {torch_version}; {args.budget:.0f} s for {len(parts)} parts; results in {out}\n")
    summary = run_parts(parts, out, args.budget, head)
    print(f"\nwritten to {out}/summary.json")
    return int(any(p["status"] not in ("ok", "skipped") for p in summary["parts"].values()))


if __name__ == "__main__":
    sys.exit(main())
