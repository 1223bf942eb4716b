"""Devices: the one called by a name, and what it multiplies fast; the CPUs that there are."""

from __future__ import annotations

import functools
import math
import os
from pathlib import Path, PurePosixPath

import torch

from .errors import DiffFitError


def choose_device(name: str | torch.device | None = "auto", local_rank: int = 0) -> torch.device:
    """The device called ``name``: auto (or None), cpu, cuda or cuda:N; processes of one machine take its GPUs in turn.

    Raises:
        DiffFitError: no such device here.
    """
    if name is None or name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DiffFitError(f"--device must be auto, cpu, cuda or cuda:N; got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise DiffFitError(f"--device must be auto, cpu, cuda or cuda:N; got {str(name)!r}")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise DiffFitError(f"--device {name}: this PyTorch sees no CUDA device")
        index = local_rank % torch.cuda.device_count() if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise DiffFitError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices")
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    return device


_CONTROL_GROUPS = Path("/sys/fs/cgroup")


def usable_cpus() -> int:
    """The CPUs that this process may use: of those it may run on, as many as the quota of its control group pays for."""
    try:
        count = len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        count = os.cpu_count() or 1
    return max(1, min([count, *_quotas()]))


def _quotas() -> list[int]:
    """CPUs by the quotas of the control groups, of both versions, that this process is in."""
    files = [(_CONTROL_GROUPS / "cpu/cpu.cfs_quota_us", _CONTROL_GROUPS / "cpu/cpu.cfs_period_us")]
    try:
        own = [line[3:].strip() for line in Path("/proc/self/cgroup").read_text().splitlines() if line[:3] == "0::"]
    except OSError:
        own = []
    for group in map(PurePosixPath, own or ["/"]):
        files += [(_CONTROL_GROUPS / str(part).lstrip("/") / "cpu.max",) for part in (group, *group.parents)]
    found = []
    for parts in files:
        try:
            quota, period = map(int, " ".join(path.read_text() for path in parts).split())
        except (OSError, ValueError):  # there is none, or "max"
            continue
        if quota > 0 and period > 0:
            found.append(math.ceil(quota / period))
    return found


@functools.cache
def cpu_has_fast(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies this dtype with instructions of this CPU (AVX-512 or better for bf16)."""
    probes = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    if dtype not in probes:
        return True
    try:
        return bool(getattr(torch.ops.mkldnn, probes[dtype])())
    except (AttributeError, RuntimeError):  # a PyTorch without oneDNN
        return False


def has_fast(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether ``device`` has arithmetic of its own for ``dtype``, and does not emulate it."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type != "cpu" or cpu_has_fast(dtype)
