#!/usr/bin/env python
"""A batch whose samples wear eight deltas, one each, against one delta for all, merged models in turn, and PEFT's LoRA.

    python benchmarks/many.py                     # DiT-S/2 at 256 tokens, batch 8; bf16 where the hardware has it
    python benchmarks/many.py --json benchmarks/results/<device>/many-fp32.json        # and then benchmarks/plots.py
    python benchmarks/many.py --device cuda --width 1152 --depth 28 --batch-size 32 --domains 32

| method | the batch | inference | training step |
|---|---|---|---|
| ``one`` | one delta for all samples, ``delta="d0"`` | yes | yes |
| ``own`` | the same values as the model's own parameters | yes | yes |
| ``mixed`` | sample n wears delta n mod K, ``delta=`` their numbers | yes | yes |
| ``mixed-strength`` | the same, with a strength for each sample | yes | yes |
| ``merged`` | K merged DiTs in turn, each with the samples of its domain | yes | a merged model trains nothing |
| ``lora`` | K adapters of PEFT on qkv, proj, fc1, fc2, ``adapter_names=`` | yes | PEFT mixes adapters in inference only |

Inference is a forward pass without gradients; a training step is forward, backward and fused AdamW over the deltas that the
batch wears. All models are in eval mode (labels are dropped at random otherwise) and begin with the same random weights.
Merged models and LoRA's are held in the dtype of the run. Rounds interleave: one batch of each method, in an order that turns.

Checked before any ratio, in the dtype of the run: the outputs of ``one``, ``own``, ``mixed``, ``mixed-strength`` and ``merged``
sample by sample against a merged float32 DiT of the sample's delta and strength; the gradients of every delta against those of
PyTorch's autograd through a plain float32 model of it. LoRA computes another function: each of its samples is compared
with the adapter set for the whole model. The domains must differ by far more than what is allowed, or nothing is said.
A method that differs gets no ratio. Ratios, those of a method's time to that of ``one``, and their intervals are made as in
speed_ratios.py. Peak bytes are measured in a process of its own for each method, while nothing is timed.

What arithmetic says before anything is measured (``prediction`` in the file), for N samples of T tokens, L blocks of width D, K
deltas of P vector entries and C class rows, LoRA of rank r, in flops of matrix products and bytes of float32:

    the forward of one    N·L·(24·T·D² + 4·T²·D + 12·D²)
    mixed adds            2·(N − 1)·L·D² for the value bias: one product for each sample, which a batch of one delta does once;
                          (K + 1)·(P + C·D)·4 bytes that are laid side by side, and N·(P + D)·4 that are gathered from there,
                          each read and written once, and a few passes over what is gathered
    lora adds             32·N·T·L·D·r, in 8·K small products in each block
    merged adds           nothing, but reads the weights K times, for N/K samples each time
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import importlib.metadata
import importlib.util
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from common import environment, write_json
from machine import DTYPES, default_dtype, synchronize, timed
from many_check import check_gradients, check_outputs
from many_models import Many, lora, make_many, make_step, merged, ours
from modes import LORA_RANK
from safetensors.torch import save_file
from speed_memory import resident_bytes, run_processes
from speed_ratios import median_interval, settled, spread
from torch import Tensor

from difffit_fast import DiT
from difffit_fast.models.difffit import DELTAS, is_extra

PHASES = {"inference": ("one", "own", "mixed", "mixed-strength", "merged", "lora"),
          "training": ("one", "own", "mixed", "mixed-strength")}  # fmt: skip
METHODS = PHASES["inference"]
LEFT_OUT = {"merged": "a merged model trains nothing", "lora": "PEFT mixes adapters in inference only"}


# -- bytes -------------------------------------------------------------------------------------------------------------
def domain_bytes(many: Many, models: list[DiT], model: Any, folder: Path) -> dict[str, dict[str, int]]:
    """``disk`` and ``memory`` of one more domain, for what there is: the delta, a merged model, an adapter."""
    delta = many.model.deltas[many.names[0]]
    held = [*delta.parameters(), *delta.buffers()]
    found = {"delta": {"disk": many.files[many.names[0]].stat().st_size, "memory": sum(t.nbytes for t in held)}}
    states: dict[str, dict[str, Tensor]] = {"merged": models[0].state_dict()} if models else {}
    if model is not None:
        import peft

        states["lora"] = peft.get_peft_model_state_dict(model, adapter_name=many.names[0])
    for name, state in states.items():
        path = folder / f"{name}.safetensors"
        save_file({key: value.contiguous().clone() for key, value in state.items()}, path)
        found[name] = {"disk": path.stat().st_size, "memory": sum(t.nbytes for t in state.values())}
    return found


def prediction(args: argparse.Namespace, entries: int, parameters: int) -> dict[str, float]:
    """The arithmetic at the top, in numbers. ``entries``: P; ``parameters``: of the DiT."""
    n, d, depth, t, k = args.batch_size, args.width, args.depth, (args.side // 2) ** 2, args.domains
    forward = n * depth * (24 * t * d**2 + 4 * t**2 * d + 12 * d**2)
    value, adapters = 2 * (n - 1) * depth * d**2, 32 * n * t * depth * d * args.rank
    rows = args.classes + 1  # and the null class
    weights = parameters * DTYPES[args.dtype].itemsize
    return {
        "vector_entries": entries, "forward_flops": forward, "mixed_value_bias_flops": value,
        "mixed_stacked_bytes": 4 * (k + 1) * (entries + rows * d), "mixed_gathered_bytes": 4 * n * (entries + d),
        "lora_flops": adapters,
        "merged_weight_bytes": k * weights, "one_weight_bytes": weights,
        "mixed_flops_times_one": 1 + value / forward, "lora_flops_times_one": 1 + adapters / forward,
    }  # fmt: skip


# -- the run -----------------------------------------------------------------------------------------------------------
def build(args: argparse.Namespace, many: Many, phase: str, method: str) -> tuple[Callable[[], Any], Any]:
    """One batch of a method, to be called, and the models that it is made of."""
    if phase == "training":
        return make_step(many, method), None
    if method == "merged":
        forward, models = merged(many, DTYPES[args.dtype])
    elif method == "lora":
        forward, models = lora(args, many)
    else:
        forward, models = ours(many, method), None
    return torch.no_grad()(forward), models


def measure_peak(args: argparse.Namespace, phase: str, method: str) -> dict[str, Any]:
    """Peak bytes of a few batches in this process, beyond what it held before the model was made."""
    device = torch.device(args.device)
    cuda = device.type == "cuda"
    if method == "lora":
        import peft  # noqa: F401 (what importing takes does not count)
    before = 0 if cuda else resident_bytes("VmRSS")
    with tempfile.TemporaryDirectory() as folder:
        many = make_many(args, Path(folder))
    run, _held = build(args, many, phase, method)
    if method in ("merged", "lora"):  # the model that they are made of does not count
        del many.model
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):  # glibc keeps what is freed, unless it is asked
            ctypes.CDLL(None).malloc_trim(0)
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")
    for _ in range(2):
        run()
    synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) if cuda else resident_bytes("VmHWM") - before
    return {"peak_bytes": peak}


SHAPE = ("width", "depth", "batch_size", "side", "classes", "domains", "rank", "dtype")


def peaks(args: argparse.Namespace, phase: str) -> dict[str, dict[str, Any]]:
    """What a process of its own said for each method, one at a time."""
    words = [
        w
        for key in (*SHAPE, "device", "threads")
        if (value := getattr(args, key)) is not None
        for w in (f"--{key.replace('_', '-')}", str(value))
    ]
    wanted = [method for method in PHASES[phase] if method in args.methods]
    return run_processes(
        {m: [sys.executable, __file__, "--measure", phase, m, *words] for m in wanted}, 1, float("inf")
    )


def rounds(runs: dict[tuple[str, str], Callable[[], Any]], args: argparse.Namespace) -> Iterator[dict[Any, float]]:
    """Seconds of one batch of each method in each phase, in turn; the order turns, too."""
    names, device = list(runs), torch.device(args.device)
    for i in range(args.rounds):
        start = i % len(names)
        yield {name: timed(runs[name], device, args.inner) for name in names[start:] + names[:start]}


def ratios(modes: dict[str, Any], times: dict[str, list[float]]) -> dict[str, Any]:
    """Of each method's time to that of ``one``; nothing for methods that computed something else."""
    right = [name for name in modes if modes[name]["problem"] is None]
    out: dict[str, Any] = {}
    for name in right if "one" in right else ():
        if name != "one":
            single = [a / b for a, b in zip(times[name], times["one"], strict=True)]
            value = modes[name]["batch_ms"]["median"] / modes["one"]["batch_ms"]["median"]
            interval = median_interval(single)
            out[name] = {"ratio": value} | {f"round_{k}": v / 1e3 for k, v in spread(single).items()}
            out[name] |= {"interval": interval, "settled": settled(interval)}
    return out


def run(args: argparse.Namespace) -> dict[str, Any]:
    """What the file holds: bytes of a domain, and for each phase ``modes`` and their ``ratios`` to ``one``."""
    dtype = DTYPES[args.dtype]
    memory = {phase: {} if args.no_peak else peaks(args, phase) for phase in PHASES}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        many = make_many(args, folder)
        parts = {
            (phase, m): build(args, many, phase, m) for phase, names in PHASES.items() for m in names if m in args.methods
        }  # fmt: skip
        adapters = parts.get(("inference", "lora"), (None, None))[1]
        models = parts.get(("inference", "merged"), (None, []))[1]
        runs = {key: part[0] for key, part in parts.items()}
        steps = {m: r for (phase, m), r in runs.items() if phase == "training"}
        wrong = {
            "inference": check_outputs(
                many, {m: r for (phase, m), r in runs.items() if phase == "inference"}, adapters, dtype
            ),
            "training": check_gradients(args, many, steps, dtype),
        }
        for method, said in wrong["inference"].items():
            if method in steps:
                wrong["training"].setdefault(method, said)
        sizes = domain_bytes(many, models, adapters, folder)
    own = [p for n, p in many.model.named_parameters() if not n.startswith(DELTAS) and not is_extra(n)]
    parameters = sum(p.numel() for p in own)
    gc.collect()
    for call in runs.values():
        call()  # makes the optimizers' state
    times: dict[Any, list[float]] = {key: [] for key in runs}
    for done in rounds(runs, args):
        for key, seconds in done.items():
            times[key].append(seconds)
    result: dict[str, Any] = {
        "parameters": parameters, "prediction": prediction(args, many.model.deltas.layout.size, parameters),
        "domain_bytes": sizes, "left_out": {m: why for m, why in LEFT_OUT.items() if m in args.methods},
    }  # fmt: skip
    for phase in PHASES:
        mine = {m: times[p, m] for p, m in runs if p == phase}
        modes = {}
        for method, seconds in mine.items():
            said = memory[phase].get(method, {})
            ms = spread(seconds)
            modes[method] = {
                "batch_ms": ms, "samples_per_second": 1e3 * args.batch_size / ms["median"],
                "peak_memory_bytes": said.get("peak_bytes"), "memory_problem": said.get("problem"),
                "problem": wrong[phase].get(method),
            }  # fmt: skip
        result[phase] = {"modes": modes, "ratios": ratios(modes, mine)}
    return result


def table(args: argparse.Namespace, result: dict[str, Any]) -> str:
    expected = result["prediction"]
    lines = [
        f"{result['parameters'] / 1e6:.1f} M parameters, batch {args.batch_size} in {args.domains} domains, {args.dtype}; "
        f"by flops mixed is {expected['mixed_flops_times_one']:.4f} × one, lora {expected['lora_flops_times_one']:.3f} × one"
    ]
    for phase in PHASES:
        head = f"  {phase:16} {'ms/batch':>9} {'p10–p90':>17} {'samples/s':>10} {'peak MiB':>9}  × one"
        lines.append(head)
        for name, row in result[phase]["modes"].items():
            t, ratio = row["batch_ms"], result[phase]["ratios"].get(name)
            says = row["problem"] or row["memory_problem"] or ""
            if ratio:
                interval = ratio["interval"]
                span = f"({interval[0]:.3f}–{interval[1]:.3f})" if interval else "(too few rounds for an interval)"
                says = f"{ratio['ratio']:.3f} {span} {says}".rstrip()
            peak = f"{row['peak_memory_bytes'] / 2**20:.1f}" if row["peak_memory_bytes"] else "-"
            span = f"{t['p10']:.1f}–{t['p90']:.1f}"
            lines.append(
                f"  {name:16} {t['median']:9.1f} {span:>17} {row['samples_per_second']:10.1f} {peak:>9}  {says}"
            )
    for name, size in result["domain_bytes"].items():
        lines.append(f"  a domain more, {name:7} {size['disk']:>14,} bytes on disk {size['memory']:>14,} in memory")
    return "\n".join(lines)


# -- command line --------------------------------------------------------------------------------------------------
def parse(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    there = [m for m in METHODS if m != "lora" or importlib.util.find_spec("peft")]
    p.add_argument("--methods", nargs="+", choices=METHODS, default=there)
    p.add_argument("--width", type=int, default=384)
    p.add_argument("--depth", type=int, default=12)
    p.add_argument("--batch-size", type=int, default=8)
    p.add_argument("--side", type=int, default=32, help="of the latents; (side/2)² tokens")
    p.add_argument("--classes", type=int, default=101, help="of every delta")
    p.add_argument("--domains", type=int, default=8, help="deltas, at most as many as samples")
    p.add_argument("--rank", type=int, default=LORA_RANK, help="of LoRA")
    p.add_argument("--rounds", type=int, default=20)
    p.add_argument("--inner", type=int, default=1, help="batches between two looks at the clock")
    p.add_argument("--dtype", choices=sorted(DTYPES), default=None, help="bf16 where the hardware has it, else fp32")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--threads", type=int, default=None)
    p.add_argument("--no-peak", action="store_true", help="skip the processes that measure peak memory")
    p.add_argument("--json", type=Path, default=None)
    p.add_argument("--measure", nargs=2, default=None, help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    if not 1 <= args.domains <= args.batch_size:
        p.error(f"--domains must be from 1 to the batch size, {args.batch_size}; got {args.domains}")
    args.dtype = args.dtype or default_dtype(torch.device(args.device))
    if args.threads:
        torch.set_num_threads(args.threads)
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.measure:
        print(json.dumps(measure_peak(args, *args.measure)), flush=True)
        return 0
    record = environment(torch.device(args.device)) | {key: getattr(args, key) for key in (*SHAPE, "rounds")}
    record["peft"] = importlib.metadata.version("peft") if "lora" in args.methods else None
    result = run(args)
    print(table(args, result), flush=True)
    if args.json:
        write_json(args.json, {"complete": True} | record | result)
    return 1 if any(m["problem"] for phase in PHASES for m in result[phase]["modes"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
