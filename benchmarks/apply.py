#!/usr/bin/env python
"""Step time and memory of apply_difffit on diffusers transformers, against PEFT's LoRA and IA3 and frozen PyTorch.

    python benchmarks/apply.py                    # DiT-, PixArt- and SD3-like, S/2 wide; bf16 where the hardware has it
    python benchmarks/apply.py --json benchmarks/results/<device>/apply-fp32.json       # and then benchmarks/plots.py
    python benchmarks/apply.py --models sd3 --rounds 40

| method | trains | how |
|---|---|---|
| ``ours`` | DiffFit, the preset "paper" | ``apply_difffit`` |
| ``frozen`` | the same parameters, values and γ | ``requires_grad`` on the stock model, γ multiplied in hooks, autograd |
| ``lora`` | rank 16 on every linear of the blocks | PEFT |
| ``ia3`` | keys, values and the input of the last linear of each MLP | PEFT |

All start from the same random weights and compute the same function, which is checked, as are the gradients of ``ours``
against those of ``frozen``; a method that differs is reported and gets no ratio. A step is forward, backward and fused AdamW.
Rounds interleave: one step of each method in turn. Ratios and their intervals are those of speed_ratios.py. Saved bytes are
those of the tensors that the forward pass keeps for the backward, parameters left out, each piece of memory once. Peak bytes
are measured in a process of its own for each method, while nothing is timed.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import environment, write_json
from machine import DTYPES, default_dtype, synchronize, timed
from modes import LORA_RANK, make_optimizer
from speed_memory import resident_bytes, run_processes
from speed_ratios import median_interval, settled, spread
from torch import Tensor, nn

from difffit_fast import apply_difffit

METHODS = ("ours", "frozen", "lora", "ia3")
MODELS = ("dit", "pixart", "sd3")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}  # ‖a − b‖ / ‖b‖


# -- models ------------------------------------------------------------------------------------------------------------
def make(name: str, args: argparse.Namespace, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Any]]:
    """A model of this shape with random weights, all of them alive, and a batch for it."""
    import diffusers

    d, heads, n, side, text = args.width, args.width // 64 or 1, args.batch_size, args.side, args.text
    torch.manual_seed(0)
    common = dict(num_attention_heads=heads, attention_head_dim=d // heads, num_layers=args.depth, sample_size=side)
    noise, time = torch.randn(n, 4, side, side), torch.randint(0, 1000, (n,))
    if name == "dit":
        model = diffusers.DiTTransformer2DModel(**common, out_channels=8, num_embeds_ada_norm=101)
        batch = dict(hidden_states=noise, timestep=time, class_labels=torch.randint(0, 101, (n,)))
    elif name == "pixart":
        model = diffusers.PixArtTransformer2DModel(**common, cross_attention_dim=d, caption_channels=512)
        batch = dict(hidden_states=noise, timestep=time, encoder_hidden_states=torch.randn(n, text, 512),
                     added_cond_kwargs={"resolution": None, "aspect_ratio": None})  # fmt: skip
    else:
        model = diffusers.SD3Transformer2DModel(
            **common, in_channels=4, out_channels=4, joint_attention_dim=512, caption_projection_dim=d,
            pooled_projection_dim=256, pos_embed_max_size=side // 2,
        )  # fmt: skip
        batch = dict(hidden_states=noise, timestep=time, encoder_hidden_states=torch.randn(n, text, 512),
                     pooled_projections=torch.randn(n, 256))  # fmt: skip
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    for block in model.transformer_blocks[1:] if name == "dit" else ():
        block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    batch = {k: v.to(args.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    half = {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in batch.items()}
    # Labels are dropped at random in training mode, which no two methods would do alike.
    return model.to(args.device, dtype).eval(), half


# -- methods -----------------------------------------------------------------------------------------------------------
def frozen(base: nn.Module, applied: Any) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """The stock model with the trainables of ``applied`` in ordinary modules, and these by name."""
    base.requires_grad_(False)
    twins: dict[int, nn.Parameter] = {}
    for path, module in applied.named_modules():
        held = module.__dict__.get("_difffit")
        for leaf, dtype in held.dtypes.items() if held else ():
            p = module._parameters[leaf]
            twin = twins.setdefault(id(p), nn.Parameter(p.detach().to(dtype, copy=True)))
            target = base.get_submodule(path)
            if leaf == "gamma":
                target.register_forward_hook(lambda m, inputs, y, gamma=twin: y * gamma)
            else:
                target._parameters[leaf] = twin
    return base, {name: twins[id(p)] for name, p in applied.named_trainable_parameters()}


def build(method: str, base: nn.Module) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """The model of a method, made of ``base``, and what it trains by name."""
    if method == "ours":
        model = apply_difffit(base)
        return model, dict(model.named_trainable_parameters())
    if method == "frozen":
        return frozen(base, apply_difffit(copy.deepcopy(base)))
    import peft

    blocks = "transformer_blocks."
    if method == "lora":
        linears = [n for n, m in base.named_modules() if isinstance(m, nn.Linear) and n.startswith(blocks)]
        config: Any = peft.LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=linears)
    else:
        ends = ["ff.net.2", "ff_context.net.2"]
        config = peft.IA3Config(target_modules=["to_k", "to_v", *ends], feedforward_modules=ends)
    model = peft.get_peft_model(base, config)
    return model, {n: p for n, p in model.named_parameters() if p.requires_grad}


@dataclass
class Method:
    """A method's model, what it trains, and one training step of it; the last output is kept."""

    model: nn.Module
    trainable: dict[str, nn.Parameter]
    batch: dict[str, Any]

    def __post_init__(self) -> None:
        device = next(iter(self.trainable.values())).device
        self.optimizer = make_optimizer(list(self.trainable.values()), device)
        self.output: Tensor | None = None

    def forward(self) -> Tensor:
        return self.model(**self.batch, return_dict=False)[0]

    def forward_backward(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        out = self.forward()
        out.float().square().mean().backward()
        self.output = out.detach()

    def step(self) -> None:
        self.forward_backward()
        self.optimizer.step()


def saved_bytes(method: Method) -> int:
    """What the forward pass keeps for the backward pass beside the parameters."""
    own = {p.untyped_storage().data_ptr() for p in method.model.parameters()}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = method.forward()
    del out
    return sum(kept.values())


def check(methods: dict[str, Method], dtype: torch.dtype) -> dict[str, str]:
    """What is wrong with each method, in words; nothing where it computes what ``frozen`` does."""
    wrong: dict[str, str] = {}
    for method in methods.values():
        method.forward_backward()
    truth = methods["frozen"] if "frozen" in methods else next(iter(methods.values()))
    for name, method in methods.items():
        if not (off := _off(method.output, truth.output)) <= TOLERANCE[dtype]:
            wrong[name] = f"its output is off by {off:.1e}"
    if {"ours", "frozen"} <= set(methods) and "ours" not in wrong:
        theirs = {n: p.grad for n, p in methods["frozen"].trainable.items()}
        ours = torch.cat([p.grad.flatten().float() for p in methods["ours"].trainable.values()])
        off = _off(ours, torch.cat([theirs[n].flatten().float() for n in methods["ours"].trainable]))
        if not off <= TOLERANCE[dtype]:
            wrong["ours"] = f"its gradients are off by {off:.1e}"
    return wrong


def _off(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


# -- one model -------------------------------------------------------------------------------------------------------
def measure_peak(args: argparse.Namespace, model: str, method: str) -> dict[str, Any]:
    """Peak bytes of a few steps in this process, beyond what it held before the model was made."""
    device, cuda = torch.device(args.device), args.device.startswith("cuda")
    import diffusers  # noqa: F401 (what importing takes does not count)

    before = 0 if cuda else resident_bytes("VmRSS")
    base, batch = make(model, args, DTYPES[args.dtype])
    built = Method(*build(method, base), batch)
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")
    for _ in range(2):
        built.step()
    synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) if cuda else resident_bytes("VmHWM") - before
    return {"peak_bytes": peak}


def peaks(args: argparse.Namespace, model: str) -> dict[str, dict[str, Any]]:
    """What a process of its own said for each method, one at a time."""
    words = [
        w
        for key in ("width", "depth", "batch_size", "side", "text", "dtype", "device", "threads")
        if (value := getattr(args, key)) is not None
        for w in (f"--{key.replace('_', '-')}", str(value))
    ]
    jobs = {m: [sys.executable, __file__, "--measure", model, m, *words] for m in args.methods}
    return run_processes(jobs, 1, float("inf"))


def rounds(methods: dict[str, Method], args: argparse.Namespace) -> Iterator[dict[str, float]]:
    """Seconds of one step of each method, in turn; the order turns, too."""
    names, device = list(methods), torch.device(args.device)
    for i in range(args.rounds):
        order = names[i % len(names) :] + names[: i % len(names)]
        yield {name: timed(methods[name].step, device, args.inner) for name in order}


def run_model(model: str, args: argparse.Namespace, tell: Callable[[str], None]) -> dict[str, Any]:
    """One entry of ``modes`` for each method, and the ratios of ours against the others."""
    dtype = DTYPES[args.dtype]
    memory = {} if args.no_peak else peaks(args, model)
    base, batch = make(model, args, dtype)
    methods = {name: Method(*build(name, copy.deepcopy(base)), batch) for name in args.methods}
    wrong = check(methods, dtype)
    saved = {name: saved_bytes(method) for name, method in methods.items()}
    for method in methods.values():
        method.step()  # makes the optimizer's state
    times: dict[str, list[float]] = {name: [] for name in methods}
    for done in rounds(methods, args):
        for name, seconds in done.items():
            times[name].append(seconds)
    modes = {
        name: {
            "step_ms": spread(times[name]), "saved_bytes": saved[name],
            "peak_memory_bytes": memory.get(name, {}).get("peak_bytes"),
            "trainable_parameters": sum(p.numel() for p in method.trainable.values()), "problem": wrong.get(name),
        }
        for name, method in methods.items()
    }  # fmt: skip
    parameters = sum(p.numel() for p in base.parameters())
    result = {"parameters": parameters, "modes": modes, "ratios": ratios(modes, times)}
    tell(table(model, result))
    return result


def ratios(modes: dict[str, Any], times: dict[str, list[float]]) -> dict[str, Any]:
    """``vs_<method>``: how much faster ours is; nothing for methods that computed something else."""
    right = [name for name in modes if modes[name]["problem"] is None]
    out: dict[str, Any] = {}
    for name in right if "ours" in right else ():
        if name != "ours":
            single = [a / b for a, b in zip(times[name], times["ours"], strict=True)]
            value, interval = (
                modes[name]["step_ms"]["median"] / modes["ours"]["step_ms"]["median"],
                median_interval(single),
            )
            out[f"vs_{name}"] = {"of": name, "ratio": value} | {
                f"round_{k}": v / 1e3 for k, v in spread(single).items()
            }
            out[f"vs_{name}"] |= {"interval": interval, "settled": settled(interval)}
    return out


def table(model: str, result: dict[str, Any]) -> str:
    lines = [
        f"{model}, {result['parameters'] / 1e6:.1f} M parameters",
        f"  {'method':8} {'ms/step':>9} {'p10–p90':>17} {'saved MiB':>10} {'peak MiB':>9} {'trained':>10}  ours is",
    ]
    for name, row in result["modes"].items():
        t, ratio = row["step_ms"], result["ratios"].get(f"vs_{name}")
        saved, peak = (f"{row[k] / 2**20:.1f}" if row[k] else "-" for k in ("saved_bytes", "peak_memory_bytes"))
        says = row["problem"] or ""
        if ratio:
            says = f"{ratio['ratio']:.2f}× as fast ({ratio['round_p10']:.2f}–{ratio['round_p90']:.2f})"
        span, trained = f"{t['p10']:.1f}–{t['p90']:.1f}", row["trainable_parameters"]
        lines.append(f"  {name:8} {t['median']:9.1f} {span:>17} {saved:>10} {peak:>9} {trained:10,}  {says}")
    return "\n".join(lines)


# -- command line --------------------------------------------------------------------------------------------------
def parse(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    p.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    p.add_argument("--width", type=int, default=384)
    p.add_argument("--depth", type=int, default=12)
    p.add_argument("--batch-size", type=int, default=4)
    p.add_argument("--side", type=int, default=32, help="of the latents; (side/2)² tokens")
    p.add_argument("--text", type=int, default=64, help="tokens of text")
    p.add_argument("--rounds", type=int, default=20)
    p.add_argument("--inner", type=int, default=1, help="steps between two looks at the clock")
    p.add_argument("--dtype", choices=sorted(DTYPES), default=None, help="bf16 where the hardware has it, else fp32")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--threads", type=int, default=None)
    p.add_argument("--no-peak", action="store_true", help="skip the processes that measure peak memory")
    p.add_argument("--json", type=Path, default=None)
    p.add_argument("--measure", nargs=2, default=None, help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    args.dtype = args.dtype or default_dtype(torch.device(args.device))
    if args.threads:
        torch.set_num_threads(args.threads)
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.measure:
        print(json.dumps(measure_peak(args, *args.measure)), flush=True)
        return 0
    record = {"complete": False} | environment(torch.device(args.device))
    record |= {name: importlib.metadata.version(name) for name in ("diffusers", "peft")}
    record |= {k: getattr(args, k) for k in ("width", "depth", "batch_size", "side", "text", "rounds", "dtype")}
    record["models"] = {}
    for name in args.models:
        record["models"][name] = run_model(name, args, lambda text: print(text, flush=True))
        record["complete"] = name == args.models[-1]
        if args.json:
            write_json(args.json, record)
    return 1 if any(m["problem"] for r in record["models"].values() for m in r["modes"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
