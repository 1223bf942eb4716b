"""What all benchmarks of single operations share: sizes, timing, the ceiling they are held against, and the files they write.

How a number is made:

- random data; the variants of one case (ours, plain PyTorch, ``torch.compile``, a copy of as many bytes) take turns, and
  the median of all rounds is reported with the 10th and 90th percentile;
- on CUDA every call is replayed from a CUDA graph, so that no launch gap is counted (``graph`` is false in a row where a
  call could not be captured), between two events, after the L2 cache was overwritten; writing over it also keeps the
  device busy until the launch has arrived;
- bytes are what the formula must move: each input read once, each output written once. GB/s is that over the median
  time; its share is taken of the bandwidth of a large copy (bytes read plus bytes written), measured in the same run;
- before it is timed, ours is compared with the plain reference, and a row carries the error.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from machine import device_name, synchronize
from speed_ratios import spread
from torch import Tensor

from difffit_fast import _files
from difffit_fast.ops.dispatch import pick, room

RESULTS = Path(__file__).resolve().parent / "results"
FLUSH_BYTES = 256 << 20  # several times any GPU's L2 cache
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}  # ‖ours − reference‖ / ‖reference‖
HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}


@dataclass(frozen=True)
class Size:
    """One point of the grid. The residual stream is float32, branches have ``dtype``."""

    B: int
    T: int
    D: int
    dtype: torch.dtype
    device: torch.device

    @property
    def M(self) -> int:
        return self.B * self.T

    @property
    def heads(self) -> int:
        return HEADS.get(self.D, max(1, self.D // 64))

    def draw(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, device=self.device) * scale).to(dtype or self.dtype)

    def stream(self) -> Tensor:
        """A residual stream, (B, T, D), float32."""
        return self.draw(self.B, self.T, self.D, dtype=torch.float32)

    def branch(self) -> Tensor:
        """Activations of a branch, (B, T, D)."""
        return self.draw(self.B, self.T, self.D)

    def rows(self, width: int) -> Tensor:
        """Flattened activations, (B·T, width)."""
        return self.draw(self.M, width)

    def vectors(self, n: int) -> list[Tensor]:
        """``n`` vectors per sample, (B, D), float32."""
        return [self.draw(self.B, self.D, dtype=torch.float32) for _ in range(n)]


@dataclass
class Case:
    """One operation at one size, and the ways to compute it.

    ``in_place`` is the position of the argument that is overwritten; it is restored, untimed, before every call.
    ``compiled`` makes the function of the variant "compile" where it is not simply the compiled reference; ``tolerance`` is for
    what is further from it than its dtype.
    """

    ours: Callable[..., Any]
    reference: Callable[..., Any]
    args: tuple[Any, ...]
    bytes: int
    flops: int = 0
    implementation: str = ""
    in_place: int | None = None
    more: dict[str, Callable[..., Any]] = field(default_factory=dict)
    compiled: Callable[[], Callable[..., Any]] | None = None
    tolerance: float | None = None


Builder = Callable[[Size], "Case | None"]


def nbytes(*values: Any) -> int:
    """Bytes of all tensors in ``values``, tuples included."""
    return sum(t.numel() * t.element_size() for t in tensors(values))


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for v in value for t in tensors(v)] if isinstance(value, (tuple, list)) else []


def kernel_case(
    stem: str,
    reference: Callable[..., Any],
    *args: Any,
    bytes: int | None = None,
    flops: int = 0,
    in_place: int | None = None,
    has_triton: bool = True,
) -> Case:
    """The kernel that the package would choose for these arguments; ``bytes`` where not all of in- and outputs move."""
    like = tensors(args)[0]
    ours = pick(stem, reference, like, has_triton=has_triton)
    if bytes is None:
        kept = [a.clone() if i == in_place else a for i, a in enumerate(args)]
        bytes = nbytes(args, args[in_place] if in_place is not None else reference(*kept))
    return Case(ours, reference, args, bytes, flops, room(like.device, like.dtype, has_triton), in_place)


# -- timing ----------------------------------------------------------------------------------------------------------
@dataclass
class Call:
    run: Callable[[], Any]
    prepare: Callable[[], Any] | None = None
    graph: bool = False


def bind(function: Callable[..., Any], case: Case) -> Call:
    """``function`` on the arguments of ``case``, with its own copy of the one it overwrites."""
    if case.in_place is None:
        return Call(lambda: function(*case.args))
    original = case.args[case.in_place]
    mine = original.clone()
    args = tuple(mine if i == case.in_place else a for i, a in enumerate(case.args))
    return Call(lambda: function(*args), lambda: mine.copy_(original))


def outputs(function: Callable[..., Any], case: Case) -> list[Tensor]:
    args = [a.clone() if i == case.in_place else a for i, a in enumerate(case.args)]
    result = function(*args)
    return [args[case.in_place]] if case.in_place is not None else tensors(result)


def error_of(case: Case) -> float:
    """The largest ‖ours − reference‖ / ‖reference‖ of all outputs."""
    pairs = zip(outputs(case.ours, case), outputs(case.reference, case), strict=True)
    errors = [((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item() for a, b in pairs]
    return max((float("inf") if e != e else e for e in errors), default=0.0)


def _graphed(call: Call) -> Call:
    """The same from a CUDA graph, if it can be captured."""
    from difffit_fast.graph import capture

    def step() -> None:
        call.run()

    try:
        return Call(capture(step), call.prepare, graph=True)
    except RuntimeError:
        torch.cuda.synchronize()
        return call


def measure(calls: dict[str, Call], device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Seconds of every call, ``rounds`` times, in turn. On CUDA after flushing the L2 cache, between two events."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    if device.type == "cuda":
        flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
        for _ in range(rounds):
            for name, call in calls.items():
                start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                if call.prepare:
                    call.prepare()
                flush.zero_()
                start.record()
                call.run()
                stop.record()
                stop.synchronize()
                times[name].append(start.elapsed_time(stop) / 1e3)
        return times
    inner = {name: 1 if call.prepare else _repeats(call) for name, call in calls.items()}
    for _ in range(rounds):
        for name, call in calls.items():
            if call.prepare:
                call.prepare()
            start_s = time.perf_counter()
            for _ in range(inner[name]):
                call.run()
            times[name].append((time.perf_counter() - start_s) / inner[name])
    return times


def _repeats(call: Call, enough: float = 2e-4) -> int:
    """How often a call on the CPU is repeated between two looks at the clock."""
    call.run()
    start = time.perf_counter()
    call.run()
    return max(1, min(100, int(enough / max(time.perf_counter() - start, 1e-7))))


def copy_call(bytes: int, device: torch.device) -> Call:
    """A copy that reads and writes ``bytes`` in total."""
    source = torch.randint(0, 255, (max(bytes // 2, 1),), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Call(lambda: target.copy_(source))


def copy_bandwidth(device: torch.device, rounds: int = 20) -> float:
    """GB/s of a large copy, bytes read plus bytes written: the ceiling of everything that is bound by memory."""
    bytes = 2 << 30 if device.type == "cuda" else 64 << 20
    call = copy_call(bytes, device)
    call.run()
    return bytes / spread(measure({"copy": call}, device, rounds)["copy"])["median"] / 1e6


def run_case(op: str, kernel: str, size: Size, build: Builder, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one kernel at one size, one for each variant; empty where the kernel has no use there."""
    case = build(size)
    if case is None:
        return []
    error = error_of(case)
    calls = {"ours": bind(case.ours, case), "eager": bind(case.reference, case)}
    calls |= {name: bind(function, case) for name, function in case.more.items()}
    if options.compile and size.D in (options.compile_widths or [size.D]):
        torch._dynamo.reset()  # one function at many sizes would run into the limit of recompilations
        calls["compile"] = bind(
            case.compiled() if case.compiled else torch.compile(case.reference, dynamic=False), case
        )
    calls["copy"] = copy_call(case.bytes, size.device)
    with torch.no_grad():
        for call in calls.values():
            call.run()  # compiles
        synchronize(size.device)
        if size.device.type == "cuda":
            calls = {name: _graphed(call) for name, call in calls.items()}
        times = measure(calls, size.device, options.rounds)
    rows = []
    for name, call in calls.items():
        us = {k: 1e3 * v for k, v in spread(times[name]).items()}
        gbs = case.bytes / us["median"] / 1e3
        rows.append(
            {
                "op": op, "kernel": kernel, "variant": name,
                "implementation": case.implementation if name == "ours" else "",
                "B": size.B, "M": size.M, "D": size.D, "dtype": _name(size.dtype), "stream": "fp32",
                "median_us": us["median"], "p10_us": us["p10"], "p90_us": us["p90"],
                "bytes": case.bytes, "gbs": gbs, "share_of_copy": gbs / options.copy_gbs,
                "tflops": case.flops / us["median"] / 1e6 if name != "copy" else 0.0, "graph": call.graph,
                "error": error if name == "ours" else 0.0, "error_allowed": case.tolerance or TOLERANCE[size.dtype],
            }
        )  # fmt: skip
    return rows


def _name(dtype: torch.dtype) -> str:
    return next(name for name, d in DTYPES.items() if d == dtype)


# -- where and with what ---------------------------------------------------------------------------------------------
def clocks() -> dict[str, str] | None:
    """What nvidia-smi says of clocks, power and temperature, or None without it."""
    fields = ["name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "temperature.gpu"]
    command = ["nvidia-smi", "--query-gpu=" + ",".join(fields), "--format=csv,noheader"]
    try:
        out = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(fields, [v.strip() for v in out.splitlines()[0].split(",")], strict=False)) if out else None


def environment(device: torch.device) -> dict[str, Any]:
    """Device, versions, clocks and date: the head of every file of results."""
    triton = None
    if importlib.util.find_spec("triton"):
        from importlib.metadata import PackageNotFoundError, version

        try:
            triton = version("triton")
        except PackageNotFoundError:
            triton = "unknown"
    return {
        "device": device_name(device), "torch": torch.__version__, "triton": triton, "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,
        "python": platform.python_version(), "clocks": clocks() if device.type == "cuda" else None,
        "kernels": os.environ.get("DIFFFIT_FAST_KERNELS", "auto"),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
    }  # fmt: skip


def slug(name: str) -> str:
    """A device's name as a folder: "NVIDIA H200" -> "nvidia-h200"."""
    name = re.sub(r"\((r|tm)\)|\bCPU\b|,.*$", "", name, flags=re.IGNORECASE)
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unknown"


def write_text(path: Path, text: str) -> None:
    """Written beside and renamed, so that no reader ever sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _files.write_text(path, text)


def write_json(path: Path, record: Any) -> None:
    write_text(path, json.dumps(record, indent=1) + "\n")


def write_csv(path: Path, head: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """Rows with device, versions and date in every one of them, so that files of several devices can be joined."""
    constant = {k: head[k] for k in ("device", "torch", "triton", "cuda", "date")}
    path.parent.mkdir(parents=True, exist_ok=True)
    with _files.replacing(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *constant] if rows else list(constant))
        writer.writeheader()
        for row in rows:
            rounded = {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in row.items()}
            writer.writerow(rounded | constant)


def print_rows(rows: Iterable[dict[str, Any]]) -> None:
    for r in rows:
        rate = f"{r['tflops']:8.1f} TFLOP/s" if r["tflops"] else f"{r['gbs']:8.0f} GB/s {r['share_of_copy']:5.0%}"
        wrong = f"  ERROR {r['error']:.1e}" if r["error"] > r["error_allowed"] else ""
        print(
            f"{r['kernel']:26} {r['dtype']} B {r['B']:3} D {r['D']:4} {r['variant']:16} {r['median_us']:10.1f} µs "
            f"[{r['p10_us']:.1f}, {r['p90_us']:.1f}] {rate}{wrong}",
            flush=True,
        )


# -- command line ----------------------------------------------------------------------------------------------------
def parser(description: str | None) -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--batches", nargs="+", type=int, help="images B, M = T·B rows (32 8 128 1; on the CPU 4 1)")
    p.add_argument("--widths", nargs="+", type=int, help="D (1152 1024 768 384; on the CPU 384)")
    p.add_argument("--tokens", type=int, default=256, help="T, tokens per image")
    p.add_argument("--dtypes", nargs="+", choices=DTYPES, help="dtype of the branches (bf16 fp32; on the CPU fp32)")
    p.add_argument("--rounds", type=int, default=30)
    p.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    p.add_argument("--compile-widths", nargs="+", type=int, help="torch.compile at these widths only")
    p.add_argument("--seconds", type=float, help="start no further case after that time")
    p.add_argument("--json", type=Path, help="write the rows there, and beside it a .csv")
    return p


def complete(options: argparse.Namespace) -> argparse.Namespace:
    """Fill in what depends on the device, and measure the ceiling."""
    cuda = torch.device(options.device).type == "cuda"
    if cuda and not torch.cuda.is_available():
        raise SystemExit("--device cuda, but PyTorch sees no CUDA device")
    options.batches = options.batches or ([32, 8, 128, 1] if cuda else [4, 1])
    options.widths = options.widths or ([1152, 1024, 768, 384] if cuda else [384])
    options.dtypes = options.dtypes or (["bf16", "fp32"] if cuda else ["fp32"])
    torch.manual_seed(0)
    options.copy_gbs = copy_bandwidth(torch.device(options.device), min(options.rounds, 20))
    return options


def sizes(options: argparse.Namespace) -> Iterator[Size]:
    """The grid, what matters most first."""
    for dtype in options.dtypes:
        for D in options.widths:
            for B in options.batches:
                yield Size(B, options.tokens, D, DTYPES[dtype], torch.device(options.device))


def run_grid(ops: dict[str, dict[str, Builder]], options: argparse.Namespace) -> dict[str, Any]:
    """Every kernel of every op at every size; the file is written anew after each size, a case that fails is recorded."""
    start = time.monotonic()
    device = torch.device(options.device)
    head = environment(device)
    record = {**head, "copy_gbs": options.copy_gbs, "rounds": options.rounds, "rows": [], "failed": {}, "left_out": []}
    print(f"{head['device']}, PyTorch {head['torch']}, copy {options.copy_gbs:.0f} GB/s\n", flush=True)
    for size in sizes(options):
        for op, kernels in ops.items():
            for kernel, build in kernels.items():
                label = f"{kernel} B={size.B} D={size.D} {_name(size.dtype)}"
                if options.seconds and time.monotonic() - start > options.seconds:
                    record["left_out"].append(label)
                    continue
                try:
                    rows = run_case(op, kernel, size, build, options)
                    print_rows(rows)
                    record["rows"] += rows
                except Exception as error:  # one case that fails must not lose the others
                    record["failed"][label] = f"{type(error).__name__}: {error}"[:400]
                    print(f"{label} failed: {record['failed'][label]}", flush=True)
                    if device.type == "cuda":
                        torch.cuda.synchronize()  # raises if the device is lost, and with it all that would follow
        if options.json:
            write_json(options.json, record)
            write_csv(options.json.with_suffix(".csv"), head, record["rows"])
    if record["left_out"]:
        print(f"\n{len(record['left_out'])} cases left out: {options.seconds:.0f} seconds were over")
    return record


def exit_code(record: dict[str, Any]) -> int:
    """1 if a case failed or a kernel was wrong."""
    wrong = [r for r in record["rows"] if r["error"] > r["error_allowed"]]
    return int(bool(record["failed"] or wrong or not record["rows"]))


def main(op: str, kernels: dict[str, Builder], description: str | None, argv: list[str] | None = None) -> int:
    """The command line of ``bench_<op>.py``."""
    options = complete(parser(description).parse_args(argv))
    return exit_code(run_grid({op: kernels}, options))
