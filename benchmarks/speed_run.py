"""The run of speed.py: memory, modes, checks, rounds, and a record of everything so far at any moment."""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from floor import Floor
from machine import DTYPES, device_name, synchronize, timed
from modes import Kind, Mode, available_modes, build_mode, compiles, kind_of, make_batch, ways, why_not
from speed_check import Reference, check, describe, make_reference, tolerance
from speed_memory import equal_memory, measure_all, out_of_memory
from speed_ratios import all_settled, ratios, spread
from speed_report import Progress, print_table

from difffit_fast import kernel_report
from difffit_fast._files import write_text

FIRST_TABLE = 3  # rounds
MAX_ROUNDS = 60
# Shares of --seconds after which no process for memory is left, and no further mode is built.
MEMORY_SHARE, BUILD_SHARE, ROUNDS_SHARE = 0.5, 0.75, 0.5  # the last with --equal-memory


class Run:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.began = args, time.monotonic()
        self.device, self.dtype = torch.device(args.device), DTYPES[args.dtype]
        self.cuda = self.device.type == "cuda"
        self.date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        self.batch = make_batch(args.config, args.batch_size, self.device)
        self.kinds: dict[str, Kind] = {}
        self.built: dict[str, Mode] = {}
        self.about: dict[str, dict[str, Any]] = {}  # of every mode that was built: sizes, its check, one step alone
        self.peaks: dict[str, int] = {}
        self.failed: dict[str, str] = {}
        self.floors: dict[str, Floor] = {}
        self.times: dict[str, list[float]] = {}
        self.reference: Reference | None = None
        self.more: dict[str, Any] = {}
        self.progress = Progress()

    def deadline(self, share: float = 1.0) -> float:
        return self.began + share * self.args.seconds if self.args.seconds else math.inf

    def execute(self) -> dict[str, Any]:
        names = self.possible()
        if not self.cuda and not self.args.no_memory:
            names = self.measure_memory(names)
        self.attempt("reference", self.make_reference)
        for name in names:
            if time.monotonic() > self.deadline(BUILD_SHARE):
                self.drop(name, f"left out: {BUILD_SHARE:.0%} of --seconds {self.args.seconds:g} were over")
            else:
                self.build(name)
            self.save(complete=False)
        self.reference = None
        self.make_floors()
        self.rounds()
        if self.args.equal_memory:
            self.equal_memory()
        result = self.record(complete=True)
        self.save(complete=True)
        return result

    def possible(self) -> list[str]:
        for name in self.args.modes:
            if (why := why_not(name, self.device)) is not None:
                self.failed[name] = why
        return [name for name in self.args.modes if name not in self.failed]

    def measure_memory(self, names: list[str]) -> list[str]:
        """Peaks of all modes; the names of those that can be built. What is compiled comes last: it may take all the time."""
        for_compiler = [n for n in names if compiles(n)]
        self.progress.line(f"peak memory of {len(names)} modes, each in a process of its own; compiling ...")
        names_in_order = [n for n in names if n not in for_compiler] + for_compiler
        said = measure_all(self.args, names_in_order, self.deadline(MEMORY_SHARE))
        for name, answer in said.items():
            if "peak_bytes" in answer:
                self.peaks[name] = answer["peak_bytes"]
                continue
            self.progress.line(f"  peak memory of {name} not measured: {answer['problem']}")
            if answer["problem"] == "out of memory":
                self.failed[name] = "out of memory in a process of its own"
            elif name in for_compiler:
                again = "what was compiled is kept, so try again, or with --seconds 0"
                self.failed[name] = f"left out: not compiled in a process of its own: {answer['problem']}; {again}"
        self.save(complete=False)
        return [n for n in names if n not in self.failed]

    def make_reference(self) -> None:
        self.reference = make_reference(self.args.config, self.args.batch_size, self.device)

    def make_floors(self) -> None:
        def make(kind: str) -> None:
            floor = Floor(self.args.config, self.args.batch_size, self.dtype, self.device, kind)
            floor.step()
            self.floors[kind] = floor

        for kind in ("frozen", "full"):
            if self.built and time.monotonic() < self.deadline(BUILD_SHARE):
                self.attempt(f"floor:{kind}", lambda kind=kind: make(kind))
            else:
                self.failed[f"floor:{kind}"] = "left out: no time for it"

    def attempt(self, name: str, action: Callable[[], None]) -> bool:
        """``action``; if it fails, ``name`` is dropped, and nothing else."""
        problem = None
        try:
            action()
        except Exception as error:  # one that fails must not lose the others
            problem = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"
            if out_of_memory(error):
                problem = f"out of memory: {problem}"
        if problem:  # here, where the error's frames no longer hold its tensors
            self.drop(name, problem)
        return problem is None

    def drop(self, name: str, why: str) -> None:
        self.failed[name] = why
        self.progress.line(f"  {name}: {why}")
        for kept in (self.built, self.about, self.times, self.peaks):
            kept.pop(name, None)
        self.floors.pop(name.removeprefix("floor:"), None)
        kind = kind_of(name)
        if not any(kind_of(other) == kind for other in self.built):
            self.kinds.pop(kind, None)
        elif kind in self.kinds:
            self.kinds[kind].clear_gradients()
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def build(self, name: str) -> None:
        self.progress.show(f"building {name} ...")
        self.attempt(name, lambda: self._build(name))

    def _build(self, name: str) -> None:
        args, known = self.args, self.kinds.get(kind_of(name))
        if self.cuda:
            before = torch.cuda.memory_allocated(self.device) - (known.held_bytes() if known else 0)
            torch.cuda.reset_peak_memory_stats(self.device)
        mode = self.built[name] = build_mode(name, args.config, self.dtype, self.device, self.batch, self.kinds)
        found = check(mode, self.reference, self.batch, tolerance(name, args.dtype)) if self.reference else None
        if found is None or not found["ok"]:
            self.failed[name] = describe(found) if found else "not checked, for want of the reference; no ratio"
            self.progress.line(f"  {name}: {self.failed[name]}")
        for _ in range(args.warmup):
            mode.step()
        synchronize(self.device)
        if self.cuda:
            if "graph" not in ways(name):  # a graph's own memory is not counted while it is replayed
                torch.cuda.reset_peak_memory_stats(self.device)
            mode.step()
            synchronize(self.device)
            self.peaks[name] = torch.cuda.max_memory_allocated(self.device) - before
        alone = self.once(mode.step)
        self.about[name] = {
            "check": found, "alone_ms": 1e3 * alone, "trainable_parameters": mode.trainable_parameters,
            "checkpoint_bytes": mode.checkpoint_bytes,
        }  # fmt: skip
        self.progress.line(
            f"built {name}: {1e3 * alone:.1f} ms a step alone, {time.monotonic() - self.began:.0f} s so far"
        )

    def once(self, step: Callable[[], None]) -> float:
        return timed(step, self.device, self.args.inner)

    def step_of(self, name: str) -> Callable[[], None]:
        """Looked up anew each time, so that nothing else keeps a dropped mode's memory."""
        return self.floors[name.removeprefix("floor:")].step if name.startswith("floor:") else self.built[name].step

    def rounds(self) -> None:
        """One step of every mode and floor in turn, until the ratios are settled, or the time or the rounds are over."""
        args, end = self.args, self.deadline(ROUNDS_SHARE if self.args.equal_memory else 1.0)
        self.times = {name: [] for name in (*self.built, *(f"floor:{kind}" for kind in self.floors))}
        longest, saved = 0.0, time.monotonic()
        self.more["stopped"] = f"{args.steps or MAX_ROUNDS} rounds"
        for done in range(1, (args.steps or MAX_ROUNDS) + 1):
            started = time.monotonic()
            if not self.built:
                self.more["stopped"] = "no mode was left"
                break
            if done > 1 and started + longest > end:
                self.more["stopped"] = f"--seconds {args.seconds:g}"
                break
            for name in list(self.times):
                if not self.attempt(name, lambda name=name: self.times[name].append(self.once(self.step_of(name)))):
                    self.failed[name] = f"in round {done}: {self.failed[name]}"
            longest = max(longest, time.monotonic() - started)
            self.progress.show(f"round {done}, {time.monotonic() - self.began:.0f} s")
            if done % FIRST_TABLE == 0 or time.monotonic() - saved > 10:
                self.save(complete=False)
                saved = time.monotonic()
            if done == FIRST_TABLE and (args.steps or MAX_ROUNDS) > done:
                self.progress.line("")
                print_table(self.record(complete=False))
                self.progress.line("A first table; more rounds follow.")
            if not args.steps and all_settled(self.record(complete=False)["ratios"]):
                self.more["stopped"] = "the ratios are settled"
                break

    def equal_memory(self) -> None:
        names = [name for name in self.built if name not in self.failed]
        self.save(complete=False)
        self.built.clear()
        self.kinds.clear()
        self.floors.clear()
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

        def keep(found: dict[str, Any]) -> None:
            self.more["equal_memory"] = found
            self.save(complete=False)

        self.progress.line("the largest batch that fits, each mode in processes of its own ...")
        equal_memory(self.args, names, self.deadline(), self.progress.line, keep)

    # -- what is told ----------------------------------------------------------------------------------------------------
    def record(self, complete: bool) -> dict[str, Any]:
        """Everything known so far. Modes whose numbers were not right are under ``without_ratio``."""
        args, right, wrong = self.args, {}, {}
        for name, about in self.about.items():
            rounds = self.times.get(name, [])
            step_ms = spread(rounds) if rounds else {key: about["alone_ms"] for key in ("median", "p10", "p90")}
            (wrong if name in self.failed else right)[name] = {
                "step_ms": step_ms,
                "rounds": len(rounds),
                "images_per_second": 1e3 * args.batch_size / step_ms["median"],
                "peak_memory_bytes": self.peaks.get(name),
                **about,
            }
        floors = {k: spread(t) for k in ("full", "frozen") if (t := self.times.get(f"floor:{k}"))}
        calls = self.floors["frozen"].calls if "frozen" in self.floors else self.more.get("calls", {})
        self.more["calls"] = calls
        floor = {f"{kind}_ms": s["median"] for kind, s in floors.items()}
        report = kernel_report()
        return {
            "complete": complete,
            "device": device_name(self.device),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "python": platform.python_version(),
            "date": self.date,
            "command": "python benchmarks/speed.py " + " ".join(sys.argv[1:]),
            "kernels": os.environ.get("DIFFFIT_FAST_KERNELS", "auto"),
            "extension": report["extension"],
            "choices": report["choices"],
            "model": args.model,
            "image_size": args.image_size,
            "batch_size": args.batch_size,
            "dtype": args.dtype,
            "steps": max((len(t) for t in self.times.values()), default=0),
            "stopped": self.more.get("stopped"),
            "seconds": round(time.monotonic() - self.began, 1),
            "floor": floor | {"calls": calls, "spread": floors},
            "modes": right,
            "without_ratio": wrong,
            "failed": self.failed,
            "not_asked_for": [name for name in available_modes(self.device) if name not in args.modes],
            "ratios": ratios(right, self.times, floor),
            "equal_memory": self.more.get("equal_memory"),
        }

    def save(self, complete: bool) -> None:
        if self.args.json:
            self.args.json.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.args.json, json.dumps(self.record(complete), indent=2, default=str) + "\n")
