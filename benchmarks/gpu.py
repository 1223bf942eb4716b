#!/usr/bin/env python
"""Everything that needs a GPU, in one command: build, tests, step times, kernels, profile. `make gpu` calls it.

Command: python benchmarks/gpu.py [--budget 540] [--out FOLDER] [--pack PATH.tgz] [--parts build smoke ...] [--dry-run]

It uses the Python that runs it, with its PyTorch, and no network. Nothing is installed: the package with its extension is
built into build/gpu, and the parts find it there through PYTHONPATH. A build that fails ends the run (--keep-going does not).
Every part is a process of its own with a limit of its own, most valuable first, and leaves its files and its line in
summary.json (status, seconds, end of the log) as soon as it ends: a part that fails or is stopped loses no other's results.
Step times are written after every mode, operations after every size. Parts for which the budget has no time left are
skipped, and the summary says so. --pack makes one archive of all results so far after every part, with summary.json beside it.

What does not fit one budget is had by a second call, on what the first one built:

    python benchmarks/gpu.py --budget 300 --pack out/gpu.tgz --parts build smoke speed-256px-b32 profile
    python benchmarks/gpu.py --budget 300 --pack out/gpu.tgz --parts tests ops speed-256px-b8 speed-256px-b32-whole

Exit codes: 0 all parts succeeded or were skipped for want of time, 1 a part failed, 2 there is no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
BUILT = ROOT / "build" / "gpu"  # the package as it would be installed: kernels/ is difffit_fast.kernels there
DEFAULT_BUDGET = 540.0
TAIL_LINES = 40
PROBE = (
    "import torch; c = torch.cuda.is_available(); "
    "print('\\n'.join([torch.cuda.get_device_name() if c else '', torch.__version__, str(torch.version.cuda)]))"
)


@dataclass
class Part:
    """One process: ``limit`` seconds at most at the default budget, not started with less than ``need`` seconds left.

    Without a ``vital`` part the others would measure something else: they are not run when it fails.
    """

    name: str
    command: list[str]
    limit: float
    need: float
    environment: dict[str, str] = field(default_factory=dict)
    vital: bool = False


# A capture that fails leaves the process unable to capture or to draw random numbers, so each rival that is captured has a part
# of its own; the strongest of a kind come first. What is compiled as a whole takes minutes with DiT-XL/2, a block takes seconds.
HEADLINE = ("fast-graph", "full-blocks-graph", "full-blocks", "full")
FROZEN = ("fast-graph", "frozen-blocks-graph", "frozen-blocks", "frozen")
OTHERS = ("fast-graph", "full-graph", "fast", "lora", "full-tf32", "frozen-graph")
STRONGEST = ("fast-graph", "full-blocks-graph")
WHOLE = ("fast-graph", "full-compile", "frozen-compile", "fast-compile")
FITTING = ("fast-graph", "full-blocks-graph")
EIGHT_BIT = ("fast-graph", "fast-fp8-graph", "fast-int8-graph", "fast", "fast-fp8", "fast-int8")
EIGHT_BIT_TESTS = "{root}/tests/test_eight_bit.py"


def list_parts(out: Path, tiny: bool = False) -> list[Part]:
    """What runs on a GPU, in the order of its value; ``tiny``: the same on a CPU, to try the chain, at sizes of no interest."""
    model = ["--model", "DiT-S/4", "--dtype", "fp32", "--device", "cpu"] if tiny else []
    model = model or ["--model", "DiT-XL/2", "--dtype", "bf16", "--device", "cuda"]
    device = "cpu" if tiny else "cuda"

    def speed(
        image: int,
        batch: int,
        limit: float,
        need: float,
        modes: Sequence[str],
        *more: str,
        tag: str = "",
        stem: str = "speed",
    ) -> Part:
        """speed.py at one size; it is told its limit, so that it ends with fewer rounds rather than with nothing."""
        name = f"{stem}-{image}px-b{batch}{tag}"
        if tiny:
            image, batch, modes = 64, 4, (modes[0], "fast", "full", *(m for m in modes if m == "fast-int8"))
        command = ["speed.py", "--image-size", str(image), "--batch-size", str(batch), "--modes", *modes, "--no-memory"]
        command += [*model, "--seconds", "{seconds}", "--json", str(out / f"{name}.json"), *more]
        return Part(name, command, limit, need)

    # Safe path: `python -m pytest` would put the source tree, where nothing is built, before PYTHONPATH.
    pytest = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=10", *([] if tiny else ["-m", "gpu"])]
    safe = {"PYTHONSAFEPATH": "1"}
    strict = {"DIFFFIT_FAST_REQUIRE_EXT": "1", "DIFFFIT_FAST_CUDA": os.environ.get("DIFFFIT_FAST_CUDA", "1")}
    report = (
        "import difffit_fast, json; i = difffit_fast.build_info(); print(json.dumps(i, indent=1)); assert i['built']"
    )
    setup = ["-c", report] if tiny else ["{root}/setup.py", "-q", "build", "--build-lib", str(BUILT)]
    grid = ["--batches", "1", "--widths", "72", "--tokens", "16", "--rounds", "3", "--no-compile"] if tiny else []
    eight_bit = ["--widths", "1152", "--dtypes", "bf16", "--no-compile"]
    plans, interpreted = [*eight_bit, "--batches", "32", "--rounds", "20"], {"TRITON_INTERPRET": "1"} if tiny else {}
    tests = ["{root}/tests/test_gpu.py"] if tiny else gpu_tests()
    profile = (
        ["--mode", "fast", "--image-size", "64", "--batch-size", "2", "--steps", "2"]
        if tiny
        else ["--mode", "fast-graph", "--steps", "3"]
    )
    return [
        Part("build", setup, 120, 10, strict, vital=True),
        Part("smoke", [*pytest, "{root}/tests/test_gpu_smoke.py"], 60, 15, safe),
        speed(256, 32, 90, 40, HEADLINE),
        speed(256, 32, 70, 30, FROZEN, tag="-frozen"),
        Part("profile", ["profile_step.py", *model, *profile, "--json", str(out / "profile-256px-b32.json")], 60, 15),
        Part("tests", [*pytest, *tests], 110, 20, safe),
        # What multiplies in eight bits comes after what it could disturb: kernels, steps, and both with the plain product.
        Part("eight-bit-tests", [*pytest, EIGHT_BIT_TESTS], 90, 20, safe),
        speed(256, 32, 80, 30, EIGHT_BIT, stem="eight-bit"),  # not speed-….json: those are the rows of the README's table
        Part("eight-bit-ops", ["bench_eight_bit.py", "--device", device, *(grid or eight_bit), "--seconds", "{seconds}",
                               "--json", str(out / "eight_bit.json")], 60, 15),
        Part("ops", ["run_all.py", "--device", device, "--out", str(out), *(grid or ["--compile-widths", "1152"]),
                     "--seconds", "{seconds}"], 75, 20),
        Part("attention-plans", ["bench_attention_plans.py", "--device", device, *(grid or plans), "--seconds", "{seconds}",
                                 "--json", str(out / "attention_plans.json")], 110, 40, interpreted),
        speed(256, 8, 50, 25, STRONGEST),
        speed(256, 8, 50, 25, FROZEN, tag="-frozen"),
        speed(256, 128, 100, 40, STRONGEST, "--inner", "2"),
        speed(512, 8, 80, 40, STRONGEST),
        speed(512, 32, 100, 40, STRONGEST, "--inner", "2"),
        speed(256, 32, 80, 30, OTHERS, tag="-others"),
        speed(256, 32, 240, 150, WHOLE, tag="-whole"),
        speed(256, 32, 180, 90, FITTING, "--steps", "3", "--equal-memory", *(["1"] if tiny else ["24", "80"]), tag="-fits"),
        Part("linear-gelu", ["bench_linear_gelu.py", "--seconds", "{seconds}", "--json", str(out / "linear_gelu.json")],
             60, 20),
    ]  # fmt: skip


def gpu_tests() -> list[str]:
    """The files that have tests for a GPU: collecting all the others takes as long as running these."""
    files = sorted((ROOT / "tests").glob("test_*.py"))
    own = ("test_gpu_smoke.py", Path(EIGHT_BIT_TESTS).name)  # which have parts of their own
    return [str(f) for f in files if re.search(r"mark\.gpu|\bROOMS\b", f.read_text()) and f.name not in own]


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


def pack_results(out: Path, pack: Path) -> None:
    """One archive of all results so far, and the summary beside it: what is left if nothing more comes."""
    pack.parent.mkdir(parents=True, exist_ok=True)
    beside = pack.with_name(pack.name + ".new")
    with tarfile.open(beside, "w:gz") as archive:
        archive.add(out, arcname=out.name)
    os.replace(beside, pack)
    shutil.copy(out / "summary.json", pack.with_name("summary.json"))


def run_parts(
    parts: list[Part],
    out: Path,
    budget: float,
    head: dict[str, Any],
    pack: Path | None = None,
    keep_going: bool = False,
) -> dict[str, Any]:
    """All parts in order; the summary, and the archive if one is wanted, are written anew after each."""
    start = time.monotonic()
    summary: dict[str, Any] = {**head, "budget_s": budget, "parts": {}}

    def write() -> None:
        write_summary(out / "summary.json", summary)
        if pack is not None:
            try:
                pack_results(out, pack)
            except OSError as error:  # the results are there all the same
                print(f"    {pack} not written: {error}", flush=True)

    for part in parts:
        left = budget - (time.monotonic() - start)
        need = part.need * min(1.0, budget / DEFAULT_BUDGET)
        if left < need:
            summary["parts"][part.name] = {"status": "skipped", "why": f"{max(left, 0):.0f} s left, {need:.0f} needed"}
            print(f"{part.name:22} skipped: {max(left, 0):.0f} s left", flush=True)
            write()
            continue
        seconds = min(left, part.limit * max(1.0, budget / DEFAULT_BUDGET))
        print(f"{part.name:22} at most {seconds:.0f} s ...", flush=True)
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
        write()
        print(f"{part.name:22} {status}, {took:.0f} s", flush=True)
        if status != "ok":
            print("    " + "\n    ".join(tail(log)[-12:]), flush=True)
            if part.vital and not keep_going:
                summary["stopped"] = f"{part.name} {status}: nothing after it was run (--keep-going runs it)"
                print(f"\n{summary['stopped']}", flush=True)
                write()
                break
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
    parser.add_argument("--budget", type=float, default=DEFAULT_BUDGET, help="seconds for everything (540)")
    parser.add_argument("--out", type=Path, help="folder of the results (benchmarks/results/<device>)")
    parser.add_argument(
        "--pack", type=Path, help="a .tgz of all results so far, after every part; summary.json beside it"
    )
    parser.add_argument("--keep-going", action="store_true", help="run the other parts although the build failed")
    parser.add_argument("--parts", nargs="+", metavar="PART", help="these only, in the order of the list")
    parser.add_argument("--dry-run", action="store_true", help="list the parts and run nothing")
    parser.add_argument("--cpu-smoke", action="store_true", help="the chain at tiny sizes on the CPU; measures nothing")
    args = parser.parse_args(argv)
    # The folder's name is needed before anything runs; a list of parts needs no device.
    name, torch_version, cuda = ("<device>", "", "") if args.dry_run else probe()
    default = BENCHMARKS / "results" / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    out = (args.out or (ROOT / "build" / "cpu-smoke" if args.cpu_smoke else default)).resolve()
    parts = list_parts(out, tiny=args.cpu_smoke)
    names = [p.name for p in parts]
    if unknown := set(args.parts or ()) - set(names):
        parser.error(f"no part named {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    parts = [p for p in parts if not args.parts or p.name in args.parts]
    if not args.cpu_smoke:
        for p in parts:
            p.environment["PYTHONPATH"] = os.pathsep.join([str(BUILT), *filter(None, [os.environ.get("PYTHONPATH")])])
    if args.dry_run:
        for p in parts:
            print(f"{p.name:22} at most {p.limit:4.0f} s   python {' '.join(p.command)}")
        return 0
    if not name and not args.cpu_smoke:
        print(
            f"There is no CUDA device here (PyTorch {torch_version}), so nothing was measured. --dry-run lists the parts."
        )
        return 2
    if not args.cpu_smoke and "build" not in [p.name for p in parts] and not BUILT.is_dir():
        print(f"Nothing is built in {BUILT}: name the part build, too.")
        return 1
    head = {
        "device": name or "CPU (smoke test, no measurement)", "torch": torch_version, "cuda": cuda,
        "python": sys.version.split()[0],
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }  # fmt: skip
    print(f"{head['device']}, PyTorch {torch_version}; {args.budget:.0f} s for {len(parts)} parts; results in {out}\n")
    summary = run_parts(parts, out, args.budget, head, args.pack, args.keep_going)
    print(f"\nwritten to {out}/summary.json" + (f" and {args.pack}" if args.pack else ""))
    return int(any(p["status"] not in ("ok", "skipped") for p in summary["parts"].values()))


if __name__ == "__main__":
    sys.exit(main())
