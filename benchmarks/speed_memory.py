"""Peak memory of the modes of speed.py, each in a process of its own, and how large a batch fits a given memory.

Peak bytes are those of training steps beyond what the process held before the model was made: allocated memory on CUDA,
resident memory on a CPU. These processes also compile what a mode compiles, so that the caches on disk are warm when
speed.py itself builds it; they never run while steps are timed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import synchronize, timed
from modes import OURS, Kind, build_mode, kind_of, make_batch, ways

SPEED = Path(__file__).with_name("speed.py")
GB = 10**9
TRIES = 4  # batches that are tried under a cap, each 5 % smaller than the one that did not fit
MEMORY_ERRORS = ("out of memory", "can't allocate memory", "not enough memory")


def out_of_memory(error: BaseException) -> bool:
    """Whether this is the allocator's complaint, on CUDA or on a CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in MEMORY_ERRORS)


# -- inside the process --------------------------------------------------------------------------------------------------
def resident_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    return 0


def measure(args: argparse.Namespace, mode: str, dtype: torch.dtype) -> dict[str, Any]:
    """Peak bytes and seconds of a step in this process, under ``args.cap_bytes`` on CUDA; or that memory was not enough."""
    device = torch.device(args.device)
    cuda = device.type == "cuda"
    if cuda and args.cap_bytes:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, args.cap_bytes / total), device)
    before = 0 if cuda else resident_bytes("VmRSS")
    try:
        kinds = {kind_of(mode): Kind(kind_of(mode), args.config, dtype, device)}
        batch = make_batch(args.config, args.batch_size, device)
        if cuda:  # what making the model took does not count
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        else:
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        built = build_mode(mode, args.config, dtype, device, batch, kinds)
        built.step()
        if cuda and "graph" not in ways(mode):  # a graph's own memory is not counted while it is replayed
            synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        seconds = statistics.median(timed(built.step, device, 1) for _ in range(5 if cuda else 1))
    except Exception as error:
        if not out_of_memory(error):
            raise
        return {"out_of_memory": True}
    peak = torch.cuda.max_memory_allocated(device) if cuda else resident_bytes("VmHWM") - before
    return {"peak_bytes": peak, "seconds": seconds}


# -- starting them -------------------------------------------------------------------------------------------------------
def command(args: argparse.Namespace, mode: str, batch_size: int | None = None, cap: int | None = None) -> list[str]:
    words: dict[str, Any] = {
        "measure": mode, "model": args.model, "image-size": args.image_size, "num-classes": args.num_classes,
        "batch-size": batch_size or args.batch_size, "dtype": args.dtype, "device": args.device,
        "threads": args.threads, "cap-bytes": cap,
    }  # fmt: skip
    given = [w for key, value in words.items() if value is not None for w in (f"--{key}", str(value))]
    return [sys.executable, str(SPEED), *given]


def run_processes(jobs: dict[str, list[str]], together: int, deadline: float) -> dict[str, dict[str, Any]]:
    """What each process said, or ``{"problem": why it said nothing}``; ``together`` of them run at a time, in order."""
    waiting, running = list(jobs), {}
    found: dict[str, dict[str, Any]] = {}
    try:
        while waiting or running:
            late = time.monotonic() > deadline
            while waiting and not late and len(running) < together:
                name = waiting.pop(0)
                running[name] = subprocess.Popen(
                    jobs[name], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL
                )
            if late:
                found |= {name: {"problem": "no time was left for it"} for name in waiting}
                waiting = []
            for name, process in list(running.items()):
                try:
                    found[name] = _answer(*process.communicate(timeout=0.1), process.returncode)
                except subprocess.TimeoutExpired:
                    if not late:
                        continue
                    process.kill()
                    process.communicate()
                    found[name] = {"problem": "not ready in time"}
                del running[name]
    finally:
        for process in running.values():
            process.kill()
    return found


def _answer(out: str, errors: str, code: int) -> dict[str, Any]:
    with contextlib.suppress(ValueError, IndexError):
        said = json.loads(out.strip().splitlines()[-1])
        return {"problem": "out of memory"} if said.get("out_of_memory") else said
    return {"problem": f"exit code {code}: {(errors.strip().splitlines() or ['no output'])[-1][:300]}"}


def measure_all(args: argparse.Namespace, names: list[str], deadline: float) -> dict[str, dict[str, Any]]:
    """What every mode's process said; two at a time on a CPU, where none is timed."""
    together = 1 if torch.device(args.device).type == "cuda" else min(2, os.cpu_count() or 1)
    return run_processes({name: command(args, name) for name in names}, together, deadline)


# -- as much as fits -----------------------------------------------------------------------------------------------------
def largest_batch(points: dict[int, int], capacity: float) -> int:
    """By a straight line through the peaks at two batch sizes; 0 where not even one image fits."""
    (small, at_small), (large, at_large) = sorted(points.items())
    per_image = (at_large - at_small) / (large - small)
    if per_image <= 0:
        raise ValueError(f"peak memory does not grow with the batch: {points}")
    return max(0, int((capacity - (at_small - small * per_image)) / per_image))


def equal_memory(
    args: argparse.Namespace,
    names: list[str],
    deadline: float,
    tell: Callable[[str], None],
    keep: Callable[[Any], None],
) -> dict[str, Any]:
    """For each of ``args.equal_memory`` gigabytes and every mode the largest batch that fits, and the speed there.

    On CUDA the batch from the line is run under a cap on what the process may take, and reduced until it runs; times are of a
    process that runs alone, not interleaved. On a CPU there is no cap: batches are the line's, and ours is run to compare.
    """
    cuda = torch.device(args.device).type == "cuda"
    large = max(2, args.batch_size)
    found: dict[str, Any] = {f"{gb:g}": {"bytes": int(gb * GB), "modes": {}} for gb in args.equal_memory}
    first = next((n for n in names if n in OURS), names[0] if names else None)
    for name in names:
        points, problem = {}, None
        for size in (large // 2, large):
            said = run_processes({name: command(args, name, size)}, 1, deadline)[name]
            problem = problem or said.get("problem")
            points[size] = said.get("peak_bytes", 0)
        for gb, entry in found.items():
            try:
                if problem:
                    raise ValueError(problem)
                batch = largest_batch(points, entry["bytes"])
                row = {"batch_size": batch, "images_per_second": None, "peak_bytes": None, "points": points}
                row["found"] = f"fit: a line through the peaks at batches {large // 2} and {large}; not run"
                if batch and (cuda or name == first):
                    row |= _run_at(args, name, batch, entry["bytes"] if cuda else None, deadline)
            except ValueError as error:
                row = {"problem": str(error)}
            entry["modes"][name] = row
            tell(f"  {gb} GB, {name}: {row.get('batch_size', '-')} images, {row.get('found') or row.get('problem')}")
            keep(found)
    return found


def _run_at(args: argparse.Namespace, name: str, batch: int, cap: int | None, deadline: float) -> dict[str, Any]:
    """Run at this batch, or under a cap at the largest of a few smaller ones that runs."""
    size, said = batch, {}
    for _ in range(TRIES if cap else 1):
        said = run_processes({name: command(args, name, size, cap)}, 1, deadline)[name]
        if said.get("problem") != "out of memory":
            break
        size = min(size - 1, int(0.95 * size))
        if not size:
            break
    if "problem" in said:
        return {"found": f"fit; at {size} images it did not run: {said['problem']}"}
    how = f"fit said {batch}; run under a cap of {cap} bytes" if cap else "fit; run to compare, without a cap"
    return {
        "batch_size": size, "images_per_second": size / said["seconds"], "peak_bytes": said["peak_bytes"], "found": how,
    }  # fmt: skip
