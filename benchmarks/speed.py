#!/usr/bin/env python
"""Training speed of DiffFit against the strongest full fine-tuning, in one interleaved run.

    python benchmarks/speed.py                                   # this machine's default
    python benchmarks/speed.py --model DiT-XL/2 --batch-size 32 --dtype bf16 --json out.json

Every mode takes the same model, batch, precision and data; a step is forward, backward, fused AdamW and EMA. One step of
each mode in turn, many rounds, medians with 10th and 90th percentiles. The floor is the same sequence of matrix products
and attentions, nothing else, with the fastest library call for each shape, interleaved with the modes. Peak memory is
measured in a process for each mode; with --no-memory, on CUDA, from the allocator while the modes are warmed up.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from floor import Floor
from modes import MODES, available_modes, build_mode
from torch import Tensor

from difffit_fast._devices import cpu_has_fast
from difffit_fast._files import write_text

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def default_dtype(device: torch.device) -> str:
    """bf16 where the hardware multiplies it; fp32 on a CPU that does not."""
    if device.type == "cuda":
        return "bf16"
    return "bf16" if cpu_has_fast(torch.bfloat16) else "fp32"


def make_batch(config: dict[str, Any], batch_size: int, device: torch.device, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    side, channels = config["input_size"], config["in_channels"]
    out = 2 * channels if config["learn_sigma"] else channels
    batch = {
        "x": torch.randn(batch_size, channels, side, side, generator=g),
        "t": torch.randint(0, 1000, (batch_size,), generator=g),
        "y": torch.randint(0, config["num_classes"], (batch_size,), generator=g),
        "target": torch.randn(batch_size, out, side, side, generator=g),
    }
    return {k: v.to(device) for k, v in batch.items()}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(step: Callable[[], None], device: torch.device, inner: int) -> float:
    """Seconds of one step; ``inner`` steps between two synchronisations."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(inner):
        step()
    synchronize(device)
    return (time.perf_counter() - start) / inner


def spread(seconds: list[float]) -> dict[str, float]:
    ms = sorted(1e3 * s for s in seconds)
    quantile = lambda q: ms[min(len(ms) - 1, round(q * (len(ms) - 1)))]  # noqa: E731
    return {"median": statistics.median(ms), "p10": quantile(0.1), "p90": quantile(0.9)}


# -- peak memory, one process for each mode ------------------------------------------------------------------------------
def resident_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    return 0


def measure_memory(args: argparse.Namespace, mode: str) -> int:
    """Peak bytes of a few steps, beyond what the process held before the model was made."""
    device = torch.device(args.device)
    before = resident_bytes("VmRSS")
    built = build_mode(mode, args.config, DTYPES[args.dtype], device, make_batch(args.config, args.batch_size, device))
    for _ in range(3):
        built.step()
    if device.type == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(device)
    return resident_bytes("VmHWM") - before


def memory_in_own_process(args: argparse.Namespace, mode: str) -> int | None:
    command = [
        sys.executable,
        __file__,
        "--memory-of",
        mode,
        "--model",
        args.model,
        "--image-size",
        str(args.image_size),
    ]
    command += ["--batch-size", str(args.batch_size), "--dtype", args.dtype, "--device", args.device]
    command += ["--threads", str(args.threads)] if args.threads else []
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        return int(done.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        print(
            f"  peak memory of {mode} not measured: {(done.stderr.strip().splitlines() or ['no output'])[-1]}",
            flush=True,
        )
        return None


# -- the run -------------------------------------------------------------------------------------------------------------
def run(args: argparse.Namespace) -> dict[str, Any]:
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    batch = make_batch(args.config, args.batch_size, device)
    began = time.monotonic()
    built: dict[str, Any] = {}
    failed: dict[str, str] = {}
    peaks: dict[str, int] = {}
    floors = {kind: Floor(args.config, args.batch_size, dtype, device, kind) for kind in ("full", "frozen")}
    for name in args.modes:
        if args.seconds and time.monotonic() - began > 0.7 * args.seconds:
            failed[name] = f"left out: 70 % of --seconds {args.seconds:g} were over"
            continue
        print(f"building {name} ...", flush=True)
        try:
            before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            built[name] = build_mode(name, args.config, dtype, device, batch)
            for _ in range(args.warmup):
                built[name].step()
            synchronize(device)
            if device.type == "cuda":
                if not name.endswith("-graph"):  # a graph's own memory is not counted while it is replayed
                    torch.cuda.reset_peak_memory_stats(device)
                built[name].step()
                peaks[name] = torch.cuda.max_memory_allocated(device) - before
        except Exception as error:  # one mode that fails must not lose the others
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            print(f"  {name} failed: {failed[name]}", flush=True)
            built.pop(name, None)
            if device.type == "cuda":
                torch.cuda.empty_cache()
    steps: dict[str, Callable[[], None]] = {name: mode.step for name, mode in built.items()}
    steps |= {f"floor:{kind}": floor.step for kind, floor in floors.items()}
    for floor in floors.values():
        floor.step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for r in range(args.steps):
        if args.seconds and r >= 3 and time.monotonic() - began > args.seconds:
            break
        print(f"\rround {r + 1}/{args.steps}", end="", flush=True)
        for name, step in steps.items():
            times[name].append(timed(step, device, args.inner))
    print(flush=True)

    modes: dict[str, Any] = {}
    for name, mode in built.items():
        step_ms = spread(times[name])
        modes[name] = {
            "step_ms": step_ms,
            "images_per_second": 1e3 * args.batch_size / step_ms["median"],
            "peak_memory_bytes": peaks.get(name) if args.no_memory else memory_in_own_process(args, name),
            "trainable_parameters": mode.trainable_parameters,
            "checkpoint_bytes": mode.checkpoint_bytes,
        }
    floor = {f"{kind}_ms": spread(times[f"floor:{kind}"])["median"] for kind in floors}
    result = {
        "device": device_name(device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": "python benchmarks/speed.py " + " ".join(sys.argv[1:]),
        "kernels": os.environ.get("DIFFFIT_FAST_KERNELS", "auto"),
        "model": args.model,
        "image_size": args.image_size,
        "batch_size": args.batch_size,
        "dtype": args.dtype,
        "steps": len(times["floor:frozen"]),
        "floor": floor | {"calls": floors["frozen"].calls, "spread": {k: spread(times[f"floor:{k}"]) for k in floors}},
        "modes": modes,
        "failed": failed,
        "ratios": ratios(modes, times, floor),
    }
    return result


def best(modes: dict[str, Any], names: tuple[str, ...]) -> str | None:
    present = [n for n in names if n in modes]
    return min(present, key=lambda n: modes[n]["step_ms"]["median"]) if present else None


def ratios(modes: dict[str, Any], times: dict[str, list[float]], floor: dict[str, float]) -> dict[str, Any]:
    """Ours against the best of each kind: ratio of medians, and the spread of the ratios of single rounds."""
    ours = best(modes, ("fast", "fast-compile", "fast-graph"))
    if ours is None:
        return {}
    out: dict[str, Any] = {"ours": ours}
    for key, names in (
        ("vs_best_full", ("full", "full-compile")),
        ("vs_best_frozen", ("frozen", "frozen-compile")),
        ("vs_lora", ("lora",)),
        ("vs_full_tf32", ("full-tf32",)),
    ):
        other = best(modes, names)
        if other is None:
            continue
        rounds = [a / b for a, b in zip(times[other], times[ours], strict=True)]
        value = modes[other]["step_ms"]["median"] / modes[ours]["step_ms"]["median"]
        out[key] = {"of": other, "ratio": value} | {f"round_{k}": v / 1e3 for k, v in spread(rounds).items()}
    out["step_over_floor"] = modes[ours]["step_ms"]["median"] / floor["frozen_ms"]
    memories = [modes[n]["peak_memory_bytes"] for n in ("full", "full-compile") if n in modes]
    mine = modes[ours]["peak_memory_bytes"]
    if mine and any(memories):
        out["memory_of_best_full"] = mine / min(m for m in memories if m)
    return out


def print_table(result: dict[str, Any]) -> None:
    head = f"{result['model']}, {result['image_size']} px, batch {result['batch_size']}, {result['dtype']}"
    print(f"\n{head}\n{result['device']}, PyTorch {result['torch']}, {result['date']}\n")
    print(
        f"{'mode':16}{'ms/step':>10}{'p10':>9}{'p90':>9}{'images/s':>10}{'peak MiB':>10}{'trainable':>13}{'stored MB':>11}"
    )
    for name, m in result["modes"].items():
        s, memory = m["step_ms"], m["peak_memory_bytes"]
        shown = f"{memory / 2**20:10.0f}" if memory else f"{'-':>10}"
        print(
            f"{name:16}{s['median']:10.1f}{s['p10']:9.1f}{s['p90']:9.1f}{m['images_per_second']:10.2f}{shown}"
            f"{m['trainable_parameters']:13,}{m['checkpoint_bytes'] / 1e6:11.2f}"
        )
    for kind in ("full", "frozen"):
        print(f"{'floor ' + kind:16}{result['floor'][kind + '_ms']:10.1f}")
    for key, value in result["ratios"].items():
        if isinstance(value, dict):
            print(
                f"{key:22} {value['ratio']:.2f}x ({value['of']}; per round {value['round_p10']:.2f} to {value['round_p90']:.2f})"
            )
        elif isinstance(value, float):
            print(f"{key:22} {value:.2f}")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="DiT-XL/2 on CUDA, DiT-S/2 on the CPU")
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=None, help="32 on CUDA, 4 on the CPU")
    parser.add_argument(
        "--dtype", choices=sorted(DTYPES), default=None, help="bf16 where the hardware has it, else fp32"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=None, metavar="MODE", help=", ".join(MODES))
    parser.add_argument("--steps", type=int, default=None, help="rounds: timed steps of each mode (20)")
    parser.add_argument(
        "--inner", type=int, default=None, help="steps between synchronisations (5 on CUDA, 1 on the CPU)"
    )
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--seconds", type=float, default=None, help="leave out modes and rounds beyond about that time")
    parser.add_argument("--num-classes", type=int, default=101)
    parser.add_argument("--no-memory", action="store_true", help="skip the processes that measure peak memory")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--memory-of", default=None, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    cuda = torch.device(args.device).type == "cuda"
    if cuda and not torch.cuda.is_available():
        parser.error("--device cuda, but PyTorch sees no CUDA device")
    args.model = args.model or ("DiT-XL/2" if cuda else "DiT-S/2")
    args.batch_size = args.batch_size or (32 if cuda else 4)
    args.dtype = args.dtype or default_dtype(torch.device(args.device))
    args.steps, args.inner = args.steps or 20, args.inner or (5 if cuda else 1)
    if args.threads:
        torch.set_num_threads(args.threads)
    from difffit_fast.models.dit import DiT_models

    if args.model not in DiT_models:
        parser.error(f"--model must be one of {', '.join(DiT_models)}")
    with torch.device("meta"):
        args.config = DiT_models[args.model](input_size=args.image_size // 8, num_classes=args.num_classes).config
    args.modes = args.modes or available_modes(torch.device(args.device))
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.memory_of:
        print(measure_memory(args, args.memory_of))
        return 0
    if args.device == "cpu" and args.dtype == "bf16" and default_dtype(torch.device("cpu")) != "bf16":
        print("note: this CPU has no bf16 matrix instructions; PyTorch emulates them and the baselines suffer from it")
    result = run(args)
    print_table(result)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        write_text(args.json, json.dumps(result, indent=2) + "\n")
        print(f"\nwritten to {args.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
