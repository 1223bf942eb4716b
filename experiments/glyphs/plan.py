"""Which runs experiments/glyphs/domains.py consists of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from reporting import Results

Spec = dict[str, Any]
Chosen = dict[tuple[str, str], tuple[float, int]]  # (method, images shown) -> rate, steps


def key_of(spec: Spec) -> str:
    """A readable name of a run that ends in a digest of all its settings."""
    digest = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:10]
    rate = f"{spec['lr']:g}" if spec["steps"] else "none"
    return f"{spec['domain']}/{spec['shown']}/{spec['name']}/{rate}x{spec['steps']}/seed{spec['seed']}/{digest}"


def make_spec(
    plan: Spec, base: str, name: str, domain: str, shown: int | str, seed: int, lr: float, steps: int
) -> Spec:
    """The whole configuration of one run that is measured in full; ``base`` is the SHA-256 of the base's file."""
    method = plan["methods"].get(name, {"method": "class_embedding"})
    return {
        "base": base, "domain": domain, "shown": shown, "seed": seed, "name": name, "method": method["method"],
        "options": method.get("options", {}), "lr": lr, "steps": steps, "batch": plan["batch"], "sampling": plan["sampling"],
        "looks": [],
    }  # fmt: skip


def tuning_specs(plan: Spec, base: str) -> Iterator[Spec]:
    """The runs that choose rate and length, of what is compared; they are not sampled from."""
    tuning = plan["tuning"]
    wanted = {(name, care_of(part["shown"])) for part in plan["comparison"] for name in part["methods"]}
    for shown in tuning["shown"]:
        for name, method in plan["methods"].items():
            tuned = method.get("care") != "none" and (name, str(shown)) in wanted
            for lr in method["rates"] if tuned else ():
                spec = make_spec(plan, base, name, tuning["domain"], shown, tuning["seed"], lr, max(plan["steps"]))
                yield {**spec, "sampling": None, "looks": plan["steps"]}


def chosen(plan: Spec, base: str, results: Results) -> Chosen:
    """Rate and length of each method and number of images whose tuning is complete."""
    losses: dict[tuple[str, str], dict[tuple[float, int], float]] = {}
    for spec in tuning_specs(plan, base):
        if run := results.runs.get(key_of(spec)):
            found = losses.setdefault((spec["name"], str(spec["shown"])), {})
            found |= {(spec["lr"], step): loss for step, loss in run["curve"] if step in plan["steps"]}
    best: Chosen = {}
    for (name, shown), found in losses.items():
        if len(found) == len(plan["methods"][name]["rates"]) * len(plan["steps"]):
            best[name, shown] = min(found, key=found.__getitem__)
    for name, method in plan["methods"].items():
        if method.get("care") == "none":
            best |= {(name, str(shown)): (method["rates"][0], plan["default_steps"]) for shown in plan["shown"]}
    return best


def care_of(shown: int | str) -> str:
    """For how many images the rate and length are chosen that are used with so many: half an alphabet is about 20."""
    return "20" if shown == "half" else str(shown)


def comparison_specs(plan: Spec, base: str, best: Chosen) -> Iterator[Spec]:
    """The parts of the comparison in their order, each seed by seed, so that what is interrupted is whole as far as it got."""
    seen = set()
    for part in plan["comparison"]:
        shown, care = part["shown"], care_of(part["shown"])
        for seed in plan["seeds"]:
            for domain in part["domains"]:
                where = f"half of {domain}" if shown == "half" else domain
                for name in ("none", *part["methods"]):
                    if name == "none":
                        spec = make_spec(plan, base, name, where, shown, seed, 0.0, 0)
                    elif (name, care) in best:
                        spec = make_spec(plan, base, name, where, shown, seed, *best[name, care])
                    else:
                        continue
                    if (key := key_of(spec)) not in seen:
                        seen.add(key)
                        yield spec
