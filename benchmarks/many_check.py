"""Whether the methods of many.py compute what they should, before any of them is timed.

Outputs are compared sample by sample, gradients delta by delta: one domain that is wrong is not lost among the others.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from apply import TOLERANCE
from many_models import Forward, Many, Step, shape
from safetensors.torch import load_file
from torch import Tensor

from difffit_fast.baselines.plain_difffit import PlainDiffFitDiT
from difffit_fast.models.adapt import TABLE
from difffit_fast.models.difffit import DELTAS, is_extra, neutral

APART = 4  # times what is allowed: so far must the domains be from each other for the comparison to say anything


def off(a: Tensor, b: Tensor) -> float:
    """The largest ‖aₙ − bₙ‖ / ‖bₙ‖ of the samples n; infinite where one is not a number."""
    a, b = a.float().flatten(1), b.float().flatten(1)
    errors = ((a - b).norm(dim=1) / b.norm(dim=1)).tolist()
    return max(e if e == e else float("inf") for e in errors)


@torch.no_grad()
def truth(many: Many, worn: list[str], strength: list[float] | None = None) -> Tensor:
    """What the samples wear, each by a merged float32 model: one model at a time."""
    x, t, y = many.inputs
    rows = []
    for n, name in enumerate(worn):
        model = many.model.merge(delta=name, strength=1.0 if strength is None else strength[n])
        rows.append(model(x[n : n + 1], t[n : n + 1], y[n : n + 1]))
    return torch.cat(rows)


def same(outputs: Tensor, true: Tensor, others: Tensor | None, allowed: float) -> str | None:
    """What is wrong with these outputs, in words; ``others``: what the samples would be in each other's domain."""
    if not (error := off(outputs, true)) <= allowed:
        return f"its output is off by {error:.1e}"
    if others is not None:
        x, y = others.float().flatten(1), true.float().flatten(1)
        nearest = float(((x - y).norm(dim=1) / y.norm(dim=1)).min())
        if not nearest > APART * allowed:
            return f"its domains are only {nearest:.1e} apart, and {allowed:.0e} is allowed: nothing was compared"
    return None


@torch.no_grad()
def check_outputs(many: Many, forwards: dict[str, Forward], model: Any, dtype: torch.dtype) -> dict[str, str]:
    """What is wrong with each method's outputs, in words. ``model``: PEFT's, where ``lora`` is among them."""
    wrong: dict[str, str | None] = {}
    allowed, worn = TOLERANCE[dtype], many.worn
    following = [many.names[(int(k) + 1) % len(many.names)] for k in many.index]
    several = len(many.names) > 1
    true = truth(many, worn)
    others = truth(many, following) if several else None
    for name, forward in forwards.items():
        if name in ("one", "own"):
            wrong[name] = same(forward(), truth(many, many.names[:1] * len(worn)), None, allowed)
        elif name == "mixed-strength":
            wrong[name] = same(forward(), truth(many, worn, many.strength.tolist()), others, allowed)
        elif name == "lora":
            x, t, y = many.inputs
            alone = []
            for adapter in many.names:
                model.set_adapter(adapter)
                alone.append(model(x.to(dtype), t, y))
            rows = torch.stack(alone)
            at = torch.arange(len(x), device=x.device)
            next_one = rows[(many.index + 1) % len(many.names), at] if several else None
            wrong[name] = same(forward(), rows[many.index, at], next_one, allowed)
        else:
            wrong[name] = same(forward(), true, others, allowed)
    return {name: said for name, said in wrong.items() if said is not None}


def true_gradients(
    args: argparse.Namespace, many: Many, name: str, at: Tensor, strength: Tensor | None
) -> dict[str, Tensor]:
    """Of the loss of the samples ``at``, through a plain float32 model of the delta, by parameter name.

    With a strength s a parameter is base + s·(delta − base), and its gradient s times that of what it comes to.
    """
    plain = PlainDiffFitDiT(**shape(args)).to(args.device).eval()
    x, t, y = many.inputs
    held = {k: v.float() for k, v in many.model.state_dict().items() if not k.startswith(DELTAS)}
    delta = {k: v.to(args.device) for k, v in load_file(many.files[name]).items()}
    merged_base = many.model.merge(delta=None).state_dict()
    base = {k: merged_base.get(k, torch.full_like(v, neutral(k)) if is_extra(k) else None) for k, v in delta.items()}
    found: dict[str, Tensor] = {}
    for n in at.tolist():
        factor = 1.0 if strength is None else float(strength[n])
        plain.load_state_dict(held | {k: torch.lerp(base[k], v, factor) for k, v in delta.items()})
        plain.zero_grad()
        out = plain(x[n : n + 1], t[n : n + 1], y[n : n + 1])
        (out.square().sum() / (out.numel() * len(x))).backward()
        for key, p in plain.named_parameters():
            if key in delta and p.grad is not None:
                found[key] = found.get(key, 0) + factor * p.grad
    return found


def check_gradients(args: argparse.Namespace, many: Many, steps: dict[str, Step], dtype: torch.dtype) -> dict[str, str]:
    """What is wrong with each method's gradients, in words, delta by delta."""
    wrong: dict[str, str] = {}
    everyone = torch.arange(len(many.index))
    for method, step in steps.items():
        step.forward_backward()
        mixed = method.startswith("mixed")
        strength = many.strength if method == "mixed-strength" else None
        for k, name in enumerate(many.names if mixed else many.names[:1]):
            at = (many.index == k).nonzero().flatten() if mixed else everyone
            true = true_gradients(args, many, name, at, strength)
            if method == "own":
                got = {key: p.grad for key, p in many.model.named_parameters() if key in true}
            else:
                delta = many.model.deltas[name]
                got = {**many.model.deltas.layout.unflatten(delta.vectors.grad), TABLE: delta.classes.grad}
            a, b = (torch.cat([grads[key].flatten().float() for key in true])[None] for grads in (got, true))
            if not (error := off(a, b)) <= TOLERANCE[dtype]:
                wrong[method] = f"its gradients of {name} are off by {error:.1e}"
                break
    return wrong
