"""The machine that the benchmarks run on: its name, what it is good at, its clock."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch

from difffit_fast._devices import cpu_has_fast

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
