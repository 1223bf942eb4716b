"""Choosing between implementations of one operation by timing them once per problem, on the device, and remembering it.

A choice is made the first time a problem is met outside a CUDA graph capture, and stays for the life of the process.
Under ``torch.use_deterministic_algorithms(True)`` nothing is timed, because a choice by the clock may differ from run
to run and with it the last bit of a sum: the default is taken.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch

ROUNDS = 5  # timings of each candidate, in turn with the others
REPEATS = 4  # launches in one timing
ADVANTAGE = 0.98  # a candidate replaces the default when it needs at most this share of the default's time
_BACKLOG_CYCLES = 1_000_000  # about half a millisecond in which the host can enqueue what is to be timed


@dataclass
class Decision:
    """What was chosen for one problem and why. ``times_us``: median time of each candidate, inf for one that failed."""

    chosen: str
    why: str
    times_us: dict[str, float] = field(default_factory=dict)
    lasting: bool = True


class Chooser:
    """The choices of one operation.

    Args:
        default: name of the candidate that is used unless another is clearly faster.
        timer: times a call on a device, in microseconds (replaced in tests).
        around: the context to time in.
    """

    def __init__(
        self,
        default: str,
        timer: Callable[[Callable[[], Any], torch.device], float] | None = None,
        around: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        self.default = default
        self._around = around
        self._timer = timer or time_once
        self._decisions: dict[tuple, Decision] = {}
        self._lock = threading.Lock()

    def choose(
        self, key: tuple, candidates: dict[str, Callable[[], Any]], device: torch.device, default: str | None = None
    ) -> str:
        """Name of the candidate to use for the problem ``key``; the candidates must leave their inputs unchanged.

        ``default``: the default of this problem, where not all have one. Where the default fails, the fastest of the others
        is taken; where all fail, its error is raised.
        """
        default = default or self.default
        if torch.are_deterministic_algorithms_enabled():
            self.record(key, Decision(default, "deterministic algorithms: nothing is timed", lasting=False))
            return default
        known = self._decisions.get(key)
        if known is not None and known.lasting:
            return known.chosen
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            why = "first met inside a CUDA graph capture, where nothing can be timed"
            return self.record(key, Decision(default, why, lasting=False))
        with self._around():
            return self.record(key, self._compare(candidates, device, default))

    def known(self, key: tuple) -> str | None:
        """What was chosen for good for the problem ``key`` and would be taken now; None where nothing was yet."""
        found = None if torch.are_deterministic_algorithms_enabled() else self._decisions.get(key)
        return found.chosen if found is not None and found.lasting else None

    def record(self, key: tuple, decision: Decision) -> str:
        """Keep ``decision`` unless a lasting one is there already; returns the choice that holds."""
        with self._lock:
            known = self._decisions.get(key)
            if known is None or not known.lasting:
                self._decisions[key] = known = decision
            return known.chosen

    def report(self) -> list[dict[str, Any]]:
        """One entry per problem: ``problem``, ``chosen``, ``why``, ``times_us``."""
        with self._lock:
            items = sorted(self._decisions.items(), key=lambda item: str(item[0]))
        return [
            {
                "problem": key,
                "chosen": d.chosen,
                "why": d.why,
                "times_us": {n: round(t, 2) for n, t in d.times_us.items()},
            }
            for key, d in items
        ]

    def clear(self) -> None:
        """Forget everything (for tests and benchmarks)."""
        with self._lock:
            self._decisions.clear()

    def _compare(self, candidates: dict[str, Callable[[], Any]], device: torch.device, default: str) -> Decision:
        times: dict[str, list[float]] = {name: [] for name in candidates}
        failed: dict[str, str] = {}
        for round_ in range(ROUNDS + 1):  # the first one compiles, loads and fills caches
            for name, call in candidates.items():
                if name in failed:
                    continue
                try:
                    time = self._timer(call, device)
                except (RuntimeError, NotImplementedError) as error:
                    failed[name] = str(error).partition("\n")[0]
                    if len(failed) == len(candidates):
                        raise
                    continue
                if round_:
                    times[name].append(time)
        medians = {name: math.inf if name in failed else statistics.median(times[name]) for name in candidates}
        best = min(medians, key=lambda name: medians[name])
        if best != default and medians[best] > ADVANTAGE * medians[default]:
            best = default
        if failed:
            why = "; ".join(f"{name} failed: {error}" for name, error in failed.items())
        elif best == default:
            why = "no other candidate is clearly faster"
        else:
            why = f"{medians[default] / medians[best]:.2f} times as fast as {default}"
        return Decision(best, why, medians)


def time_once(call: Callable[[], Any], device: torch.device) -> float:
    """Mean time of :data:`REPEATS` calls in a row on the current stream of ``device``, in microseconds.

    CUDA events tell it, and the device is kept busy while the calls are enqueued, so that short kernels are timed and not the
    host; on a CPU the clock does.
    """
    if device.type == "cpu":
        began = time.perf_counter()
        for _ in range(REPEATS):
            call()
        return (time.perf_counter() - began) * 1e6 / REPEATS
    with torch.cuda.device(device):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        busy = getattr(torch.cuda, "_sleep", None)
        if busy is not None:
            busy(_BACKLOG_CYCLES)
        start.record()
        for _ in range(REPEATS):
            call()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) * 1000 / REPEATS
